"""Two CPU processes: every ZeRO stage, plain DDP, stopping and resuming, and mistakes."""

import json
import re
import shutil

import pytest
import torch
import yaml

from lsr_scale import cli
from lsr_scale.config import dump_yaml, load_run
from lsr_scale.exporting import open_adapter
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.checkpoint import select
from tests.helpers.ranks import COMMAND, run_ranks
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import (
    completions,
    do,
    factors,
    metrics,
    questions,
    results,
    same,
    save_llama,
    tiny_run,
    write_rows,
)
from tests.ranks.two_ranks import EIGHT_BIT, STOPPED
from tests.training.test_chat import chats
from tests.training.test_resume import Killed, arrange_stop

pytestmark = [pytest.mark.slow, two_processes]
STAGES = ["zero0", "zero1", "zero2", "zero3"]


def one_process(place, name):
    """Return a run of one process that has as many rows a step as two."""
    training = {"output_dir": str(place / name), "gradient_accumulation_steps": 2, "fused": "off"}
    return tiny_run(place, training=training, eval={"tasks": []})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # int8 rotates in blocks of 64
    save_llama(folder / "model", num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    tiny_run(folder)
    return folder


@pytest.fixture(scope="module")
def ran(place):
    """Run two_ranks.py once for all tests: four steps, the last of which lacks one of its four rows."""
    write_rows(place / "rows.jsonl", completions(15))
    # one process has three and the other two; batches of zero3 hold a choice each
    write_rows(place / "questions.jsonl", questions(5))
    save_llama(place / "talking", chat=True)
    write_rows(place / "talk.jsonl", chats(12))
    for after in ("zero1", "zero3"):  # one process begins these
        with pytest.MonkeyPatch.context() as patch:
            arrange_stop(patch, 3)
            with pytest.raises(Killed):
                do(one_process(place, f"one-to-{after}"))
    status, out, err = run_ranks("tests.ranks.two_ranks", place)
    assert status == 0, out + err
    seen = [json.loads((place / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    return place, seen, out, err


@pytest.mark.parametrize("name", [*STAGES, "zero3-bfloat16", "zero2-fused", "zero3-fused", "ddp", "ddp-fused"])
def test_factors_are_float32_in_the_engine_and_in_the_forward_on_both_ranks(ran, name):
    _, seen, _, _ = ran
    for rank in (0, 1):
        assert seen[rank][name]["status"] == 0
        assert seen[rank][name]["trained"] == ["torch.float32"]
        assert seen[rank][name]["forward"] == ["torch.float32"]
        assert seen[rank][name]["modes"] == [True], "no module is left in the mode that it was loaded in"
        engine = "DistributedDataParallel" if name.startswith("ddp") else "DeepSpeedEngine"
        assert seen[rank][name]["engine"] == engine
        if name.startswith("zero"):
            assert seen[rank][name]["stage"] == min(int(name[4]), 1), "all else is seen to here"


@pytest.mark.parametrize("name", [*STAGES, "zero3-fused", "ddp", "ddp-fused"])
def test_every_engine_trains_the_same_adapter(ran, name):
    place, *_ = ran
    other = "zero2-fused" if name.endswith("-fused") else "zero2"
    expected, found = factors(RunFolder(place / other)), factors(RunFolder(place / name))
    assert found.keys() == expected.keys()
    assert {t.dtype for t in found.values()} == {torch.float32}
    for key, tensor in found.items():
        # sums are made in another order, and Adam moves an element whose gradient is near zero by the sign of that:
        # so they are compared by norm
        assert (tensor - expected[key]).norm() <= 0.02 * expected[key].norm(), key
    assert results(RunFolder(place / name))["steps"] == 4
    assert results(RunFolder(place / name))["num_processes"] == 2


def test_fused_layers_have_the_same_losses_under_an_engine(ran):
    place, *_ = ran
    names = "zero2-fused", "zero2", "zero3-fused"
    fused, plain, sharded = ([row["loss"] for row in metrics(RunFolder(place / name))] for name in names)
    assert fused == pytest.approx(plain, rel=1e-2)
    assert fused != plain, "another order of roundings"
    assert sharded == pytest.approx(fused, rel=1e-3)


@pytest.mark.parametrize("name", ["ddp-fp8", *(f"{name}-{bits}" for name in EIGHT_BIT for bits in ("fp8", "int8"))])
def test_every_engine_computes_in_8_bits(ran, name):
    place, *_ = ran
    folder, bf16 = RunFolder(place / name), RunFolder(place / "zero2-fused")
    losses, expected = ([row["loss"] for row in metrics(one)] for one in (folder, bf16))
    assert losses == pytest.approx(expected, abs=0.05)
    assert losses != expected
    errors = json.loads(folder.compute_errors.read_text())["errors"]
    groups = {f"{layer}.{group}" for layer in (0, 1) for group in ("qkv", "o", "gate_up", "down")}
    assert {f"{group}.output" for group in groups} < set(errors)
    assert {name.rpartition(".")[0] for name in errors} == groups
    # what one of the ranks measured: of equal factors, on the same rows
    alike = RunFolder(place / f"zero2-{name.rpartition('-')[2]}")
    assert errors == pytest.approx(json.loads(alike.compute_errors.read_text())["errors"], rel=0.05)
    assert all("underflow_gradient_max" in row for row in metrics(folder))


def test_zero3_shards_an_unquantized_base_and_saves_unsharded_factors(ran):
    place, *_ = ran
    folder = RunFolder(place / "zero3-bfloat16")
    assert {n: t.shape for n, t in factors(folder).items()} == {
        n: t.shape for n, t in factors(RunFolder(place / "zero2")).items()
    }
    assert {"before", "after"} <= set(results(folder)["accuracy"]["questions"])
    assert json.loads((folder.adapter / "base.json").read_text())["linear_shapes"]["lm_head"] == [304, 64]


@pytest.mark.parametrize("name", ["zero3", "zero3-fused"])
def test_zero3_scores_before_training_as_the_other_stages_do(ran, name):
    place, *_ = ran
    two, three = (
        [
            json.loads(line)
            for line in RunFolder(place / name).predictions("questions", "before").read_text().splitlines()
        ]
        for name in ("zero2", name)
    )
    assert [row["id"] for row in two] == [row["id"] for row in three]
    for mine, theirs in zip(three, two, strict=True):
        # batches of other sizes, whose padding moves sums in bfloat16
        assert mine["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=0.05)


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_resumes_to_the_same_adapter_bit_for_bit(ran, name):
    place, *_ = ran
    whole, continued = RunFolder(place / name), RunFolder(place / f"{name}-stopped")
    assert same(factors(whole), factors(continued))
    rows, expected = metrics(continued), metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert [row["num_tokens"] for row in rows] == [row["num_tokens"] for row in expected]


def test_a_run_stopped_in_its_second_epoch_resumes_with_its_rows(ran):
    place, *_ = ran
    whole, continued = RunFolder(place / "epochs"), RunFolder(place / "epochs-stopped")
    for name in ("num_tokens", "loss"):
        assert [row[name] for row in metrics(continued)] == [row[name] for row in metrics(whole)]
    assert same(factors(whole), factors(continued))


CHANGES = ["zero3-to-zero2", "zero2-to-zero3", "one-to-zero1", "one-to-zero3"]


@pytest.mark.parametrize("name", [*(f"{stage}-halved" for stage in STOPPED), *CHANGES])
def test_another_number_of_processes_or_engine_resumes_with_the_same_samples(ran, name):
    place, *_ = ran
    if name.endswith("-halved"):
        do(tiny_run(place, training={"output_dir": str(place / name)}, eval={"tasks": []}), resume="auto")
    whole, continued = RunFolder(place / "zero2"), RunFolder(place / name)
    rows, expected = metrics(continued), metrics(whole)
    assert [row["num_tokens"] for row in rows] == [row["num_tokens"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-3)
    found, wanted = factors(continued), factors(whole)
    assert found.keys() == wanted.keys()
    # ZeRO-3 sums gradients in another order; the others continue bit for bit here
    flat = [torch.cat([tensors[key].flatten() for key in sorted(wanted)]) for tensors in (found, wanted)]
    assert (flat[0] - flat[1]).norm() <= 1e-3 * flat[1].norm()


def in_folder(source, folder):
    """Copy a run, its config.yaml without the folder's name, as where the run was not given one."""
    shutil.copytree(source, folder)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    del values["training"]["output_dir"]
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def there(ran):
    """Return the folder of a run that two processes began and one went on with, which was killed in the third step."""
    place, *_ = ran
    folder = place / "there"
    file = in_folder(place / "there-and-back", folder)
    with pytest.MonkeyPatch.context() as patch:
        arrange_stop(patch, 4)
        words = ["--set", "deepspeed.config=null", "--set", "training.save_steps=1"]
        with pytest.raises(Killed):
            cli.main(["train", "--config", str(file), "--resume", "auto", *words])
    assert [path.name for path in RunFolder(folder).checkpoints()] == ["checkpoint-2", "checkpoint-3"]
    return folder


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoint-2", []),
        ("checkpoint-3", []),
        # meant for the one process that saved the checkpoint
        ("checkpoint-3", ["training.gradient_accumulation_steps=2"]),
    ],
)
def test_a_run_that_was_resumed_elsewhere_has_its_rows_on_any_number_of_processes(there, name, words, number):
    run = load_run(there / "config.yaml", words)
    fitted, _ = select.fit(there / name, run, number)
    assert fitted.training["gradient_accumulation_steps"] == 2 // number
    assert select.as_begun(there / name, fitted).training["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize("number", [2, 1])
def test_a_run_that_was_resumed_elsewhere_resumes_from_its_own_config_file(ran, there, tmp_path, number):
    place, *_ = ran
    folder = tmp_path / "run"
    file = in_folder(there, folder)
    words = ["--config", str(file), "--resume", "auto"]
    if number == 2:
        status, out, err = run_ranks(COMMAND, *words)
    else:
        status, out, err = cli.main(["train", *words]), "", ""
    assert status == 0, out + err
    assert yaml.safe_load(file.read_text())["training"]["gradient_accumulation_steps"] == 1, "as two began it"
    whole, continued = RunFolder(place / "zero2"), RunFolder(folder)
    assert results(continued)["num_processes"] == number
    rows, expected = metrics(continued), metrics(whole)
    assert [row["num_tokens"] for row in rows] == [row["num_tokens"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-3)
    found, wanted = factors(continued), factors(whole)
    flat = [torch.cat([tensors[key].flatten() for key in sorted(wanted)]) for tensors in (found, wanted)]
    assert (flat[0] - flat[1]).norm() <= 1e-3 * flat[1].norm()


def test_tokens_of_both_ranks_are_counted_and_all_questions_scored(ran):
    from tests.helpers.tiny_runs import byte_tokenizer

    place, *_ = ran
    count = lambda text: len(byte_tokenizer().encode(text).ids)  # noqa: E731
    tokens = [count(row["prompt"]) + count(row["completion"]) + 1 for row in completions(15)]
    repeated = metrics(RunFolder(place / "zero2"))[-1]["num_tokens"] - sum(tokens)
    assert repeated in tokens  # one row fills the last step
    for when in ("before", "after"):
        rows = [
            json.loads(line)
            for line in RunFolder(place / "zero2").predictions("questions", when).read_text().splitlines()
        ]
        assert [row["id"] for row in rows] == [f"tools-{number}" for number in range(5)]


def test_conversations_are_learned_as_by_one_process(ran):
    place, _, out, _ = ran
    assert out.count("chat: 16 assistant turns supervised of 36 turns") == 1
    model = {"name": str(place / "talking"), "quantization": "none"}
    data = {name: [str(place / "talk.jsonl")] for name in ("train", "validation")}
    training = {"output_dir": str(place / "talk-one"), "fused": "off"}
    one = do(tiny_run(place, model=model, data=data, training=training, eval={"tasks": []}))
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in (RunFolder(place / "talk"), one)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_one_process_scores_the_saved_adapter_as_the_two_did(ran, capsys):
    place, *_ = ran
    folder = RunFolder(place / "zero2")
    assert cli.main(["eval", str(folder.path)]) == 0
    two, one = (
        [json.loads(line) for line in folder.predictions("questions", when).read_text().splitlines()]
        for when in ("after", "eval-adapter")
    )
    assert [(row["id"], row["choice"], row["choice_norm"]) for row in two] == [
        (row["id"], row["choice"], row["choice_norm"]) for row in one
    ]
    for ours, theirs in zip(one, two, strict=True):
        # the two had other batches, whose padding moves sums in bfloat16
        assert ours["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=0.05)


def test_only_the_first_process_speaks_and_libraries_are_silent(ran):
    _, seen, out, err = ran
    assert out.count("run folder: ") == len(seen[0]) + len(STOPPED) + 1, "once a run, stopped ones twice"
    assert sum(out.count(f"step {last}/{last}") for last in (1, 4, 6, 7)) == len(seen[0])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    assert out.count(f"2 processes on {device}, DeepSpeed, ZeRO stage 3") == 10
    assert out.count(f"2 processes on {device}, no DeepSpeed") == 3
    noise = [
        line for line in (out + "\n" + err).splitlines() if re.search(r"warn|deprecat|examples/s|\[rank", line, re.I)
    ]
    assert noise == []


def test_a_mistake_is_reported_once_and_ends_both_processes(place):
    run = tiny_run(place, training={"output_dir": str(place / "bad")}, adapter={"rank": 999})
    (place / "bad.yaml").write_text(dump_yaml(run))
    status, out, err = run_ranks(COMMAND, "--config", place / "bad.yaml")
    assert status == 2
    said = [line for line in (out + err).splitlines() if "lsr-scale: " in line]
    assert len(said) == 1
    assert "rank=999 is larger than the smaller dimension of the layer" in said[0]
    assert "Traceback" not in out + err
    assert not (place / "bad").exists()


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_runs_start_from_an_earlier_adapter(ran, stage):
    assert same(factors(RunFolder(ran[0] / f"{stage}-started")), factors(RunFolder(ran[0] / "zero2")))


def test_the_first_process_saves_the_exact_lora_under_zero3(ran):
    folder = RunFolder(ran[0] / "zero3")
    tensors, source = factors(folder, "adapter_lora"), open_adapter(folder.path)
    assert len(tensors) == 2 * len(source.modules)
    for module in source.modules:
        (down, up), name = source.pair(module), f"base_model.model.{module}"
        assert torch.equal(tensors[f"{name}.lora_A.weight"], down)
        assert torch.equal(tensors[f"{name}.lora_B.weight"], up)
