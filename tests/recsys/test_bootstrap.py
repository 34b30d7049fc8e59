"""The bootstrap's weights and intervals: the same for the same seed, and as wide as they say."""

import numpy as np
import pytest

from recsys.bootstrap import bounds, weights


def test_weights_are_poisson_and_repeat() -> None:
    drawn = np.concatenate(list(weights(1000, 200, seed=3)))
    assert drawn.shape == (200, 1000)
    share = np.bincount(drawn.ravel(), minlength=5)[:5] / drawn.size
    np.testing.assert_allclose(share, np.exp(-1) / np.array([1, 1, 2, 6, 24]), atol=0.003)
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.15
    np.testing.assert_array_equal(drawn, np.concatenate(list(weights(1000, 200, seed=3))))
    assert (drawn != np.concatenate(list(weights(1000, 200, seed=4)))).any()


def test_blocks_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(weights(101, 7, seed=0)))
    monkeypatch.setattr("recsys.bootstrap._BLOCK", 250)
    blocks = list(weights(101, 7, seed=0))
    assert [len(b) for b in blocks] == [2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize("together", [1, 8])
def test_intervals_hold_as_often_as_they_say_all_together(together: int) -> None:
    """Means of skewed numbers, whose truth is 1, some of them correlated; 600 trials miss 95 % by 2.7 % at most."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(600):
        x_NK = rng.exponential(size=(150, together))
        x_NK[:, together // 2 :] = (x_NK[:, together // 2 :] + x_NK[:, :1]) / 2
        weights_DN = np.concatenate(list(weights(150, 200, seed=trial)))
        drawn_DK = weights_DN @ x_NK / weights_DN.sum(axis=1, keepdims=True)
        lower_K, upper_K = bounds(x_NK.mean(axis=0), drawn_DK, 0.95)
        held += bool(((lower_K <= 1) & (upper_K >= 1)).all())
    assert 0.91 < held / 600 < 0.98


def test_equal_has_no_width_and_undefined_has_no_end() -> None:
    draws_DK = np.zeros((200, 2))
    draws_DK[:, 1] = np.random.default_rng(0).normal(size=200)
    lower_K, upper_K = bounds(np.zeros(2), draws_DK, 0.95)
    assert (lower_K[0], upper_K[0]) == (0, 0)
    assert upper_K[1] == pytest.approx(1.96, abs=0.4)
    draws_DK[:5, 1] = np.nan  # less than one in twenty
    assert np.isfinite(bounds(np.zeros(2), draws_DK, 0.95)[1][1])
    draws_DK[:50, 1] = np.nan
    lower_K, upper_K = bounds(np.zeros(2), draws_DK, 0.95)
    assert (lower_K[1], upper_K[1]) == (-np.inf, np.inf)
    assert (lower_K[0], upper_K[0]) == (0, 0)
    lower_K, upper_K = bounds(np.zeros(1), np.full((200, 1), np.nan), 0.95)
    assert (lower_K[0], upper_K[0]) == (-np.inf, np.inf)


def test_what_is_undefined_widens_no_other() -> None:
    rng = np.random.default_rng(0)
    draws_DK = rng.normal(size=(400, 3))
    alone_K = bounds(np.zeros(2), draws_DK[:, :2], 0.95)[1]
    for share in (0.03, 0.5, 1):  # of the draws; every twentieth may be undefined, and the number still has ends
        draws_DK[: int(share * 400), 2] = np.nan
        lower_K, upper_K = bounds(np.zeros(3), draws_DK, 0.95)
        assert (upper_K[:2] >= alone_K).all()
        assert (upper_K[:2] <= 1.3 * alone_K).all()
        assert np.isfinite(lower_K[2]) == (share < 0.05)
    np.testing.assert_array_equal(upper_K[:2], alone_K)
    many_DK = rng.normal(size=(400, 40))
    for k in range(40):  # each in 4 % of the draws, together in more than half of them
        many_DK[rng.choice(400, 16, replace=False), k] = np.nan
    assert np.isfinite(bounds(np.zeros(40), many_DK, 0.95)[1]).all()
