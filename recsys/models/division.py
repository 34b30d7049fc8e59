"""DIVISION: conversion as the quotient of two models of all impressions (Ma et al. 2018, section 3.2)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from features.schema import Schema
from recsys.embeddings import TableKind
from recsys.losses import mean_log_loss
from recsys.models.base import log_density, odds_of
from recsys.models.funnel import Funnel, FunnelConfig

# Shape suffixes: B = batch, L = logits, O = outputs (3).

_CERTAIN = -1e-7
"""log of a quotient that is cut at 1, where there are no odds; Float32 tells no nearer one from 1."""


class DivisionConfig(FunnelConfig):
    """Two networks that know nothing of each other."""

    name: Literal["division"] = "division"
    shared_embeddings: bool = False


class Division(Funnel):
    """Logits of click and of click-and-conversion; pCVR = pCTCVR / pCTR, cut at 1, which nothing keeps it below."""

    def __init__(self, config: DivisionConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__(config.name, config, schema, tables)

    def probabilities(self, logits_BL: Tensor) -> Tensor:
        p_B, both_B = logits_BL[:, 0].sigmoid(), logits_BL[:, 1].sigmoid()
        # Both are among kept rows, so that their quotient needs no correction; of logarithms, so that it is never 0/0.
        given_B = (logsigmoid(logits_BL[:, 1]) - logsigmoid(logits_BL[:, 0])).clamp(max=0).exp()
        kept_B = self.kept(p_B)
        return torch.stack([p_B * kept_B, given_B, both_B * kept_B], dim=1)

    def log_odds(self, logits_BL: Tensor) -> Tensor:
        a_B, both_B = logits_BL[:, 0].double(), logits_BL[:, 1].double()
        log_p_B, log_both_B, kept_B = logsigmoid(a_B), logsigmoid(both_B), log_density(a_B, self.negative_rate)
        given_B = (log_both_B - log_p_B).clamp(max=_CERTAIN)
        return odds_of(torch.stack([log_p_B + kept_B, given_B, log_both_B + kept_B], dim=1))

    def objective(self, logits_BL: Tensor, o_B: Tensor, r_B: Tensor) -> Tensor:
        """Click, and click-and-conversion, each on all impressions."""
        return mean_log_loss(logits_BL[:, 0], o_B) + mean_log_loss(logits_BL[:, 1], r_B)
