"""GLUE's program: parts that do not overlap, ordinary configurations, a head that trains or stays as it was drawn."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.quality import glue, trials
from benchmarks.quality.glue import PROVIDERS, TASKS, Setting
from lsr_scale.config import run_from_dict
from lsr_scale.run.folder import RunFolder

BROKEN = RunFolder(Path("nothing")), "the loss of step 3 is not finite"
pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(40))]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for task in TASKS:
        for split, count in (("train", 120), ("validation", 24)):
            path = folder / "data" / task / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt") as stream:
                for index in range(count):
                    first, label = f"w{index // 2 % 40} w{index // 80} {split}", index % 2
                    row = {"id": f"{split}-{index}", "sentence1": first, "sentence2": f"w{index % 7}", "label": label}
                    stream.write(json.dumps(row) + "\n")
    model = folder / "model"
    config = tf.BertConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    tf.BertModel(config).save_pretrained(model)
    tf.MPNetModel(tf.MPNetConfig(**{**config.to_dict(), "pad_token_id": 0})).save_pretrained(folder / "mpnet")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    for saved in (model, folder / "mpnet"):
        tf.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(saved)
    glue.prepare(folder / "data", folder / "work", list(TASKS))
    return Setting(folder / "work", str(model), ("query", "value"), batch=8, max_steps=2)


def test_parts_share_no_first_sentence(setting):
    folder = setting.work / "data" / "rte"
    parts = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.iterdir()}
    assert len(parts["train"]) + len(parts["dev"]) == 120
    assert len(parts["test"]) == 24
    seen = {name: {row["sentence1"] for row in rows} for name, rows in parts.items()}
    assert seen["dev"]
    assert not seen["train"] & seen["dev"]
    assert not seen["test"] & (seen["train"] | seen["dev"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_run_is_an_ordinary_configuration(setting, task, provider):
    for point in PROVIDERS[provider].points:
        run = run_from_dict(glue.config_of(setting, trials.Trial(task, provider, 0), point))
        assert run.model.num_labels == TASKS[task].num_labels
        assert run.data.validation[0].split == "test"


@pytest.mark.parametrize(
    ("provider", "task", "head"),
    [("lsr_4", "stsb", "trained"), ("lora_8", "rte", "frozen"), ("head_only", "mrpc", "trained")],
)
def test_a_run_trains_what_it_says(setting, provider, task, head):
    trial = trials.Trial(task, provider, trials.TUNING_SEED, 0)
    result = glue.measure(dataclasses.replace(setting, head=head), trial, dict(PROVIDERS[provider].points[0]))
    assert result["steps"] == 2
    assert -1 <= result["score"] <= 1
    num_head = 64 * TASKS[task].num_labels + TASKS[task].num_labels
    assert result["trainable_parameters"] == result["adapter_parameters"] + num_head * (head == "trained")
    assert (result["adapter_parameters"] == 0) == (provider == "head_only")


def test_trials_of_sweeps_have_the_results_of_runs_one_by_one(setting):
    providers = [("rte", "lora_8"), ("rte", "lsr_4"), ("stsb", "lora_2"), ("mrpc", "head_only")]
    group = [
        (trials.Trial(task, name, trials.TUNING_SEED, 0), dict(PROVIDERS[name].points[0])) for task, name in providers
    ]
    swept = glue.measure_together(setting, "auto", group)
    for trial, point in group:
        alone = glue.measure(setting, trial, point)
        assert swept[trial.name].keys() == alone.keys()
        for name, digits in (("score", 1e-5), ("final_loss", 1e-4)):  # as they are written
            assert swept[trial.name].pop(name) == pytest.approx(alone.pop(name), abs=digits), name
        assert swept[trial.name] == alone


def test_a_trial_of_a_sweep_that_diverges_has_no_score(setting, monkeypatch):
    monkeypatch.setattr(glue.sweeps, "train_together", lambda configs, *given: dict.fromkeys(configs, BROKEN))
    trial = trials.Trial("rte", "lora_8", trials.TUNING_SEED, 0)
    result = glue.measure_together(setting, 1, [(trial, dict(PROVIDERS["lora_8"].points[0]))])[trial.name]
    assert (result["score"], result["part"], result["head"]) == (None, "dev", "trained")


def test_mpnet_takes_the_targets_that_are_the_default(setting):
    setting = dataclasses.replace(setting, model=str(setting.work.parent / "mpnet"), targets=("q", "v"))
    trial = trials.Trial("rte", "lora_2", trials.TUNING_SEED, 0)
    result = glue.measure(setting, trial, dict(PROVIDERS["lora_2"].points[0]))
    assert result["adapter_parameters"] == 2 * 2 * 2 * (64 + 64)


def test_scores_are_accuracy_and_pearson():
    assert glue.score_of(np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([1, 1])) == 0.5
    assert glue.score_of(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 4.0])) == pytest.approx(1)
    assert glue.score_of(np.ones((3, 1)), np.array([1.0, 2.0, 4.0])) == 0
    assert glue.score_of(np.array([[np.nan, 1.0]]), np.array([1])) is None


def test_a_dry_run_starts_nothing(setting, tmp_path, capsys):
    data = str(setting.work.parent / "data")
    arguments = ["--data", data, "--work", str(tmp_path / "w"), "--model", "no-such-model", "--dry-run"]
    assert glue.main([*arguments, "--results", str(tmp_path / "r")]) == 0
    assert "rte: 56 of 56 runs left" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()
