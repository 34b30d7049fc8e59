"""ESCM²: ESMM and a counterfactual risk of conversion. Wang et al., SIGIR 2022, https://arxiv.org/abs/2204.05125."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional

from features.schema import Schema
from recsys.embeddings import TableKind
from recsys.losses import dr_loss, ips_loss, log_loss_of_product, mean_log_loss
from recsys.models.funnel import Funnel, FunnelConfig

# Shape suffixes: B = batch, L = logits.


class ESCM2Config(FunnelConfig):
    """`risk = "dr"` adds a tower that imputes the conversion's loss; both papers that measured it found it unstable."""

    name: Literal["escm2"] = "escm2"
    risk: Literal["ips", "dr"] = "ips"
    conversion_weight: NonNegativeFloat = 0.5
    """λc, of the counterfactual risk."""
    joint_weight: NonNegativeFloat = 0.5
    """λg, of the log loss of click-and-conversion."""
    floor: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Of propensities."""
    clip: PositiveFloat = 15.0
    """The largest inverse propensity, in multiples of that of the mean propensity."""


class ESCM2(Funnel):
    """L = L_CTR + λc L_CVR + λg L_CTCVR, the second by inverse propensities or doubly robust; propensity = pCTR."""

    def __init__(self, config: ESCM2Config, schema: Schema, tables: TableKind) -> None:
        super().__init__(config.name, config, schema, tables, ("imputation",) if config.risk == "dr" else ())
        self.config = config

    def objective(self, logits_BL: Tensor, o_B: Tensor, r_B: Tensor) -> Tensor:
        c = self.config
        a_B, b_B, p_B, n_B = logits_BL[:, 0], logits_BL[:, 1], self.propensities(logits_BL), self.impressions(o_B)
        if c.risk == "ips":
            counterfactual = ips_loss(b_B, o_B, r_B, p_B, n_B, c.floor, c.clip)
        else:
            imputed_B = functional.softplus(logits_BL[:, 2])
            counterfactual = dr_loss(b_B, imputed_B, o_B, r_B, p_B, n_B, c.floor, c.clip)
        joint = log_loss_of_product(a_B, b_B, r_B)
        return mean_log_loss(a_B, o_B) + c.conversion_weight * counterfactual + c.joint_weight * joint
