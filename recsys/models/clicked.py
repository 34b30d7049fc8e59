"""BASE: click and conversion by networks of their own, conversion from clicked rows (Ma et al. 2018, section 3.2)."""

from typing import Literal

from torch import Tensor

from features.schema import Schema
from recsys.embeddings import TableKind
from recsys.losses import clicked_log_loss, mean_log_loss
from recsys.models.funnel import Funnel, FunnelConfig

# Shape suffixes: B = batch, L = logits.


class ClickedConfig(FunnelConfig):
    """The baseline of conversion models."""

    name: Literal["base"] = "base"
    shared_embeddings: bool = False


class Clicked(Funnel):
    """Conversion is learned where clicks are, and asked everywhere."""

    def __init__(self, config: ClickedConfig, schema: Schema, tables: TableKind) -> None:
        super().__init__(config.name, config, schema, tables)

    def objective(self, logits_BL: Tensor, o_B: Tensor, r_B: Tensor) -> Tensor:
        """Click on all impressions, conversion on the clicked ones."""
        return mean_log_loss(logits_BL[:, 0], o_B) + clicked_log_loss(logits_BL[:, 1], o_B, r_B)
