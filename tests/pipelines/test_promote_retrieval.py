"""The gate over retrieval models: both rank the same raw items for the same users, each by features of its own."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from torch import Tensor

import serving.pyfunc as served
from base.errors import ConfigError
from base.storage import read_manifest, resolve
from features.source import REASON
from pipelines import cli
from pipelines.config import Run
from pipelines.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.promote import promote
from pipelines.report import report
from pipelines.tracking import registry_of
from pipelines.train import train
from recsys.bundle import Bundle, golden_rows
from recsys.registry import ModelRegistry, Registered
from recsys.retrieval import COUNT, ITEM, RELEVANT, USER
from tests.pipelines import test_retrieval
from tests.pipelines.test_retrieval import TWO_TOWER, quiet

VALID = "split=valid"
GATE = {"retrieval": {"min_slice_users": 25, "min_recall": "popularity"}}
ITEM_TABLE = "embed.tables.embedding_bags.item.weight"


def run_of(folder: Path, output: str = "out", **changes: Any) -> Run:
    return test_retrieval.run_of(folder, output, **{"gate": GATE, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("promote_retrieval")
    test_retrieval.log().write_parquet(folder / "log.parquet")
    test_retrieval.corpus().write_parquet(folder / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Whose first version is the champion."""
    run = run_of(folder)
    prepare(run, say=quiet)
    train(run, say=quiet)
    first = promote(run, partition=VALID)
    assert first.promoted, first
    return run


@pytest.fixture
def registry(run: Run) -> ModelRegistry:
    """With the first version as the champion."""
    registry = registry_of(run)
    if registry.champion() != registry.find("1"):
        registry.promote(registry.find("1"), again=True)
    return registry


@pytest.fixture
def challenge(run: Run, registry: ModelRegistry) -> Callable[[str, Callable[[Tensor], Tensor]], Registered]:
    """Registers the first model with the rows of its items' ids altered, as the challenger."""
    raw = run.source.checked(VALID).filter(pl.col(REASON).is_null())

    def register(name: str, alter: Callable[[Tensor], Tensor]) -> Registered:
        bundle = Bundle.load(run.bundle_path)
        weights = bundle.model.state_dict()
        weights[ITEM_TABLE] = alter(weights[ITEM_TABLE].clone())
        bundle.model.load_state_dict(weights)
        bundle = replace(bundle, settings={**bundle.settings, "name": name})
        rows = raw.select(bundle.inputs).head(10).collect()
        bundle = replace(bundle, golden=golden_rows(bundle, rows)).save(run.output / f"variants/{name}", overwrite=True)
        with registry.run(name=name) as active:
            return registry.register(
                bundle, resolve(run.output / f"variants/{name}"), Path(served.__file__), active.info.run_id
            )

    return register


def champion_of(registry: ModelRegistry) -> str:
    champion = registry.champion()
    assert champion is not None
    return champion.version


def tail_rows(run: Run) -> Tensor:
    """Ids of the items of the tail."""
    items = pl.read_parquet(resolve(run.ranking_path([VALID])) / "items.parquet")
    counts = items.filter(pl.col(COUNT) > 0).sort(COUNT, descending=True)
    return torch.from_numpy(counts[len(counts) // 2 :]["item"].cast(pl.Int64).to_numpy().copy())


def shuffled(table: Tensor) -> Tensor:
    """Every item has the vector of another, and long enough to matter."""
    return 20 * table[torch.randperm(len(table), generator=torch.Generator().manual_seed(1))]


def test_the_first_has_beaten_the_order_of_popularity(run: Run, registry: ModelRegistry, folder: Path) -> None:
    record = json.loads((resolve(run.gate_path(VALID)) / "verdict.json").read_bytes())
    if record["champion"] is None:
        least, too_good = record["evidence"]["limits"]
        assert least["metric"] == "recall@5"
        assert least["value"] == pytest.approx(evaluate(run, partition=VALID).row(0, named=True)["recall"])
        assert 0.05 < least["at_least"] < least["value"]
        assert too_good["at_most"] == 0.99
    high = run_of(folder, gate={"retrieval": {"min_recall": 0.9}})
    assert promote(high, partition=VALID, version="1").reasons[0].text == "version 1 is the champion already"


def test_an_equal_model_passes_and_a_worse_one_is_refused_by_exit_status(
    run: Run, registry: ModelRegistry, challenge: Callable[..., Registered], tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(toml(run.model_dump(mode="json", exclude_none=True)))
    assert tomllib.loads(config.read_text())["retrieval"]["user"] == "user"

    def status(*options: str) -> tuple[int, list[str]]:
        arguments = ["promote", "--config", str(config), "--partition", VALID, *options]
        result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
        return result.exit_code, result.output.splitlines()

    equal = challenge("equal", lambda table: table)
    code, said = status()
    assert (code, said[0]) == (0, "promoted"), said
    assert "better by +0.00000 [+0.00000, +0.00000]" in "\n".join(said)
    assert champion_of(registry) == equal.version

    worse = challenge("worse", shuffled)
    code, said = status()
    assert (code, said[0]) == (99, "refused")
    assert said[1].startswith("  refused: similarity: recall@5 0.")
    assert champion_of(registry) == equal.version
    tags = MlflowClient(run.tracking_uri, run.tracking_uri).get_model_version("ctr", worse.version).tags
    assert tags["gate"] == "refused"
    assert tags["gate.reasons"].startswith("refused: similarity: recall@5")
    published = read_manifest(resolve(run.gate_path(VALID)))
    assert set(published.files) == {"verdict.json", "comparisons.parquet", "differences.svg"}
    table = pl.read_parquet(resolve(run.gate_path(VALID)) / "comparisons.parquet")
    assert set(table["metric"]) == {"recall@5", "slice_recall@5"}
    assert {"all", "items = torso", "items = tail"} <= set(table["slice"])
    users = pl.read_parquet(resolve(run.ranking_path([VALID])) / "users.parquet")
    assert table["units"].unique().to_list() == [users.height]

    registry.promote(registry.find(worse.version))
    code, said = status("--version", "1")  # so much better is not believed at once
    assert (code, said[0]) == (98, "held")
    assert status("--version", "1", "--approve")[0] == 0
    assert champion_of(registry) == "1"


def toml(tree: dict[str, Any]) -> str:
    """A run file: inline, since JSON's arrays and texts are TOML's."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {inline(v)}" for k, v in value.items()) + "}"
        return "[" + ", ".join(map(inline, value)) + "]" if isinstance(value, list) else json.dumps(value)

    return "\n".join(f"{key} = {inline(value)}" for key, value in tree.items())


def test_a_tail_that_falls_refuses_though_the_whole_may_fall(
    run: Run, folder: Path, registry: ModelRegistry, challenge: Callable[..., Registered]
) -> None:
    places = tail_rows(run)

    def forget(table: Tensor) -> Tensor:
        table[places] = shuffled(table)[places]
        return table

    challenge("tail", forget)
    lenient = {"retrieval": {**GATE["retrieval"], "margins": {"recall": "100%"}}}
    verdict = promote(run_of(folder, gate=lenient), partition=VALID)
    refused = [r.text for r in verdict.reasons if r.ruling == "refuse"]
    assert any("slice recall@5 where items = tail" in text for text in refused), verdict
    assert not any("recall@5 0." in text for text in refused)  # of all items
    blind = {"retrieval": {**lenient["retrieval"], "min_slice_users": 5000}}
    assert promote(run_of(folder, gate=blind), partition=VALID).promoted


def test_models_of_other_features_rank_the_same_items_for_the_same_users(
    folder: Path, run: Run, registry: ModelRegistry
) -> None:
    """The champion's items are their ids, the candidate's their genres and prices; neither tells items as the other."""
    features = [{"kind": "vocabulary", "column": c} for c in ("group", "item")]
    features += [{"kind": "vocabulary", "column": "genres", "multi": True}, {"kind": "log", "column": "price"}]
    model = {**TWO_TOWER, "query": ["group"], "item": ["genres", "price"]}
    other = run_of(folder, "other", features=features, model=model)
    prepare(other, say=quiet)
    train(other, say=quiet)
    promote(other, partition=VALID)
    ours, theirs = (resolve(other.ranking_path([VALID], of_champion=c)) for c in (False, True))
    for file, columns in (("items.parquet", [ITEM]), ("users.parquet", [USER, RELEVANT])):
        both = [pl.read_parquet(ranking / file) for ranking in (ours, theirs)]
        assert both[0].select(columns).equals(both[1].select(columns))
        assert both[0].columns != both[1].columns
    record = json.loads((resolve(other.gate_path(VALID)) / "verdict.json").read_bytes())
    whole = record["evidence"]["comparisons"][0]
    champion = evaluate(run, partition=VALID).row(0, named=True)
    candidate = evaluate(other, partition=VALID).row(0, named=True)
    assert (whole["champion"], whole["candidate"]) == pytest.approx((champion["recall"], candidate["recall"]))
    assert whole["champion"] != whole["candidate"]


def test_the_report_says_what_the_gate_said(
    run: Run, registry: ModelRegistry, challenge: Callable[..., Registered]
) -> None:
    registry.promote(challenge("another", lambda table: table))
    against = champion_of(registry)
    evaluate(run, partition=VALID)
    verdict = promote(run, version="1", partition=VALID)
    text = report(run, partition=VALID).read_text()
    assert f"Version 1 against version {against}: {verdict.decision}." in text
    assert "slice recall@5" in text
    assert (resolve(run.report_path) / "plots/gate.svg").is_file()


def test_a_champion_that_ranks_nothing_is_named(folder: Path, run: Run, registry: ModelRegistry) -> None:
    # A log of positives alone teaches no classifier; one row of the other class in each part is enough here.
    labels = {"liked": "CASE WHEN item = 'i03' OR item = 'i07' THEN 0 ELSE 1 END"}
    lr = run_of(folder, "lr", model={"name": "lr"}, retrieval=None, train={"epochs": 1}, gate={}, data__labels=labels)
    prepare(lr, say=quiet)
    train(lr, say=quiet)
    version = registry.find("challenger")
    registry.promote(version)
    found = promote(run, version="1", partition=VALID)
    assert found.decision == "refused"
    assert found.reasons[0].text == (
        "the champion is of model 'lr', which ranks no items; give this model an mlflow.model of its own"
    )
    registry.promote(registry.find("1"), again=True)
    with pytest.raises(ConfigError, match="the version is of model 'lr', which ranks no items"):
        promote(run, version=version.version, partition=VALID)
    found = promote(lr, version=version.version, partition=VALID)
    assert found.decision == "refused"
    texts = [r.text for r in found.reasons if r.ruling == "refuse"]
    sentence = "the champion is of model 'two_tower', which gives no probabilities; give this model an mlflow.model of"
    assert f"{sentence} its own" in texts
    assert not any("similarity" in text for text in texts)


def test_gates_of_outputs_and_of_other_models_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gate\.outputs speaks of probabilities"):
        run_of(folder, gate={"outputs": {"similarity": {"min_auc": 0.6}}})
    with pytest.raises(ConfigError, match=r"gate\.retrieval is of two-tower models"):
        run_of(folder, model={"name": "lr"}, retrieval=None, train={})
