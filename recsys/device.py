"""Where tensors live: the only place that chooses a device."""

from typing import Literal

import torch

from base.errors import SetupError

CPU = torch.device("cpu")
DeviceName = Literal["auto", "cpu", "cuda"]


def pick_device(wanted: DeviceName) -> torch.device:
    """`auto` is CUDA where there is one. Raises SetupError if CUDA is asked for and not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SetupError("device = 'cuda': torch sees no CUDA device; use 'cpu', or see `recsys doctor`")
    return torch.device("cuda") if wanted != "cpu" and torch.cuda.is_available() else CPU
