"""What the layout promises, read off the source: no import circles, none upwards, and every import declared."""

import ast
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from tests.conftest import LONGEST, pytest_collection_modifyitems

ROOT = Path(__file__).parents[1]
PACKAGE = "lsr_scale"
MAX_LINES = 600

# what the modules of a folder may import of the package; a folder that is not here may import any but the command line
KERNELS = {"kernels"}
LOWER = {"config", "data", "model", "layers", "adapters", "distributed", "errors", "files"}
LOWER |= {"option_checks", "option_names", "paths", "safe_regex", "units", "version"}
MAY_IMPORT = {
    "kernels": KERNELS,
    "layers": KERNELS | LOWER,
    "config": LOWER | {"screen"},
    "data": LOWER,
    "model": KERNELS | LOWER | {"screen"},
    "adapters": KERNELS | LOWER,
    "fused": KERNELS | LOWER | {"fused"},
}
COMMAND_LINE = {"cli", "commands"}

# imported without being declared
BROUGHT_BY = {
    "pydantic_core": "pydantic, which pins the one version that it goes with",
    "triton": "torch's builds for GPUs; without a GPU nothing needs it",
    "vllm": "whoever sets training.use_vllm",
}


@cache
def modules(package: str = PACKAGE) -> dict[str, Path]:
    """Return a package's modules by name."""
    named = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a module, functions included, but for what only a type checker reads: it runs in no circle."""
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


def names_imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports: `a.b` and `a.c` for `import a.b` and `from a import c`."""
    names = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def imports(package: str = PACKAGE) -> dict[str, set[str]]:
    """Return for each module of a package the other modules of it that it imports, anywhere in it."""
    found = {}
    for module, path in modules(package).items():
        targets = set()
        for name in names_imported(path):
            while name and name not in modules(package):
                name = name.rpartition(".")[0]
            targets.add(name)
        found[module] = targets - {"", module}
    return found


def folder(module: str) -> str:
    """Return the name below the package: `data` of `lsr_scale.data.rows`, "" of the package itself."""
    return module.partition(".")[2].partition(".")[0]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return paths through a graph that end where they begin, one from each place where a walk meets itself."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for following in sorted(graph[node]):
                walk(following, [*path, node])
            done.add(node)

    for node in graph:
        walk(node, [])
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", [PACKAGE, "benchmarks"])
def test_no_modules_import_each_other_in_a_circle(package):
    assert [" -> ".join(circle) for circle in circles(imports(package))] == []


def test_what_measures_does_not_import_the_report():
    importing = {
        module for module, targets in imports("benchmarks").items() if any(folder(name) == "report" for name in targets)
    }
    assert {folder(module) for module in importing} == {"report"}


def test_no_import_runs_upwards():
    upwards = {
        (module, target)
        for module, targets in imports().items()
        for target in targets
        if folder(target) not in MAY_IMPORT.get(folder(module), {folder(target)})
    }
    assert upwards == set()


def test_nothing_but_the_command_line_imports_the_command_line():
    importing = {
        module for module, targets in imports().items() if any(folder(target) in COMMAND_LINE for target in targets)
    }
    assert {folder(module) for module in importing} <= COMMAND_LINE | {"__main__", "launch"}


def test_kernels_know_tensors_only():
    own = {PACKAGE, *sys.stdlib_module_names}
    for module, path in modules().items():
        if folder(module) == "kernels":
            assert {name.partition(".")[0] for name in names_imported(path)} - own <= {"torch", "triton"}, module


def test_paths_in_commands_that_users_are_told_are_quoted():
    """A folder's name may hold a space."""
    commands = "train|sweep|eval|classify|generate|export|inspect|report|compare|preview|plan"
    told, unquoted = re.compile(rf"lsr-scale ({commands}) $"), []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for before, value in itertools.pairwise(parts):
                if isinstance(before, ast.Constant) and told.search(str(before.value)):
                    written = ast.unparse(value).strip("f\"'{}")
                    if written != "quoted" and not written.startswith("shlex.quote("):
                        unquoted.append(f"{module}: {written}")
    assert unquoted == []


@pytest.mark.parametrize("package", [PACKAGE, "benchmarks"])
def test_every_module_says_what_it_is_for_and_none_is_longer_than_can_be_read(package):
    texts = {module: path.read_text(encoding="utf-8") for module, path in modules(package).items()}
    assert [module for module, text in texts.items() if not ast.get_docstring(ast.parse(text))] == []
    assert [module for module, text in texts.items() if text.count("\n") > MAX_LINES] == []


def test_the_longest_files_of_tests_are_files_and_come_in_that_order():
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
    item = lambda name, slow: SimpleNamespace(path=ROOT / "tests" / name, get_closest_marker=lambda _: slow)  # noqa: E731
    items = [
        item("test_units.py", False),
        item(LONGEST[1], False),
        item("run/test_stops.py", True),
        item(LONGEST[0], True),
    ]
    pytest_collection_modifyitems(items)
    names = [str(one.path.relative_to(ROOT / "tests")) for one in items]
    assert names == [*LONGEST[:2], "run/test_stops.py", "test_units.py"]


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    files = [*modules().values(), *(ROOT / "launch").glob("*.py")]
    imported = {name.partition(".")[0] for path in files for name in names_imported(path)}
    imported -= {PACKAGE, *sys.stdlib_module_names, *BROUGHT_BY}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {Requirement(text).name for text in project["dependencies"]}
    distributions = packages_distributions()
    assert {normal(distributions[name][0]) for name in imported} == {normal(name) for name in declared}


def normal(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return name.lower().replace("_", "-")
