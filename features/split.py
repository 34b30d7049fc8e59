"""Splits: by day, as production needs; or seeded random, as papers do."""

import re
from collections.abc import Sequence
from datetime import date, timedelta
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, get_args

import polars as pl
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from base.config import Config
from base.errors import ConfigError
from features.columns import sql
from features.transforms import xxhash64

Role = Literal["train", "valid", "test"]
ROLES: tuple[Role, ...] = get_args(Role)


def _text(value: Any) -> Any:
    """TOML has dates of its own: 2026-03-01 may stand without quotes."""
    return value.isoformat() if isinstance(value, date) else value


Day = Annotated[str, BeforeValidator(_text)]


class DaySplit(Config):
    """Days, each `2026-03-01` or `2026-03-01..2026-03-05` with both ends; train before valid before test."""

    train: Day
    valid: Day
    test: Day | None = None

    @property
    def by_day(self) -> bool:
        return True

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        spans = [(role, days_of(text)) for role in ROLES if (text := getattr(self, role))]
        for (earlier, a), (later, b) in pairwise(spans):
            if a[-1] >= b[0]:
                raise ValueError(f"{earlier} ends {a[-1]}, not before {later} begins, {b[0]}: the future would leak")
        return self


class EachDay(Config):
    """Days without roles: which day does what follows from the day that a step is run for."""

    train: None = None
    valid: None = None
    test: None = None

    @property
    def by_day(self) -> bool:
        return True


class RandomSplit(Config):
    """Shares of the rows, drawn by a seeded hash of `by`: independent of file order and repeatable."""

    train: Annotated[float, Field(gt=0, lt=1)]
    valid: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    by: tuple[str, ...] | None = None
    """Columns whose rows stay together, e.g. a user's; by default the key, so that every row is drawn alone."""

    @property
    def by_day(self) -> bool:
        return False

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        if self.train + self.valid + self.test > 1 + 1e-9:
            raise ValueError(f"shares add up to {self.train + self.valid + self.test:g}; they may not exceed 1")
        return self


class PerUserSplit(Config):
    """Shares of each user's rows, in the order of a seeded hash of the key: every part has almost its share of each.

    The first row is a training row. `where` takes no part in it: the shares are those of all rows.
    """

    per_user: str
    """The column of the user."""
    train: Annotated[float, Field(gt=0, lt=1)]
    valid: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    test_where: str | None = None
    """A SQL expression: these are the test rows, and the shares are those of the others."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0

    @property
    def by_day(self) -> bool:
        return False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.test and self.test_where is not None:
            raise ValueError("test and test_where exclude each other: the test rows are drawn, or named")
        if self.train + self.valid + self.test > 1 + 1e-9:
            raise ValueError(f"shares add up to {self.train + self.valid + self.test:g}; they may not exceed 1")
        return self


def _kind(value: Any) -> str:
    if isinstance(value, PerUserSplit) or (isinstance(value, dict) and "per_user" in value):
        return "per_user"
    train: Any = value.get("train") if isinstance(value, dict) else getattr(value, "train", None)  # pyright: ignore
    if isinstance(value, EachDay) or (isinstance(value, dict) and value and not any(value.values())):  # pyright: ignore
        return "each"
    return "days" if isinstance(train, str | date) else "random"


Split = Annotated[
    Annotated[DaySplit, Tag("days")]
    | Annotated[RandomSplit, Tag("random")]
    | Annotated[PerUserSplit, Tag("per_user")]
    | Annotated[EachDay, Tag("each")],
    Discriminator(_kind),
]


def days_of(text: str) -> list[date]:
    """The days of `2026-03-01` or `2026-03-01..2026-03-05`. Raises ValueError if it is neither."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:\.\.(\d{4}-\d\d-\d\d))?", text)
    if not found:
        raise ValueError(f"{text!r} is not a day or a range of days: write 2026-03-01 or 2026-03-01..2026-03-05")
    first, last = date.fromisoformat(found[1]), date.fromisoformat(found[2] or found[1])
    if last < first:
        raise ValueError(f"{text!r} ends before it begins")
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


def names_of(split: Split, role: Role) -> list[str]:
    """Partition names of a role, in order; empty if the split has none. Raises ConfigError if there are no roles."""
    if isinstance(split, EachDay):
        raise ConfigError("data.split is not given: name the days or shares of train, valid and test, or pass --day")
    share = getattr(split, role) or (role == "test" and isinstance(split, PerUserSplit) and split.test_where)
    if not share:
        return []
    return [f"day={day}" for day in days_of(share)] if isinstance(split, DaySplit) else [f"split={role}"]


def rows_of(
    split: Split, frame: pl.LazyFrame, partition: str, *, day: pl.Expr | None, key: Sequence[str]
) -> pl.LazyFrame:
    """The rows of one partition. Raises ConfigError if the name is not one that this split gives."""
    name, _, value = partition.partition("=")
    if isinstance(split, DaySplit | EachDay):
        if name != "day" or day is None:
            raise ConfigError(f"partition {partition!r}: this log is split by day; write day=2026-03-01")
        try:
            return frame.filter(day == date.fromisoformat(value))
        except ValueError:
            raise ConfigError(f"partition {partition!r}: {value!r} is not a day; write day=2026-03-01") from None
    bounds = {"train": (0.0, split.train), "valid": (split.train, split.train + split.valid)}
    bounds["test"] = (bounds["valid"][1], bounds["valid"][1] + split.test)
    if name != "split" or value not in bounds:
        raise ConfigError(f"partition {partition!r}: this log is split at random; write split=train, =valid or =test")
    if isinstance(split, PerUserSplit):
        return _rows_per_user(split, frame, value, bounds[value], key)
    low, high = (round(b * 2**32) for b in bounds[value])
    draw = _draw(split.by or key, split.seed) // 2**32
    return frame.filter((draw >= low) & (draw < high))


def _rows_per_user(
    split: PerUserSplit, frame: pl.LazyFrame, role: str, bounds: tuple[float, float], key: Sequence[str]
) -> pl.LazyFrame:
    if split.test_where is not None:
        named = sql(split.test_where, where="data.split.test_where").fill_null(False)
        if role == "test":
            return frame.filter(named)
        frame = frame.filter(~named)
    rows = pl.len().over(split.per_user)
    low, high = ((share * rows + 0.5).floor() for share in bounds)  # the nearest whole numbers of rows
    place = _draw(key, split.seed).rank("ordinal").over(split.per_user)
    return frame.filter((place > low) & (place <= high))


def _draw(columns: Sequence[str], seed: int) -> pl.Expr:
    joint = pl.concat_str([pl.col(c).cast(pl.String) for c in columns], separator="\x1f", ignore_nulls=True)
    return xxhash64(joint, seed)
