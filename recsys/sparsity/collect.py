"""The summed gradients of all weights, active or not, of the rows that a window of batches touches, within bounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from recsys.draws import mixed

# Shape suffixes: N = lookups of a batch, K = rows kept, D = embedding dimension, X = bags of a batch.


@dataclass
class Collector:
    """Sums over a window, for at most `limit` rows: those whose hash is lowest, the same all through the window."""

    limit: int
    salt: int
    """Another for each window, so that each keeps another sample."""
    dim: int
    ceiling: int = 2**32
    """Rows with a hash of as much or more are left out: it falls as more rows are met."""
    rows_K: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    sums_KD: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def add(self, row_N: Tensor, bag_N: Tensor, weight_N: Tensor | None, grad_XD: Tensor) -> None:
        """The gradient of a lookup's bags: each row in a bag has its weight's share of it."""
        row_N, bag_N = row_N.cpu(), bag_N.cpu()
        weight_N = None if weight_N is None else weight_N.cpu()
        if self.ceiling < 2**32:
            kept_N = (_hash(row_N, self.salt) < self.ceiling).nonzero().squeeze(1)
            row_N, bag_N = row_N[kept_N], bag_N[kept_N]
            weight_N = None if weight_N is None else weight_N[kept_N]
        grad_ND = grad_XD.cpu().index_select(0, bag_N)
        if weight_N is not None:
            grad_ND.mul_(weight_N.unsqueeze(1))
        known = len(self.rows_K)
        rows_K, place_X = torch.unique(torch.cat([self.rows_K, row_N]), return_inverse=True)
        sums_KD = torch.zeros(len(rows_K), self.dim)
        if known:
            sums_KD.index_add_(0, place_X[:known], self.sums_KD)
        sums_KD.index_add_(0, place_X[known:], grad_ND)
        self.rows_K, self.sums_KD = rows_K, sums_KD
        if len(rows_K) > self.limit:
            self._thin()

    def _thin(self) -> None:
        """Leave rows out until at most `limit` are there."""
        hash_K = _hash(self.rows_K, self.salt)
        self.ceiling = int(hash_K.sort().values[self.limit])
        kept_K = hash_K < self.ceiling
        self.rows_K, self.sums_KD = self.rows_K[kept_K], self.sums_KD[kept_K]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs of it."""
        numbers = torch.tensor([self.salt, self.ceiling])
        return {"rows_K": self.rows_K, "sums_KD": self.sums_KD, "salt_and_ceiling": numbers}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], limit: int, dim: int) -> Self:
        """The reverse."""
        salt, ceiling = tensors["salt_and_ceiling"].tolist()
        return cls(limit, salt, dim, ceiling, tensors["rows_K"], tensors["sums_KD"])


def _hash(row_N: Tensor, salt: int) -> Tensor:
    """In [0, 2^32)."""
    counter_N = row_N.numpy().astype(np.uint64) + np.uint64(salt) * np.uint64(2**32)
    return torch.from_numpy((mixed(counter_N) >> np.uint64(32)).astype(np.int64))
