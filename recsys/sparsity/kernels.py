"""What sparse tables do for each lookup: on the CPU compiled loops, elsewhere tensor operations.

On the CPU additions are in the order of the lookups, whatever the threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

from recsys.sparsity import loops

# Shape suffixes: N = lookups, S = slots of a row, D = embedding dimension, G = groups, R = rows, X = bags, P = parts of
# the work.

_PART = 2**14
"""Lookups that are worth a thread."""


@dataclass(frozen=True)
class Bags:
    """The lookups of a batch, bag by bag. A bag is a row of the dense embeddings, and an example's are side by side."""

    row_N: Tensor
    """int64; rows of all tables are numbered through."""
    ends_X: Tensor
    """int64: before which lookup each bag ends."""
    tables: int
    """Whose bags follow each other: all of the first, then all of the next; 1 where they come as the embeddings do."""
    mean: bool
    """Whether a bag is the mean of its rows, and not their sum."""

    def bags(self) -> Tensor:
        """bag_N: the row of the dense embeddings that each lookup is added to."""
        bag_X = torch.arange(len(self.ends_X), device=self.ends_X.device).view(-1, self.tables).t().flatten()
        return torch.repeat_interleave(bag_X, self._counts(), output_size=len(self.row_N))

    def weights(self) -> Tensor | None:
        """weight_N: what each lookup counts in its bag; None for 1."""
        if not self.mean:
            return None
        count_X = self._counts()
        return torch.repeat_interleave(1 / count_X.clamp(min=1), count_X, output_size=len(self.row_N))

    def _counts(self) -> Tensor:
        return self.ends_X.diff(prepend=self.ends_X.new_zeros(1))


@dataclass(frozen=True)
class Lookups:
    """Lookups of rows that hold equally many weights, by tensor operations."""

    size: int
    positions_NS: Tensor
    """uint8."""
    bag_N: Tensor
    """int64."""
    weight_N: Tensor | None
    """float32; None for 1."""

    def add(self, value_NS: Tensor, dense_XD: Tensor) -> None:
        """Add the weights to their bags."""
        if self.weight_N is not None:
            value_NS = value_NS * self.weight_N.unsqueeze(1)
        dense_XD.view(-1).scatter_add_(0, self._flat(dense_XD.shape[1]).view(-1), value_NS.view(-1))

    def gradients(self, grad_XD: Tensor) -> Tensor:
        """grad_NS of the weights, from those of the bags; 0 in slots that only fill up the row."""
        flat_NS = self._flat(grad_XD.shape[1])
        grad_NS = grad_XD.view(-1).index_select(0, flat_NS.view(-1)).view(flat_NS.shape)
        grad_NS[:, self.size :] = 0
        return grad_NS if self.weight_N is None else grad_NS.mul_(self.weight_N.unsqueeze(1))

    def _flat(self, dim: int) -> Tensor:
        """Of each slot, the number of the dense embeddings' element that it belongs to."""
        return self.positions_NS.long().add_((self.bag_N * dim).unsqueeze(1))


class Compiled:
    """The lookups of a batch in main memory, by compiled loops.

    `groups`: values_NS and positions_NS of each, which it keeps. `place_R`, int32: where rows stand when those of the
    groups follow each other; None for one group, in the order of the rows.
    """

    def __init__(
        self,
        bags: Bags,
        sizes: Sequence[int],
        groups: Sequence[tuple[Tensor, Tensor]],
        place_R: Tensor | None,
    ) -> None:
        self._ends_X, self._row_N = bags.ends_X.numpy(), bags.row_N.numpy()
        self._tables, self._mean = bags.tables, bags.mean
        lookups, rows = len(self._row_N), [len(values_NS) for values_NS, _ in groups]
        # The loops read and write by address: what is not as they take it would be somebody else's memory.
        assert groups
        assert sum(rows) < 2**31
        assert place_R is None or (place_R.dtype == torch.int32 and len(place_R) == sum(rows))
        assert place_R is not None or len(groups) == 1
        assert (int(self._ends_X[-1]) if len(self._ends_X) else 0) == lookups
        for both in groups:
            for found_NS, dtype in zip(both, (torch.float32, torch.uint8), strict=True):
                assert found_NS.device.type == "cpu"
                assert found_NS.dtype == dtype
                assert found_NS.is_contiguous()
                assert found_NS.shape[1] % int(loops.UNIT) == 0
        self._groups = groups
        self._place_R = _NO_PLACE if place_R is None else place_R.numpy()
        self._starts_G = np.cumsum([0, *rows[:-1]])
        self._sizes_G = np.array(sizes)
        self._slots_G = np.array([values_NS.shape[1] for values_NS, _ in groups])
        self._values_G, self._positions_G = np.array([[x.data_ptr() for x in both] for both in groups], np.uint64).T
        parts = max(1, min(torch.get_num_threads(), lookups // _PART))
        cuts = np.searchsorted(self._ends_X, [lookups * p // parts for p in range(1, parts)])  # a bag is in one part
        self._cuts = [0, *cuts.tolist(), len(self._ends_X)]
        self._group_N, self._index_N = np.zeros(lookups, dtype=np.uint8), np.zeros(lookups, dtype=np.int32)
        self._count_PG = np.zeros((parts, len(groups)), dtype=np.int64)

    def dense(self, dim: int) -> Tensor:
        """dense_XD: the sum or mean of each bag's weights at their positions; 0 for an empty one."""
        dense_XD = torch.empty(len(self._ends_X), dim)
        self._count_PG[:] = 0
        memory = self._place_R, self._starts_G, self._slots_G, self._values_G, self._positions_G
        found = dense_XD.numpy()

        def run(part: int, first: int, last: int) -> None:
            bags = first, last, self._ends_X, self._tables, self._mean
            kept = self._group_N, self._index_N, self._count_PG[part]
            loops.add(*bags, self._row_N, *memory, *kept, found)

        self._each_part(run)
        return dense_XD

    def gradients(self, grad_XD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per group its lookups' places in it, index_N, and grad_NS of their weights. After `dense`."""
        count_G, floats_G = self._count_PG.sum(0), self._count_PG.sum(0) * self._slots_G
        assert count_G.sum() == len(self._row_N)
        index_N, grad = torch.empty(len(self._row_N), dtype=torch.int64), torch.empty(int(floats_G.sum()))
        begin = count_G.cumsum() - count_G, floats_G.cumsum() - floats_G
        before_PG = self._count_PG.cumsum(0) - self._count_PG
        kept = self._group_N, self._index_N, self._sizes_G, self._slots_G, self._positions_G

        def run(part: int, first: int, last: int) -> None:
            bags = first, last, self._ends_X, self._tables, self._mean
            loops.gradients(
                *bags, *kept, grad_XD.numpy(), *begin, before_PG[part].copy(), index_N.numpy(), grad.numpy()
            )

        self._each_part(run)
        indices, grads = index_N.split(count_G.tolist()), grad.split(floats_G.tolist())
        return [(i, g.view(len(i), slots)) for i, g, slots in zip(indices, grads, self._slots_G.tolist(), strict=True)]

    def _each_part(self, run: Callable[[int, int, int], None]) -> None:
        """By at most as many threads as torch has."""
        parts = len(self._cuts) - 1
        if parts == 1:
            run(0, 0, len(self._ends_X))
            return
        for done in _pool(parts).map(run, range(parts), self._cuts[:-1], self._cuts[1:]):
            assert done is None


_NO_PLACE = np.empty(0, dtype=np.int32)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sparse-tables")


def apply_gradients(kernel: Any, index_N: Tensor, grad_NS: Tensor) -> None:
    """What fbgemm's backward pass does, on the CPU, with the gradients of single rows: sums them and steps.

    The operator that its autograd function ends in, because that would first look all of them up again.
    """
    optimizer = kernel.optimizer_args
    memory = kernel.weights_host, kernel.weights_placements, kernel.weights_offsets, kernel.D_offsets, kernel.max_D
    rows = kernel.hash_size_cumsum, kernel.total_hash_size_bits, index_N, torch.arange(len(index_N) + 1)
    sums = kernel.momentum1_host, kernel.momentum1_placements, kernel.momentum1_offsets, kernel.learning_rate_tensor
    arguments = grad_NS, *memory, *rows, int(kernel.pooling_mode), None, False, *sums, optimizer.eps
    if kernel.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD:
        torch.ops.fbgemm.split_embedding_backward_codegen_rowwise_adagrad_cpu(*arguments)
    else:
        torch.ops.fbgemm.split_embedding_backward_codegen_adagrad_cpu(*arguments)
