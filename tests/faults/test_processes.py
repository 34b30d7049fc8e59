"""Two processes through the command line: one killed ends both, the next run goes on; nothing outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from base.storage import verify, versions_of
from recsys import checkpoint
from recsys.bundle import Bundle
from recsys.tensors import load_tensors
from tests.faults.conftest import Answer, Platform

pytestmark = pytest.mark.slow


def command(platform: Platform, output: Path) -> list[str]:
    """`recsys train` on what the platform has prepared."""
    output.mkdir(exist_ok=True)
    for prepared in ("features", "examples"):
        if not (output / prepared).exists():
            (output / prepared).symlink_to(platform.run.output / prepared)
    settings = [f"output='{output}'", f"mlflow.uri='{platform.mlflow}'", "train.processes=2"]
    options = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "pipelines.cli", "train", "--config", str(platform.config), *options]


def call(platform: Platform, output: Path, fault: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(platform, output), env={**os.environ, "RECSYS_FAULT": fault}, capture_output=True, text=True
    )


def living(output: Path) -> list[str]:
    """Processes that train there."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text()
        except OSError:
            continue
        if f"{output}/" in words and "recsys.processes" in words:
            found.append(words.replace("\0", " "))
    return found


def test_one_killed_ends_both_and_the_next_run_goes_on(
    platform: Platform, uninterrupted: tuple[Path, Answer], tmp_path: Path
) -> None:
    """Checkpoints are every second step of twelve; the bundle is as close to that of one process as rounding allows."""
    output = tmp_path / "out"
    folder = output / "models/autoint/training"
    killed = call(platform, output, "trainer.step@1:kill:5")
    assert killed.returncode == 2
    assert killed.stderr.strip().splitlines()[-1] == (
        "error: process 1 of 2 was killed by SIGKILL (the system does so when memory runs out); "
        "run again: training goes on from its last checkpoint"
    )
    assert "Traceback" not in killed.stderr
    assert living(output) == []
    position = checkpoint.position_of(folder)
    assert position is not None
    assert position.step == 4

    full = call(platform, output, "storage.sealed:enospc:3")  # the first is the job's, of the caller, once more
    assert full.returncode == 2
    assert "No space left on device; nothing was published: free some space and run again" in full.stderr
    assert "Traceback" not in full.stderr

    done = call(platform, output)
    assert done.returncode == 0, done.stderr
    assert "autoint: epoch 2/2  step 12/12  loss" in done.stderr
    assert "registered ctr version" in done.stdout
    assert [p.name for p in (folder / ".versions").glob(".*")] == []
    for name in ("checkpoint", "best", "job"):
        for version in versions_of(folder / name):
            verify(version)
    position = checkpoint.position_of(folder)
    expected = checkpoint.position_of(uninterrupted[0])
    assert position is not None
    assert position.best is not None
    assert expected is not None
    assert expected.best is not None
    here = load_tensors(checkpoint.best_of(folder, position.best) / "weights")
    there = load_tensors(checkpoint.best_of(uninterrupted[0], expected.best) / "weights")
    assert here.keys() == there.keys()
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=1e-5, msg=name)
    bundle = Bundle.load(output / "models/autoint/bundle")
    assert bundle.settings["train"]["processes"] == 2
    assert bundle.metrics["best_epoch"] == expected.best_epoch

    again = call(platform, output, "trainer.step:kill:1")  # nothing is trained
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_its_parent(stop: signal.Signals, platform: Platform, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = ["--set", "train.epochs=100000", "--set", "train.patience=100000"]
    with subprocess.Popen(
        [*command(platform, output), *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as parent:
        while checkpoint.position_of(output / "models/autoint/training") is None:
            assert parent.poll() is None
            time.sleep(0.5)
        assert len(living(output)) == 3  # torchrun and its two
        parent.send_signal(stop)
    deadline = time.monotonic() + 20
    while living(output) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living(output) == []
