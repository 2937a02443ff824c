"""What never reaches the loss is counted over all rows, and told alike by preview and train."""

import pytest

from lsr_scale import cli
from lsr_scale.config import dump_yaml
from lsr_scale.data.formats import build_dataset
from lsr_scale.data.preview import preview, view
from lsr_scale.data.token_counts import evenly_spaced
from lsr_scale.errors import UserError
from lsr_scale.model.tokenizer import tokenizer_of
from lsr_scale.run.train import train
from tests.helpers.tiny_runs import completions, do, save_llama, tiny_run, write_rows
from tests.run.test_tokenizer import CHAT, described, fast

ANSWER = [{"prompt": "a saw", "completion": " cuts wood" * 15}] * 6


def counted(folder, rows, tokenizer, validation=None, **training):
    """Return the preview of rows."""
    dataset, kind = build_dataset([write_rows(folder / "rows.jsonl", rows)])
    others = None
    if validation:
        others, _ = build_dataset([write_rows(folder / "others.jsonl", validation)])
    return preview(dataset, kind, tokenizer, 1, training, others)


def test_what_max_length_truncates_is_counted(tmp_path):
    tokenizer = fast()
    prompt, answer = (len(tokenizer.encode(text)) for text in ("a saw", " cuts wood" * 15))
    total, left = 6 * (answer + 1), 6 * (10 - prompt)
    seen = counted(tmp_path, [*ANSWER, {"prompt": "a saw", "completion": " cuts"}], tokenizer, max_length=10)
    more = len(tokenizer.encode(" cuts")) + 1
    share = f"{100 * (total - left) / (total + more):.3g} %"
    assert seen.counts == [
        f"data.train: 7 rows, 6 cut, 0 left out; lost: {share} of {total + more} supervised tokens, 6 of 7 end tokens"
    ]
    note = (
        f"data.train: training.max_length (10) cuts 6 of 7 rows: {share} of the supervised tokens are lost "
        f"({left + more} of {total + more} are left), and 6 of 7 end tokens; raise it, or shorten the rows"
    )
    assert note in seen.notes
    for mended in ({"max_length": 1000}, {"max_length": None}):  # raise it
        whole = counted(tmp_path, ANSWER, tokenizer, **mended)
        assert "6 rows, 0 cut, 0 left out; lost: 0 % of" in whole.counts[0]
        assert not any("cuts" in text.partition(":")[2] for text in whole.notes)


def test_packing_truncates_or_splits_and_keep_end_keeps_the_end(tmp_path):
    rows = [{"text": "a saw cuts wood " * 20}] * 4
    packed = counted(tmp_path, rows, fast(), max_length=16, packing=True)
    assert "4 rows, 4 cut, 0 left out" in packed.counts[0]
    assert packed.counts[0].endswith("4 of 4 end tokens")
    split = counted(tmp_path, rows, fast(), max_length=16, packing=True, packing_strategy="bfd_split")
    assert "lost: 0 % of" in split.counts[0]
    assert "data.train: packing splits 4 of 4 rows, longer than training.max_length (16), in parts" in split.notes
    end = counted(tmp_path, rows, fast(), max_length=16, truncation_mode="keep_end")
    assert end.counts[0].endswith("0 of 4 end tokens")
    with pytest.raises(UserError, match="no supervised token"):
        counted(tmp_path, ANSWER, fast(), max_length=1)


def test_validation_rows_are_counted_too(tmp_path):
    seen = counted(tmp_path, completions(2), fast(), validation=ANSWER, max_length=20)
    assert [line.partition(":")[0] for line in seen.counts] == ["data.train", "data.validation"]
    assert any(note.startswith("data.validation: training.max_length (20) cuts 6 of 6 rows") for note in seen.notes)


def test_doubled_special_tokens_are_counted(tmp_path):
    rows = [{"text": "<s>a saw"}, {"text": "a saw</s></s>"}, {"text": "a saw</s>"}, {"text": "a saw"}]
    (note,) = [text for text in counted(tmp_path, rows, fast("<s> $A")).notes if "twice" in text]
    assert note.startswith("data.train: 2 of 4 rows with '<s>' or '</s>' twice side by side; take it out of the texts")
    mended = [{"text": "a saw"}, {"text": "a saw</s>"}]
    assert not any("twice" in text for text in counted(tmp_path, mended, fast("<s> $A")).notes)


def test_prompts_that_are_tokenized_otherwise_are_counted(tmp_path):
    rows = [{"prompt": "a saw ", "completion": "cuts"}, {"prompt": "a saw", "completion": " cuts"}]
    (note,) = [text for text in counted(tmp_path, rows, fast()).notes if "become others" in text]
    assert note.startswith(
        "data.train: the last tokens of 1 of 2 prompts become others with the completion behind them"
    )
    assert "write the space that follows in front of the completion" in note
    assert not any("become others" in text for text in counted(tmp_path, rows[1:], fast()).notes)  # so mended


def test_turns_without_the_end_token_are_counted(tmp_path):
    tokenizer = fast()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|assistant|>{% endfor %}"
    (note,) = [text for text in counted(tmp_path, CHAT, tokenizer).notes if "without the end token" in text]
    assert note.startswith(
        "data.train: 4 of 4 rows without the end token '</s>', at which generation stops, in what is learned; set"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    mended = tokenizer_of(described(tmp_path / "model", eos_token="<|assistant|>"))  # set training.eos_token
    assert not any("without the end token" in text for text in counted(tmp_path, CHAT, mended).notes)


def test_characters_of_several_tokens_are_shown_as_one(tmp_path):
    save_llama(tmp_path / "model")
    tokenizer = tokenizer_of(described(tmp_path / "model"))
    seen = counted(tmp_path, [{"prompt": "Gr\u00f6\u00dfe", "completion": " \u6771\U0001f642!"}], tokenizer)
    (tokens,) = seen.samples
    assert "".join(token.text for token in tokens) == "Gr\u00f6\u00dfe \u6771\U0001f642!</s>"
    assert "".join(token.text for token in tokens if token.supervised) == " \u6771\U0001f642!</s>"
    half = view(tokenizer.encode("\u6771", add_special_tokens=False)[:2], None, tokenizer)
    assert "".join(token.text for token in half) == "\ufffd"  # where max_length cuts within it


def test_of_many_rows_some_are_counted_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("lsr_scale.data.token_counts.ROWS_COUNTED", 4)
    assert (
        counted(tmp_path, completions(12), fast())
        .counts[0]
        .startswith("data.train (evenly spaced, of 12): 4 rows, 0 cut")
    )
    assert list(evenly_spaced(12, 4)) == [0, 3, 6, 9]
    assert list(evenly_spaced(3, 4)) == [0, 1, 2]
    assert list(evenly_spaced(13, 4)) == [0, 4, 8, 12]


def test_a_classifiers_truncated_rows_are_counted(tmp_path):
    rows = [{"sentence1": "a saw cuts wood", "label": 1}, {"sentence1": "a", "label": 0}]
    seen = counted(tmp_path, rows, fast(), validation=rows[1:], max_length=3)
    assert seen.counts == ["data.train: 2 rows, 1 cut", "data.validation: 1 row, 0 cut"]
    assert "data.train: training.max_length (3) cuts 1 of 2 rows; raise it, or shorten the rows" in seen.notes
    assert counted(tmp_path, rows, fast(), max_length=100).counts == ["data.train: 2 rows, 0 cut"]


def test_train_and_preview_tell_the_same(tmp_path, capsys):
    save_llama(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", ANSWER)
    write_rows(
        tmp_path / "others.jsonl", [*ANSWER, {"prompt": "a saw cuts wood and wood and wood", "completion": " so"}]
    )
    write_rows(tmp_path / "questions.jsonl", [])
    run = tiny_run(
        tmp_path,
        model={"name": str(tmp_path / "model"), "quantization": "none"},
        data={"train": [str(tmp_path / "rows.jsonl")], "validation": [str(tmp_path / "others.jsonl")]},
        training={"max_length": 10, "max_steps": 1, "save_strategy": "no"},
        eval={"tasks": []},
    )
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    assert cli.main(["preview", str(tmp_path / "run.yaml")]) == 0
    shown = capsys.readouterr().out
    train(run)
    told = capsys.readouterr().out
    notes = [line for line in shown.splitlines() if line.startswith("note: data.")]
    assert [note.partition(" cuts ")[0].partition(" rows ")[0] for note in notes] == [
        "note: data.validation: shares 6 of 7",
        "note: data.train: training.max_length (10)",
        "note: data.validation: training.max_length (10)",
    ]
    assert "cuts 7 of 7 rows" in notes[2]
    assert all(note in told for note in notes)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "a saw cuts wood"}])
    for command in (["preview"], ["train", "--overwrite"]):
        assert cli.main([*command, str(tmp_path / "run.yaml"), "--set", f"data.validation=[{texts}]"]) == 2
        assert "data.validation: is text, but data.train is prompt_completion" in capsys.readouterr().err


def test_validation_rows_without_a_supervised_token_are_refused(tmp_path):
    save_llama(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}])
    write_rows(tmp_path / "others.jsonl", [{"prompt": "a saw cuts wood and wood and wood", "completion": " so"}])
    write_rows(tmp_path / "questions.jsonl", [])
    run = tiny_run(
        tmp_path,
        model={"name": str(tmp_path / "model"), "quantization": "none"},
        data={"train": [str(tmp_path / "rows.jsonl")], "validation": [str(tmp_path / "others.jsonl")]},
        training={"max_length": 4},
        eval={"tasks": []},
    )
    with pytest.raises(UserError, match=r"data\.validation: training\.max_length \(4\) cuts off everything"):
        do(run)
