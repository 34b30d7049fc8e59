"""Layers that more than one model uses."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

# Shape suffixes: B = batch, I = inputs, O = outputs.


class MLP(nn.Module):
    """Linear, ReLU and dropout per hidden layer; then a linear layer to `out` values."""

    def __init__(self, inputs: int, hidden: Sequence[int], out: int, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise((inputs, *hidden)):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], out))

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.layers(x_BI)
