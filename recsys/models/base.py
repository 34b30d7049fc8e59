"""What the rest of the platform may ask of a ranking model."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from features.schema import Output
from recsys.batch import Batch

# Shape suffixes: B = batch, T = tasks (labels), O = outputs.


class RankingModel(Protocol):
    """Logits per task from a batch, and named probabilities computed from the logits."""

    outputs: Sequence[Output]
    """The O probabilities, each with the label it predicts."""

    def __call__(self, batch: Batch) -> Tensor:
        """logits_BT of a batch."""
        ...

    def probabilities(self, logits_BT: Tensor) -> Tensor:
        """probabilities_BO, in the order of `outputs`."""
        ...

    def loss(self, logits_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """The scalar to minimise."""
        ...


def one_output_per_label(labels: Sequence[str]) -> tuple[Output, ...]:
    """`p_click` for the label `click`, and so on."""
    return tuple(Output(name=f"p_{label}", label=label) for label in labels)
