"""The MLflow model, from code: raw columns in, the bundle's probabilities out, the same numbers as batch scoring."""

from pathlib import Path
from typing import Any, cast

import pandas as pd
import polars as pl
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from base.errors import DataError
from features.columns import NUMBERS, Kind, kind_of
from recsys.bundle import Bundle
from recsys.reference import load_registered

_TYPES: dict[Kind, pl.DataType] = {
    "integer": pl.Int64(),
    "float": pl.Float64(),
    "text": pl.String(),
    "boolean": pl.Boolean(),
    "date": pl.Date(),
    "integers": pl.List(pl.Int64),
    "texts": pl.List(pl.String),
}
_EXACT = 2.0**53
"""From here on a float may stand for several integers."""


class BundleModel(PythonModel):
    """Serves a Bundle, held or referred to. Columns that it does not need are ignored."""

    def load_context(self, context: Any) -> None:
        self.bundle = load_registered(Path(context.artifacts["bundle"]))
        self.bundle.check_golden()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  (MLflow inspects the signature itself)
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Probabilities of raw rows, under their index. Raises MlflowException, which a server answers with, naming a
        column that is missing, or one that holds what the model cannot take, with the value."""
        present = [c for c in self.bundle.inputs if c in model_input.columns]
        if not len(model_input):  # which may have no columns either, as of a request without records
            return self.bundle.no_scores.to_pandas().set_index(model_input.index)
        try:
            frame = pl.DataFrame({c: as_in_the_log(self.bundle, c, cast(pd.Series, model_input[c])) for c in present})
            scores = pl.concat([self.bundle.no_scores, *self.bundle.predict(frame.lazy())]).to_pandas()
        except DataError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error
        scores.index = model_input.index
        return scores


def as_in_the_log(bundle: Bundle, column: str, values: pd.Series) -> pl.Series:
    """A column of a request as the log that `bundle` was fitted on holds it, with what pandas makes of gaps undone.

    Raises DataError naming a value that such a log could not hold.
    """
    stored = bundle.golden.schema.get(column, pl.Null())
    kind = bundle.features.kinds.get(column, kind_of(stored))
    dtype = _TYPES.get(kind, stored)
    if values.isna().all():
        return pl.Series(column, [None] * len(values), dtype)
    found = _read(values)
    if found is not None:
        if (converted := _converted(found, kind, dtype)) is not None:
            return converted
        readers = [t for t in bundle.features.recipe.transforms if column in t.sources]
        if kind_of(found.dtype) in NUMBERS and readers and all("float" in t.accepts for t in readers):
            return found
    for value in values.dropna().tolist():
        if _converted(pl.Series([value], strict=False), kind, dtype) is None:
            wanted = dtype if kind == "other" else kind
            remedy = f"send {wanted}, and null or None for a missing value"
            if kind == "integer" and isinstance(value, float):
                remedy += (
                    "; ids must not pass through float, as pandas lets integers beside a missing one: from 2^53 on, "
                    'give the column the dtype "UInt64", or send rows without a value apart'
                )
            raise DataError(f"column {column!r} holds {repr(value)[:80]} where the model takes {wanted}: {remedy}")
    raise DataError(f"column {column!r} holds values of several kinds where the model takes {kind}: send one kind")


def _read(values: pd.Series) -> pl.Series | None:
    """None where values are of several kinds."""
    try:
        return pl.from_pandas(values)
    except (TypeError, ValueError, OverflowError):
        return None


def _converted(found: pl.Series, kind: Kind, dtype: pl.DataType) -> pl.Series | None:
    """The same values in a column of `kind`; None if it could not hold them."""
    match kind_of(found.dtype), kind:
        case is_there, wanted if is_there == wanted != "other" or wanted == "missing":
            return found
        case "float", "integer":
            return found.cast(dtype) if _whole(found) else None
        case "integer", "float":
            return found.cast(dtype)
        case "other", "integers" | "texts" if isinstance(found.dtype, pl.List):
            items = found.explode(empty_as_null=False, keep_nulls=False)
            if items.dtype == pl.Null:
                return found.cast(dtype)
            if kind == "integers" and items.dtype.is_float() and _whole(items):
                return found.list.eval(pl.element().fill_nan(None)).cast(dtype)
            return None
        case "text" | "date" | "other", "date" | "other":
            try:
                instant = found.str.to_datetime() if found.dtype == pl.String else found
                converted = instant.cast(dtype)
                return converted if kind == "other" or (converted.cast(instant.dtype) == instant).all() else None
            except pl.exceptions.PolarsError:
                return None
        case _:
            return None


def _whole(floats: pl.Series) -> bool:
    """Whether each is exactly one integer, or missing."""
    known = floats.fill_nan(None).drop_nulls()
    return bool(((known == known.round()) & (known.abs() < _EXACT)).all())


set_model(BundleModel())
