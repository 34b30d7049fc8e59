"""The report's section on two stages: how much of what users should get is left after each of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import polars as pl

from pipelines import page, plots
from pipelines.evaluate import rank_with
from pipelines.page import Html
from pipelines.plots import Plot, Stage
from recsys.bundle import Bundle
from recsys.retrieval import ITEM, ITEMS, RELEVANT, SLICES, USER, USERS, Ranking

_PLACE = "@place"


@dataclass(frozen=True)
class Recommended:
    """What was published for the users of a partition."""

    lists: pl.DataFrame
    """Columns of RECOMMENDED."""
    ranked_by: str | None
    """Output of the ranking model, where there was a second stage."""


RECOMMENDED = ("user", "item")


def section(
    bundle: Bundle,
    ranking: Ranking,
    table: pl.DataFrame,
    k: int,
    candidates: int,
    recommended: Recommended | None,
    drawn: list[Plot],
) -> Html:
    """From the corpus over candidates to the first `k`, by similarity alone and by what was recommended.

    `table` has the metrics of full ranking; where it has other K than these, they are measured here.
    """
    if not {k, candidates} <= set(table["k"]):
        cuts = ranking.cuts.model_copy(update={"k": (k, candidates)})
        table = rank_with(bundle, replace(ranking, cuts=cuts))
    found = {name: _by_slice(table, depth) for name, depth in (("candidates", candidates), ("similarity", k))}
    ways = {"similarity": f"first {k} by similarity alone"}
    if recommended is not None:
        found["recommended"] = recall_of(recommended.lists, ranking)
        by = f"ranked by {recommended.ranked_by}" if recommended.ranked_by else "as published"
        ways["recommended"] = f"first {k} {by}"
    items, users = table["items"][0], table["users"][0]
    before = [Stage("corpus", items, 1.0), Stage("candidates by similarity", candidates, found["candidates"]["all"])]
    last = [Stage(label, k, found[way]["all"]) for way, label in ways.items()]
    drawing = plots.stages("stages", before, last)
    head = ["items", "users", f"in the first {candidates}", *(label.removeprefix("first ") for label in ways.values())]
    rows = [
        [name, f"{of:,}", *(page.number(found[way].get(name), ".4f") for way in found)]
        for name, of in table.filter(pl.col("k") == k).select("slice", "users").iter_rows()
    ]
    missing = (
        ""
        if recommended is not None
        else " Nothing is published for these users by this model; run `recsys recommend`."
    )
    return page.tag(
        "section",
        page.tag("h2", "From the corpus to what is shown"),
        page.tag("p", f"How much of what {users:,} users should get is still there after each stage.{missing}"),
        page.figures(page.figure(drawn, drawing, "Recall after each stage")),
        page.table(head, rows),
        page.tag("p", "What users should get is what they were shown in the log and liked. A ranking model that "
                 "prefers what nobody has shown them is measured too low here; only showing it to them can tell.",
                 kind="note"),
    )  # fmt: skip


def _by_slice(table: pl.DataFrame, k: int) -> Mapping[str, float | None]:
    return dict(table.filter(pl.col("k") == k).select("slice", "recall").iter_rows())


def recall_of(lists: pl.DataFrame, ranking: Ranking) -> dict[str, float | None]:
    """By slice, the mean over users of the share of their relevant items of it that `lists` have; None without users.

    `lists` has the raw values of RECOMMENDED, a row per item that a user is shown.
    """
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
