"""How the processor computes: denormal numbers are 0 inside, and as before outside."""

import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch

from features.pipeline import FeaturePipeline
from features.transforms import Vocabulary
from recsys.bundle import Bundle
from recsys.device import denormals_flushed, flushes_denormals
from recsys.models import build_model
from recsys.models.lr import LR, LRConfig


@pytest.mark.parametrize("before", [False, True])
def test_denormals_are_flushed_inside_and_as_before_outside(before: bool) -> None:
    torch.set_flush_denormal(before)
    try:
        with denormals_flushed():
            assert flushes_denormals()
            assert torch.tensor([1e-38]).mul(0.1).item() == 0
        assert flushes_denormals() == before
        assert (np.float32(1e-38) * np.float32(0.1) == 0) == before
    finally:
        torch.set_flush_denormal(False)


def test_a_bundle_flushes_while_it_computes_and_leaves_its_host_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pl.DataFrame({"user": ["a", "b", "c"]})
    fitted = FeaturePipeline((Vocabulary(column="user"),)).fit(raw.lazy())
    schema = fitted.schema((), ("click",))
    bundle = Bundle(build_model(LRConfig(), schema), LRConfig(), fitted, schema, {}, {}, raw.clear())
    inside: list[bool] = []
    forward = LR.forward

    def watched(self: LR, batch: object) -> torch.Tensor:
        inside.append(flushes_denormals())
        return forward(self, batch)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(LR, "forward", watched)
    for _ in bundle.predict(raw.lazy(), batch_size=1):
        assert not flushes_denormals()
    assert inside == [True] * 3


THREADS = """
import torch
from recsys.device import denormals_flushed
def flushed():
    return ((torch.full((2**22,), 1e-38) * 0.01) == 0).double().mean().item()
with denormals_flushed(own_process={own}):
    inside = flushed()
print(inside, flushed())
"""


@pytest.mark.parametrize("own", [True, False])
def test_threads_flush_in_our_own_processes_and_never_in_a_host(own: bool) -> None:
    """Where torch has no thread yet: those that start inside keep the setting."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    code = [sys.executable, "-W", "ignore", "-c", THREADS.format(own=own)]
    said = subprocess.run(code, env=environment, capture_output=True, text=True, check=True).stdout.split()
    inside, after = map(float, said[-2:])
    assert inside == 1 if own else after == 0
