"""Databases that must not be shared, folders that cannot be published to, and what doctor says of both."""

import os
import re
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from base import storage
from base.config import load_config
from base.errors import ConfigError, RegistryError, SetupError
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
    ("postgresql://a@db.host/both", "postgresql+psycopg2://b:y@db.host:5432/both?sslmode=require"),
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


@pytest.mark.parametrize("uri", ["postgresql://a:S3cret@db/both", "postgresql://a:S3cret@db:port/both?password=S3cret"])
def test_a_password_is_not_repeated(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", uri)
    with pytest.raises(ConfigError, match=r"mlflow\.uri is Airflow's own database") as caught:
        refuse_shared(run_with("mlflow.uri=$OURS"), [uri])
    assert "S3cret" not in str(caught.value)


@pytest.mark.parametrize("password", ["a@S3cret", "a@b:S3cret", "S3cret:port@"])
def test_no_part_of_a_password_is_taken_for_a_host_and_told(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", f"postgresql+psycopg2://u:{password}@127.0.0.1:1/db")
    with pytest.raises(ConfigError, match="more than one @") as caught:
        registry_of(run_with("mlflow.uri=$OURS"))
    assert "S3cret" not in str(caught.value)


# What cannot be opened is told at once


@pytest.mark.parametrize(
    ("uri", "driver"),
    [("postgresql://h/x", "psycopg"), ("mysql://h/x", "MySQLdb"), ("mysql+pymysql://h/x", "pymysql")],
)
def test_a_driver_that_is_missing(uri: str, driver: str) -> None:
    if find_spec(driver):
        pytest.skip(f"{driver} is installed")
    with pytest.raises(
        RegistryError, match=f"'{re.escape(uri)}': the driver '{driver}' is not installed; install it, or"
    ):
        registry_of(run_with(f'mlflow.uri="{uri}"'))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("postgresql+none://h/x", r"no driver can open this \(Can't load plugin: .*postgresql\.none\)"),
        ("postgresql+psycopg2://h:port/x", r"no driver can open this \(invalid literal .* 'port'\)"),
        ("sqlite:////proc/none/x.db", "/proc/none cannot be made; name another folder"),
    ],
)
def test_an_address_that_opens_nothing(uri: str, said: str) -> None:
    with pytest.raises(RegistryError, match=rf"mlflow\.uri = '{re.escape(uri)}': {said}"):
        registry_of(run_with(f'mlflow.uri="{uri}"'))


def test_a_database_that_is_down_is_told_soon_and_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg2", reason="the package psycopg2-binary is not installed; run `make setup`")
    monkeypatch.setenv("OURS", "postgresql+psycopg2://u:S3cret@127.0.0.1:9/x?password=S3cret")
    started = time.monotonic()
    with pytest.raises(
        RegistryError, match=r"^MLflow's database at \S+://…@127\.0\.0\.1:9/x\?password=… says: "
    ) as caught:
        registry_of(run_with("mlflow.uri=$OURS"))
    assert time.monotonic() - started < 10
    assert str(caught.value).endswith("Connection refused; check mlflow.uri and that the database runs")


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
@pytest.mark.filterwarnings("ignore:Query string argument")  # SQLite knows no password
def test_doctor_repeats_no_password(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", f"{database}?password=S3cret")
    said = diagnose("mlflow.uri=$OURS", 'output="out"', status=0)
    assert f"ok  MLflow at {database}?password=… answers" in said


@pytest.mark.usefixtures("findings")
def test_doctor_finds_what_is_wrong(elsewhere: Path) -> None:
    (elsewhere / "file").write_text("")
    said = diagnose('output="file/out"', f'mlflow.uri="sqlite:///{elsewhere}/airflow/airflow.db"', status=1)
    assert "BAD file/out: publishing does not work there: Not a directory" in said
    assert "BAD mlflow.uri is Airflow's own database" in said
    assert "BAD" in diagnose('output="s3://bucket/runs"', status=1)
    said = diagnose('output="file/out"', 'mlflow.uri="http://127.0.0.1:1"', status=1)  # whose lock would lie there
    assert "BAD file/out: publishing does not work there: Not a directory" in said
    assert "move away the file that is in the way" in said
