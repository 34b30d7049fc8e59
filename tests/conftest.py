"""For all tests: databases of MLflow that are begun quickly."""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def migrated_once() -> Iterator[None]:
    """MLflow migrates an empty database for seconds: the first one's tables are kept and copied into the others."""
    if "mlflow" not in sys.modules:  # none of the tests asked for needs it
        yield
        return
    from mlflow.store.db import utils
    from mlflow.store.model_registry import sqlalchemy_store

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

    with pytest.MonkeyPatch.context() as patched, closing(kept):
        for module in (utils, sqlalchemy_store):
            patched.setattr(module, "_initialize_tables", initialize)
        yield
