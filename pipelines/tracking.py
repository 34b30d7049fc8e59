"""The MLflow of a run, which must not share a database with Airflow."""

import os
from collections.abc import Callable
from configparser import ConfigParser
from contextlib import AbstractContextManager
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from base.errors import ConfigError, RegistryError
from base.storage import MANIFEST, exclusive
from pipelines.config import Run
from recsys.bundle import Bundle
from recsys.registry import ModelRegistry

AIRFLOW_DATABASE = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"
MLFLOW_DATABASE = "MLFLOW_BACKEND_STORE_URI"


def registry_of(run: Run) -> ModelRegistry:
    """The run's MLflow. Raises RegistryError if it does not answer, ConfigError if the environment gives it Airflow's
    database."""
    refuse_shared(run, [uri for uri in [os.environ.get(AIRFLOW_DATABASE)] if uri])
    # Two at once would both make a new database's tables, and the experiment.
    with exclusive(_locks(run), lambda _: None):
        return ModelRegistry(
            run.tracking_uri,
            experiment=run.mlflow.experiment,
            name=run.mlflow.model,
            reference_above_mb=run.mlflow.reference_above_mb,
        )


def registry_alone(run: Run, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Registering, promotion and rollback of one model name exclude each other; who comes later waits, and says so.

    The lock lies beside an SQLite database, or else in the output folder: whoever shares neither is not kept out, and
    is the reason why each looks at the champion again before it moves.
    """
    return exclusive(_locks(run) / run.mlflow.model, say)


def _locks(run: Run) -> Path:
    kind, file, *_ = (*_database(run.tracking_uri), "")
    folder = (Path(file).parent if kind == "sqlite" else run.output) / "registry"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # where even root makes no folder
        raise RegistryError(
            f"mlflow.uri = {run.mlflow.uri!r}: {error.filename} cannot be made; name another folder"
        ) from None
    return folder


def model_of(run: Run, model: str) -> tuple[Bundle, str, str | None]:
    """A bundle by alias, version number or folder; what to call it, and its MLflow run unless it is a folder's.

    Raises RegistryError or ArtefactError if it is not there. A folder needs no MLflow.
    """
    if (Path(model) / MANIFEST).is_file():
        bundle = Bundle.load(Path(model))
        return bundle, f"bundle-{bundle.version}", None
    registry = registry_of(run)
    registered = registry.find(model)
    return registry.bundle_of(registered), registered.version, registered.run_id


def refuse_shared(run: Run, airflow: list[str]) -> None:
    """Raise ConfigError if MLflow keeps its tables in one of Airflow's databases: each would migrate the other's."""
    theirs = {_database(uri) for uri in airflow}
    for setting, uri in (("mlflow.uri", run.tracking_uri), (MLFLOW_DATABASE, os.environ.get(MLFLOW_DATABASE, ""))):
        if uri and _database(uri) in theirs:
            raise ConfigError(
                f"{setting} is Airflow's own database, {'/'.join(map(str, _database(uri)))}; MLflow needs one of its "
                "own: create it, or leave mlflow.uri out for a file in the output folder"
            )


def airflow_databases() -> list[str]:
    """What this machine's Airflow uses: the environment's, or else what airflow.cfg or its default says."""
    if uri := os.environ.get(AIRFLOW_DATABASE):
        return [uri]
    home = Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser()
    settings = ConfigParser(interpolation=None, strict=False)
    settings.read(os.environ.get("AIRFLOW_CONFIG", home / "airflow.cfg"))
    return [settings.get("database", "sql_alchemy_conn", fallback="") or f"sqlite:///{home / 'airflow.db'}"]


def _database(uri: str) -> tuple[str, ...]:
    """What identifies a database: no driver, user, password or option."""
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        return (uri,)
    kind = url.get_backend_name()
    if kind == "sqlite":
        return (kind, str(Path(url.database or "").resolve()))
    kind = "postgresql" if kind == "postgres" else kind
    host = (url.host or "localhost").lower()
    local = "localhost" if host in ("127.0.0.1", "::1") else host
    return (kind, local, str(url.port or _PORTS.get(kind, "")), url.database or "")


_PORTS = {"postgresql": 5432, "mysql": 3306}
