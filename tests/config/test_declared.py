"""What a run's file may say is read off source code, and is what importing that code gives."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lsr_scale import adapters
from lsr_scale.config import declared
from lsr_scale.config import training as training_fields
from lsr_scale.config.methods import METHODS
from lsr_scale.config.training import arguments
from lsr_scale.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = """
model: {name: mistralai/Mistral-7B-v0.1, quantization: none}
adapter: {method: METHOD, target_modules: [q_proj]}
data: {train: [builtin:commonsense]}
"""
# what takes a second or more to import, or belongs to it
HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "numpy", "pandas")

RESOLVE = """
import json, sys
sys.argv = ["lsr-scale"]
from lsr_scale.config import load_run, json_schema
runs = {name: load_run(name).model_dump() for name in FILES}
assert not HEAVY & set(sys.modules), sorted(HEAVY & set(sys.modules))
print(json.dumps([runs, json_schema()]))
"""


def fields_of(model):
    """Return what a file may hold under each name of a pydantic model."""
    return {
        name: (str(field.annotation), str(field.metadata), field.default, field.description)
        for name, field in model.model_fields.items()
    }


@pytest.mark.parametrize(("task", "method"), [*(("causal_lm", name) for name in METHODS), ("seq_cls", "sft")])
def test_training_fields_read_off_the_source_are_the_installed_ones(task, method, monkeypatch):
    imported = fields_of(training_fields.training_model.__wrapped__(task, method))
    monkeypatch.setattr(declared, "already_imported", lambda: False)
    never = pytest.fail
    monkeypatch.setattr(arguments, "training_arguments_class", lambda *which: never("the class was imported"))

    read = fields_of(training_fields.training_model.__wrapped__(task, method))

    assert read == imported
    assert list(read) == list(imported)


def test_options_of_every_method_are_those_of_its_class():
    read = declared.method_options()

    assert list(read) == adapters.method_names()
    for method, options in read.items():
        imported = dataclasses.fields(adapters.options(method))
        of_source = [field for field in dataclasses.fields(options) if field.name in {f.name for f in imported}]
        assert [(f.name, f.type, f.default, f.metadata) for f in of_source] == [
            (f.name, f.type, f.default, f.metadata) for f in imported
        ]


@pytest.mark.parametrize("method", adapters.method_names())
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rank": 4, "use_rslora": True},
        {"rank": 0},
        {"dropout": 1.5},
        {"alpha": float("inf")},
        {"rank_pattern": {"(a+)+$": 4}},
        {"init": "papr"},
        {"init": "paper"},
        {"phm_dim": 0},
        {"decompose_factor": 0},
        {"layers_pattern": "h"},
        {"target_modules": "all-linear", "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_options_are_checked_and_filled_in_as_by_the_imported_class(method, values, monkeypatch):
    """The whole section, in YAML's words; what does not belong to a method is refused by either."""
    from lsr_scale.config import sections

    def outcome(options):
        monkeypatch.setattr(sections, "_DECLARED", options)
        try:
            return sections.ADAPTER_SECTIONS[method].model_validate({"method": method, **values}).model_dump()
        except ValueError as error:
            return str(error)

    assert outcome(declared.method_options()) == outcome(None)


def test_a_run_is_resolved_alike_without_torch(tmp_path):
    from lsr_scale.config import json_schema, load_run

    files = []
    for method in adapters.method_names():
        files.append(tmp_path / f"{method}.yaml")
        files[-1].write_text(TINY.replace("METHOD", method))
    files += sorted((ROOT / "lsr_scale" / "configs").glob("*.yaml")) or sorted((ROOT / "configs").glob("*.yaml"))
    names = [str(file) for file in files if not file.stem.endswith("_sweep")]
    code = f"FILES = {names!r}; HEAVY = {set(HEAVY)!r}" + RESOLVE
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    runs, schema = json.loads(result.stdout)
    assert runs == json.loads(json.dumps({name: load_run(name).model_dump() for name in names}))
    assert schema == json.loads(json.dumps(json_schema()))


def test_what_cannot_be_read_off_is_imported(tmp_path, monkeypatch):
    imported = fields_of(training_fields.training_model.__wrapped__("causal_lm"))
    monkeypatch.setattr(declared, "already_imported", lambda: False)
    monkeypatch.setattr(declared, "_parse", lambda path: (_ for _ in ()).throw(declared.UnreadableError("another way")))
    declared.training_class.cache_clear()
    try:
        assert fields_of(training_fields.training_model.__wrapped__("causal_lm")) == imported
    finally:
        declared.training_class.cache_clear()


def test_a_dataclass_that_only_running_its_file_could_tell_is_named(tmp_path):
    file = tmp_path / "odd.py"
    file.write_text("import dataclasses\n@dataclasses.dataclass\nclass Odd:\n    x: int = made_elsewhere()\n")

    with pytest.raises(declared.UnreadableError, match=r"odd\.py: NameError: name 'made_elsewhere'"):
        declared._execute(file, {})
    file.write_text("class (")
    with pytest.raises(declared.UnreadableError, match=r"odd\.py"):
        declared._execute(file, {})


def test_an_options_check_raises_the_packages_own_error():
    with pytest.raises(UserError, match="expected an integer >= 1, got 0"):
        declared.method_options()["lsr"](separation_rank_pattern={"q_proj": 0})
