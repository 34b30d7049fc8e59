"""Where a training run stands: published whole, so that a killed run resumes from a complete one or from the start."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.config import Config
from base.errors import ArtefactError
from base.faults import faultpoint
from base.storage import Staging, is_published, prune, publish, resolve, verify, version_name, versions_of
from features.schema import NewRows
from recsys.distributed import Sharded, Table
from recsys.embeddings import feature_of, normal_rows
from recsys.tensors import load_tensors, save_tensors

TABLE = "embed.tables.embedding_bags.{}.weight"
"""Name of a table's weights in the plain model's state dict."""

# Shape suffixes: R = rows of a table, D = embedding dimension, K = fresh rows.


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
    best_epoch: int = 0
    """Counted from 1."""
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


def save_best(folder: Path, sharded: Sharded, optimizer: torch.optim.Optimizer) -> str:
    """Publish the state as it is; returns its version. Older ones stay until a checkpoint lets go of them."""
    target = folder / "best"
    with publish(target, "state", overwrite=True) as staging:
        _write(staging, sharded, optimizer)
    return version_name(resolve(target))


def best_of(folder: Path, version: str) -> Path:
    """The state published as `version`, verified. Raises ArtefactError if it is gone or altered."""
    for path in versions_of(folder / "best"):
        if version_name(path) == version:
            verify(path)
            return path
    raise ArtefactError(f"{folder / 'best'}: version {version} is gone; remove {folder} and train again")


def save(folder: Path, sharded: Sharded, optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Publish weights, optimizer states and position as one artefact, then drop what it no longer needs."""
    target = folder / "checkpoint"
    with publish(target, "checkpoint", overwrite=True) as staging:
        _write(staging, sharded, optimizer)
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
    _restore_dense(stored, sharded, optimizer)


@dataclass(frozen=True)
class WarmStart:
    """The state of an earlier training, from which a later one goes on with tables that have grown."""

    folder: Path
    """A verified folder that holds what `save_best` wrote."""
    fresh: Mapping[str, NDArray[np.int64]]
    """By feature: the rows of its table that mean something new; all other rows, and their states, are carried over."""
    new_rows: NewRows = "mean"
    accumulator_decay: float = 1.0
    """Multiplies Adagrad's sums, so that rows with a long history can still move."""


def start_from(
    warm: WarmStart, sharded: Sharded, optimizer: torch.optim.Optimizer, *, seed: int, accumulator: float
) -> None:
    """Carry an earlier state over. Raises ArtefactError where growth does not explain a shape.

    A row that is not fresh keeps its bits. A fresh one begins at the mean of the carried rows, or at a normal draw that
    follows from the seed, its table and its number; its Adagrad sum begins at `accumulator`.
    """
    stored = load_tensors(warm.folder / "weights")
    states = load_tensors(warm.folder / "table_states")
    with torch.no_grad():
        _copy(stored, {n: p.detach() for n, p in sharded.dense.items()}, warm.folder)
        for name, table in sharded.tables.items():
            before_RD, sums_R = stored.get(TABLE.format(name)), states.get(name)
            fresh_K = torch.from_numpy(warm.fresh[feature_of(name)])
            if before_RD is None or sums_R is None or not _grown(before_RD, table.weights_RD, fresh_K):
                found = "nothing" if before_RD is None else tuple(before_RD.shape)
                raise ArtefactError(
                    f"{warm.folder}: table {name!r} holds {found}, the model needs {tuple(table.weights_RD.shape)} of "
                    f"which {len(fresh_K)} rows are new; train with --full"
                )
            table.weights_RD[: len(before_RD)] = before_RD
            table.state_R[: len(sums_R)] = sums_R * warm.accumulator_decay
            _begin(table, fresh_K, name, sharded.init_std[name], warm.new_rows, seed)
            table.state_R[fresh_K] = accumulator
    _restore_dense(warm.folder, sharded, optimizer)


def _grown(before_RD: Tensor, after_RD: Tensor, fresh_K: Tensor) -> bool:
    """Whether fresh rows are all that `after_RD` has more."""
    more = after_RD.shape[0] - before_RD.shape[0]
    return before_RD.shape[1] == after_RD.shape[1] and int((fresh_K >= before_RD.shape[0]).sum()) == more


def _begin(table: Table, fresh_K: Tensor, name: str, std: float, rule: NewRows, seed: int) -> None:
    """Values for rows that nothing is known of."""
    if not len(fresh_K):
        return
    if rule == "mean":
        known_R = torch.ones(len(table.weights_RD), dtype=torch.bool)
        known_R[fresh_K] = False
        known_R[0] = False  # row 0 stands for what has no row
        if known_R.any():
            table.weights_RD[fresh_K] = table.weights_RD[known_R].mean(0)
            return
    drawn_KD = normal_rows(fresh_K, table.weights_RD.shape[1], seed ^ zlib.crc32(name.encode()))
    table.weights_RD[fresh_K] = drawn_KD.to(table.weights_RD) * std


def _write(staging: Staging, sharded: Sharded, optimizer: torch.optim.Optimizer) -> None:
    save_tensors(staging, "weights", weights(sharded))
    save_tensors(staging, "table_states", {n: t.state_R for n, t in sharded.tables.items()})
    save_tensors(staging, "dense_states", _dense_states(sharded, optimizer))


def _restore_dense(stored: Path, sharded: Sharded, optimizer: torch.optim.Optimizer) -> None:
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
