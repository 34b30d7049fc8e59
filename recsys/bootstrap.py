"""The paired bootstrap: both models are measured under the same random weights, so that what they share cancels.

Shapes: U units (users, or rows), D draws, K numbers.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 2**21
"""Weights held at a time."""


def weights(units: int, draws: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """How often each unit is drawn, in blocks of shape (some draws, U): independent Poisson counts of mean 1.

    They stand for drawing U units with replacement, need no second pass, and are the same for the same seed.
    """
    at_most_K = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(10)])
    # Inversion of 16 random bits: a tenth of the time that numpy's own Poisson numbers take.
    table = np.searchsorted(at_most_K, (np.arange(2**16) + 0.5) / 2**16).astype(np.uint8)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(units, 1))
    for start in range(0, draws, block):
        rows = [generator.integers(0, 2**16, units, dtype=np.uint16) for _ in range(min(block, draws - start))]
        yield table[np.stack(rows)]


def bounds(
    estimate_K: NDArray[np.float64], drawn_DK: NDArray[np.float64], confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends of intervals around K estimates that all hold together with this confidence.

    Each reaches equally many bootstrap standard errors to both sides, as many as the farthest of the K estimates is
    off in that share of the draws (Romano and Wolf 2005, Econometrica 73). Of one number alone that is the ordinary
    symmetric interval. A number that is undefined in more than 1 - confidence of the draws has no ends, and no part in
    the others' reach; nor has a draw in which a number is undefined.
    """
    off_DK: NDArray[Any] = np.abs(drawn_DK - estimate_K)
    known_DK = np.isfinite(off_DK)
    squares_K = np.where(known_DK, off_DK, 0.0) ** 2
    error_K = np.sqrt(squares_K.sum(axis=0) / np.maximum(known_DK.sum(axis=0), 1))
    has_ends_K = known_DK.mean(axis=0) >= confidence
    far_DK = np.where(known_DK & has_ends_K, off_DK / np.where(error_K > 0, error_K, 1), 0.0)
    reach = float(np.quantile(far_DK.max(axis=1), confidence, method="higher"))
    width_K = np.where(has_ends_K, reach * error_K, np.inf)
    return estimate_K - width_K, estimate_K + width_K
