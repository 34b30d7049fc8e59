"""Databases that must not be shared, folders that cannot be published to, and what doctor says of both."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from base import storage
from base.config import load_config
from base.errors import ConfigError, SetupError
from base.storage import check_filesystem
from pipelines import cli, doctor
from pipelines.config import Run
from pipelines.tracking import AIRFLOW_DATABASE, MLFLOW_DATABASE, airflow_databases, refuse_shared, registry_of

DEMO = Path(__file__).parents[2] / "pipelines" / "runs" / "demo.toml"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory, and no Airflow."""
    for variable in (AIRFLOW_DATABASE, MLFLOW_DATABASE, "AIRFLOW_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_with(*settings: str) -> Run:
    return load_config(Run, DEMO, settings)


SAME = [
    ("postgresql://a:x@db.host/both", "postgresql+psycopg2://b:y@db.host:5432/both?sslmode=require"),
    ("postgresql://127.0.0.1/both", "postgresql+asyncpg://localhost:5432/both"),
    ("postgresql://DB.host/both", "postgres://db.host/both"),
    ("mysql+pymysql://h/both", "mysql+mysqldb://u@h:3306/both"),
    ("sqlite:///both.db", "sqlite:///{here}/both.db"),
    ("sqlite:///./x/../both.db", "sqlite+aiosqlite:///both.db"),
]
DIFFERENT = [
    ("postgresql://db/mlflow", "postgresql://db/airflow"),
    ("postgresql://db:5433/both", "postgresql://db/both"),
    ("postgresql://one/both", "postgresql://two/both"),
    ("http://127.0.0.1:5000", "postgresql://127.0.0.1:5000/both"),
    ("sqlite:///mlflow.db", "sqlite:///airflow.db"),
]


@pytest.mark.parametrize(("ours", "theirs"), SAME)
def test_airflows_database_is_refused(ours: str, theirs: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AIRFLOW_DATABASE, theirs.format(here=elsewhere))
    with pytest.raises(ConfigError, match=r"mlflow\.uri is Airflow's own database, .*both.*; MLflow needs one"):
        registry_of(run_with(f'mlflow.uri="{ours}"'))
    monkeypatch.setenv(MLFLOW_DATABASE, ours)  # what a server in this environment would use
    with pytest.raises(ConfigError, match=r"MLFLOW_BACKEND_STORE_URI is Airflow's own database"):
        registry_of(run_with('mlflow.uri="http://127.0.0.1:5000"'))


@pytest.mark.parametrize(("ours", "theirs"), DIFFERENT)
def test_databases_of_their_own_pass(ours: str, theirs: str) -> None:
    refuse_shared(run_with(f'mlflow.uri="{ours}"'), [theirs])


def test_a_password_is_not_repeated() -> None:
    uri = "postgresql://a:secret@db/both"
    with pytest.raises(ConfigError) as caught:
        refuse_shared(run_with(f'mlflow.uri="{uri}"'), [uri])
    assert "secret" not in str(caught.value)


def test_where_airflows_database_is_said(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = elsewhere / "airflow"
    assert airflow_databases() == [f"sqlite:///{home / 'airflow.db'}"]
    home.mkdir()
    (home / "airflow.cfg").write_text("[database]\nsql_alchemy_conn = postgresql://a:%b@db/both\n")
    assert airflow_databases() == ["postgresql://a:%b@db/both"]
    monkeypatch.setenv(AIRFLOW_DATABASE, "postgresql://db/other")
    assert airflow_databases() == ["postgresql://db/other"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('output="s3://bucket/runs"', "output: 's3://bucket/runs' is not on a filesystem: publishing needs atomic"),
        ('data.path="gs://bucket/logs"', "data.path = 'gs://bucket/logs': logs are read from a filesystem"),
    ],
)
def test_object_stores_are_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_with(setting)


# doctor


def test_a_folder_that_can_be_published_to_is_left_as_it_was(tmp_path: Path) -> None:
    check_filesystem(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("name", ["rename", "symlink", "replace", "fsync"])
def test_a_filesystem_without(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported", name)

    monkeypatch.setattr(os, name, refused)
    with pytest.raises(SetupError, match=rf"publishing does not work there: Operation not supported \({name}\)"):
        check_filesystem(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_filesystem_whose_locks_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.fcntl, "flock", lambda *_: None)
    with pytest.raises(SetupError, match="locks do not exclude each other; mount it with flock"):
        check_filesystem(tmp_path)


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the parts of the examination that import torch."""
    monkeypatch.setattr(doctor, "_kernels", lambda: doctor.Finding(True, "kernels"))
    monkeypatch.setattr(doctor, "_device", lambda _: doctor.Finding(True, "device"))


def diagnose(*settings: str, status: int) -> str:
    pairs: Sequence[str] = [part for s in settings for part in ("--set", s)]
    result = CliRunner().invoke(cli.main, ["doctor", "--config", str(DEMO), *pairs], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


@pytest.mark.usefixtures("findings")
def test_doctor_examines_a_run(elsewhere: Path) -> None:
    said = diagnose('output="out"', status=0)
    assert "ok  out: rename, links, locks and fsync work" in said
    assert "ok  MLflow and Airflow have databases of their own" in said
    assert "answers, the database itself (sqlite), without a server; no champion yet of 'ctr'" in said


@pytest.mark.usefixtures("findings")
def test_doctor_finds_what_is_wrong(elsewhere: Path) -> None:
    (elsewhere / "file").write_text("")
    said = diagnose('output="file/out"', f'mlflow.uri="sqlite:///{elsewhere}/airflow/airflow.db"', status=1)
    assert "BAD file/out: publishing does not work there: Not a directory" in said
    assert "BAD mlflow.uri is Airflow's own database" in said
    assert "BAD" in diagnose('output="s3://bucket/runs"', status=1)
