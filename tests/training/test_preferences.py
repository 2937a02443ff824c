"""DPO, KTO and ORPO: TRL's losses, fused and unfused, on our adapters; the reference; and whole runs."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lsr_scale
from lsr_scale.config.training import training_arguments_class
from lsr_scale.data.completions import count_completions, tokenize_completions
from lsr_scale.errors import UserError
from lsr_scale.fused import fallback, loss
from lsr_scale.planning import plan
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.assembly import build_trainer
from lsr_scale.training.callbacks.memory import max_forward_tokens
from lsr_scale.training.steps import log_probs
from lsr_scale.training.steps.sharing import sharing_fallback_reason
from tests.helpers.tiny_models import SEVEN_LINEARS
from tests.helpers.tiny_runs import do, factors, metrics, results, same, save_llama, tiny_run, write_rows

METHODS = ("dpo", "kto", "orpo")
STEPS = 5


def preferences(num=10):
    """Return pairs of unlike, odd lengths."""
    answers = [" a knife", " the broom of the house", " needle and thread", " a saw, or an old rusty saw", " soup"]
    return [
        {
            "prompt": f"{'Well now. ' * (i % 3)}What is number {i}?",
            "chosen": answers[i % 5],
            "rejected": answers[(i + 2) % 5] * (1 + i % 2),
        }
        for i in range(num)
    ]


def unpaired(num=10):
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(preferences(num))
    ]


ROWS = {"dpo": preferences, "kto": unpaired, "orpo": preferences}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    save_llama(folder / "model", chat=True)
    for method, rows in ROWS.items():
        write_rows(folder / f"{method}.jsonl", rows())
    return folder


def run_of(place, method, name, **changes):
    """Return a run of five steps in float32, in the rows' order."""
    training = {"method": method, "output_dir": str(place / name), "train_sampling_strategy": "sequential"}
    training |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_strategy": "no"}
    sections = {
        "model": {"dtype": "float32", "quantization": "none"},
        "adapter": {"method": "lora", "rank": 4, "target_modules": SEVEN_LINEARS},
        "data": {"train": [str(place / f"{method}.jsonl")]},
        "training": training | changes.pop("training", {}),
        "eval": {"tasks": []},
    }
    return tiny_run(place, **{name: section | changes.get(name, {}) for name, section in sections.items()})


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trls_own(place, method, factors_of):
    """Train as TRL and PEFT do by themselves, from the same first factors, and return the losses."""
    arguments = training_arguments_class("causal_lm", method)(
        output_dir=str(place / "trl"),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_grad_norm=1.0,
        weight_decay=0.0,
        optim="adamw_torch",
        disable_tqdm=True,
    )
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=SEVEN_LINEARS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(factors_of[name])
    if method == "orpo":
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        import trl

        Trainer = getattr(trl, f"{method.upper()}Trainer")
    rows = Dataset.from_list(ROWS[method]())
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return losses(trainer), trainer


# what the fused head is asked for in a step, and whether distributions are to be described. DPO: the model and its
# reference; KTO: the KL's rows and the model, then both of the reference; ORPO: the model.
ASKED = {"dpo": [True, False], "kto": [False, True, False, False], "orpo": [True]}


@pytest.mark.parametrize(("method", "sequences"), [("dpo", 2), ("kto", 1), ("orpo", 2)])
def test_losses_of_five_steps_are_those_of_peft_and_trl(place, method, sequences, monkeypatch):
    asked = []
    compute = log_probs.completion_log_probs

    def spy(*args, **kwargs):
        asked.append(kwargs["described"])
        return compute(*args, **kwargs)

    monkeypatch.setattr(log_probs, "completion_log_probs", spy)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 304 * 7)  # of the vocabulary, so that there are several chunks
    monkeypatch.setattr(loss, "_DESCRIBED_ELEMENTS", 304 * 3)
    found, tokens = {}, []
    for fused in ("off", "on"):
        run = run_of(place, method, f"{method}-{fused}", training={"fused": fused}, adapter={"alpha": 8})
        trainer = build_trainer(run, RunFolder(place / f"{method}-{fused}"))
        first = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert list(trainer.model.peft_config) == ["default"], "no copy of an adapter whose update is zero"
        if fused == "off":
            count = lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel())  # noqa: E731
            trainer.model.get_base_model().model.register_forward_pre_hook(count, with_kwargs=True)
            most = max_forward_tokens(trainer, sequences)
        trainer.train()
        found[fused] = losses(trainer)
    if method != "orpo":  # whose trainer names no inputs
        assert most / 2 < max(tokens) <= most, "what training.memory: auto reckons with"
    assert asked == STEPS * ASKED[method], "fused steps make no logits of all tokens, unfused ones are TRL's"
    expected, trls = trls_own(place, method, first)

    assert len(expected) == STEPS
    assert min(abs(one - other) for one, other in zip(expected[2:], expected[1:], strict=False)) > 1e-4, "steps count"
    for fused in ("off", "on"):
        torch.testing.assert_close(torch.tensor(found[fused]), torch.tensor(expected), rtol=0, atol=1e-5)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    theirs = [row for row in trls.state.log_history if "loss" in row]
    for name in ("rewards/chosen", "rewards/margins", "logps/rejected", "entropy", "mean_token_accuracy", "kl"):
        one, other = ([row[name] for row in rows if name in row] for rows in (logged, theirs))
        assert one == pytest.approx(other, abs=2e-4)


@pytest.fixture(scope="module")
def earlier(place):
    """Return a run whose adapter others start from."""
    return do(run_of(place, "orpo", "earlier", training={"max_steps": 2}))


def test_the_reference_is_the_adapter_that_a_run_starts_from(place, earlier):
    training = {"fused": "on", "max_steps": 3}
    run = run_of(place, "dpo", "again", adapter={"start_from": str(earlier.path)}, training=training)
    trainer = build_trainer(run, RunFolder(place / "again"))
    named = dict(trainer.model.named_parameters())
    copies = [name for name in named if "ref" in name.split(".")]
    assert len(copies) == len([name for name in named if "default" in name.split(".")]) > 0
    for name in copies:
        assert not named[name].requires_grad
        assert torch.equal(named[name], named[".".join("default" if p == "ref" else p for p in name.split("."))])
    first = {name: named[name].clone() for name in copies}
    trainer.train()
    assert all(torch.equal(named[name], value) for name, value in first.items()), "the reference stays"
    assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-5), "they begin alike"
    assert losses(trainer)[2] != pytest.approx(0.6931472, abs=1e-3)


def test_a_run_that_resumes_keeps_its_reference(place, earlier):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 8, "max_steps": 4}
    options = {"adapter": {"start_from": str(earlier.path)}, "training": saving}
    whole = do(run_of(place, "dpo", "whole", **options))
    shutil.copytree(whole.path, place / "stopped")
    shutil.rmtree(place / "stopped" / "checkpoint-4")
    again = do(run_of(place, "dpo", "stopped", **options), resume="auto")

    assert same(factors(whole), factors(again))
    of_each = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in (whole, again)]
    assert of_each[0] == of_each[1]
    assert not (whole.path / "checkpoint-2" / "ref").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_resumes_counts_tokens_on_also_those_of_steps_that_were_not_logged(place, method):
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 4, "max_steps": 4}
    whole = do(run_of(place, method, f"counted-{method}", training=saving))
    shutil.copytree(whole.path, place / f"again-{method}")
    shutil.rmtree(place / f"again-{method}" / "checkpoint-4")
    again = do(run_of(place, method, f"again-{method}", training=saving), resume="auto")

    counted = [[row["num_tokens"] for row in metrics(folder) if "loss" in row] for folder in (whole, again)]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("method", METHODS)
def test_what_an_evaluation_finds_is_a_mean_over_rows_however_they_fall_into_batches(place, method):
    """Seven rows: in batches of three the last one is alone, and of KTO's some have one label."""
    write_rows(place / f"held-{method}.jsonl", ROWS[method](7))
    found = []
    for size in (7, 3):
        training = {"per_device_eval_batch_size": size, "num_train_epochs": 2}
        data = {"validation": [str(place / f"held-{method}.jsonl")]}
        row = metrics(do(run_of(place, method, f"held-{method}-{size}", data=data, training=training)))[-1]
        found.append({name: value for name, value in row.items() if name.startswith(("eval_rewards/", "eval_logps/"))})
    assert len(found[0]) >= 5
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_told_of_rows_are_the_trainers(place, method):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")},
        }
        for row in preferences(3)
    ]
    if method == "kto":
        chat = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i > 0} for i, row in enumerate(chat)]
    kind = "unpaired" if method == "kto" else "preference"
    for name, rows in (("texts", ROWS[method](3)), ("chat", chat)):
        write_rows(place / f"{method}-{name}.jsonl", rows)
        run = run_of(place, method, "tokens", data={"train": [str(place / f"{method}-{name}.jsonl")]})
        trainer = build_trainer(run, RunFolder(place / "tokens"))
        for row, trained in zip(rows, trainer.train_dataset, strict=True):
            told = tokenize_completions(row, f"chat_{kind}" if name == "chat" else kind, tokenizer, method)
            for column, (prompt, completion) in told.items():
                if method == "orpo":
                    assert trained[f"{column}_input_ids"] == prompt + completion
                    assert trained[f"{column}_labels"] == [-100] * len(prompt) + completion
                else:
                    assert (trained["prompt_ids"], trained[f"{column}_ids"]) == (prompt, completion)


TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}</s>{% endif %}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CUT = [{"type": "function", "function": {"name": "cut", "parameters": {"type": "object", "properties": {}}}}]


def called(name):
    function = {"name": name, "arguments": {}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize("method", METHODS)
def test_tools_and_their_calls_are_trained_on_as_the_template_writes_them(place, tmp_path, method):
    asked = [{"role": "user", "content": "Cut bread."}]
    later = [*asked, called("cut"), {"role": "tool", "content": "It is cut."}]
    pairs = [
        {"prompt": asked, "chosen": [called("cut")], "rejected": [{"role": "assistant", "content": "No."}]},
        {"prompt": later, "chosen": [{"role": "assistant", "content": "Done."}], "rejected": [called("saw")]},
    ]
    rows = [{**pairs[0], "tools": CUT}, {**pairs[1], "tools": CUT}, pairs[0]]
    if method == "kto":
        rows = [{"completion": row.pop("chosen"), "label": i > 0, **row} for i, row in enumerate(map(dict, rows))]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    model = {"dtype": "float32", "quantization": "none", "chat_template": str(template)}
    run = run_of(place, method, f"tools-{method}", data={"train": [source], "validation": [source]}, model=model)
    trainer = build_trainer(run, RunFolder(place / "tools"))
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.chat_template = TEMPLATE
    for row, trained in zip([*rows, *rows], [*trainer.train_dataset, *trainer.eval_dataset], strict=True):
        tools = row.get("tools")
        prompt = tokenizer.apply_chat_template(row["prompt"], tools=tools, tokenize=False, add_generation_prompt=True)
        for column in ("completion",) if method == "kto" else ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[column], tools=tools, tokenize=False)
            if method == "orpo":
                labels = trained[f"{column}_labels"]
                learned = [token for token in labels if token != -100]
                before = trained[f"{column}_input_ids"][: labels.index(learned[0])]
            else:
                before, learned = trained["prompt_ids"], trained[f"{column}_ids"]
            begin = "<s>" if method == "orpo" else ""  # its trainer's own
            assert (tokenizer.decode(before), tokenizer.decode(learned)) == (begin + prompt, whole[len(prompt) :])
    trainer.train()
    assert all(map(math.isfinite, losses(trainer)))


@pytest.fixture(scope="module", params=METHODS)
def ran(request, place, with_pages):
    """Run once on an NF4 base and embedded-style questions, with held-out rows and a checkpoint."""
    method = request.param
    sections = {
        "data": {"train": [str(place / "questions.jsonl")], "validation": [str(place / "questions.jsonl")]},
        "training": {"method": method, "output_dir": str(place / f"whole-{method}"), "fused": "on"},
        "eval": {"tasks": [str(place / "questions.jsonl")], "prompts": ["What sews cloth?"], "max_new_tokens": 2},
    }
    with with_pages():
        return method, do(tiny_run(place, **sections))


def test_a_whole_run_logs_draws_and_is_reported(ran):
    method, folder = ran
    rows = metrics(folder)
    assert {"rewards/chosen", "rewards/rejected", "num_tokens"} <= {name for row in rows for name in row}
    assert any("eval_rewards/margins" in row for row in rows)
    assert all("tokens_per_s" in row for row in rows if "loss" in row)
    assert folder.rewards.is_file()
    assert results(folder)["training_method"] == method
    assert "Rewards over the steps" in (folder.path / "report.html").read_text()
    assert [p.name for p in folder.path.glob("checkpoint-*/ref")] == []


def test_what_it_trained_is_loaded_without_the_trainer(ran):
    _, folder = ran
    assert all(torch.isfinite(factor).all() for factor in factors(folder).values())
    found = lsr_scale.generate(folder.path, "What sews cloth?", max_new_tokens=2)
    assert found is not None


def test_a_trained_head_is_left_to_trl_and_that_is_said(place):
    said = []
    run = run_of(
        place,
        "dpo",
        "head",
        adapter={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        training={"fused": "on", "max_steps": 2},
    )
    trainer = build_trainer(run, RunFolder(place / "head"), say=said.append)
    trainer.train()
    assert "note: the log-probabilities are computed by TRL: lm_head is trained" in said
    assert losses(trainer)[0] == pytest.approx(0.6931472, abs=1e-5), "the reference has the head as it was"
    assert losses(trainer)[1] != pytest.approx(0.6931472, abs=1e-5)


def test_a_plan_counts_chosen_and_rejected_and_orpos_logits(place):
    options = {"fused": "off", "max_length": 32}
    tokens = {name: plan(run_of(place, name, "plan", training=options), trace=name == "orpo") for name in METHODS}
    assert [tokens[method].tokens_per_gpu for method in METHODS] == [128, 64, 128]
    told = [any("all logits" in line for line in tokens[method].warnings) for method in METHODS]
    assert told == [False, False, True]


def test_trials_of_preferences_are_trained_one_after_the_other(place):
    runs = [run_of(place, "dpo", f"trial-{rate}", training={"learning_rate": rate}) for rate in (1e-3, 2e-3)]
    assert "training.method: dpo" in str(sharing_fallback_reason(runs))


def test_early_stopping_may_go_by_margins(place):
    training = {"early_stopping": {"patience": 1}, "metric_for_best_model": "eval_rewards/margins"}
    data = {"validation_split": 0.4}
    run_of(place, "dpo", "early", training=training, data=data)
    with pytest.raises(UserError, match="eval_rewards/margin"):
        run_of(place, "dpo", "early", training={**training, "metric_for_best_model": "eval_rewards/margin"}, data=data)


def test_a_switch_of_the_adapter_checks_no_layer_anew(place, monkeypatch):
    trainer = build_trainer(
        run_of(place, "dpo", "checks", training={"fused": "on", "max_steps": 3}), RunFolder(place / "checks")
    )
    checked = []
    check = fallback._check_layer
    monkeypatch.setattr(fallback, "_check_layer", lambda layer: checked.append(layer) or check(layer))
    trainer.train()
    assert len(checked) <= 4, "each of two layers with the adapter, and without"


def test_a_loss_that_is_not_finite_is_recorded_with_both_completions(place, monkeypatch):
    from trl.experimental.orpo import ORPOTrainer

    monkeypatch.setattr(ORPOTrainer, "compute_loss", lambda *args, **kwargs: torch.tensor(torch.inf))
    folder = RunFolder(place / "infinite")
    folder.path.mkdir()
    trainer = build_trainer(run_of(place, "orpo", "infinite"), folder)
    with pytest.raises(UserError, match="loss"):
        trainer.train()
    (line,) = [json.loads(text) for text in folder.nonfinite.read_text().splitlines()]
    assert {"chosen_input_ids", "rejected_input_ids"} <= line.keys()


def test_rows_that_prefer_nothing_within_the_limit_and_rows_of_one_class_are_noted(place, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    long = " " + "b" * 40
    pairs = Dataset.from_list([{"prompt": "a", "chosen": long + "x", "rejected": long + "y"}, *preferences(2)])
    for limit, told in ((36, True), (None, False)):
        found = count_completions("data.train", pairs, "preference", tokenizer, {"method": "dpo", "max_length": limit})
        notes = [note for _, _, of_part in found for note in of_part]
        assert any("of 1 in 3 rows, chosen and rejected have the same tokens" in note for note in notes) == told
    for rows, told in ((unpaired(3), False), ([row | {"label": True} for row in unpaired(3)], True)):
        (found,) = count_completions(
            "data.train", Dataset.from_list(rows), "unpaired", tokenizer, {"method": "kto", "max_length": 64}
        )
        assert any("every row is desirable, and KTO contrasts both" in note for note in found[2]) == told
    write_rows(tmp_path / "one.jsonl", unpaired(1))
    with pytest.raises(UserError, match="one row, and KTO takes its KL from each row's neighbours"):
        do(run_of(place, "kto", "single", data={"train": [str(tmp_path / "one.jsonl")]}))
