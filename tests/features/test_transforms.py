"""Transforms: a conformance suite that every kind of the union inherits, then each kind against its formula."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import ValidationError

from base.errors import ArtefactError, DataError
from base.storage import publish, resolve
from features.pipeline import Counts, FeaturePipeline, FittedPipeline
from features.schema import Dense, Sparse
from features.transforms import (
    AnyTransform,
    Boundaries,
    Cross,
    Hash,
    Log,
    Quantiles,
    Standardise,
    Transform,
    Vocabulary,
)
from tests.marks import drawn

BIG = 2**53  # from here on, a float cannot tell neighbouring integers apart


@dataclass(frozen=True)
class Example:
    """A transform with rows it can be fitted on, rows without a value, and rows it has not seen."""

    name: str
    transform: Transform
    rows: pl.DataFrame
    """Pairwise different rows with a value; those further down are drawn less often."""
    missing: pl.DataFrame
    """Rows without a value."""
    missing_result: Any
    """What each of them must become."""
    unseen: pl.DataFrame
    unseen_result: Any = None
    """What each unseen row must become, if that is one thing."""


def texts(*values: str | None) -> pl.DataFrame:
    return pl.DataFrame({"x": values}, schema={"x": pl.String})


def integers(*values: int | None) -> pl.DataFrame:
    return pl.DataFrame({"x": values}, schema={"x": pl.Int64})


def floats(*values: float | None) -> pl.DataFrame:
    return pl.DataFrame({"x": values}, schema={"x": pl.Float64})


def bags(dtype: type[pl.DataType], *values: list[Any] | None) -> pl.DataFrame:
    return pl.DataFrame({"x": values}, schema={"x": pl.List(dtype)})


def pairs(*values: tuple[str | None, int | None]) -> pl.DataFrame:
    return pl.DataFrame(values, schema={"x": pl.String, "y": pl.Int64}, orient="row")


WORDS = ("a", "b", "ab", "", "na\u00efve", "nai\u0308ve", "日本", "🦊", " a", "A", "c", "d")  # one i composed, one not
NUMBERS = floats(0.1, -3.25, 1e6, 0.1 + 0.2, 7.0, 2.0, 2.0000001, -0.0, 123456.789, 1e-3, 31.4159, 1e7 / 3)
NO_NUMBERS = floats(None, math.nan, math.inf, -math.inf)
NEW_NUMBERS = floats(1e300, -1e300, 5e-324, 42.0, -42.0)
IDS = integers(7, 0, -1, BIG, BIG + 1, 2**63 - 1, -(2**63), 10, 11, 12)
TAGS = bags(pl.String, ["a"], ["a", "b"], ["b", "a", "b"], ["c", None], ["日本"], ["d", "a", "c"])
NO_TAGS = bags(pl.String, None, [], [None], [None, None])
PIECES = texts("a|b", "a", "b|c|a", "x y|z", " a | d ", "a||b", "日本|a")

EXAMPLES = [
    Example("vocabulary-text", Vocabulary(column="x"), texts(*WORDS), texts(None), 0, texts("zz", "aa"), 0),
    Example("vocabulary-integer", Vocabulary(column="x"), IDS, integers(None), 0, integers(BIG + 2, 99), 0),
    Example(
        "vocabulary-limits", Vocabulary(column="x", min_count=3, max_size=4), IDS, integers(None), 0, integers(5), 0
    ),
    Example(
        "vocabulary-list", Vocabulary(column="x", multi=True), TAGS, NO_TAGS, [], bags(pl.String, ["zz"], ["yy"]), [0]
    ),
    Example(
        "vocabulary-list-integer",
        Vocabulary(column="x", multi=True, min_count=2),
        bags(pl.Int64, [1], [2, 1], [BIG, BIG + 1], [3, 2, 1], [-4]),
        bags(pl.Int64, None, [], [None]),
        [],
        bags(pl.Int64, [BIG + 2], [99]),
        [0],
    ),
    Example(
        "vocabulary-separated",
        Vocabulary(column="x", separator="|"),
        PIECES,
        texts(None, "", "|", "  ", "||", " | "),
        [],
        texts("zz", " yy "),
        [0],
    ),
    Example("hash", Hash(column="x", buckets=50), texts(*WORDS), texts(None), 0, texts("zz", "yy")),
    Example("hash-integer", Hash(column="x", buckets=50, seed=3), IDS, integers(None), 0, integers(BIG + 2)),
    Example(
        "hash-list", Hash(column="x", buckets=50, multi=True), TAGS, NO_TAGS, [], bags(pl.String, ["zz", "y"], ["q"])
    ),
    Example(
        "hash-separated",
        Hash(column="x", buckets=50, separator="|", max_length=2),
        PIECES,
        texts(None, "", "|"),
        [],
        texts("zz|y"),
    ),
    Example(
        "cross",
        Cross(columns=("x", "y"), buckets=97),
        pairs(("a", 1), ("b", 1), ("", 12), ("a", BIG), ("a", BIG + 1), ("日本", 0), ("a1", 2), ("a", 12)),
        pairs((None, 1), ("a", None), (None, None)),
        0,
        pairs(("zz", 3), ("q", -1)),
    ),
    Example(
        "boundaries", Boundaries(column="x", boundaries=(-1.0, 0.0, 7.0, 1e5)), NUMBERS, NO_NUMBERS, 0, NEW_NUMBERS
    ),
    Example("quantiles", Quantiles(column="x", buckets=4), NUMBERS, NO_NUMBERS, 0, NEW_NUMBERS),
    Example("quantiles-integer", Quantiles(column="x", buckets=3), IDS, integers(None), 0, integers(5)),
    Example("standardise", Standardise(column="x"), NUMBERS, NO_NUMBERS, 0.0, NEW_NUMBERS),
    Example("log", Log(column="x"), NUMBERS, NO_NUMBERS, 0.0, NEW_NUMBERS),
    Example("log-raw", Log(column="x", standardise=False), NUMBERS, NO_NUMBERS, 0.0, floats(1e30, -1e30, 5e-324)),
]

LEARNING = [e for e in EXAMPLES if type(e.transform).learns]
EVERY = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
EVERY_LEARNING = pytest.mark.parametrize("example", LEARNING, ids=lambda e: e.name)
few = drawn(12)


def training(example: Example, size: int = 60, seed: int = 0) -> pl.DataFrame:
    """Rows drawn from the example's, the first ones more often, one in ten without a value; each at least once."""
    known, rng = example.rows.height, np.random.default_rng(seed)
    drawn = np.minimum(rng.geometric(0.25, size - known) - 1, known - 1)
    without = rng.integers(0, example.missing.height, size // 10) + known
    order = rng.permutation(np.concatenate([np.arange(known), drawn[size // 10 :], without]))
    return pl.concat([example.rows, example.missing])[order]


def everything(example: Example) -> pl.DataFrame:
    """All rows of an example, known, missing and unseen in turns."""
    parts = pl.concat([example.rows, example.missing, example.unseen])
    return parts[np.random.default_rng(1).permutation(parts.height)]


def pipeline(transform: Transform) -> FeaturePipeline:
    return FeaturePipeline((transform,))  # pyright: ignore[reportArgumentType]


def fit(transform: Transform, *frames: pl.DataFrame) -> FittedPipeline:
    return pipeline(transform).fit([f.lazy() for f in frames])


def result(fitted: FittedPipeline, frame: pl.DataFrame) -> pl.Series:
    return fitted.transform(frame.lazy()).collect().to_series()


def ids_of(column: pl.Series) -> list[int]:
    if column.dtype == pl.List(pl.Int32):
        column = column.explode(empty_as_null=False, keep_nulls=False)
    return column.to_list()


# --- conformance: what every transform promises ----------------------------------------------------------------------


def test_every_kind_of_the_union_has_an_example() -> None:
    kinds = set(get_args(get_args(AnyTransform)[0]))
    assert kinds == {type(e.transform) for e in EXAMPLES}
    assert len(kinds) >= 7


@EVERY
@few
@given(shuffler=st.randoms(use_true_random=False))
def test_fitting_does_not_depend_on_row_order(example: Example, shuffler: Any) -> None:
    frame = training(example)
    order = list(range(frame.height))
    shuffler.shuffle(order)
    fitted, again = fit(example.transform, frame), fit(example.transform, frame[order])
    assert fitted.version == again.version
    assert_frame_equal(fitted.learned[0], again.learned[0], check_exact=True)


@EVERY
@few
@given(assigned=st.lists(st.integers(0, 4), min_size=60, max_size=60), order=st.permutations(range(5)))
def test_partitions_fitted_apart_and_merged_are_the_whole(
    example: Example, assigned: list[int], order: Sequence[int]
) -> None:
    frame = training(example)
    parts = [frame.filter(pl.Series([a == part for a in assigned])) for part in order]  # some may be empty
    fitted, merged = fit(example.transform, frame), fit(example.transform, *parts)
    assert fitted.version == merged.version
    assert_frame_equal(fitted.learned[0], merged.learned[0], check_exact=True)


@EVERY
@few
@given(assigned=st.lists(st.integers(0, 4), min_size=60, max_size=60), order=st.permutations(range(5)))
def test_partitions_counted_apart_are_the_whole(example: Example, assigned: list[int], order: Sequence[int]) -> None:
    frame = training(example)
    recipe = pipeline(example.transform)
    parts = [frame.filter(pl.Series([a == part for a in assigned])).lazy() for part in order]
    a, b, c, d, e = map(recipe.count, parts)
    together = recipe.count(frame.lazy())
    assert sum(x.rows for x in (a, b, c, d, e)) == together.rows == frame.height
    day, tomorrow = datetime.date(2026, 3, 1), datetime.date(2026, 3, 2)
    expected = recipe.fit(frame.lazy(), day=day)
    for counts in ([a, b, c, d, e], [e, d.merge([c, a]), b], [c.merge([a.merge([e])]), b.merge([d])]):
        assert counts[0].merge(counts[1:]).version == together.version
        settled = recipe.settle(counts, day)
        assert (settled.version, settled.kinds) == (expected.version, expected.kinds)
        assert_frame_equal(settled.learned[0], expected.learned[0], check_exact=True)
        extended = settled.extend([*counts, recipe.count(example.unseen.lazy())], day=tomorrow)
        assert extended.version == expected.extend([example.unseen.lazy(), *parts], day=tomorrow).version


@EVERY
def test_counts_saved_and_loaded_are_the_same(example: Example, tmp_path: Path) -> None:
    counts = pipeline(example.transform).count(training(example).lazy())
    with publish(tmp_path / "counts", "counts") as staging:
        counts.save(staging)
    folder = resolve(tmp_path / "counts", "counts")
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".json", ".parquet"}
    loaded = Counts.load(folder)
    assert (loaded.version, loaded.recipe, loaded.kinds, loaded.rows) == (
        *(counts.version, counts.recipe, counts.kinds, counts.rows),
    )
    more = counts.merge([counts])
    assert more.version != counts.version
    assert loaded.merge([loaded]).version == more.version
    if not type(example.transform).learns:
        return
    more.tables[0].write_parquet(folder / "counts/000.parquet")
    with pytest.raises(ArtefactError, match=r"hashes to .*, counts\.json says .*; count the partition again"):
        Counts.load(folder)
    (folder / "counts/000.parquet").unlink()
    with pytest.raises(ArtefactError, match=r"000\.parquet: missing; count the partition again"):
        Counts.load(folder)


@EVERY
def test_streaming_and_in_memory_give_the_same(example: Example) -> None:
    frame = training(example, 30_000).lazy()
    if type(example.transform).learns:
        plan = example.transform.count(frame)
        counted = [plan.collect(engine=engine) for engine in ("streaming", "in-memory")]
        streamed, held = (example.transform.merge([c]) for c in counted)
        assert_frame_equal(streamed, held, check_exact=True)
    transformed = fit(example.transform, frame.collect()).transform(frame)
    assert_frame_equal(transformed.collect(engine="streaming"), transformed.collect(engine="in-memory"))


@EVERY
@few
@given(cuts=st.lists(st.integers(0, 100), max_size=4))
def test_transforming_the_whole_is_transforming_its_parts(example: Example, cuts: list[int]) -> None:
    fitted, frame = fit(example.transform, training(example)), everything(example)
    edges = sorted({0, frame.height, *(c % frame.height for c in cuts)})
    parts = [fitted.transform(frame[a:b].lazy()).collect() for a, b in pairwise(edges)]
    assert_frame_equal(pl.concat(parts), fitted.transform(frame.lazy()).collect(), check_exact=True)


@EVERY
def test_one_row_alone_gets_what_it_gets_among_others(example: Example) -> None:
    fitted, frame = fit(example.transform, training(example)), everything(example)
    alone = pl.concat([fitted.transform(frame[i : i + 1].lazy()).collect() for i in range(frame.height)])
    assert_frame_equal(alone, fitted.transform(frame.lazy()).collect(), check_exact=True)


@EVERY
def test_rows_keep_their_number_and_order(example: Example) -> None:
    frame = training(example, 20_000, seed=2).with_row_index("row")
    transformed = fit(example.transform, frame.drop("row")).transform(frame.lazy(), keep=["row"])
    for engine in ("streaming", "in-memory"):
        assert transformed.collect(engine=engine)["row"].equals(frame["row"])


@EVERY
def test_a_missing_value_has_one_result(example: Example) -> None:
    fitted = fit(example.transform, training(example))
    among = everything(example)
    for row in example.missing.iter_slices(1):
        assert result(fitted, row).to_list() == [example.missing_result]
        assert result(fitted, pl.concat([among, row]))[-1:].to_list() == [example.missing_result]


@EVERY
def test_an_unseen_value_is_a_finite_number_or_a_row_of_the_table(example: Example) -> None:
    fitted = fit(example.transform, training(example))
    found = result(fitted, example.unseen)
    assert found.null_count() == 0
    if example.unseen_result is not None:
        assert found.to_list() == [example.unseen_result] * example.unseen.height


@EVERY
def test_types_names_and_ranges(example: Example) -> None:
    transform = example.transform
    fitted, frame = fit(transform, training(example)), everything(example)
    found = result(fitted, frame)
    assert found.name == transform.output
    assert found.null_count() == 0
    match transform.field(fitted.learned[0]):
        case Dense() as field:
            assert found.dtype == pl.Float32
            assert fitted.dense == (field,)
            inside = result(fitted, frame.filter(pl.col("x").is_null() | (pl.col("x").abs() < 1e30)))
            assert inside.is_finite().all()
        case Sparse() as field:
            assert found.dtype == (pl.List(pl.Int32) if field.multi else pl.Int32)
            assert fitted.sparse == (field,)
            assert min(ids_of(found)) >= 0
            assert max(ids_of(found)) < field.rows
            assert field.rows < 200
    assert (fitted.dense or fitted.sparse)[0].name == found.name


@EVERY
def test_saved_and_loaded_it_is_the_same(example: Example, tmp_path: Path) -> None:
    fitted = fit(example.transform, training(example))
    with publish(tmp_path / "features", "features") as staging:
        fitted.save(staging)
    folder = resolve(tmp_path / "features", "features")
    loaded = FittedPipeline.load(folder)
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".json", ".parquet"}
    assert loaded.version == fitted.version
    assert (loaded.recipe, loaded.kinds, loaded.lineage) == (fitted.recipe, fitted.kinds, fitted.lineage)
    assert loaded.schema(["k"], ["y"]) == fitted.schema(["k"], ["y"])
    assert_frame_equal(loaded.learned[0], fitted.learned[0], check_exact=True)
    frame = everything(example)
    assert result(loaded, frame).equals(result(fitted, frame), null_equal=True)


@EVERY_LEARNING
def test_what_was_learned_is_part_of_the_version(example: Example) -> None:
    frame = training(example)
    fitted, more = fit(example.transform, frame), fit(example.transform, frame, example.rows[:1])
    assert fitted.version != more.version
    learned = fitted.learned[0]
    if isinstance(example.transform, Vocabulary):
        assert learned["seen"].is_null().all()
        dated = learned.with_columns(seen=pl.lit(datetime.date(2026, 3, 7)))
        assert FittedPipeline(fitted.recipe, (dated,), fitted.kinds).version != fitted.version
    for column, dtype in learned.schema.items():
        one = datetime.timedelta(days=1) if dtype == pl.Date else 1
        zero = datetime.date(1970, 1, 1) if dtype == pl.Date else 0
        changes = [pl.col(column) + (pl.lit("!") if dtype == pl.String else one), pl.lit(None, dtype).alias(column)]
        if learned[column].is_null().all():
            changes = []
        if dtype != pl.String and learned[column].null_count():
            changes.append(pl.col(column).fill_null(zero))
        assert changes, column
        for changed in map(learned.with_columns, changes):
            assert not changed.equals(learned), column
            assert FittedPipeline(fitted.recipe, (changed,), fitted.kinds).version != fitted.version, column


def test_texts_are_not_run_together_in_a_version() -> None:
    recipe = FeaturePipeline((Vocabulary(column="x"),))
    first, second = (
        FittedPipeline(recipe, (pl.DataFrame({"value": v, "count": [1, 1], "id": [1, 2]}),), {"x": "text"}).version
        for v in (["ab", "c"], ["a", "bc"])
    )
    assert first != second


@EVERY_LEARNING
def test_a_table_of_another_fit_is_refused(example: Example, tmp_path: Path) -> None:
    frame = training(example)
    more = fit(example.transform, frame, example.rows[:1])
    with publish(tmp_path / "features", "features") as staging:
        fit(example.transform, frame).save(staging)
    folder = resolve(tmp_path / "features")
    more.learned[0].write_parquet(folder / "learned/000.parquet")
    with pytest.raises(ArtefactError, match="belong to different fits"):
        FittedPipeline.load(folder)
    (folder / "learned/000.parquet").unlink()
    with pytest.raises(ArtefactError, match=r"000\.parquet: missing"):
        FittedPipeline.load(folder)


OTHER_SETTINGS: Mapping[str, Any] = {
    "name": "other",
    "resolution": 1e-4,
    "separator": "-",
    "max_length": 3,
    "min_count": 7,
    "max_size": 2,
    "retire_after_days": 5,
    "buckets": 11,
    "seed": 42,
    "boundaries": (1.0, 2.0),
    "standardise": "not",
}
COLUMN_SETTINGS = {"kind", "column", "columns", "multi"}


@EVERY
def test_every_setting_is_part_of_the_version(example: Example) -> None:
    transform = example.transform
    fitted = fit(transform, training(example))
    versions = {fitted.version}
    settings = type(transform).model_fields.keys() - COLUMN_SETTINGS
    for setting in settings:  # a new setting needs an entry in OTHER_SETTINGS
        value = OTHER_SETTINGS[setting]
        value = not getattr(transform, setting) if value == "not" else value
        other = transform.model_copy(update={setting: value})
        recipe = FeaturePipeline((other,))  # pyright: ignore[reportArgumentType]
        versions.add(FittedPipeline(recipe, fitted.learned, fitted.kinds).version)
    assert len(versions) == 1 + len(settings)


@EVERY
def test_no_rows_are_an_error(example: Example) -> None:
    for frames in ([], [example.rows.clear()], [example.rows.clear()] * 2):
        with pytest.raises(DataError, match="cannot fit features on no rows"):
            fit(example.transform, *frames)


@EVERY
def test_rows_without_any_value_can_be_fitted(example: Example) -> None:
    fitted = fit(example.transform, example.missing)
    assert result(fitted, example.missing).to_list() == [example.missing_result] * example.missing.height
    assert result(fitted, everything(example)).null_count() == 0


@EVERY
def test_a_column_of_nulls_has_no_type_and_is_missing(example: Example) -> None:
    """Readers give such a column for an empty CSV field, and pandas for an empty object column."""
    untyped = pl.DataFrame({c: pl.Series([None, None], dtype=pl.Null) for c in example.rows.columns})
    fitted = fit(example.transform, training(example))
    assert result(fitted, untyped).to_list() == [example.missing_result] * 2
    on_nulls = fit(example.transform, untyped)
    assert result(on_nulls, untyped).to_list() == [example.missing_result] * 2
    partitioned = fit(example.transform, untyped, training(example), untyped)
    assert partitioned.kinds == fitted.kinds
    for fields in ("dense", "sparse"):
        assert getattr(partitioned, fields) == getattr(fitted, fields)
    later = on_nulls.extend(training(example).lazy())
    assert later.kinds == fitted.kinds
    assert result(later, everything(example)).null_count() == 0


@EVERY_LEARNING
def test_extending_keeps_what_was_given(example: Example) -> None:
    fitted = fit(example.transform, training(example))
    seen = pl.concat([example.rows, example.missing])
    extended = fitted.extend([example.unseen.lazy(), example.unseen.lazy(), training(example, seed=9).lazy()])
    before, after = result(fitted, seen), result(extended, seen)
    if extended.dense or not isinstance(example.transform, Vocabulary):
        assert after.equals(before)  # scales stay as they are
        assert_frame_equal(extended.learned[0], fitted.learned[0], check_exact=True)
    else:
        assert all(new == old for old, new in zip(ids_of(before), ids_of(after), strict=True) if old)
    assert fitted.version in extended.accepts
    assert extended.version in extended.accepts
    further = extended.extend(example.unseen.lazy())
    assert {fitted.version, extended.version, further.version} <= set(further.accepts)
    if isinstance(example.transform, Vocabulary):
        assert extended.version not in fitted.accepts


@EVERY
def test_an_unused_kind_of_column_is_refused_by_name(example: Example) -> None:
    column = example.transform.sources[0]
    wrong = example.rows.with_columns(pl.lit(datetime.datetime(2026, 3, 1)).alias(column))
    with pytest.raises(DataError, match=f"column '{column}' holds other; feature '{example.transform.output}'"):
        fit(example.transform, wrong)


# --- vocabularies ----------------------------------------------------------------------------------------------------


VALUES = ("a", "b", "c", "d", "e")
DAYS = st.lists(st.lists(st.sampled_from(VALUES), min_size=1, max_size=12), min_size=1, max_size=5)


def admitted(days: list[list[str]], min_count: int, max_size: int | None) -> tuple[dict[str, int], Counter[str]]:
    """A vocabulary as the words say it: day by day, whoever has been seen often enough gets the next number."""
    given_ids: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for day in days:
        counts.update(day)
        waiting = sorted((-n, v) for v, n in counts.items() if n >= min_count and v not in given_ids)
        room = len(waiting) if max_size is None else max_size - len(given_ids)
        for _, value in waiting[: max(room, 0)]:
            given_ids[value] = len(given_ids) + 1
    return given_ids, counts


@drawn(60)
@given(days=DAYS, min_count=st.integers(1, 4), max_size=st.one_of(st.none(), st.integers(1, 4)))
def test_a_vocabulary_only_grows(days: list[list[str]], min_count: int, max_size: int | None) -> None:
    transform = Vocabulary(column="x", min_count=min_count, max_size=max_size)
    fitted = fit(transform, texts(*days[0]))
    for n in range(1, len(days) + 1):
        expected, counts = admitted(days[:n], min_count, max_size)
        learned = fitted.learned[0]
        assert dict(learned.select("value", "count").iter_rows()) == counts
        assert dict(learned.select("value", "id").drop_nulls().iter_rows()) == expected
        assert fitted.sparse[0].rows == 1 + len(expected)
        assert result(fitted, texts(*VALUES)).to_list() == [expected.get(v, 0) for v in VALUES]
        if max_size is not None:
            assert len(expected) <= max_size
        if n < len(days):
            fitted = fitted.extend(texts(*days[n]).lazy())


@drawn(30)
@given(days=DAYS, min_count=st.integers(1, 4))
def test_the_vocabulary_of_many_days_counts_what_each_counted(days: list[list[str]], min_count: int) -> None:
    """Partitions of one fit are one day: below-min_count values of each add up."""
    transform = Vocabulary(column="x", min_count=min_count)
    whole = fit(transform, *(texts(*day) for day in days))
    ids, counts = admitted([[v for day in days for v in day]], min_count, None)
    assert dict(whole.learned[0].select("value", "count").iter_rows()) == counts
    assert dict(whole.learned[0].select("value", "id").drop_nulls().iter_rows()) == ids


def test_frequent_values_come_first_and_ties_go_by_value() -> None:
    fitted = fit(Vocabulary(column="x"), texts("b", "c", "a", "c", "b", "c", "d"))
    assert result(fitted, texts("c", "b", "a", "d")).to_list() == [1, 2, 3, 4]
    learned = fitted.learned[0].select("value", "count", "id").sort("id")
    assert learned.rows() == [("c", 3, 1), ("b", 2, 2), ("a", 1, 3), ("d", 1, 4)]


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.name.startswith("vocabulary")], ids=lambda e: e.name)
def test_single_ids_are_looked_up_by_a_join_that_equals_replacing(example: Example) -> None:
    """The engine streams a join, whatever the size of the vocabulary; replacing would keep some bytes of every row."""
    assert isinstance(example.transform, Vocabulary)
    frame = training(example, 5_000)
    fitted = fit(example.transform, frame)
    assert ("JOIN" in fitted.transform(frame.lazy()).explain()) != example.transform.is_bag
    known = fitted.learned[0].filter(pl.col("id").is_not_null())
    for rows in (frame, everything(example), example.missing):
        found = result(fitted, rows)
        if not example.transform.is_bag:
            values = rows["x"].cast(known["value"].dtype, strict=False)
            expected = values.replace_strict(known["value"], known["id"], default=0, return_dtype=pl.Int32)
            assert found.equals(expected.fill_null(0))
            assert found.dtype == pl.Int32


def test_integers_beyond_floats_keep_ids_of_their_own() -> None:
    neighbours = integers(*(BIG + i for i in range(5)), 2**63 - 1, 2**63 - 2)
    fitted = fit(Vocabulary(column="x"), neighbours)
    assert sorted(result(fitted, neighbours).to_list()) == list(range(1, 8))
    assert result(fitted, integers(BIG + 5)).to_list() == [0]
    lists = bags(pl.Int64, [BIG, BIG + 1], [BIG + 2])
    assert sorted(ids_of(result(fit(Vocabulary(column="x", multi=True), lists), lists))) == [1, 2, 3]
    assert result(fit(Hash(column="x", buckets=10**9), neighbours), neighbours).n_unique() == 7
    crossed = neighbours.with_columns(y=pl.lit("b"))
    assert result(fit(Cross(columns=("x", "y"), buckets=10**9), crossed), crossed).n_unique() == 7


def test_texts_are_told_apart_by_their_characters_alone() -> None:
    words = texts(*WORDS)
    assert len(set(WORDS)) == words.height
    assert result(fit(Vocabulary(column="x"), words), words).n_unique() == words.height
    assert result(fit(Hash(column="x", buckets=10**9), words), words).n_unique() == words.height
    fitted = fit(Vocabulary(column="x", separator="·"), texts("日本·🦊", "🦊"))
    assert result(fitted, texts("🦊·日本·naïve")).to_list() == [[1, 2, 0]]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([True, False, True], pl.Boolean),
        ([datetime.date(2026, 3, 1), datetime.date(2026, 3, 2), datetime.date(2026, 3, 1)], pl.Date),
        (["a", "b", "a"], pl.Categorical),
        (["a", "b", "a"], pl.Enum(["b", "a"])),
        ([3, 200, 3], pl.UInt8),
    ],
)
def test_other_kinds_of_ids(values: list[Any], dtype: Any) -> None:
    frame = pl.DataFrame({"x": pl.Series([*values, None], dtype=dtype)})
    assert result(fit(Vocabulary(column="x"), frame), frame).to_list() == [1, 2, 1, 0]
    hashed = result(fit(Hash(column="x", buckets=10**9), frame), frame).to_list()
    text = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    assert hashed == [*(1 + xxhash.xxh64(t.encode()).intdigest() % 10**9 for t in text), 0]


def test_fixed_size_arrays_are_lists() -> None:
    arrays = pl.DataFrame({"x": pl.Series([[1, 2], [2, 3], None], dtype=pl.Array(pl.Int64, 2))})
    fitted = fit(Vocabulary(column="x", multi=True), arrays)
    assert result(fitted, arrays).to_list() == [[2, 1], [1, 3], []]


def test_a_long_bag_keeps_its_first_values() -> None:
    frame = bags(pl.String, [None, "a", "b", "c", "d"], ["d"])
    fitted = fit(Vocabulary(column="x", multi=True, max_length=2), frame)
    assert dict(fitted.learned[0].select("value", "count").iter_rows()) == {"a": 1, "b": 1, "d": 1}
    assert result(fitted, frame).to_list() == [[1, 2], [3]]


def test_a_value_repeated_in_a_bag_counts_and_stays() -> None:
    frame = bags(pl.String, ["a", "a", "b"])
    fitted = fit(Vocabulary(column="x", multi=True), frame)
    assert fitted.learned[0].sort("id")["count"].to_list() == [2, 1]
    assert result(fitted, frame).to_list() == [[1, 1, 2]]


# --- hashes ----------------------------------------------------------------------------------------------------------

XXHASH64 = {  # (text, seed): as published for the empty text and "a", the others as first computed
    ("", 0): 0xEF46DB3751D8E999,
    ("a", 0): 0xD24EC4F1A98C6E5B,
    ("user_1", 0): 0x5B4942301A29D482,
    ("user_1", 7): 0xA5B0E80CB2D6486B,
    ("日本", 0): 0x80C2E40B8486AFAB,
    ("9007199254740993", 0): 0xEE079AC2C40E8F42,
}
BUCKETS = 1_000_003


@pytest.mark.parametrize(("text", "seed"), XXHASH64)
def test_hashes_never_change(text: str, seed: int) -> None:
    assert xxhash.xxh64(text.encode(), seed=seed).intdigest() == XXHASH64[text, seed]
    frame = texts(text)
    assert result(fit(Hash(column="x", buckets=BUCKETS, seed=seed), frame), frame).to_list() == [
        1 + XXHASH64[text, seed] % BUCKETS
    ]


@drawn(50)
@given(values=st.lists(st.text(max_size=40), min_size=1, max_size=20), seed=st.integers(0, 2**64 - 1))
def test_hashes_are_xxhash64_of_the_text(values: list[str], seed: int) -> None:
    frame = texts(*values)
    expected = [1 + xxhash.xxh64(v.encode(), seed=seed).intdigest() % BUCKETS for v in values]
    assert result(fit(Hash(column="x", buckets=BUCKETS, seed=seed), frame), frame).to_list() == expected
    lists = bags(pl.String, values)
    fitted = fit(Hash(column="x", buckets=BUCKETS, seed=seed, multi=True), lists)
    assert result(fitted, lists).to_list() == [expected]


def test_a_cross_is_the_hash_of_its_columns_with_a_separator() -> None:
    frame = pl.DataFrame({"x": ["ab", "a", "abc", ""], "y": ["c", "bc", "", "abcd"]})
    found = result(fit(Cross(columns=("x", "y"), buckets=BUCKETS), frame), frame).to_list()
    assert found == [1 + xxhash.xxh64(f"{x}\x1f{y}".encode()).intdigest() % BUCKETS for x, y in frame.iter_rows()]
    assert len(set(found)) == 4
    swapped = result(fit(Cross(columns=("y", "x"), buckets=BUCKETS), frame), frame).to_list()
    assert not set(swapped) & set(found)
    assert Cross(columns=("x", "y"), buckets=5).output == "x_x_y"


@pytest.mark.parametrize("kind", [Hash, Cross])
@pytest.mark.parametrize("wrong", [{"buckets": 0}, {"buckets": 2**31 - 1}, {"seed": -1}, {"seed": 2**64}])
def test_hashes_that_cannot_be_computed_are_refused(kind: type[Transform], wrong: dict[str, int]) -> None:
    columns = {"column": "x"} if kind is Hash else {"columns": ("x", "y")}
    with pytest.raises(ValidationError):
        kind.model_validate({**columns, "buckets": 10, **wrong})
    kind.model_validate({**columns, "buckets": 2**31 - 2, "seed": 2**64 - 1})


# --- numbers ---------------------------------------------------------------------------------------------------------

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


@drawn(50)
@given(values=st.lists(FINITE, min_size=2, max_size=30))
def test_standardise_is_the_textbook_formula(values: list[float]) -> None:
    values = [*values, -5e5, 5e5]  # never constant
    x = np.array(values)
    found = result(fit(Standardise(column="x"), floats(*values, None)), floats(*values)).to_numpy()
    np.testing.assert_allclose(found, (x - x.mean()) / x.std(), rtol=1e-6, atol=1e-6)


def test_a_constant_column_becomes_zero() -> None:
    frame = floats(3.5, 3.5, None, 3.5)
    assert result(fit(Standardise(column="x"), frame), frame).to_list() == [0.0] * 4


def log_squared(x: np.ndarray) -> np.ndarray:
    return np.array([math.log(v) ** 2 if v > 2 else v for v in x])


def test_log_is_the_formula_of_the_criteo_winners() -> None:
    x = np.array([-1e9, -3.0, -0.0, 0.0, 1.0, 2.0, 2.0000001, 2.5, 10.0, 1e6, 1e300])
    fitted = fit(Log(column="x", standardise=False), floats(*x, None))
    np.testing.assert_allclose(result(fitted, floats(*x)).to_numpy(), log_squared(x), rtol=1e-6)
    assert result(fitted, floats(2.0, math.e, math.e**3, -7.0)).to_list() == pytest.approx([2.0, 1.0, 9.0, -7.0])


@drawn(50)
@given(values=st.lists(st.floats(-1e5, 1e12, allow_subnormal=False), min_size=2, max_size=30))
def test_log_is_standardised_by_default(values: list[float]) -> None:
    values = [*values, 0.0, 1e4]
    f = log_squared(np.array(values))
    found = result(fit(Log(column="x"), floats(*values, math.nan)), floats(*values)).to_numpy()
    np.testing.assert_allclose(found, (f - f.mean()) / f.std(), rtol=1e-5, atol=1e-5)


def test_integers_and_booleans_are_numbers() -> None:
    frame = pl.DataFrame({"x": [True, False, False, None]})
    expected = [math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5), 0.0]
    assert result(fit(Standardise(column="x"), frame), frame).to_list() == pytest.approx(expected)
    counts = integers(1, 2, 3, None)
    expected = [-math.sqrt(1.5), 0.0, math.sqrt(1.5), 0.0]
    assert result(fit(Standardise(column="x"), counts), counts).to_list() == pytest.approx(expected)


def test_sums_that_a_float_would_spoil_are_exact() -> None:
    """A float sum of 1e7 and 1e-6 steps loses the steps; fixed-point sums keep them."""
    values = [1e7, *([3e-6] * 1000), -1e7]
    learned = fit(Standardise(column="x"), floats(*values)).learned[0]
    assert learned["sum"].item() == 3000
    assert learned["sum_squares"].item() == 2 * 10**26 + 9 * 1000
    assert learned["rows"].item() == 1002


@pytest.mark.parametrize("transform", [Standardise(column="x"), Log(column="x")], ids=["standardise", "log"])
def test_values_too_large_for_the_resolution_are_refused(transform: Transform) -> None:
    large = -(2.0**45) * 1e-6 * 1.01
    with pytest.raises(DataError, match=r"column 'x' reaches 3\.5.*e\+07, too large for exact sums in steps of 1e-06"):
        fit(transform, floats(large, 1.0))
    with pytest.raises(DataError, match=r"set resolution to 2e-06"):
        fit(transform, floats(large, 1.0))
    fit(transform.model_copy(update={"resolution": 3e-6}), floats(large, 1.0))
    fit(transform, floats(large / 1.1, 1.0))
    with pytest.raises(DataError, match="too large"):
        fit(transform, floats(-1e300, *([1.0] * 20)))


def test_values_too_close_for_the_resolution_are_refused() -> None:
    frame = floats(1.0, 1.00001, 1.00002)
    with pytest.raises(
        DataError, match=r"column 'x' varies by .*too little for steps of 1e-06: set resolution to 8e-12"
    ):
        fit(Standardise(column="x"), frame)
    found = result(fit(Standardise(column="x", resolution=8e-12), frame), frame)
    assert found.to_list() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)], abs=1e-4)


# --- buckets ---------------------------------------------------------------------------------------------------------


@drawn(60)
@given(
    edges=st.lists(st.floats(-100, 100), min_size=1, max_size=8, unique=True),
    values=st.lists(st.floats(-110, 110), max_size=20),
)
def test_boundaries_are_numpys(edges: list[float], values: list[float]) -> None:
    edges = sorted({e + 0.0 for e in edges})
    x = np.array([*values, *edges])
    fitted = fit(Boundaries(column="x", boundaries=tuple(edges)), floats(0.0))
    found = result(fitted, floats(*x)).to_numpy()
    np.testing.assert_array_equal(found, 1 + np.searchsorted(edges, x, side="left"))
    np.testing.assert_array_equal(found, 1 + np.digitize(x, edges, right=True))
    assert fitted.sparse[0].rows == len(edges) + 2


@pytest.mark.parametrize("edges", [(), (2.0, 1.0), (1.0, 1.0)])
def test_boundaries_must_increase(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="boundaries"):
        Boundaries(column="x", boundaries=edges)


CONTINUOUS = {
    "uniform": lambda rng: rng.uniform(1, 3, 50_000),
    "normal": lambda rng: rng.normal(0, 1, 50_000),
    "lognormal": lambda rng: rng.lognormal(0, 3, 50_000),
    "large": lambda rng: rng.exponential(1e12, 50_000),
}


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("buckets", [2, 7, 20])
def test_quantile_edges_are_exact_to_half_a_permille(name: str, buckets: int) -> None:
    x = CONTINUOUS[name](np.random.default_rng(5))
    transform = Quantiles(column="x", buckets=buckets)
    fitted = fit(transform, floats(*x))
    ranks = [math.ceil(k * x.size / buckets) - 1 for k in range(1, buckets)]
    exact = np.sort(x)[ranks]
    edges = transform.edges(fitted.learned[0])
    np.testing.assert_array_less(np.abs(edges - exact), 0.000501 * np.abs(exact))
    found = result(fitted, floats(*x)).to_numpy()
    np.testing.assert_array_equal(found, 1 + np.searchsorted(edges, x, side="left"))
    np.testing.assert_allclose(np.bincount(found)[1:] / x.size, 1 / buckets, atol=0.002)
    assert fitted.sparse[0].rows == buckets + 1


def test_a_value_that_outweighs_a_bucket_has_it_alone() -> None:
    x = [0.0] * 80 + [float(i) for i in range(1, 21)]
    fitted = fit(Quantiles(column="x", buckets=10), floats(*x))
    transform = fitted.recipe.transforms[0]
    assert isinstance(transform, Quantiles)
    assert transform.edges(fitted.learned[0]) == [0.0, 10.0]
    assert fitted.sparse[0].rows == 4
    assert result(fitted, floats(-1.0, 0.0, 1.0, 10.0, 11.0, 99.0)).to_list() == [1, 1, 2, 2, 3, 3]


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "float ids": (Vocabulary(column="x"), floats(1.0), "ids must not pass through float"),
    "float hash": (Hash(column="x", buckets=5), floats(1.0), "ids must not pass through float"),
    "float in a cross": (
        Cross(columns=("x", "y"), buckets=5),
        pl.DataFrame({"x": [1.0], "y": ["a"]}),
        "ids must not pass through float",
    ),
    "list": (Vocabulary(column="x"), bags(pl.String, ["a"]), "set multi = true for list columns"),
    "list of integers": (Hash(column="x", buckets=5), bags(pl.Int64, [1]), "set multi = true for list columns"),
    "list of floats": (Vocabulary(column="x", multi=True), bags(pl.Float64, [1.0]), "holds other"),
    "text as a list": (Vocabulary(column="x", multi=True), texts("a|b"), r'give separator = "\|" to split text'),
    "integers split": (Vocabulary(column="x", separator="|"), integers(1), "holds integer; .* takes text"),
    "text scaled": (Standardise(column="x"), texts("1"), r"holds text; feature 'x' \(standardise\) takes integer"),
    "text logged": (Log(column="x"), texts("1"), r"\(log\) takes integer, float, boolean"),
    "text in quantiles": (Quantiles(column="x"), texts("1"), "in .derive. with CAST"),
    "text in buckets": (Boundaries(column="x", boundaries=(1.0,)), texts("1"), "convert it in the log"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_columns_of_a_wrong_kind_are_refused_with_a_remedy(name: str) -> None:
    transform, frame, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as raised:
        fit(transform, frame)
    assert "column 'x' holds" in str(raised.value)
