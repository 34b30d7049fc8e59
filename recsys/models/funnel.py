"""What the models of a click and the conversion after it have in common: two logits, three probabilities."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from base.errors import ConfigError
from features.schema import Output, Schema
from recsys.batch import Batch
from recsys.embeddings import TableKind
from recsys.models.base import density, log_density, odds_of
from recsys.network import Network, NetworkConfig, embeddings

# Shape suffixes: B = batch, L = logits (click, conversion, then what the loss needs), T = labels, O = outputs (3).


class FunnelConfig(NetworkConfig):
    """Of a model whose labels are a funnel of two: `data.funnel = ["click", "conversion"]`."""


def require_funnel(model: str, labels: Sequence[str], funnel: Sequence[str]) -> None:
    """Raises ConfigError unless the labels are exactly a funnel of two."""
    if len(funnel) != 2 or set(labels) != set(funnel):
        raise ConfigError(
            f'model.name = "{model}" needs two labels in a funnel, as data.funnel = ["click", "conversion"]; '
            f"data.labels are {list(labels)}, data.funnel is {list(funnel)}"
        )


class Funnel(nn.Module, ABC):
    """Towers a (click) and b (conversion given a click); σ(a), σ(b) and their product are its probabilities."""

    def __init__(
        self, name: str, config: FunnelConfig, schema: Schema, tables: TableKind, towers: Sequence[str] = ()
    ) -> None:
        super().__init__()
        require_funnel(name, schema.labels, schema.funnel)
        click, conversion = schema.funnel
        self.outputs = (
            Output(name=f"p_{click}", label=click),
            Output(name=f"p_{conversion}_given_{click}", label=conversion, given=click),
            Output(name=f"p_{click}_and_{conversion}", label=conversion),
        )
        self.places = [schema.labels.index(label) for label in schema.funnel]
        self.negative_rate = schema.negative_rate
        names = (click, conversion, *towers)
        self.embed = embeddings(config, schema, names, tables)
        self.network = Network(config, schema, names)

    def forward(self, batch: Batch) -> Tensor:
        return self.network(self.embed.separate(batch))

    def probabilities(self, logits_BL: Tensor) -> Tensor:
        """Click, conversion given a click, both; p_BO. The second needs no correction for down-sampled non-clicks."""
        p_B, q_B = logits_BL[:, 0].sigmoid(), logits_BL[:, 1].sigmoid()
        p_B = p_B * self.kept(p_B)
        return torch.stack([p_B, q_B, p_B * q_B], dim=1)

    def log_odds(self, logits_BL: Tensor) -> Tensor:
        a_B, b_B = logits_BL[:, 0].double(), logits_BL[:, 1].double()
        click_B, given_B = logsigmoid(a_B) + log_density(a_B, self.negative_rate), logsigmoid(b_B)
        return odds_of(torch.stack([click_B, given_B, click_B + given_B], dim=1))

    def kept(self, p_B: Tensor) -> Tensor:
        """What turns a probability of a click, or of anything within one, among kept rows into one among all."""
        return torch.ones_like(p_B) if self.negative_rate == 1 else density(p_B, self.negative_rate)

    def propensities(self, logits_BL: Tensor) -> Tensor:
        """p_B: click probabilities among all impressions, constants for autograd."""
        p_B = logits_BL[:, 0].detach().sigmoid()
        return p_B * self.kept(p_B)

    def impressions(self, o_B: Tensor) -> Tensor:
        """n_B: how many impressions each row stands for."""
        return torch.where(o_B == 0, 1 / self.negative_rate, 1.0)

    def loss(self, logits_BL: Tensor, labels_BT: Tensor) -> Tensor:
        o_B, r_B = (labels_BT[:, i] for i in self.places)
        return self.objective(logits_BL, o_B, r_B) + self.network.penalty(logits_BL)

    @abstractmethod
    def objective(self, logits_BL: Tensor, o_B: Tensor, r_B: Tensor) -> Tensor:
        """The paper's loss from click o and conversion r, each 0, 1 or NaN. Scalar."""
