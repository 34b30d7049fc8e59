"""Random numbers that follow from a counter alone, in whatever order and by however many processes they are drawn."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Shape suffixes: K = rows, D = embedding dimension, X = anything.


def mixed(counter_X: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 well-mixed bits of each counter: SplitMix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = counter_X * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normal_rows(rows_K: Tensor, dim: int, seed: int) -> Tensor:
    """Standard normal values_KD that follow from each row's number alone, however many rows there are."""
    cells_KD = rows_K.numpy().astype(np.uint64)[:, None] * np.uint64(dim) + np.arange(dim, dtype=np.uint64)
    first_KD, second_KD = (_uniform(cells_KD * np.uint64(2) + np.uint64(i), seed) for i in (0, 1))
    return torch.from_numpy(np.sqrt(-2 * np.log(first_KD)) * np.cos(2 * np.pi * second_KD))  # Box and Muller 1958


def _uniform(counter_X: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """In (0, 1]."""
    with np.errstate(over="ignore"):
        bits_X = mixed(counter_X + np.uint64(seed))
    return ((bits_X >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
