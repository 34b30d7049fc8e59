"""Mixture of experts for several tasks: MMoE (Ma et al., KDD 2018, https://doi.org/10.1145/3219819.3220007).

Each task has a gate of its own over experts that all share (section 4.2); the gate is dense, top-k or COMET's trees
(Ibrahim et al., KDD 2023, https://arxiv.org/abs/2306.02824).
"""

from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.autograd import Function

from base.config import Config
from recsys.layers import MLP

# Shape suffixes: B = batch, X = inputs, T = tasks, E = experts (a tree's leaves), H = width of an expert's output,
# K = trees, N = a tree's inner nodes, P = pairs of a row and an expert that it uses, grouped by expert.

Gate = Literal["softmax", "top_k", "tree"]
"""`softmax`: every expert for every row. `top_k`: the `k` experts of the largest logits, per task. `tree`: the leaves
that `k` soft trees reach, which sharpen to at most `k` experts per task as they are trained."""


class ExpertsConfig(Config):
    """Number and size of the experts, and how they are chosen."""

    count: PositiveInt = 8
    hidden: tuple[PositiveInt, ...] = (64,)
    """Layers of each expert, ReLU after each; the last is the width of the mixture."""
    gate: Gate = "softmax"
    k: PositiveInt = 2
    """Experts that top_k keeps; trees of the tree gate."""
    gamma: PositiveFloat = 1.0
    """Width of the trees' smooth-step: a node whose |logit| is at least half of it sends a row one way only."""
    entropy: NonNegativeFloat = 0.0
    """Weight in the model's loss of the trees' mean entropy, which drives each tree to one leaf per row."""
    dropout: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _fits_gate(self) -> Self:
        if not self.hidden:
            raise ValueError("hidden is empty; give the experts one layer or more, e.g. [64]")
        if self.gate == "top_k" and self.k > self.count:
            raise ValueError(f"k = {self.k} experts cannot be kept of count = {self.count}; k must be at most count")
        if self.gate == "tree" and (self.count < 2 or self.count & (self.count - 1)):
            raise ValueError(
                f"count = {self.count}, but a tree's leaves are its experts; give it 2, 4, 8, 16 and so on"
            )
        return self


class TopKGate(nn.Module):
    """Softmax over the k largest of a linear layer's logits, per task; with k = experts MMoE's own gate."""

    def __init__(self, inputs: int, tasks: int, experts: int, k: int) -> None:
        super().__init__()
        self.shape, self.k = (tasks, experts), k
        self.logits = nn.Linear(inputs, tasks * experts)

    def forward(self, x_BX: Tensor) -> tuple[Tensor, Tensor]:
        """weights_BTE, and entropy_B of zeros: there are no trees."""
        logits_BTE = self.logits(x_BX).unflatten(1, self.shape)
        if self.k < self.shape[1]:
            kept_BTK, index_BTK = logits_BTE.topk(self.k)
            weights_BTE = torch.zeros_like(logits_BTE).scatter(2, index_BTK, kept_BTK.softmax(2))
        else:
            weights_BTE = logits_BTE.softmax(2)
        return weights_BTE, weights_BTE.new_zeros(len(x_BX))


class TreeGate(nn.Module):
    """COMET's gate: per task, a softmax over the leaves of soft trees in which most leaves come to have probability 0.

    A leaf scores a(x) + log p(x), with a linear and p the product of its path's smooth-steps; each leaf is an expert.
    """

    def __init__(self, inputs: int, tasks: int, experts: int, trees: int, gamma: float) -> None:
        super().__init__()
        self.depth, self.gamma = experts.bit_length() - 1, gamma
        self.node_shape, self.leaf_shape = (tasks, trees, experts - 1), (tasks, trees, experts)
        self.nodes = nn.Linear(inputs, tasks * trees * (experts - 1))  # breadth first: children of n at 2n+1, 2n+2
        self.leaves = nn.Linear(inputs, tasks * trees * experts)
        # As the authors' code does it: a node that starts outside the smooth-step has no gradient to come back by.
        for parameter in self.nodes.parameters():
            nn.init.uniform_(parameter, -gamma / 100, gamma / 100)

    def forward(self, x_BX: Tensor) -> tuple[Tensor, Tensor]:
        """weights_BTE, and entropy_B: -Σ p log p of a tree's leaves, mean over tasks and trees."""
        p_BTKE = self.leaf_probabilities(x_BX)
        out_BTKE = p_BTKE == 0
        # Unreached leaves stay out of the logarithm and of the softmax, whose gradients they would make NaN. Some leaf
        # is always reached, as each node sends at least half of a row one way.
        log_p_BTKE = p_BTKE.masked_fill(out_BTKE, 1.0).log()
        score_BTKE = (self.leaves(x_BX).unflatten(1, self.leaf_shape) + log_p_BTKE).masked_fill(out_BTKE, -torch.inf)
        weights_BTE = score_BTKE.flatten(2).softmax(2).unflatten(2, self.leaf_shape[1:]).sum(2)
        return weights_BTE, -(p_BTKE * log_p_BTKE).sum(3).mean((1, 2))

    def leaf_probabilities(self, x_BX: Tensor) -> Tensor:
        """p_BTKE of reaching each leaf, exactly 0 for most once trained; sums to one over E."""
        left_BTKN = smooth_step(self.nodes(x_BX).unflatten(1, self.node_shape), self.gamma)
        p = left_BTKN.new_ones(*left_BTKN.shape[:3], 1)  # of each node of one level
        for level in range(self.depth):
            left = left_BTKN[..., 2**level - 1 : 2 ** (level + 1) - 1]
            p = torch.stack((p * left, p * (1 - left)), -1).flatten(3)
        return p


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """-2(t/γ)³ + 3t/2γ + 1/2, and exactly 0 below -γ/2 and 1 above γ/2 (Hazimeh et al., ICML 2020)."""
    u = (t / gamma + 0.5).clamp(0, 1)
    return u * u * (3 - 2 * u)  # the same cubic; written so it cannot round to outside [0, 1]


class Experts(nn.Module):
    """Experts that all tasks share, mixed per task: f_t(x) = Σ_e g_t(x)_e f_e(x) (MMoE, section 4.2).

    With a sparse gate an expert is computed only for the rows that use it in some task.
    """

    def __init__(self, inputs: int, tasks: int, config: ExpertsConfig) -> None:
        super().__init__()
        count, hidden, dropout = config.count, config.hidden, config.dropout
        self.experts = nn.ModuleList(
            nn.Sequential(MLP(inputs, hidden[:-1], hidden[-1], dropout), nn.ReLU(), nn.Dropout(dropout))
            for _ in range(count)
        )
        if config.gate == "tree":
            self.gate = TreeGate(inputs, tasks, count, config.k, config.gamma)
        else:
            self.gate = TopKGate(inputs, tasks, count, config.k if config.gate == "top_k" else count)
        self.dense = config.gate == "softmax"
        self.width = hidden[-1]

    def forward(self, x_BX: Tensor) -> tuple[Tensor, Tensor]:
        """mixed_BTH, and entropy_B for the loss to add `config.entropy` times its mean (zeros without trees)."""
        weights_BTE, entropy_B = self.gate(x_BX)
        # Untrained trees use every expert for every row, which is faster without gathering.
        if self.dense or (used_BE := _used(weights_BTE)).all():
            return self._mix_all(x_BX, weights_BTE), entropy_B
        return self._mix_used(x_BX, weights_BTE, used_BE), entropy_B

    def weights(self, x_BX: Tensor) -> Tensor:
        """weights_BTE of each expert in each task's mixture; they sum to one over E."""
        return self.gate(x_BX)[0]

    def _mix_all(self, x_BX: Tensor, weights_BTE: Tensor) -> Tensor:
        mixed_BTH = x_BX.new_zeros(*weights_BTE.shape[:2], self.width)
        # Summed expert by expert: on a CPU faster than weights @ stack(all experts), and without that copy.
        for expert, w_BT in zip(self.experts, weights_BTE.unbind(2), strict=True):
            mixed_BTH.baddbmm_(w_BT.unsqueeze(2), expert(x_BX).unsqueeze(1))
        return mixed_BTH

    def _mix_used(self, x_BX: Tensor, weights_BTE: Tensor, used_BE: Tensor) -> Tensor:
        batch, tasks, count = weights_BTE.shape
        expert_P, row_P = used_BE.T.nonzero(as_tuple=True)
        sizes = used_BE.sum(0).tolist()
        w_PT = weights_BTE.permute(2, 0, 1).reshape(count * batch, tasks).index_select(0, expert_P * batch + row_P)
        rows = row_P.split(sizes)
        mixed = x_BX.new_zeros(batch, tasks * self.width)  # flat: index_add is slower on three dimensions
        # An expert that no row uses gets an empty batch, so that its gradient is zero and not None.
        for expert, row, x, w in zip(self.experts, rows, _Rows.apply(x_BX, *rows), w_PT.split(sizes), strict=True):
            y_PTH = w.unsqueeze(2) * expert(x).unsqueeze(1)
            mixed.index_add_(0, row, y_PTH.flatten(1))
        return mixed.unflatten(1, (tasks, self.width))


def active_per_row(weights_BTE: Tensor) -> Tensor:
    """Number of experts that each row uses in some task, count_B."""
    return _used(weights_BTE).sum(1)


def _used(weights_BTE: Tensor) -> Tensor:
    return (weights_BTE != 0).any(1)


class _Rows(Function):
    """x[rows] for each of several sets of distinct rows.

    Its gradient fills one buffer, set after set: autograd's own makes a buffer as large as x for each set, and that of
    one gather for all sets adds to a row in no certain order on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x_BX: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*rows)
        ctx.batch = len(x_BX)
        return tuple(x_BX.index_select(0, row) for row in rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_BX = grads[0].new_zeros(ctx.batch, grads[0].shape[1])
        for row, grad in zip(ctx.saved_tensors, grads, strict=True):
            grad_BX.index_add_(0, row, grad)
        return grad_BX, *(None for _ in grads)
