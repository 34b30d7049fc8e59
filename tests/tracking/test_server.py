"""The same over HTTP, against real servers on SQLite and PostgreSQL, which die at any moment."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from requests import ConnectionError, Session

from base.config import load_config
from base.errors import RegistryError
from base.faults import ENVIRONMENT_VARIABLE
from base.storage import is_published, resolve
from features.readers.synthetic import SyntheticConfig
from features.split import days_of
from pipelines import cli
from pipelines.config import Run
from pipelines.generate import generate
from pipelines.train import train
from recsys.registry import ModelRegistry
from recsys.trainer import Progress
from tests.tracking.conftest import Models, Server

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "pipelines" / "runs" / "demo.toml"
SETTINGS = [
    'data.split={train="2026-03-01..2026-03-02", valid="2026-03-03", test="2026-03-04"}',
    'model={name="lr"}',
    "train={batch_size=256, epochs=1, threads=1}",
]
DAY = "day=2026-03-04"


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    config = SyntheticConfig(rows_per_day=1000, users=500, items=200)
    generate(config, days_of("2026-03-01..2026-03-04"), folder, say=lambda _: None)
    return folder


@pytest.fixture
def settings(server: Server, logs: Path, tmp_path: Path, request: pytest.FixtureRequest) -> list[str]:
    """A run of this test alone, on a server that answers."""
    server.start()
    own = [f'output="{tmp_path / "out"}"', f'data.path="{logs}/day=*/*.parquet"', f'mlflow.uri="{server.uri}"']
    name = request.node.originalname
    return [*SETTINGS, *own, f'mlflow.model="{name}"', f'mlflow.experiment="{name}"']


def arguments(verb: str, settings: list[str], *others: str) -> list[str]:
    return [verb, "--config", str(DEMO), *(a for s in settings for a in ("--set", s)), *others]


def recsys(verb: str, settings: list[str], *others: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli.main, arguments(verb, settings, *others), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def promote(server: Server, settings: list[str]) -> None:
    """The gate judges over HTTP; its opinion of so small a model does not matter here."""
    CliRunner().invoke(cli.main, arguments("promote", settings), catch_exceptions=False)
    registry = registry_at(server, settings)
    challenger = registry.find("challenger")
    assert "gate" in MlflowClient(server.uri).get_model_version(registry.name, challenger.version).tags
    registry.promote(challenger)


def registry_at(server: Server, settings: list[str]) -> ModelRegistry:
    run = load_config(Run, DEMO, settings)
    return ModelRegistry(server.uri, experiment=run.mlflow.experiment, name=run.mlflow.model)


def scored_by(settings: list[str]) -> list[str]:
    folder = resolve(load_config(Run, DEMO, settings).scores_path(DAY))
    return pl.read_parquet(folder / "part-*.parquet")["model_version"].unique().to_list()


def test_trained_promoted_scored_and_rolled_back(server: Server, settings: list[str]) -> None:
    recsys("prepare", settings)
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.cli", *arguments("train", settings)]
    killed = subprocess.run(command, env={**os.environ, ENVIRONMENT_VARIABLE: "registry.created:kill"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert "version 1 as challenger" in recsys("train", settings)
    promote(server, settings)
    recsys("score", settings)
    assert scored_by(settings) == ["1"]

    other = [*settings, "train.seed=1"]
    assert "version 2 as challenger" in recsys("train", other)
    promote(server, other)
    recsys("score", settings, "--overwrite")
    assert scored_by(settings) == ["2"]

    assert "from version 2 back to version 1" in recsys("rollback", settings)
    recsys("score", settings, "--overwrite")
    assert scored_by(settings) == ["1"]
    assert "no champion before version 1" in recsys("rollback", settings, status=2)
    assert "champion is version 1" in recsys("doctor", settings)


def test_large_bundles_by_reference(server: Server, settings: list[str]) -> None:
    by_reference = [*settings, "mlflow.reference_above_mb=0.001"]
    recsys("prepare", settings)
    recsys("train", by_reference)
    run, registry = load_config(Run, DEMO, settings), registry_at(server, settings)
    assert registry.referenced() == {run.bundle_path.resolve()}
    promote(server, settings)
    recsys("score", settings)
    shutil.move(run.bundle_path.resolve(), run.output / "elsewhere")
    assert f"{run.bundle_path.resolve()}: the registered bundle" in recsys("score", settings, "--overwrite", status=2)


def test_mlflow_dies_while_a_model_is_trained(server: Server, settings: list[str]) -> None:
    recsys("prepare", settings)
    run = load_config(Run, DEMO, settings)

    def on_step(_: Progress) -> None:
        server.kill()

    with pytest.raises(RegistryError, match=rf"MLflow at {server.uri} does not answer"):
        train(run, on_step=on_step, say=lambda _: None)
    assert is_published(run.bundle_path)
    published = run.bundle_path.resolve()
    with pytest.raises(RegistryError, match="does not answer"):
        train(run, say=lambda _: None)

    server.start()
    steps: list[Progress] = []
    train(run, on_step=steps.append, say=lambda _: None)
    assert steps == []
    assert run.bundle_path.resolve() == published
    registry = registry_at(server, settings)
    registered = registry.find("challenger")
    assert registry.versions_of_run(registered.run_id) == [1]
    assert registry.bundle_of(registered).version == registered.bundle


@pytest.mark.parametrize("answered", [False, True], ids=["unsent", "unanswered"])
def test_mlflow_dies_at_every_request(
    server: Server, models: Models, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """From the n-th request of a registration on nothing is answered; then it is repeated."""
    server.start()
    send: Callable[..., Any] = Session.send
    for n in range(1, 100):
        registry = ModelRegistry(server.uri, experiment="requests", name=f"dies-{answered}-{n}")
        count = 0

        def dying(self: Session, *given: Any, fatal: int = n, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal and answered:
                send(self, *given, **more)
            if count >= fatal:
                raise ConnectionError("the server died")
            return send(self, *given, **more)

        bundle = 100 * (1 + answered) + n
        with monkeypatch.context() as patched:
            patched.setattr(Session, "send", dying)
            try:
                models.register(registry, bundle)
            except RegistryError as error:
                assert "does not answer" in str(error)  # noqa: PT017
        registered = models.register(registry, bundle)
        assert registry.versions_of_run(registered.run_id) == [1]
        assert registry.aliases() == {"challenger": "1"}
        assert registry.bundle_of(registered).version == registered.bundle
        if count < n:
            break
    assert 8 < n < 99


def test_artifacts_that_the_server_lost(server: Server, models: Models) -> None:
    server.start()
    registry = ModelRegistry(server.uri, experiment="lost", name="lost")
    registered = models.register(registry, 500)
    source = MlflowClient(server.uri).get_model_version_download_uri(registry.name, registered.version)
    shutil.rmtree(server.folder / "artifacts" / source.removeprefix("mlflow-artifacts:/"))
    with pytest.raises(RegistryError, match="version 1: its artifacts are gone; return to another version"):
        registry.bundle_of(registered)
