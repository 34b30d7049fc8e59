"""The registry on a database: aliases, rollback, one version per run, and Bundles by reference."""

import os
import resource
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import mlflow
import polars as pl
import pytest
from mlflow.tracking import MlflowClient
from sqlalchemy import Engine, event

from base.errors import ArtefactError, RegistryError, SetupError
from recsys.registry import ModelRegistry
from tests.tracking.conftest import ROWS, Models

Arm = Callable[[str], None]


@pytest.fixture
def registry(database: str, request: pytest.FixtureRequest) -> ModelRegistry:
    """A registered model of this test alone."""
    return ModelRegistry(database, experiment=request.node.name, name=request.node.name.replace("/", "-"))


def client(registry: ModelRegistry) -> MlflowClient:
    return MlflowClient(registry.uri, registry.uri)


def versions(registry: ModelRegistry) -> list[str]:
    return [str(v.version) for v in client(registry).search_model_versions(f"name = '{registry.name}'")]


def test_a_promotion_remembers_the_champion_before(registry: ModelRegistry, models: Models) -> None:
    first, second = models.register(registry, 1), models.register(registry, 2)
    registry.promote(first)
    assert registry.aliases() == {"challenger": "2", "champion": "1"}
    registry.promote(second)
    assert registry.aliases() == {"challenger": "2", "champion": "2", "previous": "1"}
    registry.promote(second)
    assert registry.aliases()["previous"] == "1"


def test_a_promotion_that_was_cut_off_is_repeated(registry: ModelRegistry, models: Models, fault: Arm) -> None:
    first, second, third = (models.register(registry, n) for n in (1, 2, 3))
    registry.promote(first)
    registry.promote(second)
    fault("registry.previous:raise")
    with pytest.raises(RuntimeError):
        registry.promote(third)
    assert registry.champion() == second
    registry.promote(third)
    assert registry.aliases() == {"challenger": "3", "champion": "3", "previous": "2"}


def test_rollback_returns_once_and_marks_what_it_left(registry: ModelRegistry, models: Models) -> None:
    with pytest.raises(RegistryError, match="no champion before now"):
        registry.rollback()
    first, second = models.register(registry, 1), models.register(registry, 2)
    registry.promote(first)
    with pytest.raises(RegistryError, match="no champion before version 1, the champion; promote another"):
        registry.rollback()
    registry.promote(second)
    assert registry.rollback() == first
    assert registry.champion() == first
    assert registry.find("2").rolled_back[:3] == "202"
    with pytest.raises(RegistryError, match="no champion before version 1"):
        registry.rollback()
    assert registry.champion() == first


def test_a_repeated_promotion_does_not_undo_a_rollback(registry: ModelRegistry, models: Models) -> None:
    first, second = models.register(registry, 1), models.register(registry, 2)
    registry.promote(first)
    registry.promote(second)
    registry.rollback()
    with pytest.raises(RegistryError, match=r"version 2 was rolled back at 20.*ask for it by its number"):
        registry.promote(second)
    assert registry.champion() == first
    registry.promote(second, again=True)
    assert registry.champion() == second
    assert not registry.find("2").rolled_back
    assert registry.rollback() == first


@pytest.mark.parametrize("point", ["registry.marked", "registry.returned", "registry.forgotten"])
def test_a_rollback_that_was_cut_off_is_finished_and_not_done_twice(
    registry: ModelRegistry, models: Models, fault: Arm, point: str
) -> None:
    first, second, third = (models.register(registry, n) for n in (1, 2, 3))
    registry.promote(first)
    registry.promote(second)
    fault(f"{point}:raise")
    with pytest.raises(RuntimeError):
        registry.rollback()
    assert registry.find("champion").version == ("2" if point == "registry.marked" else "1")
    marked = registry.find("2").rolled_back
    assert registry.rollback() == first
    assert registry.find("2").rolled_back == marked
    assert registry.champion() == first
    assert registry.aliases() == {"challenger": "3", "champion": "1"}
    with pytest.raises(RegistryError, match="no champion before version 1, the champion"):
        registry.rollback()
    registry.promote(third)
    assert registry.aliases() == {"challenger": "3", "champion": "3", "previous": "1"}


def test_of_two_rollbacks_at_once_neither_marks_where_both_return_to(
    registry: ModelRegistry, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one ends between the first one's two looks at the registry, as from a machine that shares no lock."""
    first, second, third = (models.register(registry, n) for n in (1, 2, 3))
    registry.promote(first)
    registry.promote(second)
    look = ModelRegistry.aliases

    def slowly(self: ModelRegistry) -> dict[str, str]:
        found = look(self)
        monkeypatch.setattr(ModelRegistry, "aliases", look)
        assert registry.rollback() == first
        return found

    monkeypatch.setattr(ModelRegistry, "aliases", slowly)
    assert registry.rollback() == first
    assert not registry.find("1").rolled_back
    registry.promote(third)
    assert registry.rollback() == first


def test_a_promotion_that_was_cut_off_is_no_rollback_to_finish(
    registry: ModelRegistry, models: Models, fault: Arm
) -> None:
    first, second = models.register(registry, 1), models.register(registry, 2)
    registry.promote(first)
    fault("registry.previous:raise")
    with pytest.raises(RuntimeError):
        registry.promote(second)
    with pytest.raises(RegistryError, match="no champion before version 1, the champion"):
        registry.rollback()


def test_a_champion_that_moved_is_told(registry: ModelRegistry, models: Models) -> None:
    registry.require_champion(None, "nothing happened")
    registry.promote(models.register(registry, 1))
    registry.require_champion("1", "nothing happened")
    with pytest.raises(RegistryError, match="the champion moved from none to version 1 while it was judged"):
        registry.require_champion(None, "it was judged")


@pytest.mark.parametrize("point", ["registry.logged", "registry.created"])
def test_a_registration_that_was_cut_off_is_completed(
    registry: ModelRegistry, models: Models, fault: Arm, point: str
) -> None:
    fault(f"{point}:raise")
    with pytest.raises(RuntimeError):
        models.register(registry, 1)
    registered = models.register(registry, 1)
    assert versions(registry) == ["1"]
    assert registry.find("challenger") == registered
    assert registry.bundle_of(registered).version == registered.bundle
    assert len(client(registry).search_runs([registry.experiment])) == 1
    assert len(client(registry).search_logged_models([registry.experiment])) == 1
    assert models.register(registry, 1) == registered
    assert registry.versions_of_run(registered.run_id) == [1]


def test_a_twin_of_a_repeated_request_is_removed(registry: ModelRegistry, models: Models, fault: Arm) -> None:
    fault("registry.created:raise")
    with pytest.raises(RuntimeError):
        models.register(registry, 1)
    found = client(registry).get_model_version(registry.name, "1")
    mlflow.register_model(found.source, registry.name, tags=found.tags)
    assert versions(registry) == ["2", "1"]
    assert models.register(registry, 1).version == "1"
    assert versions(registry) == ["1"]


def test_a_run_registers_one_bundle(registry: ModelRegistry, models: Models) -> None:
    first = models.register(registry, 1)
    other, folder = models.bundle(2)
    with registry.run(first.run_id), pytest.raises(RegistryError, match=f"{first.run_id} has registered bundle"):
        registry.register(other, folder, models.code, first.run_id)
    assert registry.bundle_of(first).version == first.bundle


def test_a_rollback_that_was_cut_off_is_no_place_to_return_to(
    registry: ModelRegistry, models: Models, fault: Arm
) -> None:
    first, second, third = (models.register(registry, n) for n in (1, 2, 3))
    registry.promote(first)
    registry.promote(second)
    fault("registry.marked:raise")
    with pytest.raises(RuntimeError):
        registry.rollback()
    registry.promote(third)
    assert registry.rollback() == first


# What is not the model's fault


@pytest.fixture
def impatient() -> Iterator[None]:
    """Waits for a locked database are 20 s, which MLflow sets as often as it asks."""

    def shorten(_c: object, _u: object, statement: str, given: object, *_: object) -> tuple[str, object]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 50"), given

    event.listen(Engine, "before_cursor_execute", shorten, retval=True)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", shorten)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


@pytest.mark.usefixtures("impatient")
def test_a_database_that_is_locked(registry: ModelRegistry, models: Models) -> None:
    first = models.register(registry, 1)
    file = Path(registry.uri.removeprefix("sqlite:///"))
    said = f"^MLflow's database {file}: database is locked by another process; run again when that has ended, or let "
    for ask in (registry.aliases, lambda: registry.bundle_of(first), lambda: registry.promote(first)):
        with locked(file), pytest.raises(RegistryError, match=said):
            ask()
    registry.promote(first)


def test_a_database_that_is_locked_from_the_start(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with locked(file), pytest.raises(RegistryError, match=f"^MLflow's database {file}: database is locked by another"):
        ModelRegistry(f"sqlite:///{file}?timeout=0.05", experiment="any", name="any")


def test_a_database_that_cannot_be_written_to(registry: ModelRegistry) -> None:
    with limited_files(), pytest.raises(RegistryError, match=r"disk I/O error; see that its disk has space and can be"):
        ModelRegistry(registry.uri, experiment="another", name="another")


@contextmanager
def limited_files() -> Iterator[None]:
    """Files cannot grow beyond a kilobyte, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_temporary_folder_that_takes_nothing_is_no_reason_to_roll_back(
    registry: ModelRegistry, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = models.register(registry, 1)
    said = "MLflow copies models by way of the temporary folder: free some space there, or set TMPDIR to another folder"
    with limited_files(), pytest.raises(SetupError) as caught:
        registry.bundle_of(registered)
    assert str(caught.value).startswith(f"{tempfile.gettempdir()}: File too large; {said}")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    with pytest.raises(SetupError, match=f"^/dev/null: Not a directory; {said}"):
        registry.bundle_of(registered)
    with pytest.raises(SetupError, match=f"^/dev/null: Not a directory; {said}"):
        models.register(registry, 2)
    monkeypatch.undo()
    assert registry.bundle_of(registered).version == registered.bundle


# What is no longer there


def remove(registry: ModelRegistry, number: int) -> None:
    """As no client can: the aliases stay."""
    with sqlite3.connect(registry.uri.removeprefix("sqlite:///")) as database:
        where = f"name = '{registry.name}' AND version = {number}"
        database.execute(f"DELETE FROM model_version_tags WHERE {where}")
        database.execute(f"DELETE FROM model_versions WHERE {where}")


def test_a_champion_that_points_nowhere(registry: ModelRegistry, models: Models) -> None:
    first, second = models.register(registry, 1), models.register(registry, 2)
    registry.promote(second)
    remove(registry, 2)
    for ask in (registry.champion, lambda: registry.find("champion")):
        with pytest.raises(RegistryError, match="'champion' points to version 2, which is gone; remove the alias"):
            ask()
    third = models.register(registry, 3)
    registry.promote(first)
    registry.promote(third)
    remove(registry, int(third.version))
    with pytest.raises(RegistryError, match=f"points to version {third.version}, which is gone; run `recsys rollback`"):
        registry.champion()
    assert registry.rollback() == first
    assert registry.champion() == first


def test_a_champion_that_was_deleted(registry: ModelRegistry, models: Models) -> None:
    """MLflow takes the alias away with the version."""
    first, second = models.register(registry, 1), models.register(registry, 2)
    registry.promote(first)
    registry.promote(second)
    client(registry).delete_model_version(registry.name, "2")
    assert registry.champion() is None
    with pytest.raises(RegistryError, match="has no 'champion'; run `recsys promote` first, or `recsys rollback`"):
        registry.find("champion")
    assert registry.rollback() == first


def test_a_version_whose_artifacts_are_gone(registry: ModelRegistry, models: Models) -> None:
    registered = models.register(registry, 1)
    source = Path(client(registry).get_model_version_download_uri(registry.name, "1").removeprefix("file://"))
    for lost in (next(source.rglob("manifest.json")), source / "artifacts", source):
        lost.unlink() if lost.is_file() else shutil.rmtree(lost)
        with pytest.raises(RegistryError, match=r"version 1: its artifacts are gone; return to another version with"):
            registry.bundle_of(registered)


# By reference


@pytest.fixture
def small_limit(registry: ModelRegistry) -> ModelRegistry:
    registry.reference_above_mb = 0.001
    return registry


def test_a_large_bundle_is_registered_by_reference(small_limit: ModelRegistry, models: Models) -> None:
    registered = models.register(small_limit, 1)
    source = Path(client(small_limit).get_model_version_download_uri(small_limit.name, "1").removeprefix("file://"))
    assert [p.name for p in (source / "artifacts").iterdir()] == ["reference.json"]
    bundle, folder = models.bundle(1)
    assert small_limit.bundle_of(registered).version == bundle.version
    assert small_limit.referenced() == {folder}
    assert folder.parent.name == ".versions"
    served = mlflow.pyfunc.load_model(f"models:/{small_limit.name}/1")
    expected = pl.concat(bundle.predict(ROWS.lazy()))["p_click"]
    assert served.predict(ROWS.to_pandas())["p_click"].tolist() == pytest.approx(expected.to_list(), abs=1e-6)


def test_what_aliases_refer_to(small_limit: ModelRegistry, models: Models) -> None:
    assert small_limit.referenced() == set()
    registered = [models.register(small_limit, n) for n in (1, 2, 3, 4)]
    for version in registered[:3]:
        small_limit.promote(version)
    assert small_limit.referenced() == {models.bundle(n)[1] for n in (2, 3, 4)}
    remove(small_limit, 4)
    assert small_limit.referenced() == {models.bundle(n)[1] for n in (2, 3)}


def test_a_referenced_folder_that_moved_or_changed(small_limit: ModelRegistry, models: Models, tmp_path: Path) -> None:
    first, second = models.register(small_limit, 1), models.register(small_limit, 2)
    folders = [models.bundle(n)[1] for n in (1, 2)]
    os.rename(folders[0], tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match=rf"{folders[0]}: the registered bundle \w+ is not there"):
        small_limit.bundle_of(first)
    shutil.copytree(folders[1], folders[0])
    with pytest.raises(ArtefactError, match=rf"{folders[0]}/manifest.json: altered since it was published"):
        small_limit.bundle_of(first)
    (folders[1] / "settings.json").write_text("{ }")
    with pytest.raises(ArtefactError, match=rf"{folders[1]}/settings.json: differs from its checksum"):
        small_limit.bundle_of(second)
