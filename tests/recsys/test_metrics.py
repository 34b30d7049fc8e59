"""Metrics: against scikit-learn, torchrec and slow definitions; properties; slices; what the errors say."""

import datetime
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from random import Random

import numpy as np
import polars as pl
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from base.errors import ConfigError, DataError
from recsys.metrics import (
    CLIP,
    MAX_SLICES,
    Output,
    WeightedAuc,
    calibration_curve,
    calibration_ratio,
    evaluate,
    expected_calibration_error,
    grouped_auc,
    headline,
    in_space,
    log_loss,
    normalized_entropy,
    population_stability,
    roc_auc,
    roc_curve,
)

CLICK = Output(name="p_click", label="click")

# A coarse grid of scores, so that most examples have ties.
rows = st.lists(st.tuples(st.integers(0, 1), st.integers(-5, 5), st.integers(0, 4)), min_size=1, max_size=60)
relaxed = settings(deadline=None)


def clicks(count: int, rate: float, seed: int = 0, distinct: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn with probabilities around `rate`, and these, rounded to `distinct` values if given."""
    random = np.random.default_rng(seed)
    p_N = random.beta(2.0, 2.0 / rate - 2.0, count)
    y_N = (random.random(count) < p_N).astype(np.int8)
    if distinct is not None:
        top = p_N.max()
        p_N = np.round(p_N / top * distinct) / distinct * top
    return y_N, p_N


def columns(found: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y_N, s_N, g_N = (np.array(column) for column in zip(*found, strict=True))
    return y_N, s_N, g_N


def message(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


# AUC


@pytest.mark.parametrize("rate", [0.0005, 0.03, 0.5, 0.9])
@pytest.mark.parametrize("distinct", [None, 30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc_equals_scikit_learn(rate: float, distinct: int | None, dtype: type) -> None:
    y_N, p_N = clicks(100_000, rate, seed=1, distinct=distinct)
    p_N = p_N.astype(dtype)
    assert 10 < y_N.sum() < y_N.size - 10
    assert roc_auc(y_N, p_N) == pytest.approx(sklearn.metrics.roc_auc_score(y_N, p_N), abs=1e-12)


@relaxed
@given(rows)
def test_auc_is_the_share_of_pairs_won(found: list[tuple[int, int, int]]) -> None:
    y_N, s_N, _ = columns(found)
    pairs = [(a > b) + (a == b) / 2 for a in s_N[y_N == 1] for b in s_N[y_N == 0]]
    if pairs:
        assert roc_auc(y_N, s_N) == sum(pairs) / len(pairs)
    else:
        assert math.isnan(roc_auc(y_N, s_N))


@relaxed
@given(rows, st.randoms(use_true_random=False))
def test_auc_sees_only_the_order_of_scores(found: list[tuple[int, int, int]], random: Random) -> None:
    y_N, s_N, _ = columns(found)
    expected = roc_auc(y_N, s_N)
    for mapped_N in (s_N * 3 + 100, s_N.astype(float) ** 3, np.exp(s_N), 1 / (1 + np.exp(-s_N / 7.0))):
        assert roc_auc(y_N, mapped_N) == pytest.approx(expected, nan_ok=True, abs=0)
    shuffled = list(range(len(found)))
    random.shuffle(shuffled)
    assert roc_auc(y_N[shuffled], s_N[shuffled]) == pytest.approx(expected, nan_ok=True, abs=0)
    assert roc_auc(1 - y_N, s_N) == pytest.approx(1 - expected, nan_ok=True)
    assert roc_auc(y_N, -s_N) == pytest.approx(1 - expected, nan_ok=True)


def test_auc_at_the_edges() -> None:
    assert roc_auc([0, 1], [0.1, 0.2]) == 1
    assert roc_auc([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5]) == 0.5
    assert roc_auc([0, 1], [-0.0, 0.0]) == 0.5
    assert roc_auc([0, 0, 1], [-math.inf, 3.0, math.inf]) == 1
    assert roc_auc(pl.Series([False, True]), pl.Series([0.3, 0.1])) == 0
    for one_class in ([], [0, 0], [1, 1, 1]):
        assert math.isnan(roc_auc(one_class, np.linspace(0, 1, len(one_class))))


def test_auc_of_one_positive_in_two_thousand_is_its_rank() -> None:
    for below in (0, 7, 1999):
        s_N = np.arange(2000) / 2000
        y_N = np.arange(2000) == below
        assert roc_auc(y_N, s_N) == below / 1999


def test_auc_of_rare_positives_keeps_what_bins_lose() -> None:
    """All probabilities under 0.005, where 200 bins of equal width see a single value."""
    y_N, p_N = clicks(400_000, 0.0005, seed=3)
    p_N = np.minimum(p_N, 0.00499)
    assert 120 < y_N.sum() < 280
    exact = roc_auc(y_N, p_N)
    assert exact == pytest.approx(sklearn.metrics.roc_auc_score(y_N, p_N), abs=1e-12)
    assert exact > 0.6
    assert roc_auc(y_N, np.floor(p_N * 200)) == 0.5


def test_bad_arguments_of_auc_are_named() -> None:
    assert message(lambda: roc_auc([0, 1, 2, -1], [0.0] * 4)) == (
        "2 of 4 labels are neither 0 nor 1 (the first is 2); make the label binary, and null where it is not yet known"
    )
    assert message(lambda: roc_auc([0, 1], [0.1, math.nan])) == (
        "1 of 2 scores are NaN and have no rank; remove the rows or the cause"
    )
    assert message(lambda: roc_auc([0, 1], [0.1])) == (
        "arrays of unequal lengths [2, 1]; give one value for each row in all of them"
    )
    assert message(lambda: roc_auc([[0, 1]], [0.1, 0.2])) == (
        "labels have shape (1, 2); give one dimension, one value for each row"
    )


# AUC within groups


@relaxed
@given(rows)
def test_grouped_auc_equals_a_loop_over_groups(found: list[tuple[int, int, int]]) -> None:
    y_N, s_N, g_N = columns(found)
    total = weight = 0.0
    for group in set(g_N.tolist()):
        inside = g_N == group
        if 0 < y_N[inside].sum() < inside.sum():
            total += inside.sum() * sklearn.metrics.roc_auc_score(y_N[inside], s_N[inside])
            weight += inside.sum()
    expected = total / weight if weight else math.nan
    assert grouped_auc(y_N, s_N, g_N) == pytest.approx(expected, nan_ok=True)
    assert grouped_auc(y_N, s_N, np.array([f"user {group}" for group in g_N])) == pytest.approx(expected, nan_ok=True)


def test_grouped_auc_equals_a_loop_on_many_users() -> None:
    y_N, p_N = clicks(20_000, 0.1, seed=4, distinct=50)
    g_N = np.random.default_rng(4).zipf(1.5, y_N.size) % 700
    frame = pl.DataFrame({"y": y_N, "p": p_N, "g": g_N})
    parts = [(len(part), roc_auc(part["y"], part["p"])) for part in frame.partition_by("g")]
    both = [(count, auc) for count, auc in parts if not math.isnan(auc)]
    assert 10 < len(both) < len(parts)
    expected = sum(count * auc for count, auc in both) / sum(count for count, _ in both)
    assert grouped_auc(y_N, p_N, g_N) == pytest.approx(expected, rel=1e-12)


def test_grouped_auc_at_the_edges() -> None:
    y_N, p_N = clicks(5_000, 0.2, seed=5)
    assert grouped_auc(y_N, p_N, np.zeros(y_N.size)) == roc_auc(y_N, p_N)
    assert math.isnan(grouped_auc([], [], []))
    assert math.isnan(grouped_auc([0, 1], [0.1, 0.2], ["a", "b"]))
    # A user's level does not matter, only the order inside: perfect for both users, not so over all.
    assert grouped_auc([0, 1, 0, 1], [0.1, 0.2, 0.8, 0.9], [1, 1, 2, 2]) == 1
    assert roc_auc([0, 1, 0, 1], [0.1, 0.2, 0.8, 0.9]) == 0.75


# Log loss and normalized entropy


@pytest.mark.parametrize("rate", [0.0005, 0.03, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_loss_equals_scikit_learn(rate: float, dtype: type) -> None:
    y_N, p_N = clicks(100_000, rate, seed=6)
    p_N = np.clip(p_N, 1e-6, 1 - 1e-6).astype(dtype)
    expected = sklearn.metrics.log_loss(y_N, p_N.astype(np.float64))
    assert log_loss(y_N, p_N) == pytest.approx(expected, rel=1e-12)


def test_log_loss_at_the_edges() -> None:
    assert log_loss([1, 0], [0.0, 1.0]) == pytest.approx(-math.log(CLIP))
    assert log_loss(np.array([1]), np.array([1.0], np.float32)) == pytest.approx(CLIP, rel=1e-6)
    assert math.isnan(log_loss([], []))
    assert log_loss([1], [0.5]) == math.log(2)


def test_normalized_entropy_of_the_mean_is_one_and_of_a_better_model_less() -> None:
    y_N, p_N = clicks(50_000, 0.05, seed=7)
    assert normalized_entropy(y_N, np.full(y_N.size, y_N.mean())) == pytest.approx(1, abs=1e-12)
    assert normalized_entropy(y_N, p_N) < 1
    assert normalized_entropy(y_N, np.clip(p_N * 3, 0, 1)) > normalized_entropy(y_N, p_N)
    rate = y_N.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert normalized_entropy(y_N, p_N) == pytest.approx(log_loss(y_N, p_N) / entropy, rel=1e-12)


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
def test_normalized_entropy_of_one_class_is_nan(labels: list[int]) -> None:
    assert math.isnan(normalized_entropy(labels, [0.3] * len(labels)))


@pytest.mark.parametrize("metric", [log_loss, normalized_entropy, calibration_ratio, expected_calibration_error])
def test_what_is_no_probability_is_refused(metric: Callable[..., float]) -> None:
    assert message(lambda: metric([0, 1, 1], [0.1, 1.5, -2.0])) == (
        "2 of 3 values are not probabilities (2 outside [0, 1], the first is 1.5); give probabilities, not logits"
    )
    assert message(lambda: metric([0, 1], [0.1, math.nan])) == (
        "1 of 2 values are not probabilities (1 NaN); score every row from inputs without NaN"
    )
    assert "unequal lengths [2, 3]" in message(lambda: metric([0, 1], [0.1, 0.2, 0.3]))
    assert "1 of 2 labels are neither 0 nor 1" in message(lambda: metric([0, 0.5], [0.1, 0.2]))


# Calibration


def test_calibration_ratio() -> None:
    assert calibration_ratio([0, 1, 0, 1], [0.5, 0.5, 0.25, 0.25]) == 0.75
    assert calibration_ratio([0, 0], [0.5, 0.0]) == math.inf
    assert math.isnan(calibration_ratio([0, 0], [0.0, 0.0]))
    assert math.isnan(calibration_ratio([], []))
    y_N, p_N = clicks(1_000_000, 0.02, seed=8)
    assert calibration_ratio(y_N, p_N.astype(np.float32)) == pytest.approx(p_N.sum() / y_N.sum(), rel=1e-6)


def binned(y_N: np.ndarray, p_N: np.ndarray, bins: int) -> dict[int, list[tuple[float, int]]]:
    """The bins by their definition: each distinct p goes where its middle rank lies."""
    found = defaultdict(list)
    for value in sorted(set(p_N.tolist())):
        below, equal = (p_N < value).sum(), (p_N == value).sum()
        found[int((below + equal / 2) * bins // len(p_N))] += [(value, int(y)) for y in y_N[p_N == value]]
    return found


@relaxed
@given(rows, st.integers(1, 25))
def test_calibration_error_equals_its_definition(found: list[tuple[int, int, int]], bins: int) -> None:
    y_N, s_N, _ = columns(found)
    p_N = (s_N + 5) / 10
    parts = [np.array(part) for _, part in sorted(binned(y_N, p_N, bins).items())]
    expected = sum(len(part) * abs(np.subtract(*part.mean(axis=0))) for part in parts) / len(y_N)
    assert expected_calibration_error(y_N, p_N, bins) == pytest.approx(expected, abs=1e-12)
    curve = calibration_curve(y_N, p_N, bins)
    assert curve["count"].to_list() == [len(part) for part in parts]
    assert curve["mean_predicted"].to_list() == pytest.approx([part[:, 0].mean() for part in parts])
    assert curve["mean_observed"].to_list() == pytest.approx([part[:, 1].mean() for part in parts])


def test_bins_without_ties_have_equal_mass() -> None:
    y_N, p_N = clicks(2_000, 0.1, seed=9)
    curve = calibration_curve(y_N, p_N, bins=20)
    assert curve["count"].to_list() == [100] * 20
    assert curve["mean_predicted"].is_sorted()
    order = np.argsort(p_N)
    assert curve["mean_observed"].to_list() == pytest.approx(y_N[order].reshape(20, 100).mean(axis=1))
    assert set(calibration_curve(y_N[:1999], p_N[:1999], bins=20)["count"]) == {99, 100}


def test_equal_probabilities_share_a_bin_and_the_order_of_rows_does_not_matter() -> None:
    p_N = np.array([0.2] * 70 + list(np.linspace(0.3, 0.9, 30)))
    y_N = np.arange(100) % 2
    curve = calibration_curve(y_N, p_N, bins=10)
    assert curve["count"].to_list()[0] == 70
    assert curve["mean_observed"].to_list()[0] == 0.5
    expected = expected_calibration_error(y_N, p_N, bins=10)
    assert expected_calibration_error(y_N[::-1], p_N[::-1], bins=10) == pytest.approx(expected, rel=1e-12)


def test_calibration_error_at_the_edges() -> None:
    assert math.isnan(expected_calibration_error([], []))
    assert calibration_curve([], []).schema == calibration_curve([1], [0.5]).schema
    assert calibration_curve([], []).is_empty()
    assert expected_calibration_error([1], [0.25]) == 0.75
    assert expected_calibration_error([0, 1], [0.0, 1.0]) == 0
    with pytest.raises(ValueError, match="bins = 0: at least 1 is needed"):
        expected_calibration_error([1], [0.25], bins=0)
    y_N, p_N = clicks(200_000, 0.05, seed=10)
    assert expected_calibration_error(y_N, p_N) < 0.003
    assert expected_calibration_error(y_N, p_N / 2) == pytest.approx(0.025, abs=0.002)


# The ROC curve


def test_full_roc_curve_equals_scikit_learn_and_encloses_the_auc() -> None:
    y_N, p_N = clicks(5_000, 0.1, seed=11, distinct=200)
    curve = roc_curve(y_N, p_N, points=10_000)
    fpr, tpr, _ = sklearn.metrics.roc_curve(y_N, p_N, drop_intermediate=False)
    assert curve["fpr"].to_list() == pytest.approx(fpr.tolist())
    assert curve["tpr"].to_list() == pytest.approx(tpr.tolist())
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(roc_auc(y_N, p_N), abs=1e-12)


@pytest.mark.parametrize("points", [2, 3, 50, 500])
def test_thinned_roc_curve_holds_points_of_the_full_one(points: int) -> None:
    y_N, p_N = clicks(20_000, 0.02, seed=12)
    curve = roc_curve(y_N, p_N, points)
    full = roc_curve(y_N, p_N, points=10**6)
    assert full.height == 20_001
    assert 2 <= curve.height <= points
    assert curve.row(0) == (0, 0)
    assert curve.row(-1) == (1, 1)
    assert set(curve.rows()) <= set(full.rows())
    if points == 500:
        assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(roc_auc(y_N, p_N), abs=1e-3)


def test_roc_curve_at_the_edges() -> None:
    assert roc_curve([0, 1], [0.5, 0.5]).rows() == [(0, 0), (1, 1)]
    assert roc_curve([0, 0], [0.5, 0.1]).is_empty()
    assert roc_curve([], []).columns == ["fpr", "tpr"]
    with pytest.raises(ValueError, match="points = 1: a curve needs at least 2"):
        roc_curve([0, 1], [0.1, 0.2], points=1)


# Against torchrec


def test_torchrec_agrees() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchrec's imports warn of their own future
        import torch
        from torchrec.metrics.auc import compute_auc
        from torchrec.metrics.calibration import compute_calibration, get_calibration_states
        from torchrec.metrics.ne import compute_ne, get_ne_states
    y_N, p_N = clicks(50_000, 0.03, seed=13)
    assert np.unique(p_N).size == p_N.size  # torchrec's AUC breaks ties by the order of rows
    labels, predictions = torch.tensor(y_N).double()[None], torch.tensor(p_N)[None]
    weights = torch.ones_like(labels)
    auc = compute_auc(1, [predictions], [labels], [weights])
    assert roc_auc(y_N, p_N) == pytest.approx(auc.item(), abs=1e-9)
    sums = get_ne_states(labels, predictions, weights, eta=1e-12)
    counts = (sums["weighted_num_samples"], sums["pos_labels"], sums["neg_labels"])
    entropy = compute_ne(sums["cross_entropy_sum"], *counts, eta=1e-12)
    assert normalized_entropy(y_N, p_N) == pytest.approx(entropy.item(), rel=1e-9)
    calibration = compute_calibration(*get_calibration_states(labels, predictions, weights).values())
    assert calibration_ratio(y_N, p_N) == pytest.approx(calibration.item(), rel=1e-9)


# Tables


def scored(count: int = 6_000, seed: int = 20) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    y_N, p_N = clicks(count, 0.2, seed)
    bought_N = y_N * (random.random(count) < 0.3)
    return pl.DataFrame(
        {
            "p_click": p_N.astype(np.float32),
            "click": y_N,
            "p_buy": p_N * 0.3,
            "buy": pl.Series(bought_N, dtype=pl.Int8),
            "device": random.choice(["phone", "tablet", "desk"], count),
            "hour": random.integers(0, 24, count),
            "user": [f"u{number}" for number in random.integers(0, 300, count)],
        }
    ).with_columns(buy=pl.when(pl.col("hour") < 18).then("buy"))  # evening purchases are not known yet


BUY = Output(name="p_buy", label="buy")


def test_evaluate_calls_each_metric_on_each_slice() -> None:
    table = scored()
    evaluation = evaluate(table, [CLICK, BUY], by=["device", "hour"], user="user")
    assert evaluation.columns == [
        *("output", "space", "slice", "value", "rows", "positives", "auc", "log_loss", "normalized_entropy"),
        *("calibration_ratio", "ece", "user_auc"),
    ]
    assert evaluation.height == 2 * (1 + 3 + 24)
    for output, column, value in [(CLICK, "all", "all"), (CLICK, "device", "desk"), (BUY, "hour", "7")]:
        part = table if column == "all" else table.filter(pl.col(column).cast(pl.String) == value)
        part = part.drop_nulls(output.label)
        label, p = part[output.label], part[output.name]
        row = evaluation.filter(output=output.name, slice=column, value=value).row(0, named=True)
        assert row == {
            "output": output.name,
            "space": "all impressions",
            "slice": column,
            "value": value,
            "rows": part.height,
            "positives": label.sum(),
            "auc": roc_auc(label, p),
            "log_loss": log_loss(label, p),
            "normalized_entropy": normalized_entropy(label, p),
            "calibration_ratio": calibration_ratio(label, p),
            "ece": expected_calibration_error(label, p),
            "user_auc": grouped_auc(label, p, part["user"].to_numpy()),
        }


def test_slices_sum_to_the_whole() -> None:
    evaluation = evaluate(scored(), [CLICK, BUY], by=["device", "hour"])
    for output in ("p_click", "p_buy"):
        whole = headline(evaluation, output)
        for column in ("device", "hour"):
            parts = evaluation.filter(pl.col("rows") > 0, output=output, slice=column)
            rows_S, positives_S = parts["rows"].to_numpy(), parts["positives"].to_numpy()
            assert rows_S.sum() == whole["rows"]
            assert positives_S.sum() == whole["positives"]
            assert rows_S @ parts["log_loss"].to_numpy() == pytest.approx(whole["rows"] * whole["log_loss"])
            predicted = positives_S @ parts["calibration_ratio"].to_numpy()
            assert predicted == pytest.approx(whole["positives"] * whole["calibration_ratio"])


def test_rows_with_unknown_labels_do_not_count_for_that_output_only() -> None:
    table = scored()
    evaluation = evaluate(table, [CLICK, BUY], by=["hour"])
    known = table.drop_nulls("buy")
    assert known.height < table.height
    assert headline(evaluation, "p_click")["rows"] == table.height
    assert headline(evaluation, "p_buy") == headline(evaluate(known, [BUY]), "p_buy")
    evening = evaluation.filter(output="p_buy", slice="hour", value="20").row(0, named=True)
    assert (evening["rows"], evening["positives"]) == (0, 0)
    assert all(math.isnan(evening[name]) for name in ("auc", "log_loss", "calibration_ratio", "ece"))


def test_a_label_unknown_everywhere_has_no_metrics() -> None:
    for dtype in (pl.Null, pl.Int8, pl.Boolean):
        table = scored().with_columns(buy=pl.lit(None, dtype=dtype))
        whole = headline(evaluate(table, [BUY], user="user"), "p_buy")
        assert whole["rows"] == 0
        assert math.isnan(whole["user_auc"])


def test_labels_and_probabilities_may_have_any_numeric_type() -> None:
    table = scored()
    expected = evaluate(table, [CLICK], by=["device"])
    for label in (pl.Boolean, pl.Int64, pl.UInt8, pl.Float32):
        assert_frame_equal(evaluate(table.with_columns(pl.col("click").cast(label)), [CLICK], by=["device"]), expected)
    certain = table.with_columns(p_click=pl.col("click").cast(pl.Int32))
    assert headline(evaluate(certain, [CLICK]), "p_click")["auc"] == 1


def test_rows_without_a_user_leave_user_auc_alone() -> None:
    table = scored().with_columns(user=pl.when(pl.col("hour") != 3).then("user"))
    known = table.drop_nulls("user")
    found = headline(evaluate(table, [CLICK], user="user"), "p_click")
    assert found["rows"] == table.height
    assert found["user_auc"] == headline(evaluate(known, [CLICK], user="user"), "p_click")["user_auc"]


@pytest.mark.parametrize("dtype", [pl.Categorical, pl.Int64, pl.UInt32, pl.Float64])
def test_users_may_have_any_scalar_type(dtype: type[pl.DataType]) -> None:
    table = scored()
    number = pl.col("user").str.slice(1).cast(pl.Int64)
    typed = table.with_columns(
        user=number.cast(pl.String).cast(dtype) if dtype == pl.Categorical else number.cast(dtype)
    )
    assert_frame_equal(evaluate(typed, [CLICK], user="user"), evaluate(table, [CLICK], user="user"))


def test_user_auc_is_null_when_no_user_is_given() -> None:
    evaluation = evaluate(scored(), [CLICK], by=["device"])
    assert evaluation["user_auc"].null_count() == evaluation.height
    assert evaluation.schema["user_auc"] == pl.Float64
    assert "user_auc" not in headline(evaluation, "p_click")


# Spaces

GIVEN = Output(name="p_buy_given_click", label="buy", given="click")


def funnelled() -> pl.DataFrame:
    """As `scored`, of a funnel: who did not click did not buy; what would have followed a click is known too."""
    table = scored()
    would = np.random.default_rng(5).random(table.height) < 0.3
    return table.with_columns(pl.Series("would_buy", would), p_buy_given_click=pl.lit(0.3) + 0.01 * pl.col("hour"))


def test_a_conditional_probability_is_measured_where_its_condition_holds() -> None:
    table = funnelled()
    assert (CLICK.space, BUY.space, GIVEN.space) == ("all impressions", "all impressions", "rows with click")
    evaluation = evaluate(table, [CLICK, GIVEN], by=["device"], user="user")
    clicked = table.filter(pl.col("click") == 1).drop_nulls("buy")
    assert 0 < clicked.height < table.filter(pl.col("click") == 1).height
    alone = evaluate(clicked, [Output(name=GIVEN.name, label="buy")], by=["device"], user="user")
    found = evaluation.filter(output=GIVEN.name)
    assert found["space"].unique().to_list() == ["rows with click"]
    assert_frame_equal(found.drop("space"), alone.drop("space"), check_row_order=False)
    assert headline(evaluation, "p_click")["rows"] == table.height


def test_rows_are_in_a_space_when_the_label_is_known_and_the_condition_holds() -> None:
    table = pl.DataFrame({"o": [1, 1, 1, 0, 0, None, None], "r": [1, 0, None, 0, None, 1, None]})
    given = Output(name="p", label="r", given="o")
    alone = Output(name="p", label="r")
    for dtype in (pl.Int8, pl.Float32, pl.Boolean):
        typed = table.cast(dtype)
        assert in_space(typed, given).to_list() == [True, True, False, False, False, False, False]
        assert in_space(typed, alone).to_list() == [True, True, False, True, False, True, False]
    assert not in_space(table.with_columns(o=pl.lit(None)), given).any()


def test_an_output_may_be_measured_in_several_spaces() -> None:
    table = funnelled()
    everywhere = Output(name=GIVEN.name, label="would_buy")
    evaluation = evaluate(table, [GIVEN, everywhere], by=["device"])
    spaces = evaluation["space"].unique(maintain_order=True).to_list()
    assert spaces == ["rows with click", "all impressions"]
    first, whole = (headline(evaluation, GIVEN.name, space) for space in spaces)
    assert headline(evaluation, GIVEN.name) == first
    assert whole == headline(evaluate(table, [everywhere]), GIVEN.name)
    assert whole["rows"] == table.height > first["rows"]
    for space in spaces:
        assert evaluation.filter(space=space, slice="device")["rows"].sum() == headline(
            evaluation, GIVEN.name, space
        )["rows"]  # fmt: skip
    assert message(lambda: evaluate(table, [GIVEN, everywhere, GIVEN])) == (
        "output 'p_buy_given_click' is given 2 times on rows with click; evaluate each label by itself"
    )


def test_a_condition_that_is_missing_is_named() -> None:
    output = Output(name="p_click", label="buy", given="clik")
    assert message(lambda: evaluate(scored(), [output])).startswith(
        "the scored table has no column 'clik', needed for output 'p_click'; did you mean 'click'?"
    )


def test_probabilities_are_checked_outside_their_space_too() -> None:
    table = funnelled().with_columns(
        p_buy_given_click=pl.when(pl.col("click") == 1).then("p_buy_given_click").otherwise(2.0)
    )
    assert "outside [0, 1], the first is 2" in message(lambda: evaluate(table, [GIVEN]))


def test_a_day_without_conversions_has_no_metrics_of_them() -> None:
    table = funnelled().with_columns(buy=pl.lit(0, pl.Int8))
    found = headline(evaluate(table, [GIVEN]), GIVEN.name)
    assert (found["positives"], found["rows"]) == (0, table.filter(pl.col("click") == 1).height)
    assert math.isnan(found["auc"])
    nobody = headline(evaluate(table.with_columns(click=pl.lit(0)), [GIVEN]), GIVEN.name)
    assert nobody["rows"] == 0


# Slices


def sliced(values: pl.Series) -> dict[str, int]:
    """Rows of each slice, in their order."""
    table = pl.DataFrame({"p_click": [0.5] * len(values), "click": [0, 1] * (len(values) // 2), "by": values})
    found = evaluate(table, [CLICK], by=["by"]).filter(slice="by")
    return dict(zip(found["value"].to_list(), found["rows"].to_list(), strict=True))


def test_slices_come_by_size_then_by_value_with_the_missing_last() -> None:
    values = pl.Series(["b", "a", "c", "c", None, None, None, "c"])
    assert sliced(values) == {"c": 3, "a": 1, "b": 1, "(missing)": 3}
    assert list(sliced(values)) == ["c", "a", "b", "(missing)"]
    assert sliced(values) == sliced(values.reverse())


def test_slices_of_any_scalar_type() -> None:
    assert sliced(pl.Series([True, False, True, None])) == {"true": 2, "false": 1, "(missing)": 1}
    assert sliced(pl.Series([1.5, 2.0])) == {"1.5": 1, "2.0": 1}
    assert sliced(pl.Series([datetime.date(2026, 3, 7)] * 2)) == {"2026-03-07": 2}
    assert sliced(pl.Series(["x", "y"], dtype=pl.Categorical)) == {"x": 1, "y": 1}
    assert sliced(pl.Series([None, None])) == {"(missing)": 2}


def test_of_many_values_the_largest_stay_and_the_rest_is_other() -> None:
    exactly = pl.Series([f"{number:02}" for number in range(MAX_SLICES)])
    assert sliced(exactly) == dict.fromkeys(exactly, 1)
    more = pl.Series([*exactly.to_list(), "50", "51", "00", None])
    found = sliced(more)
    assert len(found) == MAX_SLICES + 1
    assert list(found)[-2:] == ["(other)", "(missing)"]
    assert found["00"] == 2
    assert found["48"] == 1  # ties are kept by value
    assert found["(other)"] == 3
    assert found["(missing)"] == 1
    assert sum(found.values()) == len(more)


def test_values_named_like_our_own_join_them() -> None:
    assert sliced(pl.Series(["(missing)", None, "x", "x"])) == {"x": 2, "(missing)": 2}
    found = sliced(pl.Series(["(other)"] * 4 + [f"{number}" for number in range(60)]))
    assert found["(other)"] == 4 + 12
    assert sum(found.values()) == 64


def test_a_column_given_twice_is_cut_once() -> None:
    assert_frame_equal(evaluate(scored(), [CLICK], by=["hour", "hour"]), evaluate(scored(), [CLICK], by=["hour"]))


# What is refused


def test_missing_columns_are_named_with_the_nearest_known() -> None:
    table = scored().select("p_click", "click", "user")
    assert message(lambda: evaluate(table, [Output(name="p_clik", label="click")])) == (
        "the scored table has no column 'p_clik', needed for output 'p_clik'; "
        "did you mean 'p_click'? It has: p_click, click, user"
    )
    assert message(lambda: evaluate(table, [Output(name="p_click", label="zzz")])) == (
        "the scored table has no column 'zzz', needed for output 'p_click'; "
        "correct the name. It has: p_click, click, user"
    )
    assert "no column 'usr', needed for slices; did you mean 'user'?" in message(
        lambda: evaluate(table, [CLICK], by=["usr"])
    )
    assert "no column 'usr', needed for user_auc; did you mean 'user'?" in message(
        lambda: evaluate(table, [CLICK], user="usr")
    )


def test_an_empty_table_is_refused() -> None:
    assert message(lambda: evaluate(scored().clear(), [CLICK])) == (
        "the scored table has no rows; check the partition it was scored from and its filters"
    )


def test_outputs_are_given_once_each_and_at_all() -> None:
    assert message(lambda: evaluate(scored(), [])) == (
        "no outputs to evaluate; name at least one probability and its label"
    )
    twice = [CLICK, Output(name="p_click", label="buy")]
    assert message(lambda: evaluate(scored(), twice)) == (
        "output 'p_click' is given 2 times on all impressions; evaluate each label by itself"
    )


def test_bad_probabilities_are_counted() -> None:
    table = pl.DataFrame({"p_click": [0.5, None, math.nan, None, 1.25, -0.5], "click": [0, 1, 0, 1, 0, None]})
    assert message(lambda: evaluate(table, [CLICK])) == (
        "column 'p_click': 5 of 6 values are not probabilities "
        "(2 null, 1 NaN, 2 outside [0, 1], the first is 1.25); give probabilities, not logits"
    )
    assert message(lambda: evaluate(table.head(2), [CLICK])) == (
        "column 'p_click': 1 of 2 values are not probabilities (1 null); score every row from inputs without NaN"
    )
    assert message(lambda: evaluate(table.with_columns(p_click=pl.lit("0.5")), [CLICK])) == (
        "column 'p_click' holds String, not probabilities; give one of numbers"
    )


def test_bad_labels_are_counted() -> None:
    table = pl.DataFrame({"p_click": [0.5] * 5, "click": [0, 1, 3, None, -1]})
    assert message(lambda: evaluate(table, [CLICK])) == (
        "column 'click': 2 of 4 labels are neither 0 nor 1 (the first is 3); "
        "make the label binary, and null where it is not yet known"
    )
    assert "column 'click': 1 of 2 labels are neither 0 nor 1 (the first is nan)" in message(
        lambda: evaluate(pl.DataFrame({"p_click": [0.5, 0.5], "click": [1.0, math.nan]}), [CLICK])
    )
    assert message(lambda: evaluate(table.with_columns(click=pl.lit("yes")), [CLICK])) == (
        "column 'click' holds String, not labels; give 0, 1, or null"
    )


def test_columns_that_cannot_be_cut_by_are_refused() -> None:
    table = scored().with_columns(tags=pl.concat_list("device"), all=pl.lit(1))
    assert message(lambda: evaluate(table, [CLICK], by=["tags"])) == (
        "column 'tags' holds List(String), which has no groups; give single values"
    )
    assert "column 'tags' holds List(String)" in message(lambda: evaluate(table, [CLICK], user="tags"))
    assert message(lambda: evaluate(table, [CLICK], by=["all"])) == (
        "cannot slice by a column named 'all', which means the whole table; rename it"
    )


def test_headline_is_a_plain_dict_and_knows_its_outputs() -> None:
    evaluation = evaluate(scored(), [CLICK, BUY], by=["device"], user="user")
    numbers = headline(evaluation, "p_click")
    assert list(numbers) == evaluation.columns[4:]
    assert {type(number) for number in numbers.values()} == {float}
    assert message(lambda: headline(evaluation, "p_klick")) == (
        "the evaluation has no output 'p_klick'; did you mean 'p_click'? It has: p_click, p_buy"
    )


def test_an_output_is_a_configuration() -> None:
    from base.config import parse_config

    assert parse_config(Output, {"name": "p", "label": "y"}, source="run.toml") == Output(name="p", label="y")
    with pytest.raises(ConfigError, match="unknown key labels"):
        parse_config(Output, {"name": "p", "label": "y", "labels": "y"}, source="run.toml")


# Weighted, and between two models


@relaxed
@given(found=rows, data=st.data())
def test_weighted_auc_is_sklearns_and_that_of_repeated_rows(
    found: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    y_N, s_N, _ = columns(found)
    weights = st.lists(st.integers(0, 4), min_size=y_N.size, max_size=y_N.size)
    weights_DN = np.array([data.draw(weights), [1] * y_N.size], np.uint8)
    found_D = WeightedAuc(y_N, s_N)(weights_DN)
    for w_N, auc in zip(weights_DN, found_D, strict=True):
        repeated = np.repeat(np.arange(y_N.size), w_N)
        np.testing.assert_equal(auc, roc_auc(y_N[repeated], s_N[repeated]))
        if 0 < y_N[w_N > 0].sum() < (w_N > 0).sum():
            assert auc == pytest.approx(sklearn.metrics.roc_auc_score(y_N, s_N, sample_weight=w_N))
        else:
            assert math.isnan(auc)


def test_weighted_auc_does_not_overflow() -> None:
    y_N, p_N = clicks(400_000, 0.5)
    auc = WeightedAuc(y_N, p_N)(np.full((1, y_N.size), 255, np.uint8))
    assert auc[0] == pytest.approx(roc_auc(y_N, p_N), rel=1e-12)


def test_population_stability_of_two_normals() -> None:
    """Shifted by d standard deviations, the symmetric divergence is d²; bins lose a little of it."""
    random = np.random.default_rng(0)
    reference_N = random.normal(size=200_000)
    assert population_stability(reference_N, reference_N) == 0
    assert population_stability(reference_N, random.normal(size=50_000)) < 0.001
    for shift in (0.3, 0.7):
        moved_M = random.normal(size=100_000) + shift
        assert population_stability(reference_N, moved_M) == pytest.approx(shift**2, rel=0.1)
    assert math.isfinite(population_stability(reference_N, reference_N + 100))
    assert population_stability(np.zeros(100), np.zeros(100)) == 0
    assert population_stability(np.zeros(100), np.zeros(70)) < 0.01  # the half counts weigh more in fewer rows
    assert population_stability(np.zeros(100), np.ones(100)) > 1
    assert math.isnan(population_stability([], [0.5]))
    assert "1 of 2 scores are NaN" in message(lambda: population_stability([0.5], [0.5, math.nan]))
