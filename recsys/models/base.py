"""What the rest of the platform may ask of a ranking model, and what models with one logit per label have in common."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from features.schema import Output, Schema
from recsys.batch import Batch
from recsys.losses import log_loss

# Shape suffixes: B = batch, T = tasks (labels), L = logits, O = outputs.

_LEAST = 1e-300
"""The least 1 - p that has odds in double precision; 690 is the log of the largest."""


class RankingModel(Protocol):
    """Logits from a batch, and named probabilities computed from the logits."""

    outputs: Sequence[Output]
    """The O probabilities, each with the label it predicts."""

    def __call__(self, batch: Batch) -> Tensor:
        """logits_BL of a batch: one per label, then whatever else the loss needs of each row."""
        ...

    def probabilities(self, logits_BL: Tensor) -> Tensor:
        """probabilities_BO, in the order of `outputs`, corrected for down-sampled negatives."""
        ...

    def log_odds(self, logits_BL: Tensor) -> Tensor:
        """log(p / (1 - p)) of the same, log_odds_BO in double precision: they tell apart what lies too near 0 or 1."""
        ...

    def loss(self, logits_BL: Tensor, labels_BT: Tensor) -> Tensor:
        """The scalar to minimise. Labels not known yet are NaN."""
        ...


class PerLabel(nn.Module):
    """One logit per label, each a probability on all impressions, learned by log loss."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.outputs = one_output_per_label(schema)
        self.tasks = len(schema.labels)
        self.negative_rate = schema.negative_rate
        self.sampled = schema.labels.index(schema.sampled_label)

    def probabilities(self, logits_BL: Tensor) -> Tensor:
        p_BT = logits_BL[:, : self.tasks].sigmoid()
        if self.negative_rate == 1:
            return p_BT
        return p_BT * density(p_BT[:, self.sampled], self.negative_rate).unsqueeze(1)

    def log_odds(self, logits_BL: Tensor) -> Tensor:
        x_BT = logits_BL[:, : self.tasks].double()
        if self.negative_rate == 1:
            return x_BT
        return odds_of(logsigmoid(x_BT) + log_density(x_BT[:, self.sampled], self.negative_rate).unsqueeze(1))

    def loss(self, logits_BL: Tensor, labels_BT: Tensor) -> Tensor:
        return log_loss(logits_BL[:, : self.tasks], labels_BT)


def one_output_per_label(schema: Schema) -> tuple[Output, ...]:
    """`p_click` for the label `click`; further down a funnel `p_click_and_conversion`."""
    outputs: list[Output] = []
    for label in schema.labels:
        passed = schema.funnel[: schema.funnel.index(label) + 1] if label in schema.funnel else (label,)
        outputs.append(Output(name=f"p_{'_and_'.join(passed)}", label=label))
    return tuple(outputs)


def density(sampled_B: Tensor, rate: float) -> Tensor:
    """Z = P(kept | x) from the click probability among kept rows: all clicks and a share `rate` of the other rows.

    With p the click probability, Z = p + rate (1 - p), and among kept rows it is p' = p / Z; so Z = rate / (1 - p' +
    rate p'). Any event within a click is p'(event) Z: clicks and conversions alike. Given a click nothing changes.
    """
    return rate / (1 - (1 - rate) * sampled_B)


def log_density(logits_B: Tensor, rate: float) -> Tensor:
    """log Z from the logits x of p': Z = 1 / (1 + (1 - rate) / rate σ(-x)), which loses nothing where it is near 1."""
    return -torch.log1p((1 - rate) / rate * (-logits_B).sigmoid())


def odds_of(log_p: Tensor) -> Tensor:
    """log p - log(1 - p) from log p, of any shape; also of a product, whose log p is a sum."""
    log_p = log_p.clamp(max=-_LEAST)
    near_one = log_p > -0.5
    # Each side of the choice is kept finite where it is not chosen.
    rest = torch.where(near_one, (-log_p.clamp(min=-0.5).expm1()).log(), (-log_p.clamp(max=-0.5).exp()).log1p())
    return log_p - rest
