"""The summed gradients of all weights, active or not, of the rows that a window of batches touches, within bounds."""

from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from recsys.draws import mixed
from recsys.sparsity import loops

# Shape suffixes: N = lookups of a batch, K = rows kept, D = embedding dimension, X = bags of a batch, H = slots of the
# hash table.

_FIRST = 2**12
"""Rows there is room for at first."""
_SLACK = 4
"""Rows are left out when there are a fourth more than the limit, so that it is seldom to do."""


class Seen(NamedTuple):
    """Rows and their sums."""

    rows_K: Tensor
    """Ascending."""
    sums_KD: Tensor


class Collector:
    """Sums over a window, for at most `limit` of `rows` rows: those whose hash is lowest, the same all through it.

    Where a row's sums stand is in a hash table: a batch costs what it has, but for the few that have rows left out.
    There is never room for more than a fourth above the limit, and twice that for the moment of a copy.
    """

    def __init__(
        self,
        limit: int,
        rows: int,
        salt: int,
        dim: int,
        ceiling: int = 2**32,
        seen: Seen | None = None,
    ) -> None:
        self.limit = min(limit, rows)
        self.most = min(limit + max(1, limit // _SLACK), rows)
        """Rows there is ever room for."""
        self.salt = salt
        """Another for each window, so that each keeps another sample."""
        self.dim = dim
        self.ceiling = ceiling
        """Rows with a hash of as much or more are left out: it falls as more rows are met."""
        self._hold(*(seen or (torch.empty(0, dtype=torch.int64), torch.empty(0, dim))))

    def seen(self) -> Seen:
        """A copy of what there is."""
        if self._count > self.limit:
            self._thin()
        order_K = self._rows[: self._count].argsort()
        return Seen(self._rows[order_K], self._sums[order_K])

    def add(self, row_N: Tensor, bag_N: Tensor, weight_N: Tensor | None, grad_XD: Tensor) -> None:
        """The gradient of a lookup's bags: each row in a bag has its weight's share of it."""
        row_N, bag_N, grad_XD = row_N.cpu(), bag_N.cpu(), grad_XD.detach().cpu()
        weight_N = torch.empty(0) if weight_N is None else weight_N.detach().cpu()
        assert grad_XD.shape[1] == self.dim
        assert len(weight_N) in (0, len(row_N))
        while len(row_N):
            if self.ceiling < 2**32:
                kept_N = (_hash(row_N, self.salt) < self.ceiling).nonzero().squeeze(1)
                row_N, bag_N = row_N[kept_N], bag_N[kept_N]
                weight_N = weight_N[kept_N] if len(weight_N) else weight_N
            done = self._sum(row_N, bag_N, weight_N, grad_XD)
            row_N, bag_N, weight_N = row_N[done:], bag_N[done:], weight_N[done:]
            if len(row_N) and self._count < self.most:
                self._hold(self._rows[: self._count], self._sums[: self._count])
            elif len(row_N):
                self._thin()

    def _sum(self, row_N: Tensor, bag_N: Tensor, weight_N: Tensor, grad_XD: Tensor) -> int:
        """Add the first lookups, as many as there is room for their rows."""
        place_N = torch.empty_like(row_N)
        rows, slots = self._rows.numpy(), self._slots.numpy()
        done, self._count = loops.find(row_N.numpy(), rows, self._count, slots, place_N.numpy())
        places = place_N[:done].numpy()
        loops.sum_up(places, bag_N.numpy(), weight_N.numpy(), grad_XD.numpy(), self._sums.numpy())
        return done

    def _thin(self) -> None:
        """Leave rows out until the limit is kept."""
        rows_K = self._rows[: self._count]
        hash_K = _hash(rows_K, self.salt)
        self.ceiling = int(hash_K.kthvalue(self.limit + 1).values)
        kept_K = hash_K < self.ceiling
        self._hold(rows_K[kept_K], self._sums[: self._count][kept_K])

    def _hold(self, rows_K: Tensor, sums_KD: Tensor) -> None:
        """These, with room for as many more."""
        self._count = count = len(rows_K)
        room = min(self.most, max(_FIRST, 2 * count))
        self._rows, self._sums = torch.zeros(room, dtype=torch.int64), torch.zeros(room, self.dim)
        self._rows[:count], self._sums[:count] = rows_K, sums_KD
        self._slots = torch.full((2 ** (2 * room - 1).bit_length(),), -1, dtype=torch.int32)
        loops.index(self._rows.numpy(), count, self._slots.numpy())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs of it."""
        seen = self.seen()  # before the ceiling is read, which it may lower
        return {**seen._asdict(), "salt_and_ceiling": torch.tensor([self.salt, self.ceiling])}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], limit: int, rows: int, dim: int) -> Self:
        """The reverse."""
        salt, ceiling = tensors["salt_and_ceiling"].tolist()
        assert tensors["sums_KD"].shape == (len(tensors["rows_K"]), dim)
        return cls(limit, rows, salt, dim, ceiling, Seen(tensors["rows_K"], tensors["sums_KD"]))


def _hash(row_N: Tensor, salt: int) -> Tensor:
    """In [0, 2^32)."""
    counter_N = row_N.numpy().astype(np.uint64) + np.uint64(salt) * np.uint64(2**32)
    return torch.from_numpy((mixed(counter_N) >> np.uint64(32)).astype(np.int64))
