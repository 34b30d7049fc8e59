"""Sources: every format, time, table and label that a run file can ask for; rows that cannot be used, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal
from pydantic import ValidationError

from base.errors import ConfigError, DataError
from base.storage import publish
from features.columns import explained
from features.readers.criteo import COUNTS, IDS, read_criteo
from features.readers.movielens import read_movielens_1m
from features.source import REASON, Data, Files, Source, Table

DAYS = {"train": "2026-03-01", "valid": "2026-03-02"}
ALL = {"train": 0.5, "valid": 0.5}
SHARED = Path(__file__).parents[2] / "../shared/data"


def source(
    path: Path | str, *, tables: Sequence[Mapping[str, Any]] = (), derive: Mapping[str, str] | None = None, **data: Any
) -> Source:
    settings = {"path": str(path), "key": ["k"], "labels": ["y"], "split": ALL, **data}
    return Source(Data.model_validate(settings), [Table.model_validate(t) for t in tables], derive)


def raw(found: Source) -> pl.DataFrame:
    """The rows of all partitions."""
    names = found.partitions("train") + found.partitions("valid")
    frame = pl.concat([found.raw(p).collect() for p in names])
    return frame.sort("k") if "k" in frame.columns else frame


def checked(found: Source) -> pl.DataFrame:
    names = found.partitions("train") + found.partitions("valid")
    return pl.concat([found.checked(p).collect() for p in names]).sort("k", maintain_order=True)


def csv(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- files -----------------------------------------------------------------------------------------------------------


def write_days(folder: Path, version: int, parts: int = 2, days: Sequence[int] = (1, 2)) -> None:
    for day in days:
        with publish(folder / f"day=2026-03-0{day}", "log", overwrite=True) as staging:
            for part in range(parts):
                frame = pl.DataFrame({"k": [1000 * day + part], "y": [part % 2], "version": [version]})
                frame.write_parquet(staging / f"part-{part}.parquet")


@pytest.mark.parametrize("pattern", ["day=*/*.parquet", "", "**/part-*.parquet"], ids=["glob", "folder", "deep glob"])
def test_published_days_are_read_by_day(pattern: str, tmp_path: Path) -> None:
    for version in (1, 2, 3):  # three versions lie in .versions, one of each day is published
        write_days(tmp_path / "log", version)
    found = source(tmp_path / "log" / pattern, time="day", split=DAYS)
    assert found.partitions("train") == ["day=2026-03-01"]
    first = found.raw("day=2026-03-01").collect()
    assert first.rows() == [(1000, 0, 3, date(2026, 3, 1)), (1001, 1, 3, date(2026, 3, 1))]
    assert first.columns == ["k", "y", "version", "day"]
    assert raw(found)["k"].to_list() == [1000, 1001, 2000, 2001]
    assert found.undated() == 0


def test_a_folder_published_meanwhile_is_not_mixed_in(tmp_path: Path) -> None:
    write_days(tmp_path / "log", 1, parts=3)
    found = source(tmp_path / "log/day=*/*.parquet", time="day", split=DAYS)
    planned = found.raw("day=2026-03-01")
    write_days(tmp_path / "log", 2, parts=3)
    assert planned.collect()["version"].to_list() == [1, 1, 1]
    assert found.raw("day=2026-03-01").collect()["version"].to_list() == [2, 2, 2]


def test_only_the_files_of_a_day_are_opened(tmp_path: Path) -> None:
    write_days(tmp_path / "log", 1)
    (tmp_path / "log/day=2026-03-02/part-0.parquet").write_bytes(b"broken")
    found = source(tmp_path / "log/day=*/*.parquet", time="day", split=DAYS)
    assert found.raw("day=2026-03-01").collect().height == 2


def test_a_day_without_files_is_named(tmp_path: Path) -> None:
    write_days(tmp_path / "log", 1, days=(1,))
    found = source(tmp_path / "log/day=*/*.parquet", time="day", split=DAYS)
    with pytest.raises(DataError, match=r"no files for day 2026-03-02; check the path and data\.split"):
        found.raw("day=2026-03-02")


def test_no_files_at_all_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing/\*\.csv: no files match"):
        source(tmp_path / "nothing/*.csv").raw("split=train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files match"):
        source(tmp_path / "empty").raw("split=train")


def test_values_of_folders_are_days_numbers_or_text(tmp_path: Path) -> None:
    for site, code in (("a", "7"), ("b", "007")):
        csv(tmp_path, f"k,y\n{site},1\n", f"site={site}/code={code}/log.csv")
    path = tmp_path / "site=*/code=7/*.csv"
    assert raw(source(path)).rows() == [("a", 1, "a", 7)]
    assert raw(source(tmp_path / "site=b/code=*/*.csv")).rows() == [("b", 1, "b", "007")]


def test_csv_with_a_header(tmp_path: Path) -> None:
    csv(tmp_path, "k,y,zip\n1,0,00501\n2,1,10001\n", "a.csv")
    csv(tmp_path, "k,y,zip\n3,1,00002\n", "b.csv")
    assert raw(source(tmp_path)).rows() == [(1, 0, 501), (2, 1, 10001), (3, 1, 2)]
    typed = raw(source(tmp_path / "*.csv", types={"zip": "text", "k": "float"}))
    assert typed.rows() == [(1.0, 0, "00501"), (2.0, 1, "10001"), (3.0, 1, "00002")]


def test_integers_beyond_int64_are_readable_by_others(tmp_path: Path) -> None:
    """Polars reads them as integers of 128 bits, which Parquet's other readers do not know."""
    path = csv(tmp_path, f"k,y,big\n{2**64 - 1},0,{2**127 - 1}\n{2**63},1,-5\n")
    keys = pl.concat([source(path).raw(f"split={part}").select("k") for part in ("train", "valid")])
    keys.sink_parquet(tmp_path / "keys.parquet")
    assert sorted(pq.read_table(tmp_path / "keys.parquet")["k"].to_pylist()) == [2**63, 2**64 - 1]
    pl.scan_csv(path).sink_parquet(tmp_path / "wide.parquet")
    found = source(tmp_path / "wide.parquet").raw("split=train").select("k", "y")
    assert found.collect_schema() == {"k": pl.UInt64, "y": pl.Int64}
    message = r"log: column 'big' holds (1701411834\d+|-5), .* types = \{ \"big\" = \"text\" \} beside its path"
    with pytest.raises(DataError, match=message), explained("log"):
        raw(source(path))
    typed = raw(source(path, types={"big": "text", "k": "text"}))
    assert typed.rows() == [(str(2**64 - 1), 0, str(2**127 - 1)), (str(2**63), 1, "-5")]
    typed.write_parquet(tmp_path / "typed.parquet")
    assert pq.read_table(tmp_path / "typed.parquet")["big"].to_pylist() == [str(2**127 - 1), "-5"]


def test_a_value_unlike_the_first_ten_thousand_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,y\n" + "1,0\n" * 10_000 + f"{2**64},1\n")
    message = f"log: column 'k' holds {2**64}, which is not of the type that its other values have"
    with pytest.raises(DataError, match=message), explained("log"):
        raw(source(path))
    assert raw(source(path, types={"k": "text"}))["k"][-1] == str(2**64)


def test_csv_without_a_header(tmp_path: Path) -> None:
    path = csv(tmp_path, "1;0;00501\n2;1;10001\n", "log.data")
    found = raw(source(path, format="csv", header=False, names=["k", "y", "zip"], delimiter=";", types={"zip": "text"}))
    assert found.rows() == [(1, 0, "00501"), (2, 1, "10001")]


def test_csv_texts_that_mean_missing(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,y,job,pay\n1,0, ?,5\n2,1,?,?\n3,1, cook ,\n")
    plain = raw(source(path, null_values=["?"]))
    assert plain["job"].to_list() == [" ?", None, " cook "]
    assert plain["pay"].to_list() == [5, None, None]
    trimmed = raw(source(path, null_values=["?"], trim=True))
    assert trimmed["job"].to_list() == [None, None, "cook"]
    assert trimmed["pay"].to_list() == [5, None, None]
    assert raw(source(path, trim=True))["job"].to_list() == ["?", "?", "cook"]


def test_rows_can_be_numbered(tmp_path: Path) -> None:
    csv(tmp_path, "y\n0\n1\n", "a.csv")
    csv(tmp_path, "y\n1\n", "b.csv")
    found = raw(source(tmp_path, row_number="k"))
    assert found.rows() == [(0, 0), (1, 1), (2, 1)]
    for day in (1, 2):
        csv(tmp_path / "days", "y\n0\n", f"day=2026-03-0{day}/a.csv")
    with pytest.raises(ConfigError, match=r"data\.row_number .* give data\.key a column"):
        source(tmp_path / "days/*/a.csv", row_number="k", time="day", split=DAYS).raw("day=2026-03-01")


def test_the_files_behind_a_partition_have_an_identity(tmp_path: Path) -> None:
    write_days(tmp_path / "log", 1)
    side = csv(tmp_path, "k,v\n1,2\n", "side.csv")

    def prints() -> list[str]:
        found = source(
            tmp_path / "log/day=*/*.parquet", time="day", split=DAYS, tables=[{"path": str(side), "on": "k"}]
        )
        return [found.fingerprint(f"day=2026-03-0{d}")["sha256"] for d in (1, 2)]

    before = prints()
    assert before == prints()
    assert before[0] != before[1]
    write_days(tmp_path / "log", 2, days=(1,))
    after = prints()
    assert after[0] != before[0]
    assert after[1] == before[1]
    csv(tmp_path, "k,v\n1,3\n", "side.csv")
    assert prints()[1] != before[1]


# --- time ------------------------------------------------------------------------------------------------------------

NOON = [datetime(2026, 3, d, 12, 30, tzinfo=UTC) for d in (1, 2, 1, 9)]
NEW_YORK = timezone(timedelta(hours=-5))
TIMES: dict[str, tuple[list[Any], Any, dict[str, Any]]] = {
    "date": ([t.date() for t in NOON], pl.Date, {}),
    "ISO text": ([t.date().isoformat() for t in NOON], pl.String, {}),
    "text": ([t.strftime("%d/%m/%Y %H:%M") for t in NOON], pl.String, {"format": "%d/%m/%Y %H:%M"}),
    "seconds": ([int(t.timestamp()) for t in NOON], pl.Int64, {"unit": "s"}),
    "milliseconds": ([int(t.timestamp() * 1e3) for t in NOON], pl.Int64, {"unit": "ms"}),
    "microseconds": ([int(t.timestamp() * 1e6) for t in NOON], pl.Int64, {"unit": "us"}),
    "timestamp": ([t.replace(tzinfo=None) for t in NOON], pl.Datetime("ms"), {}),
    "timestamp in UTC": (NOON, pl.Datetime("us", "UTC"), {}),
    "timestamp in New York": (
        [t.astimezone(NEW_YORK) - timedelta(hours=10) for t in NOON],  # 21:30 of the day before, there: 02:30 UTC
        pl.Datetime("us", "America/New_York"),
        {},
    ),
}


@pytest.mark.parametrize("name", TIMES)
def test_a_row_belongs_to_its_day_in_utc(name: str, tmp_path: Path) -> None:
    values, dtype, settings = TIMES[name]
    pl.DataFrame({"k": range(5), "y": 0, "at": pl.Series([*values, None], dtype=dtype)}).write_parquet(
        tmp_path / "log.parquet"
    )
    found = source(tmp_path / "log.parquet", time={"column": "at", **settings}, split=DAYS)
    assert found.raw("day=2026-03-01").collect()["k"].to_list() == [0, 2]
    assert found.raw("day=2026-03-02").collect()["k"].to_list() == [1]
    assert found.undated() == 1


def test_an_undated_row_matters_only_to_days(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,y,at\n1,0,2026-03-01\n2,1,\n3,0,\n")
    assert source(path, time="at", split=DAYS).undated() == 2
    assert source(path, time="at").undated() == 0


@pytest.mark.parametrize(
    ("values", "settings", "error", "message"),
    [
        ([1, 2], {}, ConfigError, 'holds integers; say what they count: unit = "s", "ms" or "us"'),
        ([1.0, 2.0], {}, DataError, "holds float; it must be a date, a timestamp or text"),
        (["soon", "2026-03-01"], {}, DataError, "log.parquet, data.time: conversion from `str`"),
    ],
)
def test_times_that_cannot_be_read(
    values: list[Any], settings: dict[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    pl.DataFrame({"k": [1, 2], "y": 0, "at": values}).write_parquet(tmp_path / "log.parquet")
    found = source(tmp_path / "log.parquet", time={"column": "at", **settings}, split=DAYS)
    with pytest.raises(error, match=message.replace("(", r"\(")):
        found.undated()


@pytest.mark.parametrize("in_folders", [True, False])
def test_the_days_before_a_day_are_those_since_the_log_begins(tmp_path: Path, in_folders: bool) -> None:
    """Also one that has no rows, unless it is known to have none."""
    if in_folders:
        write_days(tmp_path / "log", 1, days=(1, 2, 4, 5))
        path = f"{tmp_path}/log/day=*/*.parquet"
    else:
        lines = "".join(f"{k},0,2026-03-0{day}\n" for k, day in enumerate((4, 1, 2, 2, 5)))
        path = str(csv(tmp_path, f"k,y,day\n{lines}9,0,\n"))
    found = source(path, time="day", split=DAYS)
    assert found.days_before(date(2026, 3, 5)) == [f"day=2026-03-0{day}" for day in (1, 2, 3, 4)]
    assert found.days_before(date(2026, 3, 5), 2) == ["day=2026-03-03", "day=2026-03-04"]
    assert found.days_before(date(2026, 3, 4), 2) == ["day=2026-03-02", "day=2026-03-03"]
    assert found.days_before(date(2026, 3, 1)) == []
    without = source(path, time="day", split=DAYS, without_log=["2026-03-03"])
    assert without.days_before(date(2026, 3, 5)) == [f"day=2026-03-0{day}" for day in (1, 2, 4)]
    with pytest.raises(ConfigError, match=r"a log without data\.time and a split by day has no days before"):
        source(path).days_before(date(2026, 3, 5))


def test_the_columns_of_tables_whose_key_is_the_item(tmp_path: Path) -> None:
    csv(tmp_path, "k,y,item,user\n1,0,a,u\n")
    csv(tmp_path, "item,colour,size\na,red,1\n", "items.csv")
    csv(tmp_path, "item,since,price\na,2026-03-01,5\n", "prices.csv")
    csv(tmp_path, "item,user,bought\na,u,1\n", "both.csv")
    tables = [
        {"path": f"{tmp_path}/items.csv", "on": "item", "prefix": "item_"},
        {"path": f"{tmp_path}/prices.csv", "on": "item", "as_of": {"column": "since"}},
        {"path": f"{tmp_path}/both.csv", "on": ["item", "user"]},
    ]
    found = source(tmp_path / "log.csv", tables=tables, key=["k"])
    assert found.item_columns("item") == ["item_colour", "item_size", "price"]
    assert found.item_columns("user") == []
    chosen = source(tmp_path / "log.csv", tables=[{**tables[0], "columns": ["size"]}], key=["k"])
    assert chosen.item_columns("item") == ["item_size"]


def test_days_need_a_time(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,y,at\n1,0,2026-03-01\n")
    with pytest.raises(ConfigError, match=r"data\.time is not given; name the time column"):
        source(path, split=DAYS).partitions("train")
    with pytest.raises(DataError, match=r"data\.time: column 'att' is missing; did you mean 'at'"):
        source(path, split=DAYS, time="att").raw("day=2026-03-01")


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_joined_table_leaves_the_rows_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    log = pl.DataFrame({"k": range(5_000), "y": 0, "user": rng.integers(0, 900, 5_000)})
    log = log.with_columns(pl.when(pl.col("k") % 50 > 0).then("user").alias("user"))
    log.write_parquet(tmp_path / "log.parquet")
    ages = pl.DataFrame({"user": rng.permutation(800), "age": rng.integers(18, 80, 800)})
    ages.write_parquet(tmp_path / "users.parquet")
    table = {"path": str(tmp_path / "users.parquet"), "on": "user"}
    age_of = dict(ages.iter_rows())
    for name in ("split=train", "split=valid"):
        plain = source(tmp_path / "log.parquet").raw(name).collect()
        joined = source(tmp_path / "log.parquet", tables=[table]).raw(name).collect(engine="streaming")
        assert_frame_equal(joined.drop("age"), plain)
        assert joined["age"].to_list() == [age_of.get(u) for u in joined["user"]]
        assert 0 < joined["age"].null_count() < joined.height


def test_several_tables_and_keys(tmp_path: Path) -> None:
    log = csv(tmp_path, "k,y,user,item\n1,0,a,7\n2,1,b,7\n3,1,a,8\n")
    users = csv(tmp_path, "user,item,age,job\na,7,30,cook\na,8,31,smith\n", "pairs.csv")
    items = csv(tmp_path, "item,age\n7,100\n", "items.csv")
    tables = [
        {"path": str(users), "on": ["user", "item"], "columns": ["age"]},
        {"path": str(items), "on": "item", "prefix": "item_"},
    ]
    found = raw(source(log, tables=tables))
    assert found.columns == ["k", "y", "user", "item", "age", "item_age"]
    assert found.select("age", "item_age").rows() == [(30, 100), (None, 100), (31, None)]


def test_a_table_may_be_joined_by_what_an_earlier_one_brought(tmp_path: Path) -> None:
    log = csv(tmp_path, "k,y,item\n1,0,7\n2,1,8\n")
    items = csv(tmp_path, "item,shop\n7,x\n8,z\n", "items.csv")
    shops = csv(tmp_path, "shop,city\nx,Oslo\n", "shops.csv")
    tables = [{"path": str(items), "on": "item"}, {"path": str(shops), "on": "shop"}]
    assert raw(source(log, tables=tables))["city"].to_list() == ["Oslo", None]


def test_a_table_with_two_rows_for_a_key_is_refused_by_name(tmp_path: Path) -> None:
    log = csv(tmp_path, "k,y,user\n1,0,a\n")
    users = csv(tmp_path, "user,age\na,30\nb,31\nb,32\nb,33\n", "users.csv")
    with pytest.raises(DataError, match=r"users\.csv: {'user': 'b'} stands 3 times; keep one row, or set as_of"):
        source(log, tables=[{"path": str(users), "on": "user"}]).raw("split=train")


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"on": "user"}, ConfigError, "'y' is in the log already; set prefix or columns"),
        ({"on": "usr"}, DataError, "column 'usr' is missing; did you mean 'user'"),
        ({"on": "only"}, DataError, "side.csv: the log: column 'only' is missing"),
        ({"on": "user", "columns": ["agee"]}, DataError, "columns: column 'agee' is missing; did you mean 'age'"),
        (
            {"on": "user", "columns": ["age"], "as_of": {"column": "since"}},
            DataError,
            "as_of: column 'since' is missing",
        ),
        ({"on": "user", "columns": ["age"], "as_of": {"column": "age", "unit": "s"}}, ConfigError, "needs data.time"),
    ],
)
def test_tables_that_do_not_fit(table: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    log = csv(tmp_path, "k,y,user\n1,0,a\n")
    side = csv(tmp_path, "user,age,y,only\na,30,1,2\n", "side.csv")
    with pytest.raises(error, match=message):
        source(log, tables=[{"path": str(side), **table}]).raw("split=train")


@pytest.mark.parametrize("version", [{}, {"as_of": {"column": "since"}}], ids=["plain", "versioned"])
def test_keys_of_another_kind_are_named(version: dict[str, Any], tmp_path: Path) -> None:
    log = csv(tmp_path, "k,y,item,at\n1,0,7,2026-03-05\n")
    texts = csv(tmp_path, "item,size,since\ni7,3,2026-03-01\n", "texts.csv")
    with pytest.raises(DataError, match=r"texts\.csv: 'item' holds text, in the log integer; convert one of them"):
        source(log, time="at", tables=[{"path": str(texts), "on": "item", **version}]).raw("split=train")
    numbers = csv(tmp_path, "item,price\n7,3\n", "numbers.csv")
    found = source(log, tables=[{"path": str(numbers), "on": "item"}])
    with pytest.raises(DataError, match=r"numbers\.csv: 'item' holds integer, in .*texts\.csv text; convert one"):
        found.items(Files(path=str(texts)))


def test_rows_of_a_day_need_not_be_whole_where_users_alone_are_asked_for(tmp_path: Path) -> None:
    csv(tmp_path, "user\na\n", "day=2026-03-01/log.csv")
    users, items = csv(tmp_path, "user,age\na,30\n", "users.csv"), csv(tmp_path, "item,size\n7,3\n", "items.csv")
    tables = [{"path": str(items), "on": "item"}, {"path": str(users), "on": "user"}]
    found = source(tmp_path / "day=*/*.csv", time="day", split=DAYS, tables=tables)
    with pytest.raises(DataError, match=r"data\.key: column 'k' is missing"):
        found.raw("day=2026-03-01")
    assert found.raw("day=2026-03-01", whole=False).collect().columns == ["user", "day", "age"]


def test_a_versioned_row_holds_from_its_own_time_on(tmp_path: Path) -> None:
    log = csv(
        tmp_path,
        "k,y,user,at\n1,0,a,2026-03-05\n2,0,a,2026-03-01\n3,0,a,2026-03-02\n4,0,b,2026-03-09\n5,0,,2026-03-09\n"
        "6,0,a,\n7,0,c,2026-03-09\n8,0,a,2026-03-04\n9,0,a,2026-02-28\n",
    )
    users = csv(
        tmp_path,
        "user,since,level\na,2026-03-04,40\na,2026-03-01,10\nb,2026-03-10,99\n,2026-03-01,77\na,2026-03-02,20\na,,55\n",
        "users.csv",
    )
    table = {"path": str(users), "on": "user", "as_of": {"column": "since"}}
    found = raw(source(log, time="at", tables=[table]))
    assert found.columns == ["k", "y", "user", "at", "level"]
    assert dict(found.select("k", "level").iter_rows()) == {
        **{1: 40, 2: 10, 3: 20, 8: 40},  # the latest at or before
        **{9: None, 4: None},  # none before
        **{5: None, 6: None, 7: None},  # no user, no time, no such user
    }


def test_versioned_rows_keep_the_order_of_the_log(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = 4_000
    log = pl.DataFrame(
        {"k": range(rows), "y": 0, "user": rng.integers(0, 40, rows), "at": rng.integers(0, 10**6, rows)}
    )
    log.write_parquet(tmp_path / "log.parquet")
    side = pl.DataFrame({"user": rng.integers(0, 40, 600), "since": rng.permutation(10**6)[:600], "level": range(600)})
    side.write_parquet(tmp_path / "users.parquet")
    table = {"path": str(tmp_path / "users.parquet"), "on": "user", "as_of": {"column": "since", "unit": "s"}}
    found = source(tmp_path / "log.parquet", time={"column": "at", "unit": "s"}, tables=[table])
    joined = pl.concat([found.raw(p).collect(engine="streaming") for p in ("split=train", "split=valid")])
    assert joined.height == rows
    for name in ("split=train", "split=valid"):
        assert found.raw(name).collect()["k"].is_sorted()
    history: dict[int, list[tuple[int, int]]] = {}
    for user, since, level in side.iter_rows():
        history.setdefault(user, []).append((since, level))
    for _, _, user, at, level in joined.iter_rows():
        before = [entry for entry in history.get(user, []) if entry[0] <= at]
        assert level == (max(before)[1] if before else None)


# --- labels and reasons ----------------------------------------------------------------------------------------------


def test_labels_are_columns_or_expressions(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,y,stars,seen\n1,0,5,true\n2,1,2,false\n3,1,3,true\n")
    listed = checked(source(path, labels=["y", "seen"]))
    assert listed.select("@y", "@seen").rows() == [(0, 1), (1, 0), (1, 1)]
    assert listed.schema["@y"] == listed.schema["@seen"] == pl.Int8
    assert listed[REASON].null_count() == 3
    computed = checked(source(path, labels={"good": "stars > 3", "y": "1 - y"}))
    assert computed.select("@good", "@y", "y").rows() == [(1, 1, 0), (0, 0, 1), (0, 0, 1)]
    for none in ([], {}):
        with pytest.raises(ValidationError, match="labels"):
            source(path, labels=none)


def test_labels_may_read_derived_columns_which_slices_may_read_too(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,y,stars\n1,0,5\n2,1,2\n")
    found = checked(source(path, derive={"liked": "stars > 3"}, labels={"click": "liked"}, where="liked OR k > 0"))
    assert found["@click"].to_list() == [1, 0]
    assert found["liked"].to_list() == [True, False]


def test_where_chooses_rows_to_learn_from_not_to_score(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,y,stars\n1,0,5\n2,7,3\n3,1,2\n4,1,\n")
    found = source(path, where="stars <> 3")
    assert checked(found)["k"].to_list() == [1, 3]  # where a comparison with nothing is not true
    assert raw(found)["k"].to_list() == [1, 2, 3, 4]
    assert checked(source(path, where="stars IN (3, 5)"))["k"].to_list() == [1, 2]


def test_rows_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,j,y\n1,1,0\n2,1,\n3,1,2\n4,1,0.5\n,1,1\n5,,0\n6,1,NaN\n7,1,1\n7,2,0\n7,1,0\n,1,\n")
    found = source(path, key=["k", "j"])
    rows = pl.concat([found.checked(p).collect() for p in ("split=train", "split=valid")])
    reasons = {(k, j, y): (label, reason) for k, j, y, label, reason in rows.rows() if y == y}
    assert reasons == {
        (1, 1, 0.0): (0, None),
        (2, 1, None): (None, "label y is null"),
        (3, 1, 2.0): (None, "label y is 2.0, not 0 or 1"),
        (4, 1, 0.5): (None, "label y is 0.5, not 0 or 1"),
        (None, 1, 1.0): (1, "key k is null"),
        (None, 1, None): (None, "key k is null"),
        (5, None, 0.0): (0, "key j is null"),
        (7, 1, 1.0): (1, None),
        (7, 2, 0.0): (0, None),
        (7, 1, 0.0): (0, "key k, j is repeated"),
    }
    assert rows.filter(pl.col("k") == 6)[REASON].to_list() == ["label y is NaN, not 0 or 1"]
    assert rows.height == 11


def test_rows_of_a_positive_label_are_as_if_where_said_so_but_for_labels_that_are_none(tmp_path: Path) -> None:
    """A pair that was a negative first is not repeated; what is neither 1 nor 0 is bad, not left out."""
    rows = [(1, 0.0), (1, 1.0), (2, 1.0), (2, 1.0), (None, 0.0), (3, None), (4, 2.0), (5, float("nan"))]
    folder = tmp_path / "day=2026-03-01"
    folder.mkdir()
    pl.DataFrame(rows, schema=["k", "y"], orient="row").write_parquet(folder / "a.parquet")
    plain = source(tmp_path / "day=*/*.parquet", split=DAYS, time="day")
    found = replace(plain, positive="y").checked("day=2026-03-01")
    for engine in ("streaming", "in-memory"):
        marked = found.collect(engine=engine)
        assert marked.select("k", REASON).rows() == [
            (1, None),
            (2, None),
            (2, "key k is repeated"),
            (3, "label y is null"),
            (4, "label y is 2.0, not 0 or 1"),
            (5, "label y is NaN, not 0 or 1"),
        ]
        assert marked.filter(pl.col(REASON).is_null())["@y"].to_list() == [1, 1]
    assert plain.checked("day=2026-03-01").collect().height == len(rows)


def test_a_positive_label_that_is_not_mature_is_kept_and_unknown(tmp_path: Path) -> None:
    folder = tmp_path / "log/day=2026-03-01"
    folder.mkdir(parents=True)
    pl.DataFrame(late_rows(1)).write_parquet(folder / "a.parquet")
    late = {**LATE, "observed_until": "2026-03-02"}
    rows = replace(source(tmp_path / "log/day=*/*.parquet", time="day", **late), positive="buy")
    found = rows.checked("day=2026-03-01").collect()
    assert found.select("k", "@buy", REASON).rows() == [(10, None, None)]


def test_the_first_of_repeated_rows_is_good(tmp_path: Path) -> None:
    pl.DataFrame({"k": [n // 2 for n in range(20_000)], "y": [n % 2 for n in range(20_000)]}).write_parquet(
        tmp_path / "log.parquet"
    )
    found = source(tmp_path / "log.parquet", split={"train": 0.9, "valid": 0.1}).checked("split=train")
    for engine in ("streaming", "in-memory"):
        good = found.filter(pl.col(REASON).is_null()).collect(engine=engine)
        assert good["k"].is_unique().all()
        assert good["@y"].sum() == 0
        assert good.height == pytest.approx(9_000, abs=200)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"labels": ["name"]}, DataError, "label 'name' holds text; it must be 0 or 1: give it as a SQL expression"),
        (
            {"labels": {"y": "clicks > 0"}},
            DataError,
            r"data\.labels\.y: column 'clicks' is missing; did you mean 'click'",
        ),
        ({"labels": {"y": "click >"}}, ConfigError, r"data\.labels\.y = 'click >': not a SQL expression"),
        ({"labels": {"y": "click > AVG(click)"}}, ConfigError, r"data\.labels\.y = .* one row"),
        ({"where": "nme = 'a'"}, DataError, r"data\.where: column 'nme' is missing; did you mean 'name'"),
        ({"where": "click = MAX(click)"}, ConfigError, r"data\.where = .* one row"),
        ({"derive": {"name": "click + 1"}}, ConfigError, r"derive\.name: the log already has this column"),
        ({"key": ["kk"]}, DataError, r"data\.key: column 'kk' is missing; did you mean 'k'"),
        (
            {"split": {**ALL, "by": ["names"]}},
            DataError,
            r"data\.split\.by: column 'names' is missing; did you mean 'name'",
        ),
    ],
)
def test_settings_that_do_not_fit_the_log(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = csv(tmp_path, "k,click,name\n1,0,a\n2,1,b\n")
    with pytest.raises(error, match=message):
        source(path, **{"labels": ["click"], **settings}).checked("split=train")


def test_random_parts_of_a_source_are_its_rows(tmp_path: Path) -> None:
    frame = pl.DataFrame({"k": range(3_000), "y": 0, "user": [n % 70 for n in range(3_000)]})
    frame.write_parquet(tmp_path / "a.parquet")
    split = {"train": 0.8, "valid": 0.1, "test": 0.1, "by": ["user"]}
    found = source(tmp_path / "a.parquet", split=split)
    names = [p for role in ("train", "valid", "test") for p in found.partitions(role)]
    assert names == ["split=train", "split=valid", "split=test"]
    parts = [found.raw(p).collect() for p in names]
    assert pl.concat(parts).sort("k")["k"].to_list() == list(range(3_000))
    assert sum(p["user"].n_unique() for p in parts) == 70


# --- funnels ---------------------------------------------------------------------------------------------------------


def reasons_of(found: Source) -> dict[int, str | None]:
    return dict(checked(found).select("k", REASON).iter_rows())


def test_a_step_that_was_skipped_makes_a_bad_row(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,click,cart,buy\n1,0,0,0\n2,1,0,0\n3,1,1,1\n4,0,1,1\n5,1,0,1\n6,0,0,1\n7,,1,1\n")
    skipped = "label {} is 1 where {}, before it in data.funnel, is 0"
    found = source(path, labels=["click", "cart", "buy"], funnel=["click", "cart", "buy"])
    assert reasons_of(found) == {
        **dict.fromkeys((1, 2, 3)),
        4: skipped.format("cart", "click"),
        5: skipped.format("buy", "cart"),
        6: skipped.format("buy", "cart"),
        7: "label click is null",
    }
    two = source(path, labels=["click", "cart", "buy"], funnel=["click", "buy"])  # cart is of no concern
    assert [k for k, reason in reasons_of(two).items() if reason == skipped.format("buy", "click")] == [4, 6]
    assert list(reasons_of(source(path, labels=["click", "cart", "buy"])).values()) == [None] * 6 + [
        "label click is null"
    ]


def test_a_funnel_the_wrong_way_round_shows(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,click,buy\n1,0,0\n2,1,0\n3,1,0\n4,1,1\n")
    found = reasons_of(source(path, labels=["click", "buy"], funnel=["buy", "click"]))
    wrong = "label click is 1 where buy, before it in data.funnel, is 0"
    assert found == {1: None, 2: wrong, 3: wrong, 4: None}


def test_a_funnel_is_of_labels_and_not_of_their_columns(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,clicks,paid\n1,2,9.5\n2,0,0\n3,0,3\n")
    labels = {"click": "clicks > 0", "buy": "paid > 0 AND clicks > 0", "paid_anyhow": "paid > 0"}
    found = checked(source(path, labels=labels, funnel=["click", "buy"]))
    assert found.select("@click", "@buy").rows() == [(1, 1), (0, 0), (0, 0)]
    assert found[REASON].null_count() == 3
    wrong = checked(source(path, labels=labels, funnel=["click", "paid_anyhow"]))
    assert wrong[REASON].to_list()[2] == "label paid_anyhow is 1 where click, before it in data.funnel, is 0"


# --- labels that mature ----------------------------------------------------------------------------------------------

LATE: dict[str, Any] = {
    "labels": ["click", "buy"],
    "funnel": ["click", "buy"],
    "matures_after_days": {"buy": 2},
    "observed_until": "2026-03-04",
    "split": {"train": "2026-03-01..2026-03-03", "valid": "2026-03-04"},
}


def late_rows(day: int) -> list[dict[str, Any]]:
    """A buyer, two who did not buy, one of whom nothing is known yet, and nonsense."""
    values = [(1, 1), (1, 0), (0, 0), (1, None), (1, 7)]
    return [{"k": 10 * day + n, "click": click, "buy": buy} for n, (click, buy) in enumerate(values)]


def test_labels_of_the_last_days_are_unknown_whatever_the_log_says(tmp_path: Path) -> None:
    """Two days after its row a conversion counts: of a log until the 4th those of the 1st and 2nd are known."""
    for day in range(1, 5):
        folder = tmp_path / f"log/day=2026-03-0{day}"
        folder.mkdir(parents=True)
        pl.DataFrame(late_rows(day)).write_parquet(folder / "a.parquet")
    found = source(tmp_path / "log/day=*/*.parquet", time="day", **LATE)
    for day in range(1, 5):
        partition = f"day=2026-03-0{day}"
        rows = found.checked(partition).collect()
        mature = day <= 2
        assert found.data.immature(partition) == (() if mature else ("buy",))
        assert rows["@click"].to_list() == [1, 1, 0, 1, 1]
        assert rows["@buy"].to_list() == ([1, 0, 0, None, None] if mature else [None] * 5)
        bad = ["label buy is null", "label buy is 7.0, not 0 or 1"] if mature else [None, None]
        assert rows[REASON].to_list() == [None, None, None, *bad]
    later = source(tmp_path / "log/day=*/*.parquet", time="day", **{**LATE, "observed_until": "2026-03-05"})
    assert later.data.immature("day=2026-03-03") == ()
    assert later.checked("day=2026-03-03").collect()["@buy"].null_count() == 2
    assert later.data.immature("day=2026-03-04") == ("buy",)


@pytest.mark.parametrize("name", ["date", "ISO text", "milliseconds", "timestamp in New York"])
def test_a_label_matures_by_the_day_of_its_row_in_utc(name: str, tmp_path: Path) -> None:
    """Rows of the 1st, the 2nd, the 1st and the 9th, and one without a day."""
    values, dtype, settings = TIMES[name]
    pl.DataFrame({"k": range(5), "click": 1, "buy": 1, "at": pl.Series([*values, None], dtype=dtype)}).write_parquet(
        tmp_path / "log.parquet"
    )
    time = {"column": "at", **settings}
    for until, known in (
        ("2026-03-02", []),
        ("2026-03-03", [0, 2]),
        ("2026-03-04", [0, 1, 2]),
        ("2026-03-10", [0, 1, 2]),
        ("2026-03-11", [0, 1, 2, 3]),
    ):
        settings = {**LATE, "observed_until": until, "split": ALL}
        rows = checked(source(tmp_path / "log.parquet", time=time, **settings))
        assert [k for k, buy in rows.select("k", "@buy").iter_rows() if buy is not None] == known
        assert rows["@click"].null_count() == 0
        assert rows[REASON].null_count() == 5  # a row without a day is never known, and not bad for that


def test_a_positive_that_came_early_does_not_count_before_its_time(tmp_path: Path) -> None:
    """Else the positives of the last days would be known and the negatives not."""
    path = csv(tmp_path, "k,click,buy,at\n1,1,1,2026-03-03\n2,1,0,2026-03-03\n3,0,1,2026-03-03\n4,0,1,2026-03-02\n")
    rows = checked(source(path, time="at", **{**LATE, "split": ALL}))
    assert rows["@buy"].to_list() == [None, None, None, 1]
    skipped = "label buy is 1 where click, before it in data.funnel, is 0"
    assert rows[REASON].to_list() == [None, None, None, skipped]  # not before it is known either


def test_scoring_sees_every_row_whatever_is_known(tmp_path: Path) -> None:
    path = csv(tmp_path, "k,click,buy,at\n1,1,1,2026-03-03\n2,1,0,2026-03-04\n")
    assert raw(source(path, time="at", **{**LATE, "split": ALL})).columns == ["k", "click", "buy", "at"]
    assert raw(source(path, time="at", **{**LATE, "split": ALL})).height == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"funnel": ["click", "bought"]}, r"funnel names 'bought', which is none of the labels \['click', 'buy'\]"),
        ({"funnel": ["click"]}, r"funnel = \['click'\]: name two or more labels, in their order, each once"),
        ({"funnel": ["click", "click"]}, "name two or more labels, in their order, each once"),
        ({"matures_after_days": {"bought": 2}}, "matures_after_days names 'bought', which is none of the labels"),
        ({"matures_after_days": {"buy": 0}}, "greater than 0"),
        ({"time": None}, r"matures_after_days needs data\.time: a label is known that many days after its row"),
        ({"observed_until": None}, r"matures_after_days needs data\.observed_until"),
        ({"observed_until": "2026-03-01..2026-03-04"}, "observed_until = '2026-03-01..2026-03-04': write one day"),
        ({"observed_until": "tomorrow"}, "'tomorrow' is not a day"),
    ],
)
def test_funnels_and_maturity_that_cannot_be_meant(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        source("log.csv", **{**LATE, "time": "at", **change})


def test_a_recipe_changes_with_what_decides_rows_and_labels_and_nothing_else() -> None:
    settings: dict[str, Any] = {**LATE, "time": "at", "where": "k > 0"}

    def recipe(day: int = 2, **change: Any) -> dict[str, Any]:
        return source("log.csv", **{**settings, **change}).data.recipe(f"day=2026-03-0{day}")

    unchanged: list[dict[str, Any]] = [
        {"observed_until": "2026-03-09"},  # the 2nd was known already
        {"max_bad_share": 0.5},
        {"split": {"train": "2026-03-02", "valid": "2026-03-03"}},
    ]
    for same in unchanged:
        assert recipe(**same) == recipe()
    assert source("elsewhere.csv", **settings).data.recipe("day=2026-03-02") == recipe()
    changed: list[dict[str, Any]] = [
        {"labels": {"click": "click", "buy": "buy > 1"}},
        {"where": "k > 1"},
        {"funnel": []},
        {"key": ["k", "j"]},
        {"time": "then"},
        {"observed_until": "2026-03-03"},  # of the 2nd nothing is known then
        {"matures_after_days": {"buy": 3}},
        {"null_values": ["?"]},
    ]
    for other in changed:
        assert recipe(**other) != recipe()
    assert recipe(day=3) != recipe(day=3, observed_until="2026-03-05")
    random = {"split": ALL}
    first, later = (
        source("log.csv", **{**settings, **random, "observed_until": day}).data.recipe("split=train")
        for day in ("2026-03-04", "2026-03-05")
    )
    assert first != later  # a part drawn at random has rows of every day
    parts = (
        source("log.csv", **{**settings, "split": {**ALL, "seed": seed}}).data.recipe("split=train") for seed in (0, 1)
    )
    assert next(parts) != next(parts)


# --- readers ---------------------------------------------------------------------------------------------------------


def criteo_line(label: int, counts: Sequence[int | None], ids: Sequence[str]) -> str:
    return "\t".join([str(label), *("" if c is None else str(c) for c in counts), *ids])


def test_the_criteo_format(tmp_path: Path) -> None:
    ids = [f"{n:08x}" for n in range(26)]
    lines = [
        criteo_line(1, range(13), ids),
        criteo_line(0, [None] * 13, [""] * 26),
        criteo_line(0, [-2, *[10**10] * 12], ['"quoted', *ids[1:]]),
    ]
    paths = [csv(tmp_path, "\n".join(lines[:2]) + "\n", "a.txt"), csv(tmp_path, lines[2] + "\n", "b.txt")]
    frame = read_criteo(paths, "row").collect()
    assert frame.columns == ["row", "label", *COUNTS, *IDS]
    assert frame["row"].to_list() == [0, 1, 2]
    assert frame["label"].to_list() == [1, 0, 0]
    assert [frame[c].dtype for c in (*COUNTS, *IDS)] == [pl.Int64] * 13 + [pl.String] * 26
    assert frame.select(COUNTS).rows() == [tuple(range(13)), (None,) * 13, (-2, *[10**10] * 12)]
    assert frame.select(IDS).rows() == [tuple(ids), (None,) * 26, ('"quoted', *ids[1:])]
    found = source(tmp_path / "*.txt", format="criteo", key=["row"], row_number="row", labels=["label"])
    marked = pl.concat([found.checked(p).collect() for p in ("split=train", "split=valid")]).sort("row")
    assert marked["@label"].to_list() == [1, 0, 0]
    assert marked[REASON].null_count() == 3
    with pytest.raises(pl.exceptions.PolarsError):
        read_criteo([csv(tmp_path, "0\tx" + "\t" * 38 + "\n", "c.txt")], None).collect()


def write_movielens(folder: Path) -> None:
    (folder / "ratings.dat").write_text("1::10::5::978300760\n2::20::3::978300761\n1::20::1::978300762\n3::30::4::1\n")
    (folder / "users.dat").write_text("1::F::1::10::00501\n2::M::56::16::70072\n")
    movies = "10::Toy Story (1995)::Animation|Children's|Comedy\n20::Étoile: (Part 2) (1987)::Drama\n"
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))


def test_the_movielens_format(tmp_path: Path) -> None:
    write_movielens(tmp_path)
    frame = read_movielens_1m(tmp_path).collect()
    assert set(frame.columns) == {
        *("user_id", "movie_id", "rating", "timestamp"),
        *("gender", "age", "occupation", "zip", "title", "genres", "year"),
    }
    assert frame.select("user_id", "movie_id", "rating", "timestamp").rows() == [
        (1, 10, 5, 978300760),
        (2, 20, 3, 978300761),
        (1, 20, 1, 978300762),
        (3, 30, 4, 1),
    ]
    assert frame["zip"].to_list() == ["00501", "70072", "00501", None]
    assert frame["age"].to_list() == ["1", "56", "1", None]
    assert frame["title"][:2].to_list() == ["Toy Story (1995)", "Étoile: (Part 2) (1987)"]
    assert frame["year"].to_list() == ["1995", "1987", "1987", None]
    assert frame["genres"].to_list() == [["Animation", "Children's", "Comedy"], ["Drama"], ["Drama"], None]
    found = source(tmp_path, format="movielens-1m", key=["user_id", "movie_id"], labels={"like": "rating > 3"})
    kept = source(tmp_path, format="movielens-1m", key=["user_id", "movie_id"], labels=["y"], where="rating <> 3")
    assert sum(found.checked(p).collect().height for p in ("split=train", "split=valid")) == 4
    with pytest.raises(DataError, match=r"data\.labels\.y: column 'y' is missing"):
        kept.checked("split=train")


def test_movielens_with_ratings_as_parquet(tmp_path: Path) -> None:
    write_movielens(tmp_path)
    pl.DataFrame({"user_id": [2], "movie_id": [10], "rating": [4], "x": ["?"]}).cast(
        {"user_id": pl.UInt16}
    ).write_parquet(tmp_path / "ratings.parquet")
    frame = read_movielens_1m(tmp_path).collect()
    assert frame.select("user_id", "movie_id", "rating", "x", "gender", "year").rows() == [(2, 10, 4, "?", "M", "1995")]


@pytest.mark.parametrize("name", ["users.dat", "movies.dat", "ratings.dat"])
def test_a_missing_movielens_file_is_named(name: str, tmp_path: Path) -> None:
    write_movielens(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: missing; data.path must be the folder of MovieLens-1M"):
        read_movielens_1m(tmp_path)


# --- real data, where it is there ------------------------------------------------------------------------------------


def real(folder: str) -> Path:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"{folder} is not here: {SHARED.resolve() / folder} does not exist")
    return SHARED / folder


def test_movielens_1m_has_the_rows_of_the_paper() -> None:
    found = source(
        real("ml-1m"),
        format="movielens-1m",
        key=["user_id", "movie_id"],
        labels={"like": "rating > 3"},
        where="rating != 3",
        split={"train": 0.8, "valid": 0.1, "test": 0.1},
    )
    counts = [
        found.checked(f"split={role}")
        .select(rows=pl.len(), likes=pl.col("@like").sum().cast(pl.Int64), bad=pl.col(REASON).count())
        .collect(engine="streaming")
        for role in ("train", "valid", "test")
    ]
    assert sum(c["rows"].item() for c in counts) == 739_012
    assert sum(c["bad"].item() for c in counts) == 0
    assert sum(c["likes"].item() for c in counts) / 739_012 == pytest.approx(0.7784, abs=5e-5)
    assert [c["rows"].item() / 739_012 for c in counts] == pytest.approx([0.8, 0.1, 0.1], abs=0.002)


def test_the_criteo_sample_is_read() -> None:
    found = source(
        real("criteo-sample") / "*.csv", format="criteo", key=["row"], row_number="row", labels=["label"], split=ALL
    )
    frame = pl.concat([found.checked(p).collect() for p in ("split=train", "split=valid")])
    assert frame.height == 8_000
    assert frame[REASON].null_count() == 8_000
    assert frame["row"].n_unique() == 8_000
    assert 0.1 < frame["@label"].cast(pl.Float64).mean() < 0.4  # pyright: ignore[reportOperatorIssue]
    assert frame["C1"].str.len_bytes().unique().to_list() == [8]
