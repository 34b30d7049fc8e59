"""Pieces of a report page."""

import math
from collections.abc import Sequence
from html import escape

from pipelines.plots import Plot


class Html(str):
    """Text that is markup already; any other text is escaped when it enters a page."""


def tag(name: str, *children: "str | Html", kind: str = "") -> Html:
    """An element; text in it is escaped."""
    inside = "".join(c if isinstance(c, Html) else escape(c) for c in children)
    return Html(f'<{name} class="{kind}">{inside}</{name}>' if kind else f"<{name}>{inside}</{name}>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, kind: str = "") -> Html:
    """The first `left` columns hold text, the others numbers."""

    def line(cell: str, values: Sequence[str]) -> Html:
        return tag("tr", *(tag(cell, v, kind="" if i < left else "number") for i, v in enumerate(values)))

    body = tag("tbody", *(line("td", row) for row in rows))
    return tag("div", tag("table", tag("thead", line("th", head)), body, kind=kind), kind="scroll")


def details(summary: str, *children: Html) -> Html:
    """Folded until opened."""
    return tag("details", tag("summary", summary), *children)


def figure(drawn: list[Plot], plot: Plot, title: str, caption: str = "", *, kind: str = "") -> Html:
    """A drawing under its title, noted in `drawn`."""
    drawn.append(plot)
    below = [tag("p", caption, kind="note")] if caption else []
    return tag("figure", tag("figcaption", tag("b", title)), tag("div", Html(plot.inline)), *below, kind=kind)


def figures(*figures: Html) -> Html:
    """Figures side by side."""
    return tag("div", *figures, kind="figures")


def number(value: float | None, form: str) -> str:
    """A number, or a dash where it is undefined."""
    return "–" if value is None or not math.isfinite(value) else format(value, f"z{form}")
