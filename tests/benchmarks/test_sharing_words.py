"""What GUIDE.md says of shared steps is what sweeps and joint steps measured, the newest first."""

import json

from benchmarks.report import sharing_plot, sharing_words
from benchmarks.report.plots import drawn_from


def sweep(folder, name, ratios, rows, **config):
    about = {"model": "smollm2-135m", "base": "none", "run": None, "trials": 8, "tokens": 4096, "seq_len": 512}
    content = {"env": {"gpus": ["NVIDIA X"] * 2, "cpu": "c, 2 cores"}, "config": {**about, "together": None, **config}}
    (folder / "sweep").mkdir(exist_ok=True)
    (folder / "sweep" / f"{name}.json").write_text(json.dumps({**content, "rows": rows, "ratios": ratios}))


def figures(tokens_per_s, seconds, gib=1.0, **more):
    return {"tokens_per_s": tokens_per_s, "seconds": seconds, "gib": gib, **more}


def test_the_newest_run_is_shown_and_earlier_ones_in_brackets(tmp_path):
    ratios = [{"steps_over_one_by_one": r, "all_over_one_by_one": 2 * r} for r in (1.3, 1.4)]
    for name, ratio, speed in (("a", ratios[0], 1000), ("a-2", ratios[1], 2000)):
        rows = {"together": figures(speed, 10), "one_by_one": figures(500, 30)}
        sweep(tmp_path, name, ratio, rows)
    sweep(
        tmp_path, "b", {"all_over_side_by_side": 0.7}, {"together": figures(1, 61), "side_by_side": figures(None, 43)}
    )
    sweep(tmp_path, "c", {}, {"together": figures(3600, 5)}, trials=16, gpus=2)
    why = "trials are trained one after the other: 1.0 ms alone; 2 are not faster"
    sweep(tmp_path, "d", {}, {"together": figures(1, 1, notes=[why, "another"])}, together="auto")
    text = sharing_words.guide(tmp_path)
    where = "SmolLM2-135M, 8 of 4,096 tokens a step, one X"
    assert f"| {where} | 2,000 tokens/s | 500 tokens/s, one after the other | 1.40 (earlier 1.30) |" in text
    assert f"| {where}, start-up included | 10 s | 30 s, one after the other | 2.80 (earlier 2.60) |" in text
    assert "| 61 s, 1 GiB | 43 s, 1 GiB, as many processes side by side | 0.70 |" in text
    assert (
        "16 of 4,096 tokens a step, two X | 3,600 tokens/s | 2,000 tokens/s, 8 on one, in another run | 1.80 |" in text
    )
    assert text.endswith(f"said there: {where}: trials are trained one after the other: 1.0 ms alone.")


def test_a_bare_step_is_beside_what_was_measured(tmp_path):
    (tmp_path / "joint_step").mkdir()
    case = {"model": "mistral-7b", "base": "nf4", "trials": 4, "tokens": 1024, "rank": 2}
    timed = {"step_ms": {"joint_graphs": 100.0, "short_graphs": 50.0}, "sequential_ratio_graphs": 2.0}
    content = {
        "env": {"gpus": ["NVIDIA X"]},
        "config": {},
        "rows": {"x": {**case, **timed}, "y": {**case, "step_ms": {}}},
    }
    (tmp_path / "joint_step" / "x.json").write_text(json.dumps(content))
    (line,) = sharing_words.guide(tmp_path).splitlines()[2:]
    what = "Mistral-7B NF4, 4 of LSR r=2, 1,024 tokens each, one X: a bare step"
    assert line == f"| {what} | 100 ms | 200 ms, 4 steps of one trial | 2.00 |"
    assert sharing_words.guide(tmp_path / "none") == ""


def test_the_plot_has_the_share_of_the_bases_own_throughput(tmp_path):
    times = {"joint_graphs": 100.0, "short_graphs": 50.0, "base_graphs": 80.0}
    case = {"model": "smollm2-135m", "base": "bf16", "trials": 4, "tokens": 1024, "rank": 2, "step_ms": times}
    found = sharing_plot.shares(case)
    assert found == {"short": None, "short_graphs": 0.4, "joint_graphs": 0.8, "long_graphs": None}
    (tmp_path / "joint_step").mkdir()
    without = {**case, "step_ms": {"joint_graphs": 1.0}}
    content = {"env": {"gpus": ["NVIDIA X"]}, "config": {}, "rows": {"y": without}}
    (tmp_path / "joint_step" / "x.json").write_text(json.dumps(content))
    assert sharing_plot.plots(tmp_path) == {}, "the base was not measured"
    (tmp_path / "joint_step" / "x-2.json").write_text(json.dumps({**content, "rows": {"x": case}}))
    ((path, plot),) = sharing_plot.plots(tmp_path).items()
    plot.draw(path)
    assert drawn_from(path) == plot.digest
