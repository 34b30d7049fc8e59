"""Deep & Cross Network v2. Wang et al., WWW 2021, https://arxiv.org/abs/2008.13535."""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from base.config import Config
from features.schema import Schema
from recsys.batch import Batch
from recsys.embeddings import Embeddings, TableKind
from recsys.layers import MLP
from recsys.models.base import PerLabel

# Shape suffixes: B = batch, T = tasks, F = fields, D = embedding dimension, X = F * D.


class DCNConfig(Config):
    """Size of a DCN-v2 with parallel cross and deep parts."""

    name: Literal["dcn"] = "dcn"
    dim: PositiveInt = 16
    cross_layers: NonNegativeInt = 3
    hidden: tuple[PositiveInt, ...] = (256, 128)
    dropout: NonNegativeFloat = 0.0


class DCN(PerLabel):
    """Cross layers x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l (equation 1) beside an MLP; both read by one linear layer."""

    def __init__(self, config: DCNConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__(schema)
        tasks, width = len(schema.labels), len(schema.fields) * config.dim
        self.embed = Embeddings(schema, config.dim, tables)
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(config.cross_layers))
        self.deep = MLP(width, config.hidden, tasks, config.dropout)
        self.head = nn.Linear(width, tasks)

    def forward(self, batch: Batch) -> Tensor:
        x0_BX = x_BX = self.embed(batch).flatten(1)
        for layer in self.cross:
            x_BX = x0_BX * layer(x_BX) + x_BX
        return self.head(x_BX) + self.deep(x0_BX)
