"""The gate's verdict: what is both material and certain refuses, what is too good is held, and it says why."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.config import parse_config
from base.errors import ConfigError
from recsys.gate import Comparison, Evidence, Gates, Limit, Margins, Reason, Share, judge, seen, superseded

DEFAULT = Gates()


def comparison(difference: float = 0.0, reach: float = 0.001, **changes: Any) -> Comparison:
    given: dict[str, Any] = {
        "metric": "auc",
        "output": "p_click",
        "rows": 1000,
        "units": 100,
        "candidate": 0.75 + difference,
        "champion": 0.75,
        "difference": difference,
        "lower": difference - reach,
        "upper": difference + reach,
        "margin": 0.002,
    }
    return Comparison(**{**given, **changes})


def limit(value: float, reach: float = 0.01, **changes: Any) -> Limit:
    given: dict[str, Any] = {"metric": "auc", "output": "p_click", "value": value}
    return Limit(**{**given, "lower": value - reach, "upper": value + reach, **changes})


def verdict_on(*comparisons: Comparison, gates: Gates = DEFAULT, limits: tuple[Limit, ...] = ()) -> Any:
    return judge(Evidence(champion=bool(comparisons), comparisons=comparisons, limits=limits), gates)


# Comparisons


@pytest.mark.parametrize(
    ("difference", "reach", "decision"),
    [
        (0.0, 0.0, "promoted"),
        (0.01, 0.001, "promoted"),
        (-0.0019, 0.0001, "promoted"),  # certainly worse, not by much
        (-0.0021, 0.0022, "promoted"),  # by much, not certainly
        (-0.0021, 0.0020, "refused"),
        (-0.1, 0.05, "refused"),
        (-0.1, math.inf, "promoted"),
    ],
)
def test_what_is_material_and_certain_is_refused(difference: float, reach: float, decision: str) -> None:
    verdict = verdict_on(comparison(difference, reach))
    assert verdict.decision == decision
    by_chance = decision == "promoted" and difference < -0.002
    assert verdict.reasons[0].text.endswith(", which may be chance") == by_chance


@pytest.mark.parametrize(
    ("difference", "reach", "decision"),
    [
        (0.0, 0.0, "promoted"),  # an equal model is shown to be equal
        (-0.001, 0.0009, "promoted"),
        (0.0, 0.0021, "refused"),
        (0.01, 0.0121, "refused"),
        (-0.1, math.inf, "refused"),
    ],
)
def test_unsure_may_refuse(difference: float, reach: float, decision: str) -> None:
    verdict = verdict_on(comparison(difference, reach), gates=Gates(unsure="refuse"))
    assert verdict.decision == decision
    if decision == "refused":
        assert verdict.reasons[0].text.endswith("too few rows to show that it is no worse")


def test_every_reason_is_given_refusals_first() -> None:
    worse = comparison(-0.05, metric="log_loss", output="p_buy", candidate=0.2, champion=0.15)
    found = verdict_on(comparison(), worse, comparison(-0.03), limits=(limit(0.4, at_least=0.5), limit(0.7)))
    assert found.decision == "refused"
    assert not found.promoted
    assert [r.ruling for r in found.reasons] == ["refuse"] * 3 + ["pass"] * 2
    assert str(found.reasons[0]) == "refused: p_click: AUC 0.40000, at least 0.5"
    assert str(found.reasons[1]) == (
        "refused: p_buy: log loss 0.20000 against champion 0.15000, "
        "better by -0.05000 [-0.05100, -0.04900], margin 0.002"
    )


def test_of_the_slices_that_pass_only_the_worst_is_told() -> None:
    slices = [comparison(d, slice=f"device = {d}") for d in (0.001, -0.0015, 0.0)]
    verdict = verdict_on(comparison(), *slices, comparison(-0.5, slice="device = tv"))
    assert [r.ruling for r in verdict.reasons] == ["refuse", "pass", "pass"]
    assert "AUC where device = tv 0.25000" in verdict.reasons[0].text
    assert "where device = -0.0015" in verdict.reasons[2].text
    assert verdict.reasons[2].text.endswith("(the worst of 3 slices that pass)")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_passes(value: float) -> None:
    assert verdict_on(comparison(value, lower=value, upper=value)).decision == "refused"
    assert verdict_on(comparison(value)).decision == "refused"
    assert verdict_on(limits=(limit(math.nan),)).decision == "refused"
    assert verdict_on(limits=(limit(math.nan, at_most=1.0),)).decision == "refused"


def test_nothing_measured_never_passes() -> None:
    for champion in (True, False):
        verdict = judge(Evidence(champion=champion), Gates())
        assert verdict.decision == "refused"
        assert verdict.reasons[0].text == "nothing of the candidate was measured"


@given(difference=st.floats(-0.1, 0.1), reach=st.floats(0, 0.1), margin=st.floats(0, 0.1), worse=st.floats(1e-6, 0.1))
def test_a_worse_model_never_fares_better(difference: float, reach: float, margin: float, worse: float) -> None:
    for gates in (Gates(), Gates(unsure="refuse")):
        here = verdict_on(comparison(difference, reach, margin=margin), gates=gates)
        below = verdict_on(comparison(difference - worse, reach, margin=margin), gates=gates)
        assert here.promoted or not below.promoted
        stricter = verdict_on(comparison(difference, reach, margin=margin / 2), gates=gates)
        assert here.promoted or not stricter.promoted


# Too good


def test_too_good_is_held_if_certain() -> None:
    assert verdict_on(comparison(0.05, too_good=0.02)).decision == "held"
    assert verdict_on(comparison(0.05, 0.06, too_good=0.02)).decision == "promoted"
    assert verdict_on(comparison(0.019, too_good=0.02)).decision == "promoted"
    assert verdict_on(limits=(limit(0.995, at_most=0.99, otherwise="hold"),)).decision == "held"


def test_refused_is_stronger_than_held_and_only_held_can_be_approved() -> None:
    too_good, worse = comparison(0.05, too_good=0.02), comparison(-0.05)
    both = verdict_on(too_good, worse)
    assert [r.ruling for r in both.reasons] == ["refuse", "hold"]
    assert both.decision == "refused"
    assert both.approved() == both
    held = verdict_on(too_good)
    assert held.approved().promoted
    assert held.approved().reasons[0] == held.reasons[0]  # what was held is still told
    assert held.approved().reasons[-1] == Reason(ruling="pass", text="a person approved it")
    passed = verdict_on(comparison())
    assert passed.approved() == passed


# Limits


def test_without_a_champion_the_estimate_counts_and_with_one_only_certainty() -> None:
    near, far = limit(0.495, at_least=0.5), limit(0.48, at_least=0.5)
    assert verdict_on(limits=(near,)).decision == "refused"
    assert verdict_on(comparison(), limits=(near,)).promoted
    assert verdict_on(comparison(), limits=(far,)).decision == "refused"
    assert verdict_on(comparison(output="p_buy"), limits=(near,)).decision == "refused"  # p_click is new
    assert verdict_on(limits=(limit(0.505, at_least=0.5),)).reasons[-1].text == "there is no champion yet"


def test_both_ends_of_a_limit() -> None:
    between = {"at_least": 0.5, "at_most": 2.0}
    assert verdict_on(limits=(limit(1.0, **between),)).promoted
    assert not verdict_on(limits=(limit(2.005, **between),)).promoted
    assert not verdict_on(limits=(limit(0.495, **between),)).promoted
    assert verdict_on(comparison(), limits=(limit(2.005, **between),)).promoted
    assert not verdict_on(comparison(), limits=(limit(2.02, **between),)).promoted


# Settings


def parsed(**tree: Any) -> Gates:
    return parse_config(Gates, tree, source="test")


def test_margins_are_differences_or_shares_of_the_champions() -> None:
    margins = parsed(margins={"auc": 0.01, "log_loss": "1.5%", "calibration": 1}).margins
    assert margins.auc.of(0.7) == 0.01
    assert margins.log_loss.of(0.4) == pytest.approx(0.006)
    assert margins.calibration == Share(amount=1)
    assert margins.slice_auc == Margins().slice_auc


def test_an_output_inherits_what_it_does_not_say() -> None:
    gates = parsed(
        min_auc=0.6,
        margins={"auc": 0.01, "log_loss": "5%"},
        outputs={"p_buy": {"margins": {"auc": "3%"}, "min_positives": 5}},
    )
    own = gates.of("p_buy")
    assert own.margins.auc == Share(amount=0.03, relative=True)
    assert own.margins.log_loss == Share(amount=0.05, relative=True)
    assert (own.min_auc, own.min_positives) == (0.6, 5)
    assert gates.of("p_click").margins.auc == Share(amount=0.01)
    assert gates.of("p_click").min_positives == 20
    assert Gates.model_validate(gates.model_dump(mode="json")) == gates


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"margins": {"auc": "much"}}, "margins.auc: 'much' is neither a number nor a share of the champion's value"),
        ({"margins": {"auc": "-1%"}}, "margins.auc: '-1%' is neither a number"),
        ({"margins": {"auc": -1}}, "margins.auc.amount = -1: Input should be greater than or equal to 0"),
        ({"margins": {"acu": 1}}, "unknown key margins.acu; did you mean 'auc'?"),
        ({"outputs": {"p": {"min_acu": 1}}}, "unknown key outputs.p.min_acu; did you mean 'min_auc'?"),
        ({"calibration": [2, 1]}, "calibration = [2.0, 1.0]: write [at least, at most]"),
        ({"outputs": {"p": {"calibration": [2, 1]}}}, "calibration = [2.0, 1.0]: write [at least, at most]"),
        ({"unsure": "maybe"}, "unsure = 'maybe'"),
    ],
)
def test_settings_that_cannot_be_meant(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(**tree)
    assert message in str(caught.value)


# Which day did what


def test_superseded_is_older_not_equal_nor_unknown() -> None:
    assert superseded("2026-03-04", "2026-03-05")
    assert not superseded("2026-03-05", "2026-03-05")
    assert not superseded("2026-03-06", "2026-03-05")
    assert not superseded(None, "2026-03-05")
    assert not superseded("2026-03-05", None)
    with pytest.raises(ValueError, match="Invalid isoformat"):
        superseded("yesterday", "2026-03-05")


def test_seen_is_up_to_and_with_the_last_day() -> None:
    assert seen("2026-03-05", "2026-03-05")
    assert seen("2026-03-05", "2026-02-28")
    assert not seen("2026-03-05", "2026-03-06")
    assert not seen(None, "2026-03-06")
