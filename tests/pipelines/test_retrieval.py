"""Retrieval from log to report: two towers over a log whose taste is known, its corpus, cold items, and bad input."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from base.config import parse_config
from base.errors import ConfigError, DataError
from base.storage import read_manifest, resolve
from features.pipeline import FittedPipeline
from pipelines.config import Run
from pipelines.evaluate import evaluate, rank_with
from pipelines.prepare import prepare
from pipelines.rankings import ranking_of
from pipelines.report import report
from pipelines.text import metrics_table
from pipelines.tracking import registry_of
from pipelines.train import fit_window, train
from recsys.bundle import Bundle
from recsys.models.two_tower import TwoTower
from recsys.retrieval import ITEM, Ranking
from recsys.trainer import Progress

ITEMS, USERS, KINDS = 60, 90, 4
COLD = range(54, 58)
"""Items that stand in test rows alone; after them, two that stand in no row."""
TWO_TOWER = {"name": "two_tower", "query": ["user", "group"], "item": ["item", "genres", "price"], "dim": 8}
TRAIN = {"batch_size": 64, "epochs": 4, "monitor": "recall", "threads": 1, "checkpoint_every": 5, "patience": 4}


def quiet(_: str) -> None:
    """Says nothing."""


def corpus() -> pl.DataFrame:
    """Item i is of genre i mod KINDS; nothing is known of the last but one."""
    genres = [[f"g{i % KINDS}"] if i != ITEMS - 2 else [] for i in range(ITEMS)]
    price = [float(i) if i != ITEMS - 2 else None for i in range(ITEMS)]
    return pl.DataFrame({"item": [f"i{i:02}" for i in range(ITEMS)], "genres": genres, "price": price})


def log() -> pl.DataFrame:
    """Users like one genre: most of their rows are of it."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for user in range(USERS):
        own = [i for i in range(COLD.start) if i % KINDS == user % KINDS]
        liked = {*rng.choice(own, 9, replace=False), *rng.choice(COLD.start, 2)}
        new = [i for i in COLD if i % KINDS == user % KINDS]
        for part, items in (("log", sorted(liked)), ("new", new[: user % 2])):
            rows += [{"user": user, "item": f"i{i:02}", "part": part, "group": f"k{user % KINDS}"} for i in items]
    return pl.DataFrame(rows).with_columns(liked=pl.lit(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    log().write_parquet(folder / "log.parquet")
    corpus().write_parquet(folder / "items.parquet")
    return folder


def run_of(folder: Path, output: str = "out", **changes: Any) -> Run:
    tree: dict[str, Any] = {
        "output": folder / output,
        "data": {
            "path": str(folder / "log.parquet"),
            "key": ["user", "item"],
            "labels": ["liked"],
            "split": {"per_user": "user", "train": 0.8, "valid": 0.2, "test_where": "part = 'new'"},
        },
        "tables": [{"path": str(folder / "items.parquet"), "on": "item"}],
        "features": [
            {"kind": "vocabulary", "column": "user"},
            {"kind": "vocabulary", "column": "group"},
            {"kind": "vocabulary", "column": "item"},
            {"kind": "vocabulary", "column": "genres", "multi": True},
            {"kind": "standardise", "column": "price"},
        ],
        "model": TWO_TOWER,
        "train": TRAIN,
        "retrieval": {"user": "user", "item": "item", "items": str(folder / "items.parquet"), "k": [5, 10]},
        "mlflow": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        tree[part] = {**tree[part], name: value} if name else value
    return parse_config(Run, tree, source="test")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Run:
    run = run_of(folder)
    prepare(run, say=quiet)
    train(run, say=quiet)
    return run


def test_the_taste_is_learned_and_cold_items_are_found_by_their_features(trained: Run) -> None:
    whole = evaluate(trained, partition="split=valid")
    (recall,) = whole.filter(slice="all", k=10)["recall"]
    assert recall > 0.7  # of 60 items, 15 are of the genre; about 7 of these have been seen
    assert whole.filter(slice="all", k=10)["users"].item() <= USERS
    table = evaluate(trained)
    rows = {r["slice"]: r for r in table.filter(k=10).iter_rows(named=True)}
    assert rows["cold"]["items"] == 6
    assert rows["cold"]["users"] == rows["all"]["users"] == log().filter(part="new").height
    assert rows["cold"]["recall"] > 0.8
    assert rows["head"]["users"] == 0
    assert rows["head"]["recall"] is None
    assert sum(rows[s]["items"] for s in ("head", "torso", "tail", "cold")) == rows["all"]["items"] == ITEMS
    text = metrics_table(table)
    assert text.splitlines()[0].split() == ["items", "number", "users", "K", "recall", "NDCG", "MAP", "MRR", "coverage"]
    assert len(text.splitlines()) == 11


def test_what_is_registered_gives_the_same_similarity(trained: Run) -> None:
    registry = registry_of(trained)
    bundle = registry.bundle_of(registry.find("challenger"))
    bundle.check_golden()
    assert bundle.version == Bundle.load(trained.bundle_path).version
    assert bundle.golden["@similarity"].abs().max() <= 1 + 1e-6  # pyright: ignore
    assert bundle.golden["@similarity"].n_unique() > 10
    assert bundle.schema.item == "item"
    history = bundle.metrics["history"]
    best = min(history, key=lambda h: h["objective"])
    assert best["objective"] == -best["recall_5"]
    assert bundle.metrics["best_epoch"] == best["epoch"]


def test_the_page_shows_quality_by_popularity(trained: Run) -> None:
    evaluate(trained)
    text = report(trained).read_text()
    for piece in ("Quality of the ranking", "Recall@5 by epoch", "The first 10", "cold", "Training loss"):
        assert piece in text
    assert "users of" in text
    assert "AUC" not in text


def test_an_item_without_features_is_counted_and_named(folder: Path) -> None:
    said: list[str] = []
    prepare(run_of(folder, "nameless"), say=said.append)
    assert "corpus: 1 items have no known feature (as 'i58'): they all have one vector" in said
    assert "split=valid: 90 users to rank 60 items for, 6 of them cold" in said
    ranking = resolve(folder / "nameless/rankings/two_tower/split=valid")
    assert read_manifest(ranking).about["without_features"] == 1
    again: list[str] = []
    prepare(run_of(folder, "nameless"), say=again.append)
    assert "split=valid: its ranking is there already" in again


def test_without_a_table_the_corpus_is_the_logs(folder: Path) -> None:
    run = run_of(folder, "own", retrieval__items=None)
    fitted = prepare(run, say=quiet)
    items = pl.read_parquet(ranking_of(run, fitted, ["split=valid"]).folder / "items.parquet")
    assert items[ITEM].to_list() == sorted(log().filter(part="log")["item"].unique())  # no test row is read
    train(run, say=quiet)
    assert evaluate(run)["items"][0] == log()["item"].n_unique()


def test_rows_that_are_not_positive_change_nothing(folder: Path, tmp_path: Path) -> None:
    """It is the run whose data.where leaves them out, though a pair may stand in the log as a negative first."""
    rng = np.random.default_rng(1)
    shown = pl.DataFrame({"user": rng.integers(0, USERS, 900), "item": [f"i{i:02}" for i in rng.integers(0, 54, 900)]})
    others = {"part": pl.lit("log"), "group": pl.lit("k8"), "liked": pl.lit(0)}
    negatives = shown.unique(maintain_order=True).with_columns(**others)
    pl.concat([negatives, log()]).write_parquet(tmp_path / "log.parquet")
    corpus().write_parquet(tmp_path / "items.parquet")
    made: list[tuple[str, list[pl.DataFrame]]] = []
    for output, where in (("all", None), ("where", "liked = 1")):
        run = run_of(tmp_path, output, data__where=where)
        fitted = prepare(run, say=quiet)
        assert fitted.counts_of("item").sum() == pl.read_parquet(run.examples_path("split=train") / "*.parquet").height
        tables = [pl.read_parquet(run.examples_path(f"split={part}") / "*.parquet") for part in ("train", "valid")]
        question = ranking_of(run, fitted, ["split=valid"]).folder
        tables += [pl.read_parquet(question / file) for file in ("items.parquet", "users.parquet")]
        made.append((fitted.version, tables))
    (ours, tables), (theirs, expected) = made
    assert ours == theirs
    assert all(a.equals(b) for a, b in zip(tables, expected, strict=True))
    assert (resolve(run_of(tmp_path, "all").examples_path("split=train")) / "rejected.parquet").exists() is False


class Stop(Exception):  # noqa: N818  (no error)
    """Ends a training."""


def stop_at(step: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return on_step


def fitted_of(run: Run) -> FittedPipeline:
    return prepare(run, say=quiet)


def test_killed_it_goes_on_and_ends_with_the_same_bits(folder: Path) -> None:
    run = run_of(folder, "resumed")
    fitted = fitted_of(run)
    whole, _ = fit_window(run, fitted, run.examples_path, on_step=lambda _: None)
    again = run.model_copy(update={"name": "killed"})
    prepare(again, say=quiet)
    for step in (7, 22):
        with pytest.raises(Stop):
            fit_window(again, fitted, again.examples_path, on_step=stop_at(step))
    resumed, _ = fit_window(again, fitted, again.examples_path, on_step=lambda _: None)
    assert resumed.resumed_at == 18  # 13 steps an epoch, and 5
    assert resumed.history == whole.history
    assert all(whole.weights[name].equal(tensor) for name, tensor in resumed.weights.items())


@pytest.mark.slow
def test_two_processes_learn_and_measure_the_same(folder: Path) -> None:
    """Negatives are those of the whole batch, and the corrections reach every rank."""
    run = run_of(folder, "processes", train__epochs=2)
    fitted = fitted_of(run)
    alone, _ = fit_window(run, fitted, run.examples_path, on_step=lambda _: None)
    two = run_of(folder, "processes", train__epochs=2, train__processes=2).model_copy(update={"name": "two"})
    prepare(two, say=quiet)
    both, _ = fit_window(two, fitted, two.examples_path, on_step=lambda _: None)
    assert [h["train_loss"] for h in both.history] == pytest.approx([h["train_loss"] for h in alone.history], rel=1e-4)
    assert both.history[-1]["recall_10"] == pytest.approx(alone.history[-1]["recall_10"], abs=0.02)
    for name, tensor in alone.weights.items():
        np.testing.assert_allclose(both.weights[name], tensor, atol=1e-3)


def test_evaluation_may_be_rarer_than_epochs(folder: Path) -> None:
    run = run_of(folder, "rare", train__epochs=5, train__evaluate_every=2)
    trained, _ = fit_window(run, fitted_of(run), run.examples_path, on_step=lambda _: None)
    assert ["objective" in h for h in trained.history] == [False, True, False, True, True]
    assert trained.best_epoch in (2, 4, 5)
    stuck = run_of(folder, "rare", train__epochs=9, train__evaluate_every=2, train__patience=1, retrieval__k=[50])
    stuck = stuck.model_copy(update={"name": "stuck"})  # where almost all items are shown, nothing improves
    prepare(stuck, say=quiet)
    trained, _ = fit_window(stuck, fitted_of(stuck), stuck.examples_path, on_step=lambda _: None)
    assert len(trained.history) in (4, 6)


def test_a_batch_of_one_item_teaches_nothing_and_breaks_nothing(folder: Path, tmp_path: Path) -> None:
    same = log().with_columns(item=pl.when(part="log").then(pl.lit("i01")).otherwise("item"))
    same.unique(["user", "item"], maintain_order=True).write_parquet(tmp_path / "log.parquet")
    corpus().write_parquet(tmp_path / "items.parquet")
    split = {"per_user": "part", "train": 0.8, "valid": 0.1, "test": 0.1}
    run = run_of(tmp_path, data__split=split, data__where="part = 'log'")
    trained, _ = fit_window(run, fitted_of(run), run.examples_path, on_step=lambda _: None)
    assert [h["train_loss"] for h in trained.history] == [0.0] * len(trained.history)
    assert all(tensor.isfinite().all() for tensor in trained.weights.values())


def test_items_of_the_log_that_are_not_in_the_corpus_are_named(folder: Path, tmp_path: Path) -> None:
    corpus().filter(pl.col("item") > "i02").write_parquet(tmp_path / "items.parquet")
    rows = log().filter(pl.col("item") <= "i02", part="log")
    run = run_of(folder, "missing", retrieval__items=str(tmp_path / "items.parquet"))
    with pytest.raises(
        DataError,
        match=r"3 items of \d+ of \d+ positive rows are not in the corpus, as item 'i00': \d+.\d\d%, where 1.00% is",
    ) as caught:
        prepare(run, say=quiet)
    assert 0 < int(str(caught.value).split(" items of ")[1].split()[0]) <= rows.height
    pl.concat([corpus(), corpus()[:1]]).write_parquet(tmp_path / "twice.parquet")
    twice = run_of(folder, "missing", retrieval__items=str(tmp_path / "twice.parquet"), tables=[])
    with pytest.raises(DataError, match=r"item 'i00' stands there twice"):
        prepare(run_of(folder, "twice", retrieval__items=str(tmp_path / "twice.parquet"), tables=twice.tables,
                       features=[{"kind": "vocabulary", "column": c} for c in ("user", "group", "item")],
                       model={**TWO_TOWER, "item": ["item"]}), say=quiet)  # fmt: skip


def test_the_corpus_is_refused_before_examples_are_written(folder: Path, tmp_path: Path) -> None:
    log().join(corpus(), on="item", maintain_order="left").write_parquet(tmp_path / "log.parquet")
    nameless = corpus().with_columns(item=pl.when(pl.col("item") == "i05").then(None).otherwise("item"))
    cases = {
        "without-id": (nameless, r"without-id\.parquet: 'item' is missing in 1 rows; remove them"),
        "untyped": (
            corpus().with_columns(pl.col("genres").list.join("|")),
            r"retrieval\.items, .*untyped\.parquet: column 'genres' holds text; .* or store it there as the log does",
        ),
    }
    for name, (items, message) in cases.items():
        items.write_parquet(tmp_path / f"{name}.parquet")
        items_path = str(tmp_path / f"{name}.parquet")
        run = run_of(folder, name, data__path=str(tmp_path / "log.parquet"), tables=[], retrieval__items=items_path)
        with pytest.raises(DataError, match=message):
            prepare(run, say=quiet)
        assert not list(run.output.glob("**/examples*/*"))


def test_rows_without_an_item_in_the_corpus_are_told_and_limited_again(folder: Path, tmp_path: Path) -> None:
    corpus().filter(pl.col("item") != "i00").write_parquet(tmp_path / "items.parquet")
    run = run_of(folder, "told", retrieval__items=str(tmp_path / "items.parquet"), data__max_bad_share=0.5)
    said: list[str] = []
    prepare(run, say=said.append)
    assert any(line.endswith("are of items outside the corpus: learned from, recommended to nobody") for line in said)
    lost = next(line for line in said if "set aside" in line)
    assert lost.startswith("split=valid: set aside ")
    assert lost.endswith("whose item is not in the corpus, as 'i00'")
    stricter = run_of(folder, "told", retrieval__items=str(tmp_path / "items.parquet"), data__max_bad_share=0.0)
    with pytest.raises(DataError, match=r"as item 'i00': \d+\.\d\d%, where 0\.00% is allowed"):
        prepare(stricter, say=quiet)


def test_a_ranking_of_other_settings_is_not_trained_with(folder: Path, trained: Run) -> None:
    other = run_of(folder, model={**TWO_TOWER, "item": ["genres"]})
    with pytest.raises(DataError, match="made by other features, settings or files"):
        train(other, say=quiet)


def test_more_than_the_corpus_holds_is_refused(folder: Path, trained: Run) -> None:
    fitted = FittedPipeline.load(resolve(trained.features_path))
    ranking = ranking_of(trained, fitted, ["split=valid"])
    bundle = Bundle.load(trained.bundle_path)
    assert isinstance(ranking, Ranking)
    assert isinstance(bundle.model, TwoTower)
    with pytest.raises(ConfigError, match=r"retrieval\.k = \[61\]: the corpus has 60 items"):
        rank_with(bundle, replace(ranking, cuts=ranking.cuts.model_copy(update={"k": (61,)})))


@pytest.mark.parametrize("prepared", [True, False])
def test_more_than_the_corpus_holds_is_refused_before_a_step(folder: Path, trained: Run, *, prepared: bool) -> None:
    retrieval = {**trained.model_dump(mode="json")["retrieval"], "k": [61]}
    run = run_of(folder, trained.output.name if prepared else "deep", retrieval=retrieval)
    with pytest.raises(ConfigError, match=r"retrieval\.k = \[61\]: the corpus has 60 items"):
        train(run, say=quiet) if prepared else prepare(run, say=quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieval": None}, r'"two_tower" needs \[retrieval\]'),
        ({"model": {"name": "lr"}}, 'retrieval is of two-tower models; model.name is "lr"'),
        ({"model": {"name": "lr"}, "retrieval": None}, 'train.monitor = "recall" is of two-tower models'),
        ({"train__monitor": "auc"}, 'train.monitor = "auc": a two-tower model is measured by "recall" or "ndcg"'),
        ({"sampling": {"negative_rate": 0.5}}, "sampling.negative_rate speaks of probabilities"),
        ({"calibrate": {"method": "platt"}}, "calibrate speaks of probabilities"),
        ({"evaluate": {"slices": ["group"]}}, "evaluate speaks of probabilities"),
        ({"retrieval__item": "group_of_items"}, 'retrieval.item = "group_of_items": give it a feature'),
        (
            {"features": [{"kind": "vocabulary", "column": c, "min_count": 2} for c in ("user", "item")]},
            "min_count = 1",
        ),
    ],
)
def test_run_files_that_cannot_be_meant_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(folder, "refused", **changes)
