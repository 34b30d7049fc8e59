"""How a process of our own takes memory from the system. A host such as a notebook is left as it is."""

from ctypes import CDLL
from dataclasses import dataclass

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""
_NEVER = 2**31 - 1
_PAD = 2**28
_MAPPED = (2**30, 2**25)
"""The second is the most that glibc takes before 2.35."""


@dataclass(frozen=True)
class Malloc:
    """What glibc's malloc was told."""

    mapped_from: int
    """Bytes from which a block is mapped by itself, and its pages are given back as soon as it is freed."""


kept: Malloc | None = None
"""What this process has told malloc; None if nothing."""


def keep_memory() -> None:
    """Let freed memory stay with this process: by default each large tensor is mapped anew, page by page, every step.

    At the start of a process of our own. Nothing happens where the C library is not glibc, or refuses.
    """
    try:
        mallopt = CDLL(None).mallopt
        CDLL(None).gnu_get_libc_version  # noqa: B018  (others have a mallopt that does nothing)
    except (AttributeError, OSError, TypeError):
        return
    mapped = next((size for size in _MAPPED if mallopt(_MMAP_THRESHOLD, size)), None)
    if mapped is not None and mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_TOP_PAD, _PAD):
        global kept
        kept = Malloc(mapped)
