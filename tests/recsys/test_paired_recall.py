"""The recall of two models for the same users: differences, their intervals, and the verdicts that follow."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from base.config import parse_config
from base.errors import ConfigError
from recsys.gate import Comparison, Gates, Verdict, judge
from recsys.paired_recall import compare_recall
from recsys.retrieval import SLICES

USERS = 2000
HEAD, TAIL = SLICES.index("head"), SLICES.index("tail")


def recalls(seed: int, rate: float = 0.3, users: int = USERS, **of_slices: float) -> NDArray[np.float64]:
    """recall_US: two relevant head items and one of the tail for every second user; nothing of the others."""
    rng = np.random.default_rng(seed)
    head = rng.binomial(2, of_slices.get("head", rate), users) / 2
    tail = np.where(np.arange(users) % 2 == 0, rng.binomial(1, of_slices.get("tail", rate), users), np.nan)
    found = np.full((users, len(SLICES)), np.nan)
    found[:, 0] = np.where(np.isnan(tail), head, (2 * head + np.nan_to_num(tail)) / 3)
    found[:, HEAD], found[:, TAIL] = head, tail
    return found


def gates(**tree: Any) -> Gates:
    return parse_config(Gates, {"retrieval": tree}, source="test")


def verdict(candidate: NDArray[Any], champion: NDArray[Any] | None, settings: Gates, at_least: float = 0.01) -> Verdict:
    return judge(compare_recall(candidate, champion, settings, k=20, at_least=at_least), settings)


def by_name(candidate: NDArray[Any], champion: NDArray[Any], settings: Gates) -> dict[tuple[str, str], Comparison]:
    evidence = compare_recall(candidate, champion, settings, k=20, at_least=0)
    return {(c.metric, c.slice): c for c in evidence.comparisons}


def test_the_numbers_are_the_means_over_users_and_the_interval_is_of_their_differences() -> None:
    candidate, champion = recalls(1, 0.35), recalls(2)
    found = by_name(candidate, champion, gates())
    assert list(found) == [
        ("recall@20", "all"),
        ("slice_recall@20", "items = head"),
        ("slice_recall@20", "items = tail"),
    ]
    for place, key in ((0, ("recall@20", "all")), (TAIL, ("slice_recall@20", "items = tail"))):
        c, known = found[key], np.isfinite(champion[:, place])
        assert c.candidate == pytest.approx(np.nanmean(candidate[:, place]))
        assert c.champion == pytest.approx(np.nanmean(champion[:, place]))
        assert c.difference == pytest.approx(c.candidate - c.champion)
        assert (c.rows, c.units) == (known.sum(), USERS)
    whole = found["recall@20", "all"]
    error = np.std(candidate[:, 0] - champion[:, 0]) / np.sqrt(USERS)
    assert whole.upper - whole.difference == pytest.approx(1.96 * error, rel=0.15)
    assert whole.margin == pytest.approx(0.02 * whole.champion)
    tail = found["slice_recall@20", "items = tail"]
    alone = 1.96 * np.nanstd(candidate[:, TAIL] - champion[:, TAIL]) / np.sqrt(USERS / 2)
    assert alone * 1.05 < tail.upper - tail.difference < alone * 1.4  # it holds for both slices together


def test_an_equal_model_passes_by_a_difference_of_nothing() -> None:
    same = recalls(1)
    assert verdict(same, same.copy(), gates()).promoted
    assert {(c.difference, c.lower, c.upper) for c in by_name(same, same.copy(), gates()).values()} == {(0.0, 0.0, 0.0)}
    strict = gates()
    assert verdict(same, same.copy(), strict.model_copy(update={"unsure": "refuse"})).promoted


def test_what_is_certainly_and_materially_worse_is_refused() -> None:
    champion = recalls(1)
    worse = champion.copy()
    worse[:300, :] = np.where(np.isnan(worse[:300, :]), np.nan, 0.0)
    refused = verdict(worse, champion, gates())
    assert refused.decision == "refused"
    assert refused.reasons[0].text.startswith("similarity: recall@20 0.2")
    wide = {"recall": "30%", "slice_recall": "30%"}
    assert verdict(worse, champion, gates(margins=wide)).promoted  # not material
    assert verdict(recalls(2, 0.29), champion, gates()).promoted  # not certain


def test_a_slice_that_falls_refuses_though_the_whole_has_gained() -> None:
    champion, candidate = recalls(1), recalls(1, head=0.4, tail=0.3)
    candidate[:, TAIL] = np.where(np.isnan(champion[:, TAIL]), np.nan, 0.0)
    found = verdict(candidate, champion, gates())
    assert found.decision == "refused"
    assert [r.text.split(" 0.")[0] for r in found.reasons if r.ruling == "refuse"] == [
        "similarity: slice recall@20 where items = tail"
    ]
    assert verdict(candidate, champion, gates(min_slice_users=USERS)).promoted  # half of the users are too few


def test_too_good_is_held() -> None:
    champion = recalls(1, 0.2)
    held = verdict(recalls(2, 0.4), champion, gates())
    assert held.decision == "held"
    assert "better by more than" in held.reasons[0].text
    assert verdict(recalls(2, 0.4), champion, gates(suspicious_gain="200%")).promoted
    assert verdict(recalls(2, 1.0), None, gates()).decision == "held"
    assert verdict(recalls(2, 1.0), None, gates(suspicious_recall=1)).promoted


def test_without_a_champion_recall_itself_decides() -> None:
    first = recalls(1)
    assert verdict(first, None, gates(), at_least=0.2).promoted
    refused = verdict(first, None, gates(), at_least=0.4)
    assert refused.decision == "refused"
    assert refused.reasons[0].text.endswith(", at least 0.4")
    near = float(np.mean(first[:, 0])) + 0.005
    assert not verdict(first, None, gates(), at_least=near).promoted
    assert verdict(first, first, gates(), at_least=near).promoted  # with one, only what is certain


@pytest.mark.parametrize("users", [0, 1, 49])
def test_too_few_users_refuse(users: int) -> None:
    few = recalls(1, users=users)
    for champion in (None, few):
        found = verdict(few, champion, gates())
        assert found.decision == "refused"
        assert found.reasons[0].text == (
            f"similarity: only {users} users have something to find, fewer than gate.retrieval.min_users = 50; judge "
            "on another day"
        )
    if users:
        assert verdict(few, few, gates(min_users=users)).promoted


def test_models_that_were_asked_different_things_are_not_compared() -> None:
    other = recalls(1)
    other[0, TAIL] = np.nan
    found = verdict(recalls(1), other, gates())
    assert found.decision == "refused"
    assert "asked for other items" in found.reasons[0].text


def test_of_equally_good_models_few_are_refused() -> None:
    refused = [verdict(recalls(2 * i), recalls(2 * i + 1), gates()).decision for i in range(100)].count("refused")
    assert refused <= 10  # 2.5 % for the whole and as many for the slices together


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"min_recall": "random"}, "retrieval.min_recall"),
        ({"min_recall": 1.5}, "retrieval.min_recall"),
        ({"margins": {"auc": 0.1}}, "unknown key retrieval.margins.auc"),
        ({"min_users": 0}, "retrieval.min_users = 0"),
    ],
)
def test_settings_that_cannot_be_meant(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gates(**tree)
    assert message in str(caught.value)
