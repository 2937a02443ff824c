import inspect
import json
from typing import get_args

import pytest

from lsr_scale import adapters
from lsr_scale.config import run as config
from lsr_scale.config import training as training_fields
from lsr_scale.config import yaml_text
from lsr_scale.data.formats import FORMATS
from lsr_scale.data.sources import load_rows
from lsr_scale.errors import UserError
from tests.helpers.run_text import CONFIGS, MINIMAL, load, problem

SHIPPED_RUNS = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.endswith("_sweep")]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "assignment",
    [
        *('model.revision=""', 'model.chat_template=""', 'adapter.start_from=""', 'eval.tasks=[{path: x, task: ""}]'),
        *(f'data.train=[{{path: x, {name}: ""}}]' for name in ("name", "revision", "split")),
    ],
)
def test_what_may_be_left_out_is_not_empty_where_it_is_there(assignment):
    assert "expected text that is not empty, got ''" in problem(MINIMAL, assignment)


# What is shipped


@pytest.mark.parametrize("path", SHIPPED_RUNS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_survives_being_dumped(path):
    run = config.load_run(path)
    text = config.dump_yaml(run)
    again = config.run_from_dict(yaml_text.parse(text, "dumped")[0])
    assert again == run
    assert config.dump_yaml(again) == text
    assert path.read_text().startswith("# "), "a first line says what the config is and for whom"


def test_shipped_configs_cover_every_model_and_method():
    expected = {
        f"{model}_{method}"
        for model in ("mistral", "llama2", "llama3", "smollm2")
        for method in ("lsr", "kron_lora", "lora")
    }
    assert expected <= {path.stem for path in SHIPPED_RUNS}


@pytest.mark.parametrize("path", [path for path in SHIPPED_RUNS if "glue" not in path.stem], ids=lambda path: path.stem)
def test_shipped_language_models_are_4_bit_with_seven_adapted_linears_and_no_dropout(path):
    run = config.load_run(path)
    assert run.model.quantization == "nf4"
    assert run.adapter.options["target_modules"] == LINEARS
    assert run.adapter.options["dropout"] == 0
    assert path.stem.removesuffix("_large").endswith((run.adapter.method, "_chat", "_classify", run.training["method"]))
    assert run.eval.tasks or run.data.validation or run.data.validation_split, "something held out is measured"


# Unknown names


@pytest.mark.parametrize(
    ("addition", "path", "nearest"),
    [
        ("trainig: {}", "4: trainig", "did you mean 'training'"),
        ("model: {name: x, quantisation: nf4}", "4: model.quantisation", "did you mean 'quantization'"),
        ("adapter: {method: lsr, separation_rnak: 3}", "4: adapter.separation_rnak", "did you mean 'separation_rank'"),
        ("adapter: {method: lora, left_in: 3}", "4: adapter.left_in", "valid: alpha, alpha_pattern, dropout"),
        ("data: {trian: [a], train: [b]}", "4: data.trian", "did you mean 'train'"),
        ("data:\n  train:\n    - piqa\n    - {path: x, splt: a}", "7: data.train.1.splt", "did you mean 'split'"),
        ("training:\n  seed: 1\n  learing_rate: 1", "6: training.learing_rate", "did you mean 'learning_rate'"),
        ("deepspeed: {confg: zero2}", "4: deepspeed.confg", "did you mean 'config'"),
        ("eval: {taks: []}", "4: eval.taks", "did you mean 'tasks'"),
        ("training: {rank: 8}", "4: training.rank", "it belongs to the section adapter: adapter.rank"),
        ("data: {limit: 3, train: [a]}", "4: data.limit", "it belongs to a source, such as train: [{path: ..., limit"),
        ("seed: 1", "4: seed", "it belongs to the section training: training.seed"),
        ("model: {name: x, lora_r: 8}", "4: model.lora_r", "here it is adapter.rank"),
        ("base_model: x", "4: base_model", "here it is model.name"),
        ("adapter: {method: lora, init_lora_weights: x}", "4: adapter.init_lora_weights", "here it is adapter.init"),
        (
            "training: {loraplus_lr_ratio: 16}",
            "4: training.loraplus_lr_ratio",
            "here it is training.optim_args: lr_ratio",
        ),
        ("training: {warmup_ratio: 0.1}", "4: training.warmup_ratio", "here it is training.warmup_steps"),
        ("training: {patience: 2}", "4: training.patience", "here it is training.early_stopping: {patience: 3}"),
        ("rl: dpo", "4: rl", "here it is training.method"),
        ("stage: sft", "4: stage", "here it is training.method"),
        ("sweeps: {grid: {}}", "4: sweeps", "did you mean 'sweep'?"),
        ("xyz: {}", "4: xyz", "valid: adapter, data, deepspeed, eval, model, sweep, training"),
        ("deepspeed: {stage: 3}", "4: deepspeed.stage", "here it is deepspeed.config, such as zero3"),
        ("training: {method: grpo, reward_funcs: [a]}", "4: training.reward_funcs", "here it is training.reward"),
    ],
)
def test_an_unknown_key_names_its_line_and_what_it_should_be(addition, path, nearest):
    lines = ["model: {name: some/model}", "adapter: {method: lsr}", "data: {train: [arc_easy]}"]
    kept = ["#" if addition.startswith(line.partition(" ")[0]) else line for line in lines]
    message = problem("\n".join([*kept, addition]))
    assert f"run.yaml:{path}: unknown key; {nearest}" in message


def test_every_problem_is_listed_at_once_in_the_order_of_the_file():
    message = problem(
        "model: {name: 1}\nadapter:\n  method: lsr\n  rnak: 1\n  rank: '8'\ndata: {train: x}\n"
        "training: {learning_rate: fast}\n"
    )
    assert message.splitlines() == [
        "run.yaml: 5 problems",
        "run.yaml:1: model.name: expected str, got 1; put it in quotes: '1'",
        "run.yaml:4: adapter.rnak: unknown key; did you mean 'rank'?",
        "run.yaml:5: adapter.rank: expected int, got '8'; remove the quotes",
        "run.yaml:6: data.train: expected list, got 'x'; write a list, one '- item' a line, or [item, item]",
        "run.yaml:7: training.learning_rate: expected float, got 'fast'; the default is 0.001",
    ]


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("training: {max_steps: 1_000}", "training.max_steps: expected int, got '1_000'; write 1000"),
        ("model: {name: some/model, quantization: 4bit}", "got '4bit'; here it is nf4"),
        ("model: {name: some/model, quantization: 8}", "got 8; here it is int8"),
        ("model: {name: some/model, quantization: bf16}", "got 'bf16'; here it is none"),
        ("model: {name: some/model, quantization: null}", "got None; here it is none"),
        (
            "training: {method: grpo, reward: [{name: regex, pattern: '('}]}",
            "position 0); write another one, or a function: file.py:name",
        ),
    ],
)
def test_what_other_tools_call_a_value_and_what_is_no_yaml_has_advice_that_can_be_followed(addition, message):
    lines = ["model: {name: some/model}", "adapter: {method: lsr}", "data: {train: [arc_easy]}"]
    kept = [line for line in lines if not addition.startswith(line.partition(" ")[0])]
    assert message in problem("\n".join([*kept, addition]))


def test_a_file_of_comments_is_told_so():
    assert problem("# to be written\n").endswith("each 'name:' on its own line, got nothing but comments")


def test_of_many_problems_the_first_eight_are_shown_shortened_and_the_rest_is_counted():
    lines = "".join(f"  {'k' * 900}{index}: 1\n" for index in range(100))
    message = problem(MINIMAL + "training:\n" + lines).splitlines()
    assert message[0] == "run.yaml: 100 problems"
    assert [line.partition(": ")[0] for line in message[1:9]] == [f"run.yaml:{number}" for number in range(8, 16)]
    assert max(map(len, message)) < 160
    assert message[9:] == ["... and 92 more"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.per_device_train_batch_size=10000000", "expected a number <= 65536, got 10000000"),
        ("training.gradient_accumulation_steps=10000000", "expected a number <= 65536, got 10000000"),
        ("training.max_steps=1e30", "training.max_steps: expected a number between -1e15 and 1e15, got 1e+30"),
        ("training.max_steps=10000000000", "expected a number <= 1000000000, got 10000000000"),
        ("model.num_labels=1000000000000", "model.num_labels: expected a number <= 1000000, got 1000000000000"),
        ("adapter.rank=1000000", "adapter.rank: expected a number up to 65,536, got 1000000"),
        ("adapter.rank_pattern={q_proj: 100000}", "adapter.rank_pattern.q_proj: expected a number up to 65,536"),
        ("adapter.alpha=1e308", "adapter.alpha: expected a number between -1e15 and 1e15, got 1e+308"),
        ("training.adam_beta1=3.0", "training.adam_beta1: expected a number < 1, got 3.0"),
        ("training.dataloader_num_workers=1000000", "expected a number <= 1024, got 1000000"),
        ("training.dataset_num_proc=-1", "training.dataset_num_proc: expected a number >= 1, got -1"),
        ("training.label_smoothing_factor=10.0", "expected a number <= 1, got 10.0"),
        (f"data.train.{'9' * 5000}=x", "data.train is a list; expected an index from 0 to 0"),
        (f"{'a.' * 100}b=1", "expected section.name=value"),
    ],
)
def test_absurd_numbers_are_refused_before_anything_is_made_of_them(override, expected):
    assert expected in problem(MINIMAL, override)


def test_arguments_of_an_optimizer_that_takes_none_are_refused():
    expected = "training.optim_args: has no effect with training.optim: adamw_torch_fused"
    assert expected in problem(MINIMAL, "training.optim_args='a=b'")
    assert (
        load(MINIMAL, "training.optim_args='momentum=0.9'", "training.optim=sgd").training["optim_args"]
        == "momentum=0.9"
    )


# Wrong types and values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model=x", "model: expected mapping, got 'x'; write its keys below it, such as name: ..."),
        ("adapter=lora", "adapter: expected mapping, got 'lora'; write its keys below it, such as method: ..."),
        ("training=[1]", "training: expected mapping, got [1]"),
        ("model.name=", "model.name: expected str, got None"),
        ('model.name=""', "model.name: expected text that is not empty, got ''"),
        ("model.dtype=bf16", "'bfloat16', 'float32' or 'float16', got 'bf16'; did you mean 'bfloat16'"),
        ("model.quantization=nf5", "got 'nf5'; did you mean 'nf4'"),
        ("model.random_weights=1", "expected true or false, got 1"),
        ("adapter.method=lrs", "adapter.method: unknown method 'lrs'; did you mean 'lsr'"),
        ("adapter.method=null", "adapter.method: unknown method None"),
        ("adapter.rank=true", "adapter.rank: expected int, got True"),
        ("adapter.rank=0", "adapter.rank: expected an integer >= 1, got 0"),
        ("adapter.dropout=1.5", "adapter.dropout: expected 0 <= dropout < 1, got 1.5"),
        ("adapter.init=papr", "expected 'zero', 'paper' or 'gradient', got 'papr'; did you mean 'paper'?"),
        ("adapter.init=lora_ga", "expected 'zero', 'paper' or 'gradient', got 'lora_ga'; here it is gradient"),
        ("adapter.init=pissa", "pissa changes the base's weights, which stay frozen here; gradient, which"),
        ("adapter.target_modules=[1, q_proj]", "adapter.target_modules.0: expected str, got 1"),
        ("adapter.rank_pattern={q_proj: x}", "adapter.rank_pattern.q_proj: expected int, got 'x'"),
        ("data.train=[]", "data.train: expected a list with at least 1 entry, got []"),
        ("data.train=[{name: x}]", "data.train.0.path: missing"),
        ("data.train=[{path: x, limit: 0}]", "data.train.0.limit: expected a number >= 1, got 0"),
        ("data.train=[{path: x, format: chat}]", "data.train.0.format: expected one of its names, got 'chat'"),
        ("training.learning_rate=.nan", "training.learning_rate: expected a finite number, got nan"),
        ("training.learning_rate=-1", "training.learning_rate: expected a number >= 0, got -1"),
        ("training.per_device_train_batch_size=2.5", "expected int, got 2.5; the default is 8"),
        ("training.seed=4294967296", "training.seed: expected a number < 4294967296"),
        ("training.lr_scheduler_type=cosin", "got 'cosin'; did you mean 'cosine'"),
        ("training.optim=adam_torch", "expected one of its names, got 'adam_torch'; did you mean 'adamw_torch'"),
        ("training.save_strategy=false", "got False; did you mean 'no'?"),
        ("training.log_level=loud", "training.log_level: expected one of its names, got 'loud'"),
        ("training.packing=maybe", "training.packing: expected true or false, got 'maybe'; the default is false"),
        ("training.max_length=0", "training.max_length: expected a number >= 1, got 0"),
        ("eval.batch_tokens=0", "eval.batch_tokens: expected a number >= 1, got 0"),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_was_expected_and_found(override, expected):
    message = problem(MINIMAL, override)
    assert message.startswith(f"--set {override}: ")
    assert expected in message


def test_missing_sections_and_names_are_each_named():
    message = problem("adapter: {rank: 1}\ndata: {train: [a]}")
    assert "run.yaml: model: missing; it has to be set" in message
    assert "run.yaml:1: adapter.method: missing; it has to be set: one of" in message
    assert all(method in message for method in adapters.method_names())


# What is right by itself and wrong together


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.task=seq_cls", "model.labels=[a, b]", "model.num_labels=3"], "is 3, but model.labels has 2; leave it"),
        (["model.task=seq_cls", "model.labels=[a, b, a]"], "model.labels: names 'a' twice; keep one"),
        (["model.task=seq_cls", "model.labels=[a]"], "two classes or more, got 1; for scores (a regression) set"),
        (["model.task=seq_cls", "model.labels=[a, '']"], "model.labels: expected names of classes, got an empty one"),
        (["model.task=seq_cls", "model.labels=[a, 0.5]"], "model.labels.1: expected str, got 0.5"),
        (["model.labels=[a, b]"], "model.labels: only task seq_cls has labels"),
        (["model.num_labels=2"], "model.num_labels: only task seq_cls has labels"),
        (["model.task=seq_cls", "model.num_labels=2", "eval.tasks=[piqa]"], "eval.tasks: multiple-choice questions"),
        (["adapter.target_modules=[q_proj, lm_head]"], "adapter.target_modules: SFTTrainer computes the loss"),
        (["adapter.target_modules=.*(lm_head|q_proj)"], "adapter.target_modules: SFTTrainer computes the loss"),
        (["adapter.target_modules=q_proj"], "write a list of names, such as [q_proj, v_proj], or all-linear"),
        (["adapter.target_modules=q_proj,v_proj"], "write a list of names, such as [q_proj, v_proj], or all-linear"),
        (["adapter.target_modules=(q_proj"], "write a list of names, such as [q_proj, v_proj], or all-linear"),
        (["model.attention=flash_attention_2", "model.dtype=float32"], "flash_attention_2 has no float32"),
        (["training.eval_strategy=steps"], "training.eval_strategy: 'steps' needs rows to evaluate on"),
        (["training.packing=true", "training.max_length=null"], "training.max_length: packing fills sequences"),
    ],
)  # fmt: skip
def test_conflicting_settings_are_refused_with_a_remedy(overrides, expected):
    assert expected in problem(MINIMAL, *overrides)


def test_settings_that_only_look_odd_are_taken():
    run = load(MINIMAL, "adapter.dropout=0.1", "eval.before=true", "eval.tasks=[]", "adapter.target_modules=all-linear")
    assert run.adapter.options["dropout"] == 0.1
    assert load(MINIMAL, "adapter.target_modules=.*_proj").adapter.options["target_modules"] == ".*_proj"


# Sources


def test_sources_take_exactly_the_formats_and_fields_that_the_data_code_reads():
    formats = get_args(config.SourceSection.model_fields["format"].annotation)
    assert set(formats) == set(FORMATS)
    readable = set(inspect.signature(load_rows).parameters) - {"default_split"}
    assert set(config.SourceSection.model_fields) == readable | {"format"}


def test_a_plain_string_is_the_path_of_a_source():
    run = load(MINIMAL, "data.train=[piqa, {path: piqa}]")
    assert run.data.train[0] == run.data.train[1]
    assert "- path: piqa\n    format: auto\n" in config.dump_yaml(run)


# --set


def test_overrides_set_values_of_every_shape():
    run = load(
        MINIMAL,
        "training.learning_rate=1e-3",
        "training.save_strategy=no",
        "training.report_to=[tensorboard, wandb]",
        "training.run_name=a=b",
        "data.train=[piqa, {path: x, limit: 3}]",
        "data.train.0.limit=10",
        "data.train.-1.split=test",
        "adapter.rank_pattern.q_proj=4",
        "adapter.alpha_pattern={layers.0.q_proj: 8.5}",
        "eval.limit=5",
    )
    assert run.training["learning_rate"] == 1e-3
    assert run.training["save_strategy"] == "no"
    assert run.training["report_to"] == ["tensorboard", "wandb"]
    assert run.training["run_name"] == "a=b"
    assert [(s.path, s.limit, s.split) for s in run.data.train] == [("piqa", 10, None), ("x", 3, "test")]
    assert run.adapter.options["rank_pattern"] == {"q_proj": 4}
    assert run.adapter.options["alpha_pattern"] == {"layers.0.q_proj": 8.5}
    assert run.eval.limit == 5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lr", "expected section.name=value"),
        ("=1", "expected section.name=value"),
        ("a..b=1", "expected section.name=value"),
        ("training.learing_rate=1", "=1: unknown key; did you mean 'learning_rate'?"),
        ("model.quantisation=nf4", "--set model.quantisation=nf4: unknown key; did you mean 'quantization'?"),
        ("trainig.learning_rate=1", "trainig: unknown key; did you mean 'training'"),
        ("model.name.x=1", "model.name is 'some/model', which has nothing named 'x' in it"),
        ("data.train.3.limit=1", "data.train is a list; expected an index from 0 to 0, got '3'"),
        ("data.train.first.limit=1", "expected an index from 0 to 0, got 'first'"),
        ("training.x=[1", "not valid YAML"),
        ("data.validation.0=piqa", "data.validation: expected list"),
    ],
)
def test_a_wrong_override_is_shown_with_what_is_wrong(override, expected):
    message = problem(MINIMAL, override)
    assert message.startswith(f"--set {override}")
    assert expected in message


# The resolved run and the schema


def test_a_resolved_run_says_every_value_that_a_method_derives():
    for method in adapters.method_names():
        model = {"name": "x", "quantization": "none"}  # which every method takes
        run = config.run_from_dict({"model": model, "adapter": {"method": method}, "data": {"train": ["a"]}})
        if method not in ("vera", "tinylora"):  # which have no such factor
            assert isinstance(run.adapter.options["alpha"], float | int)
        assert run.adapter.options["rank"] >= 1
        adapters.peft_config(method, run.adapter.options)


def test_a_run_from_a_dictionary_names_where_it_came_from():
    with pytest.raises(UserError, match=r"^the sweep: model\.nme: unknown key; did you mean 'name'"):
        config.run_from_dict(
            {"model": {"name": "x", "nme": 1}, "adapter": {"method": "lsr"}, "data": {"train": ["a"]}}, "the sweep"
        )


def test_the_schema_lists_every_section_method_and_field_with_a_description():
    schema = json.loads(json.dumps(config.json_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == {"model", "adapter", "data", "training", "deepspeed", "eval", "sweep"}
    assert set(schema["required"]) == {"model", "adapter", "data"}
    methods = schema["properties"]["adapter"]["discriminator"]["mapping"]
    assert set(methods) == set(adapters.method_names())
    training = schema["properties"]["training"]
    assert training["additionalProperties"] is False
    assert training["properties"]["learning_rate"]["default"] == training_fields.DEFAULTS["learning_rate"]
    assert not set(training_fields.OWNED) & set(training["properties"])
    seen = []

    def walk(node):
        if isinstance(node, dict):
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
            for name, value in (node.get("properties") or {}).items():
                seen.append(name)
                assert "$ref" in value or value.get("description"), f"{name} has no description"
            assert node.get("type", "object") in {
                "object",
                "array",
                "string",
                "number",
                "integer",
                "boolean",
                "null",
            } or isinstance(node["type"], dict)
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(schema)
    assert {"rank", "separation_rank", "left_in", "batch_tokens", "quantization"} <= set(seen)
