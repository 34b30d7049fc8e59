"""Batches hold what the table holds; ids are checked; an epoch is every row once, in an order that can be resumed."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import DataError, IdError
from features.schema import Dense, Schema, Sparse
from pipelines.examples import ROW_GROUP as WRITTEN
from recsys.batch import Batch, part_of
from recsys.data import ROW_GROUP, ExampleStream, IdCount, batches, check_ids, to_columns
from tests.marks import drawn, quick

BAGS = Schema(
    keys=("key",),
    dense=(Dense(name="price"), Dense(name="age")),
    sparse=(
        Sparse(name="tags", rows=10, multi=True),
        Sparse(name="user", rows=6),
        Sparse(name="words", rows=4, multi=True),
    ),
    labels=("click", "like"),
)
number = st.floats(-1e6, 1e6, width=32)
row = st.fixed_dictionaries(
    {
        "tags": st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=4)),
        "user": st.integers(0, 5),
        "words": st.lists(st.integers(0, 3), max_size=2),
        "price": number,
        "age": number,
        "@click": st.integers(0, 1),
        "@like": st.integers(0, 1),
    }
)
TYPES = {
    **{"tags": pl.List(pl.Int32), "user": pl.Int32, "words": pl.List(pl.Int32)},
    **{"price": pl.Float32, "age": pl.Float32, "@click": pl.Int8, "@like": pl.Int8},
}


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=TYPES)


def unpacked(batch: Batch, schema: Schema) -> list[dict[str, Any]]:
    """A batch as plain rows, by walking its tensors one by one."""
    values, lengths = batch.sparse.values().tolist(), batch.sparse.lengths().tolist()
    found: list[dict[str, Any]] = [{} for _ in range(len(batch))]
    for feature in schema.sparse:
        for out in found:
            size = lengths.pop(0)
            out[feature.name] = [values.pop(0) for _ in range(size)]
    assert not values
    assert not lengths
    for i, out in enumerate(found):
        out |= {f.name: batch.dense_BN[i, n].item() for n, f in enumerate(schema.dense)}
        out |= {f"@{label}": batch.labels_BT[i, t].item() for t, label in enumerate(schema.labels)}
    return found


def expected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**r, "tags": r["tags"] or [], "user": [r["user"]]} for r in rows]


# --- batches ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=12), batch_size=st.integers(1, 13))
def test_batches_hold_what_the_table_holds(rows: list[dict[str, Any]], batch_size: int) -> None:
    columns = to_columns(table(rows), BAGS, labels=True)
    found = list(batches(columns, batch_size))
    assert len(columns) == len(rows)
    assert [len(b) for b in found[:-1]] == [batch_size] * (len(found) - 1)
    assert [r for b in found for r in unpacked(b, BAGS)] == expected(rows)
    for batch in found:
        assert batch.sparse.keys() == ["tags", "user", "words"]
        assert batch.sparse.values().dtype == torch.int64
        assert batch.dense_BN.dtype == batch.labels_BT.dtype == torch.float32
        assert batch.sparse["user"].lengths().tolist() == [1] * len(batch)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(row, min_size=3, max_size=12), data=st.data())
def test_any_stretch_of_rows_can_be_cut_out(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    batch = to_columns(table(rows), BAGS, labels=True).batch(start, stop)
    assert unpacked(batch, BAGS) == expected(rows)[start:stop]


def test_every_bag_may_be_empty() -> None:
    rows = [
        {"tags": tags, "user": 1, "words": [], "price": 0, "age": 0, "@click": 0, "@like": 1} for tags in ([], None)
    ]
    batch = to_columns(table(rows), BAGS, labels=True).batch(0, 2)
    assert batch.sparse.lengths().tolist() == [0, 0, 1, 1, 0, 0]
    assert batch.sparse.values().tolist() == [1, 1]


def test_labels_and_numbers_may_be_absent() -> None:
    schema = BAGS.model_copy(update={"dense": ()})
    frame = table([{"tags": [1], "user": 1, "words": [], "price": 0, "age": 0, "@click": 0, "@like": 1}])
    batch = to_columns(frame.drop("@click", "@like"), schema, labels=False).batch(0, 1)
    assert batch.dense_BN.shape == (1, 0)
    assert batch.labels_BT.shape == (1, 0)


def test_a_batch_moves_as_a_whole() -> None:
    frame = table([{"tags": [1], "user": 1, "words": [], "price": 2, "age": 3, "@click": 0, "@like": 1}])
    batch = to_columns(frame, BAGS, labels=True).batch(0, 1)
    assert unpacked(batch.to(torch.device("cpu")), BAGS) == unpacked(batch, BAGS)
    assert {t.device.type for t in (batch.to(torch.device("meta")).dense_BN,)} == {"meta"}


GOOD = {"tags": [1, 2], "user": 1, "words": [3], "price": 1.0, "age": 1.0, "@click": 0, "@like": 1}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("user", None, "feature 'user': 1 ids are missing; prepare the examples again"),
        ("tags", [1, None], "feature 'tags': 1 ids are missing"),
        ("price", None, "column 'price': 1 values are missing"),
    ],
)
def test_a_missing_value_is_refused(column: str, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_columns(table([GOOD, {**GOOD, column: value}]), BAGS, labels=True)


def test_a_label_that_is_not_known_yet_is_nan() -> None:
    frame = table([GOOD, {**GOOD, "@like": None}, {**GOOD, "@click": None, "@like": 0}])
    labels_BT = to_columns(frame, BAGS, labels=True).batch(0, 3).labels_BT
    np.testing.assert_array_equal(labels_BT, [[0, 1], [0, np.nan], [np.nan, 0]])
    assert labels_BT.dtype == torch.float32
    unknown = to_columns(frame.with_columns(pl.lit(None).alias("@like")), BAGS, labels=True).batch(0, 3).labels_BT
    assert unknown[:, 1].isnan().all()
    assert not to_columns(frame, BAGS, labels=False).batch(0, 3).labels_BT.numel()


@pytest.mark.parametrize("column", ["user", "tags", "price", "@like"])
def test_a_missing_column_is_refused_by_name(column: str) -> None:
    with pytest.raises(DataError, match=column):
        to_columns(table([GOOD]).drop(column), BAGS, labels=True)


# --- ids -------------------------------------------------------------------------------------------------------------

USER = Sparse(name="user", rows=6)


def test_good_ids_are_passed_on_untouched() -> None:
    for ids_V in (torch.tensor([0, 5, 3]), torch.tensor([], dtype=torch.int64)):
        count = IdCount()
        assert check_ids(ids_V, USER, "error", count) is ids_V
        assert check_ids(ids_V, USER, "unknown", count) is ids_V
        assert count.replaced == 0


@pytest.mark.parametrize("ids", [[0, 6], [-1, 2], [2**40], [0, 1, -(2**40)]])
def test_an_id_outside_its_table_is_refused_or_counted(ids: list[int]) -> None:
    ids_V = torch.tensor(ids)
    outside = [i for i in ids if not 0 <= i < 6]
    with pytest.raises(IdError, match=f"feature 'user': id {outside[0]} is outside its table of 6 rows"):
        check_ids(ids_V, USER, "error", IdCount())
    count = IdCount(replaced=10)
    fixed_V = check_ids(ids_V, USER, "unknown", count)
    assert fixed_V.tolist() == [i if 0 <= i < 6 else 0 for i in ids]
    assert ids_V.tolist() == ids
    assert count.replaced == 10 + len(outside)


def test_tables_of_examples_are_checked_by_the_same_policy() -> None:
    frame = table([GOOD, {**GOOD, "user": 6}, {**GOOD, "tags": [10, 1, -1], "words": []}])
    with pytest.raises(IdError, match=r"feature 'tags': id 10 is outside its table of 10 rows .2 such ids"):
        to_columns(frame, BAGS, labels=True)
    count = IdCount()
    batch = to_columns(frame, BAGS, labels=True, policy="unknown", count=count).batch(0, 3)
    assert count.replaced == 3
    assert [r["user"] for r in unpacked(batch, BAGS)] == [[1], [0], [1]]
    assert unpacked(batch, BAGS)[2]["tags"] == [0, 1, 0]


# --- streams ---------------------------------------------------------------------------------------------------------

NUMBERED = Schema(
    keys=(),
    dense=(Dense(name="number"),),
    sparse=(Sparse(name="row", rows=100_000), Sparse(name="bag", rows=9, multi=True)),
    labels=("y",),
)


def numbered(first: int, rows: int) -> pl.DataFrame:
    """Rows that can be told apart, each of whose columns follows from its number."""
    row_R = pl.int_range(first, first + rows, eager=True)
    return pl.DataFrame(
        {
            "row": row_R.cast(pl.Int32),
            "number": (row_R * 0.5).cast(pl.Float32),
            "bag": pl.Series([[r % 9] * (r % 3) for r in row_R], dtype=pl.List(pl.Int32)),
            "@y": (row_R % 2).cast(pl.Int8),
        }
    )


def stream(folder: Path, sizes: list[int], row_group: int, batch_size: int, **settings: Any) -> ExampleStream:
    """A stream over files of so many rows."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for n, size in enumerate(sizes):
        files.append(folder / f"{n}.parquet")
        numbered(sum(sizes[:n]), size).write_parquet(files[-1], row_group_size=row_group)
    return ExampleStream(tuple(files), NUMBERED, batch_size, **settings)


def rows_of(batch: Batch) -> list[int]:
    """The numbers of a batch's rows, having checked that each row came along whole."""
    found = unpacked(batch, NUMBERED)
    for r in found:
        (n,) = r["row"]
        assert r == {"row": [n], "number": n * 0.5, "bag": [n % 9] * (n % 3), "@y": n % 2}
    return [r["row"][0] for r in found]


def epoch_of(source: ExampleStream, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [rows_of(batch) for batch in source.epoch(epoch, start=start)]


def flat(parts: list[list[int]]) -> list[int]:
    return [r for part in parts for r in part]


@drawn(25)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    row_group=st.integers(3, 40),
    batch_size=st.integers(1, 50),
    window=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_an_epoch_is_every_row_once(
    sizes: list[int], row_group: int, batch_size: int, window: int, shuffle: bool, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    source = stream(folder, sizes, row_group, batch_size, shuffle=shuffle, window=window, seed=3)
    assert source.rows() == sum(sizes)
    for epoch in (0, 1):
        found = epoch_of(source, epoch)
        assert sorted(flat(found)) == list(range(sum(sizes)))
        assert max(map(len, found)) <= batch_size
        if not shuffle:
            assert flat(found) == list(range(sum(sizes)))
            assert len(found) == source.batches_per_epoch(0)


def test_shuffling_follows_seed_and_epoch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sizes": [300, 200], "row_group": 50, "batch_size": 40, "shuffle": True}
    first = epoch_of(stream(tmp_path, **settings, seed=1))
    assert first == epoch_of(stream(tmp_path, **settings, seed=1))
    assert flat(first) != list(range(500))
    others = [epoch_of(stream(tmp_path, **settings, seed=1), 1), epoch_of(stream(tmp_path, **settings, seed=2))]
    for other in others:
        assert sum(a == b for a, b in zip(flat(first), flat(other), strict=True)) < 25  # 1 expected by chance
    assert np.corrcoef(flat(first), range(500))[0, 1] == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize(
    ("sizes", "window", "shuffle"),
    [([100, 73], 2, True), ([100, 73], 1, False), ([30], 8, True), ([64, 64], 2, True)],
)
def test_any_position_can_be_resumed(sizes: list[int], window: int, shuffle: bool, tmp_path: Path) -> None:
    source = stream(tmp_path, sizes, 16, 10, shuffle=shuffle, window=window, seed=5)
    for epoch in (0, 3):
        whole = epoch_of(source, epoch)
        for position in range(len(whole) + 2):
            assert epoch_of(source, epoch, position) == whole[position:]


@pytest.mark.parametrize(("rows", "rank", "world", "part"), [
    (8, 0, 2, range(0, 4)), (8, 1, 2, range(4, 8)),
    (7, 0, 2, range(0, 4)), (7, 1, 2, range(3, 7)),
    (1, 0, 3, range(0, 1)), (1, 2, 3, range(0, 1)),
    (4, 0, 3, range(0, 2)), (4, 1, 3, range(2, 4)), (4, 2, 3, range(2, 4)),
    (5, 0, 1, range(0, 5)),
])  # fmt: skip
def test_a_part_is_as_large_as_the_others(rows: int, rank: int, world: int, part: range) -> None:
    assert part_of(rows, rank, world) == part


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_every_batch(world: int, shuffle: bool, tmp_path: Path) -> None:
    """Each has its part of the very batches that one process alone would have, from any position on."""
    settings = {"shuffle": shuffle, "window": 3, "seed": 1}
    alone = stream(tmp_path, [157], 20, 7, **settings)
    ranks = [stream(tmp_path, [157], 20, 7, **settings, rank=rank, world=world) for rank in range(world)]
    for epoch, start in ((0, 0), (1, 0), (1, 10)):
        whole = epoch_of(alone, epoch, start)
        assert alone.batch_rows(epoch)[start:] == [len(batch) for batch in whole]
        assert len(alone.batch_rows(epoch)) == alone.batches_per_epoch(epoch)
        assert min(map(len, whole)) < 7
        for number, rank in enumerate(ranks):
            parts = [[batch[i] for i in part_of(len(batch), number, world)] for batch in whole]
            assert epoch_of(rank, epoch, start) == parts
            assert rank.batch_rows(epoch) == alone.batch_rows(epoch)


def test_rows_are_shuffled_across_a_window_and_not_beyond(tmp_path: Path) -> None:
    source = stream(tmp_path, [400], 50, 25, shuffle=True, window=2, seed=0)
    found = epoch_of(source)
    windows = [flat(found[i : i + 4]) for i in range(0, 16, 4)]
    groups = [{r // 50 for r in window} for window in windows]
    assert len({tuple(r % 50 for r in window) for window in windows}) == 4  # each in an order of its own
    assert [len(g) for g in groups] == [2] * 4
    assert set().union(*groups) == set(range(8))
    assert groups != [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    for window in windows:
        assert {r // 50 for r in window[:25]} == {r // 50 for r in window}  # mixed, not one group after the other
    assert groups != [{r // 50 for r in flat(epoch_of(source, 1)[i : i + 4])} for i in range(0, 16, 4)]


def test_no_more_than_two_windows_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = ExampleStream._read

    def noted(self: ExampleStream, window: Any, epoch: int, index: int) -> Any:
        read.append(index)
        return whole(self, window, epoch, index)

    monkeypatch.setattr(ExampleStream, "_read", noted)
    source = stream(tmp_path, [400], 50, 25, shuffle=True, window=2)
    for n, _ in enumerate(source.epoch(0)):
        assert max(read, default=0) <= n // 4 + 1
    assert read == [0, 1, 2, 3]
    read.clear()
    next(iter(source.epoch(0, start=9)))
    assert min(read) == 2  # windows already done are not read again


def test_a_stream_may_be_left_early(tmp_path: Path) -> None:
    source = stream(tmp_path, [400], 50, 25, shuffle=True, window=2)
    for _ in range(3):
        epoch = source.epoch(0)
        next(epoch)
        epoch.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(epoch_of(source)) == 16


def test_a_stream_checks_ids_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    numbered(99_998, 4).write_parquet(path)
    with pytest.raises(IdError, match="id 100000 is outside its table of 100000 rows"):
        list(ExampleStream((path,), NUMBERED, 2).epoch(0))
    lenient = ExampleStream((path,), NUMBERED, 2, policy="unknown")
    found = [b.sparse["row"].values().tolist() for b in lenient.epoch(0)]
    assert found == [[99_998, 99_999], [0, 0]]
    assert lenient.count.replaced == 2


# --- down-sampling ---------------------------------------------------------------------------------------------------

FUNNEL = Schema(
    keys=(), dense=(), sparse=(Sparse(name="row", rows=100_000),), labels=("buy", "click"), funnel=("click", "buy")
)


def outcome(row: int) -> tuple[int | None, int | None]:
    """Click and conversion of a row: a fifth clicked, of which a third bought; of some one is not known yet."""
    if row % 10 == 7:
        return None, None
    click = int(row % 5 == 1)
    return click, None if row % 20 == 3 else int(click and row % 3 == 0)


def sampled(folder: Path, sizes: list[int], row_group: int, batch_size: int, rate: float, **settings: Any) -> Any:
    """A stream over a funnel of so many rows, of whose non-clicks it keeps a share."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for n in range(len(sizes)):
        rows = range(sum(sizes[:n]), sum(sizes[: n + 1]))
        columns = {"row": list(rows), "@click": [outcome(r)[0] for r in rows], "@buy": [outcome(r)[1] for r in rows]}
        files.append(folder / f"{n}.parquet")
        schema = {"row": pl.Int32, "@click": pl.Int8, "@buy": pl.Int8}
        pl.DataFrame(columns, schema=schema).write_parquet(files[-1], row_group_size=row_group)
    contract = FUNNEL.model_copy(update={"negative_rate": rate})
    return ExampleStream(tuple(files), contract, batch_size, **{"sampled": True, **settings})


def kept(source: ExampleStream, epoch: int = 0, start: int = 0) -> list[list[int]]:
    """The numbers of the rows of each batch, having checked that their labels came along."""
    found: list[list[int]] = []
    for batch in source.epoch(epoch, start=start):
        assert len(batch) > 0
        found.append(batch.sparse["row"].values().tolist())
        truth = [tuple(np.nan if y is None else y for y in reversed(outcome(r))) for r in found[-1]]
        np.testing.assert_array_equal(batch.labels_BT, truth)
    return found


def test_only_rows_without_a_click_are_left_out(tmp_path: Path) -> None:
    """By the funnel's first label, whatever the order of labels; a click that is not known is no non-click."""
    source = sampled(tmp_path, [700, 330], 100, 64, 0.25, shuffle=True, seed=2)
    always = {r for r in range(1030) if outcome(r)[0] != 0}
    assert source.rows() == 1030
    for epoch in range(4):
        rows = flat(kept(source, epoch))
        assert len(rows) == len(set(rows))
        assert always <= set(rows)
        for group in [*range(0, 700, 100), *range(700, 1030, 100)]:
            negatives = [r for r in range(group, min(group + 100, 700 if group < 700 else 1030)) if outcome(r)[0] == 0]
            share = sum(r in negatives for r in rows)
            assert abs(share - 0.25 * len(negatives)) < 1  # exactly, but for the rounding


def test_the_rate_is_met_in_the_mean_and_by_every_row_alike(tmp_path: Path) -> None:
    source, epochs = sampled(tmp_path, [50], 25, 64, 0.13), 400
    counted = Counter(r for epoch in range(epochs) for r in flat(kept(source, epoch)))
    negatives = [r for r in range(50) if outcome(r)[0] == 0]
    per_epoch = sum(counted[r] for r in negatives) / epochs
    assert len(negatives) == 35
    assert per_epoch == pytest.approx(0.13 * len(negatives), abs=4 * np.sqrt(2 / 4 / epochs))
    for r in negatives:
        assert counted[r] / epochs == pytest.approx(0.13, abs=4.5 * np.sqrt(0.13 / epochs))


def test_every_epoch_draws_others_and_repeats_the_same(tmp_path: Path) -> None:
    draws = {
        (seed, epoch): set(flat(kept(sampled(tmp_path, [600], 100, 50, 0.3, seed=seed), epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    always = {r for r in range(600) if outcome(r)[0] != 0}
    first = draws[0, 0] - always
    for other in [draws[key] - always for key in draws if key != (0, 0)]:
        assert len(first & other) / len(first) == pytest.approx(0.3, abs=0.12)
    groups = [{r % 100 for r in first if r // 100 == g} for g in range(6)]
    assert len({tuple(sorted(g)) for g in groups}) == 6  # every group by a draw of its own
    again = sampled(tmp_path, [600], 100, 50, 0.3)
    assert [kept(again), kept(again, 1)] == [kept(again), kept(again, 1)]
    assert set(flat(kept(again))) == draws[0, 0]
    mixed = sampled(tmp_path, [600], 100, 50, 0.3, shuffle=True)
    assert set(flat(kept(mixed))) == draws[0, 0]  # in another order, the very same rows


SAMPLED = {
    f"{rate} of {sizes}, {window} groups, {'shuffled' if shuffle else 'in order'}": (sizes, window, shuffle, rate)
    for rate in (0.01, 0.4)
    for sizes, window in (([100, 73], 2), ([100, 73], 1), ([230], 8))
    for shuffle in (True, False)
}


@pytest.mark.parametrize(("sizes", "window", "shuffle", "rate"), quick(
    SAMPLED,
    *("0.4 of [100, 73], 2 groups, shuffled", "0.4 of [230], 8 groups, in order"),
    *("0.01 of [100, 73], 1 groups, shuffled", "0.01 of [230], 8 groups, shuffled"),
))  # fmt: skip
def test_any_position_of_a_sampled_epoch_can_be_resumed(
    sizes: list[int], window: int, shuffle: bool, rate: float, tmp_path: Path
) -> None:
    source = sampled(tmp_path, sizes, 16, 7, rate, shuffle=shuffle, window=window, seed=5)
    lengths: set[int] = set()
    for epoch in range(4):
        whole = kept(source, epoch)
        assert len(whole) == source.batches_per_epoch(epoch)
        for start in range(len(whole) + 2):
            assert kept(source, epoch, start) == whole[start:]
        lengths.add(sum(map(len, whole)))
    assert len(lengths) > 1  # or nothing of this would be at stake


def test_ranks_share_the_sampled_rows(tmp_path: Path) -> None:
    settings = {"shuffle": True, "window": 3, "seed": 1}
    ranks = [sampled(tmp_path, [157], 20, 7, 0.5, **settings, rank=rank, world=2) for rank in (0, 1)]
    alone = sampled(tmp_path, [157], 20, 7, 0.5, **settings)
    for epoch in (0, 1):
        whole = kept(alone, epoch)
        for number, rank in enumerate(ranks):
            assert kept(rank, epoch) == [[batch[i] for i in part_of(len(batch), number, 2)] for batch in whole]


def test_without_sampling_every_row_is_there(tmp_path: Path) -> None:
    everything = kept(sampled(tmp_path, [300], 50, 40, 1.0, shuffle=True))
    assert sorted(flat(everything)) == list(range(300))
    assert everything == kept(sampled(tmp_path, [300], 50, 40, 0.1, shuffle=True, sampled=False))


def test_row_groups_of_one_kind_only(tmp_path: Path) -> None:
    """All clicks, none, or nothing kept: no batch is empty, and what is announced comes."""
    columns = {"row": list(range(40)), "@click": [1] * 10 + [0] * 20 + [None] * 10, "@buy": [0] * 30 + [None] * 10}
    table = pl.DataFrame(columns, schema={"row": pl.Int32, "@click": pl.Int8, "@buy": pl.Int8})
    table.write_parquet(tmp_path / "a.parquet", row_group_size=10)
    contract = FUNNEL.model_copy(update={"negative_rate": 0.001})
    for window in (1, 4):
        source = ExampleStream((tmp_path / "a.parquet",), contract, 4, sampled=True, window=window)
        for epoch in range(3):
            found = [batch.sparse["row"].values().tolist() for batch in source.epoch(epoch)]
            assert flat(found) == [*range(10), *range(30, 40)]
            assert len(found) == source.batches_per_epoch(epoch)
            assert min(map(len, found)) > 0
            assert [len(b) for b in source.epoch(epoch, start=2)] == [len(b) for b in found[2:]]


def test_row_groups_are_those_that_prepare_writes() -> None:
    assert WRITTEN == ROW_GROUP == 131_072
