"""GRPO: TRL's loss, from completions of the decoder; whole runs, their files, resuming, and what is refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import GRPOConfig, GRPOTrainer

from lsr_scale.config import RunConfig, load_run
from lsr_scale.config.methods import METHODS, low_rate_note
from lsr_scale.errors import UserError
from lsr_scale.model import tokenizer_of
from lsr_scale.planning import plan
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.train import train
from lsr_scale.training.assembly import build_trainer
from lsr_scale.training.run_data import read_data
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_runs import do, factors, metrics, results, same, save_llama, tiny_run, write_rows

GRPO: dict[str, Any] = {
    "method": "grpo",
    "reward": [{"name": "regex", "pattern": "[a-m]"}, {"name": "length", "weight": 0.5, "tokens": 4}],
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 8,
    "max_prompt_length": 24,
    "max_steps": 4,
    "learning_rate": 2e-2,
    "warmup_steps": 0,
    "num_train_epochs": 1,
}


def prompts(number: int = 12) -> list[dict[str, Any]]:
    """Return prompts of different lengths with an answer."""
    return [{"prompt": "a knife cuts bread"[: 4 + index % 7], "answer": f"#### {index}"} for index in range(number)]


def grpo_run(place: Path, rows: list[dict[str, Any]] | None = None, chat: bool = False, **sections: Any) -> RunConfig:
    """Return a run of GRPO on a tiny model; options of training are added to `GRPO`."""
    if not (place / "model").exists():
        save_llama(place / "model", chat=chat)
    file = write_rows(place / "prompts.jsonl", prompts() if rows is None else rows)
    sections["training"] = GRPO | sections.get("training", {})
    defaults: dict[str, Any] = {"data": {"train": [file]}, "eval": {"tasks": []}}
    return tiny_run(place, **defaults | sections)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("grpo")


@pytest.fixture(scope="module")
def whole(place, with_pages):
    """A run on an NF4 base with a reference, a user's reward beside a shipped one, and held-out rows; of two epochs."""
    (place / "mine.py").write_text("def score(completions, answer, **columns):\n    return [len(a) for a in answer]\n")
    options = {
        "beta": 0.04,
        "reward": [*GRPO["reward"], str(place / "mine.py:score")],
        "output_dir": str(place / "run"),
    }
    options |= {"per_device_eval_batch_size": 4, "eval_steps": 4, "eval_strategy": "steps"}
    held_out = write_rows(place / "held-out.jsonl", prompts(8)[5:])
    data = {"train": [str(place / "prompts.jsonl")], "validation": [held_out]}
    with with_pages():
        return do(grpo_run(place, prompts(5), data=data, training=options))


@pytest.mark.parametrize(("loss_type", "fused"), [("dapo", "on"), ("grpo", "off")])
def test_the_loss_is_trls_for_the_same_completions(tmp_path, loss_type, fused):
    options = {"loss_type": loss_type, "beta": 0.1, "fused": fused, "temperature": 0.7, "num_iterations": 2}
    model = {"name": str(tmp_path / "model"), "quantization": "none", "dtype": "float32"}
    lora = {"method": "lora", "rank": 4}
    run = grpo_run(tmp_path, model=model, adapter=lora, training=options)
    folder = RunFolder(Path(run.training["output_dir"]))
    folder.path.mkdir()
    trainer: Any = build_trainer(run, folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in (0, 0, 0, 0, 5, 5, 5, 5)])
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.3 * torch.randn(
        batch["old_per_token_logps"].shape, generator=generator
    )  # ratios that are clipped
    batch["advantages"] = torch.randn(8, generator=generator)

    theirs = _trls(run, trainer, tmp_path / "trl")
    losses, gradients = [], []
    for one in (trainer, theirs):
        one.model.zero_grad()
        loss = one.compute_loss(one.model, {k: v for k, v in batch.items() if k != "row"})
        loss.backward()
        losses.append(float(loss))
        gradients.append(torch.cat([p.grad.flatten() for p in one.model.parameters() if p.requires_grad]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
    ours, reference = trainer._metrics["train"], theirs._metrics["train"]
    for name in ("kl", "entropy", "clip_ratio/region_mean"):
        assert ours[name][-1] == pytest.approx(reference[name][-1], abs=1e-5)
    assert ours["clip_ratio/region_mean"][-1] > 0


def _trls(run: RunConfig, trainer: Any, folder: Path) -> GRPOTrainer:
    """Return TRL's own trainer of PEFT's own LoRA on the same base, with the same factors."""
    options = ("loss_type", "beta", "temperature", "num_iterations", "num_generations", "max_completion_length")
    settings = {name: run.training[name] for name in options}
    arguments = GRPOConfig(
        str(folder), **settings, per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to="none"
    )
    base = type(tiny_llama()).from_pretrained(run.model.name, dtype=torch.float32)
    config = LoraConfig(**{k: getattr(trainer.model.peft_config["default"], k) for k in ("r", "lora_alpha")})
    config.target_modules = trainer.model.peft_config["default"].target_modules
    rows = Dataset.from_list([{"prompt": "a"}])
    theirs: Any = GRPOTrainer(
        base,
        lambda completions, **_: [0.0] * len(completions),
        arguments,
        rows,  # pyright: ignore
        processing_class=tokenizer_of(run),
        peft_config=config,
    )
    mine = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(mine[name])
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    return theirs


def test_a_run_leaves_rewards_completions_and_a_float32_adapter(whole):
    rows = metrics(whole)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    expected = {"reward", "rewards/regex/mean", "rewards/length/mean", "rewards/score/mean", "kl", "entropy"}
    expected |= {"completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean", "generation_s"}
    assert all(expected < row.keys() for row in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the base, and the update begins at zero
    assert steps[-1]["kl"] > 0
    for row in steps:
        parts = row["rewards/regex/mean"] + 0.5 * row["rewards/length/mean"] + row["rewards/score/mean"]
        assert row["reward"] == pytest.approx(parts, abs=1e-5)
        assert row["clip_ratio/region_mean"] == 0  # importance ratios begin at 1
    assert any("eval_reward" in row for row in rows)
    assert {tensor.dtype for tensor in factors(whole).values()} == {torch.float32}
    kept = [json.loads(line) for line in whole.completions.read_text().splitlines()]
    assert {line["step"] for line in kept} == {1, 2, 3, 4}
    assert all(line["rewards"].keys() == {"regex", "length", "score"} for line in kept)
    assert "len(a)" in json.loads(whole.reward_record.read_text())["rewards"][2]["source"]
    assert whole.rewards.exists()


def test_the_reward_of_an_evaluation_is_the_mean_over_all_completions(tmp_path):
    """Six completions in batches of four: those of one row are a batch of their own, and count for a third."""
    (tmp_path / "mine.py").write_text("def score(completions, answer):\n    return [len(a) for a in answer]\n")
    held_out = write_rows(tmp_path / "held-out.jsonl", [{"prompt": "a knife", "answer": "1" * i} for i in (1, 2, 6)])
    data = {"train": [str(tmp_path / "prompts.jsonl")], "validation": [held_out]}
    options = {"reward": [str(tmp_path / "mine.py:score")], "per_device_eval_batch_size": 4, "max_steps": 1}
    rows = metrics(do(grpo_run(tmp_path, data=data, training=options | {"num_generations_eval": 2})))
    assert [row["eval_reward"] for row in rows if "eval_reward" in row] == [3]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(place, whole, step, capsys):
    """In an epoch, at its end and in the next one."""
    assert metrics(whole)[1]["epoch"] == 1
    run = load_run(whole.config, [f"training.output_dir={place / f'stopped-{step}'}"])
    do(run, stop_after_step=step)
    stopped = do(run, resume="auto")
    assert same(factors(stopped), factors(whole))
    kept = [[json.loads(line) for line in one.completions.read_text().splitlines()] for one in (stopped, whole)]
    assert kept[0] == kept[1]
    counted = [[row["num_tokens"] for row in metrics(one) if "loss" in row] for one in (stopped, whole)]
    assert counted[0] == counted[1]
    assert not any("eval_num_tokens" in row for row in metrics(stopped))
    capsys.readouterr()


def test_completions_that_a_checkpoint_lacks_are_told_where_a_run_resumes(tmp_path, capsys):
    """Two steps learn from the same ones: those of the second are no longer there."""
    run = grpo_run(tmp_path, training={"num_iterations": 2})
    do(run, stop_after_step=1)
    told = []
    for step in (2, None):
        train(run, resume="auto", stop_after_step=step)
        told.append("note: step 2 was to learn from completions" in capsys.readouterr().out)
    assert told == [True, False]


def test_a_reward_that_changed_is_told_where_a_run_resumes(place, whole, capsys):
    run = load_run(whole.config, [f"training.output_dir={place / 'changed'}"])
    do(run, stop_after_step=2)
    text = (place / "mine.py").read_text()
    (place / "mine.py").write_text(text.replace("len(a)", "1.0"))
    train(run, resume="auto")
    (place / "mine.py").write_text(text)
    said = capsys.readouterr().out
    assert "mine.py:score has changed since the run began" in said
    assert "the code of this file runs (sha256" in said
    assert "completions are generated by the decoder" in said


def test_rewards_rise_where_there_is_something_to_learn(tmp_path):
    """The share of a few characters among all: what the model is to prefer whatever the prompt is."""
    (tmp_path / "mine.py").write_text(
        "def score(completion_ids, **_):\n    return [sum(i < 150 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    options = {"reward": ["mine.py:score"], "max_steps": 16, "per_device_train_batch_size": 32, "num_generations": 8}
    options |= {
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "output_dir": str(tmp_path / "run"),
        "save_strategy": "no",
    }
    file = tmp_path / "run.yaml"
    save_llama(
        tmp_path / "model", initializer_range=0.2
    )  # or its logits, and what an adapter changes of them, are tiny
    # in float32: bfloat16 rounds otherwise on other processors, and so draws other completions
    model = {"name": str(tmp_path / "model"), "quantization": "none", "dtype": "float32"}
    run = grpo_run(tmp_path, model=model, training={})
    from lsr_scale.config import dump_yaml

    file.write_text(dump_yaml(run))
    folder = do(load_run(file, {f"training.{name}": value for name, value in options.items()}))
    rewards = [row["reward"] for row in metrics(folder) if "reward" in row]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.07


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": []}, "training.reward: nothing says what a completion is worth"),
        ({"reward": ["exact_anser"]}, "did you mean 'exact_answer'"),
        ({"reward": ["mine.py"]}, "is no reward"),
        ({"reward": ["gone.py:score"]}, "gone.py: cannot be read"),
        ({"num_generations": 3}, "training.num_generations"),
        ({"num_generations": 1}, "training.num_generations"),
        ({"num_generations": 16}, "is 16, but 8 completions are generated at a time"),
        ({"num_generations": None}, "training.num_generations: expected int, got None"),
        ({"max_completion_length": None}, "training.max_completion_length: expected int, got None"),
        ({"loss_type": "gspo"}, "training.loss_type: expected one of its names"),
        ({"importance_sampling_level": "x"}, "expected 'token' or 'sequence'"),
        ({"scale_rewards": False}, "expected 'group', 'batch' or 'none'"),
        ({"delta": 0.5}, "training.delta: expected a number > 1"),
        ({"use_vllm": True}, "vLLM is not installed"),
        ({"generation_kwargs": {"num_return_sequences": 3}}, "set training.num_generations"),
        ({"generation_kwargs": {"num_beam": 3}}, "did you mean 'num_beams'"),
        ({"reward": ["length", {"name": "length", "weight": 2}]}, "reward.1: length is named twice"),
        ({"reward": [{"name": "length", "weight": 0}]}, "every weight is 0"),
        ({"reward": [{"name": "length", "tokens": 8}]}, "reward.0.tokens: is 8, and completions have at most 8"),
        ({"reward": [{"pattern": "a"}]}, "reward.0.name: missing; it has to be set: exact_answer"),
        ({"reward": ["broken.py:score"]}, "broken.py:score: the file raises SyntaxError"),
        ({"reward": ["wants.py:score"]}, "must be given level, which the rows of data.train do not have"),
        ({"reward_weights": [1.0]}, "give each reward its weight"),
        ({"log_completions": True}, "completions.jsonl"),
        ({"max_length": 100}, "unknown key for training.method: grpo"),
        ({"per_device_train_batch_size": 64}, "12 rows, fewer than the 16 prompts"),
        ({"max_prompt_length": 2}, "prompts.jsonl, line 1: the prompt has"),
        ({"use_vllm": True, "vllm_mode": "server"}, "training.vllm_mode: server is sent all weights"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, changes, words):
    from lsr_scale.training import assembly

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(assembly, "load_base_for", loaded)
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("def score(:")
    Path("wants.py").write_text("def score(completions, level): return level")
    with pytest.raises(UserError) as error:
        do(grpo_run(tmp_path, training=changes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("row", "reward", "words"),
    [
        ({"prompt": "a", "answer": "none"}, "exact_answer", "exact_answer finds no answer in 'none'"),
        ({"prompt": "a"}, "exact_answer", "and it has none; add a column answer"),
        ({"prompt": "a", "answer": "3"}, "multiple_choice", "needs a question with choices"),
        ({"prompt": "a", "answer": "3", "choices": ["1", "2"]}, "multiple_choice", "one of the choices"),
        ({"prompt": " ", "answer": "3"}, "exact_answer", "got an empty one"),
        ({"answer": "3", "prompt": None}, "exact_answer", "expected a text or a list of messages"),
        ({"prompt": "a", "answer": [1]}, "exact_answer", "expected a text or a number"),
        ({"answer": "3"}, "exact_answer", "under 'prompt', or a text under 'question', got nothing"),
        ({"prompt": "a", "row": "3"}, "mine.py:score", "the column 'row' has the name of something"),
        ({"prompt": "a", "completions": []}, "mine.py:score", "the column 'completions' has the name"),
    ],
)
def test_rows_that_no_reward_can_judge_are_named(tmp_path, row, reward, words):
    run = grpo_run(tmp_path, rows=[*prompts(3), row], training={"reward": [reward]})
    if reward == "multiple_choice":
        run = grpo_run(tmp_path, rows=[row], training={"reward": [reward]})
    with pytest.raises(UserError, match=r"prompts\.jsonl, line \d") as error:
        read_data(run)
    assert words in str(error.value)


def test_the_default_rate_is_said_to_be_below_those_that_were_best(tmp_path, capsys):
    run = grpo_run(tmp_path, training={"learning_rate": METHODS["grpo"].defaults["learning_rate"], "max_steps": 1})
    train(run)
    words = "training.learning_rate is 0.0001, the default of grpo, and wherever it was tuned the best one was higher"
    assert f"note: {words}" in capsys.readouterr().out
    assert [line for line in plan(run).warnings if words in line]
    assert low_rate_note(grpo_run(tmp_path).training) is None
    assert low_rate_note({"method": "dpo", "learning_rate": 1e-4}) is None
    guide = (Path(__file__).parents[2] / "GUIDE.md").read_text(encoding="utf-8")
    found = re.findall(r"The rates that were best by GRPO.*?: (.*?)\. Those", guide)
    rates = [float(rate) for text in found for rate in re.findall(r"\b\d(?:\.\d)?e-\d\b", text)]
    assert len(rates) > 2
    assert min(rates) > run.training["learning_rate"]


def test_a_reward_that_raises_ends_the_run_with_its_row(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(completions, answer, **columns):\n    return [1 / int(a[5:]) for a in answer]\n"
    )
    run = grpo_run(tmp_path, training={"reward": [str(tmp_path / "mine.py:score")], "max_steps": 6})
    with pytest.raises(UserError, match=r"line 2 raises ZeroDivisionError.*prompts\.jsonl, line 1"):
        do(run)


def test_columns_that_the_trainer_keeps_to_itself_do_not_stop_it(tmp_path):
    (tmp_path / "mine.py").write_text("def score(solution):\n    return [float(one) for one in solution]\n")
    rows = [{"prompt": "a b", "solution": str(i), "image": "x", "completion": "y"} for i in range(4)]
    run = grpo_run(tmp_path, rows=rows, training={"reward": [str(tmp_path / "mine.py:score")]})
    read = read_data(run)
    assert set(read.train.column_names) == {"prompt", "answer", "solution", "choices", "row"}


def test_conversations_without_a_template_are_told_once(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "answer": "3"}] * 4
    with pytest.raises(UserError, match="the data is conversations, and it has no chat template"):
        do(grpo_run(tmp_path, rows=rows, training={"reward": ["exact_answer"]}))


def test_a_run_whose_completions_are_all_worth_the_same_says_so(tmp_path, capsys):
    for pattern, told in (("(a|[^a]|$)", True), ("[a-m]", False)):
        options = {"reward": [{"name": "regex", "pattern": pattern}], "max_steps": 2, "save_strategy": "no"}
        train(grpo_run(tmp_path, training=options), overwrite=True)
        said = capsys.readouterr().out
        assert ("in no step were two completions of a prompt worth different rewards" in said) == told
    assert "  reward " in said


def test_a_run_that_resumes_knows_that_completions_were_worth_different_rewards(tmp_path, capsys):
    run = grpo_run(tmp_path, training={"reward": [{"name": "regex", "pattern": "[a-m]"}], "max_steps": 2})
    for options in ({}, {"resume": "auto"}):
        folder = train(run, **options)
    assert "nothing was left to train" in capsys.readouterr().out
    assert not [note for note in results(folder)["notes"] if "worth different rewards" in note]


def test_what_fields_may_be_is_what_trl_takes():
    """Of each field that TRL declares as any text, all that its own trainer looks for."""
    import inspect
    import re

    from trl import DPOTrainer

    from lsr_scale.config.methods import METHODS

    for method, trainer in (("grpo", GRPOTrainer), ("dpo", DPOTrainer)):
        source = inspect.getsource(trainer)
        for name, choices in METHODS[method].choices.items():
            looked_for: set[str] = set()
            for one in re.findall(rf"\b{name} (?:==|!=|in) (\[[^\]]*\]|\"\w+\")", source):
                looked_for.update(re.findall(r'"(\w+)"', one))
            assert looked_for, name
            assert looked_for == set(choices), name


def spoiled_trainer(place: Path, **options: Any) -> Any:
    """Return the trainer of a run whose first batch has an advantage of NaN."""
    run = grpo_run(place, training={"save_strategy": "no", "max_steps": 2, **options})
    folder = RunFolder(Path(run.training["output_dir"]))
    folder.path.mkdir()
    trainer: Any = build_trainer(run, folder)
    original = trainer._generate_and_score_completions

    def spoiled(inputs: Any) -> Any:
        batch = original(inputs)
        if trainer.state.global_step == 0:
            batch["advantages"][3] = float("nan")
        return batch

    trainer._generate_and_score_completions = spoiled
    return trainer


def test_a_loss_that_is_not_finite_names_the_rows_of_its_completions(tmp_path):
    trainer = spoiled_trainer(tmp_path)
    with pytest.raises(UserError, match=r"the loss is nan at step 1, on rows \[.*prompts\.jsonl, line \d"):
        trainer.train()
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert len(line["rows"]) == len(line["completion_ids"]) == 8


def test_a_batch_that_is_not_finite_is_skipped_where_the_run_says_so(tmp_path):
    trainer = spoiled_trainer(tmp_path, on_nonfinite="skip")
    trainer.train()
    assert len((tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()) == 1
    norms = [row["grad_norm"] for row in trainer.state.log_history if "reward" in row]
    assert norms[0] == 0 < norms[1]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters() if parameter.requires_grad)


def test_completions_of_a_model_that_has_diverged_end_the_run(tmp_path):
    trainer = spoiled_trainer(tmp_path)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    with pytest.raises(UserError, match="training diverged: the logits of completions are not finite after step 0"):
        trainer.train()


def test_the_reference_of_a_run_that_starts_from_an_adapter_is_that_adapter_frozen(tmp_path):
    options = {"learning_rate": 0.1, "beta": 0.1, "save_strategy": "no", "max_steps": 2}
    first = do(grpo_run(tmp_path, training={**options, "output_dir": str(tmp_path / "first")}))
    run = grpo_run(tmp_path, adapter={"start_from": str(first.path)}, training=options)
    folder = RunFolder(Path(run.training["output_dir"]))
    folder.path.mkdir()
    trainer: Any = build_trainer(run, folder)
    assert not any(parameter.requires_grad for name, parameter in trainer.model.named_parameters() if ".ref" in name)
    trainer.train()
    steps = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert abs(steps[0]) < 1e-5 < 1e-3 < steps[1]
    named, began = dict(trainer.model.named_parameters()), factors(first)
    for adapter, stays in (("default", False), ("ref", True)):
        ends = {name: named[_of_adapter(name, adapter)] for name in began}
        assert same(ends, began) == stays


def _of_adapter(name: str, adapter: str) -> str:
    """Return the parameter's name of a saved factor's."""
    start, _, last = name.rpartition(".")
    return f"{start}.{last}.{adapter}"


def test_questions_become_prompts_by_what_the_model_takes(tmp_path):
    rows = [
        {"question": "What is red?", "choices": ["a rose", "snow"], "answer": 0},
        {"question": "Two and two?", "answer": "#### 4", "extra": 1},
    ]
    run = grpo_run(tmp_path, rows=rows[:1], training={"reward": ["multiple_choice"], "max_prompt_length": 99})
    (row,) = read_data(run).train
    assert row["prompt"] == "Question: What is red?\nChoices: a rose, snow\nAnswer:"
    assert (row["answer"], row["choices"], row["row"]) == (
        "a rose",
        rows[0]["choices"],
        f"{tmp_path}/prompts.jsonl, line 1",
    )
    data = {"train": [str(tmp_path / "prompts.jsonl")], "instruction": "Be brief."}
    other = tmp_path / "chat"
    run = grpo_run(
        other,
        rows=rows[1:],
        chat=True,
        training={"reward": ["exact_answer"], "max_prompt_length": 99},
        data=data | {"train": [str(other / "prompts.jsonl")]},
    )
    read = read_data(run)
    assert read.kind == "chat_prompts"
    assert read.train[0]["prompt"] == [{"role": "user", "content": "Two and two?\nBe brief."}]
    assert "extra" not in read.train.column_names, "no reward of a user's reads it"


def test_what_the_decoder_cannot_do_trl_does_and_says_why(tmp_path, capsys):
    options = {"generation_kwargs": {"num_beams": 2}, "max_steps": 1, "save_strategy": "no"}
    train(grpo_run(tmp_path, training=options))
    assert "completions are generated by TRL: training.generation_kwargs sets num_beams" in capsys.readouterr().out


def test_vllm_is_sent_the_adapter_exactly(tmp_path, monkeypatch, caplog):
    """A stand-in for vLLM that records calls, and answers with what the LoRA says on the base. vLLM was not run."""
    from trl.generation import vllm_generation

    calls: list[Any] = []
    base_folder = tmp_path / "model"
    save_llama(base_folder)

    class Engine:
        def __init__(self, **options: Any) -> None:
            calls.append(("LLM", options))

        def generate(self, prompts: Any, sampling_params: Any, lora_request: Any, use_tqdm: bool) -> Any:
            calls.append(("generate", lora_request))
            base = type(tiny_llama()).from_pretrained(base_folder, dtype=torch.float32)
            lora = PeftModel.from_pretrained(base, lora_request.lora_path).eval()
            self.logits = [lora(torch.tensor([p["prompt_token_ids"]])).logits.detach() for p in prompts]
            chosen = SimpleNamespace(logprob=-1.0, rank=1)
            answer = SimpleNamespace(token_ids=[7, 2], logprobs=[{7: chosen}, {2: chosen}])
            return [SimpleNamespace(prompt_token_ids=p["prompt_token_ids"], outputs=[answer]) for p in prompts]

        def reset_prefix_cache(self) -> None:
            calls.append(("reset", None))

    def request(name: str, number: int, path: str) -> Any:
        return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", lambda **options: options, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(__import__("sys").modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(__import__("sys").modules, "vllm.lora.request", SimpleNamespace(LoRARequest=request))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    model = {"name": str(base_folder), "quantization": "none", "dtype": "float32"}
    run = grpo_run(tmp_path, model=model, training={"use_vllm": True})
    folder = RunFolder(Path(run.training["output_dir"]))
    folder.path.mkdir()
    said: list[str] = []
    trainer: Any = build_trainer(run, folder, say=said.append)
    assert calls[0][1]["enable_lora"] is True
    assert calls[0][1]["max_lora_rank"] == 8
    ids = [5, 6, 7]
    for step in (0, 1):
        trainer.state.global_step = step
        trainer.model.train()
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        completions, log_probs = trainer._generate_single_turn([ids], None, {}, 4)
        sent = Path(trainer.vllm_generation.request.lora_path) / "adapter_model.safetensors"
        assert trainer._metrics["train"]["vllm/sent_bytes"][step:] == [sent.stat().st_size]
        assert all(seconds > 0 for seconds in trainer._metrics["train"]["vllm/sent_s"][step:])
        assert not trainer.vllm_generation.sent
        assert completions == [[7, 2]]
        assert log_probs == [[-1.0, -1.0]]
        expected = trainer.model.eval()(torch.tensor([ids])).logits
        assert torch.allclose(trainer.vllm_generation.llm.logits[0], expected, atol=1e-5)
    requests = [value for name, value in calls if name == "generate"]
    assert [one.lora_int_id for one in requests] == [1, 2]
    assert sum("vLLM is sent the adapter as LoRA: " in line for line in said) == 1
    assert any("completions are generated by TRL: training.use_vllm" in line for line in said)


def test_preview_and_plan_tell_what_is_completed(tmp_path, capsys):
    from lsr_scale import cli
    from lsr_scale.config import dump_yaml

    run = grpo_run(tmp_path, training={"reward": ["exact_answer"], "gradient_accumulation_steps": 2})
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(run))
    assert cli.main(["preview", str(file), "--samples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "1 answer '#### 0'" in shown
    assert "12 rows, prompts: raw text, completions judged by training.reward" in shown
    assert cli.main(["plan", str(file)]) == 0
    assert "gener: GRPO's completions" in capsys.readouterr().out
    assert cli.main(["plan", str(file), "--card-gib", "0.5"]) == 0
    assert "does not fit" in capsys.readouterr().out
