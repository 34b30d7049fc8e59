"""Fit on some partitions, transform any other: a recipe of transforms, and what they learned.

FeaturePipeline.fit(partitions) -> FittedPipeline      count each partition, merge the counts exactly, settle them
FittedPipeline.transform(frame) -> LazyFrame           row-wise, same rows, same order
FittedPipeline.extend(partitions) -> FittedPipeline    new ids are appended; old ids and all scales stay
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import TypeAdapter

from base.errors import ArtefactError, ConfigError, DataError
from base.storage import Staging, dump_json
from features.columns import Kind, check_kind, kind_of, require, roots_of, sql
from features.schema import Dense, Schema, Sparse
from features.transforms import AnyTransform

RECIPE = "recipe.json"
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
            if "." in name:
                raise ConfigError(f"features: {name!r} holds a dot, which tables cannot: give it another name")
            if names.count(name) > 1:
                raise ConfigError(f"features: two of them are called {name!r}; give one a name of its own")
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

    def fit(self, partitions: pl.LazyFrame | Iterable[pl.LazyFrame]) -> "FittedPipeline":
        """Learn from the raw rows of one frame or many; neither order nor grouping of rows matters.

        Raises DataError on no rows at all, a missing column, or one of a kind its transform cannot read.
        """
        counts, kinds = self.count(partitions)
        learned = tuple(t.settle(c, None) for t, c in zip(self.transforms, counts, strict=True))
        return FittedPipeline(self, learned, kinds)

    def count(self, partitions: pl.LazyFrame | Iterable[pl.LazyFrame]) -> tuple[list[pl.DataFrame], dict[str, Kind]]:
        """Merged statistics per transform, and what each column holds. Raises DataError as `fit` does."""
        merged: list[pl.DataFrame] | None = None
        kinds: dict[str, Kind] = {}
        rows = 0
        for frame in [partitions] if isinstance(partitions, pl.LazyFrame) else partitions:
            for column, kind in self.kinds(frame).items():
                if kinds.get(column, "missing") == "missing":
                    kinds[column] = kind
                elif kind not in (kinds[column], "missing"):
                    raise DataError(f"column {column!r} holds {kinds[column]} in one partition and {kind} in another")
            derived = self.derived(frame)
            plans = [t.count(derived) for t in self.transforms if t.learns]
            size, *tables = pl.collect_all([derived.select(pl.len()), *plans], engine="streaming")
            rows += size.item()
            found = iter(tables)
            counts = [next(found) if t.learns else pl.DataFrame() for t in self.transforms]
            merged = (
                [t.merge([c]) for t, c in zip(self.transforms, counts, strict=True)]
                if merged is None
                else [t.merge([m, c]) for t, m, c in zip(self.transforms, merged, counts, strict=True)]
            )
        if merged is None or rows == 0:
            raise DataError("cannot fit features on no rows: check the training interval and the path")
        return merged, kinds

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
class FittedPipeline:
    """A recipe and what it learned. Its version is the hash of both; its lineage, the versions it was extended from."""

    recipe: FeaturePipeline
    learned: tuple[pl.DataFrame, ...]
    """One table per transform; empty where nothing is learned."""
    kinds: Mapping[str, Kind]
    """What each transformed column held when it was fitted."""
    lineage: tuple[str, ...] = ()

    @cached_property
    def version(self) -> str:
        """Content hash, independent of file formats."""
        digest = hashlib.sha256(dump_json(self._describe()))
        for table in self.learned:
            _update(digest, table)
        return digest.hexdigest()[:16]

    @property
    def accepts(self) -> tuple[str, ...]:
        """Versions whose examples mean the same ids: this one and those it was extended from."""
        return (*self.lineage, self.version)

    @property
    def dense(self) -> tuple[Dense, ...]:
        return tuple(f for f in self._fields() if isinstance(f, Dense))

    @property
    def sparse(self) -> tuple[Sparse, ...]:
        return tuple(f for f in self._fields() if isinstance(f, Sparse))

    def schema(
        self, keys: Sequence[str], labels: Sequence[str], *, funnel: Sequence[str] = (), negative_rate: float = 1.0
    ) -> Schema:
        """The contract of examples made by this pipeline."""
        return Schema(
            keys=tuple(keys),
            dense=self.dense,
            sparse=self.sparse,
            labels=tuple(labels),
            funnel=tuple(funnel),
            negative_rate=negative_rate,
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

    def extend(self, partitions: pl.LazyFrame | Iterable[pl.LazyFrame]) -> "FittedPipeline":
        """Take in new days: counts grow and new ids are appended; given ids and numeric scales stay as they are."""
        counts, kinds = self.recipe.count(partitions)
        self._check_kinds(kinds)
        learned = tuple(
            t.settle(t.merge([old, new]), old) if t.learns else old
            for t, old, new in zip(self.recipe.transforms, self.learned, counts, strict=True)
        )
        known: dict[str, Kind] = {c: k if k != "missing" else kinds[c] for c, k in self.kinds.items()}
        return FittedPipeline(self.recipe, learned, known, self.accepts)

    def save(self, staging: Staging, prefix: str = "") -> None:
        """Write `recipe.json` and one Parquet table per learning transform into a folder being published."""
        (staging / f"{prefix}{RECIPE}").write_bytes(
            dump_json({**self._describe(), "version": self.version, "lineage": self.lineage})
        )
        for i, table in enumerate(self.learned):
            if table.width:
                table.write_parquet(staging / f"{prefix}learned/{i:03}.parquet")

    @classmethod
    def load(cls, folder: Path) -> "FittedPipeline":
        """Read what `save` wrote. Raises ArtefactError if a table is missing or the content is not what was fitted."""
        path = folder / RECIPE
        try:
            stored: dict[str, Any] = json.loads(path.read_bytes())
            transforms = _TRANSFORMS.validate_python(stored["transforms"])
            recipe = FeaturePipeline(transforms, stored["derive"])
            learned = tuple(_table(folder, i) if t.learns else pl.DataFrame() for i, t in enumerate(transforms))
        except FileNotFoundError as error:
            raise ArtefactError(f"{error.filename}: missing; fit the features again") from None
        except (ValueError, KeyError) as error:
            raise ArtefactError(f"{path}: cannot be read ({error}); fit the features again") from None
        fitted = cls(recipe, learned, stored["kinds"], tuple(stored["lineage"]))
        if fitted.version != stored["version"]:
            raise ArtefactError(
                f"{folder}: what was learned hashes to {fitted.version}, the recipe says {stored['version']}; "
                "the files belong to different fits: restore or fit again"
            )
        return fitted

    def _fields(self) -> list[Dense | Sparse]:
        return [t.field(table) for t, table in zip(self.recipe.transforms, self.learned, strict=True)]

    def _describe(self) -> dict[str, Any]:
        return {
            "transforms": _TRANSFORMS.dump_python(self.recipe.transforms, mode="json"),
            "derive": dict(self.recipe.derive),
            "kinds": dict(self.kinds),
        }

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
            digest.update(series.fill_null(0).to_numpy().tobytes())


def _table(folder: Path, number: int) -> pl.DataFrame:
    path = folder / f"learned/{number:03}.parquet"
    if not path.is_file():
        raise ArtefactError(f"{path}: missing; fit the features again")
    try:
        return pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); fit the features again") from None
