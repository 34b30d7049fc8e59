"""AutoInt's interacting layer. Song et al., CIKM 2019, https://arxiv.org/abs/1810.11921; equations 5 to 8."""

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

# Shape suffixes: B = batch, F = fields (queries), K = fields (keys), H = heads, A = attention width per head (d' in
# the paper), D = width coming in.

Variant = Literal["default", "paper", "official"]
"""`paper`: equations 5 to 8 as printed. `default`: the same, scores divided by √d'. `official`: as the authors' code
computes it: bias and ReLU on queries, keys, values and residual, scaled scores, and layer normalisation at the end."""


class Interacting(nn.Module):
    """One interacting layer: every field becomes a mixture of the fields it attends to."""

    def __init__(self, inputs: int, heads: int, attention_dim: int, variant: Variant, dropout: float = 0.0) -> None:
        super().__init__()
        out, official = heads * attention_dim, variant == "official"
        self.heads = heads
        self.query, self.key, self.value, self.residual = (nn.Linear(inputs, out, bias=official) for _ in range(4))
        self.project = nn.ReLU() if official else nn.Identity()
        self.norm = nn.LayerNorm(out, eps=1e-8) if official else nn.Identity()
        self.scale = 1.0 if variant == "paper" else attention_dim**-0.5
        self.dropout = nn.Dropout(dropout)

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
