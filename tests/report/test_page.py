"""A run's page: what it shows, that all of it is text, and that a failure to write it fails no run."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lsr_scale import cli, files
from lsr_scale.config import load_run
from lsr_scale.errors import UserError
from lsr_scale.planning import plan
from lsr_scale.report import write
from lsr_scale.report.write import report_at_end, write_report
from lsr_scale.run.compare import compare
from lsr_scale.run.folder import RunFolder
from lsr_scale.units import byte_size
from tests.helpers.run_folders import choice_rows, rewards, write_run
from tests.helpers.tiny_runs import do, results, save_llama, tiny_run

LOOKS_AT_PAGES = LOOKS_AT_PICTURES = True
HOSTILE = "</pre></style><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>&amp;\"'"
MESSAGES = [{"role": "system", "content": "Be brief. " + HOSTILE}, {"role": "user", "content": "What boils water?"}]
SAMPLES = [
    {"step": 0, "moment": "before", "prompt": "Name a tool.", "completion": "before: " + HOSTILE},
    {"step": 20, "moment": "evaluation", "prompt": "Name a tool.", "completion": "meanwhile: " + HOSTILE},
    {"step": 40, "moment": "after", "prompt": "Name a tool.", "completion": "after: a saw"},
    {"step": 0, "moment": "before", "prompt": MESSAGES, "completion": "Water"},
    {"step": 20, "moment": "evaluation", "prompt": MESSAGES, "completion": "A kettle"},
    {"prompt": "no completion"},
    {"step": 40, "moment": "after", "prompt": 5, "completion": "six"},
]


class Reader(HTMLParser):
    """Collects the tags of a page, their attributes, and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.pieces.append(data)


@pytest.fixture
def hostile(tmp_path):
    """Return a run whose every value is hostile."""
    return write_run(
        tmp_path / ("<b>run" + "&amp;"),
        {"training": {"run_note": HOSTILE}, "data": {"train": [{"path": HOSTILE}]}, "model": {"name": HOSTILE}},
        {"notes": ["data.train: cut " + HOSTILE]},
        answers={f"arc<script>-{when}": choice_rows([True, False, True]) for when in ("before", "after")},
        data={"train": [{"path": HOSTILE, "sha256": HOSTILE, "num_rows": 3, "split": HOSTILE}]},
        environment={"torch": HOSTILE, "gpus": [HOSTILE]},
        samples=SAMPLES,
    )


def check_harmless(page: Path) -> None:
    """See that nothing is run or loaded: no script, no handler, no address but within the page."""
    reader = Reader(page)
    assert {tag for tag, _ in reader.tags} & {"script", "iframe", "object", "embed", "base", "form"} == set()
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            address = attributes.get(name)
            assert address is None or address.startswith(("#", "data:")), (tag, address)
    styles = " ".join(attributes.get("style") or "" for _, attributes in reader.tags)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", styles)
    css = re.search(r"<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert "url(" not in css[1]
    assert "@import" not in css[1]
    assert "&#" not in css[1], "escaped by the template"


def test_hostile_values_are_text(hostile):
    page = write_report(hostile, planned=False)
    check_harmless(page)
    text = Reader(page).text
    assert text.count("<script>alert(1)</script>") >= 8


def test_a_run_of_grpo_begins_with_its_rewards(tmp_path):
    run = write_run(tmp_path / "run", {"training": {"method": "grpo"}}, {"final_reward": 0.75}, rewards())
    text = Reader(write_report(run, planned=False)).text
    assert re.search(r"training reward\W+0\.7500\W+mean of the last tenth", text)
    assert re.search(r"best evaluation reward\W+0\.9502\W+step 30", text)
    assert "training loss" not in text


def test_a_comparison_s_hostile_values_are_text(hostile, tmp_path):
    write_run(tmp_path / "other", {"training": {"run_note": "plain"}})
    write.write_comparison(compare([hostile, tmp_path / "other"]), tmp_path / "c.html")
    check_harmless(tmp_path / "c.html")
    assert "<script>alert(1)</script>" in Reader(tmp_path / "c.html").text


def test_control_characters_are_shown_as_escapes_and_other_writing_as_it_is(tmp_path):
    samples = [
        {"step": 0, "moment": "before", "prompt": "\u9673\U0001fad6 \u200d", "completion": "a\x1b[2J\u202eb\ud800"}
    ]
    page = write_report(write_run(tmp_path / "run", samples=samples), planned=False)
    text = page.read_text(encoding="utf-8")
    assert "\u9673\U0001fad6 \u200d" in text
    assert r"a\x1b[2J\u202eb\ud800" in text


def test_generations_stand_side_by_side_by_prompt(tmp_path):
    text = Reader(write_report(write_run(tmp_path / "run", samples=SAMPLES), planned=False)).text
    assert text.index("Name a tool.") < text.index("before:") < text.index("after: a saw") < text.index("meanwhile:")
    assert "What boils water?" in text
    assert "after step 20 A kettle" in text, "there is none after training"


def test_scores_losses_and_machine_are_told(tmp_path):
    answers = {"arc-before": choice_rows([False] * 8), "arc-after": choice_rows([True] * 6 + [False] * 2)}
    text = Reader(write_report(write_run(tmp_path / "run", answers=answers), planned=False)).text
    assert "75.0" in text
    assert "6 gained, 0 lost" in text
    assert "4,096,000" in text
    assert "15.6 MiB" in text
    assert "H100 80GB HBM3" in text
    assert "1:06:40" in text


def test_a_run_that_has_not_ended_has_a_page_that_says_so(tmp_path):
    text = Reader(write_report(write_run(tmp_path / "run", finished=False), planned=False)).text
    assert "has not ended: this is how it stood after step 40" in text


def test_a_run_without_anything_but_its_beginning_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run", metrics=[], finished=False)
    (folder / "data.json").unlink()
    check_harmless(write_report(folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    save_llama(folder / "model")
    training = {"output_dir": str(folder / "run"), "max_length": 8, "save_strategy": "no", "max_steps": 3}
    return do(tiny_run(folder, training=training))


def test_a_run_leaves_its_page(trained):
    assert files.is_own_page(trained.report)
    assert trained.report in trained.written()
    check_harmless(trained.report)
    text = Reader(trained.report).text
    parameters = f"{results(trained)['trainable_parameters']:,}"
    assert text.count(parameters) >= 3, "told, planned and measured"
    assert re.search(r"adapter\.rank 4 16", text), "the value, and the default that it is not"
    assert "training.adam_beta1" not in text[: text.index("whole resolved configuration")], "a default"
    assert "cuts" in text, "what truncation loses, as it was said during the run"
    assert len([tag for tag, _ in Reader(trained.report).tags if tag == "svg"]) >= 4


def test_every_figure_and_picture_has_words_for_who_does_not_see_it(trained):
    for tag, attributes in Reader(trained.report).tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "img":
            assert attributes["alt"]


def test_no_name_stands_twice_in_a_page(trained):
    names = [attributes["id"] for _, attributes in Reader(trained.report).tags if attributes.get("id")]
    assert len(names) == len(set(names))


def test_a_report_that_fails_is_said_and_fails_no_run(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise ZeroDivisionError("in the template")

    save_llama(tmp_path / "model")
    monkeypatch.setattr(write, "_filled", fails)
    folder = do(tiny_run(tmp_path, training={"save_strategy": "no", "max_steps": 1}, eval={"tasks": []}))
    assert "note: the report is not written: in the template" in capsys.readouterr().out
    assert folder.results.is_file()
    assert not folder.report.exists()


def test_the_memory_of_a_gpu_is_compared_with_the_plan(trained, tmp_path):
    folder = Path(shutil.copytree(trained.path, tmp_path / "run"))
    environment = files.read_json(folder / "env.json", "environment") | {"gpus": ["NVIDIA H100"]}
    (folder / "env.json").write_text(json.dumps(environment))
    planned = plan(load_run(trained.config)).memory_gib.total
    results = files.read_json(folder / "results.json", "results") | {"peak_memory_gib": 2 * planned}
    (folder / "results.json").write_text(json.dumps(results))
    text = Reader(write_report(folder)).text
    assert f"peak memory of a GPU {byte_size(planned * 2**30)} {byte_size(2 * planned * 2**30)} +100%" in text
    assert "Memory is planned for GPUs, and there was none" in Reader(trained.report).text


def test_a_plan_that_cannot_be_made_is_said(tmp_path):
    text = Reader(write_report(write_run(tmp_path / "run", {"model": {"name": "none/such"}}))).text
    assert "There is no plan to compare with" in text


def test_somebody_s_page_is_not_written_over(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "report.html").write_text("<html>mine</html>")
    with pytest.raises(UserError, match="no page that lsr-scale wrote"):
        write_report(folder)
    assert "not written" in report_at_end(RunFolder(folder))
    assert (folder / "report.html").read_text() == "<html>mine</html>"
    assert cli.main(["report", str(folder), "--no-plan", "--html", str(tmp_path / "p.html")]) == 0
    assert files.is_own_page(tmp_path / "p.html")


def test_a_run_does_not_begin_where_somebody_s_page_lies(tmp_path):
    save_llama(tmp_path / "model")
    run = tiny_run(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("mine")
    with pytest.raises(UserError, match=r"holds report\.html"):
        do(run)


def test_the_configuration_of_another_release_is_shown_whole(tmp_path):
    text = Reader(write_report(write_run(tmp_path / "run", {"adapter": {"method": "gone"}}), planned=False)).text
    assert "Every value." in text
    assert "training.learning_rate" in text


@pytest.mark.parametrize("compute", ["fp8", "int8"])
def test_what_8_bits_changed_is_on_the_page(tmp_path, compute):
    errors = {"0.qkv.output": 0.04, "1.qkv.output": 0.06, "1.qkv.gradient": 0.031, "1.down.output": 0.05}
    errors |= {"0.down.gradient": 0.07, "1.down.gradient": 0.25, "2.down.gradient": None, "0.o": 0.5}
    metrics = [{"step": step, "loss": 2.0, "underflow_input_max": 0.01 * step} for step in range(1, 5)]
    run = write_run(tmp_path / "run", {"training": {"compute": compute}}, metrics=metrics)
    content = {"compute": compute, "tolerance": 0.1, "errors": errors, "kept": ["1.down", "2.down"]}
    (run / "compute.json").write_text(json.dumps(content))
    page = Reader(write_report(run, planned=False))
    assert f"held in nf4, multiplied in {compute}" in page.text
    assert f"Relative errors by {compute} of the outputs and input gradients" in page.text
    assert "qkv 5.0 % 6.0 % (1) 3.1 % 3.1 % (1) none" in page.text
    assert "down 5.0 % 5.0 % (1) 16.0 % 25.0 % (1) 1, 2" in page.text
    assert "50.0 %" not in page.text, "no name of an error"
    assert "Underflow over the steps" in {attributes.get("aria-label") for _, attributes in page.tags}
    # errors of another format than the run's, and what is none
    for other in (json.dumps({**content, "compute": "bf16"}), '{"errors": [1], "kept": 3}'):
        (run / "compute.json").write_text(other)
        assert "kept in bfloat16" not in Reader(write_report(run, planned=False)).text
    # a run that resumed with names of its own, which hold in place of what was measured
    named = write_run(tmp_path / "named", {"training": {"compute": compute, "keep_in_bf16": ["o"]}}, metrics=metrics)
    (named / "compute.json").write_text(json.dumps(content))
    assert "kept in bfloat16" not in Reader(write_report(named, planned=False)).text
