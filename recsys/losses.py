"""Losses, each as its formula. Labels are 0, 1, or NaN where not known yet: such terms count for nothing.

Names as in the papers on post-click conversion: o = click, r = conversion, p = predicted click probability
(propensity), q = predicted conversion probability given a click; δ = log loss of q against r.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Shape suffixes: B = batch, T = tasks, P = pairs.

_FEW = 64
"""At most one pair of so many is found by sorting."""


def log_loss(logits_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean binary log loss over the examples whose label is known, summed over tasks (AutoInt, equation 10). Scalar."""
    known_T = (~labels_BT.isnan()).sum(0).clamp(min=1)
    return (cross_entropy(logits_BT, labels_BT).sum(0) / known_T).sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary log loss of each element; 0 where the label is not known. Any shape."""
    given = labels.nan_to_num()
    return functional.binary_cross_entropy_with_logits(logits, given, reduction="none") * ~labels.isnan()


def mean_log_loss(logits_B: Tensor, labels_B: Tensor) -> Tensor:
    """`log_loss` of one task. Scalar."""
    return log_loss(logits_B.unsqueeze(1), labels_B.unsqueeze(1))


def log_loss_of_product(a_B: Tensor, b_B: Tensor, labels_B: Tensor) -> Tensor:
    """Mean log loss of σ(a)σ(b) against known labels, from the logits (ESMM, equation 3, second sum). Scalar.

    1 - σ(a)σ(b) = (e^-a + e^-b + e^-(a+b)) σ(a)σ(b) loses nothing where the product is near 1, log1p where near 0.
    """
    both_B = functional.logsigmoid(a_B) + functional.logsigmoid(b_B)
    large_B = torch.logsumexp(torch.stack([-a_B, -b_B, -a_B - b_B]), dim=0) + both_B
    neither_B = torch.where(both_B < -1, torch.log1p(-both_B.clamp(max=-1).exp()), large_B)
    known_B = ~labels_B.isnan()
    y_B = labels_B.nan_to_num()
    return mean(-(y_B * both_B + (1 - y_B) * neither_B), known_B)


def mean(values_B: Tensor, where_B: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Mean over the rows of `where_B`, weighted if asked; 0 if there are none. Scalar."""
    counted_B = where_B.to(values_B.dtype) if weight_B is None else where_B * weight_B
    return (torch.where(where_B, values_B, 0.0) * counted_B).sum() / counted_B.sum().clamp(min=1)


def clicked_log_loss(q_logits_B: Tensor, o_B: Tensor, r_B: Tensor) -> Tensor:
    """Mean δ over clicked rows: conversion learned where it is seen; 0 in a batch without a click. Scalar."""
    return mean(cross_entropy(q_logits_B, r_B), (o_B == 1) & ~r_B.isnan())


def in_batch_softmax(
    queries_BD: Tensor, items_BD: Tensor, ids_B: Tensor, temperature: float, log_q_B: Tensor | None = None
) -> Tensor:
    """Mean -log softmax of each row's own item among the batch's, over <q, v> / τ - log q. Scalar.

    Rows with the same item are no negatives of each other; without any negative, or without rows, it is 0.
    Bengio and Senécal 2003; the correction is Yi et al.'s, RecSys 2019, equation 5.
    """
    if not len(ids_B):
        return (queries_BD.sum() + items_BD.sum()) * 0
    bias_B = items_BD.new_zeros(len(ids_B)) if log_q_B is None else -log_q_B.to(items_BD.dtype)
    loss = _OwnOfAll.apply(queries_BD, items_BD, bias_B, ids_B, temperature)
    assert isinstance(loss, Tensor)
    return loss


def _leave_out_twins(x_BB: Tensor, ids_B: Tensor) -> None:
    """-∞ where row and column are different rows of the same id.

    Most batches have few such pairs, which sorting finds soonest; where there are many, comparing all rows does.
    """
    own_B = x_BB.diagonal().clone()
    sorted_B, order_B = ids_B.sort()
    first_B, behind_B = (torch.searchsorted(sorted_B, sorted_B, right=right) for right in (False, True))
    many_B = behind_B - first_B
    if int(many_B.sum()) * _FEW > x_BB.numel():
        x_BB.masked_fill_(ids_B.unsqueeze(1) == ids_B, -torch.inf)
    else:
        which_P = torch.repeat_interleave(many_B)
        nth_P = torch.arange(len(which_P), device=ids_B.device) - (many_B.cumsum(0) - many_B)[which_P]
        x_BB[order_B[which_P], order_B[first_B[which_P] + nth_P]] = -torch.inf
    x_BB.diagonal().copy_(own_B)


class _OwnOfAll(torch.autograd.Function):
    """Mean log loss of each row's own column under softmax(Q Vᵀ / τ + bias), without other columns of the same id.

    By hand, in one matrix of B × B, where autograd makes six.
    """

    @staticmethod
    def forward(ctx: Any, q_BD: Tensor, v_BD: Tensor, bias_B: Tensor, ids_B: Tensor, temperature: float) -> Tensor:
        x_BB = torch.addmm(bias_B, q_BD, v_BD.T, alpha=1 / temperature)
        _leave_out_twins(x_BB, ids_B)
        own_B, top_B1 = x_BB.diagonal().clone(), x_BB.amax(1, keepdim=True)
        total_B1 = x_BB.sub_(top_B1).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(q_BD, v_BD, x_BB, total_B1)
        ctx.scale = 1 / (temperature * len(q_BD))
        return (total_B1.log() + top_B1 - own_B.unsqueeze(1)).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BD, v_BD, x_BB, total_B1 = ctx.saved_tensors
        scale = gradients[0] * ctx.scale
        # The slope by each logit is the softmax, less 1 for one's own.
        of_q_BD = (x_BB @ v_BD).div_(total_B1).sub_(v_BD)
        of_v_BD = (x_BB.T @ (q_BD / total_B1)).sub_(q_BD)
        return of_q_BD * scale, of_v_BD * scale, None, None, None


# In the entire space. D: rows with known labels; n_B: how many impressions a row stands for, 1 unless non-clicks were
# down-sampled; |D| = Σ n.


def inverse_propensities(p_B: Tensor, n_B: Tensor, floor: float, clip: float) -> Tensor:
    """min(1 / max(p, floor), clip / mean(p)), the mean over impressions; constants for autograd.

    The cap is relative to the mean propensity: an absolute one, as 15, would flatten every weight at 3 % clicks.
    """
    p_B = p_B.detach().clamp(min=floor)
    return torch.minimum(1 / p_B, clip * n_B.sum() / (n_B * p_B).sum())


def ips_loss(
    q_logits_B: Tensor, o_B: Tensor, r_B: Tensor, p_B: Tensor, n_B: Tensor, floor: float, clip: float
) -> Tensor:
    """1/|D| Σ o δ / p, p constant, floored and clipped (ESCM², IPS). Scalar.

    Unclipped it estimates, without bias, the mean δ over all impressions from the clicked ones.
    """
    clicked_B = o_B.nan_to_num()
    loss_B = clicked_B * inverse_propensities(p_B, n_B, floor, clip) * cross_entropy(q_logits_B, r_B)
    return mean(loss_B, _known(o_B, r_B), n_B)


def dr_loss(
    q_logits_B: Tensor, e_B: Tensor, o_B: Tensor, r_B: Tensor, p_B: Tensor, n_B: Tensor, floor: float, clip: float
) -> Tensor:
    """1/|D| Σ (e + o (δ - e) / p) + 1/|D| Σ o (δ - e)² / p, with e the imputed δ (ESCM², DR). Scalar.

    In the second sum, which fits e to δ, δ is a constant. Given p, q gets the same gradient as from `ips_loss`: what DR
    changes, it changes through what e's tower shares with q's.
    """
    weight_B = o_B.nan_to_num() * inverse_propensities(p_B, n_B, floor, clip)
    delta_B = cross_entropy(q_logits_B, r_B)
    robust_B = e_B + weight_B * (delta_B - e_B)
    imputation_B = weight_B * (delta_B.detach() - e_B).square()
    return mean(robust_B + imputation_B, _known(o_B, r_B), n_B)


def entropy_loss(q_logits_B: Tensor, o_B: Tensor, r_B: Tensor, n_B: Tensor) -> Tensor:
    """1/|D| (Σ over clicks of δ + Σ over non-clicks of the entropy of q): they are unlabelled (NISE, eq. 8). Scalar."""
    entropy_B = functional.binary_cross_entropy_with_logits(q_logits_B, q_logits_B.sigmoid(), reduction="none")
    loss_B = torch.where(o_B == 1, cross_entropy(q_logits_B, r_B), entropy_B)
    return mean(loss_B, _known(o_B, r_B), n_B)


def _known(o_B: Tensor, r_B: Tensor) -> Tensor:
    return ~(o_B.isnan() | r_B.isnan())
