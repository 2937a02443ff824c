"""Preview: text as a person reads it, what is supervised without colours too, and lengths."""

import pytest

from lsr_scale import cli
from lsr_scale.config import dump_yaml
from lsr_scale.data.preview import view
from tests.helpers.chat_tokenizers import MISTRAL, byte_level, sentencepiece
from tests.helpers.tiny_runs import save_classifier, save_llama, tiny_run, write_rows

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
TEXTS = [
    "\u9673\u3055\u3093 \u6771\u4eac\u3067\u3001na\u00efve caf\u00e9!",
    f"emoji \U0001f642\U0001f642 and {FAMILY} too",
    "x  two  spaces\n\n\nlines\ttabs ",
    "\u0645\u0631\u062d\u0628\u0627 \u043f\u0440\u0438\u0432\u0435\u0442",
    "don't  do n't . 3.14",
]
TURNS = [
    {"role": "user", "content": f"\u9673? {FAMILY}"},
    {"role": "assistant", "content": f"\u6771 \U0001f642.\nAnd {FAMILY}."},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "No."},
]


@pytest.mark.parametrize("make", [lambda: byte_level(("<x>",)), sentencepiece, lambda: sentencepiece(MISTRAL)])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_make_up_the_text_as_it_was_written(make, text):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    shown = view(ids, None, tokenizer)
    assert "".join(token.text for token in shown) == text
    assert [token.id for token in shown] == ids
    assert not any("\ufffd" in token.text for token in shown)


def shown(folder, capsys, rows, *words, save=lambda folder: save_llama(folder, chat=True), **sections):
    save(folder / "model")
    write_rows(folder / "rows.jsonl", rows)
    run = tiny_run(
        folder,
        model={"name": str(folder / "model"), "quantization": "none", **sections.pop("model", {})},
        data={"train": [str(folder / "rows.jsonl")], "validation": [str(folder / "rows.jsonl")]},
        eval={"tasks": []},
        **sections,
    )
    (folder / "run.yaml").write_text(dump_yaml(run))
    assert cli.main(["preview", str(folder / "run.yaml"), *words]) == 0
    return capsys.readouterr().out


def test_a_conversation_reads_as_it_was_written_and_says_what_is_learned(tmp_path, capsys):
    out = shown(tmp_path, capsys, [{"messages": TURNS}, {"messages": TURNS[:2]}])
    assert f"\n  <|user|>\u9673? {FAMILY}</s><|assistant|>\n> \u6771 \U0001f642.\n> And {FAMILY}.</s>\n" in out
    assert "\n  <|user|>more</s><|assistant|>\n> No.</s>\n" in out
    heads, rows = out.splitlines(), [line.split() for line in out.splitlines()]
    assert any("assistant" in line and "rows" in line and "supervised" in line for line in heads)
    train = next(cells for cells in rows if cells[:1] == ["train"])
    assert train[1:5] == ["2", "3", "of", "6"]
    assert [cells[1:] for cells in rows if cells[:1] == ["validation"]] == [train[1:]]
    assert max(len(line) for line in heads if line.split()[:1] == ["validation"]) <= 80
    every = shown(tmp_path / "every", capsys, [{"messages": TURNS}], "--set", "training.assistant_only_loss=false")
    assert "\n> <|user|>\u9673" in every
    assert ".</s><|user|>more</s><|assistant|>No.</s>\n" in every
    assert "(100 %)" in every


def test_prompts_texts_and_classes_have_the_table_too(tmp_path, capsys):
    for name, row in {"pair": {"prompt": "a saw", "completion": " cuts"}, "text": {"text": "a saw cuts"}}.items():
        out = shown(tmp_path / name, capsys, [row] * 3)
        assert "p95" in out
        assert "turns" not in out
        assert "\n> " in out
    out = shown(
        tmp_path / "classes",
        capsys,
        [{"sentence": "a saw", "label": 1}, {"sentence": "a saw cuts wood", "label": 0}],
        save=lambda folder: save_classifier(folder, "bert"),
        model={"task": "seq_cls", "num_labels": 2},
        adapter={"method": "lora", "rank": 2, "target_modules": ["query"]},
        training={"max_length": 5},
    )
    assert "p95" in out
    assert "supervised\n" not in out
    train = next(line.split() for line in out.splitlines() if line.split()[:1] == ["train"])
    assert train[1] == "2"
    assert train[-1] == "1", "one row is cut"


def test_the_table_tells_lengths_and_what_is_cut(tmp_path, capsys):
    rows = [{"prompt": "a", "completion": " saw" * count} for count in range(1, 21)]
    out = shown(tmp_path, capsys, rows, training={"max_length": 10})
    train = next(line.split() for line in out.splitlines() if line.split()[:1] == ["train"])
    total, p50, p95, longest, cut = (int(cell) for cell in train[1:6])
    assert (total, p50, p95, longest) == (20, 22, 40, 42)
    assert cut == 16
