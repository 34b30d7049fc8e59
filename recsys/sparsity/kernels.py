"""What sparse tables do for each lookup and each row whose mask moves: loops, compiled, in place of many passes.

Lookups on other devices than the CPU are tensor operations; masks move on the CPU always. Additions are in the order of
the lookups whatever the threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from numba import njit
from torch import Tensor

from recsys.sparsity.memory import FLOAT, ask, byte_at, float_at

# Shape suffixes: N = lookups, K = rows whose mask moves, S = slots of a row, D = embedding dimension, G = groups,
# R = rows, X = bags, P = parts of the work.

_PART = 2**14
"""Lookups that are worth a thread."""
_AHEAD = 32
"""Lookups that memory is asked for before their turn comes: rows stand anywhere, and each would be waited for."""
_BAGS_AHEAD = 4
"""Likewise."""
_UNIT = np.uint64(4)
"""Slots that a row's are a multiple of."""


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
        assert all(x.is_contiguous() for both in groups for x in both)
        self._bags, self._groups = bags, groups
        self._ends_X = bags.ends_X.numpy()
        self._place_R = _NO_PLACE if place_R is None else place_R.numpy()
        self._of_groups = (
            np.cumsum([0, *(len(values_NS) for values_NS, _ in groups[:-1])]),
            np.array(sizes),
            np.array([values_NS.shape[1] for values_NS, _ in groups]),
            np.array([values_NS.data_ptr() for values_NS, _ in groups], dtype=np.uint64),
            np.array([positions_NS.data_ptr() for _, positions_NS in groups], dtype=np.uint64),
        )
        lookups = len(bags.row_N)
        parts = max(1, min(torch.get_num_threads(), lookups // _PART))
        cuts = np.searchsorted(self._ends_X, [lookups * p // parts for p in range(1, parts)])  # a bag is in one part
        self._cuts = [0, *cuts.tolist(), len(self._ends_X)]
        self._group_N, self._index_N = np.empty(lookups, dtype=np.uint8), np.empty(lookups, dtype=np.int32)
        self._count_PG = np.zeros((parts, len(groups)), dtype=np.int64)

    def dense(self, dim: int) -> Tensor:
        """dense_XD: the sum or mean of each bag's weights at their positions; 0 for an empty one."""
        dense_XD = torch.empty(len(self._ends_X), dim)
        found, row_N = dense_XD.numpy(), self._bags.row_N.numpy()

        def run(part: int, first: int, last: int) -> None:
            bags = first, last, self._ends_X, self._bags.tables, self._bags.mean
            out = self._group_N, self._index_N, self._count_PG[part], found
            _add(*bags, row_N, self._place_R, *self._of_groups, *out)

        self._each_part(run)
        return dense_XD

    def gradients(self, grad_XD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per group the index in it of each lookup that is its, and grad_NS of the weights; after `dense`."""
        count_G, slots_G = self._count_PG.sum(0), self._of_groups[2]
        index_N = torch.empty(len(self._group_N), dtype=torch.int64)
        grad = torch.empty(int((count_G * slots_G).sum()))
        before_G, out_G = count_G.cumsum() - count_G, (count_G * slots_G).cumsum() - count_G * slots_G
        at_PG = self._count_PG.cumsum(0) - self._count_PG

        def run(part: int, first: int, last: int) -> None:
            bags = first, last, self._ends_X, self._bags.tables, self._bags.mean
            out = before_G, out_G, at_PG[part].copy(), index_N.numpy(), grad.numpy()
            _gradients(*bags, self._group_N, self._index_N, *self._of_groups, grad_XD.numpy(), *out)

        self._each_part(run)
        indices = index_N.split(count_G.tolist())
        grads = grad.split((count_G * slots_G).tolist())
        return [(i, g.view(len(i), slots)) for i, g, slots in zip(indices, grads, slots_G.tolist(), strict=True)]

    def _each_part(self, run: Callable[[int, int, int], None]) -> None:
        """By as many threads as torch has."""
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


# Unsigned numbers spare the loops a look whether an index is negative.


@njit(cache=True, nogil=True)
def _bag(x, batch, tables):
    """Where in the dense embeddings a bag of the lookups is."""
    return np.uint64(x if tables == 1 else x % batch * tables + x // batch)


@njit(cache=True, nogil=True)
def _add(
    first,
    last,
    ends_X,
    tables,
    mean,
    row_N,
    place_R,
    starts_G,
    sizes_G,
    slots_G,
    values_G,
    positions_G,
    group_N,
    index_N,
    count_G,
    dense_XD,
):
    batch, dim, dense = len(ends_X) // tables, np.uint64(dense_XD.shape[1]), np.uint64(dense_XD.ctypes.data)
    n = ends_X[first - 1] if first else 0
    stop = ends_X[last - 1] if last else 0
    placed, asked, ready = len(place_R) > 0, n, n
    for x in range(first, last):
        bag, end = _bag(x, batch, tables), ends_X[x]
        ask(dense + _bag(x + _BAGS_AHEAD, batch, tables) * dim * FLOAT, dim * FLOAT)
        share = np.float32(1) / np.float32(end - n) if mean and end > n else np.float32(1)
        for d in range(dim):
            dense_XD[bag, d] = 0
        while n < end:
            if placed:
                while asked < min(n + 2 * _AHEAD, stop):
                    ask(np.uint64(place_R.ctypes.data) + np.uint64(row_N[asked]) * FLOAT, FLOAT)
                    asked += 1
            while ready < min(n + _AHEAD, stop):
                place, group = row_N[ready], 0
                if placed:
                    place = np.int64(place_R[np.uint64(place)])
                    for start in starts_G[1:]:  # without a branch, which would be guessed wrong half of the time
                        group += place >= start
                    place -= starts_G[group]
                group_N[ready], index_N[ready] = group, place
                count_G[group] += 1
                slots = np.uint64(slots_G[group])
                ask(values_G[group] + np.uint64(place) * slots * FLOAT, slots * FLOAT)
                ask(positions_G[group] + np.uint64(place) * slots, slots)
                ready += 1
            group = group_N[n]
            slot = np.uint64(index_N[n]) * np.uint64(slots_G[group])
            value, position = values_G[group] + slot * FLOAT, positions_G[group] + slot
            for s in range(np.uint64(0), np.uint64(slots_G[group]), _UNIT):  # what only fills up the row is 0
                for i in range(_UNIT):
                    dense_XD[bag, np.uint64(byte_at(position + s + i))] += float_at(value + (s + i) * FLOAT) * share
            n += 1


@njit(cache=True, nogil=True)
def _gradients(
    first,
    last,
    ends_X,
    tables,
    mean,
    group_N,
    index_N,
    _starts_G,
    sizes_G,
    slots_G,
    values_G,
    positions_G,
    grad_XD,
    before_G,
    out_G,
    at_G,
    found_N,
    grad,
):
    batch, dim, dense = len(ends_X) // tables, np.uint64(grad_XD.shape[1]), np.uint64(grad_XD.ctypes.data)
    n = ends_X[first - 1] if first else 0
    stop = ends_X[last - 1] if last else 0
    for x in range(first, last):
        bag, end = _bag(x, batch, tables), ends_X[x]
        ask(dense + _bag(x + _BAGS_AHEAD, batch, tables) * dim * FLOAT, dim * FLOAT)
        share = np.float32(1) / np.float32(end - n) if mean and end > n else np.float32(1)
        while n < end:
            if n + _AHEAD < stop:
                group = group_N[n + _AHEAD]
                slots = np.uint64(slots_G[group])
                ask(positions_G[group] + np.uint64(index_N[n + _AHEAD]) * slots, slots)
            group = group_N[n]
            size, slots = np.uint64(sizes_G[group]), np.uint64(slots_G[group])
            position = positions_G[group] + np.uint64(index_N[n]) * slots
            at = at_G[group]
            at_G[group] += 1
            found_N[before_G[group] + at] = index_N[n]
            out = np.uint64(out_G[group]) + np.uint64(at) * slots
            for s in range(np.uint64(0), slots, _UNIT):
                for i in range(_UNIT):
                    grad[out + s + i] = grad_XD[bag, np.uint64(byte_at(position + s + i))] * share
            for s in range(size, slots):
                grad[out + s] = 0
            n += 1


@njit(cache=True, nogil=True)
def exchange(size, positions_KS, values_KS, state_KS, strength_KD, missed_KD, wanted_K, accumulator):
    """Drop weights of least magnitude and grow as many, at most `wanted_K`, where the strength is largest and not 0.

    In place; positions stay ascending. What grows begins at `missed_KD`, its sum at `accumulator` where each weight has
    one (`state_KS`). Of equals the first is taken.
    """
    dim, by_element = strength_KD.shape[1], state_KS.shape[1] > 0
    left_D, value_D, sum_D = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
    active_D = np.empty(dim, np.bool_)
    for k in range(len(positions_KS)):
        active_D[:] = False
        for d in range(dim):
            left_D[d] = abs(strength_KD[k, d])
        for s in range(size):
            d = positions_KS[k, s]
            active_D[d], left_D[d], value_D[d] = True, 0, values_KS[k, s]
            if by_element:
                sum_D[d] = state_KS[k, s]
        for _ in range(min(wanted_K[k], size, dim - size)):
            grown = np.argmax(left_D)
            if left_D[grown] == 0:
                break
            left_D[grown] = 0
            least, dropped = np.float32(np.inf), -1
            for s in range(size):  # those that were there at first
                d = positions_KS[k, s]
                if active_D[d] and (dropped < 0 or abs(value_D[d]) < least):
                    least, dropped = abs(value_D[d]), d
            active_D[dropped], active_D[grown] = False, True
            value_D[grown], sum_D[grown] = missed_KD[k, grown], accumulator
        s = 0
        for d in range(dim):
            if active_D[d]:
                positions_KS[k, s], values_KS[k, s] = d, value_D[d]
                if by_element:
                    state_KS[k, s] = sum_D[d]
                s += 1
