"""The scorer against lm-eval's HFLM, example by example, for every prompt form; and its own promises."""

import copy
import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lsr_scale.data.tasks import TASKS, Example, to_example
from lsr_scale.errors import UserError
from lsr_scale.scoring import scorer
from lsr_scale.scoring.accuracy import Prediction, TaskScore, mcnemar
from lsr_scale.scoring.scorer import EncodesOnce, encode_examples, encode_pairs, score, score_encoded
from tests.data.test_tasks import HUB_ROWS
from tests.helpers.smollm2 import beginning_marked, smollm2_tokenizer
from tests.helpers.tiny_models import tiny_llama

SHIPPED = {
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
}


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True)
    with torch.no_grad():  # far from uniform, so that choices differ clearly
        model.get_input_embeddings().weight.mul_(40)
    return model


def examples_of(task):
    return [to_example(row, task, default_id=str(index)) for index, row in enumerate(HUB_ROWS[task])]


@pytest.fixture(scope="module")
def oracle(tokenizer, model, tmp_path_factory):
    """Run lm-eval's shipped tasks on the rows above; task -> its samples and metrics."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("THE SCORER IS NOT CHECKED: its oracle is missing, install lm-eval==0.4.13 (extra 'eval')")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("lm_eval")
    for task, shipped in SHIPPED.items():
        rows = folder / f"{task}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in HUB_ROWS[task]), encoding="utf-8")
        files = {split: str(rows) for split in ("train", "validation", "test")}
        lines = [
            f"include: {spec.submodule_search_locations[0]}/tasks/{shipped}",
            f"task: {task}_local",
            "tag: []",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {json.dumps({'data_files': files, 'cache_dir': str(folder)})}",
        ]
        (folder / f"{task}.yaml").write_text("\n".join(lines), encoding="utf-8")
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        tasks=[f"{task}_local" for task in SHIPPED],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=10,
    )
    return {task: (found["samples"][f"{task}_local"], found["results"][f"{task}_local"]) for task in SHIPPED}


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_form_scores_as_lm_eval_does_example_by_example(task, oracle, model, tokenizer):
    samples, metrics = oracle[task]
    examples = examples_of(task)
    ours = score(model, tokenizer, examples, batch_tokens=150)

    assert len(samples) == len(examples)
    for sample, example, prediction in zip(samples, examples, ours.predictions, strict=True):
        assert [tuple(pair) for pair in sample["arguments"]] == list(
            zip(example.contexts, example.continuations, strict=True)
        )
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        assert prediction.log_likelihoods == pytest.approx(theirs, abs=1e-4)
        assert sample["acc"] == float(prediction.choice == prediction.answer)
        if "acc_norm" in sample:
            assert sample["acc_norm"] == float(prediction.choice_norm == prediction.answer)
    for key, value in (("acc", ours.accuracy), ("acc_stderr", ours.accuracy_stderr),
                       ("acc_norm", ours.acc_norm), ("acc_norm_stderr", ours.acc_norm_stderr)):  # fmt: skip
        if f"{key},none" in metrics:
            assert value == pytest.approx(metrics[f"{key},none"], abs=1e-9)


def test_known_tasks_are_where_lm_eval_looks_for_them():
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the table of hub datasets is not checked against lm-eval==0.4.13 (extra 'eval')")
    for name, task in TASKS.items():
        shipped = Path(spec.submodule_search_locations[0], "tasks", SHIPPED[name])
        lines = shipped.read_text(encoding="utf-8").splitlines()
        if "include: arc_easy.yaml" in lines:
            lines += (shipped.parent / "arc_easy.yaml").read_text(encoding="utf-8").splitlines()
        assert f"dataset_path: {task.hub}" in lines
        if task.subset is not None:
            assert f"dataset_name: {task.subset}" in lines
        assert task.eval_split == ("test" if "test_split: test" in lines else "validation")


def hflm(model, tokenizer, **options):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("THE SCORER IS NOT CHECKED: its oracle is missing, install lm-eval==0.4.13 (extra 'eval')")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, **options)


def log_likelihoods_of(lm, pairs):
    from lm_eval.api.instance import Instance

    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    return [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]


@pytest.mark.parametrize("marks_beginning", [False, True])
@pytest.mark.parametrize("max_length", [None, 9])
def test_odd_texts_score_as_in_hflm(marks_beginning, max_length, model, tokenizer):
    if marks_beginning:
        tokenizer = beginning_marked(tokenizer)
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    contexts = ["A stem that ends in spaces  ", "", "tab\t", f"{tokenizer.bos_token}spelled out", "one " * 30, "x\n\n"]
    examples = [
        Example(str(index), (context, context), (" red and blue", " green"), 0, (12, 5))
        for index, context in enumerate(contexts)
    ]
    pairs = [pair for e in examples for pair in zip(e.contexts, e.continuations, strict=True)]
    theirs = log_likelihoods_of(hflm(model, tokenizer, max_length=max_length), pairs)
    ours = score(model, tokenizer, examples, max_length=max_length, batch_tokens=40)
    found = [value for prediction in ours.predictions for value in prediction.log_likelihoods]
    assert found == pytest.approx(theirs, abs=1e-4)


def test_without_contexts_the_choices_alone_are_scored_as_in_hflm(model, tokenizer):
    examples = examples_of("arc_easy")
    theirs = log_likelihoods_of(
        hflm(model, tokenizer), [("", continuation) for e in examples for continuation in e.continuations]
    )
    ours = score(model, tokenizer, examples, unconditional=True)
    assert [v for p in ours.predictions for v in p.log_likelihoods] == pytest.approx(theirs, abs=1e-4)
    with_contexts = score(model, tokenizer, examples)
    assert ours.predictions != with_contexts.predictions


def test_without_contexts_partial_evaluation_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="share one continuation"):
        score(model, tokenizer, examples_of("winogrande"), unconditional=True)


def test_batch_size_changes_no_prediction(model, tokenizer):
    examples = examples_of("hellaswag") + examples_of("boolq")
    alone = score(model, tokenizer, examples, batch_tokens=1)
    together = score(model, tokenizer, examples, batch_tokens=100_000)
    for one, other in zip(alone.predictions, together.predictions, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)
        assert (one.choice, one.choice_norm) == (other.choice, other.choice_norm)
    assert score(model, tokenizer, examples, batch_tokens=100_000) == together


@pytest.mark.parametrize("keep", [False, True])
def test_examples_encoded_once_score_several_models(model, tokenizer, monkeypatch, keep):
    examples = examples_of("piqa") + examples_of("boolq")
    other = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    expected = [score(one, tokenizer, examples, batch_tokens=64) for one in (model, other)]
    encoded = encode_examples(tokenizer, examples, batch_tokens=64, max_length=512)
    if keep:
        encoded.keep_on("cpu")
        monkeypatch.setattr(scorer._Batch, "to", None)  # no batch is copied again
    monkeypatch.setattr(scorer, "encode_pairs", None)
    assert [score_encoded(one, tokenizer, encoded) for one in (model, other)] == expected
    assert expected[0] != expected[1]


def test_encoded_examples_are_refused_by_a_model_with_fewer_tokens(model, tokenizer):
    encoded = encode_examples(tokenizer, examples_of("piqa"))
    with pytest.raises(UserError, match="the embedding of"):
        score_encoded(tiny_llama(vocab_size=32), tokenizer, encoded)


def test_a_last_token_that_a_model_has_not_is_refused(model):
    larger = copy.deepcopy(smollm2_tokenizer())
    larger.add_tokens(["<yes>"])  # which is no input: nothing follows it
    examples = [Example("0", ("Is it? ", "Is it? "), ("<yes>", "no"), 0, (3, 2))]
    with pytest.raises(UserError, match="the embedding of"):
        score(model, larger, examples)


def test_only_continuation_positions_reach_the_vocabulary_and_yes_no_shares_a_pass(model, tokenizer):
    examples = examples_of("boolq")
    seen = []
    hooks = [
        model.lm_head.register_forward_hook(lambda _, args, out: seen.append(("logits", out.shape))),
        model.model.register_forward_hook(lambda _, args, kwargs, out: seen.append(("ids", kwargs["input_ids"].shape)),
                                          with_kwargs=True),
    ]  # fmt: skip
    try:
        score(model, tokenizer, examples)
    finally:
        for hook in hooks:
            hook.remove()
    inputs = [shape for kind, shape in seen if kind == "ids"]
    assert [shape[0] for shape in inputs] == [2], "two questions, each with yes and no, are two inputs"
    assert [tuple(shape) for kind, shape in seen if kind == "logits"] == [(1, 4, len(tokenizer))]


def test_modes_of_all_modules_are_as_before(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    try:
        score(model, tokenizer, examples_of("openbookqa"))
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_an_adapted_model_scores_as_its_merged_one(model, tokenizer):
    import copy

    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_alpha=8)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    examples = examples_of("piqa")
    with_adapter = score(adapted, tokenizer, examples)
    merged = score(adapted.merge_and_unload(), tokenizer, examples)
    base = score(model, tokenizer, examples)
    for one, other, without in zip(with_adapter.predictions, merged.predictions, base.predictions, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, rel=1e-4)
        assert one.log_likelihoods != pytest.approx(without.log_likelihoods, rel=1e-3)


def test_progress_counts_tokens_to_the_end(model, tokenizer):
    calls = []
    score(model, tokenizer, examples_of("hellaswag"), batch_tokens=64, progress=lambda *call: calls.append(call))
    assert len(calls) > 1
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("size", [2, 3, 40])
def test_processes_make_equally_many_passes_and_find_the_same_to_the_last_bit(model, tokenizer, monkeypatch, size):
    ran, parts = [], []
    hook = model.register_forward_hook(lambda *_: ran.append(1))
    options = {"batch_tokens": 64}

    def gather(value):
        # those that come later are not there yet: stand-ins for what this one did not compute
        parts.append(value[0])
        later = [0.0 if all(map(math.isnan, found)) else math.nan for found in zip(*parts, strict=True)]
        return [*parts, later]

    try:
        plain = score(model, tokenizer, examples_of("piqa"), **options)
        passes = [len(ran)]
        monkeypatch.setattr(scorer.distributed, "gather", gather)
        for rank in range(size):
            monkeypatch.setattr(scorer.distributed, "group_rank_and_size", lambda rank=rank: (rank, size))
            distributed = score(model, tokenizer, examples_of("piqa"), distribute=True, **options)
            passes.append(len(ran))
    finally:
        hook.remove()
    assert {after - before for before, after in itertools.pairwise(passes)} == {-(-passes[0] // size)}
    assert distributed.predictions == plain.predictions


def test_a_process_that_joined_no_group_scores_all_by_itself(model, tokenizer, monkeypatch):
    plain = score(model, tokenizer, examples_of("piqa"), batch_tokens=64)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as clusters set it
    monkeypatch.setenv("RANK", "0")
    alone = score(model, tokenizer, examples_of("piqa"), distribute=True, batch_tokens=64)
    assert alone.predictions == plain.predictions


def test_errors_say_what_to_do(model, tokenizer):
    import copy

    examples = examples_of("piqa")
    with pytest.raises(UserError, match="at least one example"):
        score(model, tokenizer, [])
    with pytest.raises(UserError, match="1 to 3 tokens"):
        score(model, tokenizer, examples, max_length=3)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        score(broken, tokenizer, examples)


def test_the_context_alone_decides_where_the_continuation_begins(tokenizer):
    (context, continuation), (empty, alone) = encode_pairs(tokenizer, [("One  ", " two"), ("", " two")])
    assert tokenizer.decode(context) == "One"
    assert tokenizer.decode(continuation) == "   two"
    assert (empty, alone) == ([tokenizer.bos_token_id], tokenizer(" two").input_ids)


def predictions(*hits):
    return TaskScore.of([Prediction(str(i), 0, (0.0, -1.0), int(not hit), int(not hit)) for i, hit in enumerate(hits)])


def test_standard_error_is_the_sample_deviation_of_the_mean():
    import statistics

    hits = [True, False, True, True, False, False, True]
    found = predictions(*hits)
    assert found.accuracy == pytest.approx(4 / 7)
    assert found.accuracy_stderr == pytest.approx(statistics.stdev(map(float, hits)) / 7**0.5)
    assert json.loads(json.dumps(found.to_dict()))["num_examples"] == 7


def test_mcnemar_counts_what_changed():
    before = predictions(*[False] * 10, *[True] * 2, *[True] * 30)
    after = predictions(*[True] * 10, *[False] * 2, *[True] * 30)
    gained, lost, p = mcnemar(before, after)
    assert (gained, lost) == (10, 2)
    assert p == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(before, before) == (0, 0, 1.0)
    with pytest.raises(UserError, match="same examples"):
        mcnemar(before, predictions(True))


def test_what_is_the_same_is_encoded_once_and_what_is_not_is_not(tokenizer, model):
    encode, examples = EncodesOnce(most=3), examples_of("piqa")
    first = encode(tokenizer, examples, batch_tokens=64, max_length=None)
    assert encode(tokenizer, list(examples), batch_tokens=64, max_length=None) is first
    others = [
        encode(tokenizer, examples[:1], batch_tokens=64, max_length=None),
        encode(tokenizer, examples, batch_tokens=128, max_length=None),
        encode(copy.deepcopy(tokenizer), examples, batch_tokens=64, max_length=None),  # the fourth: the first goes
    ]
    assert len({id(one) for one in (first, *others)}) == 4
    assert encode(tokenizer, examples, batch_tokens=64, max_length=None) is not first
    found = score(model, tokenizer, examples, batch_tokens=64, encode=encode)
    assert found == score(model, tokenizer, examples, batch_tokens=64)
