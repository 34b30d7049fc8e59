"""deployment: a real MLflow server and a real Airflow on this machine, loopback only, gone without trace afterwards."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlencode

from base.errors import SetupError

DAGS = Path(__file__).resolve().parents[1] / "dags"
DAG_IDS = ("features", "training", "full_retrain", "scoring", "backfill")
RETRIEVAL_DAG_IDS = ("retrieval", "retrieval_full_retrain")
"""Those that there are with RECSYS_RETRIEVAL_CONFIG."""
MARK = "RECSYS_DEPLOYMENT"
"""Every process of a deployment is started with this variable."""
T = TypeVar("T")
FINISHED = ("success", "failed")
NEVER = "2100-01-01"
"""As the schedule's first day: runs are only started through REST."""


class Airflow:
    """Airflow's REST interface, as far as it is needed. Its methods raise SetupError if a request is refused."""

    def __init__(self, url: str, dag_ids: tuple[str, ...] = DAG_IDS) -> None:
        """`dag_ids`: those that it shall know."""
        self.url = url
        self.dag_ids = dag_ids
        self._token: str | None = None

    def unpause(self, *dag_ids: str) -> None:
        for dag_id in dag_ids:
            self._call("PATCH", f"/api/v2/dags/{dag_id}", {"is_paused": False})

    def pause(self, *dag_ids: str) -> None:
        for dag_id in dag_ids:
            self._call("PATCH", f"/api/v2/dags/{dag_id}", {"is_paused": True})

    def trigger(self, dag_id: str, partition_key: str | None, conf: Mapping[str, Any] | None = None) -> str:
        """Start a run of one partition. Returns the run's id."""
        body = {"logical_date": None, "partition_key": partition_key, "conf": dict(conf or {})}
        return self._call("POST", f"/api/v2/dags/{dag_id}/dagRuns", body)["dag_run_id"]

    def backfill(self, dag_id: str, first: str, last: str, *, at_once: int = 1) -> int:
        """Airflow's own backfill of the partitions of `first` to `last`, both included. Returns its id."""
        body = {
            "dag_id": dag_id,
            "from_date": f"{first}T00:00:00Z",
            "to_date": f"{last}T00:00:00Z",
            "max_active_runs": at_once,
        }
        return self._call("POST", "/api/v2/backfills", body)["id"]

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """All runs, in the order they were queued: dag_run_id, partition_key, state, run_type and more."""
        found = self._call("GET", f"/api/v2/dags/{dag_id}/dagRuns?{urlencode({'limit': 100})}")["dag_runs"]
        return sorted(found, key=lambda run: run["queued_at"] or "")

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        return self._call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}")

    def wait(self, dag_id: str, run_id: str, *, seconds: float = 600) -> str:
        """The state of a run once it is over: success or failed. Raises SetupError if it takes longer."""
        return _wait(
            lambda: state if (state := self.run(dag_id, run_id)["state"]) in FINISHED else None,
            seconds,
            f"{dag_id}, run {run_id}: is not over",
        )

    def run_of(self, dag_id: str, partition_key: str, *, seconds: float = 600) -> str:
        """The id of the newest run of a partition, as an asset starts it, once there is one."""

        def newest() -> str | None:
            found = [r["dag_run_id"] for r in self.runs(dag_id) if r["partition_key"] == partition_key]
            return found[-1] if found else None

        return _wait(newest, seconds, f"{dag_id}: no run of partition {partition_key!r}")

    def tasks(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """All task instances of a run: task_id, map_index, state, try_number, start_date, end_date and more."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}/taskInstances?limit=1000"
        return self._call("GET", path)["task_instances"]

    def states(self, dag_id: str, run_id: str) -> dict[str, str | None]:
        """The state of each task, those of a mapped one as `count[0]`."""
        return {
            t["task_id"] if t["map_index"] < 0 else f"{t['task_id']}[{t['map_index']}]": t["state"]
            for t in self.tasks(dag_id, run_id)
        }

    def clear(self, dag_id: str, run_id: str, *, only_failed: bool = True) -> None:
        """Have a run's tasks done again: the failed ones, or all."""
        body = {"dag_run_id": run_id, "only_failed": only_failed, "dry_run": False}
        self._call("POST", f"/api/v2/dags/{dag_id}/clearTaskInstances", body)

    def log(self, dag_id: str, run_id: str, task_id: str, *, attempt: int = 1, map_index: int = -1) -> str:
        """What one attempt of a task wrote."""
        run, at = quote(run_id, safe=""), urlencode({"map_index": map_index, "full_content": "true"})
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run}/taskInstances/{task_id}/logs/{attempt}?{at}"
        return json.dumps(self._call("GET", path))

    def is_ready(self) -> bool:
        """Whether every component is alive and every DAG can be started. Raises SetupError if one cannot be read.

        The first request to the interface that tasks use blocks the server for seconds: it is made here, not by a task.
        """
        try:
            health = self._call("GET", "/api/v2/monitor/health")
            if any(health[part]["status"] != "healthy" for part in ("scheduler", "triggerer", "dag_processor")):
                return False
            known = {d["dag_id"] for d in self._call("GET", "/api/v2/dags?exclude_stale=true")["dags"]}
            errors = self._call("GET", "/api/v2/importErrors")["import_errors"]
        except SetupError:
            return False
        if errors:
            raise SetupError(f"{errors[0]['filename']}: cannot be read: {errors[0]['stack_trace'].splitlines()[-1]}")
        return known >= set(self.dag_ids) and _answers(f"{self.url}/execution/health", seconds=120)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        if self._token is None and path.startswith("/api/"):
            self._token = self._call("GET", "/auth/token")["access_token"]
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with _request(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise SetupError(f"{method} {self.url}{path}: refused with status {error.code}: {text[:500]}") from None
        except (OSError, ValueError) as error:
            raise SetupError(f"{method} {self.url}{path}: no answer ({error}); see Airflow's logs") from None


class Deployment:
    """MLflow and Airflow with their own databases below `folder`, on free loopback ports, while the `with` block lasts.

    Started: `mlflow server` and the four components of `airflow standalone`, as those can be told to open no port for
    logs, which would not be loopback's. Ctrl-C, SIGTERM and exceptions stop them too; what a killed owner left of the
    same folder is stopped by the next start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: str,
        retrieval_config: str | None = None,
        home: Path | None = None,
        start: str = NEVER,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`config` is the run file, relative to `home` (by default the working directory); `start`: RECSYS_START.

        `retrieval_config` is that of a two-tower model, if there shall be one.
        `environment` is added to that of every component, and so of every task.
        """
        self.folder = folder.absolute()
        self.home = (home or Path.cwd()).absolute()
        self.mlflow_port, airflow_port = _free_ports(2)
        self.mlflow_uri = f"http://127.0.0.1:{self.mlflow_port}"
        dag_ids = DAG_IDS if retrieval_config is None else DAG_IDS + RETRIEVAL_DAG_IDS
        self.airflow = Airflow(f"http://127.0.0.1:{airflow_port}", dag_ids)
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "RECSYS_", "MLFLOW"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            MARK: str(self.folder),
            "RECSYS_HOME": str(self.home),
            "RECSYS_CONFIG": config,
            **({} if retrieval_config is None else {"RECSYS_RETRIEVAL_CONFIG": retrieval_config}),
            "RECSYS_START": start,
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            **_airflow_settings(self.folder / "airflow", airflow_port),
            **(environment or {}),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._before: Any = None

    def __enter__(self) -> Self:
        if _living(self.folder):
            self.stop()
        for name in ("mlflow/artefacts", "airflow", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        try:
            self._before = signal.signal(signal.SIGTERM, _exit)
        except ValueError:  # not the main thread
            self._before = None
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            if self._before is not None:
                signal.signal(signal.SIGTERM, self._before)

    def run_mlflow(self) -> None:
        """Start the MLflow server and wait until it answers; after `stop_mlflow` on the same port."""
        self._run("mlflow", "mlflow", *_mlflow_command(self.folder / "mlflow", self.mlflow_port))
        self._until(lambda: _answers(f"{self.mlflow_uri}/health"), "mlflow")

    def stop_mlflow(self, *, seconds: float = 10) -> None:
        """Stop the MLflow server alone, as an outage would."""
        process = self._processes.pop("mlflow")
        self._end(lambda: [p for p in _living(self.folder) if _session(p) == process.pid], seconds)
        process.wait()

    def stop(self, *, seconds: float = 20) -> None:
        """Stop every process of this folder: TERM, and KILL to those that are still there after `seconds`."""
        self._end(lambda: _living(self.folder), seconds)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def _start(self) -> None:
        self._run("mlflow", "mlflow", *_mlflow_command(self.folder / "mlflow", self.mlflow_port))
        migrate = self._run("migrate", "airflow", "db", "migrate")
        if migrate.wait():
            raise SetupError(f"airflow db migrate: failed; see {self.folder / 'logs' / 'migrate.log'}")
        del self._processes["migrate"]
        self._run("scheduler", "airflow", "scheduler", "--skip-serve-logs")
        self._run("triggerer", "airflow", "triggerer", "--skip-serve-logs")
        self._run("dag-processor", "airflow", "dag-processor")
        self._run("api-server", "airflow", "api-server")
        self._until(self.airflow.is_ready, "airflow")
        self._until(lambda: _answers(f"{self.mlflow_uri}/health"), "mlflow")

    def _run(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self.home,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we stop them in order
            )
        return self._processes[name]

    def _until(self, ready: Callable[[], bool], what: str, seconds: float = 180) -> None:
        def up() -> bool:
            for name, process in self._processes.items():
                if process.poll() is not None:
                    log = self.folder / "logs" / f"{name}.log"
                    raise SetupError(f"{name}: ended with exit status {process.returncode} while starting; see {log}")
            return ready()

        _wait(lambda: up() or None, seconds, f"{what}: not up; see {self.folder / 'logs'}; it")

    def _end(self, living: Callable[[], Iterable[int]], seconds: float) -> None:
        for name, wait in ((signal.SIGTERM, seconds), (signal.SIGKILL, seconds)):
            end = time.monotonic() + wait
            asked: set[int] = set()
            while alive := set(living()):
                for pid in alive - asked:
                    _signal(pid, name)
                asked |= alive
                for process in self._processes.values():
                    process.poll()  # our own children would stay as zombies
                if time.monotonic() > end:
                    break
                time.sleep(0.2)


def _airflow_settings(home: Path, port: int) -> dict[str, str]:
    """Airflow on one machine: SQLite, loopback, no log-in, and intervals for a scheduler with little to do."""
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "2",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "600",
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


def _mlflow_command(folder: Path, port: int) -> list[str]:
    return [
        "server",
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", str(folder / "artefacts")),
    ]


_request = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # loopback: never by a proxy


def _answers(url: str, seconds: float = 5) -> bool:
    try:
        with _request(url, timeout=seconds) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait(found: Callable[[], T | None], seconds: float, what: str) -> T:
    end = time.monotonic() + seconds
    while (value := found()) is None:
        if time.monotonic() > end:
            raise SetupError(f"{what} after {seconds:.0f} s")
        time.sleep(0.25)
    return value


def _living(folder: Path) -> list[int]:
    """The processes of a deployment.

    Each carries the variable or writes to our logs, or is in the session of one that does: Airflow's components
    overwrite their environment with their title, its commands lead their own sessions, orphans have lost their parent.
    """
    pids = [
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid()
    ]
    mark = f"{MARK}={folder}".encode()
    sure = {pid for pid in pids if mark in _environ(pid) or _stderr(pid).parent == folder / "logs"}
    sessions = {_session(pid) for pid in sure} - {None, os.getsid(0)}
    return [pid for pid in pids if pid in sure or _session(pid) in sessions]


def _environ(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return []


def _stderr(pid: int) -> Path:
    try:
        return Path(os.readlink(f"/proc/{pid}/fd/2"))
    except OSError:
        return Path()


def _session(pid: int) -> int | None:
    try:
        return None if _is_zombie(pid) else os.getsid(pid)
    except OSError:
        return None


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _signal(pid: int, name: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, name)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
