"""Where a training run stands: published whole, so that a killed run resumes from a complete one or from the start."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.config import Config
from base.errors import ArtefactError
from base.faults import faultpoint
from base.storage import is_published, prune, publish, resolve, verify, version_name, versions_of
from recsys.distributed import Sharded
from recsys.tensors import load_tensors, save_tensors

TABLE = "embed.tables.embedding_bags.{}.weight"
"""Name of a table's weights in the plain model's state dict."""


class Position(Config):
    """How far training has come, and what it has seen so far."""

    run: str
    """Hash of everything that decides the outcome; a checkpoint of another run is not resumed."""
    epoch: int = 0
    batch: int = 0
    """Batches done in this epoch."""
    step: int = 0
    epoch_loss: float = 0.0
    """Sum of this epoch's losses."""
    window_loss: float = 0.0
    """Sum of the losses since the last point of the curve."""
    curve: tuple[tuple[float, float], ...] = ()
    """Training loss by epochs done, in steps of a twentieth of an epoch."""
    history: tuple[dict[str, float], ...] = ()
    """One entry per evaluation."""
    best: str | None = None
    """Version of the best weights."""
    finished: bool = False

    def after_step(self, loss: float, per_epoch: int) -> "Position":
        """One batch further."""
        every, batch = max(1, per_epoch // 20), self.batch + 1
        window, curve = self.window_loss + loss, self.curve
        if batch % every == 0:
            curve, window = (*curve, (self.epoch + batch / per_epoch, window / every)), 0.0
        moved = {"batch": batch, "step": self.step + 1, "epoch_loss": self.epoch_loss + loss}
        return self.model_copy(update={**moved, "window_loss": window, "curve": curve})


def weights(sharded: Sharded) -> dict[str, Tensor]:
    """All weights under the plain model's names."""
    tables = {TABLE.format(name): table.weights_RD for name, table in sharded.tables.items()}
    return tables | {name: parameter.detach() for name, parameter in sharded.dense.items()}


def save_best(folder: Path, sharded: Sharded) -> str:
    """Publish the weights as they are; returns their version. Older ones stay until a checkpoint lets go of them."""
    target = folder / "best"
    with publish(target, "weights", overwrite=True) as staging:
        save_tensors(staging, "weights", weights(sharded))
    return version_name(resolve(target))


def load_best(folder: Path, version: str) -> dict[str, Tensor]:
    """The weights published as `version`. Raises ArtefactError if they are gone or altered."""
    for path in versions_of(folder / "best"):
        if version_name(path) == version:
            verify(path)
            return load_tensors(path / "weights")
    raise ArtefactError(f"{folder / 'best'}: version {version} is gone; remove {folder} and train again")


def save(folder: Path, sharded: Sharded, optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Publish weights, optimizer states and position as one artefact, then drop what it no longer needs."""
    target = folder / "checkpoint"
    with publish(target, "checkpoint", overwrite=True) as staging:
        save_tensors(staging, "weights", weights(sharded))
        save_tensors(staging, "table_states", {n: t.state_R for n, t in sharded.tables.items()})
        save_tensors(staging, "dense_states", _dense_states(sharded, optimizer))
        staging.about.update(position.model_dump(mode="json"))
    faultpoint("checkpoint.published")
    tidy(folder, position)


def tidy(folder: Path, position: Position) -> None:
    """Drop what the checkpoint no longer needs, and what a killed process left."""
    prune(folder / "checkpoint", keep=1)
    prune(folder / "best", keep=1, spare=[position.best] if position.best else [])


def position_of(folder: Path) -> Position | None:
    """Where the last checkpoint stands; None if there is none."""
    target = folder / "checkpoint"
    return Position.model_validate(verify(resolve(target, "checkpoint")).about) if is_published(target) else None


def restore(folder: Path, sharded: Sharded, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimizer states back. Raises ArtefactError if a tensor is missing or of another shape."""
    stored = resolve(folder / "checkpoint", "checkpoint")
    with torch.no_grad():
        _copy(load_tensors(stored / "weights"), weights(sharded), stored)
        _copy(load_tensors(stored / "table_states"), {n: t.state_R for n, t in sharded.tables.items()}, stored)
    states = load_tensors(stored / "dense_states")
    for name, parameter in sharded.dense.items():
        found = {key.rpartition("/")[2]: t for key, t in states.items() if key.rpartition("/")[0] == name}
        if found:
            optimizer.state[parameter] = {k: t if k == "step" else t.to(parameter.device) for k, t in found.items()}


def _dense_states(sharded: Sharded, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{n}/{key}": value for n, p in sharded.dense.items() for key, value in optimizer.state[p].items()}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor], where: Path) -> None:
    for name, tensor in target.items():
        if name not in source or source[name].shape != tensor.shape:
            found: Any = tuple(source[name].shape) if name in source else "nothing"
            raise ArtefactError(
                f"{where}: {name!r} should be {tuple(tensor.shape)}, found {found}; train from the start"
            )
        tensor.copy_(source[name])
