"""Calibration: each map against a reference, what it promises of any rows, and that bundles keep and apply it."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from base.errors import ArtefactError, DataError
from base.storage import publish, resolve
from features.pipeline import FeaturePipeline
from features.transforms import Vocabulary
from recsys import calibration
from recsys.bundle import Bundle, golden_rows, log_odds_of
from recsys.calibration import Calibrator, Isotonic, Method, Platt
from recsys.data import to_columns
from recsys.metrics import CLIP, calibration_ratio, expected_calibration_error, log_loss, roc_auc
from recsys.models import build_model
from recsys.models.esmm import ESMMConfig

Array = NDArray[np.float64]
METHODS: tuple[Method, ...] = ("platt", "isotonic")
EVERY = pytest.mark.parametrize("method", METHODS)


def logit(p: Array) -> Array:
    return np.log(p) - np.log1p(-p)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def fit_calibrator(method: Method, y: Any, p: Any, *, name: str) -> Calibrator:
    """Of probabilities whose log-odds are known no better than Float32 knows them."""
    return calibration.fit_calibrator(method, y, p, odds_of(p), name=name)


def calibrated(made: Calibrator, p: Any) -> Any:
    """The same of a map."""
    return calibration.calibrated(made, p, odds_of(p))


def odds_of(p: Any) -> Array:
    return logit(np.clip(np.asarray(p, float), CLIP, 1 - CLIP))


def distorted(rows: int, slope: float, intercept: float, seed: int = 0) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Labels, and probabilities whose log-odds must be turned by slope and intercept to be right."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows) * 1.5 - 1
    y = rng.random(rows) < sigmoid(slope * x + intercept)
    return y.astype(np.int8), sigmoid(x).astype(np.float32)


# --- the maps --------------------------------------------------------------------------------------------------------


def newton(y: Array, p: Array) -> tuple[float, float]:
    """Slope and intercept of largest likelihood, by Newton's method in a few lines."""
    x = np.stack([logit(p), np.ones(len(p))], axis=1)
    w = np.zeros(2)
    for _ in range(50):
        q = sigmoid(x @ w)
        w += np.linalg.solve(x.T @ (x * (q * (1 - q))[:, None]), x.T @ (y - q))
    return float(w[0]), float(w[1])


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, -1.0), (1.7, 0.8)])
def test_platt_is_the_likeliest_line_in_log_odds(slope: float, intercept: float) -> None:
    y, p = distorted(40_000, slope, intercept)
    found = fit_calibrator("platt", y, p, name="p_click")
    assert isinstance(found, Platt)
    assert (found.slope, found.intercept) == pytest.approx(newton(y.astype(float), p.astype(float)), rel=1e-3, abs=1e-3)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept), abs=0.06)
    expected = sigmoid(found.slope * logit(p.astype(float)) + found.intercept)
    np.testing.assert_allclose(calibrated(found, p), expected, rtol=1e-5)


def test_platt_promises_no_certainty_where_scores_separate() -> None:
    """Three positives on top of 497 negatives: an unsmoothed line would be as steep as the solver lets it."""
    p = np.linspace(0.01, 0.99, 500).astype(np.float32)
    found = fit_calibrator("platt", p > p[496], p, name="p_click")
    assert isinstance(found, Platt)
    assert 0 < found.slope < 10
    assert 0 < calibrated(found, p).min() < calibrated(found, p).max() < 0.9


def test_a_platt_map_is_its_formula_up_to_certainty() -> None:
    p = np.array([0, 1e-9, CLIP, 0.2, 0.5, 1 - 1e-4, 1], np.float32)
    found = calibrated(Platt(slope=0.5, intercept=-1.0), p)
    odds = np.sqrt(p.astype(float)[3:6] / (1 - p.astype(float)[3:6])) / np.e
    np.testing.assert_allclose(found[3:6], odds / (1 + odds), rtol=1e-5)
    assert found[0] == found[1] == found[2]
    assert 0 < found[0] < found[3] < found[6] < 1
    np.testing.assert_allclose(calibrated(Platt(slope=1.0, intercept=0.0), p[2:6]), p[2:6], rtol=1e-6)


def runs(y: Array, p: Array, weight: Array) -> list[tuple[float, float, NDArray[np.int64]]]:
    """Pool adjacent violators: mean p, mean y and members of each run, in the order of p."""
    found: list[NDArray[np.int64]] = []
    for i in np.argsort(p, kind="stable"):
        found.append(np.array([i]))
        while len(found) > 1:
            before, last = (np.average(y[r], weights=weight[r]) for r in found[-2:])
            if before < last and p[found[-2][-1]] < p[found[-1][0]]:
                break
            found[-2:] = [np.concatenate(found[-2:])]
    return [(np.average(p[r], weights=weight[r]), np.average(y[r], weights=weight[r]), r) for r in found]


def test_isotonic_is_pooled_rates_drawn_to_the_model_by_one_row() -> None:
    y, p = distorted(3_000, 0.6, -0.5)
    found = fit_calibrator("isotonic", y, p, name="p_click")
    assert isinstance(found, Isotonic)
    blocks = runs(y.astype(float), p.astype(float), np.ones(len(y)))
    centre, rows = np.array([c for c, _, _ in blocks]), np.array([len(members) for _, _, members in blocks])
    drawn = (rows * [rate for _, rate, _ in blocks] + centre) / (rows + 1)
    expected = runs(drawn, centre, rows + 1.0)  # drawn to the model, neighbours may have changed places
    assert len(expected) == len(found.predicted) - 2 > 5
    for (_, rate, members), x, f in zip(expected, found.predicted[1:-1], found.observed[1:-1], strict=True):
        assert x == pytest.approx(np.average(centre[members], weights=rows[members]), rel=1e-6)
        assert f == pytest.approx(rate, rel=1e-9)
    assert (found.predicted[0], found.observed[0], found.predicted[-1], found.observed[-1]) == (0, 0, 1, 1)
    asked = np.random.default_rng(1).random(500).astype(np.float32)
    np.testing.assert_allclose(calibrated(found, asked), np.interp(asked, found.predicted, found.observed), rtol=1e-6)


def test_a_day_without_an_event_says_less_and_not_never() -> None:
    """90 rows without a click and 10 with one each: rates of 0 and 1, which no rows can promise."""
    p = np.linspace(0.005, 0.995, 100).astype(np.float32)
    y = p > 0.9
    made = fit_calibrator("isotonic", y, p, name="p_click")
    low, high = p[~y].mean(), p[y].mean()
    asked = np.array([low, high], np.float32)
    np.testing.assert_allclose(calibrated(made, asked), [low / 91, (10 + high) / 11], atol=1e-6)


@EVERY
def test_calibrated_probabilities_are_calibrated(method: Method) -> None:
    """Fitted on one day, asked on another: the same ranking, the right sum, a smaller error in every bin."""
    y, p = distorted(60_000, 0.5, -1.0)
    map_of_day = fit_calibrator(method, y, p, name="p_click")
    y, p = distorted(60_000, 0.5, -1.0, seed=1)
    q = calibrated(map_of_day, p)
    assert abs(calibration_ratio(y, p) - 1) > 0.3
    assert calibration_ratio(y, q) == pytest.approx(1, abs=0.03)
    assert expected_calibration_error(y, q) < 0.1 * expected_calibration_error(y, p)
    assert log_loss(y, q) < log_loss(y, p)
    assert roc_auc(y, q) == pytest.approx(roc_auc(y, p), abs=1e-3)


rows = st.lists(
    st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=40
).filter(lambda found: len({y for y, _ in found}) == 2)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(found=rows, asked=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_an_isotonic_map_keeps_ranks_and_is_certain_only_of_certainty(
    found: list[tuple[int, float]], asked: list[float]
) -> None:
    y, p = (np.array(column) for column in zip(*found, strict=True))
    made = fit_calibrator("isotonic", y, p, name="p_click")
    assert isinstance(made, Isotonic)
    assert (np.diff(made.predicted) > 0).all()
    assert (np.diff(made.observed) >= 0).all()
    x = np.sort(np.array([0, *asked, 1], np.float32))
    q = calibrated(made, x)
    assert q.dtype == np.float32
    assert (q[0], q[-1]) == (0, 1)
    apart = np.diff(x) > 1e-3
    assert (np.diff(q) >= 0).all()
    assert (np.diff(q)[apart] > 0).all()
    surely = x[(x > 1e-3) & (x < 1 - 1e-3)]
    assert calibrated(made, surely).min(initial=0.5) > 0
    assert calibrated(made, surely).max(initial=0.5) < 1


@EVERY
def test_calibration_changes_no_ranking(method: Method) -> None:
    y, p = distorted(5_000, 0.5, -1.0)
    q = calibrated(fit_calibrator(method, y, p, name="p_click"), p)
    assert roc_auc(y, q) == pytest.approx(roc_auc(y, p), abs=1e-5)


def test_one_probability_for_all_rows_becomes_their_rate() -> None:
    y, p = np.arange(100) < 26, np.full(100, 0.3, np.float32)
    np.testing.assert_allclose(calibrated(fit_calibrator("platt", y, p, name="p"), p), 0.26, atol=1e-3)
    np.testing.assert_allclose(calibrated(fit_calibrator("isotonic", y, p, name="p"), p), (26 + 0.3) / 101, atol=1e-6)


@EVERY
@pytest.mark.parametrize(("labels", "positives"), [([0, 0, 0], 0), ([1, 1], 2), ([], 0)])
def test_rows_of_one_class_are_refused_with_the_outputs_name(method: Method, labels: list[int], positives: int) -> None:
    with pytest.raises(DataError) as caught:
        fit_calibrator(method, labels, [0.5] * len(labels), name="p_buy_given_click")
    assert str(caught.value) == (
        f"output 'p_buy_given_click' cannot be calibrated on {len(labels)} rows of which {positives} are positive: "
        "set calibrate.partition to a day with both, or leave the output out of calibrate.outputs"
    )


@EVERY
def test_a_map_survives_json_to_the_last_digit(method: Method) -> None:
    made = fit_calibrator(method, *distorted(500, 0.7, 0.1), name="p_click")
    adapter: TypeAdapter[Calibrator] = TypeAdapter(Calibrator)
    assert adapter.validate_json(made.model_dump_json()) == made
    with pytest.raises(ValidationError):
        adapter.validate_python({"method": "beta", "slope": 1.0, "intercept": 0.0})


# --- bundles ---------------------------------------------------------------------------------------------------------

RAW = pl.DataFrame({"user": [f"u{n % 17}" for n in range(100)], "item": [n % 7 for n in range(100)]})
MAPS: dict[str, Calibrator] = {
    "p_click": Platt(slope=0.8, intercept=-0.7),
    "p_buy_given_click": Isotonic(predicted=(0.2, 0.4, 0.7), observed=(0.05, 0.1, 0.6)),
}


def bundle(calibrators: Mapping[str, Calibrator]) -> Bundle:
    """Of a funnel whose non-clicks were sampled; its golden rows are as it scores them."""
    model = ESMMConfig(dim=4)
    features = FeaturePipeline((Vocabulary(column="user"), Vocabulary(column="item"))).fit(RAW.lazy())
    schema = features.schema([], ["click", "buy"], funnel=["click", "buy"], negative_rate=0.5)
    torch.manual_seed(0)
    network = build_model(model, schema)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    plain = Bundle(network.eval(), model, features, schema, {}, {}, RAW.head(0), calibrators)
    return Bundle(network, model, features, schema, {}, {}, golden_rows(plain, RAW.head(9)), calibrators)


def test_a_bundle_gives_calibrated_probabilities() -> None:
    raw, mapped = (pl.concat(bundle(c).predict(RAW.lazy(), batch_size=32)) for c in ({}, MAPS))
    assert raw.columns == mapped.columns == ["p_click", "p_buy_given_click", "p_click_and_buy"]
    for name, made in MAPS.items():
        np.testing.assert_array_equal(mapped[name], calibrated(made, raw[name].to_numpy()))
        assert np.abs((mapped[name] - raw[name]).to_numpy()).max() > 0.1
    assert mapped["p_click_and_buy"].equals(raw["p_click_and_buy"])  # which nobody asked to calibrate
    assert mapped.schema.dtypes() == [pl.Float32] * 3


def test_platts_map_turns_no_pair_and_ties_only_what_float32_cannot_tell() -> None:
    """Of a network so sure that its probabilities are 1 for many rows; of single logits and of their product."""
    sure = bundle({})
    sure = replace(sure, calibrators={o.name: Platt(slope=0.1, intercept=-1, of="log_odds") for o in sure.outputs})
    with torch.no_grad():
        for parameter in sure.model.parameters():
            parameter *= 3
    examples = sure.features.transform(RAW.lazy()).collect()
    raw = next(replace(sure, calibrators={}).predict_examples(examples, batch_size=100, log_odds=True))
    mapped = next(sure.predict_examples(examples, batch_size=100))
    for name in sure.calibrators:
        assert 3 < raw[name].eq(1).sum() < 100
        x, q = raw[log_odds_of(name)].to_numpy(), mapped[name].to_numpy()
        order = np.argsort(x)
        assert (np.diff(q[order]) >= 0).all()
        exact = sigmoid(0.1 * x - 1)
        assert len(np.unique(q)) == len(np.unique(exact.astype(np.float32)))
        assert len(np.unique(q)) > raw[name].n_unique()
        np.testing.assert_allclose(q, exact, rtol=1e-6)


def test_the_surest_rows_have_their_say_in_the_fit() -> None:
    """Labels that follow a tenth of the log-odds, which reach beyond what a probability can say."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=40_000) * 25
    y, p = rng.random(x.size) < sigmoid(0.1 * x), sigmoid(x).astype(np.float32)
    found = calibration.fit_calibrator("platt", y, p, x, name="p_click")
    assert isinstance(found, Platt)
    assert (found.slope, found.intercept) == pytest.approx((0.1, 0), abs=0.03)
    assert found.of == "log_odds"
    assert calibration_ratio(y[x > 20], calibration.calibrated(found, p, x)[x > 20]) == pytest.approx(1, abs=0.02)


def test_a_map_of_before_still_reads_probabilities() -> None:
    adapter: TypeAdapter[Calibrator] = TypeAdapter(Calibrator)
    old = adapter.validate_python({"method": "platt", "slope": 0.5, "intercept": -1.0})
    p, x = np.array([0.2, 1], np.float32), np.array([-99.0, 99.0])
    np.testing.assert_allclose(calibration.calibrated(old, p, x), sigmoid(0.5 * odds_of(p) - 1), rtol=1e-6)


def test_a_bundle_keeps_its_calibration(tmp_path: Path) -> None:
    made = bundle(MAPS)
    expected = pl.concat(made.predict(RAW.lazy()))
    loaded = made.save(tmp_path / "bundle")
    assert loaded.calibrators == MAPS
    assert pl.concat(loaded.predict(RAW.lazy())).equals(expected)
    np.testing.assert_allclose(made.golden["@p_click"], expected["p_click"].head(9), atol=1e-6)
    loaded.check_golden()
    other = bundle(MAPS | {"p_click": Platt(slope=0.8, intercept=-0.71)}).save(tmp_path / "other")
    assert other.version != loaded.version
    assert bundle({}).save(tmp_path / "none").calibrators == {}
    assert not (resolve(tmp_path / "none") / "calibration.json").exists()  # as in bundles older than calibration


def test_golden_rows_guard_the_calibration(tmp_path: Path) -> None:
    made = bundle(MAPS)
    for changed in ({}, MAPS | {"p_click": Platt(slope=0.8, intercept=-0.71)}):
        with pytest.raises(ArtefactError, match="p_click of its golden rows differs by"):
            replace(made, calibrators=changed).check_golden()


def test_a_calibration_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    features = bundle(MAPS).save(tmp_path / "bundle").features
    folder = resolve(tmp_path / "bundle")
    text = (folder / "calibration.json").read_text()
    for n, wrong in enumerate(("{", text.replace("platt", "plat"), text.replace('"slope"', '"slop"'))):
        assert wrong != text
        target = tmp_path / f"wrong-{n}"
        with publish(target, "bundle") as staging:
            for file in folder.rglob("*"):
                if file.is_file() and file.name != "manifest.json":
                    shutil.copy(file, staging / str(file.relative_to(folder)))
            (staging / "calibration.json").write_text(wrong)
            staging.about["features"] = features.version
        with pytest.raises(ArtefactError, match=r"calibration\.json: cannot be read"):
            Bundle.load(target)


def test_the_map_is_of_the_corrected_probability() -> None:
    """Down-sampling is undone first: a calibrator sees what it was fitted on."""
    made = bundle(MAPS)
    columns = to_columns(made.features.transform(RAW.lazy()).collect(), made.schema, labels=False)
    with torch.no_grad():
        p_BO = made.model.probabilities(made.model(columns.batch(0, 100))).numpy()
    found = pl.concat(made.predict(RAW.lazy()))
    np.testing.assert_allclose(found["p_click"], calibrated(MAPS["p_click"], p_BO[:, 0]), rtol=1e-6)
