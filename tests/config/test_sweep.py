"""The `sweep:` section: which trials it has, what they are called, and what is refused, with the line it stands on."""

import pytest

from lsr_scale.cli import main
from lsr_scale.config.run import with_overrides
from lsr_scale.config.sweep import SweepSection, changes_of
from lsr_scale.config.trials import is_sweep, read_sweep, sweep_from_dict, trials_of
from lsr_scale.errors import UserError
from tests.helpers.run_text import CONFIGS, MINIMAL

SEEDS = "grid: {training.seed: [1, 2]}"


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a sweep from the text of its section, below MINIMAL's six lines or another run."""

    def read(section, run=MINIMAL, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(f"{run}sweep:\n  {section}\n", encoding="utf-8")
        return read_sweep(path, overrides)

    return read


@pytest.fixture
def problem(read, tmp_path):
    """Return a function that reads a sweep that must fail, and returns the message."""

    def problem(section, run=MINIMAL):
        with pytest.raises(UserError) as caught:
            read(section, run)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return problem


# Which trials there are


def test_a_grid_is_the_product_of_its_values(read):
    trials = read("grid: {training.learning_rate: [1e-3, 0.002], adapter.rank: [4, 8]}").trials
    assert [trial.name for trial in trials] == [
        "lr=0.001,rank=4",
        "lr=0.001,rank=8",
        "lr=0.002,rank=4",
        "lr=0.002,rank=8",
    ]
    assert [(trial.run.training["learning_rate"], trial.run.adapter.options["rank"]) for trial in trials] == [
        (1e-3, 4),
        (1e-3, 8),
        (2e-3, 4),
        (2e-3, 8),
    ]


def test_a_list_has_a_mapping_a_trial_and_needs_no_data_of_its_own_in_the_run(read):
    run = "model: {name: some/model}\nadapter: {method: lsr}\n"
    sweep = read("list: [{name: alice, data.train: [a.jsonl]}, {name: bob, data.train: [b.jsonl, c.jsonl]}]", run)
    assert {trial.name: [source.path for source in trial.run.data.train] for trial in sweep.trials} == {
        "alice": ["a.jsonl"],
        "bob": ["b.jsonl", "c.jsonl"],
    }
    assert sweep.base is None


def test_a_trial_may_be_the_run_as_it_is(read):
    first, second = read("list: [{name: plain}, {adapter.rank: 8}]").trials
    assert (first.name, first.changes, first.run.adapter.options["rank"]) == ("plain", {}, 16)
    assert (second.name, second.run.adapter.options["rank"]) == ("rank=8", 8)


def test_a_list_and_a_grid_are_combined(read):
    names = [trial.name for trial in read(f"list: [{{name: a}}, {{adapter.rank: 8}}]\n  {SEEDS}").trials]
    assert names == ["a,seed=1", "a,seed=2", "rank=8,seed=1", "rank=8,seed=2"]


def test_draws_are_the_seeds_within_their_bounds_and_differ(read):
    values = "{training.learning_rate: {log_uniform: [1e-4, 1e-2]}, training.seed: {integers: [1, 3]}, "
    values += "training.weight_decay: {uniform: [0, 0.1]}, adapter.rank: [4, 8]}"
    first, again, other = (
        [trial.changes for trial in read(f"random: {{trials: 20, seed: {seed}, values: {values}}}").trials]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len({str(changes) for changes in first}) == 20
    for changes in first:
        assert 1e-4 <= changes["training.learning_rate"] <= 1e-2
        assert changes["training.seed"] in (1, 2, 3)
        assert 0 <= changes["training.weight_decay"] <= 0.1
        assert changes["adapter.rank"] in (4, 8)


def test_a_key_may_name_a_whole_section_and_replaces_it(read):
    trials = read("list: [{adapter: {method: lora, rank: 8}}, {adapter.rank: 4, adapter: {method: kron_lora}}]").trials
    assert [(trial.run.adapter.method, trial.run.adapter.options["rank"]) for trial in trials] == [
        ("lora", 8),
        ("kron_lora", 4),
    ]
    assert trials[0].name == "adapter=lora-rank-8"


def test_what_follows_from_a_trials_own_values_is_its_own(read):
    run = MINIMAL + "training: {save_steps: 5}\n"
    section = "list: [{training.seed: 1}, {training.early_stopping: {patience: 2}, data.validation_split: 0.1}]"
    plain, stops = (trial.run.training for trial in read(section, run).trials)
    assert (plain["eval_strategy"], stops["eval_strategy"], stops["eval_steps"]) == ("no", "steps", 5)


def test_set_changes_the_section_and_the_run(read):
    sweep = read(SEEDS, MINIMAL, "sweep.together=4", "adapter.rank=3")
    assert (sweep.section.together, sweep.trials[1].run.adapter.options["rank"]) == (4, 3)


def test_set_names_what_a_grid_or_a_list_changes_as_the_run_does(read):
    named = "sweep.grid.training.learning_rate=[1e-3, 2e-3]", "sweep.grid.adapter.rank=[2]"
    sweep = read("grid: {training.learning_rate: [5e-4]}", MINIMAL, *named)
    assert [trial.changes for trial in sweep.trials] == [
        {"training.learning_rate": rate, "adapter.rank": 2} for rate in (1e-3, 2e-3)
    ]
    sweep = read("list: [{name: a, training.seed: 1}]", MINIMAL, "sweep.list.0.training.seed=7")
    assert [trial.changes for trial in sweep.trials] == [{"training.seed": 7}]
    with pytest.raises(UserError) as caught:
        read(SEEDS, MINIMAL, "sweep.grid.model=[a, b]")
    assert str(caught.value).count("share one base") == 1
    overridden = with_overrides({"sweep": {}}, {"sweep.grid.training.seed": [1, 2]})
    assert overridden == {"sweep": {"grid": {"training.seed": [1, 2]}}}


def test_trials_of_a_run_in_python():
    section = SweepSection.model_validate({"grid": {"adapter.rank": [4, 8]}})
    sections = {"model": {"name": "some/model"}, "adapter": {"method": "lsr"}, "data": {"train": ["arc_easy"]}}
    run = sweep_from_dict({**sections, "sweep": {"list": [{"training.seed": 3}]}}).trials[0].run
    assert [(trial.name, trial.run.training["seed"]) for trial in trials_of(run, section)] == [
        ("rank=4", 3),
        ("rank=8", 3),
    ]


# Names


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"training.learning_rate": 1e-3}, "lr=0.001"),
        ({"training.learning_rate": 1e-05}, "lr=1e-05"),
        ({"data.train": ["some/folder/alice.jsonl"]}, "train=alice"),
        ({"data.train": [{"path": "arc_easy", "limit": 5}]}, "train=arc_easy"),
        ({"training.packing": True, "training.max_grad_norm": None}, "packing=true,max_grad_norm=null"),
        ({"adapter.target_modules": r".*\.q_proj"}, "target_modules=._.q_proj"),
        ({"model_.a": 1, "b.a": 2}, "model_.a=1,b.a=2"),
        ({"training.x": "../../etc"}, "x=etc"),
        ({"training.x": "x" * 200}, f"x={'x' * 78}"),
        ({"training.x": "Zoë 数据"}, "x=Zoë_数据"),
    ],
)
def test_names_are_short_and_safe(changes, name):
    assert list(changes_of(SweepSection.model_validate({"list": [changes]}))) == [name]


def test_names_that_would_be_equal_or_differ_in_case_alone_are_numbered():
    values = ["a b", "a_b", "A-b", "a-b"]
    assert list(changes_of(SweepSection.model_validate({"grid": {"training.run_name": values}}))) == [
        "run_name=a_b",
        "run_name=a_b-2",
        "run_name=A-b",
        "run_name=a-b-2",
    ]


# What is refused


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{}", "run.yaml:7: sweep: names no trials; add grid:"),
        ("gird: {}", "run.yaml:8: sweep.gird: unknown key; did you mean 'grid'?"),
        ("grid: {training.seed: []}", "sweep.grid.training.seed: expected a list with at least 1 entry, got []"),
        (
            "grid: {training.seed: 3}",
            "sweep.grid.training.seed: expected list, got 3; write a list of values, ",
        ),
        ("grid: {training.sed: [1]}", "trial sed=1: run.yaml:8: training.sed: unknown key; did you mean 'seed'?"),
        ("grid: {lr: [1]}", "trial lr=1: run.yaml:8: lr: unknown key; here it is training.learning_rate"),
        ("grid: {training.seed: [1, x]}", "trial seed=x: run.yaml:8: training.seed: expected int, got 'x'"),
        (
            "grid: {adapter.method.x: [1]}",
            "trial x=1: run.yaml:8: adapter.method is 'lsr', which has nothing named 'x'",
        ),
        ("grid: {model.name: [a, b]}", "sweep.grid.model.name: the trials of a sweep share one base"),
        ("grid: {model: [{name: a}]}", "sweep.grid.model: the trials of a sweep share one base"),
        ("list: [{deepspeed.config: zero1}]", "sweep.list.0.deepspeed.config: a trial is trained by one process"),
        ("list: [{training.output_dir: a}]", "sweep.list.0.training.output_dir: a trial's folder is trials/NAME"),
        ("list: [{name: a/b, training.seed: 1}]", "sweep.list.0.name: expected a folder's name of letters, digits"),
        ("list: [{name: 3, training.seed: 1}]", "up to 80, got 3; put it in quotes: '3'"),
        (
            "grid: {training: {seed: [1, 2]}}",
            "sweep.grid.training: expected list, got {'seed': [1, 2]}; write dotted keys: training.seed: [...]",
        ),
        (
            "list: [{name: a, adapter: {rank: 8}}]",
            "; a section of a trial stands in place of the run's whole one: for a key of it write adapter.rank: ...",
        ),
        (
            "list: [{name: A, training.seed: 1}, {name: a, training.seed: 2}]",
            "sweep.list.1.name: is the name of entry 0",
        ),
        ("list: [{name: a}, {name: b}]", "sweep: two trials are equal: a; remove one"),
        ("grid: {training.seed: [1, 1]}", "run.yaml:7: sweep: two trials are equal: seed=1 (training.seed: 1)"),
        ("list: [{training.seed: 42}, {adapter.rank: 16}]", "sweep: the trials seed=42 and rank=16 are one run"),
        (f"{SEEDS}\n  list: [{{training.seed: 1}}]", "sweep.list: training.seed is in grid too; keep one of them"),
        (
            f"{SEEDS}\n  stop: {{patience: 3}}",
            "sweep.stop.patience: unknown key; here it is training.early_stopping",
        ),
        (f"{SEEDS}\n  together: 0", "sweep.together: expected 'auto' or a number >= 1, got 0"),
        ("random: {trials: 3, values: {training.seed: [1, 2]}}", "random: trials: is 3, but only 2 that differ"),
        ("random: {trials: 1, values: {training.seed: {logs: [1, 2]}}}", "training.seed.logs: unknown key"),
        ("random: {trials: 1, values: {training.seed: {}}}", "training.seed: expected one of log_uniform, uniform"),
        (
            "random: {trials: 1, values: {training.seed: {uniform: [2, 1]}}}",
            "uniform: expected [least, most], got [2.0",
        ),
        (
            "random: {trials: 1, values: {training.seed: {log_uniform: [0, 1]}}}",
            "log_uniform: expected numbers above 0",
        ),
        (
            f"grid: {{training.seed: [1, 2, 3], training.warmup_steps: {list(range(700))}}}",
            "has 2,100 trials; expected",
        ),
        (
            f"{SEEDS}\n  stop: {{}}",
            "run.yaml:9: trial seed=1: sweep.stop compares evaluations, and the run has no rows for them; add",
        ),
        (
            f"{SEEDS}\n  stop: {{metric: eval_los}}",
            "run.yaml:9: sweep.stop.metric: 'eval_los': did you mean 'eval_los",
        ),
        (f"{SEEDS}\n  stop: {{metric: eval_accuracy}}", "sweep.stop.metric: 'eval_accuracy': this run's are eval_loss"),
    ],
)
def test_mistakes_are_named_where_they_stand(problem, section, message):
    assert message in problem(section)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("max_length", [64, 128]),
        ("per_device_train_batch_size", [4, 8]),
        ("gradient_accumulation_steps", [1, 2]),
        ("packing", [True, False]),
        ("compute", ["bf16", "fp8"]),
    ],
)
def test_what_trials_must_agree_in_is_named_with_both_values(problem, key, values):
    found = problem(f"grid: {{training.{key}: {str(values).lower()}}}")
    first, second = (repr(value) for value in values)
    assert f"run.yaml:8: sweep: training.{key} has to be the same in all trials" in found
    assert f"it is {first} in " in found
    assert f" and {second} in " in found
    other = "" if key == "compute" else ", or set sweep.together: 1"
    assert found.endswith(f"make a sweep of its own for each, with --set training.{key}=...{other}")


@pytest.mark.parametrize(
    ("training", "section"),
    [
        ("method: dpo", "grid: {training.loss_type: [[sigmoid], [ipo]], training.per_device_train_batch_size: [2, 4]}"),
        (
            "method: grpo, reward: [exact_answer]",
            "grid: {training.gradient_accumulation_steps: [2, 4], training.loss_type: [grpo, dapo]}",
        ),
        ("max_length: 64", "together: 1\n  grid: {training.max_length: [64, 128], training.packing: [true, false]}"),
    ],
)
def test_trials_that_share_no_step_may_differ_in_what_a_step_has_in_common(problem, read, training, section):
    run = f"{MINIMAL}training: {{{training}}}\n"
    assert len(read(section, run).trials) == 4
    compute = section.replace("grid: {", "grid: {training.memory: [speed, save], ")
    found = problem(compute, run)
    assert "training.memory has to be the same in all trials, as they are trained on one base: it is 'speed'" in found
    assert "sweep.together" not in found


def test_classifiers_may_differ_in_the_rows_a_step(read):
    run = MINIMAL.replace("some/model", "some/model\n  task: seq_cls\n  num_labels: 2")
    assert len(read("grid: {training.per_device_train_batch_size: [4, 8]}", run).trials) == 2


def test_losses_of_other_types_are_not_defined_alike(read):
    (note,) = read("grid: {training.loss_type: [[sigmoid], [ipo]]}", f"{MINIMAL}training: {{method: dpo}}\n").notes()
    assert note.startswith("trials differ in training.loss_type, so their losses are not defined alike")


def test_seeds_agree_where_they_draw_the_base(problem, read):
    random_base = MINIMAL.replace("some/model", "some/model\n  random_weights: true")
    assert "training.seed has to be the same in all trials, as the base's weights are drawn by it" in problem(
        SEEDS, random_base
    )
    assert len(read(SEEDS).trials) == 2


def test_stages_that_shard_the_base_are_refused(problem, read):
    assert "deepspeed.config: ZeRO-3 shards the base over processes" in problem(
        SEEDS, MINIMAL + "deepspeed: {config: zero3}\n"
    )
    assert len(read(SEEDS, MINIMAL + "deepspeed: {config: zero1}\n").trials) == 2


def test_a_trial_of_another_method_is_told_to_have_a_section_of_its_own(problem, read):
    run = MINIMAL.replace("method: lsr", "method: lsr\n  separation_rank: 4")
    found = problem("grid: {adapter.method: [lsr, lora]}", run)
    assert found.startswith("trial method=lora: run.yaml:5: adapter.separation_rank: unknown key; ")
    section = "adapter: {method: lora, rank: 8}"
    assert f"change the section in place of the method alone, {section}, in grid a list of such" in found
    name, _, value = section.partition(": ")
    assert [
        trial.run.adapter.method for trial in read(f"grid: {{{name}: [{value}, {{method: lsr}}]}}", run).trials
    ] == [
        "lora",
        "lsr",
    ]


def test_a_mistake_of_the_run_itself_is_no_trials(problem):
    assert problem(SEEDS, MINIMAL + "training: {epochs: 3}\n").startswith("run.yaml:7: training.epochs: unknown key")


def test_a_run_without_the_section_is_no_sweep(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    assert not is_sweep(path)
    assert is_sweep(path, ["sweep.grid={training.seed: [1]}"])
    with pytest.raises(UserError, match=r"has no section sweep; add one, such as .*; or train the one run"):
        read_sweep(path)
    path.write_text(MINIMAL + "sweeps: {grid: {training.seed: [1]}}\n")
    with pytest.raises(UserError, match=r"run\.yaml:7: sweeps: unknown key; did you mean 'sweep'\?"):
        read_sweep(path)


@pytest.mark.parametrize(
    ("addition", "metric"),
    [
        ("", "final_loss"),
        ("eval: {tasks: [arc_easy]}\n", "accuracy"),
        ("training: {early_stopping: {}}\n", "eval_loss"),
    ],
)
def test_what_trials_are_compared_by(read, addition, metric):
    run = (
        MINIMAL.replace("train: [arc_easy]", "train: [arc_easy]\n  validation_split: 0.1")
        if "early" in addition
        else MINIMAL
    )
    assert read(SEEDS, run + addition).scored_by() == metric


HELD_OUT = MINIMAL.replace("train: [arc_easy]", "train: [arc_easy]\n  validation_split: 0.1")
REWARD = "reward: [exact_answer]"


@pytest.mark.parametrize(
    ("run", "training", "section", "metric"),
    [
        (HELD_OUT, f"method: grpo, {REWARD}", SEEDS, "eval_reward"),
        (MINIMAL, f"method: grpo, {REWARD}", SEEDS, "final_reward"),
        (HELD_OUT, f"method: grpo, {REWARD}", f"{SEEDS}\n  stop: {{}}", "eval_reward"),
        (HELD_OUT, "eval_strategy: 'no'", SEEDS, "final_loss"),
        (HELD_OUT, "method: dpo", SEEDS, "eval_loss"),
        (HELD_OUT, "method: dpo", "grid: {training.beta: [0.1, 0.5]}", "eval_rewards/accuracies"),
        (HELD_OUT, "method: dpo", "list: [{training.beta: 0.1}, {training.beta: 0.2}]", "eval_rewards/accuracies"),
        (HELD_OUT, "method: orpo", "grid: {training.beta: [0.1, 0.5]}\n  stop: {}", "eval_rewards/accuracies"),
        (HELD_OUT, "max_steps: 5", "grid: {training.method: [dpo, orpo]}", "eval_rewards/accuracies"),
        (HELD_OUT, "method: dpo", "grid: {training.beta: [0.1, 0.5]}\n  stop: {metric: eval_entropy}", "eval_entropy"),
        (HELD_OUT, "method: kto", "grid: {training.beta: [0.1, 0.5]}", "eval_loss"),
    ],
)
def test_what_trials_of_a_method_are_compared_by(read, run, training, section, metric):
    assert read(section, f"{run}training: {{{training}}}\n").scored_by() == metric


@pytest.mark.parametrize(
    ("run", "training", "section", "words"),
    [
        (
            HELD_OUT,
            "method: dpo",
            "grid: {training.beta: [0.1, 0.5]}",
            "training.beta, so their losses are not def",
        ),
        (
            MINIMAL,
            "method: dpo",
            "grid: {training.beta: [0.1, 0.5]}",
            "data.validation_split: 0.05 with training.eval_strategy: steps has them compar",
        ),
        (
            HELD_OUT,
            "method: dpo, eval_strategy: 'no'",
            "grid: {training.beta: [0.1, 0.5]}",
            "by training loss means little; training.eval_strategy: steps has them compared by the share of pairs in",
        ),
        (
            HELD_OUT.replace("model:\n", "model:\n  task: seq_cls\n  num_labels: 2\n"),
            "seed: 1",
            "grid: {training.label_smoothing_factor: [0, 0.1]}",
            "by eval loss means little; judge them by eval accuracy",
        ),
        (
            HELD_OUT,
            "method: kto",
            "grid: {training.beta: [0.1, 0.5]}",
            "by eval loss means little; judge them by ev",
        ),
        (HELD_OUT, "method: dpo", "grid: {training.method: [dpo, orpo]}", "trials differ in training.method"),
        (
            HELD_OUT,
            f"method: grpo, {REWARD}",
            "grid: {training.reward: [[exact_answer], [length]]}",
            "training.reward, so their rewards are not defined alike, and their order by eval reward means little",
        ),
        (HELD_OUT, "seed: 1", "grid: {data.train: [[a.jsonl], [b.jsonl]]}", "trials have different held-out rows, so"),
        (MINIMAL, "seed: 1", "grid: {data.train: [[a.jsonl], [b.jsonl]]}", "trials have different training rows, so"),
        (MINIMAL, "seed: 1", "grid: {eval.tasks: [[arc_easy], [boolq]]}", "trials have different eval.tasks, so"),
    ],
)
def test_scores_that_are_not_of_one_kind_are_noted(read, run, training, section, words, tmp_path, capsys):
    (note,) = read(section, f"{run}training: {{{training}}}\n").notes()
    assert words in note
    assert main(["config", str(tmp_path / "run.yaml")]) == 0
    assert f"# note: {note}\n" in capsys.readouterr().out


def test_scores_of_one_kind_have_no_note(read):
    assert read(SEEDS, HELD_OUT).notes() == []
    same_rows = MINIMAL.replace("train: [arc_easy]", "train: [arc_easy]\n  validation: [held.jsonl]")
    assert read("grid: {data.train: [[a.jsonl], [b.jsonl]]}\n  stop: {}", same_rows).notes() == []
    assert read("grid: {training.beta: [0.1, 0.5]}", f"{MINIMAL}training: {{method: grpo, {REWARD}}}\n").notes() == []


def test_trials_of_different_held_out_rows_are_not_stopped_by_them(problem):
    found = problem("list: [{name: a, data.train: [a.jsonl]}, {name: b, data.train: [b.jsonl]}]\n  stop: {}", HELD_OUT)
    assert found.startswith("run.yaml:10: sweep.stop: trials are evaluated on different rows (those of a and of b), so")
    assert "training.early_stopping: {patience: 3} ends each" in found


def test_the_advice_to_have_tasks_is_not_given_to_who_has_them(read):
    run = f"{HELD_OUT}training: {{method: kto}}\neval: {{tasks: [boolq]}}\n"
    (note,) = read("grid: {training.beta: [0.1, 0.5]}", run).notes()
    assert note.endswith("and their order by eval loss means little")


@pytest.mark.parametrize(
    ("training", "section", "words"),
    [
        ("method: kto", "grid: {training.beta: [0.1, 0.5]}\n  stop: {}", "training.beta, so their eval_loss is not"),
        (
            "seed: 1",
            "grid: {training.label_smoothing_factor: [0, 0.1]}\n  stop: {}",
            "own for each value, or remove it",
        ),
        (
            "method: dpo",
            "grid: {training.beta: [0.1, 0.5]}\n  stop: {metric: eval_loss}",
            "worst; set sweep.stop.metric: eval_rewards/accuracies, or remove it",
        ),
        (
            "method: dpo",
            "grid: {training.beta: [0.1, 0.5]}\n  stop: {metric: eval_rewards/margins}",
            "so their eval_rewards/margins is not defined alike",
        ),
        (
            f"method: grpo, {REWARD}",
            "grid: {training.reward: [[exact_answer], [length]]}\n  stop: {}",
            "training.reward, so their eval_reward is not defined alike",
        ),
    ],
)
def test_trials_whose_scores_are_not_defined_alike_are_not_stopped_by_them(problem, training, section, words):
    found = problem(section, f"{HELD_OUT}training: {{{training}}}\n")
    assert ": sweep.stop: trials differ in " in found
    assert words in found


@pytest.mark.parametrize("methods", [["sft", "dpo"], ["dpo", "grpo"]])
def test_methods_that_cannot_share_a_sweep_are_named_themselves(problem, methods):
    section = f"list: [{', '.join(f'{{training.method: {method}}}' for method in methods)}]"
    found = problem(section.replace("grpo}", f"grpo, training.{REWARD}}}"))
    first, second = map(repr, methods)
    assert found.startswith("run.yaml:8: sweep: training.method has to be the same in all trials, as these two take")
    assert f"it is {first} in method={methods[0]} and {second} in method={methods[1]}" in found


def test_rungs_go_on_to_the_end_of_a_trial():
    section = SweepSection.model_validate({"list": [{"training.seed": 1}], "stop": {"after": 0.2, "keep": 0.5}})
    assert section.stop is not None
    assert section.stop.rungs() == [0.2, 0.4, 0.8]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_sweep.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path):
    assert len(read_sweep(path).trials) > 1
    assert path.read_text().startswith("# ")


# What the commands make of one


def test_config_prints_a_sweep_that_is_the_same(tmp_path, capsys):
    assert main(["config", "smollm2_sweep"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(shown)
    first, again = read_sweep("smollm2_sweep"), read_sweep(tmp_path / "again.yaml")
    assert [(one.name, one.run) for one in again.trials] == [(one.name, one.run) for one in first.trials]
    assert again.section == first.section
    assert "# 4 trials, compared by eval_loss" in shown
    assert main(["config", "smollm2_sweep", "--all"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert read_sweep(tmp_path / "again.yaml").section == first.section


@pytest.mark.parametrize(
    ("run", "section"),
    [
        ("training: {learning_rate: 1e-3}\n", "grid: {training.method: [dpo, orpo]}"),
        ("training: {learning_rate: 1e-4, method: dpo}\n", "list: [{training.seed: 1}, {training.method: orpo}]"),
        ("", "grid: {training.method: [dpo, orpo]}"),
        ("", "grid: {adapter.rank: [4, 8]}"),
        ("", "grid: {adapter: [{method: lora, rank: 4}, {method: lsr, rank: 4}]}"),
        ("", "grid: {adapter.method: [lora, lsr]}"),
        ("", "list: [{training.seed: 1}, {training.early_stopping: {}, data.validation_split: 0.1}]"),
        ("", f"list: [{{training.seed: 1, training.method: grpo, training.{REWARD}}}]"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--all"]])
def test_config_prints_a_sweep_of_equal_trials(read, tmp_path, capsys, run, section, options):
    first = read(section, MINIMAL + run)
    assert main(["config", str(tmp_path / "run.yaml"), *options]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    again = read_sweep(tmp_path / "again.yaml")
    assert [(one.name, one.run) for one in again.trials] == [(one.name, one.run) for one in first.trials]


def test_config_prints_a_sweep_whose_run_is_none_without_its_trials(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: some/model}\nadapter: {method: lsr}\nsweep: {list: [{data.train: [a.jsonl]}]}\n")
    assert main(["config", str(file)]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert read_sweep(tmp_path / "again.yaml").trials[0].run == read_sweep(file).trials[0].run


TENANTS = """model: {name: builtin:smollm2-135m-instruct}
adapter: {method: lsr}
sweep:
  list:
  - {name: alice, data.train: [alice.jsonl]}
  - {name: bob, data.train: [bob.jsonl]}
  - {name: carol, data.train: [carl.jsonl]}
"""


@pytest.fixture
def tenants(tmp_path, monkeypatch):
    """Return the file of a sweep of three tenants; of the last one's rows the file is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice.jsonl").write_text('{"text": "a kettle boils water"}\n')
    (tmp_path / "bob.jsonl").write_text('{"text": "a broom sweeps floors"}\n')
    (tmp_path / "run.yaml").write_text(TENANTS)
    return "run.yaml"


MISSING = "run.yaml:7: trial carol: data.train: data source 'carl.jsonl': no such file or folder"


def test_rows_that_are_not_there_are_named_before_anything_is_loaded(tenants, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("lsr_scale.sweeping.bases.load_base_for", None)
    assert main(["sweep", tenants]) == 2
    assert capsys.readouterr().err.startswith(f"\nlsr-scale: {MISSING}")
    assert not (tmp_path / "runs" / "run-sweep").exists()


@pytest.mark.parametrize("command", [["config"], ["preview"]])
def test_rows_of_a_trial_that_are_not_there_are_noted(tenants, command, capsys):
    assert main([*command, tenants]) == 0
    assert f"note: {MISSING}" in capsys.readouterr().err


def test_rows_of_a_run_that_are_not_there_are_noted_by_config(tenants, tmp_path, capsys):
    (tmp_path / "one.yaml").write_text(MINIMAL.replace("arc_easy", "alise.jsonl"))
    assert main(["config", "one.yaml"]) == 0
    said = capsys.readouterr().err
    assert said == (
        "note: one.yaml: data.train: data source 'alise.jsonl': no such file or folder; did you mean 'alice.jsonl'?\n"
    )


PATHS = {
    "model.name": ("~/models/llama", "'~/models/llama': no such file or folder"),
    "model.chat_template": ("$TEMPLATES/a.jinja", "'$TEMPLATES/a.jinja': '$TEMPLATES' stands there as it is"),
    "adapter.start_from": ("runs/first", "'runs/first': no such file or folder; "),
    "eval.prompts": ("alice.txt", "'alice.txt': no such file or folder; did you mean 'alice.jsonl'?"),
    "training.output_dir": (
        "${HOME}/run",
        "'${HOME}/run': '${HOME}' stands there as it is: only a shell fills in variables",
    ),
}


def test_other_paths_of_a_run_that_are_not_there_are_noted_by_config(tenants, tmp_path, capsys):
    (tmp_path / "one.yaml").write_text(MINIMAL)
    changes = [word for key, (value, _) in PATHS.items() for word in ("--set", f"{key}={value}")]
    assert main(["config", "one.yaml", *changes]) == 0
    said = capsys.readouterr().err
    for key, (_, words) in PATHS.items():
        assert f"note: one.yaml: {key}: {words}" in said


@pytest.mark.parametrize("key", ["adapter.start_from", "eval.prompts"])
def test_other_paths_of_a_trial_that_are_not_there_are_named_before_anything_is_loaded(
    tenants, key, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr("lsr_scale.sweeping.bases.load_base_for", None)
    value, words = PATHS[key]
    (tmp_path / "run.yaml").write_text(TENANTS.replace("carl.jsonl]", f"bob.jsonl], {key}: {value}"))
    assert main(["sweep", tenants]) == 2
    assert f"run.yaml:7: trial carol: {key}: {words}" in capsys.readouterr().err


def test_preview_shows_the_trial_that_is_named(tenants, capsys):
    assert main(["preview", tenants, "--trial", "bob"]) == 0
    shown = capsys.readouterr()
    assert "a broom sweeps floors" in shown.out
    assert "kettle" not in shown.out
    assert "note: the first" not in shown.err
    assert main(["preview", tenants, "--trial", "bop"]) == 2
    assert "run.yaml: no trial is called 'bop'; did you mean 'bob'?" in capsys.readouterr().err
    assert main(["preview", "smollm2_chat", "--trial", "bob"]) == 2
    assert "has no section sweep, so it is one run; leave it out" in capsys.readouterr().err


def test_preview_shows_the_first_trial(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a kettle boils water"}\n')
    file = tmp_path / "run.yaml"
    rows = f"list: [{{name: alice, data.train: ['{tmp_path}/a.jsonl']}}]"
    file.write_text(f"model: {{name: builtin:smollm2-135m-instruct}}\nadapter: {{method: lsr}}\nsweep: {{{rows}}}\n")
    assert main(["preview", str(file)]) == 0
    shown = capsys.readouterr()
    assert "note: the first of 1 trial: alice" in shown.err
    assert "a kettle boils water" in shown.out
