"""demo-retrieval: candidates by two towers, a second stage that puts them in order, and the best that there can be."""

import time
from datetime import date
from importlib.resources import files
from pathlib import Path

import polars as pl
import torch

from base.config import load_config
from base.storage import publish
from features.readers.catalogue import CatalogueConfig, Truth
from features.split import days_of
from pipelines.config import Run
from pipelines.evaluate import evaluate, evaluation_of
from pipelines.generate import generate
from pipelines.index import index
from pipelines.prepare import prepare
from pipelines.progress import Ticker
from pipelines.promote import promote
from pipelines.rankings import ask
from pipelines.recommend import recommend
from pipelines.report import report
from pipelines.text import aligned
from pipelines.train import train
from recsys.bundle import Bundle
from recsys.retrieval import COUNT, ITEM, ITEMS, RELEVANT, SEEN, SLICES, USER, USERS, Ranking, measure, measure_scores

DAYS = "2026-03-01..2026-03-06"
HELD_OUT = "day=2026-03-06"
OUTPUT = Path("runs/demo-retrieval")
_CHUNK = 2**22
"""Pairs of users and items whose truth is computed at a time."""


def demo_retrieval(output: Path, rows: int, items: int) -> None:
    """Generate, prepare, train, evaluate, promote, index; a ranking model; recommend, report; print what came out."""
    started = time.perf_counter()
    candidates, ranking = _runs(output)
    log = CatalogueConfig(rows_per_day=rows, items=items)
    _step("generate", "a catalogue, and six days of who was shown what and clicked; all probabilities are known")
    generate(log, days_of(DAYS), output / "logs", overwrite=True)
    _step("prepare", "clicks as examples, the catalogue as corpus")
    prepare(candidates, overwrite=True)
    _learn(candidates, "two towers, on the clicks of days 1 to 4")
    _step("index", "the catalogue through the item tower")
    index(candidates, overwrite=True)
    _step("prepare", "all impressions as examples, for the second stage")
    prepare(ranking, overwrite=True)
    _learn(ranking, f"{ranking.model.name}, on all impressions of days 1 to 4")
    _step("recommend", "to the users of day 6, in two stages")
    ticker = Ticker("recommend")
    published = recommend(candidates, partition=HELD_OUT, overwrite=True, on_users=ticker.on_rows)
    ticker.close()
    _step("report", "what was learned, as one page")
    page = report(candidates, partition=HELD_OUT)
    print(f"\n{_table(candidates, log)}\n")
    print(f"recommendations  {published[-1]}")
    print(f"report           {page.absolute()}")
    print(f"MLflow           .venv/bin/mlflow ui --backend-store-uri {candidates.tracking_uri}")
    print(f"all in {time.perf_counter() - started:.0f} s")


def _runs(output: Path) -> tuple[Run, Run]:
    """The run files of both stages; copies for this output folder where it is not the one they name."""
    folder = Path(str(files("pipelines"))) / "runs"
    names = ("catalogue.toml", "catalogue-ranking.toml")
    if output != OUTPUT:
        texts = [(folder / name).read_text(encoding="utf-8") for name in names]
        with publish(output / "runs", "run files", overwrite=True) as staging:
            for name, text in zip(names, texts, strict=True):
                own = text.replace(str(OUTPUT), str(output)).replace("pipelines/runs/", f"{output}/runs/")
                (staging / name).write_text(own, encoding="utf-8")
        folder = output / "runs"
    first, second = (load_config(Run, folder / name) for name in names)
    return first, second


def _learn(run: Run, what: str) -> None:
    _step("train", what)
    ticker = Ticker(run.model.name)
    train(run, on_step=ticker.on_step)
    ticker.close()
    evaluate(run, partition=HELD_OUT)
    _step("promote", f"{run.mlflow.model} against the champion, on the raw rows of day 6")
    verdict = promote(run, partition=HELD_OUT)
    print(verdict.decision, *verdict.reasons, sep="\n  ")


def _table(run: Run, log: CatalogueConfig) -> str:
    """Day 6: how much of what users clicked, and had not clicked before, is among the first K.

    The oracle's order is that of the clicks to be expected; chance alone could do better.
    """
    assert run.retrieval is not None
    k = run.recommend.k
    bundle = Bundle.load(run.bundle_path)
    (ranking,) = ask(run, bundle, None, [HELD_OUT])
    found = {
        "popularity": by_popularity(ranking, k),
        "two_tower": evaluation_of(run, HELD_OUT)[1].filter(pl.col("k") == k),
        "oracle": by_truth(ranking, log, k),
    }
    rows = [["", f"recall@{k}", f"NDCG@{k}", *(f"{name} recall" for name in SLICES[1:])]]
    for name, table in found.items():
        recall = dict(table.select("slice", "recall").iter_rows())
        rows.append([name, *(_figure(v) for v in (recall["all"], table["ndcg"][0], *(recall[s] for s in SLICES[1:])))])
    return aligned(rows, left=1)


def by_popularity(ranking: Ranking, k: int) -> pl.DataFrame:
    """The metrics of one order for everybody: that of the items' training rows."""
    counts_I = torch.from_numpy(pl.read_parquet(ranking.folder / ITEMS, columns=[COUNT])[COUNT].to_numpy(writable=True))
    alike_Q1 = torch.ones(ranking.rows(), 1)
    seen, relevant = ranking.pairs(SEEN), ranking.pairs(RELEVANT)
    return measure([alike_Q1], counts_I.float()[:, None], seen, relevant, ranking.slices(), (k,))


def by_truth(ranking: Ranking, log: CatalogueConfig, k: int) -> pl.DataFrame:
    """The metrics of the order of the clicks to be expected, day 6's items and users as they are."""
    items_I = pl.read_parquet(ranking.folder / ITEMS, columns=[ITEM])[ITEM].to_numpy()
    users_Q = pl.read_parquet(ranking.folder / USERS, columns=[USER])[USER].to_numpy()
    truth = Truth(log, items_I, log.index_of(date.fromisoformat(HELD_OUT.removeprefix("day="))))
    size = max(1, _CHUNK // len(items_I))
    chunks = (
        torch.from_numpy(truth.expected_clicks(users_Q[start : start + size])) for start in range(0, len(users_Q), size)
    )
    seen, relevant = ranking.pairs(SEEN), ranking.pairs(RELEVANT)
    return measure_scores(chunks, seen, relevant, ranking.slices(), (k,)).table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _step(verb: str, what: str) -> None:
    print(f"\n== {verb}: {what}", flush=True)
