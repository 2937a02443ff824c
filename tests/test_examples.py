"""GUIDE.md's programs and the notebook run as they stand, on a small model."""

import ast
import json
import re
from pathlib import Path

import pytest

import lsr_scale
from lsr_scale.config import dump_yaml
from tests.helpers.tiny_runs import TOOLS, save_llama, tiny_run

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "quickstart.ipynb"


def programs():
    """Return the Python programs of GUIDE.md's chapter on code."""
    chapter = (
        (ROOT / "GUIDE.md").read_text(encoding="utf-8").partition("## 5. In your own code")[2].partition("\n## 6")[0]
    )
    return re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)


def place_for_a_run():
    """Make a model and my_run.yaml in the working folder, which is a test's own."""
    save_llama(Path("model").absolute(), chat=True, num_hidden_layers=2, max_position_embeddings=256)
    run = tiny_run(Path.cwd(), training={"output_dir": None, "max_length": 64, "save_strategy": "no"})
    Path("my_run.yaml").write_text(dump_yaml(run))
    return run


def test_the_functions_of_the_guide(capsys):
    place_for_a_run()
    (program,) = [text for text in programs() if "load_run(" in text]
    names = {}
    exec(program, names)
    assert {"questions"} == names["result"].scores.keys()
    assert names["result"].folder == Path("runs/run")
    assert Path("my_lora/adapter_model.safetensors").is_file()
    assert "GiB on one GPU" in capsys.readouterr().out


def test_the_loop_of_the_guide(capsys):
    """Load in 4 bits, adapt, fuse, train, save, load again: thirty lines."""
    place_for_a_run()
    (program,) = [text for text in programs() if "optimizer.step()" in text]
    assert 25 <= len([line for line in program.splitlines() if line.strip()]) <= 36
    changed = program.replace('"mistralai/Mistral-7B-v0.1"', '"model"').replace("rank=16, separation_rank=16", "rank=4")
    assert changed.count('"model"') == 1
    names = {}
    exec(changed, names)
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", said)]
    assert len(losses) == len(names["texts"])
    assert sum(losses[-4:]) < sum(losses[:4])
    assert "2 of 2 decoder layers run fused" in said
    trained, again = names["model"].eval(), names["again"].eval()
    (expected,) = lsr_scale.generate(trained, TOOLS[0], tokenizer=names["tokenizer"], max_new_tokens=6)
    assert [expected] == lsr_scale.generate(again, TOOLS[0], tokenizer=names["tokenizer"], max_new_tokens=6)


def cells():
    """Return the source of the notebook's code cells."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_one_without_outputs():
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebooks_cells_run_one_after_the_other_and_again(capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    run = place_for_a_run()
    first, *others = cells()
    names = {}
    exec(first, names)
    assert lsr_scale.load_run(names["RUN"], names["CHANGES"]).model.name == "builtin:smollm2-135m-instruct"
    names["RUN"] = run.model_dump()
    for source in [*others[:-1], others[1], others[-1]]:  # a cell is run twice, as people do
        exec(compile(ast.parse(source), "cell", "exec"), names)
    said = capsys.readouterr().out
    assert "1,600 of " in said
    assert "trained: " in said
    assert Path("runs/quickstart-lora/adapter_config.json").is_file()
