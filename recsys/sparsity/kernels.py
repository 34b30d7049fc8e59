"""What sparse tables do for each lookup and each row whose mask moves: loops, compiled, in place of many passes.

Lookups on other devices than the CPU are tensor operations; masks move on the CPU always. Additions are in the order of
the lookups whatever the threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

# Shape suffixes: N = lookups, K = rows whose mask moves, S = slots of a row, D = embedding dimension, G = groups,
# R = rows, X = anything.

_PART = 2**14
"""Lookups that are worth a thread."""


@dataclass(frozen=True)
class Lookups:
    """Lookups of rows that hold equally many weights, each to be added to a bag: a row of the dense embeddings."""

    size: int
    positions_NS: Tensor
    """uint8."""
    bag_N: Tensor
    """int64; equal ones are adjacent."""
    share_X: Tensor | None
    """float32: what rows count in each bag; None for 1."""

    def add(self, value_NS: Tensor, dense_XD: Tensor) -> None:
        """Add the weights to their bags."""
        if self._compiled:
            self._each_part(_add, value_NS.detach().numpy(), dense_XD.numpy())
            return
        if (share_N := self._share()) is not None:
            value_NS = value_NS * share_N.unsqueeze(1)
        dense_XD.view(-1).scatter_add_(0, self._flat(dense_XD.shape[1]).view(-1), value_NS.view(-1))

    def gradients(self, grad_XD: Tensor) -> Tensor:
        """grad_NS of the weights, from those of the bags; 0 in slots that only fill up the row."""
        if self._compiled:
            grad_NS = torch.empty(self.positions_NS.shape)
            self._each_part(_gradients, grad_XD.numpy(), grad_NS.numpy())
            return grad_NS
        flat_NS = self._flat(grad_XD.shape[1])
        grad_NS = grad_XD.view(-1).index_select(0, flat_NS.view(-1)).view(flat_NS.shape)
        grad_NS[:, self.size :] = 0
        share_N = self._share()
        return grad_NS if share_N is None else grad_NS.mul_(share_N.unsqueeze(1))

    @property
    def _compiled(self) -> bool:
        return self.bag_N.device.type == "cpu"

    def _flat(self, dim: int) -> Tensor:
        """Of each slot, the number of the dense embeddings' element that it belongs to."""
        return self.positions_NS.long().add_((self.bag_N * dim).unsqueeze(1))

    def _share(self) -> Tensor | None:
        return None if self.share_X is None else self.share_X.index_select(0, self.bag_N)

    def _each_part(self, loop: Callable[..., None], *arrays: Any) -> None:
        """Run `loop` over all lookups, by as many threads as torch has; no bag is in two parts."""
        bag_N, positions_NS = self.bag_N.numpy(), self.positions_NS.numpy()
        share_X = _NO_SHARE if self.share_X is None else self.share_X.numpy()
        threads = min(torch.get_num_threads(), len(bag_N) // _PART)

        def run(start: int, stop: int) -> None:
            loop(start, stop, self.size, positions_NS, bag_N, share_X, *arrays)

        if threads <= 1:
            run(0, len(bag_N))
            return
        cuts = [0, *(_bag_end(bag_N, len(bag_N) * i // threads) for i in range(1, threads)), len(bag_N)]
        for done in _pool(threads).map(run, cuts[:-1], cuts[1:]):
            assert done is None


def rows_of(table_RS: Tensor, index_N: Tensor) -> Tensor:
    """`index_select` of rows that are a multiple of 4 bytes, several times as fast."""
    if table_RS.device.type != "cpu":
        return table_RS.index_select(0, index_N)
    found_NS = table_RS.new_empty(len(index_N), table_RS.shape[1])
    size = table_RS.shape[1] * table_RS.element_size()
    word = torch.int32 if size % 8 else torch.int64
    _rows(table_RS.view(word).numpy(), index_N.numpy(), found_NS.view(word).numpy())
    return found_NS


_NO_SHARE = np.empty(0, dtype=np.float32)


def split(row_N: Tensor, place_R: Tensor, ends_G: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Per group of places, which end at `ends_G`: the places within it of the lookups that are its, and which they are.

    For the CPU. Lookups keep their order.
    """
    place, ends = place_R.numpy(), np.array(ends_G, dtype=np.int64)
    group_N = np.empty(row_N.numel(), dtype=np.uint8)
    count_G = np.zeros(len(ends), dtype=np.int64)
    place_N = np.empty(row_N.numel(), dtype=np.int64)
    _find(row_N.numpy(), place, ends, place_N, group_N, count_G)
    starts_G = np.cumsum(count_G) - count_G
    index_N, chosen_N = np.empty_like(place_N), np.empty_like(place_N)
    _sort(place_N, group_N, ends, starts_G.copy(), index_N, chosen_N)
    counts = count_G.tolist()
    return list(zip(torch.from_numpy(index_N).split(counts), torch.from_numpy(chosen_N).split(counts), strict=True))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sparse-tables")


def _bag_end(bag_N: NDArray[np.int64], place: int) -> int:
    """The first place from `place` on at which another bag begins."""
    while place < len(bag_N) and bag_N[place] == bag_N[place - 1]:
        place += 1
    return place


# Unsigned numbers spare the loops a look whether an index is negative.


@njit(cache=True, nogil=True)
def _rows(table_RW, index_N, found_NW):
    if table_RW.shape[1] == 1:
        for n in range(len(index_N)):
            found_NW[n, 0] = table_RW[np.uint64(index_N[n]), 0]
        return
    for n in range(len(index_N)):
        row = np.uint64(index_N[n])
        for w in range(table_RW.shape[1]):
            found_NW[n, w] = table_RW[row, w]


@njit(cache=True, nogil=True)
def _add(start, stop, size, positions_NS, bag_N, share_X, value_NS, dense_XD):
    shares = len(share_X) > 0
    for n in range(np.uint64(start), np.uint64(stop)):
        bag = np.uint64(bag_N[n])
        share = share_X[bag] if shares else np.float32(1)
        for s in range(np.uint64(size)):
            dense_XD[bag, positions_NS[n, s]] += value_NS[n, s] * share


@njit(cache=True, nogil=True)
def _gradients(start, stop, size, positions_NS, bag_N, share_X, grad_XD, grad_NS):
    shares = len(share_X) > 0
    for n in range(np.uint64(start), np.uint64(stop)):
        bag = np.uint64(bag_N[n])
        share = share_X[bag] if shares else np.float32(1)
        for s in range(np.uint64(size)):
            grad_NS[n, s] = grad_XD[bag, positions_NS[n, s]] * share
        for s in range(np.uint64(size), np.uint64(grad_NS.shape[1])):
            grad_NS[n, s] = 0


@njit(cache=True, nogil=True)
def _find(row_N, place_R, ends_G, place_N, group_N, count_G):
    """Of each lookup, its place and group; of each group, how many are its."""
    for n in range(len(row_N)):
        place, group = place_R[row_N[n]], 0
        while place >= ends_G[group]:
            group += 1
        place_N[n], group_N[n] = place, group
        count_G[group] += 1


@njit(cache=True, nogil=True)
def _sort(place_N, group_N, ends_G, next_G, index_N, chosen_N):
    """Lookups by group; `next_G` is where each group begins."""
    for n in range(len(place_N)):
        group = group_N[n]
        at = next_G[group]
        next_G[group] += 1
        index_N[at] = place_N[n] - (ends_G[group - 1] if group else 0)
        chosen_N[at] = n


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
