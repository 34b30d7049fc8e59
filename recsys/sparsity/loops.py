"""The compiled loops of sparse tables.

All in one file, because numba takes what it has compiled before to be up to date as long as the loop's own file is.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Shape suffixes: N = lookups, K = rows whose mask moves or rows kept, S = slots of a row, D = embedding dimension,
# G = groups, R = rows, X = bags, H = slots of the hash table.

UNIT = np.uint64(4)
"""Slots that a row's are a multiple of."""
_AHEAD = 32
"""Lookups that memory is asked for before their turn comes: rows stand anywhere, and each would be waited for."""
_BAGS_AHEAD = 4
"""Bags that it is asked for."""
_WIDE_AHEAD = 16
"""Lookups whose whole width it is asked for."""
_FLOAT = np.uint64(4)
"""Bytes of a weight."""
_LINE = np.uint64(64)
"""Bytes of a line of the cache."""


# Memory by its address: arrays of unequal shape are not to be had, and to ask for memory is by address anyway.


@intrinsic
def _prefetch(_: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, number(0), number(3), number(1)])  # to read, to keep, data
        return context.get_dummy_value()

    return types.void(types.uint64), code


def _read(kind: Any, found: Any) -> Any:
    @intrinsic
    def read(_: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(builder.inttoptr(arguments[0], kind.as_pointer()))

        return found(types.uint64), code

    return read


_float_at, _byte_at = _read(ir.FloatType(), types.float32), _read(ir.IntType(8), types.uint8)


@njit(cache=True, nogil=True)
def _ask(address, size):
    """Have the first and the last of `size` bytes come to the cache. An address that is nobody's does no harm."""
    _prefetch(address)  # pyright: ignore[reportCallIssue]
    _prefetch(address + size - np.uint64(1))  # pyright: ignore[reportCallIssue]


@njit(cache=True, nogil=True)
def _ask_all(address, size):
    """All of them."""
    for line in range(address & ~(_LINE - np.uint64(1)), address + size, _LINE):
        _prefetch(line)  # pyright: ignore[reportCallIssue]


# Unsigned numbers spare the loops a look whether an index is negative.


@njit(cache=True, nogil=True)
def _bag(x, batch, tables):
    """Where in the dense embeddings a bag of the lookups is."""
    return np.uint64(x if tables == 1 else x % batch * tables + x // batch)


@njit(cache=True, nogil=True)
def add(
    first,
    last,
    ends_X,
    tables,
    mean,
    row_N,
    place_R,
    starts_G,
    slots_G,
    values_G,
    positions_G,
    group_N,
    index_N,
    count_G,
    dense_XD,
):
    """Each bag's rows, added up from where they stand, whose groups and places in them are kept; see `Compiled`.

    A row's line of memory is asked for some lookups before its turn, and where it is to be found yet earlier.
    """
    batch, dim, dense = len(ends_X) // tables, np.uint64(dense_XD.shape[1]), np.uint64(dense_XD.ctypes.data)
    n = ends_X[first - 1] if first else 0
    stop = ends_X[last - 1] if last else 0
    placed, asked, ready = len(place_R) > 0, n, n
    for x in range(first, last):
        bag, end = _bag(x, batch, tables), ends_X[x]
        _ask_all(dense + _bag(x + _BAGS_AHEAD, batch, tables) * dim * _FLOAT, dim * _FLOAT)
        share = np.float32(1) / np.float32(end - n) if mean and end > n else np.float32(1)
        for d in range(dim):
            dense_XD[bag, d] = 0
        while n < end:
            if placed:
                while asked < min(n + 2 * _AHEAD, stop):
                    _ask(np.uint64(place_R.ctypes.data) + np.uint64(row_N[asked]) * _FLOAT, _FLOAT)
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
                _ask(values_G[group] + np.uint64(place) * slots * _FLOAT, slots * _FLOAT)
                _ask(positions_G[group] + np.uint64(place) * slots, slots)
                ready += 1
            group = group_N[n]
            slot = np.uint64(index_N[n]) * np.uint64(slots_G[group])
            value, position = values_G[group] + slot * _FLOAT, positions_G[group] + slot
            for s in range(np.uint64(0), np.uint64(slots_G[group]), UNIT):  # what only fills up the row is 0
                for i in range(UNIT):
                    dense_XD[bag, np.uint64(_byte_at(position + s + i))] += _float_at(value + (s + i) * _FLOAT) * share
            n += 1


@njit(cache=True, nogil=True)
def gradients(
    first,
    last,
    ends_X,
    tables,
    mean,
    group_N,
    index_N,
    sizes_G,
    slots_G,
    positions_G,
    grad_XD,
    before_G,
    out_G,
    at_G,
    found_N,
    grad,
):
    """The reverse: of each lookup the place in its group, and its weights' gradients, in the order of the lookups.

    A group's begin at `before_G` and, in floats, `out_G`; `at_G` have been there before.
    """
    batch, dim, dense = len(ends_X) // tables, np.uint64(grad_XD.shape[1]), np.uint64(grad_XD.ctypes.data)
    n = ends_X[first - 1] if first else 0
    stop = ends_X[last - 1] if last else 0
    for x in range(first, last):
        bag, end = _bag(x, batch, tables), ends_X[x]
        _ask_all(dense + _bag(x + _BAGS_AHEAD, batch, tables) * dim * _FLOAT, dim * _FLOAT)
        share = np.float32(1) / np.float32(end - n) if mean and end > n else np.float32(1)
        while n < end:
            if n + _AHEAD < stop:
                group = group_N[n + _AHEAD]
                slots = np.uint64(slots_G[group])
                _ask(positions_G[group] + np.uint64(index_N[n + _AHEAD]) * slots, slots)
            group = group_N[n]
            size, slots = np.uint64(sizes_G[group]), np.uint64(slots_G[group])
            position = positions_G[group] + np.uint64(index_N[n]) * slots
            at = at_G[group]
            at_G[group] += 1
            found_N[before_G[group] + at] = index_N[n]
            out = np.uint64(out_G[group]) + np.uint64(at) * slots
            for s in range(np.uint64(0), slots, UNIT):
                for i in range(UNIT):
                    grad[out + s + i] = grad_XD[bag, np.uint64(_byte_at(position + s + i))] * share
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


@njit(cache=True, nogil=True)
def _slot(row, rows_K, slots_H):
    """Where in the hash table the row's place is, or belongs: linear probing from a multiplicative hash."""
    slot = _first_slot(row, slots_H)
    while slots_H[slot] >= 0 and rows_K[slots_H[slot]] != row:
        slot = (slot + np.uint64(1)) & np.uint64(len(slots_H) - 1)
    return slot


@njit(cache=True, nogil=True)
def _first_slot(row, slots_H):
    return ((np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & np.uint64(len(slots_H) - 1)


@njit(cache=True, nogil=True)
def index(rows_K, count, slots_H):
    for place in range(count):
        slots_H[_slot(rows_K[place], rows_K, slots_H)] = place


@njit(cache=True, nogil=True)
def find(row_N, rows_K, count, slots_H, place_N):
    """The places of lookups, new rows at the end, until there is no room: how far it came, and rows."""
    slots, rows = np.uint64(slots_H.ctypes.data), np.uint64(rows_K.ctypes.data)
    for n in range(len(row_N)):
        if n + 2 * _AHEAD < len(row_N):
            _ask(slots + _first_slot(row_N[n + 2 * _AHEAD], slots_H) * np.uint64(4), np.uint64(4))
            place = slots_H[_first_slot(row_N[n + _AHEAD], slots_H)]
            _ask(rows + np.uint64(max(place, 0)) * np.uint64(8), np.uint64(8))
        slot = _slot(row_N[n], rows_K, slots_H)
        if slots_H[slot] < 0:
            if count == len(rows_K):
                return n, count
            rows_K[count], slots_H[slot] = row_N[n], count
            count += 1
        place_N[n] = slots_H[slot]
    return len(row_N), count


@njit(cache=True, nogil=True)
def sum_up(place_N, bag_N, weight_N, grad_XD, sums_KD):
    size = np.uint64(grad_XD.shape[1]) * _FLOAT
    grads, sums = np.uint64(grad_XD.ctypes.data), np.uint64(sums_KD.ctypes.data)
    for n in range(len(place_N)):
        if n + _WIDE_AHEAD < len(place_N):
            _ask_all(sums + np.uint64(place_N[n + _WIDE_AHEAD]) * size, size)
            _ask_all(grads + np.uint64(bag_N[n + _WIDE_AHEAD]) * size, size)
        place, bag = np.uint64(place_N[n]), np.uint64(bag_N[n])
        weight = weight_N[n] if len(weight_N) else np.float32(1)
        for d in range(np.uint64(grad_XD.shape[1])):
            sums_KD[place, d] += grad_XD[bag, d] * weight
