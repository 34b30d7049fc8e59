"""Profiles: every row and id is counted once, in its bin, and the parts of a table add up to the whole."""

import random
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from features.pipeline import FeaturePipeline, FittedPipeline
from features.profile import (
    HEADS,
    RANGES,
    IdBins,
    NumberBins,
    Profile,
    Reference,
    choose_bins,
    count,
    merge,
    missing_in,
    number_bins,
)
from features.transforms import AnyTransform, Boundaries, Cross, Hash, Log, Quantiles, Standardise, Vocabulary

EVERY: tuple[AnyTransform, ...] = (
    Vocabulary(column="word", min_count=2),
    Vocabulary(column="tags", multi=True),
    Hash(column="word", buckets=7, name="hashed"),
    Cross(columns=("word", "whole"), buckets=9),
    Quantiles(column="number", buckets=4, name="quantiles"),
    Boundaries(column="number", boundaries=(0.0, 1.0), name="boundaries"),
    Standardise(column="number"),
    Log(column="whole", standardise=False),
)


def table(rows: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    words = [None if w == 0 else f"w{w}" for w in rng.zipf(1.4, rows) % 300]
    tags = [None if n == 0 else [f"t{t}" for t in rng.integers(0, 9, n - 1)] for n in rng.integers(0, 5, rows)]
    return pl.DataFrame(
        {
            "word": pl.Series(words, dtype=pl.String),
            "tags": pl.Series(tags, dtype=pl.List(pl.String)),
            "number": pl.Series(np.where(rng.random(rows) < 0.1, np.nan, rng.normal(size=rows))),
            "whole": pl.Series(rng.integers(0, 50, rows)),
            "@click": pl.Series([None if x < 0.1 else int(x > 0.8) for x in rng.random(rows)], dtype=pl.Int8),
        }
    )


@pytest.fixture(scope="module")
def fitted() -> FittedPipeline:
    return FeaturePipeline(EVERY).fit(table(3000).lazy())


def profile_of(fitted: FittedPipeline, rows: pl.DataFrame, bins: dict[str, IdBins | NumberBins]) -> Profile:
    return count(fitted.transform(rows.lazy(), keep=["@click"]), bins, ["click"], days=1)


@pytest.fixture(scope="module")
def bins(fitted: FittedPipeline) -> dict[str, IdBins | NumberBins]:
    return choose_bins(fitted.transform(table(3000).lazy()), fitted)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=4), seed=st.integers(0, 99))
def test_parts_in_any_order_are_the_whole(
    cuts: list[int], seed: int, fitted: FittedPipeline, bins: dict[str, IdBins | NumberBins]
) -> None:
    rows = table(400, seed)
    ends = [0, *sorted(cuts), 400]
    parts = [profile_of(fitted, rows[a:b], bins) for a, b in pairwise(ends)]
    random.Random(seed).shuffle(parts)
    whole = profile_of(fitted, rows.sample(fraction=1, shuffle=True, seed=seed), bins)
    assert merge(parts) == whole.model_copy(update={"days": len(parts)})


def test_every_value_is_counted_once_for_every_transform(
    fitted: FittedPipeline, bins: dict[str, IdBins | NumberBins]
) -> None:
    rows = table(2000, seed=1)
    examples = fitted.transform(rows.lazy()).collect()
    found = profile_of(fitted, rows, bins)
    assert found.features.keys() == {t.output for t in EVERY} == bins.keys()
    for name, counts in found.features.items():
        column = examples[name]
        if column.dtype == pl.List:
            sizes = column.list.len()
            assert counts[1] == (sizes == 0).sum()
            assert sum(counts) == sizes.sum() + counts[1]
            column = column.explode(empty_as_null=False, keep_nulls=False)
        else:
            assert sum(counts) == 2000
        if column.dtype == pl.Int32:
            assert counts[0] == (column == 0).sum()
    labels = rows["@click"]
    assert (found.rows, found.positives, found.known) == (2000, {"click": labels.sum()}, {"click": labels.count()})


def test_frequent_ids_stand_alone_and_the_others_share_ranges_of_equal_mass() -> None:
    ids = [1] * 500 + [2] * 300 + [0] * 200 + list(range(3, 803))  # 1600 known ids, half of them single
    found = choose_bins(pl.LazyFrame({"word": pl.Series(ids, dtype=pl.Int32)}), _of_one_vocabulary())["word"]
    assert isinstance(found, IdBins)
    assert found.heads == (1, 2)
    counts = found.count(pl.Series([*ids, 2_000_000], dtype=pl.Int32))
    assert counts.tolist() == [200, 0, 500, 300, *[100] * 7, 101]
    assert len(found.ends) == RANGES - 1
    many = pl.Series(np.repeat(np.arange(1, 51), 10), dtype=pl.Int32)  # 50 ids of 2 % each
    assert len(choose_bins(pl.LazyFrame({"word": many}), _of_one_vocabulary())["word"].heads) == HEADS  # pyright: ignore


def _of_one_vocabulary() -> FittedPipeline:
    return FeaturePipeline((Vocabulary(column="word"),)).fit(pl.LazyFrame({"word": ["a"]}))


def test_numbers_fall_into_bins_of_equal_mass_and_a_heavy_value_has_its_own() -> None:
    values = pl.Series(np.random.default_rng(0).lognormal(size=5000)).cast(pl.Float32)
    counts = number_bins(values.to_frame("x").lazy(), "x", 10).count(values)
    assert counts.size == 10
    assert (np.abs(counts - 500) < 25).all()
    spiked = pl.concat([values, pl.Series([0.0] * 1000, dtype=pl.Float32), pl.Series([1 / 3] * 2000, dtype=pl.Float32)])
    bins = number_bins(spiked.to_frame("x").lazy(), "x", 10)
    counts = bins.count(spiked)
    assert 1000 in counts
    assert counts.sum() == 8000
    assert ((counts >= 2000) & (counts < 2010)).sum() == 1


def test_a_constant_differs_from_any_other_constant() -> None:
    bins = number_bins(pl.LazyFrame({"x": [0.5] * 100}), "x", 10)
    for value, where in ((0.5, 1), (0.49, 0), (0.51, 2), (-3.0, 0), (1e9, 2)):
        assert bins.count(pl.Series([value])).tolist() == [int(i == where) for i in range(3)]


def test_missing_counts_nulls_and_what_is_no_number() -> None:
    frame = pl.LazyFrame(
        {"x": [1.0, None, float("nan"), float("inf")], "n": [1, None, 3, 4], "t": [["a"], None, [], [None]]}
    )
    assert frame.select(**missing_in(frame, ["x", "n", "t"])).collect().row(0) == (3, 1, 1)


def test_profiles_of_other_columns_do_not_merge() -> None:
    with pytest.raises(ValueError, match="of different columns"):
        merge([Profile(rows=1, features={"a": (1, 0)}), Profile(rows=1, features={"b": (1, 0)})])
    once = merge([Profile(rows=1, missing={"a": 1, "b": 0}), Profile(rows=1, missing={"a": 2})])
    assert once.missing == {"a": 3}  # b was not counted everywhere


def test_a_reference_refuses_counts_that_are_not_of_its_bins() -> None:
    bins = {"x": NumberBins(edges=(0.0,))}
    good, bad = Profile(rows=1, features={"x": (1, 0)}), Profile(rows=1, features={"x": (1, 0, 0)})
    stored = Reference(bins=bins, training=good, held_out=good)
    assert Reference.model_validate(stored.model_dump(mode="json")) == stored
    with pytest.raises(ValidationError, match="'x' has 3 counts"):
        Reference(bins=bins, training=good, held_out=bad)
