"""A classifier whose labels are names: what its run leaves and says, resumed, scored again, tried on texts."""

import json
import shutil

import numpy as np
import pytest
import torch

from lsr_scale import cli
from lsr_scale.config import dump_yaml, load_run
from lsr_scale.data.classification import tokenize_classification
from lsr_scale.data.formats import build_dataset
from lsr_scale.data.labels import Labels
from lsr_scale.files import is_own_picture
from lsr_scale.run.classifier import _load as load_classifier
from lsr_scale.run.confusion import draw_confusion
from lsr_scale.run.folder import RunFolder
from lsr_scale.scoring import classification
from tests.helpers.ranks import COMMAND, run_ranks
from tests.helpers.tiny_runs import TOOLS, do, results, save_classifier, save_llama, tiny_run, write_rows

NAMES = ["garden", "kitchen", "workshop"]
PLACES = ["kitchen", "kitchen", "workshop", "workshop", "workshop", "kitchen", "garden", "kitchen", "kitchen", "garden"]
ROWS = [{"text": text, "label": place} for text, place in zip(TOOLS, PLACES, strict=True)]


def run_in(folder, **sections):
    save_llama(folder / "model", pad_token=None)  # as LLaMA's own: the end token pads
    (folder / "train.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS))
    write_rows(folder / "held.jsonl", [{"sentence1": row["text"], "label": row["label"]} for row in ROWS[:7]])
    values = {
        "model": {"task": "seq_cls"},
        "adapter": {"rank": 4, "separation_rank": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": [str(folder / "train.csv")], "validation": [str(folder / "held.jsonl")]},
        "training": {"num_train_epochs": 2, "learning_rate": 1e-2, "per_device_eval_batch_size": 2},
        "eval": {"tasks": []},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return tiny_run(folder, **values)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return the folder of a run on a quantized decoder, from a table of text and label without any format word."""
    return do(run_in(tmp_path_factory.mktemp("named")))


def saved(folder, when, name="validation"):
    return [json.loads(line) for line in folder.predictions(name, when).read_text().splitlines()]


def test_a_run_names_its_labels_and_leaves_predictions_and_pictures_of_before_and_after(done):
    model = load_run(done.config).model
    assert (model.labels, model.num_labels) == (NAMES, 3)
    found = results(done)["classification"]["validation"]
    assert results(done)["labels"] == NAMES
    for when in ("before", "after"):
        rows = saved(done, when)
        assert [(row["text"], row["gold"]) for row in rows] == list(zip(TOOLS[:7], PLACES[:7], strict=True))
        outputs = np.array([row["outputs"] for row in rows])
        chances = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
        assert [row["predicted"] for row in rows] == [NAMES[i] for i in outputs.argmax(-1)]
        assert [row["probability"] for row in rows] == pytest.approx(chances.max(-1), abs=1e-5)
        right = sum(row["gold"] == row["predicted"] for row in rows)
        assert found[when]["accuracy"] == pytest.approx(right / 7, abs=1e-6)
        assert is_own_picture(done.confusion("validation", when))
        assert done.confusion("validation", when) in done.written()
    assert found["before"]["loss"] != found["after"]["loss"]


def test_the_card_of_the_adapter_names_the_labels_in_its_code(done):
    assert f"id2label={dict(enumerate(NAMES))!r}" in (done.adapter / "README.md").read_text(encoding="utf-8")


def test_eval_reproduces_the_scores_and_takes_other_rows(done, capsys):
    assert cli.main(["eval", str(done.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["classification"]["validation"]
    assert found == pytest.approx(results(done)["classification"]["validation"]["after"], abs=2e-3)  # an NF4 base
    assert cli.main(["eval", str(done.path), "--data", str(done.path.parent / "train.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classification"]["train"]["num_examples"] == 10
    assert done.confusion("train", "eval-adapter").is_file()
    other = write_rows(done.path.parent / "other.jsonl", [{"text": "a", "label": "attic"}])
    assert cli.main(["eval", str(done.path), "--data", other]) == 2
    assert "line 1: the label 'attic' is none of model.labels; there are: garden, kitchen" in capsys.readouterr().err


def test_texts_are_classified_and_generate_says_how(done, capsys, tmp_path):
    assert cli.main(["generate", str(done.path), "--prompt", "a saw"]) == 2
    said = capsys.readouterr().err
    assert f'lsr-scale classify {done.path} --text "..."' in said
    assert cli.main(["classify", str(done.path), "--text", *TOOLS[:2]]) == 0
    table = capsys.readouterr().out
    predicted = [row["predicted"] for row in saved(done, "after")]
    assert all(f"{name} " in table and text in table for name, text in zip(predicted[:2], TOOLS, strict=False))
    (tmp_path / "unlabelled.csv").write_text("text\n" + "\n".join(TOOLS[:7]) + "\n")
    assert cli.main(["classify", str(done.path), "--data", str(tmp_path / "unlabelled.csv"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["predicted"] for row in rows] == predicted
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4) for row in rows)
    for words, message in [
        ([], "nothing to classify"),
        (["--text", " "], "--text: text 1 is empty"),
        (["--text", "a", "b", "--pair", "c"], "--pair: expected as many as there are of --text, 2, got 1"),
    ]:
        assert cli.main(["classify", str(done.path), *words]) == 2
        assert message in capsys.readouterr().err


def test_plan_counts_the_head_of_the_labels_that_it_finds(done, capsys):
    run = run_in(done.path.parent)
    file = done.path.parent / "run.yaml"
    file.write_text(dump_yaml(run))
    assert cli.main(["plan", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == results(done)["trainable_parameters"]


def test_plan_of_an_encoder_counts_as_many_tokens_as_it_has_positions(tmp_path, capfd):
    save_classifier(tmp_path / "bert", "bert")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "run.yaml").write_text(
        f"model: {{name: {tmp_path / 'bert'}, task: seq_cls, quantization: none}}\n"
        f"adapter: {{method: lora, target_modules: [query]}}\ndata: {{train: ['{rows}']}}\n"
    )
    assert cli.main(["plan", str(tmp_path / "run.yaml"), "--json"]) == 0
    said = capfd.readouterr()
    plan = json.loads(said.out)
    assert (plan["traced"], plan["tokens_per_gpu"]) == (True, 8 * 64), "training.max_length is 512 by default"
    assert "Traceback" not in said.err


def test_a_run_that_resumes_keeps_its_labels_and_what_it_was_before(done, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(done.path.parent, place)
    again = run_in(place, training={"output_dir": str(place / "run"), "num_train_epochs": 3})
    folder = do(again, resume="auto")
    found, earlier = (results(one)["classification"]["validation"] for one in (folder, done))
    assert found["before"] == earlier["before"]
    assert load_run(folder.config).model.labels == NAMES


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_row_is_classified_alike_alone_and_padded_on_either_side(tmp_path, quantization):
    run = run_in(tmp_path, model={"task": "seq_cls", "quantization": quantization, "dtype": "float32"})
    folder = do(run.model_copy(update={"training": {**run.training, "max_steps": 1}}))
    model, tokenizer = load_classifier(folder, None)
    rows, _ = build_dataset([str(tmp_path / "held.jsonl")], labels=Labels(tuple(NAMES)))
    uneven = rows.map(lambda row, number: {"sentence1": row["sentence1"] * (1 + number % 3)}, with_indices=True)
    encoded = tokenize_classification(uneven, tokenizer, 64)
    alone = classification.outputs_of(model, tokenizer, encoded, batch_size=1)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        together = classification.outputs_of(model, tokenizer, encoded, batch_size=7)
        np.testing.assert_allclose(together, alone, atol=1e-4)
    assert np.ptp(alone, axis=0).min() > 1e-3, "the rows differ"


def test_two_processes_score_every_row_once(tmp_path):
    config = {"config": "zero3"}
    run = run_in(tmp_path, deepspeed=config, training={"max_steps": 2, "per_device_eval_batch_size": 2})
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    status, out, err = run_ranks(COMMAND, "--config", tmp_path / "run.yaml")
    assert status == 0, out + err
    folder = RunFolder(tmp_path / "run")
    found = results(folder)
    rows = saved(folder, "after")
    assert [row["text"] for row in rows] == TOOLS[:7], "7 rows, 4 batches of 2 for two processes"
    after = found["classification"]["validation"]["after"]
    assert (found["num_processes"], after["num_examples"]) == (2, 7)
    right = sum(row["gold"] == row["predicted"] for row in rows)
    assert after["accuracy"] == pytest.approx(right / 7, abs=1e-6)
    # and so does the evaluation within training, by transformers' trainer
    assert found["eval_accuracy"] == pytest.approx(after["accuracy"], abs=1e-6)
    assert found["eval_loss"] == pytest.approx(after["loss"], rel=2e-2)  # bfloat16, in other batches
    one = do(run_in(tmp_path / "one", training={"max_steps": 0 + 1}))
    before = results(one)["classification"]["validation"]["before"]
    assert found["classification"]["validation"]["before"]["loss"] == pytest.approx(before["loss"], rel=2e-2)


def test_rows_are_tokenized_once(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    seen = []
    call = PreTrainedTokenizerFast.__call__

    def spy(self, text=None, *args, **options):
        seen.extend(text if isinstance(text, list) else [text])
        return call(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", spy)
    monkeypatch.setattr("lsr_scale.training.run_data.check_model_limits", lambda *_: None)
    do(run_in(tmp_path, training={"max_steps": 1}))
    assert len(seen) == len(ROWS) + 7


@pytest.mark.parametrize("count", [2, 20, 50])
@pytest.mark.usefixtures("rendered")
def test_a_confusion_matrix_is_drawn_for_any_number_of_labels(tmp_path, count):
    names = [f"a rather long name of a class, number {number} $x^{{2}}$" for number in range(count)]
    counts = np.random.default_rng(0).integers(0, 9, (count, count))
    draw_confusion(counts, names, tmp_path / "picture.png", "validation, after")
    assert is_own_picture(tmp_path / "picture.png")


def test_the_loss_is_torchs():
    draw = np.random.default_rng(0)
    outputs, labels = draw.normal(size=(20, 3)).astype(np.float32), draw.integers(0, 3, 20)
    for smoothing in (0.0, 0.1):
        expected = torch.nn.functional.cross_entropy(
            torch.tensor(outputs, dtype=torch.float64), torch.tensor(labels), label_smoothing=smoothing
        )
        assert classification.loss(outputs, labels, smoothing) == pytest.approx(float(expected), rel=1e-12)
    scores = draw.normal(size=20)
    assert classification.loss(outputs[:, :1], scores) == pytest.approx(np.mean((outputs[:, 0] - scores) ** 2))


def test_preview_names_the_labels(tmp_path, capsys):
    run = run_in(tmp_path)
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    assert cli.main(["preview", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    assert "label kitchen" in said
    assert "labels: 3 classes: garden (2), kitchen (5), workshop (3)" in said
