"""What the doctor finds, as lines for a person and as JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lsr_scale.units import amount

Status = Literal["ok", "note", "bad"]

# what a screen has of the versions that are well
_MAIN_VERSIONS = ("python", "torch", "transformers", "peft", "trl", "deepspeed", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        group: The heading that it stands under.
        name: What was looked at.
        found: What it is, in words.
        status: "ok"; "note", which costs nothing or only speed; "bad", which breaks a run or spoils its result.
        remedy: What to do about it; always there for what is bad.
    """

    group: str
    name: str
    found: str
    status: Status = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, in the order in which they are shown."""

    findings: list[Finding]

    @property
    def exit_code(self) -> int:
        """1 if anything is known to be bad, else 0."""
        return int(any(finding.status == "bad" for finding in self.findings))

    def to_json(self) -> str:
        """Return the report as a JSON document."""
        return json.dumps({"ok": self.exit_code == 0, "findings": [asdict(f) for f in self.findings]}, indent=2)


_COLORS = {"ok": "green", "note": "yellow", "bad": "bold red"}


def render(report: Report, whole: bool = True) -> Group:
    """Return the report for a person, to be printed by a rich console.

    Args:
        report: What was found.
        whole: Every finding in full; else a screen: a line each, and the versions that are well in one.
    """
    bad = sum(finding.status == "bad" for finding in report.findings)
    verdict = f"{amount(bad, 'known problem')}, see above" if bad else "nothing known to be bad"
    if not whole:
        verdict += "; --all tells all in full"
    tables = _whole(report) if whole else [_screen(report)]
    return Group(*tables, Text(verdict, style="bold red" if bad else "bold green"))


def _whole(report: Report) -> list[Any]:
    tables: list[Any] = []
    for group in dict.fromkeys(finding.group for finding in report.findings):
        table = Table.grid(padding=(0, 2))
        for finding in report.findings:
            if finding.group == group:
                _add(table, finding)
        tables += [Text(group, style="bold"), table, Text()]
    return tables


def _screen(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    well = [finding for finding in report.findings if finding.status == "ok"]
    versions = {finding.name: finding.found for finding in well if finding.group == "versions"}
    if shown := [f"{name} {versions[name]}" for name in _MAIN_VERSIONS if name in versions]:
        rest = len(versions) - len(shown)
        text = ", ".join(shown) + (f", and {rest} more" if rest else "")
        table.add_row(Text("ok", style=_COLORS["ok"]), "versions", text)
    for finding in report.findings:
        if finding.status != "ok":
            _add(table, finding)
        elif finding.group != "versions":
            line = Text(finding.found, no_wrap=True, overflow="ellipsis")
            table.add_row(Text("ok", style=_COLORS["ok"]), finding.name, line)
    return table


def _add(table: Table, finding: Finding) -> None:
    """Add a finding in full, what to do about it below."""
    text = Text(finding.found)
    if finding.remedy:
        text.append(f"\n-> {finding.remedy}", style=_COLORS[finding.status])
    table.add_row(Text(finding.status, style=_COLORS[finding.status]), finding.name, text)
