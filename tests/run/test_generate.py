"""`lsr-scale generate`: prompts, the chat template, conversations, sampling; what is refused before a model loads."""

import contextlib
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model_state_dict

from lsr_scale import cli
from lsr_scale.config import dump_yaml
from lsr_scale.errors import UserError, printable
from lsr_scale.exporting import open_adapter
from lsr_scale.generation.sampling import Sampling
from lsr_scale.layers.frozen_linear import FrozenLinear4bit, dequantize_all, dequantized_bytes
from lsr_scale.model import load_base
from lsr_scale.model.tokenizer import end_tokens
from lsr_scale.run import chat as chat_module
from lsr_scale.run import generator as generators
from lsr_scale.run.chat import Chat, converse
from lsr_scale.run.evaluate import evaluate_run
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.generate import Streamer, complete
from lsr_scale.run.generator import Generator, read_prompts
from lsr_scale.run.load import load_run_model
from tests.helpers.launch import QUICK_START
from tests.helpers.tiny_runs import TOOLS, do, factors, save_llama, tiny_run, write_rows

TALK = [{"messages": [{"role": "user", "content": s}, {"role": "assistant", "content": "yes"}]} for s in TOOLS]
SHORT = {"max_steps": 2, "save_strategy": "no", "max_length": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model, and the finished runs `text` and `talk`, the second trained on conversations."""
    folder = tmp_path_factory.mktemp("generate")
    save_llama(folder / "model", chat=True, num_hidden_layers=2, max_position_embeddings=256)
    do(tiny_run(folder, eval={"tasks": []}, training={**SHORT, "output_dir": str(folder / "text")}))
    talk = write_rows(folder / "talk.jsonl", TALK)
    training = {**SHORT, "output_dir": str(folder / "talk")}
    do(tiny_run(folder, data={"train": [talk]}, eval={"tasks": []}, training=training))
    return folder


@pytest.fixture
def call(capfd, monkeypatch):
    """Return a function that runs `lsr-scale generate` and returns its status, stdout and stderr."""

    def run(*words, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        try:
            status = cli.main(["generate", *map(str, words)])
        except SystemExit as ended:  # argparse
            status = ended.code
        said = capfd.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def unloaded(monkeypatch):
    """Make loading a model a failure."""

    def load(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(generators, "load_run_model", load)
    monkeypatch.setattr(generators, "load_base_for", load)


def test_the_template_is_used_as_the_run_trained_and_it_says_which(place, call):
    status, out, err = call(place / "text", "--prompt", TOOLS[0], "--max-new-tokens", 4, "--json")
    assert status == 0, err
    assert "note: the prompt is continued as it stands, as the run trained on text; --chat puts it into" in err
    assert json.loads(out)["chat_template"] is False
    status, out, err = call(place / "talk", "--prompt", TOOLS[0], "--max-new-tokens", 4, "--json")
    assert "note: the prompt goes into the chat template, as the run trained on chat; --raw leaves it out" in err
    assert json.loads(out)["chat_template"] is True
    for words, used in ((["--raw"], False), (["--chat"], True), (["--system", "Be brief."], True)):
        status, out, err = call(place / "talk", "--prompt", TOOLS[0], "--max-new-tokens", 4, "--json", *words)
        assert (status, json.loads(out)["chat_template"]) == (0, used)
        assert "template" not in err, "asked for, so not told"


def test_an_earlier_releases_run_does_not_say_what_it_trained_on(place, call, monkeypatch):
    monkeypatch.setattr(generators, "trained_on_chat", lambda *_: None)
    _, _, err = call(place / "talk", "--prompt", TOOLS[0], "--max-new-tokens", 2)
    assert "note: the prompt is continued as it stands; --chat puts it into the chat template" in err


def test_the_system_prompt_stands_before_the_turns(place):
    found = Generator.of_run(place / "talk")
    start = found.conversation("Be brief.")
    assert start == [{"role": "system", "content": "Be brief."}]
    ids = generators.encode(found.tokenizer, [*start, {"role": "user", "content": "hi"}])
    assert found.tokenizer.decode(ids) == "<|system|>Be brief.</s><|user|>hi</s><|assistant|>"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no such role') }}{% endif %}x",
            "refuses it .no such",
        ),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "leaves it out"),
    ],
)
def test_a_template_without_a_system_prompt_says_so(place, template, words):
    found = Generator.of_run(place / "talk")
    found.tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"^--system: the model has no place for a system prompt: .* {words}"):
        found.conversation("Be brief.")


NOTHING = "expected some text to continue, got none"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature: expected a number from 0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature: expected a number from 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: expected a whole number from 1 on, got '0'"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p: expected a number above 0, up to 1, got 1.5"),
        (["--prompt", "a", "--top-k", "0"], "top_k: expected a whole number from 1 on, got 0"),
        (["--prompt", "a", "--seed", "-3"], "seed: expected a whole number from 0 on, got -3"),
        (
            ["--prompt", "a", "--repetition-penalty", "0"],
            "repetition_penalty: expected a number from 0.01 to 100, got 0",
        ),
        (["--prompt", "a", "--temperature", "0", "--top-p", "0.9"], "top_p: has no effect at temperature 0"),
        (["--prompt", ""], f"--prompt: {NOTHING}"),
        (["--prompt", "-"], f"--prompt -: {NOTHING[:-10]} on stdin, got none"),
        (["--prompt", "a \udcff"], r"--prompt: \udcff is half of a character"),
        (["--prompt", "a " * 300], "tokens, but the model has 256 positions; shorten it"),
        (["--prompt", "a", "--system", " "], "--system: expected some text, got none"),
        (["--prompt", "a", "--chat", "--raw"], "--chat and --raw contradict each other"),
        (["--prompt", "a", "--system", "b", "--raw"], "--system: goes into the chat template, which --raw leaves out"),
        (["--prompt", "a", "--file", "b"], "--prompt and --file both give prompts; keep one"),
        (["--file", "none.jsonl"], "--file none.jsonl: no such file"),
        ([], "expected --prompt TEXT, --file FILE, or --chat, to talk turn by turn"),
        (["--chat", "--compare-base"], "--compare-base: goes with a prompt"),
        (["--prompt", "a", "--base-only", "--compare-base"], "--base-only and --compare-base"),
        (["--prompt", "a", "--model", "x"], "expected a run's folder, or --model NAME for a base model: one of them"),
        (["--prompt", "a", "--quantization", "nf4"], "--quantization nf4: goes with --model"),
    ],
)
def test_nonsense_is_refused_before_a_model_is_loaded(place, call, unloaded, words, said):
    status, out, err = call(place / "text", *words)
    assert (status, out) == (2, "")
    assert said in err


def test_an_adapters_folder_is_told_from_a_runs(place, call, unloaded, tmp_path):
    _, _, err = call(place / "text" / "adapter", "--prompt", "a")
    assert f"an adapter's folder, where a run's is expected; name the run's: {place / 'text'}" in err
    alone = shutil.copytree(place / "text" / "adapter", tmp_path / "alone")
    _, _, err = call(alone, "--prompt", "a")
    assert f"no run's folder is around it; lsr-scale export {alone} --to merged --out FOLDER makes a model of it" in err


def test_a_checkpoint_answers_as_its_adapter_and_an_interrupted_run_names_it(place, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "model", "model")
    training = {"save_steps": 2, "max_steps": 4, "output_dir": "runs/run"}
    folder = do(tiny_run(tmp_path, training=training | {"max_length": 64})).path
    words = ("--prompt", "a b", "--json", "--max-new-tokens", 4)
    status, last, _ = call(folder / "checkpoint-4", *words)
    assert status == 0
    assert json.loads(last)["completion"] == json.loads(call(folder, *words)[1])["completion"]
    first, second = (factors(RunFolder(folder), name) for name in ("checkpoint-2", "checkpoint-4"))
    model, _, run = load_run_model(folder / "checkpoint-2")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert run.training["max_steps"] == 4
    assert all(torch.equal(loaded[name].cpu().float(), first[name].float()) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    shutil.rmtree(folder / "adapter")
    _, _, err = call(folder, *words)
    assert "it was interrupted: resume it with --resume auto, or try its newest checkpoint: " in err
    assert 'lsr-scale generate runs/run/checkpoint-4 --prompt "..."' in err
    assert call("runs/run/checkpoint-4", *words)[1].partition('"seconds"')[0] == last.partition('"seconds"')[0]
    monkeypatch.chdir(folder / "checkpoint-4")
    assert call(".", *words)[0] == 0


def test_a_checkpoint_is_scored_and_exported_by_its_runs_configuration(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    folder = do(tiny_run(tmp_path, training={"save_steps": 2, "max_steps": 2}))
    scored = evaluate_run(folder.path / "checkpoint-2")
    assert (scored["scored"], list(scored["accuracy"])) == ("checkpoint-2", ["questions"])
    assert folder.predictions("questions", "eval-checkpoint-2") in folder.written()
    assert not folder.predictions("questions", "eval-adapter").exists(), "compare takes it for the trained one's"
    source = open_adapter(folder.path / "checkpoint-2")
    assert (source.run.model.name, source.tokenizer) == (str(tmp_path / "model"), folder.tokenizer)
    shutil.rmtree(folder.adapter)
    with pytest.raises(
        UserError, match=r"resume it with --resume auto; or name its newest checkpoint: .*/checkpoint-2"
    ):
        open_adapter(folder.path)


def test_a_rows_mistake_is_named_by_its_line_before_a_model_is_loaded(place, call, unloaded, tmp_path):
    for row, said in (
        ({"text": "a"}, "expected a text, or a list"),
        ({"prompt": ""}, "got ''"),
        ({"prompt": 3}, "got 3"),
    ):
        file = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}, row])
        status, _, err = call(place / "text", "--file", file)
        assert status == 2
        assert "bad.jsonl, line 2: " in err
        assert said in err


def test_prompts_of_a_file_are_answered_in_order_as_alone(place, call, tmp_path):
    talk = TALK[1]["messages"]
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": TOOLS[0]}, {"messages": talk}, {"prompt": "多\n字节 🦙"}])
    status, out, err = call(place / "text", "--file", file, "--max-new-tokens", 5, "--json")
    assert status == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == [TOOLS[0], talk[:1], "多\n字节 🦙"], "without the answer it trained on"
    assert [row["chat_template"] for row in rows] == [False, True, False]
    alone = json.loads(call(place / "text", "--prompt", TOOLS[0], "--max-new-tokens", 5, "--json")[1])
    assert alone["completion"] == rows[0]["completion"]
    assert all(row["stopped"] in ("end", "length") and 1 <= row["tokens"] <= 5 for row in rows)
    status, out, _ = call(place / "text", "--file", file, "--max-new-tokens", 5)
    assert out.startswith(f"> {TOOLS[0]}\n{rows[0]['completion']}\n\n> {TOOLS[1]}\n")


def test_stdin_is_a_prompt(place, call):
    asked = json.loads(call(place / "text", "--prompt", "-", "--max-new-tokens", 3, "--json", stdin=b"a\\nb\nc\n")[1])
    assert asked["prompt"] == "a\\nb\nc", "as it stands: nothing was typed into a shell's quotes"
    status, _, err = call(place / "text", "--prompt", "-", stdin=b"\xff")
    assert status == 2
    assert "stdin: expected UTF-8 text, got other bytes at offset 0" in err


def test_the_base_answers_beside_the_adapter(place, call):
    words = ["--prompt", TOOLS[0], "--max-new-tokens", 6, "--json"]
    both = json.loads(call(place / "text", *words, "--compare-base")[1])
    assert both["completion"] == json.loads(call(place / "text", *words)[1])["completion"]
    assert both["base_completion"] == json.loads(call(place / "text", *words, "--base-only")[1])["completion"]
    _, out, _ = call(place / "text", *words[:-1], "--compare-base")
    assert out == printable(f"[base] {both['base_completion']}\n[adapter] {both['completion']}\n")


def test_a_base_model_answers_without_a_run(place, call):
    words = ["--prompt", TOOLS[0], "--max-new-tokens", 6, "--json"]
    found = json.loads(call("--model", place / "model", *words)[1])
    assert found["completion"] == json.loads(call(place / "text", *words, "--base-only")[1])["completion"]
    assert call("--model", place / "model", *words, "--quantization", "none")[0] == 0
    status, _, err = call("--model", place / "nowhere", *words)
    assert status == 2
    status, _, err = call("--model", place / "model", *words, "--compare-base")
    assert "--compare-base: is about a run" in err


def test_speed_and_a_cut_answer_are_told(place, call):
    _, _, err = call(place / "text", "--prompt", TOOLS[0], "--max-new-tokens", 3)
    assert "3 tokens in " in err
    assert " tokens/s; cut at 3 tokens (--max-new-tokens)" in err


def test_draws_are_those_of_the_seed_and_leave_the_programs_own_alone(place):
    model, tokenizer, _ = load_run_model(place / "text")
    drawing = Sampling(max_new_tokens=12, temperature=3.0, seed=5)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = complete(model, tokenizer, TOOLS[0], drawing)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert complete(model, tokenizer, TOOLS[0], drawing).text == first.text
    others = {complete(model, tokenizer, TOOLS[0], Sampling(max_new_tokens=12, temperature=3.0)).text for _ in range(3)}
    assert len(others) == 3, "without a seed, another each time"
    greedy = complete(model, tokenizer, TOOLS[0], Sampling(max_new_tokens=12))
    one = Sampling(max_new_tokens=12, top_k=1)
    assert one.temperature == 1.0
    assert complete(model, tokenizer, TOOLS[0], one).text == greedy.text
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    assert complete(model, tokenizer, TOOLS[0], Sampling(max_new_tokens=12)).text == greedy.text, (
        "ours, not the model's"
    )
    punished = Sampling(max_new_tokens=12, repetition_penalty=100.0)
    streamer = Streamer(tokenizer, lambda text: None)
    complete(model, tokenizer, TOOLS[0], punished, streamer=streamer)
    assert len(set(streamer.ids)) == len(streamer.ids) > 3


def test_a_training_model_stays_one(place):
    model, tokenizer, _ = load_run_model(place / "text")
    complete(model.train(), tokenizer, TOOLS[0], Sampling(max_new_tokens=2))
    assert model.training


def test_text_streams_as_it_stays(place):
    found = Generator.of_run(place / "text")
    parts = []
    streamer = Streamer(found.tokenizer, parts.append)
    answer = found.answer(TOOLS[0], Sampling(max_new_tokens=20, temperature=2.0, seed=3), streamer=streamer)
    assert "".join(parts) == answer.text == streamer.text()
    shown = []
    streamer = Streamer(found.tokenizer, shown.append)
    streamer.put(torch.tensor([[1]]))
    text = "你好 🦙 élan"
    for token in found.tokenizer(text)["input_ids"]:  # a byte a token: no part of a character is ever shown
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(shown) == text
    assert not any("\ufffd" in part for part in shown)


class Pieces(Streamer):
    """Keeps how many tokens came at a time, the prompt's first."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, lambda text: None)
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.numel())
        super().put(value)

    def end(self):
        self.ended = True
        super().end()


def transformers_own(model, tokenizer, sampling):
    """Return the tokens of transformers' `generate` after the first of TOOLS."""
    ids = torch.tensor([tokenizer(TOOLS[0])["input_ids"]])
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sampling.seed or 0)
        options = {"max_new_tokens": sampling.max_new_tokens, "eos_token_id": ends or None, **sampling.arguments()}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **options)
    return ids.shape[1], out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("longest", [generators.LONGEST_ROW, 4])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=12, repetition_penalty=5.0),
        Sampling(max_new_tokens=12, temperature=1.5, top_k=20, top_p=0.9, seed=4),
    ],
)
def test_answers_are_those_of_transformers_and_stream(place, monkeypatch, sampling, longest):
    monkeypatch.setattr(generators, "LONGEST_ROW", longest)
    said = []
    found = Generator.of_run(place / "text", say=said.append)
    for base in (True, False, True):
        with found.model.disable_adapter() if base else contextlib.nullcontext():
            prompt, expected = transformers_own(found.model, found.tokenizer, sampling)
        streamer = Pieces(found.tokenizer)
        answer = found.answer(TOOLS[0], sampling, streamer=streamer, base=base)
        assert streamer.ids == expected
        assert answer.tokens == len(expected) > 1
        assert (streamer.pieces, streamer.ended) == ([prompt] + [1] * len(expected), True)
    # by the decoder, which keeps one cache for the base and one for the adapter, or else why not, once
    assert [len(decoder.steps) for decoder in found._decoders.values()] == [int(longest > 4)] * 2
    reason = "generation is transformers' own, without CUDA graphs: rows of up to"
    assert [line.startswith(reason) for line in said] == [True] * (longest == 4)


def test_on_a_cpu_the_weights_are_dequantized_once_and_say_the_same(place, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("of CPUs")
    quantized, tokenizer, _ = load_run_model(place / "text")
    found = Generator.of_run(place / "text")
    assert any(isinstance(module, FrozenLinear4bit) for module in quantized.modules())
    assert not any(isinstance(module, FrozenLinear4bit) for module in found.model.modules())
    ids = torch.tensor([tokenizer(TOOLS[0])["input_ids"]])
    with torch.no_grad():
        assert torch.equal(found.model(ids).logits, quantized(ids).logits)
        with found.model.disable_adapter(), quantized.disable_adapter():
            assert torch.equal(found.model(ids).logits, quantized(ids).logits)
    monkeypatch.setattr(generators.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    kept = Generator.of_run(place / "text").model
    assert any(isinstance(module, FrozenLinear4bit) for module in kept.modules()), "where there is no memory for it"


def test_the_key_value_cache_is_used(place):
    found = Generator.of_run(place / "text")
    lengths = []
    found.model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    found.answer(TOOLS[0], Sampling(max_new_tokens=4))
    assert lengths[1:] == [1] * (len(lengths) - 1)
    assert lengths[0] > 1


def chat_of(place, **options):
    return Chat(Generator.of_run(place / "talk"), Sampling(max_new_tokens=4), **options)


def lines(*turns):
    """Return what reads turns; an exception among them is raised."""
    left = list(turns)

    def read():
        if not left:
            raise EOFError
        turn = left.pop(0)
        if isinstance(turn, BaseException):
            raise turn
        return turn

    return read


def test_a_conversation_is_kept_reset_and_left(place):
    chat, notes = chat_of(place, system="Be brief."), []
    converse(chat, lines("a knife?", "", "a saw?", "/typo", KeyboardInterrupt()), notes.append)
    assert [turn["role"] for turn in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[3]["content"] == "a saw?"
    assert notes[0].startswith("no command /typo; /reset forgets the conversation")
    assert "Ctrl-D leaves" in notes[1], "Ctrl-C between answers leaves nothing"
    converse(chat, lines("/reset", "/exit", "never said"), notes.append)
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert len(chat.answers) == 2


def test_ctrl_c_just_before_an_answer_or_after_it_leaves_nothing(place, monkeypatch):
    chat, notes, presses = chat_of(place), [], []

    def press(*_):
        presses.append(1)
        raise KeyboardInterrupt

    converse(chat, lines("a knife?", "a saw?"), notes.append, press)
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"] * 2
    monkeypatch.setattr(chat_module, "Streamer", press)
    converse(chat, lines("a nail?"), notes.append)
    assert notes == [chat_module.HELP] * len(presses) == [chat_module.HELP] * 3
    assert len(chat.messages) == 4, "a turn without an answer is forgotten"
    with pytest.raises(KeyboardInterrupt):
        converse(chat, lines("a nail?"), notes.append, interactive=False)


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(place, monkeypatch):
    chat, shown = chat_of(place), []
    chat.show = shown.append
    original = generators.complete

    def interrupted(*args, streamer, **options):
        put = streamer.put

        def stop(value):
            put(value)
            if len(streamer.ids) == 2:
                raise KeyboardInterrupt

        streamer.put = stop
        return original(*args, streamer=streamer, **options)

    monkeypatch.setattr(generators, "complete", interrupted)
    converse(chat, lines("a knife?"), pytest.fail)
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == "".join(shown)


def test_a_conversation_that_is_too_long_is_told_a_person_and_ends_a_pipe(place, call):
    chat, notes = chat_of(place), []
    converse(chat, lines("a saw? " * 200, "a saw?"), notes.append)
    assert "this conversation: has" in notes[0]
    assert "/reset forgets" in notes[0]
    assert len(chat.messages) == 2, "the turn is forgotten, the conversation goes on"
    status, _, err = call(place / "talk", "--chat", "--max-new-tokens", 2, stdin=b"a saw? " * 200)
    assert status == 2
    assert "this conversation: has" in err


def test_a_pipe_talks(place, call):
    status, out, err = call(
        place / "talk", "--chat", "--max-new-tokens", 3, "--json", stdin="a saw?\\nWhat?\n多\n".encode()
    )
    assert status == 0, err
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a saw?\nWhat?", "多"]
    status, out, err = call(place / "talk", "--chat", "--max-new-tokens", 3, stdin=b"a saw?\n")
    assert "> " not in out
    assert "tokens/s" in err


@pytest.mark.slow
def test_a_person_talks_stops_an_answer_and_leaves(place):
    """A terminal: Ctrl-C while an answer comes keeps the loop, Ctrl-D leaves it with status 0."""
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "lsr_scale", "generate", str(place / "talk"), "--chat", "--max-new-tokens", "240"]
    environment = {**os.environ, **QUICK_START, "TERM": "dumb"}
    child = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment)
    os.close(slave)
    said = b""

    def until(mark):
        nonlocal said
        while mark not in said:
            said += os.read(master, 4096)
        said = said.partition(mark)[2]

    until(b"> ")
    os.write(master, b"a saw?\n")
    until(b"a saw?\r\n")
    os.kill(child.pid, signal.SIGINT)
    until(b"> ")
    os.write(master, b"/exit\n")
    try:
        while os.read(master, 4096):
            pass
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(master)
    assert child.wait() == 0


def test_a_run_folder_says_what_kind_its_rows_are(place):
    for name, kind in (("text", "prompt_completion"), ("talk", "messages")):
        assert json.loads(RunFolder(place / name).data.read_text())["kind"] == kind


def test_a_prompt_longer_than_the_model_states_is_taken_where_the_run_trained_on_longer_rows(place, tmp_path):
    run = tiny_run(place, training={"max_length": 400, "output_dir": str(tmp_path / "long")})
    folder = RunFolder(tmp_path / "long")
    (folder.path / "adapter").mkdir(parents=True)
    folder.config.write_text(dump_yaml(run))
    assert Generator.of_run(folder.path).context == 400
    assert Generator.of_run(place / "text").context == 256


def test_rows_with_an_answer_lose_it(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", TALK[:1])
    assert read_prompts(file) == [(f"{file}, line 1", TALK[0]["messages"][:1])]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_dequantized_base_is_the_quantized_one_bit_for_bit(place, kind):
    ids = torch.arange(5, 25)[None]
    model = load_base(str(place / "model"), quantization=kind, device=torch.device("cpu"))
    with torch.no_grad():
        quantized = model(ids).logits
        size = dequantized_bytes(model)
        dequantize_all(model)
        assert torch.equal(model(ids).logits, quantized)
    held = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert size == sum(weight.numel() * weight.element_size() for weight in held)
    assert dequantized_bytes(model) == 0


def test_a_model_in_memory_answers(place):
    model = load_base(str(place / "model"), device=torch.device("cpu"))
    _, tokenizer, _ = load_run_model(place / "text")
    found = Generator.of_model(model, tokenizer)
    assert found.answer(TOOLS[0], Sampling(max_new_tokens=3)).tokens <= 3
    assert any(isinstance(module, FrozenLinear4bit) for module in model.modules()), "and stays as it is"
