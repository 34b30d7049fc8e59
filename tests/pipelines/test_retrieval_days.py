"""Index and recommendations from day to day: one consistent pair whatever is promoted meanwhile; what clean leaves."""

import threading
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from base.errors import ArtefactError, ConfigError, RegistryError
from base.storage import is_published, publish, published, read_manifest, resolve
from features.source import Files, Source
from pipelines import cli
from pipelines.clean import clean
from pipelines.config import Run
from pipelines.daily import prepare_day
from pipelines.index import index, index_of
from pipelines.promote import promote
from pipelines.recommend import recommend
from pipelines.tracking import registry_of
from pipelines.train_day import train_day
from recsys.bundle import Bundle
from recsys.registry import ModelRegistry
from serving.index import KIND, ItemIndex
from tests.pipelines import test_retrieval
from tests.pipelines.test_promote_retrieval import toml
from tests.pipelines.test_retrieval import ITEMS, KINDS, USERS, quiet

FIRST = date(2026, 3, 3)
"""Of the full training, which learns from the first day of the log."""
TODAY = FIRST + timedelta(days=2)


def run_of(folder: Path, **changes: object) -> Run:
    daily = {
        "data": {"path": f"{folder}/log/day=*/*.parquet", "key": ["user", "item"], "labels": ["liked"], "time": "day"},
        "daily": {"window_days": 1},
        "train": {"batch_size": 64, "epochs": 1, "monitor": "recall", "threads": 1},
        "recommend": {"k": 5},
    }
    return test_retrieval.run_of(folder, **{**daily, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two versions, trained on two days one after the other."""
    folder = tmp_path_factory.mktemp("retrieval_days")
    rng = np.random.default_rng(0)
    for n in range(5):
        rows = [
            {"user": user, "item": f"i{item:02}", "group": f"k{user % KINDS}", "liked": 1}
            for user in range(USERS)
            for item in rng.choice(ITEMS // KINDS, 4, replace=False) * KINDS + user % KINDS
        ]
        with publish(folder / "log" / f"day={FIRST + timedelta(days=n - 2)}", "log") as staging:
            pl.DataFrame(rows).write_parquet(staging / "part.parquet")
    test_retrieval.corpus().write_parquet(folder / "items.parquet")
    run = run_of(folder)
    for on in (run.on(FIRST, full=True), run.on(FIRST + timedelta(days=1))):
        prepare_day(on, say=quiet)
        train_day(on, say=quiet)
        assert promote(on).promoted
    return run


@pytest.fixture
def registry(run: Run) -> ModelRegistry:
    """With the first version as the champion, and its index."""
    registry = registry_of(run)
    registry.promote(registry.find("1"), again=True)
    index(run, if_missing=True, say=quiet)
    return registry


def bundle_of(registry: ModelRegistry, version: str) -> Bundle:
    return registry.bundle_of(registry.find(version))


def test_a_promotion_between_index_and_recommend(run: Run, registry: ModelRegistry) -> None:
    partition = f"day={TODAY}"
    registry.promote(registry.find("2"))
    with pytest.raises(ArtefactError, match=r"the model is bundle .*; build its own"):
        recommend(run, partition=partition, say=quiet)
    said: list[str] = []
    (target,) = recommend(run, partition=partition, build_index=True, overwrite=True, say=said.append)
    made, indexed = read_manifest(resolve(target)).about, read_manifest(resolve(run.index_path, KIND)).about
    assert made["bundle"] == indexed["bundle"] == bundle_of(registry, "2").version
    assert made["users"] == USERS
    rows = pl.read_parquet(resolve(target) / "part-*.parquet")
    assert rows["model_version"].unique().to_list() == ["2"]
    assert [line.partition(":")[0] for line in said] == ["index of version 2", partition]

    registry.rollback()  # the next day goes back with the champion
    again = recommend(run, partition=partition, build_index=True, if_missing=True, say=said.append)
    assert (again, said[-1]) == ([], f"{partition}: recommended already")
    recommend(run, partition=partition, build_index=True, overwrite=True, say=quiet)
    assert read_manifest(resolve(target)).about["bundle"] == bundle_of(registry, "1").version


def test_an_index_of_the_model_is_not_built_again(run: Run, registry: ModelRegistry) -> None:
    before = resolve(run.index_path, KIND)
    said: list[str] = []
    assert index_of(run, bundle_of(registry, "1"), "1", say=said.append) == before
    assert said == []


def test_an_index_of_other_settings_or_items_is_built_again(
    run: Run, registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `recommend` would refuse it, as it does one that was measured for fewer items."""
    bundle, partition = bundle_of(registry, "1"), f"day={TODAY}"
    few, many = (run_of(tmp_path.parent, index={"kind": "hnsw"}, recommend={"k": k}) for k in (5, 9))
    few, many = (r.model_copy(update={k: getattr(run, k) for k in ("output", "data", "tables", "retrieval", "mlflow")})
                 for r in (few, many))  # fmt: skip
    index_of(few, bundle, "1", say=quiet)
    with pytest.raises(ArtefactError, match="measured for the first 5 items"):
        recommend(many, partition=partition, overwrite=True, say=quiet)
    recommend(many, partition=partition, build_index=True, overwrite=True, say=quiet)
    made = resolve(run.index_path, KIND)
    assert read_manifest(made).about["k"] == 9
    test_retrieval.corpus().head(ITEMS - 1).write_parquet(tmp_path / "items.parquet")
    assert many.retrieval is not None
    files = many.retrieval.model_copy(update={"items": Files(path=str(tmp_path / "items.parquet"))})
    fewer = many.model_copy(update={"retrieval": files})
    assert read_manifest(index_of(fewer, bundle, "1", say=quiet)).about["items"] == ITEMS - 1
    test_retrieval.corpus().head(ITEMS - 2).write_parquet(tmp_path / "items.parquet")
    assert read_manifest(index_of(fewer, bundle, "1", say=quiet)).about["items"] == ITEMS - 2

    own = many.model_copy(update={"retrieval": files.model_copy(update={"items": None})})
    made = index_of(own, bundle, "1", say=quiet)
    assert "log" in read_manifest(made).about
    monkeypatch.setattr(Source, "fingerprint", None)  # the log is not read again to find that it is there
    assert index_of(own, bundle, "1", say=quiet) == made


def at_once(*work: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def guarded(do: Callable[[], None]) -> None:
        try:
            do()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(do,)) for do in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_runs_of_several_days_build_an_index_once(run: Run, registry: ModelRegistry) -> None:
    second, said = bundle_of(registry, "2"), list[str]()

    def build() -> None:
        index_of(run, second, "2", say=said.append)

    at_once(*[build] * 4)
    assert len([line for line in said if line.startswith("index of version 2: exact")]) == 1


def test_runs_with_different_champions_each_have_their_own(run: Run, registry: ModelRegistry) -> None:
    def use(version: str) -> Callable[[], None]:
        bundle = bundle_of(registry, version)

        def use() -> None:
            for _ in range(4):
                folder = index_of(run, bundle, version, say=quiet)
                assert ItemIndex.load(folder, bundle).about["bundle"] == bundle.version

        return use

    at_once(use("1"), use("2"))


def test_clean_leaves_recommendations_and_the_index(run: Run, registry: ModelRegistry) -> None:
    for n in range(2):
        recommend(run, partition=f"day={TODAY - timedelta(days=n)}", build_index=True, if_missing=True, say=quiet)
    before = published(run.output / "recommendations")
    assert len(before) == 2
    freed = clean(run.on(TODAY), keep=1, say=quiet)
    assert freed > 0
    assert published(run.output / "recommendations") == before
    assert ItemIndex.load(run.index_path, bundle_of(registry, "1")).about["items"] == ITEMS
    assert not is_published(run.ranking_path([f"day={FIRST}"]))


def test_sentences_for_what_cannot_be(run: Run, registry: ModelRegistry, tmp_path: Path) -> None:
    nobody = run.model_copy(update={"mlflow": run.mlflow.model_copy(update={"model": "nobody"})})
    with pytest.raises(RegistryError, match=r"'nobody' .* has no 'champion'; run `recsys promote` first"):
        recommend(nobody, partition=f"day={TODAY}", build_index=True, overwrite=True, say=quiet)
    many = run.model_copy(update={"recommend": run.recommend.model_copy(update={"k": ITEMS + 1})})
    with pytest.raises(ConfigError, match=rf"k = {ITEMS + 1}: the corpus has {ITEMS} items"):
        index(many, overwrite=True, say=quiet)
    config = tmp_path / "run.toml"
    tree = run.model_dump(mode="json", exclude_none=True)
    tree["data"].pop("split")
    config.write_text(toml(tree))
    for partition, sentence in (("day=2026-03-09", "no files for day 2026-03-09"), ("split=test", "split by day")):
        arguments = ["recommend", "--config", str(config), "--partition", partition, "--build-index", "--if-missing"]
        result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
        assert result.exit_code == 2
        assert sentence in result.output
