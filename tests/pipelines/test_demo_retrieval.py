"""The retrieval demo in small: from its log to recommendations in two stages, its table and its page."""

from contextlib import redirect_stdout
from dataclasses import replace
from importlib.resources import files
from io import StringIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from base.config import load_config
from base.storage import read_manifest, resolve
from features.readers.catalogue import ITEM_FEATURES, CatalogueConfig
from pipelines import items_page, plots
from pipelines.config import Recommend, Run
from pipelines.demo_retrieval import HELD_OUT, as_published, demo_retrieval, first_unseen
from pipelines.evaluate import evaluation_of
from pipelines.items_page import chosen, neighbours
from pipelines.plots import Stage
from pipelines.rankings import ask
from pipelines.recommend import recommend
from pipelines.report import report
from pipelines.stages_page import recall_of, recommended
from recsys.bundle import Bundle
from recsys.retrieval import ITEM, ITEMS, RELEVANT, SLICES, USER, USERS, Pairs, Ranking

LOG = CatalogueConfig(rows_per_day=6_000, users=600, items=1_000, themes=50)
RUNS = Path(str(files("pipelines"))) / "runs"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def said(output: Path) -> list[str]:
    """What the demo prints."""
    with redirect_stdout(StringIO()) as printed:
        demo_retrieval(output, LOG)
    return printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def run(output: Path, said: list[str]) -> Run:
    return load_config(Run, output / "runs" / "catalogue.toml")


@pytest.fixture(scope="module")
def bundle(run: Run) -> Bundle:
    return Bundle.load(run.bundle_path)


@pytest.fixture(scope="module")
def ranking(run: Run, bundle: Bundle) -> Ranking:
    (ranking,) = ask(run, bundle, None, [HELD_OUT])
    return ranking


def table_of(said: list[str]) -> dict[str, list[float]]:
    start = next(i for i, line in enumerate(said) if line.startswith("order "))
    assert said[start].split() == ["order", "recall@20", "NDCG@20", "head", "torso", "tail", "cold", "p(click)"]
    rows = [line.rsplit(maxsplit=7) for line in said[start + 1 : start + 6]]
    return {name: [np.nan if v == "-" else float(v) for v in values] for name, *values in rows}


def test_the_table_tells_what_each_order_is_good_for(said: list[str]) -> None:
    table = table_of(said)
    recall = {name: values[0] for name, values in table.items()}
    assert recall["best for recall"] == max(recall.values())
    assert recall["best for recall"] > 1.2 * recall["two_tower"] > 1.5 * recall["popularity"]
    likely = {name: values[-1] for name, values in table.items()}
    assert likely["best for p(click)"] == max(likely.values())
    assert likely["two_tower, then fm"] > 1.05 * likely["two_tower"]  # what the second stage is for
    assert all(0 <= v <= 1 for values in table.values() for v in values if np.isfinite(v))


def test_it_says_where_everything_is(said: list[str], output: Path) -> None:
    assert [line.split(":")[0] for line in said if line.startswith("== ")] == [
        *("== generate", "== prepare", "== train", "== promote", "== index"),
        *("== prepare", "== train", "== promote", "== recommend", "== report"),
    ]
    assert [line for line in said if line == "promoted"] == ["promoted"] * 2
    paths = {line.split()[0]: line.split()[-1] for line in said[-4:-1]}
    assert Path(paths["recommendations"]) == output / "recommendations" / HELD_OUT
    assert Path(paths["report"]).is_file()
    assert paths["MLflow"] == f"sqlite:///{output}/mlflow.db"
    assert said[-1].startswith("all in ")


def test_the_table_agrees_with_the_evaluation_and_with_the_page(said: list[str], run: Run, ranking: Ranking) -> None:
    measured = evaluation_of(run, HELD_OUT)[1].filter(k=20)
    assert table_of(said)["two_tower"][:2] == pytest.approx([measured["recall"][0], measured["ndcg"][0]], abs=2e-4)
    published = recommended(run, Bundle.load(run.bundle_path), HELD_OUT)
    assert published is not None
    assert (published.k, published.depth, published.ranked_by) == (20, 200, "p_click")
    recall = recall_of(published.lists, ranking)
    assert [recall[s] for s in ("all", "head", "torso")] == pytest.approx(
        [table_of(said)["two_tower, then fm"][i] for i in (0, 2, 3)], abs=1e-4
    )


def test_every_user_of_the_day_is_given_twenty_items(run: Run) -> None:
    rows = pl.read_parquet(run.recommendations_path(HELD_OUT) / "part-*.parquet")
    asked = pl.read_parquet(run.output / "logs" / HELD_OUT / "*.parquet", hive_partitioning=False)
    assert set(rows["user_id"]) == set(asked["user_id"])
    lists = rows.sort("user_id", "place").group_by("user_id", maintain_order=True).agg("place", "item_id", "p_click")
    assert lists["place"].to_list() == [list(range(1, 21))] * lists.height
    assert lists["item_id"].list.n_unique().unique().to_list() == [20]
    assert all(chances == sorted(chances, reverse=True) for chances in lists["p_click"].to_list())


# The page


def test_the_page_shows_slices_neighbours_and_stages(run: Run) -> None:
    text = (run.report_path / "index.html").read_text()
    for piece in (
        *("Recall@20 by popularity", "The first 200", "Items and their neighbours", "From the corpus to what is shown"),
        *("candidates by similarity: 200 items", "by similarity alone: 20 items", "ranked by p_click: 20 items"),
        *("self-supervised, mean of the epoch", ": cold, training rows: 0", "<b>category "),
    ):
        assert piece in text, piece
    assert "Nothing of this bundle" not in text


def test_the_stages_of_a_single_stage_agree_with_full_ranking(run: Run, bundle: Bundle, ranking: Ranking) -> None:
    """By similarity alone, what is recommended is what full ranking finds."""
    alone = run.model_copy(update={"recommend": Recommend(k=20)})
    recommend(alone, partition=HELD_OUT, overwrite=True, say=lambda _: None)
    published = recommended(alone, bundle, HELD_OUT)
    assert published is not None
    assert (published.depth, published.ranked_by) == (20, None)
    found = recall_of(published.lists, ranking)
    measured = dict(evaluation_of(run, HELD_OUT)[1].filter(k=20).select("slice", "recall").iter_rows())
    assert found == pytest.approx(measured, abs=1e-9)
    text = report(alone, partition=HELD_OUT).read_text()
    assert "as recommended: 20 items" in text
    assert "by similarity" not in stages_of(text)
    other = replace(bundle, metrics={}).save(run.output / "other", overwrite=True)
    assert recommended(run, other, HELD_OUT) is None
    recommend(run, partition=HELD_OUT, overwrite=True, say=lambda _: None)


def test_without_recommendations_the_page_says_so(run: Run) -> None:
    elsewhere = run.model_copy(update={"recommend": Recommend(k=7)})
    larger = run.model_copy(update={"recommend": Recommend(k=5_000)})
    hidden = run.recommendations_path(HELD_OUT)
    version = hidden.readlink()
    hidden.unlink()
    try:
        text = report(elsewhere, partition=HELD_OUT).read_text()
        whole = report(larger, partition=HELD_OUT).read_text()
    finally:
        hidden.symlink_to(version)
    assert "Nothing of this bundle is published for day=2026-03-06: run `recsys recommend`." in text
    assert "by similarity alone: 7 items" in text  # a K that the evaluation has not
    slices = evaluation_of(run, HELD_OUT)[1].filter(k=20).height
    assert [stages_of(page).count("<tr>") for page in (text, whole)] == [1 + slices] * 2
    items = evaluation_of(run, HELD_OUT)[1]["items"][0]
    assert f"by similarity alone: {items:,} items" in whole  # there are no 5,000


def stages_of(text: str) -> str:
    return text.split("From the corpus to what is shown")[1].split("</section>")[0]


def test_recall_of_lists_is_the_mean_over_users(ranking: Ranking) -> None:
    items = pl.read_parquet(ranking.folder / ITEMS)[ITEM].to_list()
    users = pl.read_parquet(ranking.folder / USERS)
    rng = np.random.default_rng(0)
    shown = {user: set(rng.choice(len(items), 100, replace=False).tolist()) for user in users[USER]}
    lists = [{"user": user, "item": items[place]} for user, places in shown.items() for place in places]
    found = recall_of(pl.DataFrame(lists), ranking)
    slices_I = ranking.slices()
    for i, name in enumerate(SLICES):
        own = [
            [place in shown[user] for place in places if name == "all" or slices_I[place] == i]
            for user, places in users.select(USER, RELEVANT).iter_rows()
        ]
        expected = [np.mean(hits) for hits in own if hits]
        assert found[name] == (pytest.approx(np.mean(expected)) if expected else None), name


# Its parts


def test_neighbours_are_the_nearest_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items_page, "_CHUNK", 7)
    vectors = torch.nn.functional.normalize(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    found = neighbours(vectors, np.array([3, 49, 0]))
    cosine = (vectors @ vectors.T).numpy()
    np.fill_diagonal(cosine, -np.inf)
    for i, item in enumerate((3, 49, 0)):
        expected = np.argsort(-cosine[item])[:5]
        assert found.nearest_XK[i].tolist() == expected.tolist()
        np.testing.assert_allclose(found.cosine_XK[i], cosine[item, expected], atol=1e-6)
    few = neighbours(vectors[:3], np.array([1]))
    assert sorted(few.nearest_XK[0].tolist()) == [0, 2]


def test_items_are_chosen_over_each_slice() -> None:
    counts = np.array([50, 3, 0, 40, 1, 0, 2, 0, 1, 30])
    slices = np.array([1, 2, 4, 1, 3, 4, 3, 4, 3, 2])
    assert chosen(slices, counts).tolist() == [0, 3, 6, 4, 2, 5]  # head, tail by their counts, cold
    assert chosen(np.array([1, 1, 2]), np.array([5, 9, 1])).tolist() == [1, 0]  # no tail, none cold


def test_the_neighbours_raw_columns_are_those_of_the_catalogue(run: Run, bundle: Bundle) -> None:
    assert run.retrieval is not None
    columns = items_page.shown_columns(bundle, run.retrieval)
    assert columns == ["department", "category", "brand", "line", "colour", "material", "price_band", "price"]
    found = items_page.raw_columns(run, run.retrieval, pl.Series([5, 900]), columns, [HELD_OUT])
    catalogue = pl.read_parquet(run.output / "logs/items/*.parquet")
    for item in (5, 900):
        expected = catalogue.row(item, named=True)
        assert found[item] == {"item_id": item, **{c: expected[c] for c in columns}}
    of_log = run.retrieval.model_copy(update={"items": None})
    again = items_page.raw_columns(run, of_log, pl.Series([5]), columns, [HELD_OUT])
    assert again == {5: found[5]}


def test_published_lists_as_scores() -> None:
    lists = pl.DataFrame({"user": [7, 7, 9, 8], "item": ["b", "a", "c", "z"], "place": [1, 2, 1, 1]})
    order = as_published(lists, np.array([9, 7]), np.array(["a", "b", "c"]))
    assert order(slice(0, 2)).tolist() == [[-np.inf, -np.inf, -1], [-2, -1, -np.inf]]
    assert order(slice(1, 2)).tolist() == [[-2, -1, -np.inf]]
    seen = Pairs(np.array([0, 0, 1]), np.array([1]))
    assert first_unseen(order, seen, 2, 1).tolist() == [[2], [0]]


@pytest.mark.parametrize("recall", [0.0, 0.001, 1.0])
def test_a_funnel_can_be_drawn_whatever_is_left(recall: float) -> None:
    drawing = plots.stages("stages", [Stage("corpus", 10, 1.0)], [Stage("first", 1, recall)])
    assert f"{recall:.1%}" in drawing.svg


def test_the_shipped_run_files_are_those_of_the_demo(run: Run, output: Path) -> None:
    own = (output / "runs" / "catalogue.toml").read_text()
    shipped = (RUNS / "catalogue.toml").read_text()
    assert own == shipped.replace("runs/demo-retrieval", str(output)).replace("pipelines/runs/", f"{output}/runs/")
    first, second = (load_config(Run, RUNS / name) for name in ("catalogue.toml", "catalogue-ranking.toml"))
    assert first.recommend.ranking is not None
    assert Path("pipelines/runs/catalogue-ranking.toml") == first.recommend.ranking.config
    assert first.tracking_uri == second.tracking_uri
    assert set(first.model.item) == {"item_id", *ITEM_FEATURES}  # type: ignore[union-attr]
    assert read_manifest(resolve(run.output / "logs/items")).about["through"] == "2026-03-06"
