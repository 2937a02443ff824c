"""README, GUIDE.md and the pages of results say what the committed measurements say."""

import hashlib
import importlib.util
import json
import pickle
import re

import pytest

from benchmarks import ALL_RESULTS, ROOT
from benchmarks.command_line import current
from benchmarks.quality import fp8_accuracy
from benchmarks.report import (
    commonsense_tables,
    eight_bit,
    leaderboard,
    markdown,
    measurements,
    pages,
    plots,
    readme,
    real_training,
    results_page,
)
from benchmarks.speed import real_training as speed_real_training
from benchmarks.speed.providers import PROVIDERS
from tests.helpers import grpo_trials
from tests.helpers.frontier_trials import made_up, write

THROUGHPUT = ALL_RESULTS / "throughput"


@pytest.fixture(autouse=True, scope="module")
def _comparisons_made_once():
    """Resample what is compared once for all pages of all tests: equal arguments have the same result."""

    def once(function):
        made = {}

        def call(*arguments):
            key = hashlib.sha256(pickle.dumps(arguments)).digest()
            if key not in made:
                made[key] = function(*arguments)
            return made[key]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((commonsense_tables, "compare"), (fp8_accuracy, "resampled")):
            patch.setattr(module, name, once(getattr(module, name)))
        yield


def results_without(suite, folder):
    """Return a folder of all results but a suite's, whose folder is empty."""
    for path in ALL_RESULTS.iterdir():
        if path.name != suite:
            (folder / path.name).symlink_to(path)
    (folder / suite).mkdir()
    return folder


def stale(results, capsys):
    """Return what `--check` says is not up to date."""
    assert pages.main(["--check"], results) == 1
    return sorted(line.split()[0] for line in capsys.readouterr().err.splitlines())


def test_pages_and_plots_are_what_the_measurements_say(capsys):
    assert pages.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_speed_is_noticed(tmp_path, capsys):
    results = results_without("throughput", tmp_path)
    for path in THROUGHPUT.glob("mistral-7b-nf4-*.json"):
        run = json.loads(path.read_text())
        next(row for row in run["rows"] if row["status"] == "ok")["tokens_per_s"] += 100
        (results / "throughput" / path.name).write_text(json.dumps(run))
    assert stale(results, capsys) == [
        "README.md",
        "benchmarks/LEADERBOARD.md",
        "benchmarks/RESULTS.md",
        "throughput/mistral-7b-nf4-sweep-h200-2.png",
        "throughput/mistral-7b-nf4-sweep-h200.png",
        "throughput/mistral-7b-nf4.png",
    ]


def test_a_changed_loss_is_noticed(tmp_path, capsys):
    results = results_without("parametrization", tmp_path)
    for path in (ALL_RESULTS / "parametrization").glob("*.json"):
        content = json.loads(path.read_text())
        for row in content["rows"]:
            if "held_out_loss" in row:
                row["held_out_loss"] += 0.5
        (results / "parametrization" / path.name).write_text(json.dumps(content))
    plots_of_the_guide = [f"parametrization/{name}.png" for name in ("ablations", "terms", "width")]
    assert stale(results, capsys) == ["GUIDE.md", *plots_of_the_guide]


def test_reinforcement_by_size_makes_every_page_and_the_figure(tmp_path, capsys):
    results = results_without("grpo", tmp_path)
    for row in ("lora_8", "lsr_60k"):
        grpo_trials.write(results / "grpo", grpo_trials.tuned("grpo", row), grpo_trials.seeds("grpo", row, 0.3))
    assert stale(results, capsys) == [
        "GUIDE.md",
        "README.md",
        "benchmarks/RESULTS.md",
        f"grpo/{grpo_trials.SUITE.prefix}.png",
    ]
    texts = {str(path.relative_to(ROOT)): text for path, text in pages.all_pages(results).items()}
    assert "LSR-Adapt r=6 s=1, with 1.4 % of LoRA r=8's parameters, is within a point of it" in texts["README.md"]
    assert "it is within a point of LoRA r=8" in texts["GUIDE.md"]
    assert "The default rate, 1e-4, was not tuned." not in texts["GUIDE.md"]


def test_a_frontier_makes_every_page_the_figure_and_what_plan_reads(tmp_path, capsys):
    results = results_without("frontier", tmp_path)
    rows = [made_up("20k", row, shift) for row, shift in {"lora_modules": 0.0, "lsr_1_1": -0.1}.items()]
    write(results / "frontier", *rows, *(made_up("60k", row, 0.0) for row in ("lora_modules", "lsr_2_2")))
    pages_of = ["GUIDE.md", "README.md", "benchmarks/RESULTS.md"]
    names = [*pages_of, "frontier/smollm2-commonsense-nf4.png", "lsr_scale/planning/frontier.json"]
    assert stale(results, capsys) == names
    texts = {str(path.relative_to(ROOT)): text for path, text in pages.all_pages(results).items()}
    assert "| SmolLM2-135M, five commonsense tasks, base in nf4 | **LSR-Adapt** | even |" in texts["README.md"]
    assert "(benchmarks/results/frontier/smollm2-commonsense-nf4.png)" in texts["README.md"]
    assert "LSR-Adapt r=1 s=1 (20,000; 3) | LoRA r=1 on v in the last 26 layers (20,000; 3) | -0." in texts["GUIDE.md"]
    evidence = json.loads(texts["lsr_scale/planning/frontier.json"])
    assert [size["name"] for size in evidence["suites"][0]["sizes"]] == ["20k", "60k"]


COMMAND = re.compile(r"python -m (benchmarks(?:\.[a-z]\w*)+)")
WITH_COMMANDS = ("README.md", "GUIDE.md", "AGENTS.md", "CONTRIBUTING.md", "Makefile", "benchmarks/README.md")


@pytest.mark.parametrize("page", [*WITH_COMMANDS, "benchmarks/RESULTS.md", "benchmarks/LOG.md"])
def test_commands_and_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in set(COMMAND.findall(text)):
        assert importlib.util.find_spec(name) is not None, name
    for path in set(re.findall(r"benchmarks/(?:\w+/)*\w+\.py", text)):
        assert (ROOT / path).is_file(), path


def test_the_page_of_benchmarks_has_every_script():
    listed = re.findall(r"`(\w+/\w+\.py)`", (ROOT / "benchmarks/README.md").read_text(encoding="utf-8"))
    folders = [ROOT / "benchmarks" / name for name in ("speed", "quality", "robustness", "interop")]
    scripts = [path for folder in folders for path in folder.glob("*.py") if "__main__" in path.read_text()]
    assert sorted(listed) == sorted(f"{path.parent.name}/{path.name}" for path in scripts)


def test_a_command_recorded_before_the_scripts_moved_is_shown_as_it_is_typed_now():
    recorded = "python benchmarks/throughput.py --tokens 8192 --out a.json"
    assert current(recorded) == "python -m benchmarks.speed.throughput --tokens 8192 --out a.json"
    assert current(current(recorded)) == current(recorded)


def test_the_leaderboard_gives_ratios_of_one_run_with_card_commit_and_date():
    (file,) = THROUGHPUT.glob("mistral-7b-nf4-h200-2.json")
    run = json.loads(file.read_text())
    rows = {
        (row["provider"], row["checkpointing"]): row["tokens_per_s"] for row in run["rows"] if row["status"] == "ok"
    }
    ratios = [rows["lsr", "full"] / rows[peer, "full"] for peer in ("unsloth_lora", "peft_lora_liger")]
    lines = (ROOT / "benchmarks/LEADERBOARD.md").read_text().splitlines()
    line = next(line for line in lines if f"{rows['lsr', 'full']:,.0f}" in line)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:2] == ["LSR-Adapt r=16 s=16, mistral-7b, nf4", "recomputed"]
    assert cells[4:] == [*(f"{ratio:.2f}" for ratio in ratios), "H200", "`8275f84f`+", "2026-11-23"]


def test_a_readme_without_the_place_is_said():
    with pytest.raises(SystemExit, match=r"README.md has no place for throughput: put <!-- throughput"):
        markdown.with_table("nothing here", "throughput", "table")


@pytest.fixture
def run_in_8_bits():
    (headline,) = THROUGHPUT.glob("mistral-7b-nf4-h200-2.json")
    run = json.loads(headline.read_text())
    for provider in ("lsr", "lora"):
        of_bf16 = [row for row in run["rows"] if row["provider"] == provider]
        for compute, faster in (("fp8", 1.5), ("int8", 1.4)):
            more = {"provider": f"{provider}_{compute}", "compute": compute, "floor_fraction": 0.81}
            run["rows"] += [
                row | more | {"tokens_per_s": faster * row["tokens_per_s"]} for row in of_bf16 if row["status"] == "ok"
            ]
    run["floors_fp8_ms"] = {"8192x2048": {"none": {"gemm": 150.0, "traffic": 50.0, "total": 200.0}}}
    run["floors_ms"] = {"8192x2048": {"none": {"gemm": 300.0, "traffic": 100.0, "total": 400.0}}}
    run["ceilings"] = {"8192x2048": {"fp8_product": "torch._scaled_mm, a scale per row"}}
    return run


def test_speeds_in_8_bits_stand_in_every_table(run_in_8_bits):
    of = {
        (row["provider"], row["checkpointing"]): row["tokens_per_s"]
        for row in run_in_8_bits["rows"]
        if row["tokens_per_s"]
    }
    ratios = [of[ours, "none"] / of["unsloth_lora", "none"] for ours in ("lsr", "lsr_fp8", "lsr_int8")]
    lines = readme.table(run_in_8_bits).splitlines()
    assert lines[2].count("LSR over it | in FP8 | in int8") == 2
    assert lines[3].count("|") == lines[2].count("|")
    unsloth = next(line for line in lines if "Unsloth" in line)
    assert [cell.strip() for cell in unsloth.split("|")][4:7] == [f"{ratio:.2f}" for ratio in ratios]
    board = leaderboard.speed([(THROUGHPUT / "a.json", run_in_8_bits)])
    assert f"| LSR-Adapt r=16 s=16 in FP8, mistral-7b, nf4 | saved | {of['lsr_fp8', 'none']:,.0f} |" in board
    assert f"| LSR-Adapt r=16 s=16 in int8, mistral-7b, nf4 | saved | {of['lsr_int8', 'none']:,.0f} |" in board
    page = results_page.throughput(THROUGHPUT / "a.json", run_in_8_bits)
    assert "torch._scaled_mm, a scale per row" in page
    assert "| gemm | 300.0 (75%) | 150.0 (75%) |" in page
    # without FP8 the floor of int8 is the same one
    in_int8 = {key: value for key, value in run_in_8_bits.items() if key != "floors_fp8_ms"}
    in_int8["floors_int8_ms"] = run_in_8_bits["floors_fp8_ms"]
    assert results_page.floors_in_8_bits(in_int8) == results_page.floors_in_8_bits(run_in_8_bits) != []


def test_a_provider_in_8_bits_has_the_color_of_the_same_in_bf16(run_in_8_bits, tmp_path):
    assert plots.color("lsr_fp8") == plots.color("lsr_int8") == plots.color("lsr") != plots.color("lora_fp8")
    assert len({plots.marker(name) for name in ("lsr", "lsr_fp8", "lsr_int8")}) == 3
    plots.memory_plot(run_in_8_bits, tmp_path / "plot.png")
    assert plots.drawn_from(tmp_path / "plot.png") == plots.digest(run_in_8_bits)


def test_a_real_models_losses_in_8_bits_stand_beside_those_in_bf16(tmp_path):
    (file,) = (ALL_RESULTS / "real_training").glob("qwen2.5-coder-0.5b-nf4-h200.json")
    run = json.loads(file.read_text())
    assert "bf16" not in real_training.table(run)
    assert real_training.bf16_pairs(run) == {}
    row = run["rows"]["lora_graphs"]
    for name, more in (("lora_graphs_fp8", 0.0125), ("lora_graphs_int8", 0.005)):
        run["rows"][name] = row | {"losses": [loss + more for loss in row["losses"]]}
    speed_real_training.add_differences(run["rows"])
    in_fp8, in_int8 = real_training.bf16_pairs(run).values()
    assert in_fp8 == pytest.approx([0.0125] * len(row["losses"]))
    assert in_int8 == pytest.approx([0.005] * len(row["losses"]))
    lines = real_training.table(run).splitlines()
    assert next(line for line in lines if "LoRA r=16 with us in FP8" in line).endswith("| 0.0125 | +0.0125 |")
    assert next(line for line in lines if "LoRA r=16 with us in int8" in line).endswith("| 0.0050 | +0.0050 |")
    real_training.draw(run, tmp_path / "plot.png")
    assert plots.drawn_from(tmp_path / "plot.png") == real_training.digest(run)


def test_readme_says_what_8_bits_cost_and_gain(tmp_path):
    (file,) = THROUGHPUT.glob("mistral-7b-nf4-8bit-h200.json")
    run = json.loads(file.read_text())
    of = {(row["provider"], row["checkpointing"]): row for row in run["rows"]}
    text = eight_bit.newest(ALL_RESULTS)
    line = next(line for line in text.splitlines() if "LSR-Adapt** r=16 s=16 in FP8" in line)
    for mode in ("none", "full"):
        row = of["lsr_graphs_fp8", mode]
        ratio = row["tokens_per_s"] / of["unsloth_lora", mode]["tokens_per_s"]
        assert f"| {row['tokens_per_s']:,.0f} | {row['peak_memory_gib']:.1f} | {ratio:.2f} |" in line
    (file,) = (ALL_RESULTS / "real_training").glob("qwen2.5-coder-0.5b-nf4-8bit-h200.json")
    row = json.loads(file.read_text())["rows"]["lora_graphs_int8"]
    assert f"LoRA in int8: {row['loss_rms_from_bf16']:.4f}, {row['loss_mean_from_bf16_last_50']:+.4f}" in text
    assert "| smollm2-135m-instruct, LoRA | -0.38 (-0.69 to -0.05, separated) | -0.07 (-0.29 to +0.16) |" in text
    # each model's newest run; what was not measured is said
    assert text.index("mistral-7b, NF4") < text.index("llama2-7b, NF4")
    assert "| **Kron-LoRA** r=8 in FP8, its steps as CUDA graphs | 25,308 | 27.5 | 1.46 | 0.71 | not run |" in text
    (tmp_path / "throughput").mkdir()
    (tmp_path / "real_training").mkdir()
    assert eight_bit.newest(tmp_path) == ""


def test_every_provider_has_a_name_in_tables():
    assert PROVIDERS.keys() == measurements.LABELS.keys()


def test_the_headline_is_beside_both_peers():
    assert {"unsloth_lora", "peft_lora_liger"} <= set(measurements.newest_headline(THROUGHPUT)["config"]["providers"])


def test_a_sweep_has_a_plot_and_is_no_headline(tmp_path):
    (headline,) = THROUGHPUT.glob("mistral-7b-nf4-h200-2.json")
    run = json.loads(headline.read_text())
    (row,) = [r for r in run["rows"] if (r["provider"], r["checkpointing"]) == ("lsr", "none")]
    points = [[1024, 512], [1024, 1024], [8192, 512], [8192, 1024]]
    rows = [row | {"tokens": tokens, "seq_len": length} for tokens, length in points]
    sweep = run | {"rows": rows, "config": run["config"] | {"points": points}}
    sweep["env"] = run["env"] | {"date": "2999-01-01"}
    results = tmp_path / "throughput"
    results.mkdir()
    for name, content in (("mistral-7b-nf4-a.json", run), ("mistral-7b-nf4-sweep.json", sweep)):
        (results / name).write_text(json.dumps(content))
    assert measurements.newest_headline(results)["env"]["date"] == run["env"]["date"]
    plots.sweep_plot(sweep, results / "mistral-7b-nf4-sweep.png")
    assert plots.drawn_from(results / "mistral-7b-nf4-sweep.png") == plots.digest(sweep) != plots.digest(run)
    assert "mistral-7b-nf4-sweep.png" in results_page.page(tmp_path)


def test_trials_of_a_run_are_not_given_the_sizes_of_made_up_ones():
    config = {"run": "smollm2_lsr", "set": ["training.max_steps=8"], "model": "smollm2-135m", "base": "none"}
    config |= {"trials": 4, "tokens": 4096, "steps": 60, "command": "words"}
    row = {"tokens_per_s": 160.0, "seconds": 56.0, "gib": None}
    env = {"gpus": [], "cpu": "x86_64, 2 cores", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
    run = {"env": env, "config": config, "rows": {"together": row}, "ratios": {}}
    text = results_page.trial_sweeps(ALL_RESULTS / "sweep" / "one.json", run)
    assert "4 trials of `smollm2_lsr` with `training.max_steps=8`." in text
    assert "4,096" not in text
    assert "60 steps" not in text
    of_sizes = results_page.trial_sweeps(ALL_RESULTS / "sweep" / "one.json", run | {"config": config | {"run": None}})
    assert "4 trials of smollm2-135m, none, 4,096 tokens and 60 steps each." in of_sizes
