"""The report's section on two stages: how much of what users should get is left after each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from base.storage import is_published, read_manifest, resolve
from pipelines import page, plots
from pipelines.config import Recommend, Run
from pipelines.evaluate import rank_with
from pipelines.page import Html
from pipelines.plots import Plot, Stage
from recsys.bundle import Bundle
from recsys.retrieval import ITEM, ITEMS, RELEVANT, SLICES, USER, USERS, Ranking
from serving.recommend import KIND, PLACE

_PLACE = "@place"


@dataclass(frozen=True)
class Recommended:
    """What was published for the users of a partition."""

    lists: pl.DataFrame
    """Raw `user` and `item`, and `place` from 1: a row per item that a user is shown."""
    k: int
    depth: int
    """How many items were looked up for a user."""
    ranked_by: str | None
    """Output of the ranking model, where there was a second stage."""


def section(
    run: Run, bundle: Bundle, ranking: Ranking, table: pl.DataFrame, partitions: Sequence[str], drawn: list[Plot]
) -> Html:
    """From the corpus over candidates to the first K, by similarity alone and by what was recommended.

    `table` has the metrics of full ranking; where it has other K than [recommend], they are measured here.
    """
    items, users = table["items"][0], table["users"][0]
    name = ", ".join(partitions)
    published = recommended(run, bundle, name) if len(partitions) == 1 else None  # lists are of one partition's users
    k, depth = (published.k, published.depth) if published else _asked(run.recommend, items)
    if not users:
        return Html()
    if not {k, depth} <= set(table["k"]):
        table = rank_with(
            bundle, replace(ranking, cuts=ranking.cuts.model_copy(update={"k": tuple(sorted({k, depth}))}))
        )
    of = {"candidates": _by_slice(table, depth), "similarity": _by_slice(table, k)}
    stages = {"candidates": Stage("candidates by similarity", depth, of["candidates"]["all"] or 0.0),
              "similarity": Stage("by similarity alone", k, of["similarity"]["all"] or 0.0)}  # fmt: skip
    if published is not None:
        of["shown"] = recall_of(published.lists, ranking)
        by = "as recommended" if published.ranked_by is None else f"ranked by {published.ranked_by}"
        stages["shown"] = Stage(by, k, of["shown"]["all"] or 0.0)
        if published.ranked_by is None:
            del stages["similarity"]  # it is what was recommended
    if depth == k:
        del stages["candidates"]
    last = [stages[way] for way in ("similarity", "shown") if way in stages]
    before = [Stage("corpus", items, 1.0), *(stages[way] for way in ("candidates",) if way in stages)]
    rows = [
        [which, f"{number:,}", *(page.number(of[way][which], ".4f") for way in stages)]
        for which, number in table.filter(pl.col("k") == k).select("slice", "users").iter_rows()
    ]
    head = ["recall of items", "users", *(f"first {stage.items}, {stage.label}" for stage in stages.values())]
    missing = "" if published else f" Nothing of this bundle is published for {name}: run `recsys recommend`."
    return page.tag(
        "section",
        page.tag("h2", "From the corpus to what is shown"),
        page.tag("p", f"How much of what {users:,} users should get is still there after each stage.{missing}"),
        page.figures(page.figure(drawn, plots.stages("stages", before, last), "Recall after each stage")),
        page.table(head, rows),
        page.tag("p", "What users should get is what the log showed them and they liked. A ranking model that prefers "
                 "what nobody has shown them is measured too low here; only showing it to them can tell.",
                 kind="note"),
    )  # fmt: skip


def recommended(run: Run, bundle: Bundle, name: str) -> Recommended | None:
    """What is published for a partition, if it is of this bundle."""
    target = run.recommendations_path(name)
    if run.retrieval is None or not is_published(target):
        return None
    folder = resolve(target, KIND)
    about = read_manifest(folder).about
    if about["bundle"] != bundle.version:
        return None
    raw = {"user": pl.col(run.retrieval.user), "item": pl.col(run.retrieval.item), "place": pl.col(PLACE)}
    lists = pl.scan_parquet(folder / "part-*.parquet").select(**raw).collect(engine="streaming")
    return Recommended(lists, about["k"], about["depth"], about.get("ranking", {}).get("by"))


def _asked(recommend: Recommend, items: int) -> tuple[int, int]:
    """K and depth of what may be published yet: of a smaller corpus all items."""
    candidates = recommend.candidates and min(recommend.candidates, items)
    fitting = recommend.model_copy(update={"k": min(recommend.k, items), "candidates": candidates})
    return fitting.k, fitting.depth(items)


def _by_slice(table: pl.DataFrame, k: int) -> Mapping[str, float | None]:
    return dict(table.filter(pl.col("k") == k).select("slice", "recall").iter_rows())


def recall_of(lists: pl.DataFrame, ranking: Ranking) -> dict[str, float | None]:
    """By slice, the mean over users of the share of their relevant items of it that are listed; None without users."""
    corpus = pl.read_parquet(ranking.folder / ITEMS, columns=[ITEM]).with_row_index(_PLACE)
    places = corpus.with_columns(pl.col(_PLACE).cast(pl.Int32), pl.Series("slice", ranking.slices()))
    asked = pl.read_parquet(ranking.folder / USERS, columns=[USER, RELEVANT])
    wanted = asked.explode(RELEVANT, empty_as_null=False, keep_nulls=False).join(
        places, left_on=RELEVANT, right_on=_PLACE, how="left"
    )
    shown = lists.select(pl.col("user").alias(USER), pl.col("item").alias(ITEM), pl.lit(True).alias("hit"))
    hits = wanted.join(shown, on=[USER, ITEM], how="left").with_columns(pl.col("hit").fill_null(False))
    found: dict[str, float | None] = {}
    for i, name in enumerate(SLICES):
        inside = hits if name == "all" else hits.filter(pl.col("slice") == i)
        mean = inside.group_by(USER).agg(pl.col("hit").mean())["hit"].mean()
        found[name] = float(mean) if isinstance(mean, float) else None
    return found
