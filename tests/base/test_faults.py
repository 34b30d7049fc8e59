"""Fault points: silent unless asked, and then exactly at the passage that was named."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from base import faults
from base.faults import ENVIRONMENT_VARIABLE, faultpoint


@pytest.fixture(autouse=True)
def _from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_passages", 0)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_nothing_happens_unless_asked() -> None:
    for _ in range(3):
        faultpoint("a")


def test_the_named_point_fails_at_the_named_passage_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "a:enospc:2")
    faultpoint("a")
    faultpoint("b")
    with pytest.raises(OSError, match="No space left on device") as caught:
        faultpoint("a")
    assert caught.value.errno == errno.ENOSPC
    faultpoint("a")


def test_a_star_counts_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "*:raise:3")
    faultpoint("a")
    faultpoint("b")
    with pytest.raises(RuntimeError, match="fault injected at c"):
        faultpoint("c")


def test_the_first_passage_is_meant_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "a:raise")
    with pytest.raises(RuntimeError, match="fault injected at a"):
        faultpoint("a")


def test_killed_means_killed() -> None:
    code = "from base.faults import faultpoint\ntry: faultpoint('a')\nfinally: print('cleaned up')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={ENVIRONMENT_VARIABLE: "a:kill"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")
