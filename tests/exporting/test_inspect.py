"""What `inspect` says of an adapter is what dense linear algebra says of its update and factors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lsr_scale.adapters import METHODS
from lsr_scale.cli import main
from lsr_scale.exporting import export, open_adapter
from lsr_scale.exporting.base_factors import with_base_factors
from lsr_scale.exporting.inspect import draw, inspect_adapter, short_names
from tests.exporting.test_folder import LOW_RANK, base_folder, saved  # noqa: F401


def dense(source, name):
    if source.is_low_rank:
        down, up = source.pair(name)
        return (up @ down).double()
    return source.delta(name).double()


@pytest.mark.parametrize("method", [*sorted(METHODS), "lora"])
def test_singular_values_are_those_of_the_dense_update(base_folder, tmp_path, method):  # noqa: F811
    adapter = saved(base_folder, tmp_path / "adapter", method)
    report, source = inspect_adapter(adapter), with_base_factors(open_adapter(adapter))
    assert (report["method"], len(report["modules"])) == (method, 14)
    assert report["parameters"] == sum(p.numel() for m in source.modules.values() for p in m.values())
    for name, module in report["modules"].items():
        wanted = torch.linalg.svdvals(dense(source, name))
        found = torch.tensor(module["update"]["singular_values"], dtype=torch.float64)
        torch.testing.assert_close(found, wanted[: len(found)], rtol=1e-5, atol=1e-6 * float(wanted[0]))
        if method in [*LOW_RANK, "lora"]:
            assert len(found) == module["rank"]
            assert float(wanted[len(found) :].norm()) < 1e-5 * float(wanted[0])
        assert module["update"]["norm"] == pytest.approx(float(dense(source, name).norm()), rel=1e-5)
        assert 1 <= module["update"]["effective_rank"] <= len(found) + 1e-9
        for factor, spectrum in module["factors"].items():
            value = source.modules[name][factor].double()
            assert spectrum["shape"] == list(value.shape)
            assert spectrum["norm"] == pytest.approx(float(value.norm()))


def test_condition_and_effective_rank_of_known_terms(base_folder, tmp_path):  # noqa: F811
    adapter = saved(base_folder, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    one, two, zero = (f"base_model.model.model.layers.{layer}.mlp.up_proj.lsr_down_left" for layer in (0, 1, 1))
    shape = tensors[one].shape  # three terms
    orthogonal = torch.zeros(shape)
    for term, size in enumerate((4.0, 2.0, 1.0)):
        orthogonal[term].view(-1)[term] = size
    tensors[one] = orthogonal
    tensors[two] = torch.ones(shape)  # one term, three times
    zero = zero.replace("down_left", "up_right")
    tensors[zero] = torch.zeros_like(tensors[zero])
    save_file(tensors, file)
    modules = inspect_adapter(adapter)["modules"]
    known = modules["model.layers.0.mlp.up_proj"]["factors"]["down_left"]
    assert known["singular_values"] == pytest.approx([4, 2, 1])
    assert known["condition"] == pytest.approx(4)
    same = modules["model.layers.1.mlp.up_proj"]["factors"]["down_left"]
    assert same["effective_rank"] == pytest.approx(1)
    assert same["condition"] is None or same["condition"] > 1e7
    still = modules["model.layers.1.mlp.up_proj"]["update"]
    assert (still["norm"], still["condition"], still["effective_rank"]) == (0, None, 0)


def test_a_table_a_picture_and_json(base_folder, tmp_path, capsys):  # noqa: F811
    adapter = saved(base_folder, tmp_path / "adapter", "kron_lora")
    assert main(["inspect", str(adapter)]) == 0
    shown = capsys.readouterr().out
    for words in ("kron_lora (rank 4", "Updates", "gate_proj", "32 bits a parameter", "factors  --all"):
        assert words in shown
    assert "right_down" not in shown
    assert len(shown.splitlines()) <= 24
    assert main(["inspect", str(adapter), "--all"]) == 0
    assert "right_down" in capsys.readouterr().out
    assert (adapter / "spectra.png").read_bytes().startswith(b"\x89PNG")
    export(adapter, "adapter", tmp_path / "small", bits=4, verify=False, say=lambda text: None)
    assert main(["inspect", str(tmp_path / "small"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["bits_per_parameter"] < 6
    assert not (tmp_path / "small" / "spectra.png").exists()
    assert main(["inspect", str(tmp_path)]) == 2
    assert "there is no adapter" in capsys.readouterr().err


@pytest.mark.usefixtures("rendered")
def test_an_untrained_adapter_can_be_drawn(base_folder, tmp_path):  # noqa: F811
    adapter = saved(base_folder, tmp_path / "adapter", scale=0.0)
    draw(inspect_adapter(adapter), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_short_names_tell_names_apart():
    names = ["m.layers.*.attn.proj", "m.layers.*.mlp.proj", "m.layers.*.mlp.up", "head"]
    assert list(short_names(names).values()) == ["attn.proj", "mlp.proj", "up", "head"]
