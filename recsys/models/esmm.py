"""ESMM: conversion learned over the entire space. Ma et al., SIGIR 2018, https://arxiv.org/abs/1804.07931."""

from typing import Literal

from torch import Tensor

from features.schema import Schema
from recsys.embeddings import TableKind
from recsys.losses import log_loss_of_product, mean_log_loss
from recsys.models.funnel import Funnel, FunnelConfig

# Shape suffixes: B = batch, L = logits.


class ESMMConfig(FunnelConfig):
    """`shared_embeddings = false` makes it ESMM-NS."""

    name: Literal["esmm"] = "esmm"


class ESMM(Funnel):
    """pCTCVR = pCTR · pCVR (equation 1). Conversion is never fitted by itself, only through the product."""

    def __init__(self, config: ESMMConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__(config.name, config, schema, tables)

    def objective(self, logits_BL: Tensor, o_B: Tensor, r_B: Tensor) -> Tensor:
        """Click on all impressions, and click-and-conversion on all impressions (equation 3)."""
        a_B, b_B = logits_BL[:, 0], logits_BL[:, 1]
        return mean_log_loss(a_B, o_B) + log_loss_of_product(a_B, b_B, r_B)
