"""Losses: each against a few lines of float64 numpy, at the edges, and pinned by a number."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys import losses
from recsys.losses import (
    clicked_log_loss,
    cross_entropy,
    dr_loss,
    entropy_loss,
    in_batch_softmax,
    inverse_propensities,
    ips_loss,
    log_loss,
    log_loss_of_product,
    mean,
    mean_log_loss,
)

Array = NDArray[np.float64]
NAN = float("nan")
NO_CLIP = 1e12


def tensors(*arrays: Array) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(a, np.float64)) for a in arrays]


def gradient(x: Tensor) -> Array:
    assert x.grad is not None
    return x.grad.numpy()


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def delta(x: Array, y: Array) -> Array:
    """Log loss of each element, by its definition."""
    return -(y * np.log(sigmoid(x)) + (1 - y) * np.log(1 - sigmoid(x)))


class Rows:
    """Logits of a conversion, imputed losses, clicks, conversions, propensities and impressions per row."""

    def __init__(self, rows: int = 200, seed: int = 0, unknown: float = 0.1) -> None:
        rng = np.random.default_rng(seed)
        self.x, self.e = rng.normal(size=rows) * 2, rng.uniform(0.1, 2, rows)
        self.p = rng.uniform(0.02, 0.9, rows)
        self.o = (rng.random(rows) < self.p).astype(float)
        self.r = self.o * (rng.random(rows) < 0.4)
        self.o[rng.random(rows) < unknown] = NAN
        self.r[rng.random(rows) < unknown] = NAN
        self.known = ~np.isnan(self.o) & ~np.isnan(self.r)
        self.n = np.where(self.o == 0, 5.0, 1.0)

    def mean(self, values: Array, *, weighted: bool = True) -> float:
        n = (self.n if weighted else np.ones_like(self.n))[self.known]
        return float((n * values[self.known]).sum() / n.sum())


# --- log loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2])
def test_log_loss_is_the_mean_over_rows_and_the_sum_over_tasks(tasks: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, tasks)) * 3, rng.integers(0, 2, (20, tasks)).astype(float)
    expected = sum(delta(x[:, t], y[:, t]).mean() for t in range(tasks))
    assert log_loss(*tensors(x, y)).item() == pytest.approx(expected)
    extreme = log_loss(torch.tensor([[200.0], [-200.0]]), torch.tensor([[0.0], [0.0]]))
    assert extreme.item() == pytest.approx(100.0)


def test_log_loss_is_over_the_known_labels_of_each_task() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 2)), rng.integers(0, 2, (40, 2)).astype(float)
    y[:10, 0], y[5:35, 1] = NAN, NAN
    expected = delta(x[10:, 0], y[10:, 0]).mean() + delta(x[:, 1], y[:, 1])[~np.isnan(y[:, 1])].mean()
    assert log_loss(*tensors(x, y)).item() == pytest.approx(expected)
    a, b = (mean_log_loss(*tensors(x[:, t], y[:, t])).item() for t in (0, 1))
    assert a + b == pytest.approx(expected)
    np.testing.assert_array_equal(cross_entropy(*tensors(x, y)).numpy() == 0, np.isnan(y))


def test_mean_is_over_the_rows_asked_for_by_their_weight() -> None:
    values, where = torch.tensor([1.0, 2.0, NAN, 10.0]), torch.tensor([True, True, False, True])
    assert mean(values, where).item() == pytest.approx(13 / 3)
    assert mean(values, where, torch.tensor([1.0, 3.0, 9.0, 4.0])).item() == pytest.approx(47 / 8)
    assert mean(values, torch.zeros(4, dtype=torch.bool)).item() == 0


# --- ESMM's product --------------------------------------------------------------------------------------------------


def test_log_loss_of_a_product_is_its_formula() -> None:
    rng = np.random.default_rng(2)
    a, b, y = rng.normal(size=100) * 3, rng.normal(size=100) * 3, rng.integers(0, 2, 100).astype(float)
    y[::7] = NAN
    both = sigmoid(a) * sigmoid(b)
    expected = np.nanmean(-(y * np.log(both) + (1 - y) * np.log(1 - both)))
    assert log_loss_of_product(*tensors(a, b, y)).item() == pytest.approx(expected, rel=1e-12)


def softplus(x: float) -> float:
    return max(x, 0.0) + float(np.log1p(np.exp(-abs(x))))


def exact_of_product(a: float, b: float, y: float) -> tuple[float, float]:
    """Loss and its derivative by `a`, in double precision and with no difference of near numbers."""
    log_both = -softplus(-a) - softplus(-b)
    if y == 1:
        return -log_both, -float(1 / (1 + np.exp(a)))
    left, right = np.exp(-a), np.exp(-b)  # 1 - σ(a)σ(b) = (e^-a + e^-b + e^-a-b) σ(a)σ(b)
    rest = left + right + left * right
    loss = float(np.log1p(1 / rest)) if rest > 1 else -float(np.log(rest)) - log_both
    return loss, float(left / (1 + left) / rest)


EDGES = [-40.0, -15.0, -7.0, -3.0, 0.0, 3.0, 15.0, 40.0]


@pytest.mark.parametrize("y", [0.0, 1.0])
@pytest.mark.parametrize("b", EDGES)
@pytest.mark.parametrize("a", EDGES)
def test_log_loss_of_a_product_loses_nothing_at_the_edges(a: float, b: float, y: float) -> None:
    """In single precision, value and gradient, from probabilities of 1e-35 to 1 - 1e-17."""
    a_B, b_B = (torch.tensor([v], requires_grad=True) for v in (a, b))
    loss = log_loss_of_product(a_B, b_B, torch.tensor([y]))
    loss.backward()
    found = [loss.item(), gradient(a_B).item(), gradient(b_B).item()]
    value, by_a = exact_of_product(a, b, y)
    expected = [value, by_a, exact_of_product(b, a, y)[1]]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-37)


def test_a_probability_that_can_be_no_larger_is_still_punished() -> None:
    a_B = torch.full((1,), 200.0, requires_grad=True)
    loss = log_loss_of_product(a_B, torch.full((1,), 200.0), torch.zeros(1))
    loss.backward()
    assert loss.item() == pytest.approx(200 - np.log(2))
    assert gradient(a_B).item() == pytest.approx(0.5, rel=1e-5)


def test_esmm_is_the_sum_of_its_two_losses() -> None:
    """Equation 3, over all impressions: no loss of the conversion alone."""
    from features.schema import Schema, Sparse
    from recsys.models import build_model
    from recsys.models.esmm import ESMMConfig

    labels = ("click", "buy")
    schema = Schema(keys=(), dense=(), sparse=(Sparse(name="a", rows=2),), labels=labels, funnel=labels)
    model, rows = build_model(ESMMConfig(dim=4), schema), Rows()
    a = np.random.default_rng(9).normal(size=200)
    found = model.loss(*tensors(np.stack([a, rows.x], axis=1), np.stack([rows.o, rows.r], axis=1)))
    click = mean_log_loss(*tensors(a, rows.o))
    both = log_loss_of_product(*tensors(a, rows.x, rows.r))
    assert found.item() == pytest.approx((click + both).item(), rel=1e-12)
    assert click.item() > 0.1
    assert both.item() > 0.1


# --- conversions on clicked rows -------------------------------------------------------------------------------------


def test_clicked_log_loss_is_over_clicked_rows_with_known_conversions() -> None:
    rows = Rows()
    chosen = (rows.o == 1) & ~np.isnan(rows.r)
    expected = delta(rows.x, rows.r)[chosen].mean()
    assert clicked_log_loss(*tensors(rows.x, rows.o, rows.r)).item() == pytest.approx(expected)
    assert 10 < chosen.sum() < (rows.o == 1).sum()


# --- inverse propensities --------------------------------------------------------------------------------------------


def test_inverse_propensities_are_floored_and_capped_at_multiples_of_the_mean() -> None:
    p, n = np.array([1e-9, 0.01, 0.2, 0.6, 0.95]), np.ones(5)
    free = inverse_propensities(*tensors(p, n), floor=1e-12, clip=NO_CLIP).numpy()
    np.testing.assert_allclose(free, 1 / p)
    floored = inverse_propensities(*tensors(p, n), floor=0.05, clip=NO_CLIP).numpy()
    np.testing.assert_allclose(floored, [20, 20, 5, 1 / 0.6, 1 / 0.95])
    for counted in (n, np.array([10.0, 10, 1, 1, 1])):  # the mean is over impressions, of which a row may be several
        capped = inverse_propensities(*tensors(p, counted), floor=0.05, clip=3.0).numpy()
        cap = 3 / np.average(np.maximum(p, 0.05), weights=counted)
        assert 1 / 0.6 < cap < 30
        np.testing.assert_allclose(capped, np.minimum([20, 20, 5, 1 / 0.6, 1 / 0.95], cap))
    for rate in (0.03, 0.0003):  # where clicks are rarer the cap is higher, by as much
        few = inverse_propensities(torch.tensor([rate, rate, rate, rate / 100]), torch.ones(4), 1e-9, 15.0)
        np.testing.assert_allclose(few * rate, [1, 1, 1, 15 / 0.7525], rtol=1e-5)


def test_unclipped_ips_is_the_mean_of_weighted_clicks() -> None:
    rows = Rows()
    values = np.where(rows.o == 1, delta(rows.x, rows.r) / rows.p, 0)
    found = ips_loss(*tensors(rows.x, rows.o, rows.r, rows.p, np.ones(200)), floor=1e-6, clip=NO_CLIP)
    assert found.item() == pytest.approx(rows.mean(values, weighted=False))
    weighted = ips_loss(*tensors(rows.x, rows.o, rows.r, rows.p, rows.n), floor=1e-6, clip=NO_CLIP)
    assert weighted.item() == pytest.approx(rows.mean(values))
    assert weighted.item() < found.item()  # each non-click stands for five, and a click for itself


def test_the_clip_binds() -> None:
    rows = Rows()
    arguments = tensors(rows.x, rows.o, rows.r, rows.p, rows.n)
    free, clipped = (ips_loss(*arguments, floor=1e-6, clip=c).item() for c in (NO_CLIP, 1.2))
    cap = 1.2 / np.average(rows.p, weights=rows.n)
    values = np.where(rows.o == 1, np.minimum(1 / rows.p, cap) * delta(rows.x, rows.r), 0)
    assert clipped == pytest.approx(rows.mean(values))
    assert clipped < 0.95 * free
    assert 0.1 < (1 / rows.p[rows.o == 1] > cap).mean() < 0.9


def test_ips_estimates_the_mean_over_all_rows_from_the_clicked_ones() -> None:
    """Over draws of the click, its mean is that of δ over all rows; so is DR's, with any imputation."""
    rng = np.random.default_rng(4)
    rows, draws = 40, 20_000
    x, p, would = rng.normal(size=rows), rng.uniform(0.1, 0.9, rows), (rng.random(rows) < 0.5).astype(float)
    p[would == 1] *= 0.5  # who would convert is seen less
    everywhere = delta(x, would).mean()
    o = (rng.random((draws, rows)) < p).astype(float)
    seen_r = np.where(o == 1, would, 0.0)
    x_B, o_B, r_B, p_B = tensors(np.tile(x, draws), o.reshape(-1), seen_r.reshape(-1), np.tile(p, draws))
    one = torch.ones(draws * rows, dtype=torch.float64)
    ips = ips_loss(x_B, o_B, r_B, p_B, one, 1e-9, NO_CLIP).item()
    seen = clicked_log_loss(x_B, o_B, r_B).item()
    d_B = delta(x, would)
    error = np.sqrt(((1 / p - 1) * d_B**2).mean() / (draws * rows))
    assert ips == pytest.approx(everywhere, abs=4 * error)
    assert abs(seen - everywhere) > 10 * error  # what is seen is another mean
    imputed = np.tile(rng.uniform(0, 3, rows), draws)
    weight, gap = (o_B / p_B).numpy(), np.tile(d_B, draws) - imputed
    robust = dr_loss(x_B, torch.from_numpy(imputed), o_B, r_B, p_B, one, 1e-9, NO_CLIP).item()
    error = np.sqrt(((1 / p_B.numpy() - 1) * gap**2).mean() / (draws * rows))
    assert robust - (weight * gap**2).mean() == pytest.approx(everywhere, abs=4 * error)


def test_non_clicks_that_were_sampled_count_for_those_left_out() -> None:
    """A share of the non-clicks, each for 1/rate: in the mean over draws the sums are those of all rows."""
    rng = np.random.default_rng(5)
    rows, rate = 400_000, 0.1
    p = rng.uniform(0.05, 0.6, rows)
    o = (rng.random(rows) < p).astype(float)
    x = rng.normal(size=rows) * 0.5 + 3 * o
    r, e = o * (rng.random(rows) < sigmoid(x)), rng.uniform(0.1, 1, rows)
    kept = (o == 1) | (rng.random(rows) < rate)
    n = np.where(o == 0, 1 / rate, 1.0)
    one = np.ones(rows)
    for loss in (
        lambda x, e, o, r, p, n: ips_loss(x, o, r, p, n, 1e-6, NO_CLIP),
        lambda x, e, o, r, p, n: dr_loss(x, e, o, r, p, n, 1e-6, NO_CLIP),
        lambda x, e, o, r, p, n: entropy_loss(x, o, r, n),
    ):
        whole = loss(*tensors(x, e, o, r, p, one)).item()
        sampled = loss(*tensors(*(v[kept] for v in (x, e, o, r, p, n)))).item()
        unweighted = loss(*tensors(*(v[kept] for v in (x, e, o, r, p, one)))).item()
        assert sampled == pytest.approx(whole, rel=0.01)
        assert abs(unweighted - whole) > 0.03 * whole


def test_a_propensity_is_a_constant_and_so_is_the_loss_that_imputation_learns() -> None:
    rows = Rows(unknown=0.0)
    x, e, o, r, p, n = (t.requires_grad_(i in (0, 1, 4)) for i, t in enumerate(
        tensors(rows.x, rows.e, rows.o, rows.r, rows.p, rows.n)
    ))  # fmt: skip
    total = n.sum().item()
    weight = np.where(rows.o == 1, 1 / rows.p, 0)
    slope = sigmoid(rows.x) - rows.r  # of δ by the logit
    ips_loss(x, o, r, p, n, 1e-6, NO_CLIP).backward()
    assert p.grad is None
    np.testing.assert_allclose(gradient(x), weight * rows.n * slope / total, rtol=1e-9)
    x.grad = None
    dr_loss(x, e, o, r, p, n, 1e-6, NO_CLIP).backward()
    assert p.grad is None
    np.testing.assert_allclose(gradient(x), weight * rows.n * slope / total, rtol=1e-9)  # of the first sum alone
    gap = delta(rows.x, rows.r) - rows.e
    np.testing.assert_allclose(gradient(e), rows.n * (1 - weight - 2 * weight * gap) / total, rtol=1e-9, atol=1e-12)


def test_dr_is_its_formula_and_needs_no_clicks_where_imputation_is_right() -> None:
    rows = Rows()
    d = delta(rows.x, rows.r)
    gap = np.where(rows.o == 1, d - rows.e, 0)
    expected = rows.mean(rows.e + gap / rows.p + gap**2 / rows.p)
    arguments = tensors(rows.x, rows.e, rows.o, rows.r, rows.p, rows.n)
    assert dr_loss(*arguments, floor=1e-6, clip=NO_CLIP).item() == pytest.approx(expected)
    right = tensors(rows.x, np.where(rows.o == 1, d, rows.e), *(rows.o, rows.r, rows.p, rows.n))
    for wrong_p in (rows.p, np.full(200, 0.5)):
        right[4] = torch.from_numpy(wrong_p)
        found = dr_loss(*right, floor=1e-6, clip=NO_CLIP).item()
        assert found == pytest.approx(rows.mean(np.where(rows.o == 1, d, rows.e)))
    cap = 1.2 / np.average(rows.p, weights=rows.n)
    weight = np.minimum(1 / rows.p, cap)
    clipped = dr_loss(*arguments, floor=1e-6, clip=1.2).item()
    assert clipped == pytest.approx(rows.mean(rows.e + weight * gap + weight * gap**2))
    assert clipped != pytest.approx(expected)


# --- NISE ------------------------------------------------------------------------------------------------------------


def test_non_clicks_have_the_entropy_of_what_is_predicted() -> None:
    rows = Rows()
    q = sigmoid(rows.x)
    entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q))
    expected = rows.mean(np.where(rows.o == 1, delta(rows.x, rows.r), entropy))
    assert entropy_loss(*tensors(rows.x, rows.o, rows.r, rows.n)).item() == pytest.approx(expected)
    x = torch.linspace(-6, 6, 50, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(50, dtype=torch.float64)
    entropy_loss(x, zero, zero, zero + 1).backward()
    q = sigmoid(x.detach().numpy())
    np.testing.assert_allclose(gradient(x), -x.detach().numpy() * q * (1 - q) / 50, atol=1e-12)  # towards 0 or 1


# --- the edges -------------------------------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ONE = torch.ones(8, dtype=torch.float64)
EVERY: dict[str, Loss] = {
    "log_loss": lambda x, e, o, r: log_loss(torch.stack([x, e], 1), torch.stack([o, r], 1)),
    "mean_log_loss": lambda x, e, o, r: mean_log_loss(x, r),
    "log_loss_of_product": lambda x, e, o, r: log_loss_of_product(x, e, r),
    "clicked": lambda x, e, o, r: clicked_log_loss(x, o, r),
    "ips": lambda x, e, o, r: ips_loss(x, o, r, e.sigmoid(), ONE, 1e-6, 15.0),
    "dr": lambda x, e, o, r: dr_loss(x, e.exp(), o, r, e.sigmoid(), ONE, 1e-6, 15.0),
    "entropy": lambda x, e, o, r: entropy_loss(x, o, r, ONE),
}
GOLDEN = {
    "log_loss": 1.5615020,
    "mean_log_loss": 0.7324588,
    "log_loss_of_product": 0.4260088,
    "clicked": 0.6916940,
    "ips": 0.4564368,
    "dr": 8.7311450,
    "entropy": 0.6554392,
}


def fixed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eight rows: four clicks, one of them converted and one not known yet, and a row of which nothing is known."""
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    e = torch.tensor([0.3, -1.2, 0.8, -0.4, 2.0, -2.5, 0.1, 1.0], dtype=torch.float64)
    o = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, NAN], dtype=torch.float64)
    r = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, NAN, NAN], dtype=torch.float64)
    return x, e, o, r


@pytest.mark.parametrize("name", EVERY)
def test_each_loss_is_the_number_kept(name: str) -> None:
    """Once worked out by the formulas above: a change of it is a change of what is learned."""
    assert EVERY[name](*fixed()).item() == pytest.approx(GOLDEN[name], abs=5e-7)


@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("name", EVERY)
def test_batches_without_clicks_or_labels_are_harmless(name: str, scale: float) -> None:
    x, e, o, r = fixed()
    zero, unknown = torch.zeros_like(o), torch.full_like(o, NAN)
    for clicks, conversions in ((zero, zero), (unknown, unknown), (o, unknown), (unknown, r)):
        x_B, e_B = logits = [(t * scale).clone().requires_grad_(True) for t in (x, e)]
        loss = EVERY[name](x_B, e_B, clicks, conversions)
        loss.backward()
        assert loss.isfinite()
        assert all(t.grad is None or t.grad.isfinite().all() for t in logits)
        nothing = conversions is unknown and (clicks is unknown or name != "log_loss")
        if nothing or (clicks is zero and name == "clicked"):
            assert loss.item() == 0
            assert all(t.grad is None or not t.grad.any() for t in logits)


@pytest.mark.parametrize("name", EVERY)
def test_a_row_of_which_nothing_is_known_is_as_if_it_were_not_there(name: str) -> None:
    x, e, o, r = fixed()
    unknown = torch.arange(8) == 7
    assert o[unknown].isnan()
    assert r[unknown].isnan()
    found = EVERY[name](x.where(~unknown, 1e3), e.where(~unknown, 1e3), o, r)
    assert found.item() == EVERY[name](x, e, o, r).item()


# --- softmax over the items of a batch -------------------------------------------------------------------------------


def numpy_in_batch(q: Any, v: Any, ids: Any, temperature: float, log_q: Any) -> float:
    losses: list[float] = []
    for i in range(len(ids)):
        others = [j for j in range(len(ids)) if j == i or ids[j] != ids[i]]
        x = np.array([q[i] @ v[j] / temperature - log_q[j] for j in others])
        losses.append(float(np.log(np.exp(x).sum()) - x[others.index(i)]))
    return float(np.mean(losses))


@pytest.fixture(params=[0, 10**9], ids=["pairs are sorted out", "pairs are compared out"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to leave out the columns of one's own item."""
    monkeypatch.setattr(losses, "_FEW", request.param)


@pytest.mark.usefixtures("way")
def test_softmax_of_the_batch_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    q, v, ids, log_q = rng.normal(size=(25, 4)), rng.normal(size=(25, 4)), rng.integers(0, 9, 25), rng.normal(size=25)
    given = (torch.from_numpy(q), torch.from_numpy(v), torch.from_numpy(ids), 0.3)
    corrected = in_batch_softmax(*given, torch.from_numpy(log_q)).item()
    assert corrected == pytest.approx(numpy_in_batch(q, v, ids, 0.3, log_q), rel=1e-12)
    assert in_batch_softmax(*given).item() == pytest.approx(numpy_in_batch(q, v, ids, 0.3, 0 * log_q), rel=1e-12)
    assert abs(corrected - in_batch_softmax(*given).item()) > 0.01


@pytest.mark.usefixtures("way")
def test_the_slopes_of_the_softmax_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(12, 3, generator=generator, dtype=torch.double, requires_grad=True) for _ in range(2))
    ids = torch.randint(0, 5, (12,), generator=generator)
    log_q = torch.randn(12, generator=generator, dtype=torch.double)
    torch.autograd.gradcheck(lambda a, b: in_batch_softmax(a, b, ids, 0.5, log_q) * 2, (q, v))


@pytest.mark.usefixtures("way")
def test_without_a_negative_or_without_rows_nothing_is_learned() -> None:
    for rows in (0, 1, 6):
        q, v = (torch.randn(rows, 4, requires_grad=True) for _ in range(2))
        loss = in_batch_softmax(q, v, torch.full((rows,), 7), 0.1, torch.randn(rows))
        loss.backward()
        assert loss.item() == 0
        for side in (q, v):
            assert side.grad is not None
            assert side.grad.eq(0).all()


def test_far_logits_do_not_overflow() -> None:
    q = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = in_batch_softmax(q, torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 2]), 1e-2)
    loss.backward()
    assert loss.isfinite()
    assert q.grad is not None
    assert q.grad.isfinite().all()
