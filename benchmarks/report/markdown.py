"""Pieces of a Markdown page: tables, numbers, and the place between two markers that a table has in a page."""


def grid(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, its first column left-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float | None, form: str = ",.0f") -> str:
    """Return a number, or nothing where there is none."""
    return "" if value is None else format(value, form)


def with_table(text: str, name: str, content: str, page: str = "README.md") -> str:
    """Return a page's text with the part between the markers of that name replaced."""
    begin, end = f"<!-- {name}: made by benchmarks/report -->\n", f"<!-- end of {name} -->"
    before, has_begin, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not has_begin or not closed:
        raise SystemExit(f"{page} has no place for {name}: put {begin.strip()} and {end.strip()} there")
    return f"{before}{begin}{content}\n{end}{after}"
