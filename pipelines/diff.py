"""diff: what changed between two fitted pipelines, feature by feature."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import polars as pl

from base.config import Config
from base.errors import ArtefactError
from base.storage import is_published
from features.pipeline import RECIPE, FittedPipeline
from features.schema import Sparse
from features.transforms import Log, Standardise, Transform, Vocabulary
from pipelines.text import aligned

EXAMPLES = 3
"""New ids that are named, the most frequent ones."""
_NOTHING = {"value": pl.String, "count": pl.Int64, "id": pl.Int32, "retired": pl.Date}

Change: TypeAlias = Literal["same", "ids", "refitted", "settings", "added", "removed"]
Relation: TypeAlias = Literal["same", "extended", "extended, with rows recycled", "another fit"]


class Ids(Config):
    """What became of the ids of a vocabulary."""

    new: int
    """Ids that had no row before."""
    examples: tuple[tuple[str | int, int], ...]
    """Some of them, with their counts."""
    retired: int
    """Ids that had a row and are unknown now."""
    recycled: int
    """Rows that belonged to another id before."""
    revived: int
    """Retired ids that have their row back."""
    waiting: int
    """Values that are counted and have no row yet."""


class Scale(Config):
    """Of a numeric feature: where it is centred, and by what it is divided."""

    mean: float
    std: float


class FeatureDiff(Config):
    """One feature of two pipelines; of one that is in one of them only, half."""

    feature: str
    kind: str
    change: Change
    settings: dict[str, tuple[Any, Any]] = {}
    """Those that differ: before, after."""
    rows: tuple[int | None, int | None]
    """Of its embedding table, if it has one."""
    ids: Ids | None = None
    scale: tuple[Scale | None, Scale | None]
    """Of a standardised number."""


class Diff(Config):
    """Two fitted pipelines compared."""

    versions: tuple[str, str]
    days: tuple[str | None, str | None]
    relation: Relation
    """What the second is to the first. Rows of another fit mean other ids."""
    derive: dict[str, tuple[str | None, str | None]]
    """Derived columns that differ."""
    features: tuple[FeatureDiff, ...]


def diff(before: Path, after: Path) -> Diff:
    """Compare the features published at two paths, each a folder of features or a bundle.

    Raises ArtefactError if there are none, or they are damaged.
    """
    return compare(_load(before), _load(after))


def compare(a: FittedPipeline, b: FittedPipeline) -> Diff:
    """What is different in `b`; features in its order, then those that only `a` has."""
    old, new = _features(a), _features(b)
    derive = {
        name: (a.recipe.derive.get(name), b.recipe.derive.get(name)) for name in {**a.recipe.derive, **b.recipe.derive}
    }
    return Diff(
        versions=(a.version, b.version),
        days=(a.day and a.day.isoformat(), b.day and b.day.isoformat()),
        relation=_relation(a, b),
        derive={name: pair for name, pair in derive.items() if pair[0] != pair[1]},
        features=tuple(_compared(old.get(name), new.get(name)) for name in {**new, **old}),
    )


def diff_text(found: Diff) -> str:
    """As tables for a terminal."""
    (a, b), days = found.versions, [f" ({day})" if day else "" for day in found.days]
    lines = [f"{a}{days[0]} -> {b}{days[1]}: {found.relation}"]
    lines += [f"derive.{name}: {was or 'none'} -> {now or 'none'}" for name, (was, now) in found.derive.items()]
    head = ["feature", "kind", "change", "rows before", "rows after"]
    head += ["new", "retired", "recycled", "revived", "without a row"]
    lines.append(aligned([head, *(_line(f) for f in found.features)], left=3))
    for f in found.features:
        if f.ids and f.ids.examples:
            named = ", ".join(f"{value} ({count:,} x)" for value, count in f.ids.examples)
            lines.append(f"new in {f.feature}: {named}{', ...' if f.ids.new > len(f.ids.examples) else ''}")
    return "\n".join(lines)


def _load(path: Path) -> FittedPipeline:
    folder = path.resolve()
    inside = folder / "features"
    if is_published(inside / RECIPE):
        folder = inside
    if not is_published(folder / RECIPE):
        raise ArtefactError(f"{path}: there are no fitted features; give a published folder of features, or a bundle")
    return FittedPipeline.load(folder)


@dataclass(frozen=True)
class _Feature:
    transform: Transform
    learned: pl.DataFrame

    @property
    def rows(self) -> int | None:
        field = self.transform.field(self.learned)
        return field.rows if isinstance(field, Sparse) else None

    @property
    def scale(self) -> Scale | None:
        if not isinstance(self.transform, Standardise | Log):
            return None
        mean, std = self.transform.moments(self.learned)
        return Scale(mean=mean, std=std)

    @property
    def settings(self) -> dict[str, Any]:
        return self.transform.model_dump(mode="json")

    @property
    def entries(self) -> pl.DataFrame:
        """Of a vocabulary: all values; of anything else none."""
        if isinstance(self.transform, Vocabulary):
            return self.learned
        return pl.DataFrame(schema=_NOTHING)


def _features(fitted: FittedPipeline) -> dict[str, _Feature]:
    pairs = zip(fitted.recipe.transforms, fitted.learned, strict=True)
    return {transform.output: _Feature(transform, learned) for transform, learned in pairs}


def _relation(a: FittedPipeline, b: FittedPipeline) -> Relation:
    if a.version in b.accepts:
        return "same" if a.version == b.version else "extended"
    return "extended, with rows recycled" if a.version in [x.version for x in b.ancestors] else "another fit"


def _compared(a: _Feature | None, b: _Feature | None) -> FeatureDiff:
    one = b or a
    assert one is not None
    was, now = a.settings if a else {}, b.settings if b else {}
    settings = {k: (was.get(k), now.get(k)) for k in {**was, **now} if was.get(k) != now.get(k)} if a and b else {}
    return FeatureDiff(
        feature=one.transform.output,
        kind=one.settings["kind"],
        change=_change(a, b, settings),
        settings=settings,
        rows=(a and a.rows, b and b.rows),
        scale=(a and a.scale, b and b.scale),
        ids=_ids(a, b) if isinstance(one.transform, Vocabulary) else None,
    )


def _change(a: _Feature | None, b: _Feature | None, settings: Mapping[str, Any]) -> Change:
    if a is None or b is None:
        return "added" if a is None else "removed"
    if settings:
        return "settings"
    if a.learned.equals(b.learned, null_equal=True):
        return "same"
    return "ids" if isinstance(b.transform, Vocabulary) else "refitted"


def _ids(a: _Feature | None, b: _Feature | None) -> Ids:
    before, after = (f.entries if f else pl.DataFrame(schema=_NOTHING) for f in (a, b))
    if before.is_empty() or after.is_empty():  # an empty one may have another type
        before, after = (after.clear(), after) if before.is_empty() else (before, before.clear())
    if before["value"].dtype != after["value"].dtype:  # text in one of them, integers in the other
        before, after = (t.with_columns(pl.col("value").cast(pl.String)) for t in (before, after))
    had, has = (t.filter(pl.col("id").is_not_null(), pl.col("retired").is_null()) for t in (before, after))
    rows = before.drop_nulls("id")
    new = has.join(rows, on="value", how="anti").sort("count", "value", descending=[True, False])
    revived = has.join(rows.filter(pl.col("retired").is_not_null()), on="value", how="semi")
    owners = after.drop_nulls("id").join(rows.select("id", was="value"), on="id")
    return Ids(
        new=new.height,
        examples=tuple(new.head(EXAMPLES).select("value", "count").iter_rows()),
        retired=had.join(has, on="value", how="anti").height,
        recycled=owners.filter(pl.col("value") != pl.col("was")).height,
        revived=revived.height,
        waiting=after["id"].null_count(),
    )


def _line(f: FeatureDiff) -> list[str]:
    counts = [f.ids.new, f.ids.retired, f.ids.recycled, f.ids.revived, f.ids.waiting] if f.ids else [None] * 5
    return [f.feature, f.kind, _said(f), *("" if n is None else f"{n:,}" for n in (*f.rows, *counts))]


def _said(f: FeatureDiff) -> str:
    if f.change == "settings":
        return "; ".join(f"{name} {_short(was)} -> {_short(now)}" for name, (was, now) in f.settings.items())
    was, now = f.scale
    if f.change == "refitted" and was and now:
        return f"mean {was.mean:.4g} -> {now.mean:.4g}, std {was.std:.4g} -> {now.std:.4g}"
    return f.change


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:17]}..."
