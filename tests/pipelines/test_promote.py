"""promote on a real registry: what moves the alias, what does not, and what is left to read afterwards."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from queue import Queue
from typing import Any

import mlflow
import polars as pl
import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

import serving.pyfunc as served
from base.config import parse_config
from base.errors import ConfigError, RegistryError
from base.storage import exclusive, read_manifest, resolve
from features.readers.synthetic import SyntheticConfig, day_frame
from pipelines import cli
from pipelines import promote as module
from pipelines.config import Run
from pipelines.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.promote import promote
from pipelines.report import report
from pipelines.rollback import rollback
from pipelines.tracking import registry_alone, registry_of
from pipelines.train import train
from recsys.bundle import Bundle, golden_rows
from recsys.calibration import Platt
from recsys.registry import ModelRegistry, Registered

ROWS = 2000
LENIENT = {"min_auc": 0.3, "max_normalized_entropy": 2.0, "calibration": [0.2, 5.0], "suspicious_auc": 0.98}
SUSPICIOUS = {**LENIENT, "suspicious_auc": 0.1}


def run_of(folder: Path, **gate: Any) -> Run:
    tree = {
        "output": folder / "out",
        "data": {
            "path": str(folder / "log/day=*/*.parquet"),
            "key": ["impression_id"],
            "labels": ["click"],
            "time": "day",
            "split": {"train": "2026-03-01", "valid": "2026-03-02", "test": "2026-03-03"},
        },
        "features": [{"kind": "vocabulary", "column": c} for c in ("device", "category", "placement")],
        "model": {"name": "lr"},
        "train": {"batch_size": 256, "epochs": 1},
        "evaluate": {"slices": ["device"], "user": "user_id"},
        "gate": {"min_slice_rows": 200, **LENIENT, **gate},
    }
    return parse_config(Run, tree, source="test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("promote")
    config = SyntheticConfig(rows_per_day=ROWS, users=300, items=100)
    for i in range(3):
        day = config.start + timedelta(days=i)
        (folder / f"log/day={day}").mkdir(parents=True)
        day_frame(config, day).drop("day").write_parquet(folder / f"log/day={day}/part.parquet")
    run = run_of(folder)
    prepare(run, say=lambda _: None)
    train(run, say=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Whose first version is the champion."""
    run = run_of(folder)
    assert promote(run).promoted
    return run


@pytest.fixture(scope="module")
def registry(run: Run) -> ModelRegistry:
    return registry_of(run)


@pytest.fixture(scope="module")
def challenge(run: Run, registry: ModelRegistry) -> Callable[[float, float], Registered]:
    """Registers the first model with its log-odds times a slope, plus an intercept, as the challenger."""
    raw = pl.read_parquet(run.output / "../log/day=2026-03-02/*.parquet")

    def register(slope: float, intercept: float) -> Registered:
        known = Bundle.load(run.bundle_path)
        bundle = replace(known, calibrators={"p_click": Platt(slope=slope, intercept=intercept)})
        target = run.output / f"variants/{slope}-{intercept}"
        bundle = replace(bundle, golden=golden_rows(bundle, raw.head(10))).save(target, overwrite=True)
        with registry.run(name="variant") as active:
            return registry.register(bundle, resolve(target), Path(served.__file__), active.info.run_id)

    return register


def tags_of(run: Run, version: str) -> dict[str, str]:
    return MlflowClient(run.tracking_uri, run.tracking_uri).get_model_version("ctr", version).tags


def champion_of(registry: ModelRegistry) -> str:
    champion = registry.champion()
    assert champion is not None
    return champion.version


def test_the_first_passes_by_its_limits_and_is_champion_ever_after(run: Run, registry: ModelRegistry) -> None:
    assert champion_of(registry) == "1"
    assert tags_of(run, "1")["gate"] == "passed"
    record = json.loads((resolve(run.gate_path("test")) / "verdict.json").read_bytes())
    assert (record["champion"], record["candidate"], record["evidence"]["comparisons"]) == (None, "1", [])
    before = resolve(run.gate_path("test"))
    again = promote(run, version="1")
    assert again.promoted
    assert [r.text for r in again.reasons] == ["version 1 is the champion already"]
    assert resolve(run.gate_path("test")) == before


def test_a_worse_model_is_refused_however_often_and_leaves_its_numbers(
    run: Run, registry: ModelRegistry, challenge: Callable[..., Registered]
) -> None:
    reversed_ranks = challenge(-1.0, -2.5)
    before = champion_of(registry)
    first = promote(run)
    assert first.decision == "refused"
    published = resolve(run.gate_path("test"))
    assert promote(run) == first
    assert promote(run, approve=True) == first  # what is refused cannot be approved
    assert resolve(run.gate_path("test")) == published  # the same bytes
    assert champion_of(registry) == before
    tags = tags_of(run, reversed_ranks.version)
    assert tags["gate"] == "refused"
    assert tags["gate.reasons"].startswith("refused: p_click: AUC")

    manifest = read_manifest(published)
    assert manifest.kind == "verdict"
    assert manifest.about["decision"] == "refused"
    assert set(manifest.files) == {"verdict.json", "comparisons.parquet", "differences.svg", "scores-p_click.svg"}
    table = pl.read_parquet(published / "comparisons.parquet")
    assert set(table["metric"]) == {
        "auc",
        "log_loss",
        "normalized_entropy",
        "calibration",
        "slice_auc",
        "slice_log_loss",
    }
    users = run.source.raw("day=2026-03-03").select(pl.col("user_id").n_unique()).collect().item()
    assert table["units"].unique().to_list() == [users]
    local = Path(mlflow.artifacts.download_artifacts(run_id=reversed_ranks.run_id, artifact_path="gate"))
    logged = local / f"version-{reversed_ranks.version}"
    assert all((logged / name).read_bytes() == (published / name).read_bytes() for name in manifest.files)


def test_what_is_too_good_waits_for_a_person(
    run: Run, folder: Path, registry: ModelRegistry, challenge: Callable[..., Registered]
) -> None:
    candidate = challenge(1.0, 0.001)
    wary = run_of(folder, **SUSPICIOUS)
    before = champion_of(registry)
    held = promote(wary)
    assert held.decision == "held"
    assert champion_of(registry) == before
    assert tags_of(run, candidate.version)["gate"] == "held"
    approved = promote(wary, version=candidate.version, approve=True)
    assert approved.promoted
    assert champion_of(registry) == candidate.version
    assert tags_of(run, candidate.version)["gate"] == "approved"
    assert json.loads((resolve(run.gate_path("test")) / "verdict.json").read_bytes())["approved"]
    assert promote(wary).promoted  # again: it is the champion already


def test_the_alias_moves_last_so_that_a_retry_finds_what_is_missing(
    run: Run, registry: ModelRegistry, challenge: Callable[..., Registered], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = challenge(1.0, 0.002)
    before = champion_of(registry)
    moved: list[str] = []
    move = ModelRegistry.promote
    monkeypatch.setattr(
        ModelRegistry, "promote", lambda self, r, again: (moved.append(r.version), move(self, r, again=again))
    )

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ModelRegistry, "tag", killed)
        with pytest.raises(KeyboardInterrupt):
            promote(run)
    assert champion_of(registry) == before
    for _ in range(3):
        assert promote(run).promoted
    assert moved == [candidate.version]
    assert champion_of(registry) == candidate.version


def test_a_champion_of_meanwhile_is_not_overwritten(
    run: Run, registry: ModelRegistry, challenge: Callable[..., Registered], monkeypatch: pytest.MonkeyPatch
) -> None:
    challenge(1.0, 0.003)
    judge = module.judge

    def slow(*arguments: Any) -> Any:
        registry.promote(registry.find("1"))
        return judge(*arguments)

    monkeypatch.setattr(module, "judge", slow)
    with pytest.raises(RegistryError, match=r"the champion moved from version \d to version 1 while version \d+ was"):
        promote(run)
    assert champion_of(registry) == "1"


def waiting(run: Run, verb: Callable[..., Any], meanwhile: Callable[[], Any]) -> Future[Any]:
    """A verb that is begun while another one is at work, which does something and leaves."""
    said: Queue[str] = Queue()
    alone = exclusive(run.training_lock, said.put) if verb is train else registry_alone(run, said.put)
    with ThreadPoolExecutor(1) as pool:
        with alone:
            begun = pool.submit(verb, run, say=said.put)
            assert said.get(timeout=60).startswith("waiting: another process works in")
            meanwhile()
        return begun


def test_a_rollback_that_waited_for_a_promotion_does_not_undo_it(
    run: Run, registry: ModelRegistry, challenge: Callable[..., Registered]
) -> None:
    candidate = challenge(1.0, 0.005)
    before = champion_of(registry)
    waited = waiting(run, rollback, lambda: registry.promote(candidate))
    told = f"the champion moved from version {before} to version {candidate.version} while this rollback waited; run it"
    with pytest.raises(RegistryError, match=told):
        waited.result()
    assert champion_of(registry) == candidate.version
    assert rollback(run).version == before


def test_a_promotion_that_waited_judges_against_the_champion_that_it_finds(
    run: Run, registry: ModelRegistry, challenge: Callable[..., Registered]
) -> None:
    first, second = challenge(1.0, 0.006), challenge(1.0, 0.007)
    waited = waiting(run, promote, lambda: registry.promote(first))
    assert waited.result().promoted
    assert champion_of(registry) == second.version
    record = json.loads((resolve(run.gate_path("test")) / "verdict.json").read_bytes())
    assert record["champion"] == first.version
    assert rollback(run).version == first.version


def test_a_training_that_waited_finds_it_finished(run: Run, registry: ModelRegistry) -> None:
    """Both by one run file: there is one version in the end, that of the one trained before."""
    versions = registry.versions_of_run(registry.find("1").run_id)
    waited = waiting(run, train, lambda: None)
    assert waited.result().history
    assert registry.versions_of_run(registry.find("1").run_id) == versions
    assert registry.find("challenger").version == "1"


def test_exit_statuses_tell_the_scheduler(run: Run, challenge: Callable[..., Registered], tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    tree = run.model_dump(mode="json")
    lines = ["output = " + json.dumps(tree["output"]), 'model = { name = "lr" }']
    lines += ['features = [{ kind = "vocabulary", column = "device" }]']
    lines += ["[data]", "path = " + json.dumps(tree["data"]["path"]), 'key = ["impression_id"]', 'labels = ["click"]']
    lines += ['time = "day"', 'split = { train = "2026-03-01", valid = "2026-03-02", test = "2026-03-03" }']
    lines += ["[gate]", "min_auc = 0.3", "max_normalized_entropy = 2", "calibration = [0.2, 5]"]
    config.write_text("\n".join(lines))

    def status(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.main, ["promote", "--config", str(config), *options], catch_exceptions=False)
        return result.exit_code, result.output.splitlines()[0]

    challenge(-1.0, -2.0)
    assert status() == (99, "refused")
    candidate = challenge(1.0, 0.004)
    wary = ("--set", "gate.suspicious_auc=0.1")
    assert status(*wary) == (98, "held")
    assert status("--version", candidate.version, "--approve", *wary) == (0, "promoted")
    assert status() == (0, "promoted")


def test_the_report_says_what_the_gate_said(run: Run, registry: ModelRegistry) -> None:
    """Of the run's own bundle, which is version 1, and of no other."""
    evaluate(run)
    assert "What the gate said" not in report(run).read_text()
    champion = champion_of(registry)
    verdict = promote(run, version="1")
    page = report(run).read_text()
    assert f"Version 1 against version {champion}: {verdict.decision}." in page
    assert "slice log loss" in page
    assert (resolve(run.report_path) / "plots/gate.svg").is_file()


def test_gates_of_an_output_that_the_model_does_not_give(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gate\.outputs: 'p_clik' is no output of lr; did you mean 'p_click'\?"):
        promote(run_of(folder, outputs={"p_clik": {"min_positives": 3}}))
