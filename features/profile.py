"""Profiles: what a set of examples looks like, as a few dozen counts per feature, so that two sets can be compared.

choose_bins(examples, fitted) -> bins      once, on training rows
count(examples, bins, labels) -> Profile   one streaming pass; profiles of parts merge into that of the whole
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Annotated, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, model_validator

from base.config import Config
from features.pipeline import FittedPipeline
from features.schema import carried
from features.transforms import UNKNOWN

HEADS, HEAD_SHARE = 24, 0.01
"""At most so many ids get a bin of their own, each with at least this share of the known ids."""
RANGES = 8
"""Ranges into which the other ids fall, of equal mass. A vocabulary's ids go by frequency, so ranges differ in it."""
NUMBER_BINS, SCORE_BINS = 10, 20

_CHUNK = 2**17
_DIGITS = 4
_EMPTY = 1  # where an IdBins counts empty bags; row 0 is the unknown ids


class IdBins(Config):
    """Of ids, counts are: unknown ones, empty bags, each of `heads`, each range of the others."""

    kind: Literal["ids"] = "ids"
    heads: tuple[int, ...]
    ends: tuple[int, ...]
    """Ascending: the last id of each range but the last, which is open."""

    @property
    def size(self) -> int:
        return 2 + len(self.heads) + len(self.ends) + 1

    @cached_property
    def _bin_of_id(self) -> NDArray[np.uint8]:
        """By id; its last entry holds for all ids above."""
        ids = np.arange(max((*self.heads, *self.ends, 0)) + 2)
        bins = (2 + len(self.heads) + np.searchsorted(self.ends, ids)).astype(np.uint8)
        bins[list(self.heads)] = 2 + np.arange(len(self.heads))
        bins[UNKNOWN] = 0
        return bins

    @staticmethod
    def unknown(counts: Sequence[int]) -> tuple[int, int]:
        """Of the ids counted, how many are unknown, and how many there are."""
        return counts[UNKNOWN], sum(counts) - counts[_EMPTY]

    @staticmethod
    def known(counts: Sequence[int]) -> Sequence[int]:
        """Counts without the unknown ids, of which there are more the longer ago the features were fitted."""
        return counts[UNKNOWN + 1 :]

    def count(self, values: pl.Series) -> NDArray[np.int64]:
        """Counts of a column of ids or of bags of ids."""
        empty = 0
        if isinstance(values.dtype, pl.List):
            empty = int((values.list.len() == 0).sum())
            values = values.explode(empty_as_null=False, keep_nulls=False)
        bins = self._bin_of_id[np.minimum(values.to_numpy(), self._bin_of_id.size - 1)]
        counts = np.bincount(bins, minlength=self.size).astype(np.int64)
        counts[_EMPTY] = empty
        return counts


class NumberBins(Config):
    """Of numbers, counts are: those up to the first edge, then between edges, then above the last."""

    kind: Literal["numbers"] = "numbers"
    edges: tuple[float, ...]
    """Ascending; each is the inclusive upper end of its bin."""

    @property
    def size(self) -> int:
        return len(self.edges) + 1

    def count(self, values: pl.Series) -> NDArray[np.int64]:
        """Counts of a column of numbers."""
        bins = np.searchsorted(self.edges, values.to_numpy(), side="left")
        return np.bincount(bins, minlength=self.size).astype(np.int64)


Bins = Annotated[IdBins | NumberBins, Field(discriminator="kind")]
Counts = tuple[NonNegativeInt, ...]


class Profile(Config):
    """What a set of rows looks like: integers only, so that parts add up exactly and in any order."""

    rows: NonNegativeInt
    days: NonNegativeInt = 0
    """Of the log; 0 where it is not split by day."""
    positives: dict[str, NonNegativeInt] = {}
    """By label."""
    known: dict[str, NonNegativeInt] = {}
    """By label: rows of which it is known."""
    missing: dict[str, NonNegativeInt] = {}
    """By raw column: rows without a value; columns that were not counted are not here."""
    features: dict[str, Counts] = {}
    """By feature, in the bins of the `Reference`."""
    scores: dict[str, Counts] = {}
    """By output of a model, likewise."""


class Reference(Config):
    """What a model has seen: the rows it was trained on, and held-out ones, which its features were not fitted on."""

    bins: dict[str, Bins]
    """By feature."""
    score_bins: dict[str, NumberBins] = {}
    """By output."""
    training: Profile
    held_out: Profile

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        for profile in (self.training, self.held_out):
            for bins, counts in ((self.bins, profile.features), (self.score_bins, profile.scores)):
                for name, found in counts.items():
                    if name not in bins or bins[name].size != len(found):
                        raise ValueError(f"{name!r} has {len(found)} counts, which are not those of its bins")
        return self


def merge(parts: Iterable[Profile]) -> Profile:
    """The profile of all their rows. Missing values stay counted in columns that every part has counted."""
    return reduce(_merge, parts)


def count(
    examples: pl.LazyFrame,
    bins: Mapping[str, IdBins | NumberBins],
    labels: Sequence[str] = (),
    *,
    days: int = 0,
    missing: Mapping[str, int] | None = None,
) -> Profile:
    """Count transformed rows, with the `@label` columns of `labels`, in one streaming pass of bounded memory."""
    rows = 0
    totals = {name: np.zeros(b.size, np.int64) for name, b in bins.items()}
    positives, known = dict.fromkeys(labels, 0), dict.fromkeys(labels, 0)
    columns = [*bins, *map(carried, labels)]
    for chunk in examples.select(columns).collect_batches(chunk_size=_CHUNK, engine="streaming"):
        rows += chunk.height
        for name, b in bins.items():
            totals[name] += b.count(chunk[name])
        for label in labels:
            positives[label] += int(chunk[carried(label)].sum())
            known[label] += chunk[carried(label)].count()
    features = {name: tuple(counts.tolist()) for name, counts in totals.items()}
    return Profile(
        rows=rows, days=days, positives=positives, known=known, missing=dict(missing or {}), features=features
    )


def choose_bins(examples: pl.LazyFrame, fitted: FittedPipeline) -> dict[str, IdBins | NumberBins]:
    """Bins for each feature of transformed rows; independent of the rows' order."""
    sparse = {f.name: _id_bins(examples, f.name, multi=f.multi) for f in fitted.sparse}
    return sparse | {f.name: number_bins(examples, f.name, NUMBER_BINS) for f in fitted.dense}


def number_bins(frame: pl.LazyFrame, column: str, bins: int) -> NumberBins:
    """Bins of about equal mass, off by at most 0.05 % of an edge's value; a value with the mass of one has its own."""
    grid = pl.col(column).cast(pl.Float64).round_sig_figs(_DIGITS) + 0.0  # + 0.0: no negative zero
    counts = _counts(frame.select(value=grid).drop_nulls()).sort("value")
    total = pl.col("count").sum()
    place = pl.col("count").cum_sum() * bins // total
    fills = (place > place.shift(fill_value=0)) & (place < bins)
    table = counts.with_columns(fills=fills, heavy=pl.col("count") * bins >= total)
    reach = pl.col("value").abs() * 0.5 * 10.0 ** (1 - _DIGITS) + 1e-9  # half a step of the grid
    upper = table.filter(pl.col("fills") | pl.col("heavy")).select(pl.col("value") + reach)
    lower = table.filter("heavy").select(pl.col("value") - reach)
    return NumberBins(edges=tuple(pl.concat([lower, upper])["value"].unique().sort().to_list()))


def missing_in(frame: pl.LazyFrame, columns: Sequence[str]) -> dict[str, pl.Expr]:
    """By raw column, how many rows have no value, which for numbers includes NaN and infinities."""
    schema = frame.select(columns).collect_schema()
    present = {c: pl.col(c).is_finite() if schema[c].is_float() else pl.col(c).is_not_null() for c in columns}
    return {c: (~is_there.fill_null(False)).sum() for c, is_there in present.items()}


def _id_bins(examples: pl.LazyFrame, column: str, *, multi: bool) -> IdBins:
    ids = examples.select(value=column)
    if multi:
        ids = ids.explode("value", empty_as_null=False, keep_nulls=False)
    counts = _counts(ids.filter(pl.col("value") != UNKNOWN))
    frequent = counts.filter(pl.col("count") >= HEAD_SHARE * pl.col("count").sum())
    heads = frequent.sort("count", "value", descending=[True, False]).head(HEADS)
    others = counts.join(heads, on="value", how="anti").sort("value")
    place = pl.col("count").cum_sum() * RANGES // pl.col("count").sum()
    ends = others.filter((place > place.shift(fill_value=0)) & (place < RANGES))
    return IdBins(heads=tuple(heads["value"].to_list()), ends=tuple(ends["value"].to_list()))


def _counts(values: pl.LazyFrame) -> pl.DataFrame:
    return values.group_by("value").agg(count=pl.len().cast(pl.Int64)).collect(engine="streaming")


def _merge(a: Profile, b: Profile) -> Profile:
    return Profile(
        rows=a.rows + b.rows,
        days=a.days + b.days,
        positives=_sums(a.positives, b.positives),
        known=_sums(a.known, b.known),
        missing={c: n + b.missing[c] for c, n in a.missing.items() if c in b.missing},
        features=_sums_of_each(a.features, b.features),
        scores=_sums_of_each(a.scores, b.scores),
    )


def _sums(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    _same(a, b)
    return {name: n + b[name] for name, n in a.items()}


def _sums_of_each(a: Mapping[str, Counts], b: Mapping[str, Counts]) -> dict[str, Counts]:
    _same(a, b)
    return {name: tuple(x + y for x, y in zip(counts, b[name], strict=True)) for name, counts in a.items()}


def _same(a: Mapping[str, object], b: Mapping[str, object]) -> None:
    if a.keys() != b.keys():
        raise ValueError(f"profiles of different columns do not merge: {sorted(a)} and {sorted(b)}")
