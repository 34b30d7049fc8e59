"""How many weights each row of a sparse table has, and at which positions: numbers that follow from few settings.

Shapes: R rows of a table, K chosen rows, S slots of a row, D embedding dimension, T tables.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from base.errors import ConfigError

UNIT = 4
"""fbgemm's rows are multiples of four floats; weights move between rows by as many."""

WIDEST = 252
"""A position and a row's number of weights are bytes."""

_ONE = 2**32


def sizes_for(dim: int, *, unequal: bool) -> list[int]:
    """What a row may hold. Below a unit slots are padded; where rows may be unequal, some hold nothing instead."""
    units = range(UNIT, dim + 1, UNIT)
    return [0, *units] if unequal else sorted({s for s in (1, 2, 3, *units, dim) if s <= dim})


def check_density(density: float, dim: int, *, unequal: bool) -> None:
    """Raises ConfigError if rows of `dim` cannot be stored, or would hold less than one weight or more than fit."""
    if dim > WIDEST:
        raise ConfigError(f"model.dim: rows of {dim} weights; a sparse table's positions are bytes: at most {WIDEST}")
    most = dim // UNIT * UNIT
    if unequal and density * dim > most + 1e-9:
        remedy = f"use a density of at most {1000 * most // dim / 1000:g}, or" if most else "use wider ones, or"
        raise ConfigError(
            f"sparsity.density = {density:g}: where rows may be unequal they hold whole units of {UNIT} weights, and "
            f'those of {dim} at most {most}; {remedy} neither allocation = "popularity" nor schedule.redistribute'
        )
    if density * dim < 1 and not unequal:
        raise ConfigError(
            f"sparsity.density = {density:g}: a row of {dim} would hold {density * dim:.2g} weights; use at least "
            f"{-(-1000 // dim) / 1000:g}, or let rows be unequal (sparsity.schedule.redistribute)"
        )


def enough(dim: int) -> float:
    """A density of which every row may hold a unit of weights."""
    return -(-1000 * UNIT // dim) / 1000


def even_sizes(rows: int, dim: int, density: float, *, unequal: bool, first: int = 0) -> NDArray[np.uint8]:
    """sizes_R of the rows from number `first` on, all as near to density x dim as sizes come.

    A row's size follows from its number alone; the sum of the first R is density x R x D but for less than a unit.
    """
    low, high, share = _between(dim, density, unequal=unequal)
    number_R = np.arange(first, first + rows, dtype=np.int64)
    more_R = ((number_R + 1) * share) // _ONE - (number_R * share) // _ONE
    return (low + (high - low) * more_R).astype(np.uint8)


def even_total(rows: int, dim: int, density: float, *, unequal: bool) -> int:
    """The sum of `even_sizes`."""
    low, high, share = _between(dim, density, unequal=unequal)
    return low * rows + (high - low) * (rows * share // _ONE)


def _between(dim: int, density: float, *, unequal: bool) -> tuple[int, int, int]:
    """The sizes about density x dim, and the share of rows (of 2^32) that has the larger one."""
    sizes, wanted = sizes_for(dim, unequal=unequal), density * dim
    low = max(s for s in sizes if s <= wanted + 1e-9)
    high = min((s for s in sizes if s > low), default=low)
    # Rounded up, so that a whole number of larger rows, which floats may miss by a little, is not one less.
    return low, high, max(0, math.ceil(Fraction(wanted - low) / (high - low) * _ONE)) if high > low else 0


def er_densities(rows_T: Sequence[int], dim: int, density: float, *, unequal: bool = False) -> list[float]:
    """Per table, min(1, ε (1/D + 1/R)), with ε such that the tables' weights are `density` of all.

    Where rows may be unequal, a full one has the whole units that fit, which may be less than 1.
    """
    most = dim // UNIT * UNIT / dim if unequal else 1.0
    raw = np.array([1 / dim + 1 / rows for rows in rows_T])
    cells = np.array(rows_T, dtype=float) * dim
    full = np.zeros(len(rows_T), dtype=bool)
    while True:  # ends: a table that is full stays so
        left = density * cells.sum() - most * cells[full].sum()
        found = np.where(full, most, raw * left / max((raw * cells)[~full].sum(), 1e-30))
        if not (over := (found > most) & ~full).any():
            return found.tolist()
        full |= over


def popular_sizes(counts_R: ArrayLike, dim: int, total: int) -> NDArray[np.uint8]:
    """sizes_R near c √count, in whole units and at least one where `total` suffices; their sum is `total` exactly.

    Mixed dimensions (Ginart et al., ISIT 2021), with the exponent that their theory gives for little noise.
    `total` is a multiple of the unit.
    """
    root_R = np.sqrt(np.asarray(counts_R, dtype=np.float64))
    least = UNIT if total >= UNIT * root_R.size else 0
    budget, most = total // UNIT, dim // UNIT
    low, high = 0.0, dim * 1.0
    for _ in range(100):  # units_R rises with the factor
        factor = (low + high) / 2
        units_R = np.clip(np.floor(factor * root_R), least // UNIT, most)
        low, high = (factor, high) if units_R.sum() <= budget else (low, factor)
    units_R = np.clip(np.floor(low * root_R), least // UNIT, most).astype(np.int64)
    missing = budget - int(units_R.sum())
    order_R = np.argsort(-root_R, kind="stable")
    while missing > 0:
        room = order_R[units_R[order_R] < most][:missing]
        units_R[room] += 1
        missing -= len(room)
    return (units_R * UNIT).astype(np.uint8)


def random_positions(rows: int, size: int, dim: int, generator: torch.Generator) -> Tensor:
    """Ascending positions_KS: for each row a uniformly random subset of `size` of `dim` (Floyd's algorithm)."""
    chosen_KS = torch.full((rows, size), -1, dtype=torch.int16)
    for slot, most in enumerate(range(dim - size, dim)):
        drawn_K = torch.randint(0, most + 1, (rows,), generator=generator, dtype=torch.int16)
        taken_K = (chosen_KS == drawn_K[:, None]).any(1)
        chosen_KS[:, slot] = torch.where(taken_K, most, drawn_K)
    return chosen_KS.sort(1).values.to(torch.uint8)


def nested_positions(rows: int, size: int) -> Tensor:
    """positions_KS: the first `size`, in every row."""
    return torch.arange(size, dtype=torch.uint8).repeat(rows, 1)


def slots_of(size: int) -> int:
    """Stored width of a row with `size` active weights."""
    return -(-size // UNIT) * UNIT
