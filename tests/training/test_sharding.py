"""ZeRO stages over quantized bases: equal first losses everywhere, and under stage 3 each process holds its share."""

import json

import pytest
from safetensors.torch import load_file, save_file

from lsr_scale.model import load_config, meta_model
from lsr_scale.planning.sizes import frozen_bytes, quantized_layers
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import completions, save_llama, tiny_run, write_rows
from tests.ranks.three_ranks import BASES
from tests.ranks.two_ranks_sharding import (
    COMBINATIONS,
    DEFAULT,
    GATHERED,
    MEASURED,
    METHODS,
    first_losses,
)

pytestmark = [pytest.mark.slow, two_processes]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    save_llama(folder / "model", num_hidden_layers=2)
    save_llama(folder / "deep", num_hidden_layers=5)
    save_llama(folder / "larger", hidden_size=256, intermediate_size=688, num_hidden_layers=6, head_dim=64)
    weights = folder / "larger" / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    write_rows(folder / "rows.jsonl", completions(8))
    tiny_run(folder)
    return folder


@pytest.fixture(scope="module")
def seen(place):
    """Run two_ranks_sharding.py once for all tests."""
    status, out, err = run_ranks("tests.ranks.two_ranks_sharding", place)
    assert status == 0, out + err
    return [json.loads((place / f"sharding-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(place):
    """Return the losses of one process without DeepSpeed, which sees the same rows in each step."""
    losses = {}
    accumulated = {"gradient_accumulation_steps": 2}
    for base, method, mode in dict.fromkeys(tuple(rest) for _, *rest in COMBINATIONS):
        losses[base, method, mode], _ = first_losses(place, base, method, mode, training=accumulated)
    return losses


@pytest.mark.parametrize("combination", COMBINATIONS, ids="/".join)
def test_first_losses_are_those_of_one_process_to_four_digits(seen, alone, combination):
    stage, *rest = combination
    name = "/".join(combination)
    found, expected = seen[0]["losses"][name], alone[tuple(rest)]
    assert len(found) == 3
    assert found == seen[1]["losses"][name]
    assert found[0] == pytest.approx(expected[0], rel=5e-5)
    assert found[1:] == pytest.approx(expected[1:], rel=2e-4), "after steps of Adam, which follow a gradient's sign"
    assert seen[0]["sharded"][name] == stage.startswith("zero3")


@pytest.mark.parametrize("method", METHODS)
def test_those_losses_see_the_gradients(place, alone, method):
    untrained, _ = first_losses(
        place, "none", method, DEFAULT, training={"gradient_accumulation_steps": 2, "learning_rate": 1e-12}
    )
    found = alone["none", method, DEFAULT]
    assert found[0] == pytest.approx(untrained[0], rel=1e-6)
    for after, before in zip(found[1:], untrained[1:], strict=True):
        assert abs(after - before) > 10 * 2e-4 * before


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("base", "checkpoint"), MEASURED)
def test_zero3_holds_a_share_of_the_base_on_each_process_from_the_first_weight_on(seen, place, rank, base, checkpoint):
    found = seen[rank]["bytes"][f"{base}/{'checkpoint' if checkpoint else 'random'}"]
    assert found["whole_bytes"] > 2_500_000
    assert 0.5 <= found["after_step_of_whole"] <= 0.55
    assert found["loaded_bytes"] <= 0.55 * found["whole_bytes"]
    assert found["load_peak_of_whole"] < 0.75
    assert found["whole_load_peak_bytes"] >= found["whole_bytes"], "the meter sees what is made"
    # what lsr-scale plan says: the share, the states, and one weight being quantized
    empty = meta_model(load_config(str(place / "larger")))
    frozen = frozen_bytes(empty, quantized_layers(empty) if base != "none" else [], base, True)
    share = frozen.state + frozen.matrices // 2
    assert found["whole_bytes"] == frozen.total
    assert found["load_peak_bytes"] == pytest.approx(share + frozen.largest, rel=0.06)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("base", "fused"), GATHERED)
def test_a_layer_is_unsharded_and_the_next_one_prefetched_and_never_more(seen, place, rank, base, fused):
    empty = meta_model(load_config(str(place / "larger")))
    frozen = frozen_bytes(empty, quantized_layers(empty) if base != "none" else [], base, True)
    layer = frozen.layers / 6
    found = seen[rank]["gathered"][f"{base}/{fused}"]
    assert found == pytest.approx(max(2 * layer, layer + frozen.head), rel=0.02)


def test_three_processes_hold_and_compute_what_one_does(place):
    status, out, err = run_ranks("tests.ranks.three_ranks", place, number=3)
    assert status == 0, out + err
    for rank in range(3):
        seen = json.loads((place / f"three-{rank}.json").read_text())
        assert list(seen) == list(BASES)
        for base, found in seen.items():
            assert found["logits"], base
            assert found["matrices"], base
            assert found["left"] == 0, "nothing stays gathered"
            whole, sharded = found["scores"]
            assert whole == sharded
            assert len(whole) == 2
