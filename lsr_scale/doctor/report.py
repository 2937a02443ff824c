"""What the doctor finds, as lines for a person and as JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "note", "bad"]


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


def render(report: Report) -> Group:
    """Return the report for a person, to be printed by a rich console."""
    colors = {"ok": "green", "note": "yellow", "bad": "bold red"}
    tables: list[Any] = []
    for group in dict.fromkeys(finding.group for finding in report.findings):
        table = Table.grid(padding=(0, 2))
        for finding in report.findings:
            if finding.group == group:
                text = Text(finding.found)
                if finding.remedy:
                    text.append(f"\n-> {finding.remedy}", style=colors[finding.status])
                table.add_row(Text(finding.status, style=colors[finding.status]), finding.name, text)
        tables += [Text(group, style="bold"), table, Text()]
    bad = sum(finding.status == "bad" for finding in report.findings)
    verdict = f"{bad} known problem{'s' if bad > 1 else ''}, see above" if bad else "nothing known to be bad"
    return Group(*tables, Text(verdict, style="bold red" if bad else "bold green"))
