"""Stopping a deployment leaves no process, whatever it did to get away. Servers that start for real: tests/dags."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from base.errors import SetupError
from pipelines.deployment import Deployment, _living

REPO = Path(__file__).resolve().parents[2]

# Ignores TERM, and has an orphan in a session of its own that does, too; both have said so when `ready` is there.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, "-m", "stubborn", "orphan"], start_new_session=True, stderr=subprocess.DEVNULL)
    if os.fork():
        time.sleep(600)
else:
    open("ready", "w").close()
time.sleep(600)
"""

OWNER = """
import sys, time
from pathlib import Path
from pipelines.deployment import Deployment

class Small(Deployment):
    def _start(self):
        self._run("stubborn", "stubborn")

    def stop(self, *, seconds=1):
        super().stop(seconds=seconds)

folder = Path(sys.argv[1])
with Small(folder / "run", config="run.toml", home=folder, environment={"PYTHONPATH": str(folder)}) as deployment:
    while not (folder / "ready").exists():
        time.sleep(0.05)
    print("up", flush=True)
    if sys.argv[2] == "raise":
        raise ValueError("on purpose")
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    return tmp_path


def owner(folder: Path, how: str) -> subprocess.Popen[str]:
    """A process that holds a deployment open; it has started when this returns."""
    (folder / "ready").unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", OWNER, str(folder), how]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    return process


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, None])
def test_nothing_is_left(folder: Path, ending: signal.Signals | None) -> None:
    process = owner(folder, "wait" if ending else "raise")
    if ending:
        assert len(_living(folder / "run")) == 3
        process.send_signal(ending)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert ("on purpose" in errors) == (ending is None)
    assert _living(folder / "run") == []


def test_the_next_start_stops_what_a_killed_owner_left(folder: Path) -> None:
    process = owner(folder, "wait")
    process.kill()
    process.communicate()
    left = _living(folder / "run")
    assert len(left) == 3
    second = owner(folder, "wait")
    assert not set(left) & set(_living(folder / "run"))
    second.terminate()
    second.communicate(timeout=60)
    assert until(lambda: _living(folder / "run") == [])


def test_a_component_that_ends_while_starting_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = Deployment(folder / "run", config="run.toml", home=folder, environment={"PYTHONPATH": str(folder)})

    def start() -> None:
        deployment._run("scheduler", "no_such_module")
        deployment._until(lambda: False, "airflow", 30)

    monkeypatch.setattr(deployment, "_start", start)
    with pytest.raises(SetupError, match=r"scheduler: ended with exit status 1 while starting; see .*scheduler.log"):
        deployment.__enter__()
    assert _living(folder / "run") == []
