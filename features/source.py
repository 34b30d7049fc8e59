"""Where raw tables come from: files, the tables joined to them, and the checked partitions of both."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache, cached_property
from glob import escape, glob
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, assert_never

import polars as pl
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from base.config import Config, Name
from base.errors import ConfigError, DataError
from features.columns import explained, kind_of, require, sql
from features.readers.coat import FILES as COAT_FILES
from features.readers.coat import read_coat
from features.readers.criteo import read_criteo
from features.readers.interactions import read_interactions
from features.readers.movielens import read_movielens_1m
from features.schema import carried
from features.split import Day, EachDay, PerUserSplit, RandomSplit, Split, days_of, names_of, rows_of

REASON = "__reason"
"""Why a row is set aside; null for a good one."""
REJECTED = "rejected.parquet"
"""Where such rows are published, beside the good ones."""

Format = Literal["parquet", "csv", "criteo", "movielens-1m", "coat", "interactions"]
Type = Literal["integer", "float", "text", "boolean"]
_TYPES: dict[Type, pl.DataType] = {
    "integer": pl.Int64(),
    "float": pl.Float64(),
    "text": pl.String(),
    "boolean": pl.Boolean(),
}


class Files(Config):
    """Parquet or CSV files, or one of the formats with a reader."""

    path: str
    """A file, a folder or a glob; `day=2026-03-01` folders add a column `day`. Relative to the working directory."""
    format: Format | None = None
    """By default what the file's ending says."""
    delimiter: str = ","
    header: bool = True
    names: tuple[str, ...] = ()
    """Column names of a CSV file without a header."""
    types: dict[str, Type] = {}
    """Types of CSV columns where guessing would be wrong, e.g. zip codes are text."""
    null_values: tuple[str, ...] = ()
    """Texts that mean missing in CSV files."""
    trim: bool = False
    """Whether to strip spaces around CSV text, before null_values is applied."""
    row_number: str | None = None
    """Name of a column that numbers the rows from 0, for logs without a key."""


class Time(Config):
    """The column that says when a row happened; it decides a row's day (UTC)."""

    column: str
    format: str | None = None
    """For text, as in strftime; by default ISO dates."""
    unit: Literal["s", "ms", "us"] | None = None
    """For integers: the unit in which they count since 1970."""


ATime = Annotated[Time, BeforeValidator(lambda v: {"column": v} if isinstance(v, str) else v)]
"""Or the column's name alone."""


class Table(Files):
    """A user or item table, joined to the log by key; several rows per key need `as_of`."""

    on: Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
    """The key columns, called the same in the log."""
    columns: tuple[str, ...] | None = None
    """Which columns to take; by default all."""
    prefix: str = ""
    """Put before the names of the columns taken."""
    as_of: ATime | None = None
    """For versioned rows: since when a row holds. The log's row takes the latest at or before its own time."""


def _by_name(labels: Any) -> Any:
    named = isinstance(labels, list | tuple) and all(isinstance(n, str) for n in labels)  # pyright: ignore
    return {name: _as_sql(name) for name in labels} if named else labels  # pyright: ignore


def _as_sql(column: str) -> str:
    """A column's name as an expression: quoted where it would be read as more."""
    return column if re.fullmatch(r"[^\W\d]\w*", column) else '"{}"'.format(column.replace('"', '""'))


class Data(Files):
    """The impression log: what identifies a row, what is to be predicted, and how it is split."""

    key: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: Annotated[dict[Name, str], BeforeValidator(_by_name), Field(min_length=1)]
    """Names of 0/1 columns, or a table of name = SQL expression."""
    funnel: tuple[str, ...] = ()
    """Labels of which each presupposes the one before it: `["click", "conversion"]`."""
    time: ATime | None = None
    matures_after_days: dict[str, PositiveInt] = {}
    """Labels that become known late: a row's label counts so many days after the row, and is unknown until then."""
    observed_until: Day | None = None
    """The last day whose outcomes are in the log; needed where labels mature."""
    without_log: tuple[Day, ...] = ()
    """Days that have no log and never will, each `2026-03-01` or a range; any other day without rows is an error."""
    where: str | None = None
    """A SQL expression: the rows to train and to evaluate on. Scoring scores every row."""
    split: Split = EachDay()
    """By day or at random; needed unless every step is given its --day."""
    max_bad_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Above this share of bad rows a step refuses; below it they are counted and set aside."""

    @model_validator(mode="after")
    def _labels_known(self) -> Self:
        for setting, names in (("funnel", self.funnel), ("matures_after_days", self.matures_after_days)):
            if unknown := [n for n in names if n not in self.labels]:
                raise ValueError(f"{setting} names {unknown[0]!r}, which is none of the labels {list(self.labels)}")
        if len(self.funnel) == 1 or len(set(self.funnel)) < len(self.funnel):
            raise ValueError(f"funnel = {list(self.funnel)}: name two or more labels, in their order, each once")
        unseen = self.observed_until is None and not isinstance(self.split, EachDay)
        if self.matures_after_days and (self.time is None or unseen):
            absent = "time" if self.time is None else "observed_until"
            raise ValueError(f"matures_after_days needs data.{absent}: a label is known that many days after its row")
        for text in self.without_log:
            days_of(text)
        if self.observed_until is not None and len(days_of(self.observed_until)) != 1:
            raise ValueError(f"observed_until = {self.observed_until!r}: write one day, 2026-03-01")
        return self

    @cached_property
    def _skipped(self) -> frozenset[date]:
        return frozenset(day for text in self.without_log for day in days_of(text))

    def days(self, first: date, last: date) -> list[date]:
        """The days with a log from `first` to `last`, both included."""
        all_days = (first + timedelta(days=n) for n in range((last - first).days + 1))
        return [day for day in all_days if day not in self._skipped]

    def day_before(self, day: date, days: int = 1) -> date:
        """The day so many days with a log earlier."""
        while days:
            day -= timedelta(days=1)
            days -= day not in self._skipped
        return day

    def immature(self, partition: str) -> tuple[str, ...]:
        """Labels of a day's partition that are not known yet."""
        name, _, value = partition.partition("=")
        if name != "day" or self.observed_until is None:
            return ()
        last, day = days_of(self.observed_until)[0], days_of(value)[0]
        return tuple(n for n, days in self.matures_after_days.items() if day + timedelta(days=days) > last)

    def recipe(self, partition: str) -> dict[str, Any]:
        """What decides, beside the raw files, which rows of a partition are good and what their labels are."""
        free = {"path", "max_bad_share", "observed_until", "without_log"}
        described = self.model_dump(mode="json", exclude=free | {"split"} if self.split.by_day else free)
        seen = self.immature(partition) if self.split.by_day else self.observed_until
        return described | {"immature": seen}


def key_faults(key: Sequence[str]) -> tuple[Sequence[pl.Expr], pl.Expr]:
    """What is wrong with a row's key, in words, or null: that a part of it is missing, and that it stood before."""
    missing = [pl.when(pl.col(c).is_null()).then(pl.lit(f"key {c} is null")) for c in key]
    repeated = pl.struct(key).is_first_distinct().not_()
    return missing, pl.when(repeated).then(pl.lit(f"key {', '.join(key)} is repeated"))


def rejected(bad: pl.DataFrame) -> pl.DataFrame:
    """Rows that were set aside, to be published: why, as `reason`; a raw column of that name becomes `raw_reason`."""
    return bad.rename({REASON: "reason", "reason": "raw_reason"}, strict=False)


def limit_bad(where: str, bad: int, good: int, reasons: Mapping[str, int], allowed: float) -> None:
    """Raise DataError if more rows are bad than `allowed`, which data.max_bad_share says."""
    if bad > allowed * (bad + good):
        worst = sorted(reasons.items(), key=lambda item: -item[1])[:5]
        listed = "; ".join(f"{rows} x {reason}" for reason, rows in worst)
        raise DataError(
            f"{where}: {bad} of {bad + good} rows are bad, {bad / (bad + good):.2%} where {allowed:.2%} is allowed: "
            f"{listed}. Mend the log, or raise data.max_bad_share to set them aside"
        )


@dataclass(frozen=True)
class Source:
    """The raw log of a run, by partition."""

    data: Data
    tables: Sequence[Table] = ()
    derive: Mapping[str, str] | None = None
    positive: str | None = None
    """A label: rows where it is 0 are left out of `checked`, as if data.where said so."""

    def partitions(self, role: Literal["train", "valid", "test"]) -> list[str]:
        """Names of the partitions of a role, in order of time: `day=2026-03-01` or `split=train`."""
        if self.data.time is None and self.data.split.by_day:
            raise ConfigError("data.split names days, but data.time is not given; name the time column")
        skipped = {f"day={day}" for text in self.data.without_log for day in days_of(text)}
        return [name for name in names_of(self.data.split, role) if name not in skipped]

    def raw(self, partition: str, *, whole: bool = True) -> pl.LazyFrame:
        """Every raw row of a partition, joined with the tables; for scoring.

        Rows of a day that need not be `whole` may lack data.key, and the keys of tables, which are then left out.
        """
        whole = whole or not self.data.split.by_day  # by chance, rows are drawn by their key
        files = self._files_of(partition)
        if self.data.row_number is not None and files != self._files:
            raise ConfigError("data.row_number would number each day's rows from 0: give data.key a column of the log")
        frame = self._scan(files)
        present = frame.collect_schema().names()
        if whole:
            require(self.data.key, present, "data.key")
        if isinstance(self.data.split, RandomSplit) and self.data.split.by:
            require(self.data.split.by, present, "data.split.by")
        if isinstance(self.data.split, PerUserSplit):
            require([self.data.split.per_user], present, "data.split.per_user")
        frame = rows_of(self.data.split, frame, partition, day=self._day(frame), key=self.data.key)
        for table in self.tables:
            if whole or set(table.on) <= set(frame.collect_schema().names()):
                frame = _join(frame, table, self.data.time, to="the log")
        return frame

    def checked(self, partition: str) -> pl.LazyFrame:
        """The rows to learn from or be measured by: `raw` under `where`, with `@label` columns and a reason if bad.

        With `positive` those of them where it is 1, or should be known and is neither 1 nor 0.
        """
        frame = self.raw(partition)
        present = frame.collect_schema().names()
        for name in self.derive or {}:
            if name in present:
                raise ConfigError(f"derive.{name}: the log already has this column; choose another name")
        derived = frame.with_columns(sql(e, where=f"derive.{n}").alias(n) for n, e in (self.derive or {}).items())
        if self.data.where is not None:
            derived = derived.filter(_bound(derived, self.data.where, "data.where"))
        missing, repeated = key_faults(self.data.key)
        faults: list[pl.Expr] = [*missing]
        labels: dict[str, pl.Expr] = {}
        for name, expression in self.data.labels.items():
            value = _bound(derived, expression, f"data.labels.{name}")
            kind = kind_of(derived.select(value).collect_schema().dtypes()[0])
            if kind not in ("integer", "float", "boolean", "missing"):
                raise DataError(f"label {name!r} holds {kind}; it must be 0 or 1: give it as a SQL expression")
            value = value.cast(pl.Float64)
            mature = self._mature(derived, name)
            valid = value.is_in([0.0, 1.0])
            found = pl.format(f"label {name} is {{}}, not 0 or 1", value)
            faults.append(pl.when(mature & value.is_null()).then(pl.lit(f"label {name} is null")))
            faults.append(pl.when(mature & ~valid).then(found))
            labels[name] = pl.when(valid & mature).then(value).cast(pl.Int8)
            if name == self.positive:  # before keys are compared: the same pair may stand there as a negative, too
                derived = derived.filter(value.ne_missing(0.0) & (mature | (value == 1.0)))
        for before, after in pairwise(self.data.funnel):
            skipped = (labels[before] == 0) & (labels[after] == 1)
            reason = f"label {after} is 1 where {before}, before it in data.funnel, is 0"
            faults.append(pl.when(skipped).then(pl.lit(reason)))
        faults.append(repeated)
        named = (value.alias(carried(name)) for name, value in labels.items())
        return derived.with_columns(*named, pl.coalesce(faults).alias(REASON))

    def days_before(self, day: date, days: int | None = None) -> list[str]:
        """Names of the partitions from the first day of the log, or so many days before `day`, to the day before it.

        One in between that has no rows is among them, unless `data.without_log` names it.
        """
        time = self.data.time
        if not self.data.split.by_day or time is None:
            raise ConfigError("a log without data.time and a split by day has no days before; split it by day")
        if all(time.column in _hive(f) for f in self._files):
            names = {_hive(f)[time.column] for f in self._files}
            found = {date.fromisoformat(name) for name in names if re.fullmatch(r"\d{4}-\d\d-\d\d", name)}
        else:
            with explained(f"{self.data.path}, data.time"):
                frame = self._scan(self._files)
                instant = self._day(frame)
                assert instant is not None
                rows = frame.select(day=instant).unique().drop_nulls().collect(engine="streaming")
            found = set(rows["day"].to_list())
        earlier = [d for d in found if d < day]
        if not earlier:
            return []
        first = min(earlier) if days is None else max(min(earlier), day - timedelta(days=days))
        return [f"day={d}" for d in self.data.days(first, day - timedelta(days=1))]

    def item_columns(self, item: str) -> list[str]:
        """What the tables whose key is `item` alone add to the log's columns."""
        found: list[str] = []
        for table in self.tables:
            if table.on == (item,):
                at = () if table.as_of is None else (table.as_of.column,)
                names = table.columns or _scan(table, _expand(table)).collect_schema().names()
                found += [table.prefix + c for c in names if c not in (*table.on, *at)]
        return found

    def items(self, files: Files) -> pl.LazyFrame:
        """Every row of a table of items, with the columns of those of the tables whose key it has.

        It may be one of these tables itself: a column that both have is taken as the log has it.
        """
        frame = _scan(files, _expand(files))
        for table in self.tables:
            present = frame.collect_schema().names()
            if set(table.on) <= set(present):
                taken = table.columns or _scan(table, _expand(table)).collect_schema().names()
                given = {table.prefix + c for c in taken if c not in table.on}
                frame = _join(frame.drop(c for c in present if c in given), table, self.data.time, to=files.path)
        return frame

    def undated(self) -> int:
        """Rows whose time is missing, which therefore belong to no day."""
        time = self.data.time
        if not self.data.split.by_day or time is None or all(time.column in _hive(f) for f in self._files):
            return 0  # the name of a day= folder is never missing
        with explained(f"{self.data.path}, data.time"):
            frame = self._scan(self._files)
            day = self._day(frame)
            assert day is not None
            return frame.select(day.is_null().sum()).collect(engine="streaming").item()

    def has_own_files(self, partition: str) -> bool:
        """Whether a partition's files hold nothing of other partitions, as those in `day=` folders do."""
        return self._files_of(partition) != self._files

    def fingerprint(self, partition: str) -> dict[str, str]:
        """Identity of the raw files behind a partition: path, number and content hash."""
        files = self._files_of(partition)
        return {"path": self.data.path, "files": str(len(files)), "sha256": self._hash_with_tables(files)}

    def fingerprint_of(self, files: Files) -> str:
        """Content hash of a table of items and of the tables that may be joined to it."""
        return self._hash_with_tables(_expand(files))

    def _hash_with_tables(self, files: Sequence[Path]) -> str:
        digest = hashlib.sha256()
        for file in (*files, *(f for table in self.tables for f in _expand(table))):
            digest.update(_content_hash(str(file), file.stat().st_size, file.stat().st_mtime_ns).encode())
        return digest.hexdigest()

    @cached_property
    def _files(self) -> tuple[Path, ...]:
        return _expand(self.data)

    def _files_of(self, partition: str) -> tuple[Path, ...]:
        """Files in `day=...` folders are chosen by name, so that the others are not opened."""
        name, _, value = partition.partition("=")
        if self.data.split.by_day and (name != "day" or not value):
            raise ConfigError(f"partition {partition!r}: this log is split by day; write day=2026-03-01")
        time = self.data.time
        if not self.data.split.by_day or time is None or not all(time.column in _hive(f) for f in self._files):
            return self._files
        files = tuple(f for f in self._files if _hive(f)[time.column] == value)
        if not files:
            raise DataError(
                f"{self.data.path}: no files for {name} {value}; check the path and data.split, wait for the log, or "
                "name a day that will have none in data.without_log"
            )
        return files

    def _scan(self, files: Sequence[Path]) -> pl.LazyFrame:
        return _scan(self.data, files)

    def _mature(self, frame: pl.LazyFrame, label: str) -> pl.Expr:
        """Whether the label of a row is known: not by what it says, or late positives would count and negatives not."""
        days, last = self.data.matures_after_days.get(label), self.data.observed_until
        day = self._day(frame)
        if days is None or last is None or day is None:
            return pl.lit(True)
        return (day <= days_of(last)[0] - timedelta(days=days)).fill_null(False)

    def _day(self, frame: pl.LazyFrame) -> pl.Expr | None:
        if self.data.time is None:
            return None
        schema = frame.collect_schema()
        require([self.data.time.column], schema.names(), "data.time")
        return _instant(self.data.time, schema[self.data.time.column]).dt.date()


def _bound(frame: pl.LazyFrame, expression: str, where: str) -> pl.Expr:
    """A SQL expression whose columns are known to be there."""
    parsed = sql(expression, where=where)
    require(parsed.meta.root_names(), frame.collect_schema().names(), where)
    with explained(f"{where} = {expression!r}"):
        frame.select(parsed).collect_schema()
    return parsed


def _instant(time: Time, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(time.column)
    match kind_of(dtype):
        case "date":
            return column.cast(pl.Datetime("us"))
        case "integer" if time.unit is not None:
            return pl.from_epoch(column, time_unit=time.unit).cast(pl.Datetime("us"))
        case "text":
            # Polars 2.1 shows a filter that Parquet files evaluate "" where there is null.
            given = pl.when(column != "").then(column)
            return given.str.to_datetime(time.format or "%Y-%m-%d", time_unit="us")
        case _ if isinstance(dtype, pl.Datetime):
            utc = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if dtype.time_zone else column
            return utc.cast(pl.Datetime("us"))
        case "integer":
            raise ConfigError(
                f'time column {time.column!r} holds integers; say what they count: unit = "s", "ms" or "us"'
            )
        case kind:
            raise DataError(f"time column {time.column!r} holds {kind}; it must be a date, a timestamp or text")


def _expand(files: Files) -> tuple[Path, ...]:
    if files.format == "movielens-1m":
        return tuple(sorted(p for p in Path(files.path).glob("*") if p.suffix in (".dat", ".parquet")))
    path = Path(files.path)
    if files.format == "coat":
        return tuple(path / name for name in COAT_FILES if (path / name).is_file())
    # Not Path.glob: it does not follow published links, and enters .versions.
    pattern = f"{escape(files.path)}/**/*.*" if path.is_dir() else files.path
    found = sorted(map(Path, glob(pattern, recursive=True)))
    found = [f for f in found if f.is_file() and f.suffix != ".json"]
    if not found:
        raise DataError(f"{files.path}: no files match; check the path (relative to {Path.cwd()})")
    return tuple(found)


def _hive(file: Path) -> dict[str, str]:
    return {m[1]: m[2] for part in file.parts[:-1] if (m := re.fullmatch(r"(\w+)=(.+)", part))}


def _hive_literal(value: str) -> pl.Expr:
    if re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        return pl.lit(date.fromisoformat(value))
    return pl.lit(int(value), dtype=pl.Int64) if re.fullmatch(r"0|[1-9]\d*", value) else pl.lit(value)


def _scan(config: Files, files: Sequence[Path]) -> pl.LazyFrame:
    """One frame over all files, in order; `name=value` folders become columns.

    Links are followed here, once, so that a folder published meanwhile is not mixed in.
    """
    if config.format == "movielens-1m":
        return read_movielens_1m(Path(config.path))
    if config.format == "coat":
        return read_coat(Path(config.path))
    groups: dict[tuple[tuple[str, str], ...], list[Path]] = {}
    for file in files:
        groups.setdefault(tuple(_hive(file).items()), []).append(file.resolve())
    with explained(config.path):
        frames = [
            _of_64_bits(_scan_files(config, group)).with_columns(_hive_literal(v).alias(k) for k, v in hive)
            for hive, group in groups.items()
        ]
        return frames[0] if len(frames) == 1 else pl.concat(frames)


def _of_64_bits(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Integers as other programs can read them from Parquet. Those that do not fit are refused when they are read."""
    wide = [c for c, t in frame.collect_schema().items() if t == pl.Int128 or t == pl.UInt128]
    return frame.with_columns(pl.col(wide).cast(pl.UInt64)) if wide else frame


def _scan_files(config: Files, files: list[Path]) -> pl.LazyFrame:
    format = config.format or ("parquet" if files[0].suffix in (".parquet", ".pq") else "csv")
    match format:
        case "parquet":
            return pl.scan_parquet(files, row_index_name=config.row_number, hive_partitioning=False)
        case "csv":
            return _scan_csv(config, files)
        case "criteo":
            return read_criteo(files, config.row_number)
        case "interactions":
            return read_interactions(files)
        case "movielens-1m" | "coat":
            raise ConfigError(f"format {format} reads one folder")
        case _:
            assert_never(format)


def _scan_csv(config: Files, files: list[Path]) -> pl.LazyFrame:
    frame = pl.scan_csv(
        files,
        separator=config.delimiter,
        has_header=config.header,
        new_columns=list(config.names) or None,
        schema_overrides={name: _TYPES[t] for name, t in config.types.items()},
        null_values=list(config.null_values) or None,
        infer_schema_length=10_000,
        row_index_name=config.row_number,
    )
    if config.trim:
        texts = [c for c, t in frame.collect_schema().items() if t == pl.String]
        stripped = (pl.col(c).str.strip_chars() for c in texts)
        nulls = list(config.null_values)
        frame = frame.with_columns(pl.when(~s.is_in(nulls)).then(s) if nulls else s for s in stripped)
    return frame


def _join(frame: pl.LazyFrame, table: Table, time: Time | None, *, to: str) -> pl.LazyFrame:
    """A left join: every row of the log, or of what else is named by `to`, stays, once, in its place."""
    side = _scan(table, _expand(table))
    names = side.collect_schema().names()
    require(table.on, names, f"tables, {table.path}")
    require(table.on, frame.collect_schema().names(), f"tables, {table.path}: {to}")
    for column in table.on:
        here, there = (kind_of(f.collect_schema()[column]) for f in (side, frame))
        if here != there:
            raise DataError(f"tables, {table.path}: {column!r} holds {here}, in {to} {there}; convert one of them")
    at = () if table.as_of is None else (table.as_of.column,)
    require(at, names, f"tables, {table.path}, as_of")
    taken = [c for c in (names if table.columns is None else table.columns) if c not in (*table.on, *at)]
    require(taken, names, f"tables, {table.path}, columns")
    clash = set(frame.collect_schema().names()) & {table.prefix + c for c in taken}
    if clash:
        raise ConfigError(f"tables, {table.path}: {sorted(clash)[0]!r} is in the log already; set prefix or columns")
    side = side.select(*table.on, *at, *(pl.col(c).alias(table.prefix + c) for c in taken))
    if table.as_of is None:
        with explained(table.path):
            repeated = side.group_by(table.on).len().filter(pl.col("len") > 1).sort(table.on).head(1).collect()
        if repeated.height:
            key = dict(zip(table.on, repeated.row(0)[:-1], strict=True))
            raise DataError(f"{table.path}: {key} stands {repeated.row(0)[-1]} times; keep one row, or set as_of")
        return frame.join(side, on=table.on, how="left", maintain_order="left")
    if time is None:
        raise ConfigError(f"tables, {table.path}: as_of needs data.time")
    left = frame.with_columns(__at=_instant(time, frame.collect_schema()[time.column])).with_row_index("__row")
    right = side.with_columns(__at=_instant(table.as_of, side.collect_schema()[table.as_of.column])).drop(at)
    joined = left.sort("__at").join_asof(
        right.drop_nulls("__at").sort("__at"), on="__at", by=list(table.on), strategy="backward", check_sortedness=False
    )
    return joined.sort("__row").drop("__row", "__at")


@cache
def _content_hash(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
