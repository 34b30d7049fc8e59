"""Where tensors live, and how their processor computes: the only place that chooses a device."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import numpy as np
import torch

from base.errors import SetupError

CPU = torch.device("cpu")
DeviceName = Literal["auto", "cpu", "cuda"]


def pick_device(wanted: DeviceName) -> torch.device:
    """`auto` is CUDA where there is one. Raises SetupError if CUDA is asked for and not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SetupError("device = 'cuda': torch sees no CUDA device; use 'cpu', or see `recsys doctor`")
    return torch.device("cuda") if wanted != "cpu" and torch.cuda.is_available() else CPU


@contextmanager
def denormals_flushed(*, own_process: bool = False) -> Generator[None]:
    """Numbers too small for a normal float are 0 inside, on this thread alone.

    A processor may take a hundred times as long for one of them, and softmax's gradients are full of them. Threads
    inherit the setting when they start, and keep it for ever: in a process of our own (`own_process`) it stands before
    torch has any, and is all threads'; in a host they are started first, so that nothing is left behind.
    """
    if not own_process:
        _start_threads()
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # which would otherwise be asked for the first time inside, and warn
    before = flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@cache
def _start_threads() -> None:
    """Torch's threads, which begin with the first operation that is large enough to be shared among them."""
    torch.ones(2**20).neg()


def flushes_denormals() -> bool:
    """Whether this thread does so now; False on a processor that cannot."""
    return bool((torch.tensor([1e-40], dtype=torch.float32) * 1.0).eq(0).item())
