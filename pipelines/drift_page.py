"""The report's sections on drift: each measured partition beside the rows that the model has seen."""

from collections.abc import Iterator, Sequence

from pipelines import page, plots
from pipelines.check import findings_of
from pipelines.config import Run
from pipelines.page import Html
from pipelines.plots import Plot
from recsys.bundle import Bundle
from serving.drift import Finding

SHOWN = 30
"""Lines of a figure at most: the largest."""


def sections(run: Run, bundle: Bundle, partitions: Sequence[str], drawn: list[Plot]) -> Iterator[Html]:
    """One for each partition; none for a bundle that keeps no profile of its rows."""
    for partition in partitions:
        if found := findings_of(run, bundle, partition):
            yield _section(partition, found, drawn)


def _section(partition: str, found: Sequence[Finding], drawn: list[Plot]) -> Html:
    remarks = [f for f in found if f.verdict != "ok"]
    reading = f"{len(found)} numbers compared, {len(remarks) or 'none'} of them beyond a threshold"
    rows = [
        [f.name, f.what.replace("_", " "), f.verdict, f.beside, f.written(f.found), f.allowed]
        for f in sorted(found, key=lambda f: f.verdict == "ok")
    ]
    head = ["name", "what", "verdict", "before", "found", "allowed"]
    return page.tag(
        "section",
        page.tag("h2", f"Drift: {partition} beside what the model has seen"),
        page.tag("p", f"{reading}{':' if remarks else '.'}"),
        *(page.tag("p", page.tag("b", f.verdict), f" {f.sentence}") for f in remarks),
        page.figures(*_figures(partition, found, drawn)),
        page.details("All numbers", page.table(head, rows, left=3)),
        page.tag("p", "PSI, the population stability index, is 0 for equal distributions, and of a feature the smaller "
                 "of two: against the training rows and against held-out ones. Unknown ids are left out of it.",
                 kind="note"),
    )  # fmt: skip


def _figures(partition: str, found: Sequence[Finding], drawn: list[Plot]) -> Iterator[Html]:
    base = f"drift-{partition}"
    moved = sorted((f for f in found if f.what in ("psi", "score_psi")), key=lambda f: -f.found)[:SHOWN]
    if moved:
        names, values = [f.name for f in moved], [f.found for f in moved]
        drawing = plots.drift(f"{base}-psi", names, values, [f.warn[1] for f in moved], [f.stop[1] for f in moved])
        yield page.figure(drawn, drawing, "How much distributions have moved", "Features, and scores once published.")
    for what, title in (("unknown", "Unknown ids"), ("missing", "Missing values")):
        present = [f for f in found if f.what == what and (f.found or f.reference)]
        largest = sorted(present, key=lambda f: -max(f.found, f.reference or 0.0))[:SHOWN]
        if largest:
            names, now = [f.name for f in largest], [f.found for f in largest]
            before = [f.reference or 0.0 for f in largest]
            caption = "Before: in training or in held-out rows, whichever is more." if what == "unknown" else ""
            drawing = plots.shares(f"{base}-{what}", names, before, now, f"share of {title.lower()}")
            yield page.figure(drawn, drawing, title, caption)
