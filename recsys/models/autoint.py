"""AutoInt and AutoInt+. Song et al., CIKM 2019, https://arxiv.org/abs/1810.11921; equations 5 to 10."""

from typing import Literal

import torch
import torch.nn.functional as nnf
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from base.config import Config
from features.schema import Schema
from recsys.batch import Batch
from recsys.embeddings import Embeddings
from recsys.layers import MLP
from recsys.losses import log_loss
from recsys.models.base import one_output_per_label

# Shape suffixes: B = batch, T = tasks, F = fields (queries), K = fields (keys), H = heads, A = attention width per
# head (d' in the paper), D = width coming in, L = layers.

Variant = Literal["default", "paper", "official"]
"""`paper`: equations 5 to 8 as printed. `default`: the same, scores divided by √d'. `official`: as the authors' code
computes it: bias and ReLU on queries, keys, values and residual, scaled scores, and layer normalisation at the end."""


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


class Interacting(nn.Module):
    """One interacting layer: every field becomes a mixture of the fields it attends to."""

    def __init__(self, inputs: int, config: AutoIntConfig) -> None:
        super().__init__()
        out, official = config.heads * config.attention_dim, config.variant == "official"
        self.heads = config.heads
        self.query, self.key, self.value, self.residual = (nn.Linear(inputs, out, bias=official) for _ in range(4))
        self.project = nn.ReLU() if official else nn.Identity()
        self.norm = nn.LayerNorm(out, eps=1e-8) if official else nn.Identity()
        self.scale = 1.0 if config.variant == "paper" else config.attention_dim**-0.5
        self.dropout = nn.Dropout(config.attention_dropout)

    def attention(self, x_BFD: Tensor) -> Tensor:
        """a_BHFK: how much field f draws from field k (equation 5); rows sum to one."""
        q_BHFA = self._split(self.project(self.query(x_BFD)))
        k_BHKA = self._split(self.project(self.key(x_BFD)))
        return torch.softmax(q_BHFA * self.scale @ k_BHKA.transpose(2, 3), dim=-1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        v_BHKA = self._split(self.project(self.value(x_BFD)))
        mixed_BHFA = self.dropout(self.attention(x_BFD)) @ v_BHKA  # equation 6
        joined_BFD = mixed_BHFA.transpose(1, 2).flatten(2)  # equation 7
        return self.norm(nnf.relu(joined_BFD + self.project(self.residual(x_BFD))))  # equation 8

    def _split(self, x_BFD: Tensor) -> Tensor:
        return x_BFD.unflatten(2, (self.heads, -1)).transpose(1, 2)


class AutoInt(nn.Module):
    """Interacting layers over the fields' embeddings, read by one linear layer (equation 9)."""

    def __init__(self, config: AutoIntConfig, schema: Schema, table_device: torch.device) -> None:
        super().__init__()
        self.outputs = one_output_per_label(schema.labels)
        tasks, fields, width = len(schema.labels), len(schema.fields), config.heads * config.attention_dim
        self.embed = Embeddings(schema, config.dim, table_device)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(Interacting(config.dim if i == 0 else width, config) for i in range(config.layers))
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

    def probabilities(self, logits_BT: Tensor) -> Tensor:
        return logits_BT.sigmoid()

    def loss(self, logits_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return log_loss(logits_BT, labels_BT)
