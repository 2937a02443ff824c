"""Writing the pages: `report.html` of a run, and that of a comparison."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lsr_scale import files
from lsr_scale.errors import UserError, escaped
from lsr_scale.run.compare import Comparison
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.plots import NATS, draw_conditions, draw_losses
from lsr_scale.run.policy_plots import draw_rewards
from lsr_scale.run.record import read_run
from lsr_scale.version import __version__

MakePlan = Callable[..., Any]  # as `planning.plan`

_TEMPLATES = Path(__file__).parent
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write_report(
    path: str | Path, page: Path | None = None, planned: bool = True, plan: MakePlan | None = None
) -> Path:
    """Write a run's page, of a finished or unfinished run, and return where.

    Args:
        path: The run's folder.
        page: Where; `report.html` in the folder by default.
        planned: Say too what `lsr-scale plan` foretells, which takes some seconds for a large model.
        plan: Foretells it, by default `planning.plan`.

    Raises:
        UserError: if it is no run's folder, something else lies in the page's place, or it cannot be written.
    """
    from lsr_scale.report.run_page import run_page

    record = read_run(path)
    page = page or record.folder.report
    check_page_place(page)
    files.write_text(page, _filled("run.html.jinja", run_page(record, planned, plan)))
    return page


def write_comparison(comparison: Comparison, page: Path) -> None:
    """Write the page of a comparison.

    Raises:
        UserError: if something else lies in the page's place, or it cannot be written.
    """
    from lsr_scale.report.comparison_page import comparison_page

    check_page_place(page)
    files.write_text(page, _filled("comparison.html.jinja", comparison_page(comparison)))


def show_at_end(folder: RunFolder, plan: MakePlan | None = None) -> str:
    """Draw a finished run's pictures and write its page; return what `report_at_end` returns.

    Raises:
        UserError: if a picture cannot be written.
    """
    config = read_run(folder.path).config
    title = f"{config['adapter']['method']} on {config['model']['name']}"
    method = config["training"].get("method", "sft")
    draw_losses(folder.metrics, folder.curve, title, NATS if method == "sft" else "")
    if method != "sft":
        draw_rewards(folder.metrics, folder.rewards, f"{method}: {title}")
    draw_conditions(folder.metrics, folder.condition, title)
    return report_at_end(folder, plan)


def report_at_end(folder: RunFolder, plan: MakePlan | None = None) -> str:
    """Write a run's page at its end, and return a line that says so; a failure is said, and does not fail the run."""
    try:
        return f"report   {write_report(folder.path, plan=plan)}"
    except Exception as error:
        return f"note: the report is not written: {type(error).__name__ if not str(error) else error}"


def check_page_place(page: Path, option: str = "--html") -> None:
    """Raise a UserError if a page would take the place of something else than an earlier one of ours."""
    if os.path.lexists(page) and not files.is_own_page(page):
        raise UserError(
            f"{page}: not written: what lies there is no page that lsr-scale wrote; name another with {option} FILE"
        )


def _filled(template: str, values: dict[str, Any]) -> str:
    """Return a page; every value is escaped, but for the figures, which are SVG made here."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    css = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(css=css, version=__version__, **values)


def _shown(value: Any) -> Any:
    """Show control characters, overrides of the writing direction and half a surrogate pair as escapes."""
    return _STEERING.sub(lambda found: escaped(found[0]), value) if type(value) is str else value
