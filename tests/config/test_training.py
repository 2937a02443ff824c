import dataclasses
import warnings
from dataclasses import dataclass

import pytest

from lsr_scale import config
from lsr_scale.config import training as training_fields
from lsr_scale.config.training import arguments, fields
from tests.helpers.run_text import CONFIGS, MINIMAL, load, problem


def test_owned_training_fields_exist_and_each_says_what_to_set_instead():
    installed = {field.name for field in dataclasses.fields(training_fields.training_arguments_class("causal_lm"))}
    assert set(training_fields.OWNED) <= installed
    for name, remedy in training_fields.OWNED.items():
        message = problem(MINIMAL, f"training.{name}=x")
        assert f"training.{name}: not a field to set here: {remedy}" in message


def test_training_takes_every_other_field_of_the_installed_dataclass():
    for task in ("causal_lm", "seq_cls"):
        source = training_fields.training_arguments_class(task)
        names = {field.name for field in dataclasses.fields(source) if field.init} - set(training_fields.OWNED)
        assert names <= set(training_fields.training_model(task).model_fields)
    assert set(training_fields.DEFAULTS) <= set(training_fields.training_model("seq_cls").model_fields)


@pytest.mark.parametrize("told", ["defaults", "bounds", "own", "owned"])
def test_one_subject_alone_tells_of_a_field(told):
    names = [name for subject in fields.SUBJECTS for name in getattr(subject, told)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["smollm2_lsr", "glue_mrpc_lsr"])
def test_training_arguments_build_the_trainers_own_class_with_precision_explicit(name, tmp_path):
    run = config.load_run(CONFIGS / f"{name}.yaml", [f"training.output_dir={tmp_path}"])
    kwargs = config.training_arguments(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        arguments = training_fields.training_arguments_class(run.model.task)(**kwargs, use_cpu=True)
    assert (arguments.bf16, arguments.fp16) == (False, False)
    assert arguments.gradient_checkpointing is False
    assert arguments.learning_rate == run.training["learning_rate"]
    assert arguments.output_dir == str(tmp_path)
    assert arguments.get_warmup_steps(100) == 3


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_are_taken_and_mean_the_same(name):
    run = load(MINIMAL, f"training.{name}=no")
    assert run.training["gradient_checkpointing"] is False
    assert "activation_checkpointing" not in run.training
    assert load(MINIMAL).training["gradient_checkpointing"] is None
    assert not training_fields.checkpoints_layers(run.training)


def test_checkpointing_has_the_name_that_the_installed_class_knows(monkeypatch):
    @dataclass
    class Before523:
        gradient_checkpointing: bool = False

    @dataclass
    class From523(Before523):
        activation_checkpointing: bool = False

    training = load(MINIMAL).training
    for source, name in ((Before523, "gradient_checkpointing"), (From523, "activation_checkpointing")):
        monkeypatch.setattr(arguments, "training_arguments_class", lambda *which, source=source: source)
        kwargs = training_fields.training_kwargs(training, "causal_lm")
        assert {key for key in kwargs if "checkpointing" in key} == {name}


@pytest.mark.parametrize(("memory", "expected"), [("auto", True), ("save", True), ("speed", False)])
def test_memory_says_whether_layers_are_checkpointed(memory, expected):
    run = load(MINIMAL, f"training.memory={memory}")
    assert training_fields.checkpoints_layers(run.training) is expected
    kwargs = config.training_arguments(run)
    assert [value for key, value in kwargs.items() if key.endswith("_checkpointing")] == [expected]
    assert "memory" not in kwargs
    other = f"training: {{memory: {memory}, gradient_checkpointing: {str(not expected).lower()}}}"
    if memory == "auto":
        assert not training_fields.checkpoints_layers(load(MINIMAL + other).training)
    else:
        assert f"memory: {memory} and gradient_checkpointing: {not expected} contradict" in problem(MINIMAL + other)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_field_with_two_names_is_refused_by_the_one_that_was_written(name):
    assert f"memory: speed and {name}: True contradict" in problem(
        MINIMAL, "training.memory=speed", f"training.{name}=true"
    )
    assert f"{name}_kwargs: expected a mapping" in problem(MINIMAL, f"training.{name}_kwargs='no'")


def test_checkpointing_set_to_two_values_is_refused():
    message = problem(MINIMAL + "training: {gradient_checkpointing: true, activation_checkpointing: false}")
    assert "run.yaml:7: training: gradient_checkpointing and activation_checkpointing are two names" in message


def test_seq_cls_has_a_length_of_its_own_that_the_trainer_does_not_see():
    text = MINIMAL.replace("name: some/model", "name: x\n  task: seq_cls\n  num_labels: 2")
    run = load(text, "training.max_length=64")
    assert run.training["max_length"] == 64
    assert "max_length" not in config.training_arguments(run)
    assert "only task causal_lm has" in problem(text, "training.packing=true")


def test_evaluation_during_training_follows_the_validation_data():
    assert load(MINIMAL).training["eval_strategy"] == "no"
    assert load(MINIMAL, "data.validation=[piqa]").training["eval_strategy"] == "epoch"
    assert load(MINIMAL, "data.validation=[piqa]", "training.eval_strategy=no").training["eval_strategy"] == "no"


@pytest.mark.parametrize("steps", [0, -5])
def test_a_number_of_steps_is_one_or_left_out(steps):
    expected = f"max_steps: expected a number of steps, or -1 for num_train_epochs, got {steps}"
    assert expected in problem(MINIMAL + f"training: {{max_steps: {steps}}}")
    assert load(MINIMAL + "training: {max_steps: -1}").training["max_steps"] == -1


def test_a_bounded_number_may_have_a_word_beside_it_and_no_other_text():
    if training_fields.training_model("causal_lm").model_fields["pad_to_multiple_of"].default != "auto":
        pytest.skip("the installed TRL takes numbers only")
    for value in ("auto", "8", "null"):
        load(MINIMAL, f"training.pad_to_multiple_of={value}")
    for value in ("0", "70000", "x", "'8'", '"[/x]"', "[1]", "{a: 1}"):
        message = problem(MINIMAL, f"training.pad_to_multiple_of={value}")
        assert "training.pad_to_multiple_of: expected " in message
        assert "'auto'" in message


def test_a_run_computes_in_bfloat16_or_8_bits():
    for compute in ("bf16", "fp8", "int8"):
        load(MINIMAL, f"training.compute={compute}")
    assert "training.compute: " in problem(MINIMAL, "training.compute=int4")


def test_groups_that_stay_in_bfloat16_are_auto_or_a_list():
    for value in ("auto", "[]", "[down, 12.qkv, 0.gate_up, o]"):
        load(MINIMAL, f"training.keep_in_bf16={value}")
    assert "training.keep_in_bf16: expected 'auto' or list, got 'down'" in problem(
        MINIMAL, "training.keep_in_bf16=down"
    )
    for name in ("mlp", "12.", ".down", "-1.down", "1.2.down", "model.layers.1.down"):
        assert f"training.keep_in_bf16: '{name}': " in problem(MINIMAL, f"training.keep_in_bf16=['{name}']")
    assert "training.compute_tolerance: expected a number > 0" in problem(MINIMAL, "training.compute_tolerance=0")


def test_a_method_that_is_not_there_is_refused_with_those_that_are():
    assert load(MINIMAL).training["method"] == "sft"
    message = problem(MINIMAL, "training.method=grpoo")
    assert "training.method: expected 'sft'" in message
    assert "got 'grpoo'" in message


def test_a_classifier_has_no_training_method():
    text = MINIMAL.replace("name: some/model", "name: x\n  task: seq_cls\n  num_labels: 2")
    assert load(text).training["method"] == "sft"
    assert "method" not in config.training_arguments(load(text))
