"""NISE: non-clicks are unlabelled, not negative. RecSys 2024; equations 8 to 11."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from features.schema import Schema
from recsys.embeddings import TableKind
from recsys.losses import entropy_loss, mean_log_loss
from recsys.models.funnel import Funnel, FunnelConfig

# Shape suffixes: B = batch, L = logits.


class NISEConfig(FunnelConfig):
    """α and β of the weight that brings the conversion's loss to the click's size."""

    name: Literal["nise"] = "nise"
    alpha: PositiveFloat = 1.0
    beta: PositiveFloat = 10.0
    start: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Conversion probability before training. Entropy falls on both sides of 0.5: from there non-clicks go to 1."""


class NISE(Funnel):
    """L = L_CTR + w L_CVR, with w = α min(L_CTR / L_CVR, β) in each batch, a constant for autograd."""

    def __init__(self, config: NISEConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__(config.name, config, schema, tables)
        self.config = config
        self.network.start_at(1, config.start)

    def objective(self, logits_BL: Tensor, o_B: Tensor, r_B: Tensor) -> Tensor:
        click = mean_log_loss(logits_BL[:, 0], o_B)
        conversion = entropy_loss(logits_BL[:, 1], o_B, r_B, self.impressions(o_B))
        ratio = (click / conversion.clamp(min=1e-12)).detach()
        return click + self.config.alpha * ratio.clamp(max=self.config.beta) * conversion
