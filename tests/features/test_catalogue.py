"""The catalogue's log: repeatable day by day, with features in groups and a long tail, and a truth that it follows."""

from datetime import date, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from base.config import parse_config
from base.errors import ConfigError
from base.storage import read_manifest
from features.readers.catalogue import (
    GROUPS,
    ITEM_FEATURES,
    KEY,
    LABEL,
    TRUTH,
    USER_FEATURES,
    CatalogueConfig,
    Truth,
    click_probability,
    day_frame,
    generate_day,
    generate_items,
    group_values,
    item_frame,
)
from features.schema import Dense, Sparse
from pipelines.cli import main
from recsys.contrast.information import mutual_information

CONFIG = CatalogueConfig()
SMALL = CatalogueConfig(rows_per_day=5_000)
DENSE = CatalogueConfig(rows_per_day=1_000_000, users=100, items=150, themes=20)
"""So few users and items that every pair is seen often."""
PINNED_ROWS = [(10004, 4850, 0), (920, 862, 0), (13927, 2364, 0)]
PINNED_CHANCES = [0.07230067064840573, 0.0017250396220023507, 0.037443103937744075]
PINNED_ITEM = (
    12345,
    "cooking",
    "category 31",
    "shelf 62",
    ["tag 69", "tag 50", "tag 15"],
    "brand 29",
    "series 113",
    "line 226",
    "seller 9",
    "pink",
    "paper",
    "marbled",
    ["word 46", "word 56"],
    "band 6",
    "standard",
    "five years",
    14.41,
)


def day_of(index: int) -> date:
    return CONFIG.start + timedelta(days=index)


@cache
def days(number: int) -> pl.DataFrame:
    return pl.concat([day_frame(CONFIG, day_of(index)) for index in range(number)])


@cache
def items() -> pl.DataFrame:
    return pl.concat(generate_items(CONFIG, day_of(0)))


# Repeatable


def test_the_columns_are_as_announced() -> None:
    frame = day_frame(SMALL, SMALL.start)
    assert frame.schema == {
        "impression_id": pl.Int64,
        "day": pl.Date,
        "user_id": pl.Int64,
        "segment": pl.String,
        "age": pl.Int64,
        "country": pl.String,
        "device": pl.String,
        "item_id": pl.Int64,
        "click": pl.Int8,
        "click_probability": pl.Float64,
    }
    assert tuple(frame.columns) == (KEY, "day", "user_id", *USER_FEATURES, "item_id", LABEL, TRUTH)
    assert frame[KEY].n_unique() == frame.height
    bags = dict.fromkeys(("tags", "words"), pl.List(pl.String))
    texts = dict.fromkeys(ITEM_FEATURES, pl.String)
    assert items().schema == {"item_id": pl.Int64} | texts | bags | {"price": pl.Float64}
    assert len(ITEM_FEATURES) == 16


@pytest.mark.parametrize("chunk_rows", [1_234, 4_999, 1_000_000])
def test_a_day_again_is_the_same_day_whatever_the_chunks(chunk_rows: int) -> None:
    whole = day_frame(SMALL, day_of(3))
    chunks = list(generate_day(SMALL, day_of(3), chunk_rows=chunk_rows))
    assert max(map(len, chunks)) == min(chunk_rows, SMALL.rows_per_day)
    assert pl.concat(chunks).equals(whole, null_equal=True)
    among = pl.concat([day_frame(SMALL, day_of(index)) for index in (4, 3, 0)])
    assert among.filter(pl.col("day") == day_of(3)).equals(whole, null_equal=True)


def test_items_again_are_the_same_whatever_the_chunks_and_the_day() -> None:
    parts = list(generate_items(CONFIG, day_of(4), chunk_rows=7_001))
    assert max(map(len, parts)) == 7_001
    later = pl.concat(parts)
    assert later.height == CONFIG.items_by(day_of(4)) == 20_000 + 5 * 200
    assert later["item_id"].to_list() == list(range(21_000))
    assert later.head(items().height).equals(items(), null_equal=True)
    some = np.array([17, 3, 20_999])
    assert item_frame(CONFIG, some).equals(later[some], null_equal=True)


def test_numbers_are_pinned() -> None:
    first = day_frame(SMALL, day_of(6)).head(3)
    assert first.select("user_id", "item_id", "click").rows() == PINNED_ROWS
    assert first[TRUTH].to_list() == pytest.approx(PINNED_CHANCES, abs=1e-9)
    assert item_frame(SMALL, np.array([12_345])).row(0) == PINNED_ITEM


def test_another_seed_is_another_log_in_another_world() -> None:
    other = SMALL.model_copy(update={"seed": 1})
    assert not day_frame(other, SMALL.start)["item_id"].equals(day_frame(SMALL, SMALL.start)["item_id"])
    assert not item_frame(other, np.arange(50)).equals(items().head(50))


# Features


def test_a_user_and_an_item_never_change() -> None:
    users = days(5).select("user_id", *USER_FEATURES).unique()
    assert users["user_id"].is_unique().all()
    assert users["age"].null_count() / users.height == pytest.approx(0.1, abs=0.01)
    assert users["age"].drop_nulls().is_between(16, 90).all()


def test_missing_shares_and_bags_are_as_announced() -> None:
    shares = items().select(pl.all().is_null().mean()).row(0, named=True)
    announced = {"tags": 0.03, "series": 0.03, "seller": 0.05, "material": 0.10, "price": 0.05}
    for name, share in shares.items():
        assert share == pytest.approx(announced.get(name, 0), abs=6e-3), name
    for name, slots in (("tags", 4), ("words", 3)):
        bags = items()[name].drop_nulls()
        assert sorted(bags.list.len().unique()) == list(range(slots + 1))
        assert bags.list.n_unique().equals(bags.list.len())


@pytest.mark.slow
def test_features_of_a_group_tell_more_of_each_other_than_of_other_groups() -> None:
    """Mutual information, of single values as a share of the smaller entropy, of every feature."""
    config = CatalogueConfig(items=200_000, themes=2_000)  # so many that chance tells little
    bags = ("tags", "words")
    fields = [
        Dense(name=name) if name == "price" else Sparse(name=name, rows=1000, multi=name in bags)
        for name in ITEM_FEATURES
    ]
    frame = pl.concat(generate_items(config, config.start)).with_columns(
        pl.col(bags).fill_null([]), pl.col("price").fill_null(0.0), pl.col(pl.String).fill_null("")
    )
    found_SS = mutual_information(frame, fields)
    entropy_S = np.array([1.0 if name in bags else entropy(frame[name]) for name in ITEM_FEATURES])
    share_SS = found_SS / np.minimum(entropy_S[:, None], entropy_S)
    group_S = np.array([group for group, names in GROUPS.items() for _ in names])
    is_bag_S = np.isin(ITEM_FEATURES, bags)
    for i, name in enumerate(ITEM_FEATURES):
        others_S = (np.arange(len(ITEM_FEATURES)) != i) & ~is_bag_S
        own, rest = (share_SS[i, others_S & (group_S == group_S[i])], share_SS[i, others_S & (group_S != group_S[i])])
        assert own.min() > (2 if name in bags else 3) * rest.max(), name
    assert 0.02 < share_SS[0, ITEM_FEATURES.index("series")] < 0.2  # through the theme, groups tell of each other too


def entropy(values: pl.Series) -> float:
    """In nats; of numbers, of sixteen equal parts."""
    if values.dtype.is_float():
        return np.log(16)
    share = values.value_counts()["count"].to_numpy() / len(values)
    return float(-(share * np.log(share)).sum())


@pytest.mark.parametrize("group", GROUPS)
def test_an_item_mostly_has_its_themes_value(group: str) -> None:
    values = group_values(CONFIG, group, np.arange(20_000))
    themes = pl.DataFrame({"theme": np.arange(20_000) % CONFIG.themes, "value": values})
    modal = themes.group_by("theme").agg((pl.col("value") == pl.col("value").mode().first()).mean())["value"]
    assert modal.mean() == pytest.approx(0.71, abs=0.05)


# The tail


def test_popularity_has_a_long_tail() -> None:
    counts = days(5)["item_id"].value_counts()["count"].sort(descending=True)
    assert 0.35 < counts.head(2_000).sum() / len(days(5)) < 0.65
    assert counts.len() > 15_000
    assert (counts <= 10).sum() > 0.3 * counts.len()
    # A power law: the logarithm of the count falls about evenly with that of the place.
    places = np.array([30, 300, 3_000])
    slopes = np.diff(np.log(counts.to_numpy()[places])) / np.diff(np.log(places))
    assert (slopes < -0.3).all()
    assert (slopes > -1.5).all()


def test_every_day_brings_ids_that_no_earlier_day_had() -> None:
    for field, first in (("user_id", CONFIG.users), ("item_id", CONFIG.items)):
        births = first // 100
        for index in range(5):
            born = pl.col(field).is_between(first + index * births, first + (index + 1) * births - 1)
            assert days(5).filter(born, pl.col("day") < day_of(index)).is_empty()
            assert days(5).filter(born, pl.col("day") == day_of(index)).height > 500
        assert days(5)[field].is_between(0, first + 5 * births - 1).all()


# The truth


@pytest.mark.slow
def test_frequencies_follow_the_exposures() -> None:
    """Of every user's impressions, the share that shows each item; chi-square per degree of freedom is about 1."""
    day = 1
    frame = day_frame(DENSE, day_of(day))
    number = DENSE.items_by(day_of(day))
    users = np.arange(DENSE.users + 2)
    truth = Truth(DENSE, np.arange(number + 5), day)
    share_UI = truth.exposures(users).astype(np.float64)
    np.testing.assert_allclose(share_UI.sum(1), 1, atol=1e-5)
    assert (share_UI[:, number:] == 0).all()  # not born yet
    shown_UI = np.zeros(share_UI.shape)
    np.add.at(shown_UI, (frame["user_id"].to_numpy(), frame["item_id"].to_numpy()), 1)
    expected_UI = share_UI * shown_UI.sum(1, keepdims=True)
    often = expected_UI > 20
    assert often.sum() > 4_000
    chi_square = ((shown_UI - expected_UI)[often] ** 2 / expected_UI[often]).mean()
    assert chi_square == pytest.approx(1, abs=0.05)
    assert shown_UI[expected_UI == 0].sum() == 0


@pytest.mark.slow
def test_clicks_follow_the_probabilities_of_pairs_and_of_matrices() -> None:
    frame = day_frame(DENSE, day_of(0))
    users, shown = frame["user_id"].to_numpy(), frame["item_id"].to_numpy()
    pairs = click_probability(DENSE, users, shown)
    np.testing.assert_array_equal(pairs, frame[TRUTH].to_numpy())
    truth = Truth(DENSE, np.arange(DENSE.items_by(day_of(0))), 0)
    matrix = truth.click_probabilities(np.arange(DENSE.users + 1))
    np.testing.assert_allclose(matrix[users, shown], pairs, atol=1e-5)
    expected = truth.expected_clicks(np.arange(3))
    np.testing.assert_allclose(expected, matrix[:3] * truth.exposures(np.arange(3)), rtol=1e-5)
    bins = frame.group_by((pl.col(TRUTH) * 20).floor()).agg(
        error=(pl.col(LABEL) - pl.col(TRUTH)).sum(), deviation=(pl.col(TRUTH) * (1 - pl.col(TRUTH))).sum().sqrt()
    )
    assert bins.height > 15
    assert ((bins["error"] / bins["deviation"]).abs() < 4).all()


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_the_mean_probability_is_the_click_rate(rate: float) -> None:
    frame = day_frame(CatalogueConfig(click_rate=rate, rows_per_day=200_000, seed=3), day_of(0))
    assert frame[TRUTH].mean() == pytest.approx(rate, abs=0.005)
    assert frame[LABEL].mean() == pytest.approx(rate, abs=0.01)


def test_features_explain_most_of_an_items_appeal() -> None:
    """Items with the same values of all groups differ by their own part alone: so tail and cold items can be known."""
    number = 4_000
    truth = Truth(CONFIG, np.arange(number), 0)
    p_UI = truth.click_probabilities(np.arange(100, 300)).astype(np.float64)
    logit_UI = np.log(p_UI / (1 - p_UI))
    logit_UI -= logit_UI.mean(1, keepdims=True)
    values = np.stack([group_values(CONFIG, group, np.arange(number)) for group in GROUPS], axis=1)
    key = pl.DataFrame({"theme": np.arange(number) % CONFIG.themes, **{f"{i}": v for i, v in enumerate(values.T)}})
    same = key.with_row_index("place").group_by(key.columns).agg("place").filter(pl.col("place").list.len() > 1)
    inside = np.mean([logit_UI[:, places.to_numpy()].var(axis=1, ddof=1).mean() for places in same["place"]])
    assert same.height > 50
    assert 0.02 < inside / logit_UI.var(axis=1).mean() < 0.25


def test_the_best_ranking_is_that_by_expected_clicks() -> None:
    """It finds more of a later day's clicks than popularity, or the probability of a click alone."""
    config = CatalogueConfig(users=300, items=2_000, themes=50, rows_per_day=60_000)
    frame = day_frame(config, day_of(1))
    clicked = frame.filter(pl.col(LABEL) == 1).select("user_id", "item_id").unique()
    users = np.arange(300)
    truth = Truth(config, np.arange(config.items_by(day_of(1))), 1)
    counts = np.bincount(day_frame(config, day_of(0))["item_id"].to_numpy(), minlength=config.items_by(day_of(1)))
    found = {
        "expected": hits(truth.expected_clicks(users), clicked),
        "probability": hits(truth.click_probabilities(users), clicked),
        "popularity": hits(np.tile(counts, (300, 1)), clicked),
    }
    assert found["expected"] > 2 * found["popularity"]
    assert found["expected"] > 2 * found["probability"]


def hits(score_UI: np.ndarray, clicked: pl.DataFrame) -> float:
    """Share of the clicks that are among each user's first 20."""
    top_UK = np.argsort(-score_UI, axis=1, kind="stable")[:, :20]
    shown = pl.DataFrame({"user_id": np.repeat(np.arange(len(top_UK)), 20), "item_id": top_UK.ravel()})
    return clicked.join(shown, on=["user_id", "item_id"], how="semi").height / clicked.height


# The command line


def generate(folder: Path, *arguments: str) -> str:
    given = [f"--out={folder}", "--rows=300", "--items=500", "--themes=20", *arguments]
    result = CliRunner().invoke(main, ["generate", "--kind=retrieval", *given])
    return f"{result.exit_code}: {result.output}"


def test_the_command_line_writes_days_and_items_beside_them(tmp_path: Path) -> None:
    config = CatalogueConfig(rows_per_day=300, items=500, themes=20)
    assert generate(tmp_path, "--days=2026-03-02..2026-03-03").startswith("0: items: 515\nday=2026-03-02: 300")
    catalogue = pl.read_parquet(tmp_path / "items/*.parquet")
    assert catalogue.equals(pl.concat(generate_items(config, date(2026, 3, 3))), null_equal=True)
    found = pl.read_parquet(tmp_path / "day=2026-03-03/*.parquet", hive_partitioning=False)
    assert found.equals(day_frame(config, date(2026, 3, 3)).drop("day"))
    version = (tmp_path / "items").resolve()
    assert generate(tmp_path, "--days=2026-03-01").startswith("0: day=2026-03-01")  # items go further already
    assert (tmp_path / "items").resolve() == version
    assert generate(tmp_path, "--days=2026-03-04").startswith("0: items: 520")
    assert read_manifest((tmp_path / "items").resolve()).about["through"] == "2026-03-04"


def test_items_of_another_world_are_not_replaced_unasked(tmp_path: Path) -> None:
    generate(tmp_path, "--days=2026-03-01")
    refused = generate(tmp_path, "--days=2026-03-02", "--seed=1")
    assert refused.startswith("2: ")
    assert "holds the items of other settings; pass --overwrite" in refused
    assert not (tmp_path / "day=2026-03-02").exists()
    assert generate(tmp_path, "--days=2026-03-02", "--seed=1", "--overwrite").startswith("0: items: 510")


def test_an_option_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    assert "unknown key taste" in generate(tmp_path, "--days=2026-03-01", "--taste=1")
    result = CliRunner().invoke(main, ["generate", f"--out={tmp_path}", "--days=2026-03-01", "--themes=20"])
    assert result.exit_code == 2
    assert "unknown key themes" in result.output


# Refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rows_per_day", 0), ("users", 3), ("items", 0), ("themes", 3), ("seed", -1), ("start", "soon")),
        *(("click_rate", 0.0), ("click_rate", 1.0), ("new_user_share", 1.5), ("new_item_share", -0.1), ("taste", 1.0)),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config(CatalogueConfig, {key: value}, source="run.toml")


def test_a_theme_has_an_item() -> None:
    with pytest.raises(ConfigError, match=r"themes = 200: there are 150 items"):
        parse_config(CatalogueConfig, {"themes": 200, "items": 150}, source="run.toml")


def test_a_day_before_the_first_and_an_empty_chunk_are_refused_at_once() -> None:
    early = date(2026, 2, 28)
    for made in (generate_day, generate_items):
        with pytest.raises(ConfigError, match=r"2026-02-28.*2026-03-01"):
            made(SMALL, early)
        with pytest.raises(ConfigError, match="chunk_rows = 0"):
            made(SMALL, SMALL.start, chunk_rows=0)
