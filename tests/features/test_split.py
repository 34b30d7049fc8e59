"""Splits: by day without a leak, at random but repeatable."""

from datetime import date

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from base.config import Config, parse_config
from base.errors import ConfigError
from features.split import DaySplit, PerUserSplit, RandomSplit, Role, Split, days_of, names_of, rows_of

ROWS = 20_000
LOG = pl.DataFrame({"row": range(ROWS), "user": np.random.default_rng(0).integers(0, 500, ROWS)}).with_columns(
    day=pl.date(2026, 3, 1) + pl.duration(days=pl.col("row") % 5)
)
ROLES: tuple[Role, ...] = ("train", "valid", "test")


class Root(Config):
    split: Split


def drawn(split: RandomSplit, role: Role, frame: pl.DataFrame = LOG, key: tuple[str, ...] = ("row",)) -> pl.DataFrame:
    return rows_of(split, frame.lazy(), f"split={role}", day=None, key=key).collect()


# At random


def test_random_parts_are_disjoint_and_complete() -> None:
    split = RandomSplit(train=0.8, valid=0.1, test=0.1)
    parts = [drawn(split, role)["row"] for role in ROLES]
    assert sum(map(len, parts)) == ROWS
    assert pl.concat(parts).n_unique() == ROWS
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        assert len(part) / ROWS == pytest.approx(share, abs=0.01)
        assert part.is_sorted()


def test_shares_that_leave_rows_out_leave_them_out() -> None:
    split = RandomSplit(train=0.3, valid=0.2, test=0.1)
    parts = [drawn(split, role)["row"] for role in ROLES]
    assert pl.concat(parts).n_unique() == sum(map(len, parts))
    assert [len(p) / ROWS for p in parts] == pytest.approx([0.3, 0.2, 0.1], abs=0.01)


def test_a_random_split_does_not_depend_on_the_order_of_rows() -> None:
    split = RandomSplit(train=0.5, valid=0.5)
    shuffled = LOG.sample(fraction=1.0, shuffle=True, seed=1)
    assert drawn(split, "valid")["row"].equals(drawn(split, "valid", shuffled)["row"].sort())
    half = LOG[::2]
    assert drawn(split, "valid", half)["row"].to_list() == [r for r in drawn(split, "valid")["row"] if r % 2 == 0]


def test_a_random_split_follows_its_seed() -> None:
    first, again = (drawn(RandomSplit(train=0.5, valid=0.5, seed=1), "train")["row"] for _ in range(2))
    other = drawn(RandomSplit(train=0.5, valid=0.5, seed=2), "train")["row"]
    assert first.equals(again)
    assert len(set(first) & set(other)) / ROWS == pytest.approx(0.25, abs=0.01)


def test_rows_of_a_user_stay_together() -> None:
    split = RandomSplit(train=0.6, valid=0.2, test=0.2, by=("user",))
    users = [set(drawn(split, role)["user"]) for role in ROLES]
    assert sum(map(len, users)) == len(set.union(*users)) == 500
    alone = [set(drawn(split.model_copy(update={"by": None}), role)["user"]) for role in ROLES]
    assert len(alone[0] & alone[1]) > 400


def test_several_key_columns_draw_together() -> None:
    split = RandomSplit(train=0.5, valid=0.5)
    parts = [drawn(split, role, key=("user", "row")) for role in ("train", "valid")]
    assert sum(p.height for p in parts) == ROWS
    assert not parts[0]["row"].equals(drawn(split, "train")["row"])


def test_a_row_without_a_key_belongs_to_one_part() -> None:
    frame = pl.DataFrame({"row": [None, None, 1], "user": [None, 2, 3]}, schema={"row": pl.Int64, "user": pl.Int64})
    split = RandomSplit(train=0.5, valid=0.5)
    assert sum(drawn(split, role, frame, ("row", "user")).height for role in ("train", "valid")) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": 0.9, "valid": 0.2}, "shares add up to 1.1; they may not exceed 1"),
        ({"train": 0.0, "valid": 0.2}, "greater than 0"),
        ({"train": 0.5}, "split.valid is missing"),
        ({"train": 0.5, "valid": 0.1, "seed": -1}, "split.seed = -1"),
        ({"train": 0.5, "valid": 0.1, "tset": 0.1}, "tset"),
    ],
)
def test_shares_that_cannot_be_meant_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(Root, {"split": wrong}, source="run.toml")
    assert message in str(raised.value)


# By day


def test_days_hold_their_rows_in_order() -> None:
    split = DaySplit(train="2026-03-01..2026-03-03", valid="2026-03-04", test="2026-03-05")
    assert names_of(split, "train") == ["day=2026-03-01", "day=2026-03-02", "day=2026-03-03"]
    assert names_of(split, "valid") == ["day=2026-03-04"]
    seen = [
        rows_of(split, LOG.lazy(), name, day=pl.col("day"), key=("row",)).collect()
        for role in ROLES
        for name in names_of(split, role)
    ]
    assert sum(f.height for f in seen) == ROWS
    for n, frame in enumerate(seen):
        assert set(frame["day"]) == {date(2026, 3, n + 1)}
        assert frame["row"].to_list() == list(range(n, ROWS, 5))


def test_names_of_parts_that_do_not_exist() -> None:
    assert names_of(DaySplit(train="2026-03-01", valid="2026-03-02"), "test") == []
    assert names_of(RandomSplit(train=0.9, valid=0.1), "test") == []
    assert names_of(RandomSplit(train=0.8, valid=0.1, test=0.1), "test") == ["split=test"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": "2026-03-01..2026-03-04", "valid": "2026-03-04"}, "the future would leak"),
        ({"train": "2026-03-05", "valid": "2026-03-04"}, "train ends 2026-03-05, not before valid begins, 2026-03-04"),
        ({"train": "2026-03-01", "valid": "2026-03-04", "test": "2026-03-02"}, "valid ends 2026-03-04"),
        ({"train": "2026-03-01", "valid": "2026-03-02..2026-03-05", "test": "2026-03-05"}, "the future would leak"),
        ({"train": "2026-03-04..2026-03-01", "valid": "2026-03-05"}, "ends before it begins"),
        ({"train": "March", "valid": "2026-03-05"}, "is not a day or a range of days"),
        ({"train": "2026-02-30", "valid": "2026-03-05"}, "day"),
    ],
)
def test_days_out_of_order_are_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(Root, {"split": wrong}, source="run.toml")
    assert message in str(raised.value)
    assert str(raised.value).startswith("run.toml: split")


def test_days_are_counted_with_both_ends() -> None:
    assert days_of("2026-02-27..2026-03-02") == [
        *(date(2026, 2, 27), date(2026, 2, 28)),
        *(date(2026, 3, 1), date(2026, 3, 2)),
    ]
    assert days_of("2028-02-29") == [date(2028, 2, 29)]


def test_the_kind_of_split_follows_from_its_values() -> None:
    assert isinstance(Root.model_validate({"split": {"train": "2026-03-01", "valid": "2026-03-02"}}).split, DaySplit)
    assert isinstance(Root.model_validate({"split": {"train": 0.5, "valid": 0.5}}).split, RandomSplit)
    split = RandomSplit(train=0.5, valid=0.5)
    assert Root(split=split).split == split
    with pytest.raises(ValidationError):
        Root.model_validate({"split": {}})


@pytest.mark.parametrize("partition", ["split=train", "2026-03-01", "day=", "day=tomorrow", "day=2026-13-01"])
def test_a_partition_that_is_no_day_is_refused(partition: str) -> None:
    split = DaySplit(train="2026-03-01", valid="2026-03-02")
    with pytest.raises(ConfigError, match="write day=2026-03-01"):
        rows_of(split, LOG.lazy(), partition, day=pl.col("day"), key=("row",))


@pytest.mark.parametrize("partition", ["day=2026-03-01", "split=", "split=everything", "train"])
def test_a_partition_that_is_no_share_is_refused(partition: str) -> None:
    with pytest.raises(ConfigError, match="write split=train, =valid or =test"):
        rows_of(RandomSplit(train=0.5, valid=0.5), LOG.lazy(), partition, day=None, key=("row",))


# --- shares of each user's rows --------------------------------------------------------------------------------------

PER_USER = PerUserSplit(per_user="user", train=0.8, valid=0.1, test=0.1, seed=3)
VISITS = pl.DataFrame({"user": [n % 40 for n in range(2000)], "row": range(2000)}).filter(pl.col("row") % 7 > 0)


def parts(split: PerUserSplit, frame: pl.DataFrame = VISITS) -> dict[str, pl.DataFrame]:
    roles = ("train", "valid", "test")
    return {r: rows_of(split, frame.lazy(), f"split={r}", day=None, key=("row",)).collect() for r in roles}


def test_each_user_has_almost_the_shares() -> None:
    found = parts(PER_USER)
    assert sorted(row for part in found.values() for row in part["row"]) == VISITS["row"].to_list()
    rows = dict(VISITS.group_by("user").len().iter_rows())
    for role, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        for user, number in found[role].group_by("user").len().iter_rows():
            assert abs(number - share * rows[user]) <= 1
        assert found[role]["user"].n_unique() == 40
    assert found["test"]["row"].is_sorted()  # the order of the log stays


def test_the_draw_per_user_follows_from_seed_and_key_alone() -> None:
    found = parts(PER_USER)
    shuffled = parts(PER_USER, VISITS.sample(fraction=1, shuffle=True, seed=1))
    other = parts(PER_USER.model_copy(update={"seed": 4}))
    for role, part in found.items():
        assert sorted(part["row"]) == sorted(shuffled[role]["row"])
        assert sorted(part["row"]) != sorted(other[role]["row"])


def test_who_has_few_rows_is_trained_on_first() -> None:
    few = pl.DataFrame({"user": [1, 2, 2, 3, 3, 3], "row": range(6)})
    found = parts(PER_USER, few)
    assert sorted(found["train"]["user"]) == [1, 2, 2, 3, 3]
    assert found["valid"]["user"].to_list() == [3]
    assert found["test"].is_empty()


def test_test_rows_may_be_named() -> None:
    split = PerUserSplit(per_user="user", train=0.5, valid=0.5, test_where="row >= 1900")
    found = parts(split)
    assert found["test"]["row"].to_list() == [r for r in VISITS["row"] if r >= 1900]
    assert max(found["train"]["row"].max(), found["valid"]["row"].max()) < 1900  # pyright: ignore
    assert sum(part.height for part in found.values()) == VISITS.height
    assert names_of(split, "test") == ["split=test"]
    assert names_of(PerUserSplit(per_user="user", train=0.9, valid=0.1), "test") == []
    assert names_of(PER_USER, "test") == ["split=test"]


def test_shares_per_user_that_cannot_be_meant_are_refused() -> None:
    tree = {"per_user": "user", "train": 0.8, "valid": 0.1}
    assert isinstance(Root.model_validate({"split": tree}).split, PerUserSplit)
    with pytest.raises(ValueError, match="test and test_where exclude each other"):
        Root.model_validate({"split": {**tree, "test": 0.1, "test_where": "row = 1"}})
    with pytest.raises(ValueError, match=r"shares add up to 1\.2"):
        Root.model_validate({"split": {**tree, "test": 0.3}})
