"""Sparse model soup: the mean of several trainings that have the same mask, at the price of one in use.

Zimmer et al., ICLR 2024: models that part from one pruned model, and differ by the order of their examples, may be
averaged weight by weight, and the mean has the same zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.errors import ArtefactError
from features.schema import Schema
from recsys.bundle import load_model
from recsys.checkpoint import WarmStart
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.models import ModelConfig
from recsys.retrieval import Ranking
from recsys.sparsity.config import Soup, Sparsity
from recsys.trainer import Progress, TrainConfig, Trained, measured, train


def soup_of(
    trained: Trained,
    model_config: ModelConfig,
    schema: Schema,
    fit: ExampleStream,
    valid: ExampleStream | Ranking,
    config: TrainConfig,
    folder: Path,
    sparsity: Sparsity,
    soup: Soup,
    *,
    device: torch.device = CPU,
    identity: str = "",
    on_step: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> Trained:
    """Go on from `trained` several times with its mask, and take the mean if it is better on `valid`.

    The members differ by their seed, and so by the order of the examples. What does not help is left out: the history
    tells both objectives, `objective` and `soup_objective`.
    """
    fixed = sparsity.model_copy(update={"schedule": sparsity.schedule.model_copy(update={"grow": "none"})})
    nothing_new = {f.name: np.zeros(0, dtype=np.int64) for f in schema.sparse}
    warm = WarmStart(trained.state, nothing_new)
    members: list[Mapping[str, Tensor]] = []
    for number in range(1, soup.members + 1):
        seed = config.seed + number
        short = config.model_copy(update={"seed": seed, "epochs": soup.epochs})
        member = train(
            model_config,
            schema,
            replace(fit, seed=seed),
            None,
            short,
            folder / f"soup-{number}",
            device=device,
            identity=f"{identity} {trained.state.name}",
            warm=warm,
            sparsity=fixed,
            on_step=on_step,
            **options,
        )
        members.append(member.weights)
    mean = average(members)
    model = load_model(model_config, schema, mean, where=folder, sparsity=sparsity).to(device)
    objective = measured(model, valid, model, config, device)["objective"]
    before = trained.history[trained.best_epoch - 1]["objective"]
    history = [*trained.history[:-1], trained.history[-1] | {"soup_objective": objective}]
    better = objective < before
    return replace(trained, history=history, weights=mean if better else trained.weights)


def average(members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each weight. Raises ArtefactError where masks differ."""
    first, *others = members
    found: dict[str, Tensor] = {}
    for name, tensor in first.items():
        if tensor.is_floating_point():
            found[name] = torch.stack([tensor, *(o[name] for o in others)]).mean(0)
            continue
        if not all(tensor.equal(o[name]) for o in others):
            raise ArtefactError(f"{name} differs between members: only models with one mask have a mean")
        found[name] = tensor
    return found
