"""Raw columns: which types the features accept, and row-wise SQL over them."""

import json
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Literal

import polars as pl

from base.errors import ConfigError, DataError, did_you_mean

Kind = Literal["integer", "float", "text", "boolean", "date", "missing", "integers", "texts", "other"]
"""What a raw column holds. `missing`: a column of nulls, as readers give for an empty CSV column."""

NUMBERS: tuple[Kind, ...] = ("integer", "float", "boolean", "missing")
IDS: tuple[Kind, ...] = ("integer", "text", "boolean", "date", "missing")
BAGS: tuple[Kind, ...] = ("integers", "texts", "missing")


def kind_of(dtype: pl.DataType) -> Kind:
    """The kind of a raw column, from its Polars type."""
    if dtype.is_integer():
        return "integer"
    if dtype.is_float() or dtype.is_decimal():
        return "float"
    if isinstance(dtype, pl.List | pl.Array):
        match kind_of(dtype.inner):  # pyright: ignore[reportArgumentType]  (declared as a type class, is an instance)
            case "integer":
                return "integers"
            case "text":
                return "texts"
            case _:
                return "other"
    if isinstance(dtype, pl.String | pl.Enum | pl.Categorical):
        return "text"
    if dtype == pl.Boolean:
        return "boolean"
    if dtype == pl.Date:
        return "date"
    return "missing" if dtype == pl.Null else "other"


def check_kind(column: str, found: Kind, accepted: Iterable[Kind], wanted_by: str) -> None:
    """Raise DataError unless a column of kind `found` is accepted."""
    accepted = tuple(accepted)
    if found in accepted:
        return
    remedy = "convert it in the log, or in [derive] with CAST"
    if found == "float" and "integer" in accepted:
        remedy = "ids must not pass through float (they lose digits): store it as integer or text"
    if found in ("integers", "texts"):
        remedy = "set multi = true for list columns"
    if found == "text" and "texts" in accepted:
        remedy = 'give separator = "|" to split text into a list'
    wanted = ", ".join(k for k in accepted if k != "missing")
    raise DataError(f"column {column!r} holds {found}; {wanted_by} takes {wanted}: {remedy}")


def require(columns: Iterable[str], present: Iterable[str], wanted_by: str) -> None:
    """Raise DataError naming the first column that is not there, and the nearest one that is."""
    present = tuple(present)
    for column in columns:
        if column not in present:
            present = [c for c in present if not c.startswith(("@", "__"))]  # ours, not the user's
            hint = did_you_mean(column, present)
            raise DataError(f"{wanted_by}: column {column!r} is missing{hint} Present: {', '.join(present)}")


def sql(expression: str, *, where: str) -> pl.Expr:
    """A row-wise SQL expression. Raises ConfigError if it does not parse or looks at more than one row."""
    try:
        parsed = pl.sql_expr(expression)
        roots = parsed.meta.root_names()
    except pl.exceptions.PolarsError as error:
        raise ConfigError(f"{where} = {expression!r}: not a SQL expression: {error}") from None
    if not roots or not _row_wise(parsed):
        raise ConfigError(f"{where} = {expression!r}: must be computed from columns of one row, without aggregates")
    return parsed


def _row_wise(expression: pl.Expr) -> bool:
    """Whether no part of it looks at another row. Polars' own answer misses an aggregate inside arithmetic."""
    parts = expression.meta.pop()
    if not parts:
        return expression.meta.is_column() or expression.meta.is_literal()
    try:
        separable = expression.meta.is_row_separable()
    except pl.exceptions.PolarsError:
        separable = True  # cannot say without the column's type; then it is a plain function of its parts
    return separable and all(_row_wise(part) for part in parts)


def roots_of(expressions: Mapping[str, str]) -> dict[str, set[str]]:
    """The columns each SQL expression reads."""
    return {name: set(pl.sql_expr(text).meta.root_names()) for name, text in expressions.items()}


_UNFIT = (
    re.compile(r"could not parse `(?P<value>.*?)` as dtype `\w+` at column '(?P<column>.*?)' \(column number"),
    re.compile(
        r"conversion from `[iu]128` to `u64` failed in column '(?P<column>.*?)' for .*? values: \[(?P<value>.*?)[],]"
    ),
)
"""What Polars says of a value that is not of its column's type: of CSV, and of an integer without a type of 64 bits."""


@contextmanager
def explained(what: str) -> Generator[None]:
    """Turn Polars' own errors while reading `what` into a DataError that names it."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        said = " ".join(str(error).split())
        if found := next(filter(None, (pattern.search(said) for pattern in _UNFIT)), None):
            raise DataError(
                f"{what}: column {found['column']!r} holds {found['value']}, which is not of the type that its other "
                f"values have, or no integer of 64 bits: for CSV, write types = {{ {json.dumps(found['column'])} = "
                '"text" } beside its path; otherwise convert it to text in the log'
            ) from error
        said = said[:300]
        raise DataError(f"{what}: {said}; check the column's type or its expression") from error
