"""Evidence from two scored tables: exact numbers, honest intervals, and a sentence for whatever cannot be measured."""

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from features.schema import Output
from recsys import metrics
from recsys.gate import Comparison, Evidence, Gates, Margins, OutputGates, Share, Verdict, judge
from recsys.paired import compare

CLICK = Output(name="p", label="click")
BUY = Output(name="p_buy", label="buy", given="click")
DEFAULT = Gates()
EXACT = {
    "auc": metrics.roc_auc,
    "log_loss": metrics.log_loss,
    "normalized_entropy": metrics.normalized_entropy,
    "calibration": metrics.calibration_ratio,
}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def pair(rows: int, seed: int = 0, *, worse: float = 0.0, base: float = -1.6) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Scored tables of a candidate and a champion trained on the same days: mostly alike, each with noise of its own.

    `worse` is more such noise in the candidate's log-odds. Both say the expected probability given what they know.
    """
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=rows)
    clicks = rng.random(rows) < sigmoid(base + 0.95 * taste)
    common = taste + 0.35 * rng.normal(size=rows)

    def scores(noise: float) -> Any:
        kept = 1 / (1 + 0.35**2 + noise**2)
        spread = 0.95**2 * (1 - kept)
        odds = base + 0.95 * kept * (common + noise * rng.normal(size=rows))
        return sigmoid(odds / np.sqrt(1 + np.pi * spread / 8)).astype(np.float32)

    shared = {"id": np.arange(rows), "click": clicks.astype(np.int8), "device": rng.choice([*"abcde"], rows)}
    champion = pl.DataFrame({**shared, "p": scores(0.17)})
    return pl.DataFrame({**shared, "p": scores(float(np.hypot(0.17, worse)))}), champion


def evidence_on(
    candidate: pl.DataFrame, champion: pl.DataFrame | None, gates: Gates = DEFAULT, **settings: Any
) -> Evidence:
    reference = {"champion_outputs": [CLICK]} if champion is not None else {}
    return compare(candidate, champion, [CLICK], gates, **{**reference, **settings})


def verdict_on(
    candidate: pl.DataFrame, champion: pl.DataFrame | None, gates: Gates = DEFAULT, **settings: Any
) -> Verdict:
    return judge(evidence_on(candidate, champion, gates, **settings), gates)


def by_metric(evidence: Evidence, where: str = "all") -> dict[str, Comparison]:
    return {c.metric: c for c in evidence.comparisons if c.slice == where}


# Numbers


def test_the_numbers_are_those_of_the_exact_metrics() -> None:
    candidate, champion = pair(3000)
    found = by_metric(evidence_on(candidate, champion))
    assert list(found) == list(EXACT)
    for name, metric in EXACT.items():
        for table, value in ((candidate, found[name].candidate), (champion, found[name].champion)):
            assert value == pytest.approx(metric(table["click"], table["p"]), rel=1e-9)
        assert found[name].lower < found[name].difference < found[name].upper
        assert found[name].rows == found[name].units == 3000
    assert found["auc"].difference == found["auc"].candidate - found["auc"].champion
    assert found["log_loss"].difference == found["log_loss"].champion - found["log_loss"].candidate
    off = {m: abs(np.log(found["calibration"].model_dump()[m])) for m in ("champion", "candidate")}
    assert found["calibration"].difference == pytest.approx(off["champion"] - off["candidate"])


def test_to_change_sides_changes_the_sign() -> None:
    candidate, champion = pair(2000, worse=0.4)
    there, back = evidence_on(candidate, champion), evidence_on(champion, candidate)
    for a, b in zip(there.comparisons, back.comparisons, strict=True):
        assert (a.difference, a.lower, a.upper) == pytest.approx((-b.difference, -b.upper, -b.lower))


def test_the_same_tables_give_the_same_evidence() -> None:
    candidate, champion = pair(2000)
    first = evidence_on(candidate, champion, by=["device"])
    assert evidence_on(candidate, champion, by=["device"]) == first
    assert evidence_on(candidate, champion, Gates(seed=1)) != evidence_on(candidate, champion)


@pytest.mark.parametrize("unsure", ["pass", "refuse"])
def test_an_equal_model_always_passes(unsure: Any) -> None:
    nothing = {name: Share(amount=0) for name in Margins.model_fields}
    for seed, rows in ((0, 300), (1, 3000)):
        _, champion = pair(rows, seed)
        gates = Gates(margins=Margins(**nothing), unsure=unsure, min_slice_rows=40, min_slice_positives=5, min_units=5)
        evidence = evidence_on(champion, champion, gates, by=["device"])
        assert judge(evidence, gates).promoted
        assert len(evidence.comparisons) == 4 + 2 * 5
        assert {(c.difference, c.lower, c.upper) for c in evidence.comparisons} == {(0, 0, 0)}


# Intervals


def test_users_that_repeat_themselves_say_less_than_rows() -> None:
    """Every row 20 times is no more evidence than once."""
    candidate, champion = (pl.concat([t.with_columns(user=pl.col("id"))] * 20) for t in pair(400))
    rows, users = (by_metric(evidence_on(candidate, champion, user=u)) for u in (None, "user"))
    once = by_metric(evidence_on(*pair(400)))
    for name in ("auc", "log_loss"):
        width = {k: f[name].upper - f[name].lower for k, f in {"rows": rows, "users": users, "once": once}.items()}
        assert users[name].units == 400
        assert users[name].difference == pytest.approx(rows[name].difference)
        assert width["users"] / width["rows"] == pytest.approx(np.sqrt(20), rel=0.2)
        assert width["users"] == pytest.approx(width["once"], rel=0.2)


def test_rows_of_nobody_are_units_of_their_own() -> None:
    users = pl.Series("user", ["ann", None, "bob", None, "ann"] * 200)
    candidate, champion = (t.with_columns(users) for t in pair(1000))
    assert {c.units for c in evidence_on(candidate, champion, user="user").comparisons} == {402}
    nobody = pl.Series("user", [None] * 1000, dtype=pl.String)
    candidate, champion = (t.with_columns(nobody) for t in (candidate, champion))
    assert {c.units for c in evidence_on(candidate, champion, user="user").comparisons} == {1000}


# How often it is wrong


@pytest.fixture(scope="module")
def refused() -> Callable[[int, float], float]:
    """The share of 60 days of so many rows on which a candidate so much worse is refused."""

    def share(rows: int, worse: float, base: float = -1.6) -> float:
        verdicts = [verdict_on(*pair(rows, seed, worse=worse, base=base)) for seed in range(60)]
        assert {v.decision for v in verdicts} <= {"promoted", "refused"}
        return sum(v.decision == "refused" for v in verdicts) / len(verdicts)

    return share


def test_equally_good_models_do_not_flap(refused: Callable[..., float]) -> None:
    """Each comparison refuses one in forty at most."""
    assert refused(5000, 0.0) <= 0.07


def test_a_model_worse_by_more_than_noise_is_refused(refused: Callable[..., float]) -> None:
    assert refused(5000, 0.6) == 1.0  # 0.028 of AUC


def test_a_hundred_conversions_do_not_flap(refused: Callable[..., float]) -> None:
    _, champion = pair(2000, base=-3.3)
    assert 60 < champion["click"].sum() < 140
    assert refused(2000, 0.0, -3.3) <= 0.1
    assert refused(2000, 3.0, -3.3) > 0.9  # little better than guessing


# What refuses and what is held


def test_one_bad_slice_is_refused_by_name() -> None:
    candidate, champion = pair(12_000)
    rng = np.random.default_rng(0)
    shuffled = pl.Series(rng.permutation(candidate["p"].to_numpy()))
    bad = candidate.with_columns(p=pl.when(pl.col("device") == "c").then(shuffled).otherwise(pl.col("p")))
    gates = Gates(margins=Margins(auc=Share(amount=1), log_loss=Share(amount=1), normalized_entropy=Share(amount=1)))
    assert judge(evidence_on(bad, champion, gates), gates).promoted
    verdict = judge(evidence_on(bad, champion, gates, by=["device"]), gates)
    assert verdict.decision == "refused"
    refusals = [r.text for r in verdict.reasons if r.ruling == "refuse"]
    assert all("where device = c" in text for text in refusals)
    assert any("slice AUC" in text for text in refusals)
    assert any("slice log loss" in text for text in refusals)


def test_small_slices_are_not_compared() -> None:
    candidate, champion = pair(5000)
    sizes = {d: t.height for (d,), t in candidate.group_by("device")}
    positives = {d: t["click"].sum() for (d,), t in candidate.group_by("device")}
    rows = sorted(sizes.values())[2]
    found = evidence_on(candidate, champion, Gates(min_slice_rows=rows), by=["device"])
    assert {c.slice for c in found.comparisons} == {"all"} | {f"device = {d}" for d, n in sizes.items() if n >= rows}
    least = sorted(positives.values())[3]
    gates = Gates(min_slice_rows=1, min_slice_positives=least)
    found = evidence_on(candidate, champion, gates, by=["device"])
    kept = {f"device = {d}" for d, n in positives.items() if n >= least}
    assert {c.slice for c in found.comparisons} == {"all"} | kept


def test_many_equal_slices_do_not_flap() -> None:
    """The worst of 40 slices is worse by chance; their intervals hold together."""
    gates = Gates(min_slice_rows=20, min_slice_positives=5, margins=Margins(slice_auc=Share(amount=0)))
    refusals = 0
    for seed in range(20):
        tables = [t.with_columns(city=pl.int_range(pl.len()) % 40) for t in pair(8000, seed)]
        evidence = evidence_on(tables[0], tables[1], gates, by=["city"])
        assert sum(c.metric == "slice_auc" for c in evidence.comparisons) == 40
        refusals += any(c.metric == "slice_auc" and c.worse for c in evidence.comparisons)
    assert refusals <= 3


def test_a_leak_is_held() -> None:
    candidate, champion = pair(3000)
    leaky = candidate.with_columns(p=(pl.col("p") * 0.5 + pl.col("click") * 0.3).cast(pl.Float32))
    verdict = verdict_on(leaky, champion, Gates(calibration=(0, 9), margins=Margins(calibration=Share(amount=9))))
    assert verdict.decision == "held"
    held = " ".join(r.text for r in verdict.reasons if r.ruling == "hold")
    assert "which a leaked label would explain" in held
    assert "at most 0.99" in held
    alone = verdict_on(leaky, None, Gates(calibration=(0, 9)))
    assert alone.decision == "held"


def test_moved_scores_are_held() -> None:
    _, champion = pair(3000)
    sharper = champion.with_columns(p=pl.col("p") ** 3)
    wide = Share(amount=100)
    gates = Gates(
        margins=Margins(log_loss=wide, normalized_entropy=wide, calibration=wide),
        max_normalized_entropy=100,
        calibration=(0, 100),
    )
    verdict = verdict_on(sharper, champion, gates)  # ranks as before
    assert verdict.decision == "held"
    assert [r.text.split(",")[0].split(" ")[1] for r in verdict.reasons if r.ruling == "hold"] == ["PSI"]
    assert verdict_on(champion, champion, gates).promoted


def test_a_champion_on_the_wrong_scale_is_replaced_and_a_candidate_refused() -> None:
    right, champion = pair(5000)
    double = champion.with_columns(p=(pl.col("p") * 1.8).clip(0, 1))
    gates = Gates(max_psi=100)
    assert verdict_on(right, double, Gates(max_psi=100, suspicious_entropy_gain=1)).promoted
    worse = verdict_on(double, right, gates)
    assert worse.decision == "refused"
    assert any("calibration" in r.text for r in worse.reasons if r.ruling == "refuse")


def test_without_a_champion_the_limits_count() -> None:
    candidate, _ = pair(3000)
    verdict = verdict_on(candidate, None)
    assert verdict.promoted
    assert not evidence_on(candidate, None, by=["device"]).comparisons
    guessing = candidate.with_columns(p=pl.lit(0.5, pl.Float32))
    assert verdict_on(guessing, None).decision == "refused"
    scaled = candidate.with_columns(p=pl.col("p") * 0.3)
    refusals = [r.text for r in verdict_on(scaled, None).reasons if r.ruling == "refuse"]
    assert any("calibration" in text for text in refusals)


# What cannot be measured


def changed(column: pl.Expr | pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
    candidate, champion = pair(1000)
    return candidate.with_columns(column), champion.with_columns(column)


@pytest.mark.parametrize("champion", [True, False])
@pytest.mark.parametrize(
    ("click", "sentence"),
    [
        (pl.lit(0), "p: all 1,000 labels 'click' are 0, which leaves nothing to rank; judge on another day"),
        (pl.lit(1), "p: all 1,000 labels 'click' are 1, which leaves nothing to rank; judge on another day"),
        (pl.lit(None, pl.Int8), "p: there are no rows to measure (their label is not known yet"),
        ((pl.col("id") < 3).cast(pl.Int8), "p: only 3 of 1,000 rows are positive, fewer than gate.min_positives = 20"),
        ((pl.col("id") > 4).cast(pl.Int8), "p: only 5 of 1,000 rows are negative, fewer than gate.min_positives = 20"),
    ],
)
def test_a_day_that_says_nothing_is_refused_in_a_sentence(click: pl.Expr, sentence: str, champion: bool) -> None:
    tables = changed(click.alias("click"))
    verdict = verdict_on(tables[0], tables[1] if champion else None)
    assert verdict.decision == "refused"
    assert any(r.text.startswith(sentence) for r in verdict.reasons if r.ruling == "refuse")


def test_no_rows_are_refused_in_a_sentence() -> None:
    candidate, champion = (t.clear() for t in pair(10))
    for reference in (champion, None):
        verdict = verdict_on(candidate, reference, by=["device"], user="device")
        assert verdict.decision == "refused"
        assert "there are no rows to measure" in verdict.reasons[0].text


@pytest.mark.parametrize("value", [float("nan"), None, 1.5])
def test_scores_that_are_no_probabilities(value: float | None) -> None:
    candidate, champion = pair(1000)
    broken = candidate.with_columns(p=pl.when(pl.col("id") == 7).then(value).otherwise(pl.col("p")))
    for reference in (champion, None):
        verdict = verdict_on(broken, reference)
        assert verdict.decision == "refused"
        assert verdict.reasons[0].text.startswith("p: the candidate's scores: 1 of 1000 values are not probabilities")
    verdict = verdict_on(candidate, broken)
    assert verdict.decision == "held"  # a person may replace a champion that is broken
    assert verdict.reasons[0].text.startswith("p: the champion's scores: 1 of 1000 values are not probabilities")


def two_outputs(rows: int = 3000) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Scored tables with a conversion that is known on clicks only."""
    candidate, champion = pair(rows)
    buys = (pl.int_range(pl.len()) % 3 == 0).cast(pl.Int8)
    more = {"buy": pl.when(pl.col("click") == 1).then(buys), "p_buy": pl.col("p") * 0 + 0.34}
    return candidate.with_columns(**more), champion.with_columns(**more)


def test_each_output_is_measured_on_its_own_rows() -> None:
    candidate, champion = two_outputs()
    found = compare(candidate, champion, [CLICK, BUY], Gates(), champion_outputs=[CLICK, BUY])
    clicks = int(candidate["click"].sum())
    assert {c.output: c.rows for c in found.comparisons} == {"p": 3000, "p_buy": clicks}
    assert {c.output: c.units for c in found.comparisons} == {"p": 3000, "p_buy": clicks}


def test_an_output_that_is_not_required_is_left_out_where_unknown() -> None:
    candidate, champion = (t.with_columns(buy=pl.lit(None, pl.Int8)) for t in two_outputs())
    outputs = [CLICK, BUY]
    assert (
        judge(compare(candidate, champion, outputs, Gates(), champion_outputs=outputs), Gates()).decision == "refused"
    )
    lenient = Gates(outputs={"p_buy": OutputGates(required=False)})
    verdict = judge(compare(candidate, champion, outputs, lenient, champion_outputs=outputs), lenient)
    assert verdict.promoted
    assert any("it is not required, so the others decide" in r.text for r in verdict.reasons)


def test_outputs_of_one_model_only() -> None:
    candidate, champion = two_outputs()
    gone = judge(compare(candidate, champion, [CLICK], Gates(), champion_outputs=[CLICK, BUY]), Gates())
    assert gone.decision == "refused"
    assert gone.reasons[0].text == "p_buy: the champion gives it, the candidate does not"
    new = compare(candidate, champion.drop("p_buy"), [CLICK, BUY], Gates(), champion_outputs=[CLICK])
    assert {c.output for c in new.comparisons} == {"p"}
    assert {limit.output for limit in new.limits} == {"p", "p_buy"}


def test_an_output_of_another_label_is_not_compared() -> None:
    candidate, champion = two_outputs()
    other = Output(name="p", label="buy", given="click")
    verdict = judge(compare(candidate, champion, [CLICK], Gates(), champion_outputs=[other]), Gates())
    assert verdict.decision == "refused"
    assert verdict.reasons[0].text.startswith("p: the champion's is of another label or of other rows")
    unknown = judge(compare(candidate, None, [Output(name="p", label="like")], Gates()), Gates())
    assert unknown.decision == "refused"
    assert unknown.reasons[0].text.startswith("p: the rows have no label 'like' to measure it by")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.head(999), "the candidate scored 1,000 rows, the champion 999"),
        (lambda t: t.reverse(), "candidate and champion scored rows that differ in 'id'"),
        (
            lambda t: t.with_columns(click=1 - pl.col("click")),
            "candidate and champion scored rows that differ in 'click'",
        ),
    ],
)
def test_other_rows_are_refused(change: Callable[[pl.DataFrame], pl.DataFrame], sentence: str) -> None:
    candidate, champion = pair(1000)
    verdict = verdict_on(candidate, change(champion))
    assert verdict.decision == "refused"
    assert verdict.reasons[0].text.startswith(sentence)


@pytest.mark.parametrize("positives_of", ["users", "nobody else"])
def test_an_output_whose_rows_are_of_few_users_is_not_judged(positives_of: str) -> None:
    """Whichever class they hold: all rows, or all the positive ones."""
    tables = pair(2000)
    other = pl.col("id") if positives_of == "nobody else" else pl.col("id") % 19
    candidate, champion = (
        t.with_columns(user=pl.when(pl.col("click") == 1).then(pl.col("id") % 19).otherwise(other)) for t in tables
    )
    verdict = verdict_on(candidate, champion, user="user")
    assert verdict.decision == "refused"
    told = "p: all its positive or all its negative rows are of 19 values of 'user', fewer than gate.min_units = 20"
    assert verdict.reasons[0].text.startswith(told)
    optional = Gates(required=False)
    assert judge(evidence_on(candidate, champion, optional, user="user"), optional).reasons[-1].text.startswith(told)
    assert verdict_on(candidate, champion, Gates(min_units=19), user="user").promoted
