"""Logistic regression over the one-hot and numeric fields: the baseline without interactions."""

from typing import Literal

import torch
from torch import Tensor, nn

from base.config import Config
from features.schema import Schema
from recsys.batch import Batch
from recsys.embeddings import Embeddings, TableKind
from recsys.models.base import PerLabel

# Shape suffixes: B = batch, T = tasks, F = fields, D = width of a table row.


class LRConfig(Config):
    """Logistic regression has nothing to choose."""

    name: Literal["lr"] = "lr"


class LR(PerLabel):
    """y = sigmoid(b + Σ_f w_f x_f). The weights are the first T floats of each row; rows come in fours."""

    def __init__(self, config: LRConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__(schema)
        self.embed = Embeddings(schema, self.tasks, tables, padded=True, init_std=0.0)
        self.bias_T = nn.Parameter(torch.zeros(self.tasks))

    def forward(self, batch: Batch) -> Tensor:
        return self.embed(batch)[:, :, : self.tasks].sum(1) + self.bias_T
