"""Features that live for months: ids are added day by day, retired and recycled, and examples keep their meaning."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import features.pipeline
from base.errors import ArtefactError, ConfigError, DataError
from base.storage import publish, resolve
from features.pipeline import Ancestor, FeaturePipeline, FittedPipeline, changed_rows
from features.transforms import Hash, Quantiles, Standardise, Vocabulary
from tests.marks import drawn

START = date(2026, 3, 1)
VALUES = "abcdefgh"


def day_of(index: int) -> date:
    return START + timedelta(days=index)


def texts(*values: str | None) -> pl.LazyFrame:
    return pl.LazyFrame({"x": values}, schema={"x": pl.String})


def one(**dials: Any) -> FeaturePipeline:
    return FeaturePipeline((Vocabulary(column="x", **dials),))


def encoded(fitted: FittedPipeline) -> dict[str, int]:
    """The row of every value that has one now."""
    rows = fitted.transform(texts(*VALUES)).collect()["x"].to_list()
    return {v: row for v, row in zip(VALUES, rows, strict=True) if row}


def owners(fitted: FittedPipeline, feature: int = 0) -> dict[int, str]:
    """Whose each row is, retired or not."""
    return dict(fitted.learned[feature].select("id", "value").drop_nulls().iter_rows())


def line(pipeline: FeaturePipeline, *days: str, recycle_after_days: int | None = None) -> list[FittedPipeline]:
    """Fitted on the first day's letters and extended by one day's at a time; a day without letters is left out."""
    fitted = [pipeline.fit(texts(*days[0]), day=START)]
    for i, letters in enumerate(days[1:], 1):
        if letters:
            extended = fitted[-1].extend(texts(*letters), day=day_of(i), recycle_after_days=recycle_after_days)
            fitted.append(extended)
    return fitted


# By the words


@dataclass
class Entry:
    count: int
    seen: int
    id: int | None = None
    retired: int | None = None


def grown(
    known: dict[str, Entry], day: int, letters: Iterable[str], dials: dict[str, Any], recycle_after: int | None
) -> dict[str, Entry]:
    """A day of a vocabulary as its description has it, one value at a time."""
    known = {v: Entry(e.count, e.seen, e.id, e.retired) for v, e in known.items()}
    for letter, n in Counter(letters).items():
        entry = known.setdefault(letter, Entry(0, day))
        entry.count, entry.seen = entry.count + n, day
    limit, last = dials["retire_after_days"], sum(e.id is not None for e in known.values())
    if limit is not None:
        known = {v: e for v, e in known.items() if e.id is not None or day - e.seen <= limit}
        for entry in known.values():
            if entry.id is not None and entry.retired is None and day - entry.seen > limit:
                entry.retired = day

    def room() -> float:
        live = sum(e.id is not None and e.retired is None for e in known.values())
        return float("inf") if dials["max_size"] is None else dials["max_size"] - live

    def by_frequency(values: Iterable[str]) -> list[str]:
        return sorted(values, key=lambda v: (-known[v].count, v))

    for value in by_frequency(v for v, e in known.items() if e.retired is not None and e.seen > e.retired):
        if room() > 0 and day - known[value].seen <= limit:
            known[value].retired = None
    numbers = count(last + 1)
    for value in by_frequency(v for v, e in known.items() if e.id is None and e.count >= dials["min_count"]):
        if room() <= 0:
            break
        free = [
            (e.id, v)
            for v, e in known.items()
            if e.retired is not None and recycle_after is not None and day - e.retired >= recycle_after
        ]
        if free:
            known[value].id, owner = min(free)
            del known[owner]
        else:
            known[value].id = next(numbers)
    return known


def table(fitted: FittedPipeline) -> dict[str, Entry]:
    def index(day: date | None) -> int | None:
        return None if day is None else (day - START).days

    rows = fitted.learned[0].iter_rows(named=True)
    return {r["value"]: Entry(r["count"], index(r["seen"]) or 0, r["id"], index(r["retired"])) for r in rows}


GAPS_AND_LETTERS = st.lists(
    st.tuples(st.integers(1, 3), st.lists(st.sampled_from(VALUES), min_size=1, max_size=6)), min_size=1, max_size=14
)
LIVES = given(
    days=GAPS_AND_LETTERS,
    min_count=st.integers(1, 3),
    max_size=st.one_of(st.none(), st.integers(1, 4)),
    retire_after_days=st.one_of(st.none(), st.integers(1, 4)),
    recycle_after_days=st.one_of(st.none(), st.integers(1, 5)),
)


@drawn(80)
@LIVES
def test_a_vocabulary_lives_as_described(
    days: list[tuple[int, list[str]]], recycle_after_days: int | None, **dials: Any
) -> None:
    pipeline, today = one(**dials), 0
    fitted, expected = None, dict[str, Entry]()
    for gap, letters in days:
        today += gap
        expected = grown(expected, today, letters, dials, recycle_after_days)
        if fitted is None:
            fitted = pipeline.fit(texts(*letters), day=day_of(today))
        else:
            fitted = fitted.extend(texts(*letters), day=day_of(today), recycle_after_days=recycle_after_days)
        assert table(fitted) == expected
        assert encoded(fitted) == {v: e.id for v, e in expected.items() if e.id is not None and e.retired is None}
        assert fitted.sparse[0].rows == 1 + sum(e.id is not None for e in expected.values())
        if dials["max_size"] is not None:
            assert len(encoded(fitted)) <= dials["max_size"]


@drawn(80)
@LIVES
def test_what_is_accepted_means_the_same(
    days: list[tuple[int, list[str]]], recycle_after_days: int | None, **dials: Any
) -> None:
    pipeline, today = one(**dials), 0
    past: list[FittedPipeline] = []
    for gap, letters in days:
        today += gap
        if not past:
            past.append(pipeline.fit(texts(*letters), day=day_of(today)))
            continue
        before = past[-1]
        after = before.extend(texts(*letters), day=day_of(today), recycle_after_days=recycle_after_days)
        rows, of = encoded(after), owners(after)
        assert len(set(rows.values())) == len(rows)  # no two live values share a row
        assert sorted(of) == list(range(1, after.sparse[0].rows))
        for value, row in encoded(before).items():  # no live value moves; it can only be retired
            assert rows.get(value, row) == row
            assert of[row] == value
        for earlier in past:
            means_the_same = all(of[row] == value for value, row in encoded(earlier).items())
            if earlier.version in after.accepts:
                assert means_the_same
            in_window = recycle_after_days is not None and (day_of(today) - earlier.day).days <= recycle_after_days
            if in_window or recycle_after_days is None:  # no row was taken from it
                assert earlier.version in after.accepts
            changed = changed_rows(earlier, after)["x"].tolist()
            moved = {row for row, value in of.items() if owners(earlier).get(row) != value}
            assert changed == sorted(moved)
        if before.crossing != after.crossing:  # the lineage is not cut without need
            refused = [p for p in past if p.version not in after.accepts]
            assert any(of[row] != value for value, row in encoded(refused[-1]).items())
        past.append(after)


# By example


def test_an_id_unseen_for_long_is_retired_and_gets_its_row_back() -> None:
    fitted = line(one(retire_after_days=2), "aab", "a", "a", "a", "a", "ab")
    assert [encoded(f) for f in fitted[:3]] == [{"a": 1, "b": 2}] * 3
    assert [encoded(f) for f in fitted[3:]] == [{"a": 1}, {"a": 1}, {"a": 1, "b": 2}]
    assert fitted[3].learned[0].filter(value="b").rows() == [("b", 1, 2, day_of(0), day_of(3))]
    assert fitted[5].learned[0].filter(value="b").rows() == [("b", 2, 2, day_of(5), None)]
    assert {f.sparse[0].rows for f in fitted} == {3}
    assert fitted[5].accepts == tuple(f.version for f in fitted)
    assert changed_rows(fitted[0], fitted[5])["x"].tolist() == []


def test_a_row_is_given_away_once_all_of_the_window_has_the_tombstone() -> None:
    """b is retired on day 3. With a window of two days back, day 4 still reads day 2, which means b by row 2."""
    fitted = line(one(retire_after_days=2), "aab", "a", "a", "a", "ac", "ad", recycle_after_days=2)
    assert encoded(fitted[4]) == {"a": 1, "c": 3}
    assert encoded(fitted[5]) == {"a": 1, "c": 3, "d": 2}
    assert fitted[4].crossing is None
    assert fitted[5].crossing == day_of(3)
    assert fitted[5].accepts == tuple(f.version for f in fitted[3:])
    assert changed_rows(fitted[0], fitted[5])["x"].tolist() == [2, 3]
    assert changed_rows(fitted[4], fitted[5])["x"].tolist() == [2]
    assert changed_rows(fitted[5], fitted[5])["x"].tolist() == []
    assert fitted[5].explain(fitted[2].version) == (
        f"made by features {fitted[2].version} of 2026-03-03, and rows retired by 2026-03-04 have since been given "
        "to new ids: this window crosses a recycle; let it begin at 2026-03-04 or later"
    )
    later = fitted[5].extend(texts("b"), day=day_of(6), recycle_after_days=2)
    assert encoded(later)["b"] == 4  # its row is gone
    assert later.crossing == day_of(3)


def test_the_longest_free_rows_do_not_come_first_but_the_lowest() -> None:
    fitted = line(one(retire_after_days=1), "aabbcz", "bz", "z", "z", "zde", recycle_after_days=1)[-1]
    assert owners(fitted) == {1: "d", 2: "e", 3: "c", 4: "z"}
    assert fitted.learned[0].filter(value="c")["retired"].item() == day_of(2)
    assert fitted.crossing == day_of(3)  # of b, retired after a


def test_nothing_is_retired_unless_asked_for() -> None:
    fitted = line(one(), "ab", *["c"] * 30, recycle_after_days=1)[-1]
    assert encoded(fitted) == {"a": 1, "b": 2, "c": 3}
    assert fitted.learned[0].filter(value="a")["seen"].item() == day_of(0)
    assert len(fitted.accepts) == 31


def test_a_value_without_an_id_is_forgotten_in_time() -> None:
    dials = {"min_count": 2, "retire_after_days": 2}
    patient = line(one(**dials), "aa", "b", "", "ab")[-1]
    assert encoded(patient) == {"a": 1, "b": 2}  # once a day is often enough
    late = line(one(**dials), "aa", "b", "a", "a", "a", "b")
    assert [f.learned[0].filter(value="b").height for f in late] == [0, 1, 1, 1, 0, 1]
    assert encoded(late[-1]) == {"a": 1}


def test_a_window_fitted_at_once_was_seen_on_its_last_day() -> None:
    fitted = one(retire_after_days=1).fit([texts("a"), texts("b")], day=day_of(1))
    assert fitted.day == day_of(1)
    assert fitted.learned[0]["seen"].to_list() == [day_of(1)] * 2
    assert encoded(fitted.extend(texts("b"), day=day_of(2))) == {"a": 1, "b": 2}
    assert encoded(fitted.extend(texts("b"), day=day_of(3))) == {"b": 2}


def test_ids_from_before_there_were_days_age_from_the_first_day() -> None:
    fitted = one(retire_after_days=1).fit(texts("a", "b"))
    assert fitted.learned[0]["seen"].null_count() == 2
    dated = fitted.extend(texts("b"), day=day_of(5))
    assert encoded(dated) == {"a": 1, "b": 2}
    later = dated.extend(texts("b"), day=day_of(7)).extend(texts("c"), day=day_of(8), recycle_after_days=1)
    assert encoded(later) == {"b": 2, "c": 1}
    assert fitted.version not in later.accepts  # nobody knows its day
    assert "of None" not in later.explain(fitted.version)


def test_integer_ids_and_bags_are_retired_too() -> None:
    bag = Vocabulary(column="x", multi=True, retire_after_days=1)
    first = pl.LazyFrame({"x": [[5, 7], [7]]})
    fitted = FeaturePipeline((bag,)).fit(first, day=START)
    after = fitted.extend(pl.LazyFrame({"x": [[7], [9]]}), day=day_of(2))
    assert after.transform(pl.LazyFrame({"x": [[5, 7, 9]]})).collect()["x"].to_list() == [[0, 1, 3]]


def test_looking_up_knows_tombstones() -> None:
    fitted = line(one(retire_after_days=1), "ab", "b", "bc")[-1]
    assert encoded(fitted) == {"b": 2, "c": 3}


# Lines and versions


def test_days_come_once_and_in_order() -> None:
    fitted = one().fit(texts("a"), day=day_of(3))
    for day in (3, 2):
        message = f"{day_of(day)} cannot extend features that have taken in the days to 2026-03-04: .* count twice"
        with pytest.raises(DataError, match=message):
            fitted.extend(texts("b"), day=day_of(day))
    with pytest.raises(DataError, match="taken in the days to 2026-03-04: say which day extends them"):
        fitted.extend(texts("b"))
    with pytest.raises(DataError, match="cannot extend features by 2026-03-05 without rows: check the log"):
        fitted.extend(texts(), day=day_of(4))
    with pytest.raises(ConfigError, match="recycle_after_days = 0: give the days of the training window"):
        fitted.extend(texts("b"), day=day_of(4), recycle_after_days=0)
    assert fitted.extend(texts("b"), day=day_of(9)).day == day_of(9)


def test_counts_of_another_recipe_are_refused() -> None:
    counts, other = one().count(texts("a")), one(min_count=2)
    for use in (other.settle, other.fit(texts("a", "a")).extend, other.count(texts("a")).merge):
        with pytest.raises(ArtefactError, match=f"counts {counts.version}: made by another recipe"):
            use([counts])


def test_a_line_is_stored_whole(tmp_path: Path) -> None:
    pipeline = FeaturePipeline((*one(retire_after_days=2).transforms, Hash(column="x", name="h", buckets=3)))
    fitted = line(pipeline, "aab", "a", "a", "a", "ac", "ad", recycle_after_days=2)[-1]
    with publish(tmp_path / "features", "features") as staging:
        fitted.save(staging)
    loaded = FittedPipeline.load(resolve(tmp_path / "features"))
    assert (loaded.version, loaded.day, loaded.ancestors, loaded.crossing, loaded.accepts) == (
        *(fitted.version, fitted.day, fitted.ancestors, fitted.crossing, fitted.accepts),
    )
    assert (len(loaded.ancestors), len(loaded.accepts), loaded.crossing) == (5, 3, day_of(3))
    for before, after in ((fitted, loaded), (loaded, fitted)):
        assert not changed_rows(before, after)["x"].size
    assert loaded.extend(texts("e"), day=day_of(6)).version == fitted.extend(texts("e"), day=day_of(6)).version


def test_where_it_came_from_is_no_part_of_a_version() -> None:
    fitted = line(one(), "a", "b")[-1]
    bare = FittedPipeline(fitted.recipe, fitted.learned, fitted.kinds, fitted.day)
    assert bare.version == fitted.version
    assert (bare.accepts, fitted.accepts) == ((bare.version,), (*fitted.lineage, bare.version))
    undated = FittedPipeline(fitted.recipe, fitted.learned, fitted.kinds)
    assert undated.version != fitted.version


def test_a_line_remembers_so_many_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert features.pipeline.MAX_ANCESTORS == 1000
    monkeypatch.setattr(features.pipeline, "MAX_ANCESTORS", 3)
    fitted = line(one(), *"abcdef")
    assert fitted[-1].ancestors == tuple(Ancestor(version=f.version, day=f.day) for f in fitted[2:5])


def test_weights_move_along_a_line_only() -> None:
    fitted, other = line(one(), "ab", "c"), line(one(), "ab", "d")
    for before, after in ((fitted[1], fitted[0]), (other[1], fitted[1])):
        message = f"features {after.version} were not extended from {before.version}, .*train from nothing"
        with pytest.raises(DataError, match=message):
            changed_rows(before, after)
    assert fitted[1].explain(other[1].version) == (
        f"made by features {other[1].version}, the fitted ones are {fitted[1].version}"
    )


def test_changed_rows_are_given_of_every_table() -> None:
    log = pl.DataFrame({"x": ["a", "b"], "empty": pl.Series([None, None], dtype=pl.Null), "n": [1.0, 2.0]})
    transforms = (
        *(Vocabulary(column="x"), Vocabulary(column="empty"), Hash(column="x", name="h", buckets=5)),
        *(Quantiles(column="n"), Standardise(column="n", name="z")),
    )
    before = FeaturePipeline(transforms).fit(log.lazy())
    after = before.extend(log.with_columns(x=pl.lit("c"), empty=pl.Series([7, 9]), n=pl.col("n") + 100).lazy())
    found = changed_rows(before, after)
    assert {name: rows.tolist() for name, rows in found.items()} == {"x": [3], "empty": [1, 2], "h": [], "n": []}
    assert all(rows.dtype == np.int64 for rows in found.values())


# Large integers


@pytest.mark.parametrize("dtype", [pl.UInt64, pl.Int128])
def test_integers_too_large_for_ids_are_refused_by_name(dtype: Any) -> None:
    large = pl.DataFrame({"x": pl.Series([1, 2**63, None], dtype=dtype)})
    message = r"column 'x' holds integers of 2\^63 or more .* \[derive\] with CAST"
    with pytest.raises(DataError, match=message):
        one().fit(large.lazy())
    with pytest.raises(DataError, match=message):
        one(multi=True).fit(large.select(pl.concat_list("x")).lazy())
    fitted = one().fit(large.head(1).lazy())
    assert fitted.transform(large.lazy()).collect()["x"].to_list() == [1, 0, 0]  # unknown, like any unseen id
    bags = one(multi=True).fit(large.head(1).select(pl.concat_list("x")).lazy())
    assert bags.transform(large.select(pl.concat_list("x")).lazy()).collect()["x"].to_list() == [[1], [0], []]
    remedy = FeaturePipeline((Vocabulary(column="t"),), {"t": "CAST(x AS TEXT)"})
    assert remedy.fit(large.lazy()).transform(large.lazy()).collect()["t"].to_list() == [1, 2, 0]
