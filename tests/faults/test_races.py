"""Two commands at once: one registry in the end that either of them could have left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from features.readers.synthetic import SyntheticConfig
from pipelines.generate import generate
from recsys.registry import ModelRegistry

pytestmark = pytest.mark.slow

PAIRS = 3
"""How often each race is run: of two trainings at once more than half ended wrongly before they had a lock."""


class Project:
    """A run file and its registry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        log = SyntheticConfig(rows_per_day=2000, users=300, items=100)
        generate(log, [log.start.replace(day=day) for day in (1, 2, 3)], folder / "log", overwrite=False)
        (folder / "run.toml").write_text(f"""
output = "{folder}/out"
features = [{{ kind = "vocabulary", column = "device" }}, {{ kind = "vocabulary", column = "category" }}]
model = {{ name = "lr" }}
train = {{ batch_size = 256, epochs = 1 }}
gate = {{ min_auc = 0.3, max_normalized_entropy = 2, calibration = [0.2, 5], suspicious_auc_gain = 1, max_psi = 100 }}
[data]
path = "{folder}/log/day=*/*.parquet"
key = ["impression_id"]
labels = ["click"]
time = "day"
split = {{ train = "2026-03-01", valid = "2026-03-02", test = "2026-03-03" }}
""")

    def start(self, verb: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipelines.cli", verb, "--config", str(self.folder / "run.toml"), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, verb: str, *options: str) -> tuple[int, str]:
        return ended(self.start(verb, *options))

    def both(self, *commands: tuple[str, ...]) -> list[tuple[int, str]]:
        return [ended(process) for process in [self.start(*command) for command in commands]]

    @property
    def registry(self) -> ModelRegistry:
        return ModelRegistry(f"sqlite:///{self.folder}/out/mlflow.db", experiment="ctr", name="ctr")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out + err


def seed(number: int) -> tuple[str, ...]:
    """Settings of a model of its own."""
    return ("--set", f"train.seed={number}", "--set", f'name="model-{number}"')


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("races"))
    assert project.run("prepare")[0] == 0
    return project


def test_two_trainings_of_one_run_file_register_one_version(project: Project) -> None:
    for pair in range(PAIRS):
        found = project.both(*[("train", *seed(pair))] * 2)
        assert [status for status, _ in found] == [0, 0], found
    client = MlflowClient(project.registry.uri, project.registry.uri)
    bundles = [v.tags["bundle"] for v in client.search_model_versions("name = 'ctr'")]
    assert len(bundles) == len(set(bundles)) == PAIRS


def test_two_promotions_at_once_judge_one_after_the_other(project: Project) -> None:
    for pair in range(PAIRS):
        ask = [("promote", *seed(n), "--version", str(n + 1)) for n in (pair, (pair + 1) % PAIRS)]
        found = project.both(*ask)
        assert [status for status, _ in found] == [0, 0], found
        records = [
            json.loads((project.folder / f"out/models/model-{n}/gate/test/verdict.json").read_bytes())
            for n in (pair, (pair + 1) % PAIRS)
        ]
        last = project.registry.find("champion").version
        first = next(r for r in records if r["candidate"] != last)
        assert next(r for r in records if r["candidate"] == last)["champion"] == first["candidate"]
        assert project.registry.aliases()["previous"] == first["candidate"]


def test_two_rollbacks_at_once_are_one_and_leave_a_way_back(project: Project) -> None:
    for pair in range(PAIRS):
        aliases = project.registry.aliases()
        found = project.both(("rollback",), ("rollback",))
        assert sorted(status for status, _ in found) == [0, 2], found
        assert project.registry.find("champion").version == aliases["previous"]
        assert not project.registry.find("champion").rolled_back
        other = next(str(n) for n in range(1, PAIRS + 1) if str(n) not in (aliases["previous"], aliases["champion"]))
        assert project.run("promote", *seed(pair), "--version", other)[0] == 0
        assert project.registry.aliases()["previous"] == aliases["previous"]
