"""Factorization Machine. Rendle, ICDM 2010, equations 1 and 5 (lemma 3.1)."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from base.config import Config
from features.schema import Schema
from recsys.batch import Batch
from recsys.embeddings import Embeddings, TableKind
from recsys.models.base import PerLabel

# Shape suffixes: B = batch, T = tasks, F = fields, D = factors.


class FMConfig(Config):
    """Size of a factorization machine."""

    name: Literal["fm"] = "fm"
    dim: PositiveInt = 16
    """Factors per field and task."""


class FM(PerLabel):
    """y = b + Σ_i w_i x_i + Σ_{i<j} <v_i, v_j> x_i x_j, the last sum as ½ Σ_d [(Σ_i v_id x_i)² - Σ_i v_id² x_i²].

    A table row holds w and v of each task side by side, so there is one lookup.
    """

    def __init__(self, config: FMConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__(schema)
        self.dim = config.dim
        width = self.tasks * (1 + self.dim)
        self.embed = Embeddings(schema, width, tables, padded=True, init_std=0.01)
        self.bias_T = nn.Parameter(torch.zeros(self.tasks))

    def forward(self, batch: Batch) -> Tensor:
        rows_BFD = self.embed(batch)
        linear_BT = rows_BFD[:, :, : self.tasks].sum(1)
        factors = rows_BFD[:, :, self.tasks : self.tasks * (1 + self.dim)]
        v_BFTD = factors.unflatten(2, (self.tasks, self.dim))
        pairs_BT = 0.5 * (v_BFTD.sum(1).square() - v_BFTD.square().sum(1)).sum(-1)
        return linear_BT + pairs_BT + self.bias_T
