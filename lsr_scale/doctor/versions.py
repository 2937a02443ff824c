"""Python and the packages: are their versions those that are supported, and do the large ones import."""

import importlib
import importlib.metadata
import platform
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lsr_scale.doctor.report import Finding


def requirements() -> tuple[SpecifierSet, list[Requirement]]:
    """Return the Python versions and packages that this package asks for.

    A checkout's are read from its pyproject.toml: what pip noted when it was installed as editable may be older.
    """
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        python, texts = project["requires-python"], project["dependencies"]
    else:
        metadata = importlib.metadata.metadata("lsr_scale")
        python, texts = metadata["Requires-Python"], importlib.metadata.requires("lsr_scale") or []
    needed = [Requirement(text) for text in texts]
    return SpecifierSet(python or ""), [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]


def check_versions() -> Iterator[Finding]:
    """Check Python and every package against its range, and that the large ones import."""
    python, needed = requirements()
    version = platform.python_version()
    fine = Finding("versions", "python", version)
    yield fine if version in python else Finding("versions", "python", version, "bad", f"use Python {python}")
    for requirement in needed:
        yield check_version(requirement, installed_version(requirement.name))
    for name in ("trl", "deepspeed", "datasets", "bitsandbytes"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                importlib.import_module(name)
            except Exception as error:
                text = " ".join(str(error).split())[:200]
                remedy = f"pip install --force-reinstall {name}, with the versions above"
                yield Finding("versions", f"import {name}", f"{type(error).__name__}: {text}", "bad", remedy)


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_version(requirement: Requirement, version: str | None) -> Finding:
    """Compare an installed version with what is asked for."""
    command = f'pip install "{requirement}"'
    if version is None:
        return Finding("versions", requirement.name, "not installed", "bad", command)
    if not requirement.specifier.contains(version, prereleases=True):
        found = f"{version}, but {requirement.specifier} is supported"
        return Finding("versions", requirement.name, found, "bad", command)
    return Finding("versions", requirement.name, version)
