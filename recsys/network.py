"""From fields to one logit per task: embeddings shared or apart, a shared bottom or gated experts, a tower per task."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self, assert_never

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from base.config import Config
from base.errors import ConfigError, did_you_mean
from features.schema import Schema
from recsys.embeddings import Embeddings, TableKind
from recsys.experts import Experts, ExpertsConfig
from recsys.interacting import Interacting, Variant
from recsys.layers import MLP

# Shape suffixes: B = batch, C = copies of the embeddings, T = towers, E = experts, F = fields, D = embedding dimension,
# X = inputs of a tower, L = logits.


class MLPTower(Config):
    """A multilayer perceptron over the concatenated fields or the body's output."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[PositiveInt, ...] = (160, 80)
    dropout: NonNegativeFloat = 0.0


class InteractingTower(Config):
    """AutoInt's interacting layers over the fields, read by one linear layer."""

    kind: Literal["interacting"] = "interacting"
    layers: PositiveInt = 2
    heads: PositiveInt = 2
    attention_dim: PositiveInt = 16
    variant: Variant = "default"


Tower = Annotated[MLPTower | InteractingTower, Field(discriminator="kind")]


class NetworkConfig(Config):
    """What the models of several tasks share. `towers` gives a task, by its label, another tower than `tower`."""

    dim: PositiveInt = 16
    shared_embeddings: bool = True
    tower: Tower = MLPTower()
    towers: dict[str, Tower] = {}
    bottom: tuple[PositiveInt, ...] = ()
    """Hidden layers that all towers share (shared bottom)."""
    experts: ExpertsConfig | None = None
    """Gated experts in the place of the shared bottom."""

    @model_validator(mode="after")
    def _one_body(self) -> Self:
        if self.bottom and self.experts:
            raise ValueError("bottom and experts exclude each other: experts take the place of the shared bottom")
        if not (self.bottom or self.experts):
            return self
        what = "experts" if self.experts else "bottom"
        if not self.shared_embeddings:
            raise ValueError(f"{what} need shared_embeddings = true: they mix what all tasks see")
        if any(isinstance(tower, InteractingTower) for tower in (self.tower, *self.towers.values())):
            raise ValueError(f'a tower of kind "interacting" reads fields, which {what} mix: use kind "mlp"')
        return self


def embeddings(config: NetworkConfig, schema: Schema, names: Sequence[str], tables: TableKind) -> Embeddings:
    """One set of tables for all towers, or one for each."""
    copies = ("",) if config.shared_embeddings else tuple(names)
    return Embeddings(schema, config.dim, tables, copies=copies)


class Network(nn.Module):
    """logits_BL of embeddings_BCFD, C being 1 or T: a column per tower, then the entropy of tree gates if weighed."""

    def __init__(self, config: NetworkConfig, schema: Schema, names: Sequence[str]) -> None:
        super().__init__()
        if unknown := [label for label in config.towers if label not in names]:
            hint = did_you_mean(unknown[0], list(names), f"; the towers are {', '.join(names)}")
            raise ConfigError(f"model.towers: {unknown[0]!r} is none of the tasks{hint}")
        fields = len(schema.fields)
        width = fields * config.dim
        self.bottom: MLP | None = None
        self.experts: Experts | None = None
        self.entropy_weight = 0.0
        if config.bottom:
            self.bottom = MLP(width, config.bottom[:-1], config.bottom[-1])
            width = config.bottom[-1]
        if config.experts is not None:
            self.experts = Experts(width, len(names), config.experts)
            self.entropy_weight = config.experts.entropy if config.experts.gate == "tree" else 0.0
            width = config.experts.hidden[-1]
        towers = [_tower(config.towers.get(name, config.tower), fields, config.dim, width) for name in names]
        self.towers = nn.ModuleList(towers)

    def forward(self, e_BCFD: Tensor) -> Tensor:
        extra: list[Tensor] = []
        inputs = list(e_BCFD.unbind(1)) if e_BCFD.shape[1] > 1 else [e_BCFD[:, 0]] * len(self.towers)
        if self.bottom is not None:
            inputs = [self.bottom(inputs[0].flatten(1)).relu()] * len(self.towers)
        elif self.experts is not None:
            mixed_BTX, entropy_B = self.experts(inputs[0].flatten(1))
            inputs = list(mixed_BTX.unbind(1))
            extra = [entropy_B.unsqueeze(1)] if self.entropy_weight else []
        logits = [tower(x) for tower, x in zip(self.towers, inputs, strict=True)]
        return torch.cat([*logits, *extra], dim=1)

    def start_at(self, tower: int, probability: float) -> None:
        """Let a tower's probability begin near a value, where 0.5 would be far off."""
        last = [m for m in self.towers[tower].modules() if isinstance(m, nn.Linear)][-1]
        nn.init.constant_(last.bias, math.log(probability / (1 - probability)))

    def penalty(self, logits_BL: Tensor) -> Tensor:
        """The weighted mean entropy of the tree gates; 0 without them. Scalar."""
        return self.entropy_weight * logits_BL[:, -1].mean() if self.entropy_weight else logits_BL.new_zeros(())

    def expert_weights(self, e_BCFD: Tensor) -> Tensor | None:
        """g_BTE: how much each task draws from each expert; None without experts."""
        return None if self.experts is None else self.experts.weights(e_BCFD[:, 0].flatten(1))


class _Flat(nn.Module):
    """An MLP over fields or a vector."""

    def __init__(self, inputs: int, config: MLPTower) -> None:
        super().__init__()
        self.mlp = MLP(inputs, config.hidden, 1, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.flatten(1))


class _Attending(nn.Module):
    """Interacting layers over fields."""

    def __init__(self, fields: int, dim: int, config: InteractingTower) -> None:
        super().__init__()
        width = config.heads * config.attention_dim
        shape = (config.heads, config.attention_dim, config.variant)
        self.layers = nn.Sequential(*(Interacting(dim if i == 0 else width, *shape) for i in range(config.layers)))
        self.head = nn.Linear(fields * width, 1)

    def forward(self, e_BFD: Tensor) -> Tensor:
        return self.head(self.layers(e_BFD).flatten(1))


def _tower(config: Tower, fields: int, dim: int, width: int) -> nn.Module:
    match config:
        case MLPTower():
            return _Flat(width, config)
        case InteractingTower():
            return _Attending(fields, dim, config)
        case _:
            assert_never(config)
