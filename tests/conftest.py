"""For all tests: nothing here need outlive a power cut, and MLflow's databases are begun quickly."""

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

for threads in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(threads, "1")  # before torch and Polars are imported: the workers share the cores


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Of this process alone: the children that tests kill do wait."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_databases() -> Iterator[None]:
    """MLflow migrates an empty database for seconds: the first one's tables are kept and copied into the others."""
    if "mlflow" not in sys.modules:  # none of the tests asked for needs it
        yield
        return
    from mlflow.store.db import utils
    from mlflow.store.model_registry import sqlalchemy_store
    from sqlalchemy import Engine, event

    migrate = utils._initialize_tables
    kept = sqlite3.connect(":memory:", check_same_thread=False)

    def initialize(engine: Any) -> None:
        fresh = engine.dialect.name == "sqlite" and utils._is_empty_database(engine)
        known = kept.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not (fresh and known):
            migrate(engine)
        if fresh:
            with closing(sqlite3.connect(engine.url.database)) as database:
                kept.backup(database) if known else database.backup(kept)

    def connected(connection: Any, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", connected)
    with pytest.MonkeyPatch.context() as patched, closing(kept):
        for module in (utils, sqlalchemy_store):
            patched.setattr(module, "_initialize_tables", initialize)
        yield
    event.remove(Engine, "connect", connected)
