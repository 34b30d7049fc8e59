"""Fit on some partitions, transform any other: a recipe of transforms, and what they learned.

FeaturePipeline.count(frame) -> Counts                 what one partition adds; machines may count partitions apart
FeaturePipeline.settle(counts) -> FittedPipeline       merged exactly, in any order; `fit` counts and settles in one go
FittedPipeline.transform(frame) -> LazyFrame           row-wise, same rows, same order
FittedPipeline.extend(counts) -> FittedPipeline        a new day: ids are added; given ids and all scales stay
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import TypeAdapter

from base.config import Config
from base.errors import ArtefactError, ConfigError, DataError
from base.storage import Staging, dump_json
from features.columns import Kind, check_kind, kind_of, require, roots_of, sql
from features.schema import Dense, Schema, Sparse
from features.transforms import UNKNOWN, AnyTransform, Today

RECIPE = "recipe.json"
COUNTS = "counts.json"
MAX_ANCESTORS = 1000
"""Versions a line of daily extensions remembers: almost three years of them."""

_TRANSFORMS: TypeAdapter[tuple[AnyTransform, ...]] = TypeAdapter(tuple[AnyTransform, ...])


@dataclass(frozen=True)
class FeaturePipeline:
    """Which columns to derive and which transforms to apply. Fitting returns another type."""

    transforms: tuple[AnyTransform, ...]
    derive: Mapping[str, str] = field(default_factory=dict[str, str])
    """Derived raw columns, each a SQL expression over one row."""

    def __post_init__(self) -> None:
        names = [t.output for t in self.transforms]
        for name in names:
            if "@" in name:
                raise ConfigError(f"features: {name!r} holds '@', which tables cannot: give it another name")
            if names.count(name) > 1:
                raise ConfigError(
                    f"features: two of them are called {name!r}; leave one out, or give it a name of its own: "
                    'name = "…"'
                )
        if not names:
            raise ConfigError("features: there are none; give at least one [[features]] table")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Raw columns that must be there, sorted."""
        used = {c for t in self.transforms for c in t.sources}
        roots = roots_of(self.derive)
        return tuple(sorted({r for c in used for r in roots.get(c, {c})}))

    def derived(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """`frame` with the derived columns that a feature reads."""
        used = {c for t in self.transforms for c in t.sources}
        return frame.with_columns(
            sql(e, where=f"derive.{name}").alias(name) for name, e in self.derive.items() if name in used
        )

    def fit(self, partitions: pl.LazyFrame | Iterable[pl.LazyFrame], *, day: date | None = None) -> "FittedPipeline":
        """Learn from the raw rows of one frame or many; neither order nor grouping of rows matters.

        `day` is the last day among them, for features that will be extended day by day.
        Raises DataError on no rows at all, a missing column, or one of a kind its transform cannot read.
        """
        frames = [partitions] if isinstance(partitions, pl.LazyFrame) else partitions
        return self.settle((self.count(frame) for frame in frames), day)

    def count(self, frame: pl.LazyFrame) -> "Counts":
        """What the raw rows of one partition, which may be none, add to a fit. Raises DataError as `fit` does."""
        kinds = self.kinds(frame)
        derived = self.derived(frame)
        plans = [t.count(derived) for t in self.transforms if t.learns]
        size, *found = pl.collect_all([derived.select(pl.len()), *plans], engine="streaming")
        tables = iter(found)
        counts = (t.merge([next(tables)]) if t.learns else pl.DataFrame() for t in self.transforms)
        return Counts(self, tuple(counts), kinds, size.item())

    def settle(self, counts: "Counts | Iterable[Counts]", day: date | None = None) -> "FittedPipeline":
        """The fit on the partitions that were counted; the same, bit for bit, as `fit` on their rows.

        Raises DataError as `fit` does, ArtefactError if some were counted by another recipe.
        """
        merged = _merged(self, counts)
        if merged is None or merged.rows == 0:
            raise DataError("cannot fit features on no rows: check the training interval and the path")
        today = Today(day)
        learned = (t.settle(c, None, today) for t, c in zip(self.transforms, merged.tables, strict=True))
        return FittedPipeline(self, tuple(learned), merged.kinds, day)

    def kinds(self, frame: pl.LazyFrame) -> dict[str, Kind]:
        """What the used columns of `frame` hold. Raises DataError if one is missing or cannot be read."""
        present = frame.collect_schema()
        require(self.inputs, present.names(), "features")
        schema = self.derived(frame.select(self.inputs)).collect_schema()
        kinds: dict[str, Kind] = {}
        for transform in self.transforms:
            for column in transform.sources:
                kinds[column] = kind_of(schema[column])
                check_kind(column, kinds[column], transform.accepts, f"feature {transform.output!r} ({transform.kind})")
        return kinds


@dataclass(frozen=True)
class Counts:
    """What some partitions add to a fit: integer statistics, which merge exactly. Its version is the hash of all."""

    recipe: FeaturePipeline
    tables: tuple[pl.DataFrame, ...]
    """One per transform; empty where nothing is learned."""
    kinds: Mapping[str, Kind]
    """What each transformed column holds."""
    rows: int

    @cached_property
    def version(self) -> str:
        """Content hash, independent of file formats."""
        return _hash(self._describe(), self.tables)

    def merge(self, others: Iterable["Counts"]) -> "Counts":
        """The counts of all partitions together, whatever their order or grouping.

        Raises ArtefactError if some were counted by another recipe, DataError if a column changes its kind.
        """
        parts = [self, *others]
        kinds: dict[str, Kind] = {}
        for part in parts:
            _check_recipe(self.recipe, part)
            for column, kind in part.kinds.items():
                if kinds.get(column, "missing") == "missing":
                    kinds[column] = kind
                elif kind not in (kinds[column], "missing"):
                    raise DataError(f"column {column!r} holds {kinds[column]} in one partition and {kind} in another")
        tables = (t.merge([p.tables[i] for p in parts]) for i, t in enumerate(self.recipe.transforms))
        return Counts(self.recipe, tuple(tables), kinds, sum(p.rows for p in parts))

    def save(self, staging: Staging, prefix: str = "") -> None:
        """Write `counts.json` and one Parquet table per learning transform into a folder being published."""
        (staging / f"{prefix}{COUNTS}").write_bytes(dump_json({**self._describe(), "version": self.version}))
        _save_tables(self.tables, staging, f"{prefix}counts")

    @classmethod
    def load(cls, folder: Path) -> "Counts":
        """Read what `save` wrote. Raises ArtefactError if a part is missing or not what was counted."""
        remedy = "count the partition again"
        stored, recipe, tables = _load(folder, COUNTS, "counts", remedy=remedy)
        try:
            counts = cls(recipe, tables, stored["kinds"], stored["rows"])
            expected = stored["version"]
        except KeyError as error:
            raise ArtefactError(f"{folder / COUNTS}: cannot be read ({error}); {remedy}") from None
        if counts.version != expected:
            raise ArtefactError(f"{folder}: hashes to {counts.version}, {COUNTS} says {expected}; {remedy}")
        return counts

    def _describe(self) -> dict[str, Any]:
        return {**_described(self.recipe), "kinds": dict(self.kinds), "rows": self.rows}


Partition: TypeAlias = pl.LazyFrame | Counts
"""Raw, or counted already."""


class Ancestor(Config):
    """A version that a pipeline was extended from."""

    version: str
    day: date | None
    """The last day that it had taken in."""


@dataclass(frozen=True)
class FittedPipeline:
    """A recipe and what it learned. Its version is the hash of both, whatever it was extended from."""

    recipe: FeaturePipeline
    learned: tuple[pl.DataFrame, ...]
    """One table per transform; empty where nothing is learned."""
    kinds: Mapping[str, Kind]
    """What each transformed column held when it was fitted."""
    day: date | None = None
    """The last day taken in; None where days play no part."""
    ancestors: tuple[Ancestor, ...] = ()
    """The versions it was extended from, oldest first."""
    crossing: date | None = None
    """Ancestors of earlier days knew other owners of rows that were given away since; None if none was."""

    @cached_property
    def version(self) -> str:
        """Content hash, independent of file formats."""
        return _hash(self._describe(), self.learned)

    @property
    def lineage(self) -> tuple[str, ...]:
        """The ancestors whose ids all mean the same here, oldest first."""
        return tuple(a.version for a in self.ancestors if self._is_this_side(a))

    @property
    def accepts(self) -> tuple[str, ...]:
        """Versions whose examples mean the same ids: this one and its lineage."""
        return (*self.lineage, self.version)

    def explain(self, version: str) -> str:
        """Why examples made by `version`, which is not in `accepts`, cannot be read: a clause for an error."""
        for ancestor in self.ancestors:
            if ancestor.version == version and not self._is_this_side(ancestor):
                of = f" of {ancestor.day}" if ancestor.day else ""
                return (
                    f"made by features {version}{of}, and rows retired by {self.crossing} have since "
                    f"been given to new ids: this window crosses a recycle; let it begin at {self.crossing} or later"
                )
        return f"made by features {version}, the fitted ones are {self.version}"

    @property
    def dense(self) -> tuple[Dense, ...]:
        return tuple(f for f in self._fields() if isinstance(f, Dense))

    @property
    def sparse(self) -> tuple[Sparse, ...]:
        return tuple(f for f in self._fields() if isinstance(f, Sparse))

    def only(self, names: Sequence[str]) -> "FittedPipeline":
        """The part of it that makes the features `names`, from the raw columns that they read."""
        kept = [i for i, t in enumerate(self.recipe.transforms) if t.output in names]
        recipe = FeaturePipeline(tuple(self.recipe.transforms[i] for i in kept), self.recipe.derive)
        learned = tuple(self.learned[i] for i in kept)
        return FittedPipeline(recipe, learned, self.kinds, self.day)

    def counts_of(self, name: str) -> NDArray[np.int64]:
        """By id of the vocabulary feature `name`, how often it was counted; row 0: all values without an id."""
        (place,) = (i for i, t in enumerate(self.recipe.transforms) if t.output == name)
        table = self.learned[place]
        ids = table["id"].fill_null(UNKNOWN).to_numpy()
        rows = 1 + table["id"].count()
        return np.bincount(ids, weights=table["count"].to_numpy(), minlength=rows).astype(np.int64)

    def schema(
        self,
        keys: Sequence[str],
        labels: Sequence[str],
        *,
        funnel: Sequence[str] = (),
        negative_rate: float = 1.0,
        item: str | None = None,
    ) -> Schema:
        """The contract of examples made by this pipeline."""
        return Schema(
            keys=tuple(keys),
            dense=self.dense,
            sparse=self.sparse,
            labels=tuple(labels),
            funnel=tuple(funnel),
            negative_rate=negative_rate,
            item=item,
        )

    def transform(self, frame: pl.LazyFrame, keep: Sequence[str] = ()) -> pl.LazyFrame:
        """The columns in `keep` and one column per feature; the same rows in the same order.

        Raises DataError if a column is missing or holds another kind of value than when fitted.
        """
        self._check_kinds(self.recipe.kinds(frame))
        frame = self.recipe.derived(frame)
        require(keep, frame.collect_schema().names(), "transform")
        # Temporary names: an output may be called like a raw column that a later transform still reads.
        outputs = {t.output: f"__feature_{i}" for i, t in enumerate(self.recipe.transforms)}
        if clash := outputs.keys() & set(keep):
            raise ConfigError(f"features: {sorted(clash)[0]!r} is also a column to keep; give the feature another name")
        for transform, learned in zip(self.recipe.transforms, self.learned, strict=True):
            frame = transform.model_copy(update={"name": outputs[transform.output]}).apply(frame, learned)
        return frame.select(*keep, *(pl.col(temporary).alias(name) for name, temporary in outputs.items()))

    def extend(
        self,
        partitions: Partition | Iterable[Partition],
        *,
        day: date | None = None,
        recycle_after_days: int | None = None,
    ) -> "FittedPipeline":
        """Take in new partitions, counted or raw, the last of which is `day`: counts grow and new ids are added.

        Given ids stay, and so do numeric scales. Ids unseen for long are retired where a vocabulary says so; their
        rows are given to new ids after `recycle_after_days`, which is how far back from `day` examples are still
        trained on: those of `day - recycle_after_days` and later, each encoded by features that had taken in its day.
        So a row is free once its tombstone is at least that old: all of them have it. Versions from before the
        tombstone leave the lineage, which holds even where the caller's window is longer: training refuses it.
        None recycles nothing.

        Raises DataError on no rows, a day that is not after the last one, or columns of another kind; ArtefactError
        if some were counted by another recipe.
        """
        self._check_day(day, recycle_after_days)
        merged = _merged(self.recipe, partitions)
        if merged is None or merged.rows == 0:
            raise DataError(f"cannot extend features by {day or 'partitions'} without rows: check the log of that day")
        self._check_kinds(merged.kinds)
        today = Today(day, recycle_after_days)
        learned = tuple(
            t.settle(new, old, today) if t.learns else old
            for t, old, new in zip(self.recipe.transforms, self.learned, merged.tables, strict=True)
        )
        pairs = zip(self.recipe.transforms, self.learned, learned, strict=True)
        tombstones = (self.crossing, *(t.crossing(old, new) for t, old, new in pairs))
        known: dict[str, Kind] = {c: k if k != "missing" else merged.kinds[c] for c, k in self.kinds.items()}
        return FittedPipeline(
            self.recipe,
            learned,
            known,
            day,
            (*self.ancestors, Ancestor(version=self.version, day=self.day))[-MAX_ANCESTORS:],
            max((t for t in tombstones if t is not None), default=None),
        )

    def save(self, staging: Staging, prefix: str = "") -> None:
        """Write `recipe.json` and one Parquet table per learning transform into a folder being published."""
        stored = {
            **self._describe(),
            "version": self.version,
            "ancestors": [a.model_dump(mode="json") for a in self.ancestors],
            "crossing": self.crossing,
        }
        (staging / f"{prefix}{RECIPE}").write_bytes(dump_json(stored))
        _save_tables(self.learned, staging, f"{prefix}learned")

    @classmethod
    def load(cls, folder: Path) -> "FittedPipeline":
        """Read what `save` wrote. Raises ArtefactError if a table is missing or the content is not what was fitted."""
        remedy = "fit the features again"
        stored, recipe, learned = _load(folder, RECIPE, "learned", remedy=remedy)
        try:
            ancestors = tuple(Ancestor.model_validate(a) for a in stored["ancestors"])
            day, crossing = _date(stored["day"]), _date(stored["crossing"])
            fitted = cls(recipe, learned, stored["kinds"], day, ancestors, crossing)
            expected = stored["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{folder / RECIPE}: cannot be read ({error}); {remedy}") from None
        if fitted.version != expected:
            raise ArtefactError(
                f"{folder}: what was learned hashes to {fitted.version}, the recipe says {expected}; "
                "the files belong to different fits: restore or fit again"
            )
        return fitted

    def _fields(self) -> list[Dense | Sparse]:
        return [t.field(table) for t, table in zip(self.recipe.transforms, self.learned, strict=True)]

    def _describe(self) -> dict[str, Any]:
        return {**_described(self.recipe), "kinds": dict(self.kinds), "day": self.day}

    def _is_this_side(self, ancestor: Ancestor) -> bool:
        """Whether all ids of an ancestor mean the same here."""
        return self.crossing is None or (ancestor.day is not None and ancestor.day >= self.crossing)

    def _check_day(self, day: date | None, recycle_after_days: int | None) -> None:
        if recycle_after_days is not None and recycle_after_days < 1:
            raise ConfigError(f"recycle_after_days = {recycle_after_days}: give the days of the training window, >= 1")
        if self.day is not None and day is None:
            raise DataError(f"these features have taken in the days to {self.day}: say which day extends them")
        if self.day is not None and day is not None and day <= self.day:
            raise DataError(
                f"{day} cannot extend features that have taken in the days to {self.day}: its rows would count "
                f"twice; extend by a later day, or start from the features of the day before {day}"
            )

    def _check_kinds(self, kinds: Mapping[str, Kind]) -> None:
        numeric = {"integer", "float", "boolean"}
        for column, kind in kinds.items():
            fitted = self.kinds[column]
            readers = [t for t in self.recipe.transforms if column in t.sources]
            as_number = all("float" in t.accepts for t in readers) and {kind, fitted} <= numeric
            if kind != fitted and "missing" not in (kind, fitted) and not as_number:
                raise DataError(
                    f"column {column!r} holds {kind}, but held {fitted} when features were fitted: "
                    "convert it back, or fit the features again"
                )


def changed_rows(before: FittedPipeline, after: FittedPipeline) -> dict[str, NDArray[np.int64]]:
    """Per feature with a table, the rows of `after` to initialise when weights move there from `before`, ascending.

    They are new, or recycled: of another id than in `before`. Every other row means exactly what it meant.
    Raises DataError if `after` was not extended from `before`.
    """
    if before.version not in (after.version, *(a.version for a in after.ancestors)):
        raise DataError(
            f"features {after.version} were not extended from {before.version}, so the weights' rows mean other "
            "ids; start from weights of the same line, or train from nothing"
        )
    pairs = zip(after.recipe.transforms, before.learned, after.learned, strict=True)
    return {t.output: t.changed(b, a).to_numpy() for t, b, a in pairs if isinstance(t.field(a), Sparse)}


def _merged(recipe: FeaturePipeline, partitions: Partition | Iterable[Partition]) -> Counts | None:
    """The counts of partitions, counted or raw, one at a time in memory; None if there are none."""
    merged: Counts | None = None
    for part in [partitions] if isinstance(partitions, pl.LazyFrame | Counts) else partitions:
        counts = part if isinstance(part, Counts) else recipe.count(part)
        _check_recipe(recipe, counts)
        merged = counts if merged is None else merged.merge([counts])
    return merged


def _check_recipe(recipe: FeaturePipeline, counts: Counts) -> None:
    if counts.recipe != recipe:
        raise ArtefactError(
            f"counts {counts.version}: made by another recipe than these features ([[features]] or [derive] "
            "changed since); count the partition again"
        )


def _described(recipe: FeaturePipeline) -> dict[str, Any]:
    transforms = _TRANSFORMS.dump_python(recipe.transforms, mode="json")
    return {"transforms": transforms, "derive": dict(recipe.derive)}


def _date(text: str | None) -> date | None:
    return None if text is None else date.fromisoformat(text)


def _hash(described: Mapping[str, Any], tables: Iterable[pl.DataFrame]) -> str:
    digest = hashlib.sha256(dump_json(described))
    for table in tables:
        _update(digest, table)
    return digest.hexdigest()[:16]


def _update(digest: Any, table: pl.DataFrame) -> None:
    for series in table.iter_columns():
        digest.update(f"{series.name}:{series.dtype}:{series.len()}".encode())
        digest.update(series.is_null().to_numpy().tobytes())
        if series.dtype == pl.String:
            digest.update(series.str.len_bytes().fill_null(0).to_numpy().tobytes())
            digest.update((series.str.join("").item() or "").encode())
        elif series.dtype == pl.Int128:
            digest.update(repr(series.to_list()).encode())
        else:
            digest.update(series.to_physical().fill_null(0).to_numpy().tobytes())


def _save_tables(tables: Iterable[pl.DataFrame], staging: Staging, folder: str) -> None:
    for i, table in enumerate(tables):
        if table.width:
            table.write_parquet(staging / f"{folder}/{i:03}.parquet")


def _load(
    folder: Path, name: str, tables: str, *, remedy: str
) -> tuple[dict[str, Any], FeaturePipeline, tuple[pl.DataFrame, ...]]:
    """The JSON that describes a stored pipeline or its counts, with the recipe and the tables."""
    path = folder / name
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        transforms = _TRANSFORMS.validate_python(stored["transforms"])
        recipe = FeaturePipeline(transforms, stored["derive"])
    except FileNotFoundError:
        raise ArtefactError(f"{path}: missing; {remedy}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); {remedy}") from None
    found = (
        _table(folder / f"{tables}/{i:03}.parquet", remedy) if t.learns else pl.DataFrame()
        for i, t in enumerate(transforms)
    )
    return stored, recipe, tuple(found)


def _table(path: Path, remedy: str) -> pl.DataFrame:
    if not path.is_file():
        raise ArtefactError(f"{path}: missing; {remedy}")
    try:
        return pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); {remedy}") from None
