"""A verdict as an artefact: all its numbers and pictures, published, and read again for the report."""

import json
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl

from base.config import Config
from base.storage import is_published, publish, published, read_manifest, resolve
from pipelines import page, plots
from pipelines.plots import Plot
from recsys.bundle import Origin
from recsys.gate import Comparison, Evidence, Gates, Verdict, title

KIND = "verdict"
WORST = 5
"""Slices of each metric that are drawn."""
DAYS = 14
"""How far the table of lags looks back."""


class Judgement(Config):
    """What was judged, on what, and what came out: `verdict.json`, in which null is not a number."""

    bundle: str
    """Version of the candidate's."""
    candidate: str
    """Number of the registered version."""
    champion: str | None
    candidate_origin: Origin
    champion_origin: Origin | None
    partitions: tuple[str, ...]
    approved: bool
    """Whether a person promoted what the gate held."""
    verdict: Verdict
    evidence: Evidence
    gates: Gates


def publish_judgement(
    judgement: Judgement, target: Path, outputs: Sequence[str], scored: pl.DataFrame, reference: pl.DataFrame | None
) -> Path:
    """Publish a verdict with the pictures of both scored tables, of the columns `outputs`; returns this version."""
    with publish(target, KIND, overwrite=True, keep=3) as staging:
        (staging / "verdict.json").write_text(judgement.model_dump_json(indent=2), encoding="utf-8")
        _table(judgement.evidence.comparisons).write_parquet(staging / "comparisons.parquet")
        for plot in _drawn(judgement.evidence.comparisons, outputs, scored, reference):
            (staging / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
        staging.about.update(
            bundle=judgement.bundle, candidate=judgement.candidate, decision=judgement.verdict.decision
        )
    return resolve(target, KIND)


def section(target: Path, bundle: str, drawn: list[Plot]) -> page.Html:
    """The last verdict published there, if it is on this bundle."""
    if not is_published(target):
        return page.Html()
    folder = resolve(target, KIND)
    if read_manifest(folder).about.get("bundle") != bundle:
        return page.Html()
    record = json.loads((folder / "verdict.json").read_bytes())
    verdict = Verdict.model_validate(record["verdict"])
    comparisons = [Comparison(**row) for row in pl.read_parquet(folder / "comparisons.parquet").iter_rows(named=True)]
    against = f"version {record['champion']}" if record["champion"] else "no champion"
    parts = [page.tag("p", f"Version {record['candidate']} against {against}: {verdict.decision}.")]
    unnumbered = [reason["text"] for reason in record["evidence"]["reasons"]]
    parts += [page.tag("p", str(r)) for r in verdict.reasons if r.ruling != "pass" or r.text in unnumbered]
    if shown := list(_drawable(comparisons)):
        caption = "A bar wholly left of equal, its dot left of the margin, refuses."
        parts.append(page.figure(drawn, plots.forest("gate", shown), "Candidate and champion", caption))
    if comparisons:
        parts.append(page.details("All numbers", _numbers(comparisons)))
    parts += _lag(target)
    return page.tag("section", page.tag("h2", "What the gate said"), *parts)


def _lag(target: Path) -> list[page.Html]:
    """What it costs to learn late: on each day, models of different age on the same rows."""
    rows: list[list[str]] = []
    for path in published(target.parent):
        record = json.loads((resolve(path, KIND) / "verdict.json").read_bytes())
        day, candidate, champion = (record[k] for k in ("partitions", "candidate_origin", "champion_origin"))
        if champion is None or None in (candidate["trained_to"], champion["trained_to"]) or path.name > target.name:
            continue
        ages = [_age(day[0], origin["trained_to"]) for origin in (candidate, champion)]
        for c in (Comparison(**c) for c in record["evidence"]["comparisons"] if None not in c.values()):
            if c.slice == "all" and c.metric.startswith(("auc", "recall@")):
                figures = [page.number(v, ".4f") for v in (c.candidate, c.champion, c.difference, c.lower, c.upper)]
                rows.append([day[0], c.output, title(c.metric), *(str(a) for a in ages), *figures])
    if not rows:
        return []
    head = [
        "day",
        "output",
        "metric",
        "candidate's age",
        "champion's age",
        "candidate's",
        "champion's",
        "gain",
        "from",
        "to",
    ]
    text = "Models of different age on the same rows of a day; the age is how many days before it a model last learned."
    return [page.tag("h3", "What the lag costs"), page.tag("p", text), page.table(head, rows[-DAYS:], left=3)]


def _age(partition: str, trained_to: str) -> int:
    """Days from the last that a model learned from to the one that it was judged on."""
    return (date.fromisoformat(partition.removeprefix("day=")) - date.fromisoformat(trained_to)).days


def _numbers(comparisons: Sequence[Comparison]) -> page.Html:
    head = ["output", "metric", "rows of", "rows", "candidate", "champion", "better by", "from", "to", "margin"]
    rows = [
        [c.output, title(c.metric), c.slice, f"{c.rows:,}"]
        + [page.number(v, ".5f") for v in (c.candidate, c.champion, c.difference, c.lower, c.upper, c.margin)]
        for c in comparisons
    ]
    return page.table(head, rows, left=3)


def _table(comparisons: Sequence[Comparison]) -> pl.DataFrame:
    kinds: dict[Any, type[pl.DataType]] = {str: pl.String, int: pl.Int64}
    schema = {name: kinds.get(field.annotation, pl.Float64) for name, field in Comparison.model_fields.items()}
    return pl.DataFrame([c.model_dump() for c in comparisons], schema=schema)


def _drawn(
    comparisons: Sequence[Comparison], outputs: Sequence[str], scored: pl.DataFrame, reference: pl.DataFrame | None
) -> Iterator[Plot]:
    """All differences at a glance, and how the scores have moved."""
    if shown := list(_drawable(comparisons)):
        yield plots.forest("differences", shown)
    for output in outputs:
        if reference is not None and output in reference.columns:
            both = {"champion": reference[output], "candidate": scored[output]}
            if all(scores.len() and scores.is_finite().all() for scores in both.values()):
                yield plots.shift(f"scores-{output}", output, {k: v.to_numpy() for k, v in both.items()})


def _drawable(comparisons: Sequence[Comparison]) -> Iterator[Comparison]:
    """Of all rows, then the worst slices."""
    finite = pl.Series([c.difference for c in comparisons], dtype=pl.Float64).is_finite()
    known = [c for c, is_finite in zip(comparisons, finite, strict=True) if is_finite]
    yield from (c for c in known if c.slice == "all")
    for output, metric in dict.fromkeys((c.output, c.metric) for c in known):
        slices = [c for c in known if (c.output, c.metric) == (output, metric) and c.slice != "all"]
        yield from sorted(slices, key=lambda c: c.difference)[:WORST]
