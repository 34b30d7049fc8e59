"""Vectors of raw rows: either side of a two-tower Bundle, from rows that have the columns of that side alone."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from base.errors import ConfigError, DataError
from features.columns import explained
from features.pipeline import FittedPipeline
from features.schema import Dense, Sparse
from features.transforms import UNKNOWN
from recsys.bundle import Bundle
from recsys.data import batches, to_columns
from recsys.models.two_tower import TwoTower

# Shape suffixes: B = batch, L = a model's logits, D = dimension.

Side = Literal["query", "item"]

CHUNK = 2**17
"""Rows that are transformed at a time."""


def towers_of(bundle: Bundle) -> TwoTower:
    """The bundle's model. Raises ConfigError if it has no towers."""
    if not isinstance(bundle.model, TwoTower):
        raise ConfigError(
            f"bundle {bundle.version} is a model of the kind {bundle.model_config.name!r}; only two-tower models have "
            'vectors to look items up by: set model.name = "two_tower", or name another bundle'
        )
    return bundle.model


def inputs_of(bundle: Bundle, side: Side) -> tuple[str, ...]:
    """The raw columns that a side's vectors are made from. Raises ConfigError as `towers_of` does."""
    return _features_of(bundle, side).recipe.inputs


def vectors_of(
    bundle: Bundle, raw: pl.LazyFrame, side: Side, *, batch_size: int = 8192
) -> Iterator[NDArray[np.float32]]:
    """vectors_BD of raw rows, in their order, batch by batch.

    Raises DataError if a column is missing or of another kind than in training, or a vector is not finite.
    """
    model, features = towers_of(bundle), _features_of(bundle, side)
    model.eval()
    with explained(f"the {side} side's rows"):
        for chunk in features.transform(raw).collect_batches(chunk_size=CHUNK, maintain_order=True, engine="streaming"):
            columns = to_columns(neutral(bundle.features, chunk), bundle.schema, labels=False)
            for batch in batches(columns, batch_size):
                with torch.no_grad():
                    logits_BL = model(batch.to(bundle.device))
                both_BD = model.queries(logits_BL) if side == "query" else model.items(logits_BL)
                vectors_BD = both_BD.float().cpu().numpy()
                if not np.isfinite(vectors_BD).all():
                    raise DataError(
                        f"bundle {bundle.version}: vectors of the {side} side are not finite; do not use it"
                    )
                yield np.ascontiguousarray(vectors_BD)


def neutral(fitted: FittedPipeline, table: pl.DataFrame) -> pl.DataFrame:
    """`table` with the features that it lacks, which its side's vectors do not see: unknown ids, empty bags, zeros."""
    absent: list[pl.Expr] = []
    for field in (*fitted.sparse, *fitted.dense):
        if field.name not in table.columns:
            match field:
                case Sparse(multi=True):
                    value = pl.lit([], dtype=pl.List(pl.Int32))
                case Sparse():
                    value = pl.lit(UNKNOWN, dtype=pl.Int32)
                case Dense():
                    value = pl.lit(0.0, dtype=pl.Float32)
            absent.append(value.alias(field.name))
    return table.with_columns(absent)


def _features_of(bundle: Bundle, side: Side) -> FittedPipeline:
    config = towers_of(bundle).config
    return bundle.features.only(config.query if side == "query" else config.item)
