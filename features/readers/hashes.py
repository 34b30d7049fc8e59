"""Random numbers as hashes: of (what they decide, an id), so that nothing else that is drawn can move them."""

import hashlib
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]


def key_of(seed: int, *what: str) -> int:
    """64 bits that name one stream of random numbers."""
    return int.from_bytes(hashlib.blake2b(repr((seed, what)).encode(), digest_size=8).digest(), "little")


def _hash(key: int, ids: Ints) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood, 2014) started at `key`: its output number `ids`."""
    bits = np.uint64(key) + ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def uniform(key: int, ids: Ints) -> Floats:
    """In [0, 1), a multiple of 2^-53."""
    return (_hash(key, ids) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(key: int, ids: Ints) -> Floats:
    """Standard normal, by Box and Muller from the two halves of one hash."""
    bits = _hash(key, ids)
    radius: Floats = np.sqrt(-2 * np.log(((bits >> np.uint64(32)) + 0.5) * 2.0**-32))
    cosine: Floats = np.cos((bits & np.uint64(0xFFFFFFFF)) * (2 * np.pi * 2.0**-32))
    return radius * cosine


def sigmoid(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))


def flat_popularity(draw: Floats, count: int | Ints) -> Ints:
    """Popularity falls with the square root of the id."""
    return (count * draw**2).astype(np.int64)


def zipf_popularity(draw: Floats, count: int | Ints) -> Ints:
    """Popularity falls with the id (Zipf's law)."""
    return np.minimum(np.exp(draw * np.log(count + 1)).astype(np.int64), count) - 1
