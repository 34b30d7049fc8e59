"""The synthetic log: repeatable day by day, as announced in its columns, and hiding exactly what it says it hides."""

from datetime import date, timedelta
from functools import cache

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from base.config import parse_config
from base.errors import ConfigError
from features.readers.synthetic import (
    FEATURES,
    INTERACTIONS,
    KEY,
    LABEL,
    LEVELS,
    TRUTH,
    SyntheticConfig,
    day_frame,
    generate_day,
    id_effect,
    planted_effects,
)

CONFIG = SyntheticConfig()
SMALL = SyntheticConfig(rows_per_day=5_000)
MAIN = ["advertiser", "category", "device", "country", "placement", "hour"]
PINNED = [
    (3176909999439872, "u75030", 173, "phone", "education", 1),
    (3176909999439873, "u6901", 4, "phone", "books", 0),
    (3176909999439874, "u104455", 17, "phone", "business", 0),
]
PINNED_PROBABILITY = [0.667439743975, 0.145153928573, 0.204937190699]


def day_of(index: int) -> date:
    return CONFIG.start + timedelta(days=index)


@cache
def five_days() -> pl.DataFrame:
    return pl.concat([day_frame(CONFIG, day_of(index)) for index in range(5)])


def user_numbers(frame: pl.DataFrame) -> pl.Series:
    return frame["user_id"].str.strip_prefix("u").cast(pl.Int64)


# Repeatable


def test_the_columns_are_as_announced() -> None:
    expected = {
        "impression_id": pl.Int64,
        "day": pl.Date,
        "user_id": pl.String,
        "item_id": pl.Int64,
        "advertiser": pl.String,
        "category": pl.String,
        "device": pl.String,
        "country": pl.String,
        "placement": pl.String,
        "hour": pl.Int64,
        "tags": pl.List(pl.String),
        "price": pl.Float64,
        "age": pl.Int64,
        "recency_hours": pl.Float64,
        "click": pl.Int8,
        "click_probability": pl.Float64,
    }
    assert day_frame(SMALL, SMALL.start).schema == expected
    assert tuple(expected) == (KEY, "day", *FEATURES, LABEL, TRUTH)
    assert len(FEATURES) == 12


@pytest.mark.parametrize("chunk_rows", [1_234, 4_999, 5_000, 1_000_000])
def test_a_day_again_is_the_same_day_whatever_the_chunks(chunk_rows: int) -> None:
    whole = day_frame(SMALL, day_of(3))
    chunks = list(generate_day(SMALL, day_of(3), chunk_rows=chunk_rows))
    assert max(map(len, chunks)) == min(chunk_rows, SMALL.rows_per_day)
    assert pl.concat(chunks).equals(whole, null_equal=True)


def test_a_day_alone_is_the_day_among_others() -> None:
    alone = day_frame(SMALL, day_of(2))
    among = pl.concat([day_frame(SMALL, day_of(index)) for index in (4, 2, 0)])
    assert among.filter(pl.col("day") == day_of(2)).equals(alone, null_equal=True)


def test_a_longer_day_begins_like_a_shorter_one() -> None:
    longer = day_frame(SMALL.model_copy(update={"rows_per_day": 7_000}), day_of(1))
    assert longer.head(5_000).equals(day_frame(SMALL, day_of(1)), null_equal=True)


def test_numbers_are_pinned() -> None:
    frame = day_frame(SMALL, date(2026, 3, 7)).head(3)
    pinned = frame.select("impression_id", "user_id", "item_id", "device", "category", "click").rows()
    assert pinned == PINNED
    assert frame["click_probability"].to_list() == pytest.approx(PINNED_PROBABILITY, abs=1e-9)


def test_another_seed_is_another_log_in_another_world() -> None:
    other = SMALL.model_copy(update={"seed": 1})
    assert not day_frame(other, SMALL.start)["user_id"].equals(day_frame(SMALL, SMALL.start)["user_id"])
    assert not planted_effects(other, INTERACTIONS[0]).equals(planted_effects(SMALL, INTERACTIONS[0]))


# Ids


def test_keys_are_unique_over_days_and_exact_in_a_float() -> None:
    keys = five_days()[KEY]
    assert keys.n_unique() == len(five_days())
    assert keys.cast(pl.Float64).cast(pl.Int64).equals(keys)


def test_five_days_show_more_than_100k_users_some_of_them_often() -> None:
    counts = five_days()["user_id"].value_counts()["count"]
    assert len(counts) > 100_000
    assert (counts > 500).any()


def test_every_day_brings_ids_that_no_earlier_day_had() -> None:
    frame = five_days().with_columns(user_numbers(five_days()).alias("user"))
    for field, first, births, share in (
        ("user", CONFIG.users, 1_500, CONFIG.new_user_share),
        ("item_id", CONFIG.items, 200, CONFIG.new_item_share),
    ):
        for index in range(5):
            born = pl.col(field).is_between(first + index * births, first + (index + 1) * births - 1)
            assert frame.filter(born, pl.col("day") < day_of(index)).is_empty()
            assert frame.filter(pl.col("day") == day_of(index)).select(born.mean()).item() == pytest.approx(
                share, abs=2e-3
            )
        assert (frame[field] < first + 5 * births).all()


def test_what_belongs_to_an_id_never_changes() -> None:
    frame = five_days()
    for owner, field in (("item_id", "category"), ("item_id", "advertiser"), ("item_id", "tags"), ("user_id", "age")):
        values = frame.drop_nulls(field).group_by(owner).agg(pl.col(field).n_unique())
        assert values[field].max() == 1, field
    assert frame.group_by("user_id").agg(pl.col("country").n_unique())["country"].max() == 1


def test_an_effect_depends_on_the_id_alone() -> None:
    ids = np.array([3, 151_000, 7])
    together = id_effect(CONFIG, "user_id", ids)
    assert together[1] == id_effect(CONFIG, "user_id", ids[1:2])[0]
    assert not np.array_equal(together, id_effect(CONFIG, "item_id", ids))
    assert id_effect(CONFIG, "user_id", np.arange(100_000)).std() == pytest.approx(0.25, abs=0.003)


# Missing values


def test_missing_shares_are_as_announced() -> None:
    shares = five_days().select(pl.all().is_null().mean()).row(0, named=True)
    announced = {"price": 0.05, "age": 0.10, "advertiser": 0.02, "tags": 0.03}
    for name, share in shares.items():
        assert share == pytest.approx(announced.get(name, 0), abs=5e-3), name
    for name in ("price", "recency_hours", TRUTH):
        assert five_days()[name].is_finite().all()


def test_bags_hold_none_to_five_tags_and_no_tag_twice() -> None:
    tags = five_days()["tags"].drop_nulls()
    assert sorted(tags.list.len().unique()) == [0, 1, 2, 3, 4, 5]
    assert tags.list.n_unique().equals(tags.list.len())
    assert set(tags.explode().drop_nulls()) == set(LEVELS["tags"])


# The truth


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.6])
def test_the_mean_probability_is_the_click_rate(rate: float) -> None:
    frame = day_frame(SyntheticConfig(click_rate=rate, rows_per_day=200_000, seed=7), day_of(0))
    assert frame[TRUTH].mean() == pytest.approx(rate, rel=0.015)
    assert frame[LABEL].mean() == pytest.approx(rate, rel=0.03)


def test_clicks_are_drawn_from_their_probabilities() -> None:
    bins = (
        five_days()
        .group_by((pl.col(TRUTH) * 20).floor())
        .agg(
            error=(pl.col(LABEL) - pl.col(TRUTH)).sum(),
            deviation=(pl.col(TRUTH) * (1 - pl.col(TRUTH))).sum().sqrt(),
        )
    )
    assert len(bins) == 20
    assert ((bins["error"] / bins["deviation"]).abs() < 4).all()


@pytest.mark.parametrize("pair", INTERACTIONS)
def test_no_level_of_an_interaction_has_a_main_effect(pair: tuple[str, str]) -> None:
    effects = planted_effects(CONFIG, pair)
    assert len(effects) == len(LEVELS[pair[0]]) * len(LEVELS[pair[1]])
    log = five_days().join(effects, on=pair, how="left", validate="m:1")
    assert log["effect"].std() == pytest.approx(1, abs=0.02)
    for field in pair:
        levels = log.group_by(field).agg(mean=pl.col("effect").mean(), error=pl.col("effect").std() / pl.len().sqrt())
        assert (levels["mean"].abs() < 0.01 + 4 * levels["error"]).all()


def test_a_linear_model_sees_the_interactions_only_as_planted_crosses() -> None:
    crossed = five_days().select(
        pl.col(MAIN).cast(pl.String).fill_null("?"),
        *(pl.concat_str(pair, separator="/").alias("/".join(pair)) for pair in INTERACTIONS),
    )
    crosses = ["/".join(pair) for pair in INTERACTIONS]
    click, truth = five_days()[LABEL].to_numpy(), five_days()[TRUTH].to_numpy()
    seen = np.arange(len(click)) % 5 < 3  # 300k rows to fit, 200k to measure

    def auc(columns: list[str]) -> float:
        hot = sparse.csr_matrix(OneHotEncoder().fit_transform(crossed.select(columns).to_numpy()))
        model = LogisticRegression(max_iter=30, tol=1e-3).fit(hot[seen], click[seen])
        return float(roc_auc_score(click[~seen], model.decision_function(hot[~seen])))

    oracle = float(roc_auc_score(click[~seen], truth[~seen]))
    linear, planted = auc(MAIN), auc([*MAIN, *crosses])
    assert 0.80 < oracle < 0.85
    assert linear < oracle - 0.15
    assert planted - linear > 0.85 * (oracle - linear)


# Refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rows_per_day", 0), ("rows_per_day", 1 << 32), ("users", 3), ("items", 0), ("seed", -1), ("start", "soon")),
        *(("click_rate", 0.0), ("click_rate", 1.0), ("new_user_share", 1.5), ("new_item_share", -0.1)),
        ("clickrate", 0.2),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config(SyntheticConfig, {key: value}, source="run.toml")


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        SMALL.seed = 1  # type: ignore[misc]


def test_a_day_before_the_first_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"2026-02-28.*2026-03-01"):
        generate_day(SMALL, date(2026, 2, 28))


def test_an_empty_chunk_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="chunk_rows = 0"):
        generate_day(SMALL, SMALL.start, chunk_rows=0)
