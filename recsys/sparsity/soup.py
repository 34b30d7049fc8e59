"""Sparse model soup: the mean of several trainings that have the same mask, at the price of one in use.

Zimmer et al., ICLR 2024: models that part from one pruned model, and differ by the order of their examples, may be
averaged weight by weight, and the mean has the same zeros.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.errors import ArtefactError
from base.storage import is_published, withdraw
from features.schema import Schema
from recsys import checkpoint
from recsys.bundle import load_model
from recsys.checkpoint import WarmStart
from recsys.contrast.corpus import Corpus
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.models import ModelConfig
from recsys.retrieval import Ranking
from recsys.sparsity.config import Soup, Sparsity
from recsys.trainer import Progress, TrainConfig, Trained, measured, run_hash, train


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
    item_counts: NDArray[np.int64] | None = None,
    corpus: Corpus | None = None,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Go on from `trained` several times with its mask, and take the mean if it is better on `valid`.

    The members differ by their seed, and so by the order of the examples. What does not help is left out: the history
    tells both objectives, `objective` and `soup_objective`. Members are resumed, and trained once, as `trained` is.
    """
    fixed = sparsity.model_copy(
        update={"schedule": sparsity.schedule.model_copy(update={"grow": "none"}), "soup": None}
    )
    nothing_new = {f.name: np.zeros(0, dtype=np.int64) for f in schema.sparse}
    warm = WarmStart(trained.state, nothing_new)
    of_this = f"{identity} {trained.state.name}"

    def member(number: int) -> dict[str, Tensor]:
        seed, state = config.seed + number, folder / f"soup-{number}"
        short = config.model_copy(update={"seed": seed, "epochs": soup.epochs})
        if is_published(state / "checkpoint") and checkpoint.stands_at(state).run != run_hash(
            model_config, schema, short, of_this, fixed, corpus
        ):
            withdraw(state / "checkpoint")  # of an earlier training: nothing that anyone could want to go on with
        return train(
            model_config,
            schema,
            replace(fit, seed=seed),
            None,
            short,
            state,
            device=device,
            identity=of_this,
            warm=warm,
            sparsity=fixed,
            item_counts=item_counts,
            corpus=corpus,
            on_step=on_step,
        ).weights

    mean = average(member(number) for number in range(1, soup.members + 1))
    model = load_model(model_config, schema, mean, where=folder, sparsity=sparsity).to(device)
    objective = measured(model, valid, model, config, device)["objective"]
    before = trained.history[trained.best_epoch - 1]["objective"]
    history = [*trained.history[:-1], trained.history[-1] | {"soup_objective": objective}]
    return replace(trained, history=history, weights=mean if objective < before else trained.weights)


def average(members: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each weight, of one member after the other. Raises ArtefactError where masks differ."""
    found: dict[str, Tensor] = {}
    count = 0
    for count, weights in enumerate(members, start=1):
        if count == 1:
            found = dict(weights)
            continue
        for name in sorted(found.keys() | weights.keys()):
            if not _alike(found.get(name), weights.get(name)):
                raise ArtefactError(
                    f"{name} differs between member 1 and member {count}: only models with one mask have a mean; "
                    "remove the folders soup-* in the training's and train again"
                )
        found = {n: t + weights[n] if t.is_floating_point() else t for n, t in found.items()}
    return {n: t / count if t.is_floating_point() else t for n, t in found.items()}


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have a mean: weights of one shape, or the same of anything else."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.is_floating_point() or a.equal(b)
