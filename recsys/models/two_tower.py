"""Two towers: a vector of the query, a vector of the item. Yi et al., RecSys 2019, sections 3 and 4."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from base.config import Config
from base.errors import ConfigError, did_you_mean
from features.schema import Output, Schema
from recsys.batch import Batch
from recsys.embeddings import Embeddings, TableKind
from recsys.layers import MLP
from recsys.losses import in_batch_softmax

# Shape suffixes: B = batch, P = positive rows of it, F = fields, S = fields of a side, D = dimension, L = 2 D + 2,
# V = ids of items, T = labels.

_PART = 4096
"""An item's id travels as two floats, its quotient and rest by this, which are exact up to 2^36."""
_SHORT = 0.02
"""Vectors shorter than this are divided by it, not by their length, whose gradient has no bound at 0: an unknown id
begins there, and a first step of any size would fill Adagrad's sum for good."""


class TwoTowerConfig(Config):
    """Which features describe the query, and which the item. One of each and no hidden layers: matrix factorization."""

    name: Literal["two_tower"] = "two_tower"
    query: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of features; together they must say all that is known of who asks, and nothing of the item."""
    item: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of features of the item alone."""
    dim: PositiveInt = 64
    """Of the embeddings and of both towers' vectors."""
    query_hidden: tuple[PositiveInt, ...] = ()
    """Hidden layers over the embeddings; without any a tower is the sum of its embeddings."""
    item_hidden: tuple[PositiveInt, ...] = ()
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: PositiveFloat = 0.1
    """τ: the softmax is over similarity / τ. For `dot` 1 is usual."""
    log_q: bool = True
    """Whether to subtract log q, q the item's share of the training rows: a popular item is a negative more often."""


class TwoTower(nn.Module):
    """Vectors whose inner product is the similarity; learned by softmax over the items of the batch.

    `forward` gives both vectors of each row, and which item it is, so that the loss finds the others of it.
    """

    def __init__(self, config: TwoTowerConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__()
        _require_sides(config, schema)
        assert schema.item is not None
        self.config, self.dim, self.identity = config, config.dim, schema.item
        self.outputs = (Output(name="similarity", label=schema.labels[0]),) if schema.labels else ()
        used = {*config.query, *config.item}
        own = schema.model_copy(
            update={name: tuple(f for f in getattr(schema, name) if f.name in used) for name in ("sparse", "dense")}
        )
        self.fields = own.fields
        """Those of `embedded`."""
        self.numbers = [i for i, f in enumerate(schema.dense) if f.name in used]
        self.takes_all_numbers = len(self.numbers) == len(schema.dense)
        self.embed = Embeddings(own, config.dim, tables)
        self.query = _Tower(config, config.query_hidden, [own.fields.index(name) for name in config.query])
        self.item = _Tower(config, config.item_hidden, [own.fields.index(name) for name in config.item])
        self.log_q_V: Tensor | None = None

    def forward(self, batch: Batch) -> Tensor:
        ids_B = batch.sparse[self.identity].values()
        e_BFD = self.embedded(batch)
        which_B2 = torch.stack([ids_B // _PART, ids_B % _PART], dim=1).to(e_BFD.dtype)
        return torch.cat([self.query(e_BFD), self.item(e_BFD), which_B2], dim=1)

    def embedded(self, batch: Batch) -> Tensor:
        """embedding_BFD of both sides' fields."""
        if not self.takes_all_numbers:
            batch = Batch(batch.dense_BN[:, self.numbers], batch.sparse, batch.labels_BT)
        return self.embed(batch)

    def queries(self, logits_BL: Tensor) -> Tensor:
        """vectors_BD of the queries."""
        return logits_BL[:, : self.dim]

    def items(self, logits_BL: Tensor) -> Tensor:
        """vectors_BD of the items."""
        return logits_BL[:, self.dim : 2 * self.dim]

    def probabilities(self, logits_BL: Tensor) -> Tensor:
        """similarity_B1 of each row's query and item: what items are ranked by, and no probability."""
        return (self.queries(logits_BL) * self.items(logits_BL)).sum(1, keepdim=True)

    def log_odds(self, logits_BL: Tensor) -> Tensor:
        """Raises TypeError: nobody calibrates a similarity (the run file refuses it)."""
        raise TypeError("a similarity is no probability and has no odds")

    def count_items(self, counts_V: Tensor) -> None:
        """Learn from now on with the correction for items that occur so often, by id (row 0: without an id)."""
        counts_V = counts_V.double().clamp(min=1)
        self.log_q_V = (counts_V / counts_V.sum()).log().float()

    def loss(self, logits_BL: Tensor, labels_BT: Tensor) -> Tensor:
        """Of the positive rows: others are neither queries nor negatives. 0 where there are none."""
        positive_B = labels_BT[:, 0] == 1
        rows_PL = logits_BL if bool(positive_B.all()) else logits_BL[positive_B]
        ids_P = (rows_PL[:, -2].long() * _PART) + rows_PL[:, -1].long()
        log_q_P = None
        if self.config.log_q:
            if self.log_q_V is None:
                raise ConfigError("model.log_q = true needs the items' counts, which training has from the features")
            log_q_P = self.log_q_V.to(ids_P.device)[ids_P]
        return in_batch_softmax(self.queries(rows_PL), self.items(rows_PL), ids_P, self.config.temperature, log_q_P)


class _Tower(nn.Module):
    """One side's fields to its vector; of length 1 for a cosine, unless it says next to nothing."""

    def __init__(self, config: TwoTowerConfig, hidden: Sequence[int], places: list[int]) -> None:
        super().__init__()
        self.places = places
        self.cosine = config.similarity == "cosine"
        self.mlp = MLP(len(places) * config.dim, hidden, config.dim, config.dropout) if hidden else None

    def forward(self, e_BFD: Tensor) -> Tensor:
        return self.vectors(e_BFD[:, self.places])

    def vectors(self, e_BSD: Tensor) -> Tensor:
        """vectors_BD from the side's own fields."""
        x_BD = e_BSD.sum(1) if self.mlp is None else self.mlp(e_BSD.flatten(1))
        return functional.normalize(x_BD, dim=1, eps=_SHORT) if self.cosine else x_BD


def _require_sides(config: TwoTowerConfig, schema: Schema) -> None:
    """Raises ConfigError unless the sides are features, apart from each other, and items can be told apart."""
    if schema.item is None:
        raise ConfigError('model.name = "two_tower" needs a [retrieval] table: what identifies users and items')
    if len(schema.labels) > 1:
        raise ConfigError(f'model.name = "two_tower" learns from one label; data.labels are {list(schema.labels)}')
    for side, names in (("query", config.query), ("item", config.item)):
        for name in names:
            if name not in schema.fields:
                hint = did_you_mean(name, schema.fields, f"; the features are {', '.join(schema.fields)}")
                raise ConfigError(f"model.{side}: {name!r} is no feature{hint}")
        if len(set(names)) < len(names):
            raise ConfigError(f"model.{side} = {list(names)}: name each feature once")
    if both := [name for name in config.query if name in config.item]:
        raise ConfigError(f"model.query and model.item both name {both[0]!r}: a query may know nothing of the item")
