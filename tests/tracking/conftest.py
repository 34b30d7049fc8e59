"""Bundles that cost nothing to make, and MLflow: as a database, and as servers over HTTP."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pytest

import serving.pyfunc as served
from base import faults
from base.storage import resolve
from features.pipeline import FeaturePipeline
from features.transforms import Vocabulary
from recsys.bundle import Bundle, golden_rows
from recsys.models import build_model
from recsys.models.lr import LRConfig
from recsys.registry import ModelRegistry, Registered

ROWS = pl.DataFrame({"user": ["a", "b", "a", "c"], "click": [0, 1, 1, 0]})


@dataclass(frozen=True)
class Models:
    """Registers one bundle after another, each trained by a run of its own."""

    template: Bundle
    folder: Path
    code: Path = Path(served.__file__)

    def bundle(self, number: int) -> tuple[Bundle, Path]:
        """A bundle unlike those of other numbers, and where it is published."""
        target = self.folder / f"{number}" / "bundle"
        saved = replace(self.template, metrics={"number": number}).save(target, overwrite=True)
        return saved, resolve(target)

    def register(self, registry: ModelRegistry, number: int) -> Registered:
        """As `train` does it: the run of an earlier attempt goes on."""
        bundle, folder = self.bundle(number)
        with registry.run(registry.run_of_training(bundle.version), tags={"training": bundle.version}) as active:
            return registry.register(bundle, folder, self.code, active.info.run_id)


@pytest.fixture(scope="session")
def template() -> Bundle:
    fitted = FeaturePipeline((Vocabulary(column="user"),)).fit(ROWS.lazy())
    schema = fitted.schema((), ("click",))
    model = build_model(LRConfig(), schema)
    bundle = Bundle(model, LRConfig(), fitted, schema, settings={}, metrics={}, golden=ROWS.clear())
    return replace(bundle, golden=golden_rows(bundle, ROWS))


@pytest.fixture
def models(template: Bundle, tmp_path: Path) -> Models:
    return Models(template, tmp_path / "bundles")


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all: making it takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('database') / 'mlflow.db'}"


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Arms a fault point; empty for none."""

    def arm(plan: str) -> None:
        monkeypatch.setattr(faults, "_passages", 0)
        monkeypatch.setenv(faults.ENVIRONMENT_VARIABLE, plan)

    return arm


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A real `mlflow server` on a free loopback port, with its artifacts behind it."""

    def __init__(self, backend: str, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._command = [
            *(
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "mlflow",
                "server",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
            ),
            *("--backend-store-uri", backend, "--artifacts-destination", str(folder / "artifacts")),
        ]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers; does nothing if it runs."""
        if self._process:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(300):
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(1)
        raise TimeoutError(self._log.read_text()[-3000:])

    def kill(self) -> None:
        """At once, with all its workers; does nothing if it does not run."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@contextmanager
def postgres() -> Iterator[str]:
    """A throw-away cluster on loopback: the address of its empty database `mlflow`. Root runs it as `postgres`."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    if not found:
        pytest.skip("PostgreSQL is not installed; `make slow` installs Debian's package postgresql if root runs it")
    pytest.importorskip("psycopg2", reason="the package psycopg2-binary is not installed; run `make setup`")
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses root

    def run(program: str, *arguments: str) -> None:
        command = [str(found[0].resolve().with_name(program)), *arguments]
        groups = [] if user else None
        subprocess.run(command, user=user, group=user, extra_groups=groups, cwd="/", check=True, capture_output=True)

    with TemporaryDirectory() as folder:  # not pytest's, which only its owner may enter
        if user:
            shutil.chown(folder, user, user)
        data, port = f"{folder}/data", str(free_port())
        run("initdb", "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
        run("pg_ctl", "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "start")
        try:
            run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "mlflow", "mlflow")
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
        finally:
            run("pg_ctl", "-D", data, "-m", "fast", "-w", "stop")


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server over each kind of database. Tests kill and start it as they like."""
    folder = tmp_path_factory.mktemp(f"server-{request.param}")
    at = postgres() if request.param == "postgresql" else nullcontext(f"sqlite:///{folder / 'mlflow.db'}")
    with at as backend:
        server = Server(backend, folder)
        try:
            server.start()
            yield server
        finally:
            server.kill()
