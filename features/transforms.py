"""Column encodings: each is a frozen configuration that learns integer counts and applies them row by row.

`count` summarises a partition, `merge` adds summaries exactly and in any order, `settle` turns them into what `apply`
uses. Every transform declares one result for a missing value; NaN and infinities count as missing.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Annotated, ClassVar, Literal, Self

import polars as pl
from polars_hash import NonCryptographicHashingNameSpace
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from base.config import Config
from base.errors import DataError
from features.columns import BAGS, IDS, NUMBERS, Kind
from features.schema import Dense, Sparse

UNKNOWN = 0
"""The row of every table for a value without an id of its own: unknown, rare or missing."""


@dataclass(frozen=True)
class Today:
    """When counts are settled."""

    day: date | None = None
    """The last day counted; None where days play no part."""
    recycle_after_days: int | None = None
    """The age from which a tombstone's row may be given to another id; None: never."""


class Transform(Config, ABC):
    """One output column from one or more raw ones. Row-wise once learned: it never looks at a neighbour."""

    name: str = ""
    """Name of the output column; by default that of the raw one."""

    learns: ClassVar[bool] = True
    """Whether counts are needed; otherwise the configuration says everything."""

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """The raw columns it reads."""

    @property
    @abstractmethod
    def accepts(self) -> tuple[Kind, ...]:
        """The kinds of raw column it can read."""

    @abstractmethod
    def count(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """Integer statistics of one partition."""

    @abstractmethod
    def merge(self, parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
        """The statistics of the union of partitions; independent of their order."""

    @abstractmethod
    def settle(self, counts: pl.DataFrame, previous: pl.DataFrame | None, today: Today) -> pl.DataFrame:
        """What `apply` needs, from merged counts; with `previous`, what that becomes by the counts of new days."""

    def changed(self, before: pl.DataFrame, after: pl.DataFrame) -> pl.Series:
        """Rows of the table after extending (Int64, ascending) that are new, or another id's than before."""
        return pl.Series(dtype=pl.Int64)

    def crossing(self, before: pl.DataFrame, after: pl.DataFrame) -> date | None:
        """The day of the latest tombstone whose row one extension has given away; None if it gave none."""
        return None

    @abstractmethod
    def apply(self, frame: pl.LazyFrame, learned: pl.DataFrame) -> pl.LazyFrame:
        """`frame` with the column `output` added; rows keep their number and order."""

    @abstractmethod
    def field(self, learned: pl.DataFrame) -> Dense | Sparse:
        """What a model sees of the output column."""

    @property
    def output(self) -> str:
        """Name of the output column."""
        return self.name or "_x_".join(self.sources)


# --- numbers ---------------------------------------------------------------------------------------------------------


def number(column: str) -> pl.Expr:
    """The column as Float64, with NaN and infinities as null."""
    value = pl.col(column).cast(pl.Float64)
    return pl.when(value.is_finite()).then(value)


class _OfNumber(Transform, ABC):
    """Reads one column of numbers."""

    column: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def accepts(self) -> tuple[Kind, ...]:
        return NUMBERS


class _Scaled(_OfNumber, ABC):
    """(f(x) - mean) / std with both from exact fixed-point sums; missing values become 0, the mean."""

    resolution: PositiveFloat = 1e-6
    """Step of the fixed-point grid on which sums are taken; |f(x)| must stay below 2^45 steps."""

    @abstractmethod
    def value(self) -> pl.Expr:
        """f(x), null where x is missing."""

    def count(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        limit = 2.0**62
        steps = (self.value() / self.resolution).round().clip(-limit, limit).cast(pl.Int64)
        wide = pl.col("steps").cast(pl.Int128)
        return frame.select(steps=steps).select(
            rows=pl.col("steps").count().cast(pl.Int64),
            sum=wide.sum(),
            sum_squares=(wide * wide).sum(),
            largest=pl.col("steps").abs().max().fill_null(0),
        )

    def merge(self, parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return pl.concat(parts).select(
            pl.col("rows").sum(), pl.col("sum").sum(), pl.col("sum_squares").sum(), pl.col("largest").max()
        )

    def settle(self, counts: pl.DataFrame, previous: pl.DataFrame | None, today: Today) -> pl.DataFrame:
        if previous is not None:
            return previous  # the scale of yesterday's examples stays
        largest = counts["largest"].item() * self.resolution
        if counts["largest"].item() >= 2**45:
            raise DataError(
                f"column {self.column!r} reaches {largest:g}, too large for exact sums in steps of "
                f'{self.resolution:g}: use kind = "log", or set resolution to {largest * 2.0**-44:.0e}'
            )
        _, std = self.moments(counts)
        if 0 < std < 100 * self.resolution:
            raise DataError(
                f"column {self.column!r} varies by {std:g}, too little for steps of {self.resolution:g}: "
                f"set resolution to {std * 1e-6:.0e}"
            )
        return counts

    def moments(self, learned: pl.DataFrame) -> tuple[float, float]:
        """Mean and standard deviation of f(x), each rounded once from exact integers."""
        n, s, ss = (int(learned[name].item()) for name in ("rows", "sum", "sum_squares"))
        if n == 0:
            return 0.0, 0.0
        return s / n * self.resolution, ((n * ss - s * s) / (n * n)) ** 0.5 * self.resolution

    def apply(self, frame: pl.LazyFrame, learned: pl.DataFrame) -> pl.LazyFrame:
        mean, std = self.moments(learned)
        scaled = (self.value() - mean) / (std or 1.0)
        return frame.with_columns(scaled.fill_null(0.0).cast(pl.Float32).alias(self.output))

    def field(self, learned: pl.DataFrame) -> Dense:
        return Dense(name=self.output)


class Standardise(_Scaled):
    """(x - mean) / std; missing becomes 0, the mean."""

    kind: Literal["standardise"] = "standardise"

    def value(self) -> pl.Expr:
        return number(self.column)


class Log(_Scaled):
    """log²(x) where x > 2, else x (AutoInt, section 5.1.1, after the Criteo winners); then standardised.

    Missing becomes 0. Without `standardise`, attention on the raw values saturates and collapses.
    """

    kind: Literal["log"] = "log"
    standardise: bool = True

    def value(self) -> pl.Expr:
        x = number(self.column)
        return pl.when(x > 2).then(x.log() ** 2).otherwise(x)

    def settle(self, counts: pl.DataFrame, previous: pl.DataFrame | None, today: Today) -> pl.DataFrame:
        if self.standardise:
            return super().settle(counts, previous, today)
        return counts if previous is None else previous

    def moments(self, learned: pl.DataFrame) -> tuple[float, float]:
        return super().moments(learned) if self.standardise else (0.0, 1.0)


# --- ids -------------------------------------------------------------------------------------------------------------


def xxhash64(value: pl.Expr, seed: int) -> pl.Expr:
    """xxHash64 of a value's text: stable over versions and machines, unlike Polars' own hash. Null stays null."""
    return NonCryptographicHashingNameSpace(value.cast(pl.String)).xxhash64(seed=seed)


class _Ids(Transform, ABC):
    """Ids from one column; list columns, and text with a separator, give bags of ids.

    A missing single value becomes row 0; a missing or empty list becomes an empty bag, and nulls in it are dropped.
    """

    column: str
    multi: bool = False
    """Whether the column holds lists."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Splits text into a list; implies `multi`."""
    max_length: PositiveInt = 100
    """A longer bag keeps its first `max_length` values."""

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def accepts(self) -> tuple[Kind, ...]:
        if self.separator is not None:
            return ("text", "missing")
        return BAGS if self.multi else IDS

    @property
    def is_bag(self) -> bool:
        """Whether an example has a list of ids."""
        return self.multi or self.separator is not None

    def values(self, frame: pl.LazyFrame) -> pl.Expr:
        """The raw column of `frame`; as a list without nulls and empty text where it is a bag."""
        column = pl.col(self.column)
        if not self.is_bag:
            return column
        if self.separator is None:
            dtype = frame.collect_schema()[self.column]
            if isinstance(dtype, pl.Array):
                column = column.arr.to_list()
            elif dtype == pl.Null:
                column = column.cast(pl.List(pl.String))
        if self.separator is not None:
            parts = column.cast(pl.String).str.split(self.separator)
            column = parts.list.eval(pl.element().str.strip_chars().replace("", None))
        return column.list.drop_nulls().list.head(self.max_length)

    @abstractmethod
    def ids(self, value: pl.Expr, learned: pl.DataFrame) -> pl.Expr:
        """Int32 ids of raw values; null where the value is null."""

    def apply(self, frame: pl.LazyFrame, learned: pl.DataFrame) -> pl.LazyFrame:
        if self.is_bag:
            bags = self.values(frame).list.eval(self.ids(pl.element(), learned)).cast(pl.List(pl.Int32))
            ids = bags.fill_null(pl.lit([], dtype=pl.List(pl.Int32)))
        else:
            ids = self.ids(self.values(frame), learned).fill_null(UNKNOWN)
        return frame.with_columns(ids.alias(self.output))

    @abstractmethod
    def rows(self, learned: pl.DataFrame) -> int:
        """Rows of the embedding table."""

    def field(self, learned: pl.DataFrame) -> Sparse:
        return Sparse(name=self.output, rows=self.rows(learned), multi=self.is_bag)


class Vocabulary(_Ids):
    """Ids 1..n for values seen at least `min_count` times, most frequent first; row 0 for all others.

    An id, once given, never moves, and counts of rarer values are kept until they suffice. Without
    `retire_after_days` it only grows. With it, a day that extends it first retires the ids unseen for longer: a
    tombstone is encoded as row 0 and keeps its row, which the value gets back when it is seen again, until the row
    is given to another. What was learned is one row per value: `value`, `count`, `id`, the day it was last `seen` (in
    a fit, the last one), and the day on which it was `retired`.
    """

    kind: Literal["vocabulary"] = "vocabulary"
    min_count: PositiveInt = 1
    max_size: PositiveInt | None = None
    """Most ids to give, unknown and retired ones not counted."""
    retire_after_days: PositiveInt | None = None
    """An id unseen for more days is retired; a value without an id is forgotten, and counted from 0 if it returns."""

    def count(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        values = frame.select(value=self.values(frame))
        if self.is_bag:
            values = values.explode("value", empty_as_null=False, keep_nulls=False)
        stored = pl.Int64 if values.collect_schema()["value"].is_integer() else pl.String
        # An integer that does not fit is counted as null, which `merge` refuses: here nothing is computed yet.
        values = values.drop_nulls().select(pl.col("value").cast(stored, strict=False))
        return values.group_by("value").agg(count=pl.len().cast(pl.Int64))

    def merge(self, parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
        filled = [p.select("value", "count") for p in parts if p.height] or [parts[0].select("value", "count")]
        if any(p["value"].has_nulls() for p in filled):
            raise DataError(
                f"column {self.column!r} holds integers of 2^63 or more (or below -2^63), which ids cannot be: convert "
                'them to text in the log, or in [derive] with CAST(... AS TEXT); or use kind = "hash"'
            )
        merged = pl.concat(filled).lazy().group_by("value").agg(pl.col("count").sum())
        return merged.sort("value").collect(engine="streaming")

    def settle(self, counts: pl.DataFrame, previous: pl.DataFrame | None, today: Today) -> pl.DataFrame:
        table = _aged(counts, previous, today.day)
        table = self._admitted(self._retired(table, today), today)
        return table.select("value", "count", "id", "seen", "retired")

    def _late(self, day: date | None) -> pl.Expr:
        """Whether a value has been unseen for too long by `day`."""
        if day is None or self.retire_after_days is None:
            return pl.lit(False)
        return pl.lit(day) - pl.col("seen") > timedelta(days=self.retire_after_days)

    def _retired(self, table: pl.DataFrame, today: Today) -> pl.DataFrame:
        """Late ids become tombstones, late values without an id are forgotten, tombstones seen again are revived."""
        late, has_id = self._late(today.day), pl.col("id").is_not_null()
        tombstone = pl.when(late & has_id).then(pl.coalesce("retired", today.day)).otherwise("retired")
        table = table.filter(has_id | ~late).with_columns(retired=tombstone)
        back = table.with_row_index("at").filter(pl.col("seen") > pl.col("retired"), ~late)
        if self.max_size is not None:
            back = back.sort("count", "value", descending=[True, False]).head(self._room(table))
        return table.with_columns(retired=table["retired"].clone().scatter(back["at"], None))

    def _admitted(self, table: pl.DataFrame, today: Today) -> pl.DataFrame:
        """Frequent values get ids: first the rows of tombstones that are old enough, lowest first, then new rows."""
        table = table.with_row_index("at")
        fresh = table.filter(pl.col("id").is_null(), pl.col("count") >= self.min_count)
        fresh = fresh.sort("count", "value", descending=[True, False])
        if self.max_size is not None:
            fresh = fresh.head(self._room(table))
        free = table.clear()
        if today.day is not None and today.recycle_after_days is not None:
            oldest = today.day - timedelta(days=today.recycle_after_days)
            free = table.filter(pl.col("retired") <= oldest).sort("id").head(fresh.height)
        last = table["id"].count()
        appended = pl.int_range(last + 1, last + 1 + fresh.height - free.height, dtype=pl.Int32, eager=True)
        given = table["id"].clone().scatter(fresh["at"], pl.concat([free["id"], appended.alias("id")]))
        kept = pl.repeat(True, table.height, eager=True).scatter(free["at"], False)
        return table.with_columns(given).filter(kept)

    def _room(self, table: pl.DataFrame) -> int:
        return max((self.max_size or 0) - _known(table).height, 0)

    def changed(self, before: pl.DataFrame, after: pl.DataFrame) -> pl.Series:
        owners, was = (t.filter(pl.col("id").is_not_null()).sort("id")["value"] for t in (after, before))  # of rows 1..
        appended = pl.int_range(was.len() + 1, owners.len() + 1, eager=True)
        if was.is_empty():  # it has no type yet
            return appended
        recycled = (owners.head(was.len()) != was).arg_true().cast(pl.Int64) + 1
        return pl.concat([recycled, appended.alias(recycled.name)])

    def crossing(self, before: pl.DataFrame, after: pl.DataFrame) -> date | None:
        tombstones = before.filter(pl.col("retired").is_not_null()).select("id", "retired", owner="value")
        if tombstones.is_empty():
            return None
        rows = after.select("id", "value").join(tombstones, on="id")
        found = rows.filter(pl.col("value") != pl.col("owner"))["retired"].max()
        assert found is None or isinstance(found, date)
        return found

    def ids(self, value: pl.Expr, learned: pl.DataFrame) -> pl.Expr:
        known = _known(learned)
        found = value.cast(known["value"].dtype, strict=False).replace_strict(
            known["value"], known["id"], default=UNKNOWN, return_dtype=pl.Int32
        )
        return pl.when(value.is_not_null()).then(found)

    def apply(self, frame: pl.LazyFrame, learned: pl.DataFrame) -> pl.LazyFrame:
        if self.is_bag:
            return super().apply(frame, learned)
        # A join: the engine streams it, where replacing values keeps some 20 bytes of every row until the last.
        known = _known(learned)
        key = f"__key_{self.output}"
        keyed = frame.with_columns(self.values(frame).cast(known["value"].dtype, strict=False).alias(key))
        table = known.lazy().select(pl.col("value").alias(key), pl.col("id").alias(f"__id_{self.output}"))
        joined = keyed.join(table, on=key, how="left", maintain_order="left")
        ids = pl.col(f"__id_{self.output}").fill_null(UNKNOWN).alias(self.output)
        return joined.with_columns(ids).drop(key, f"__id_{self.output}")

    def rows(self, learned: pl.DataFrame) -> int:
        return 1 + learned["id"].count()


def _known(learned: pl.DataFrame) -> pl.DataFrame:
    """The values that are encoded: with an id, and not retired."""
    return learned.filter(pl.col("id").is_not_null() & pl.col("retired").is_null())


def _aged(counts: pl.DataFrame, previous: pl.DataFrame | None, day: date | None) -> pl.DataFrame:
    """What was known of each value with `counts` added to it, those without an entry at the end, by value."""
    today = pl.lit(day, pl.Date)
    novel = counts.with_columns(id=pl.lit(None, pl.Int32), seen=today, retired=pl.lit(None, pl.Date))
    if previous is None or not previous.height:  # a column of nulls has no type yet
        return novel
    if not counts.height:
        novel = previous.clear()
        counts = novel.select("value", "count")
    known = previous.join(counts.rename({"count": "gained"}), on="value", how="left", maintain_order="left")
    known = known.with_columns(
        count=pl.col("count") + pl.col("gained").fill_null(0),
        # Without a day until now, the clock of what is known starts today.
        seen=pl.when(pl.col("gained").is_not_null()).then(today).otherwise(pl.coalesce("seen", today)),
    )
    novel = novel.join(previous.select("value"), on="value", how="anti", maintain_order="left")
    return pl.concat([known.drop("gained"), novel.select(previous.columns)])


class _Stateless(Transform, ABC):
    """A transform whose configuration says everything."""

    learns: ClassVar[bool] = False

    def count(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        return pl.LazyFrame()

    def merge(self, parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return pl.DataFrame()

    def settle(self, counts: pl.DataFrame, previous: pl.DataFrame | None, today: Today) -> pl.DataFrame:
        return counts


class Hash(_Ids, _Stateless):
    """Ids 1..buckets by xxHash64 of the value's text (Weinberger et al. 2009): learns nothing, may collide."""

    kind: Literal["hash"] = "hash"
    buckets: Annotated[int, Field(ge=1, lt=2**31 - 1)]
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0

    def ids(self, value: pl.Expr, learned: pl.DataFrame) -> pl.Expr:
        return (1 + xxhash64(value, self.seed) % self.buckets).cast(pl.Int32)

    def rows(self, learned: pl.DataFrame) -> int:
        return 1 + self.buckets


class Cross(_Stateless):
    """Ids 1..buckets by xxHash64 of two or more columns together; row 0 if any of them is missing."""

    kind: Literal["cross"] = "cross"
    columns: Annotated[tuple[str, ...], Field(min_length=2)]
    buckets: Annotated[int, Field(ge=1, lt=2**31 - 1)]
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0

    @property
    def sources(self) -> tuple[str, ...]:
        return self.columns

    @property
    def accepts(self) -> tuple[Kind, ...]:
        return IDS

    def apply(self, frame: pl.LazyFrame, learned: pl.DataFrame) -> pl.LazyFrame:
        # The separator keeps ("ab", "c") and ("a", "bc") apart; a null in any column makes the whole null.
        joint = pl.concat_str([pl.col(c).cast(pl.String) for c in self.columns], separator="\x1f")
        ids = (1 + xxhash64(joint, self.seed) % self.buckets).cast(pl.Int32)
        return frame.with_columns(ids.fill_null(UNKNOWN).alias(self.output))

    def field(self, learned: pl.DataFrame) -> Sparse:
        return Sparse(name=self.output, rows=1 + self.buckets)


# --- numbers to ids --------------------------------------------------------------------------------------------------


def bucket(column: str, edges: Sequence[float]) -> pl.Expr:
    """1 + the number of edges below x, so bucket k holds (edge[k-2], edge[k-1]]; row 0 where x is missing."""
    x = number(column)
    above = pl.sum_horizontal((x > edge).cast(pl.Int32) for edge in edges) if edges else pl.lit(0, pl.Int32)
    return pl.when(x.is_not_null()).then(1 + above).otherwise(UNKNOWN).cast(pl.Int32)


class Boundaries(_OfNumber, _Stateless):
    """Ids 1..n+1 by n given boundaries, each the inclusive upper end of its bucket; missing becomes row 0."""

    kind: Literal["boundaries"] = "boundaries"
    boundaries: Annotated[tuple[float, ...], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"boundaries of {self.column!r} must increase: {list(self.boundaries)}")
        return self

    def apply(self, frame: pl.LazyFrame, learned: pl.DataFrame) -> pl.LazyFrame:
        return frame.with_columns(bucket(self.column, self.boundaries).alias(self.output))

    def field(self, learned: pl.DataFrame) -> Sparse:
        return Sparse(name=self.output, rows=2 + len(self.boundaries))


class Quantiles(_OfNumber):
    """Ids 1..buckets of about equal mass; missing becomes row 0.

    Values are counted on a grid of four significant digits, so an edge is off by at most 0.05 % of its value.
    """

    kind: Literal["quantiles"] = "quantiles"
    buckets: Annotated[int, Field(ge=2, le=1000)] = 20

    def count(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        grid = number(self.column).round_sig_figs(4) + 0.0  # + 0.0: no negative zero
        return frame.select(value=grid).drop_nulls().group_by("value").agg(count=pl.len().cast(pl.Int64))

    def merge(self, parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return pl.concat(parts).group_by("value").agg(pl.col("count").sum()).sort("value")

    def settle(self, counts: pl.DataFrame, previous: pl.DataFrame | None, today: Today) -> pl.DataFrame:
        return counts if previous is None else previous

    def edges(self, learned: pl.DataFrame) -> list[float]:
        """Upper ends of all buckets but the last; fewer than asked where one value outweighs a bucket."""
        below = learned.select("value", share=pl.col("count").cum_sum() * self.buckets // pl.col("count").sum())
        firsts = below.filter(pl.col("share") >= 1).group_by("share").agg(pl.col("value").min())
        return firsts.filter(pl.col("share") < self.buckets)["value"].unique().sort().to_list()

    def apply(self, frame: pl.LazyFrame, learned: pl.DataFrame) -> pl.LazyFrame:
        return frame.with_columns(bucket(self.column, self.edges(learned)).alias(self.output))

    def field(self, learned: pl.DataFrame) -> Sparse:
        return Sparse(name=self.output, rows=2 + len(self.edges(learned)))


AnyTransform = Annotated[
    Vocabulary | Hash | Cross | Boundaries | Quantiles | Standardise | Log, Field(discriminator="kind")
]
"""Add a transform: write its class, add its name here; the conformance tests find it through this union."""
