"""demo-retrieval: candidates by two towers, a second stage that puts them in order, and the best that there can be."""

import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.resources import files
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.config import load_config
from base.storage import publish
from features.readers.catalogue import CatalogueConfig, Truth
from features.split import days_of
from pipelines.config import Run
from pipelines.evaluate import evaluate
from pipelines.generate import generate
from pipelines.index import index
from pipelines.prepare import prepare
from pipelines.progress import Ticker
from pipelines.promote import promote
from pipelines.rankings import ask
from pipelines.recommend import recommend
from pipelines.report import report
from pipelines.stages_page import recommended
from pipelines.text import aligned
from pipelines.train import train
from recsys.bundle import Bundle
from recsys.models.two_tower import TwoTower
from recsys.retrieval import COUNT, ITEM, ITEMS, RELEVANT, SEEN, SLICES, USER, USERS, Pairs, Ranking, measure_scores
from recsys.trainer import passed

DAYS = "2026-03-01..2026-03-06"
HELD_OUT = "day=2026-03-06"
OUTPUT = Path("runs/demo-retrieval")
SAMPLE = 500
"""Users for whom it is found out how likely they would click."""
_CHUNK = 2**22
"""Pairs of users and items that are scored at a time."""

Order = Callable[[slice], Tensor]
"""scores_UI of some of the users, by their places in the ranking."""


def demo_retrieval(output: Path, log: CatalogueConfig) -> None:
    """Generate, prepare, train, evaluate, promote, index; a ranking model; recommend, report; print what came out."""
    started = time.perf_counter()
    candidates, ranking = _runs(output)
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
    ticker = Ticker("recommend", rows="users")
    published = recommend(candidates, partition=HELD_OUT, overwrite=True, on_users=ticker.on_rows)
    ticker.close()
    _step("report", "what was learned, as one page")
    page = report(candidates, partition=HELD_OUT)
    print(f"\n{_table(candidates, ranking.model.name, log)}\n")
    print("recall: how much of what users clicked on day 6 is among their first 20, by popularity of the item.")
    print("p(click): how likely they would click on these, by the known truth; the second stage asks for that alone.\n")
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


def _table(run: Run, second: str, log: CatalogueConfig) -> str:
    """Day 6: how much of what users clicked, and had not clicked before, is among the first K, and how likely they
    would click on these if they were shown them.

    Clicks in a log follow what was shown, too, which the second stage does not ask: it may find less of them, and yet
    what users like more. No order finds more logged clicks than that by expected clicks, but by chance.
    """
    k, bundle = run.recommend.k, Bundle.load(run.bundle_path)
    (ranking,) = ask(run, bundle, None, [HELD_OUT])
    items = pl.read_parquet(ranking.folder / ITEMS, columns=[ITEM, COUNT])
    users_Q = pl.read_parquet(ranking.folder / USERS, columns=[USER])[USER].to_numpy()
    day_index = log.index_of(date.fromisoformat(HELD_OUT.removeprefix("day=")))
    items_I = items[ITEM].to_numpy()
    truth = Truth(log, items_I, day_index)
    counts_I = torch.from_numpy(items[COUNT].to_numpy(writable=True)).float()
    queries_QD, items_ID = _vectors(bundle, ranking)
    orders: dict[str, Order] = {
        "popularity": lambda part: counts_I.repeat(len(users_Q[part]), 1),
        run.model.name: lambda part: queries_QD[part] @ items_ID.T,
        "best for recall": lambda part: torch.from_numpy(truth.expected_clicks(users_Q[part])),
        "best for p(click)": lambda part: torch.from_numpy(truth.click_probabilities(users_Q[part])),
    }
    if published := recommended(run, bundle, HELD_OUT):  # unless the gate has left an earlier model in its place
        orders[f"{run.model.name}, then {second}"] = as_published(published.lists, users_Q, items_I)
    seen, relevant, slices_I = ranking.pairs(SEEN), ranking.pairs(RELEVANT), ranking.slices()
    rows = [["order", f"recall@{k}", f"NDCG@{k}", *SLICES[1:], "p(click)"]]
    for name, order in orders.items():
        chunks = _chunks(order, len(users_Q), items.height)
        found = measure_scores(chunks, seen, relevant, slices_I, (k,)).table
        recall = dict(found.select("slice", "recall").iter_rows())
        shown_UK = first_unseen(order, seen, min(SAMPLE, len(users_Q)), k)
        probability_UI = truth.click_probabilities(users_Q[:SAMPLE])
        likely = float(np.take_along_axis(probability_UI, shown_UK, axis=1).mean())
        numbers = [recall["all"], found["ndcg"][0], *(recall[s] for s in SLICES[1:]), likely]
        rows.append([name, *("-" if n is None else f"{n:.4f}" for n in numbers)])
    return aligned(rows, left=1)


def _vectors(bundle: Bundle, ranking: Ranking) -> tuple[Tensor, Tensor]:
    """queries_QD and items_ID of a ranking."""
    model = bundle.model
    assert isinstance(model, TwoTower)
    model.eval()
    queries = [model.queries(logits_BL) for logits_BL, _ in passed(model, ranking.users, bundle.device)]
    items = [model.items(logits_BL) for logits_BL, _ in passed(model, ranking.items, bundle.device)]
    return torch.cat(queries), torch.cat(items)


def _chunks(order: Order, users: int, items: int) -> Iterator[Tensor]:
    size = max(1, _CHUNK // items)
    return (order(slice(start, min(start + size, users))) for start in range(0, users, size))


def first_unseen(order: Order, seen: Pairs, users: int, k: int) -> NDArray[np.int64]:
    """places_UK of the first users' best items that they have not seen."""
    scores_UI = order(slice(0, users)).clone()
    scores_UI[seen.of(0, users)] = -torch.inf
    return scores_UI.topk(k).indices.numpy()


def as_published(lists: pl.DataFrame, user_Q: NDArray[np.int64], item_I: NDArray[np.int64]) -> Order:
    """Lists of user, item and place as scores: what is not listed is never shown."""
    of_user = pl.DataFrame({"user": user_Q}).with_row_index("row")
    of_item = pl.DataFrame({"item": item_I}).with_row_index("column")
    row_X, column_X, place_X = (
        lists.join(of_user, on="user")
        .join(of_item, on="item")
        .select("row", "column", "place")
        .cast(pl.Int64)
        .to_numpy()
        .T
    )

    def order(part: slice) -> Tensor:
        scores_UI = torch.full((part.stop - part.start, len(item_I)), -torch.inf)
        inside_X = (row_X >= part.start) & (row_X < part.stop)
        scores_UI[row_X[inside_X] - part.start, column_X[inside_X]] = -torch.from_numpy(place_X[inside_X]).float()
        return scores_UI

    return order


def _step(verb: str, what: str) -> None:
    print(f"\n== {verb}: {what}", flush=True)
