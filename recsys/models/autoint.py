"""AutoInt and AutoInt+. Song et al., CIKM 2019, https://arxiv.org/abs/1810.11921; equations 5 to 10."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from base.config import Config
from features.schema import Schema
from recsys.batch import Batch
from recsys.embeddings import Embeddings, TableKind
from recsys.interacting import Interacting, Variant
from recsys.layers import MLP
from recsys.models.base import PerLabel

# Shape suffixes: B = batch, T = tasks, F = fields (queries), K = fields (keys), H = heads, D = width coming in,
# L = layers.


class AutoIntConfig(Config):
    """Size and variant of an AutoInt; `deep` makes it AutoInt+."""

    name: Literal["autoint"] = "autoint"
    dim: PositiveInt = 16
    layers: PositiveInt = 3
    heads: PositiveInt = 2
    attention_dim: PositiveInt = 32
    """Width of one head, d' in the paper."""
    variant: Variant = "default"
    deep: tuple[PositiveInt, ...] = ()
    """Hidden layers of the network trained jointly with it (section 5.5); none in plain AutoInt."""
    attention_dropout: NonNegativeFloat = 0.0
    embedding_dropout: NonNegativeFloat = 0.0
    deep_dropout: NonNegativeFloat = 0.0


class AutoInt(PerLabel):
    """Interacting layers over the fields' embeddings, read by one linear layer (equation 9)."""

    def __init__(self, config: AutoIntConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__(schema)
        tasks, fields, width = len(schema.labels), len(schema.fields), config.heads * config.attention_dim
        self.embed = Embeddings(schema, config.dim, tables)
        self.dropout = nn.Dropout(config.embedding_dropout)
        shape = (config.heads, config.attention_dim, config.variant, config.attention_dropout)
        self.layers = nn.ModuleList(Interacting(config.dim if i == 0 else width, *shape) for i in range(config.layers))
        self.head = nn.Linear(fields * width, tasks)
        self.deep = MLP(fields * config.dim, config.deep, tasks, config.deep_dropout) if config.deep else None

    def forward(self, batch: Batch) -> Tensor:
        e_BFD = x_BFD = self.dropout(self.embed(batch))
        for layer in self.layers:
            x_BFD = layer(x_BFD)
        logits_BT = self.head(x_BFD.flatten(1))
        return logits_BT if self.deep is None else logits_BT + self.deep(e_BFD.flatten(1))

    def attention(self, batch: Batch) -> Tensor:
        """a_LBHFK of every layer, for explanation (section 5.4); fields in the schema's order."""
        x_BFD = self.embed(batch)
        maps: list[Tensor] = []
        for layer in self.layers:
            assert isinstance(layer, Interacting)
            maps.append(layer.attention(x_BFD))
            x_BFD = layer(x_BFD)
        return torch.stack(maps)
