"""Completions of `eval.prompts` while a run trains: when, of which model, where they go; and training is the same."""

import json

import pytest
import torch

from lsr_scale import UserError
from lsr_scale.data.prompts import load_prompts
from lsr_scale.generation.sampling import Sampling
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.generate import complete as answer
from lsr_scale.run.load import load_run_model
from lsr_scale.run.train import train
from lsr_scale.training.callbacks import samples
from lsr_scale.training.callbacks.samples import Sample, complete, shown
from tests.helpers.run_text import MINIMAL, load, problem
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_runs import TOOLS, completions, do, factors, metrics, same, save_llama, tiny_run, write_rows
from tests.training.test_resume import Killed, arrange_stop

PROMPTS = ["a knife", "a broom sweeps floors and", "a", "a needle"]
FLOAT32 = {"quantization": "none", "dtype": "float32"}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 5e-2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    save_llama(folder / "model", chat=True)
    write_rows(folder / "held.jsonl", completions(5))
    return folder


def sampling(place, folder, prompts=PROMPTS, **sections):
    """Return a run of six steps that is evaluated after every second one."""
    sections = {"data": {"validation": [str(place / "held.jsonl")]}, **sections}
    sections["eval"] = {"tasks": [], "prompts": prompts, "max_new_tokens": 6, **sections.pop("eval", {})}
    sections["training"] = {"output_dir": str(folder), **EVALUATING, **sections.get("training", {})}
    return tiny_run(place, **sections)


def read(folder):
    return [json.loads(line) for line in folder.samples.read_text(encoding="utf-8").splitlines()]


def moments(folder):
    return list(dict.fromkeys((row["step"], row["moment"]) for row in read(folder)))


ALL = [(0, "before"), (2, "evaluation"), (4, "evaluation"), (6, "evaluation"), (6, "after")]


@pytest.fixture(scope="module")
def sampled(place, tmp_path_factory):
    return do(sampling(place, tmp_path_factory.mktemp("sampled"), model=FLOAT32))


def test_they_are_taken_before_training_at_each_evaluation_and_after(sampled):
    assert moments(sampled) == ALL
    assert all(list(row) == ["step", "moment", "prompt", "completion"] for row in read(sampled))
    for step, moment in ALL:
        found = [row["prompt"] for row in read(sampled) if (row["step"], row["moment"]) == (step, moment)]
        assert found == PROMPTS


def test_an_evaluation_before_the_first_step_does_not_repeat_those_from_before_training(place, tmp_path, capsys):
    folder = train(sampling(place, tmp_path, training={"eval_on_start": True, "learning_rate": 0.0}))
    assert moments(folder) == ALL
    # the same again is said in a line; the file has it whole
    shown_lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("samples ")]
    assert shown_lines[0] == "samples before training:"
    assert shown_lines[1:] == [f"samples at step {step}: the same" for step in (2, 4, 6)] + [
        "samples after training: the same"
    ]


def test_they_are_what_the_saved_adapter_and_the_bare_base_generate(sampled):
    for moment, base_only in (("after", False), ("before", True)):
        model, tokenizer, _ = load_run_model(sampled.path, base_only)
        found = {row["prompt"]: row["completion"] for row in read(sampled) if row["moment"] == moment}
        assert found == {prompt: answer(model, tokenizer, prompt, Sampling(6)).text for prompt in PROMPTS}
    before, after = ([row["completion"] for row in read(sampled) if row["moment"] == m] for m in ("before", "after"))
    assert before != after


@pytest.mark.parametrize(
    "sections",
    [
        {"model": FLOAT32},
        {"adapter": {"dropout": 0.3}},
        {"training": {"fused": "on", "gradient_checkpointing": True}},
        {"training": {"fused": "on", "memory": "speed"}},
        {"training": {"fused": "on", "packing": True, "max_length": 64}},
    ],
    ids=["float32", "nf4-dropout", "fused-checkpointed", "fused-cached", "fused-packed"],
)
def test_training_is_the_same_bit_for_bit_with_and_without_them(place, tmp_path, sections):
    modes = {}
    found = {}
    for name, prompts in (("with", PROMPTS), ("without", [])):
        with pytest.MonkeyPatch.context() as patch:
            original = samples.Samples.on_evaluate

            def on_evaluate(self, args, state, control, name=name, original=original, **kwargs):
                before = [module.training for module in kwargs["model"].modules()]
                original(self, args, state, control, **kwargs)
                modes.setdefault(name, []).append(before == [module.training for module in kwargs["model"].modules()])

            patch.setattr(samples.Samples, "on_evaluate", on_evaluate)
            found[name] = do(sampling(place, tmp_path / name, prompts, **sections))
    assert modes["with"]
    assert all(modes["with"])
    for key in ("loss", "eval_loss", "grad_norm"):
        rows = [[row[key] for row in metrics(found[name]) if key in row] for name in ("with", "without")]
        assert rows[0] == rows[1]
    assert same(factors(found["with"]), factors(found["without"]))
    assert not found["without"].samples.exists()


def test_modes_that_differ_from_module_to_module_are_restored_one_by_one():
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 1, "batch_decode": lambda *a, **k: ["x"]})()
    state = torch.get_rng_state()
    complete(model, tokenizer, [[5, 6], [7]], 3)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop_after", [3, 5])
def test_a_run_that_resumes_neither_repeats_nor_loses_any(place, tmp_path, sampled, stop_after):
    run = sampling(place, tmp_path / "run", model=FLOAT32)
    with pytest.MonkeyPatch.context() as patch:
        arrange_stop(patch, stop_after)
        with pytest.raises(Killed):
            do(run)
    folder = RunFolder(tmp_path / "run")
    assert moments(folder) == ALL[: 1 + stop_after // 2]
    do(run, resume="auto")
    assert read(folder) == read(sampled)
    do(run, resume="auto")  # a finished one
    assert read(folder) == read(sampled)
    # one that was killed after its last checkpoint, while it evaluated
    with folder.samples.open("a") as stream:
        stream.write(json.dumps({**read(folder)[0], "step": 9}) + '\n{"step": 9, "mom')
    do(run, resume="auto")
    assert read(folder) == read(sampled)


def test_a_run_that_starts_over_begins_the_file_anew_and_one_that_fails_restores_it(place, tmp_path, sampled):
    run = sampling(place, tmp_path / "run", model=FLOAT32)
    folder = do(run)
    with pytest.MonkeyPatch.context() as patch:
        arrange_stop(patch, 1)
        with pytest.raises(Killed):
            do(sampling(place, tmp_path / "run", ["a saw"], model=FLOAT32), overwrite=True)
    assert read(folder) == read(sampled)
    do(sampling(place, tmp_path / "run", ["a saw"], model=FLOAT32), overwrite=True)
    assert {row["prompt"] for row in read(folder)} == {"a saw"}
    assert moments(folder) == ALL


def test_what_is_no_runs_is_not_written_over(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=r"holds samples\.jsonl, which no run wrote"):
        do(sampling(place, tmp_path / "run"))


def test_without_evaluations_they_are_taken_before_and_after(place, tmp_path):
    folder = do(sampling(place, tmp_path, data={"validation": []}, training={"eval_strategy": "no"}))
    assert moments(folder) == [(0, "before"), (6, "after")]


def test_messages_go_through_the_chat_template_and_so_does_text_where_conversations_are_trained_on(place, tmp_path):
    turns = [{"role": "user", "content": "a saw"}, {"role": "assistant", "content": "cuts"}]
    conversation = [*turns, {"role": "user", "content": "a rake"}]
    chats = [[{"role": "user", "content": s[:6]}, {"role": "assistant", "content": s}] for s in TOOLS]
    rows = write_rows(tmp_path / "chats.jsonl", [{"messages": each} for each in chats])
    data = {"train": [rows], "validation": []}
    training = {"eval_strategy": "no"}
    folder = do(
        sampling(place, tmp_path / "run", ["a rake", conversation], data=data, training=training, model=FLOAT32)
    )
    model, tokenizer, _ = load_run_model(folder.path)
    found = [row for row in read(folder) if row["moment"] == "after"]
    assert [row["prompt"] for row in found] == ["a rake", conversation]
    asked = ["<|user|>a rake</s><|assistant|>", "<|user|>a saw</s><|assistant|>cuts</s><|user|>a rake</s><|assistant|>"]
    for row, text in zip(found, asked, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [row["completion"]] == complete(model, tokenizer, [ids], 6)
    # raw text where text is trained on
    folder = do(sampling(place, tmp_path / "text", ["a rake", conversation], model=FLOAT32, training=training))
    model, tokenizer, _ = load_run_model(folder.path)
    first = next(row for row in read(folder) if row["moment"] == "after")
    assert first["completion"] == answer(model, tokenizer, "a rake", Sampling(6)).text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "a saw\n\n  \na rake\n", ["a saw", "a rake"]),
        ("p.jsonl", '{"prompt": "a saw"}\n{"messages": [{"role": "user", "content": "x", "name": null}]}\n', None),
    ],
)
def test_prompts_can_lie_in_a_file(place, tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    folder = do(sampling(place, tmp_path / "run", str(tmp_path / name), training={"max_steps": 1}))
    prompts = [row["prompt"] for row in read(folder) if row["moment"] == "before"]
    assert prompts == (expected or ["a saw", [{"role": "user", "content": "x"}]])


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_prompts_of_messages_may_be_json_as_in_a_csv(tmp_path, key):
    turns = [{"role": "user", "content": "Hi"}]
    rows = [{key: turns}, {key: json.dumps(turns)}, {key: "[Hi]"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_prompts(str(tmp_path / "p.jsonl")) == [turns, turns, "[Hi]"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ('[{"role": "user", "content": "a", "content": "b"}]', "prompt: the key 'content' is there twice; keep one"),
        ("[{'role': 'user', 'content': 'a'}]", "these quotes are Python's: write the column with json.dumps"),
    ],
)
def test_prompts_of_messages_that_cannot_be_read_are_told_by_line(tmp_path, prompt, said):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt}))
    with pytest.raises(UserError, match=rf"p\.jsonl, line 1: .*{said}"):
        load_prompts(str(tmp_path / "p.jsonl"))


def test_a_line_of_prompts_ends_where_an_editor_ends_it(tmp_path):
    (tmp_path / "p.txt").write_bytes("a\u2028saw\x1e!\r\na\x85rake".encode())
    assert load_prompts(str(tmp_path / "p.txt")) == ["a\u2028saw\x1e!", "a\x85rake"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Hello", "eval.prompts: 'Hello' is text, which is the path of a file with prompts, and there is none"),
        ("{}/p.pdf", "expected a .txt file, a prompt a line, or a .jsonl file"),
        ("{}/empty.txt", "empty.txt: no prompts in it"),
        ("{}/rows.jsonl", "rows.jsonl, line 2: expected a text, or a list of {'role': ..., 'content': ...}, under"),
        (["x"] * 101, "101 prompts, 100 are the most"),
        ([[{"role": "tool", "content": "x"}]], "eval.prompts: prompt 1: the chat template fails on this conversation"),
        (["a " * 200], None),
    ],
)
def test_prompts_that_cannot_be_completed_are_refused_before_the_model_is_loaded(
    place, tmp_path, prompts, message, monkeypatch
):
    (tmp_path / "p.pdf").write_text("x")
    (tmp_path / "empty.txt").write_text("\n")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": [{"role": "user"}]}])
    if message is None:  # rotary positions go on
        do(sampling(place, tmp_path / "run", prompts, training={"max_steps": 1}))
        return
    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    (tmp_path / "strict.jinja").write_text(strict)
    monkeypatch.setattr("lsr_scale.training.assembly.load_base_for", lambda *args, **kwargs: pytest.fail("loaded"))
    prompts = prompts.format(tmp_path) if isinstance(prompts, str) else prompts
    with pytest.raises(UserError) as caught:
        do(sampling(place, tmp_path / "run", prompts, model={"chat_template": str(tmp_path / "strict.jinja")}))
    assert message in str(caught.value)


def test_messages_without_a_chat_template_are_refused(tmp_path):
    save_llama(tmp_path / "model")
    run = tiny_run(tmp_path, eval={"tasks": [], "prompts": [[{"role": "user", "content": "x"}]]})
    with pytest.raises(UserError, match="prompt 1 is messages, but the model's tokenizer has no chat template"):
        do(run)


def test_a_classifier_has_none():
    text = MINIMAL.replace("some/model", "some/model\n  task: seq_cls\n  num_labels: 2")
    assert "eval.prompts: a classifier completes no prompts" in problem(text, "eval.prompts=[x]")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1]", "eval.prompts.0: expected str or list, got 1"),
        ("['']", "eval.prompts.0: expected text that is not empty"),
        ("[[]]", "eval.prompts.0: expected str or a list with at least 1 entry"),
        (
            "[[{role: usr, content: x}]]",
            "eval.prompts.0.0.role: expected 'system', 'developer', 'user', 'assistant' or",
        ),
        ("[[{role: user}]]", "eval.prompts.0.0.content: missing"),
        ("[[{role: user, content: x, contents: y}]]", "eval.prompts.0.0.contents: unknown key"),
        ("3", "eval.prompts: expected"),
    ],
)
def test_what_is_no_prompt_is_refused_where_it_stands(given, message):
    assert message in problem(MINIMAL, f"eval.prompts={given}")


def test_prompts_are_what_they_were_once_resolved():
    run = load(MINIMAL, "eval.prompts=[hello, [{role: user, content: hi}]]")
    assert run.model_dump()["eval"]["prompts"] == ["hello", [{"role": "user", "content": "hi"}]]
    assert run.eval.max_new_tokens == 64


def test_they_are_shown_with_their_prompts_in_80_columns(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = " ".join(f"word{n}" for n in range(200))
    text = shown(
        [
            Sample(4, "evaluation", "What is\nit?", long),
            Sample(4, "evaluation", [{"role": "user", "content": "Hi"}], ""),
        ]
    )
    lines = text.splitlines()
    assert lines[:4] == ["samples at step 4:", "  > What is", "    it?", "    word0 word1 word2 word3 word4 word5"]
    assert lines[-2:] == ["  > Hi", "    (it ends at once)"]
    assert max(map(len, lines)) <= 40
    assert len(text) < 1200
    capsys.readouterr()
    train(sampling(place, tmp_path, ["a saw"], training={"max_steps": 2}))
    said = capsys.readouterr().out
    for title in ("samples before training:", "samples at step 2:"):
        assert f"{title}\n  > a saw\n" in said
    assert "\nsamples after training: the same\n" in said
