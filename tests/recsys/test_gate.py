"""The gate: equals pass, worse is refused, what cannot be compared never passes; and it says why."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.gate import Gates, judge

CHAMPION = {"p_click": {"auc": 0.75, "log_loss": 0.45}, "p_buy": {"auc": 0.8, "log_loss": 0.1}}
GATES = Gates(max_auc_loss=0.001, max_log_loss_increase=0.002, min_auc=0.6)


def changed(output: str = "p_click", **metrics: float) -> dict[str, dict[str, float]]:
    return {**CHAMPION, output: {**CHAMPION[output], **metrics}}


def test_equals_pass_even_without_a_margin() -> None:
    for gates in (GATES, Gates(max_auc_loss=0, max_log_loss_increase=0)):
        verdict = judge(CHAMPION, CHAMPION, gates)
        assert verdict.promoted
        assert len(verdict.reasons) >= 6  # what was held against what, for each output
        assert all(reason.startswith(("p_click: ", "p_buy: ")) for reason in verdict.reasons)


def test_better_passes() -> None:
    assert judge(changed(auc=0.76, log_loss=0.44), CHAMPION, GATES).promoted


@pytest.mark.parametrize(
    ("output", "metrics", "reason"),
    [
        ("p_click", {"auc": 0.7489}, "p_click: AUC 0.74890 against champion 0.75000, margin 0.001"),
        ("p_buy", {"auc": 0.7}, "p_buy: AUC 0.70000 against champion 0.80000, margin 0.001"),
        ("p_click", {"log_loss": 0.4521}, "p_click: log loss 0.45210 against champion 0.45000, margin 0.002"),
        ("p_buy", {"log_loss": 0.2}, "p_buy: log loss 0.20000 against champion 0.10000, margin 0.002"),
    ],
)
def test_worse_is_refused_with_its_numbers(output: str, metrics: dict[str, float], reason: str) -> None:
    verdict = judge(changed(output, **metrics), CHAMPION, GATES)
    assert not verdict.promoted
    assert verdict.reasons == (reason,)


def test_a_little_worse_passes_within_the_margin() -> None:
    assert judge(changed(auc=0.7491, log_loss=0.4519), CHAMPION, GATES).promoted
    assert not judge(changed(auc=0.7491, log_loss=0.4519), CHAMPION, Gates(max_auc_loss=0.0001)).promoted


def test_every_reason_to_refuse_is_given() -> None:
    verdict = judge({"p_click": {"auc": 0.5, "log_loss": 0.9}, "p_buy": CHAMPION["p_buy"]}, CHAMPION, GATES)
    assert not verdict.promoted
    assert len(verdict.reasons) == 3
    assert verdict.reasons[0] == "p_click: AUC 0.50000 >= 0.6 required"


def test_without_a_champion_only_the_minimum_counts() -> None:
    verdict = judge(CHAMPION, None, GATES)
    assert verdict.promoted
    assert verdict.reasons[-1] == "there is no champion yet"
    refused = judge(changed(auc=0.59), None, GATES)
    assert not refused.promoted
    assert refused.reasons == ("p_click: AUC 0.59000 >= 0.6 required",)


@pytest.mark.parametrize("metric", ["auc", "log_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("champion", [CHAMPION, None], ids=["champion", "none"])
def test_what_is_no_number_never_passes(
    metric: str, value: float, champion: dict[str, dict[str, float]] | None
) -> None:
    if metric == "auc" and value == math.inf:
        pytest.skip("no AUC is infinite")
    verdict = judge(changed(**{metric: value}), champion, GATES)
    assert not verdict.promoted
    assert verdict.reasons[0].startswith("p_click: ")


@pytest.mark.parametrize("metric", ["auc", "log_loss"])
def test_a_champion_without_numbers_is_not_beaten_unseen(metric: str) -> None:
    assert not judge(CHAMPION, changed(**{metric: math.nan}), GATES).promoted


@pytest.mark.parametrize("champion", [CHAMPION, None], ids=["champion", "none"])
def test_a_day_of_which_nothing_is_known_never_passes(champion: dict[str, dict[str, float]] | None) -> None:
    verdict = judge(changed("p_buy", rows=0.0, auc=math.nan, log_loss=math.nan), champion, GATES)
    assert not verdict.promoted
    [reason] = verdict.reasons
    assert reason.startswith("p_buy: there are no rows to measure")


def test_an_output_of_the_champion_must_be_there() -> None:
    verdict = judge({"p_click": CHAMPION["p_click"]}, CHAMPION, GATES)
    assert not verdict.promoted
    assert any(reason.startswith("p_buy: ") for reason in verdict.reasons)
    assert judge(CHAMPION, {"p_click": CHAMPION["p_click"]}, GATES).promoted  # a new one needs no champion


@pytest.mark.parametrize("champion", [CHAMPION, None], ids=["champion", "none"])
def test_nothing_measured_never_passes(champion: dict[str, dict[str, float]] | None) -> None:
    assert not judge({}, champion, GATES).promoted


unit = st.floats(0.5, 1)


@given(a=unit, b=unit, loss_a=unit, loss_b=unit)
def test_the_verdict_is_the_definition(a: float, b: float, loss_a: float, loss_b: float) -> None:
    gates = Gates(max_auc_loss=0.01, max_log_loss_increase=0.02, min_auc=0.7)
    verdict = judge({"p": {"auc": a, "log_loss": loss_a}}, {"p": {"auc": b, "log_loss": loss_b}}, gates)
    assert verdict.promoted == (a >= 0.7 and b - a <= 0.01 and loss_a - loss_b <= 0.02)
    assert verdict.reasons
