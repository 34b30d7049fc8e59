"""Where a training run stands: published whole, so that a killed run resumes from a complete one or from the start.

Whatever the number of processes, rank 0 publishes all tables, so that any other number can resume; what is said to be
done here, all ranks do together.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from base.config import Config
from base.errors import ArtefactError
from base.faults import faultpoint
from base.storage import (
    Staging,
    is_published,
    prune,
    publish,
    read_manifest,
    resolve,
    verify,
    version_name,
    versions_of,
)
from features.schema import NewRows
from recsys.distributed import Sharded, Table, agree, to_first
from recsys.draws import normal_rows
from recsys.embeddings import feature_of
from recsys.sparsity.config import Sparsity
from recsys.tensors import load_tensors, save_tensors

TABLE = "embed.tables.embedding_bags.{}.weight"
"""Name of a table's weights in the plain model's state dict."""

SIZES = "embed.tables.sizes_R"
"""Name of what all sparse tables have, and dense ones do not."""

BESIDE = "beside"
"""Part of a state with what training has beside the model."""

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
    epoch_self_loss: float = 0.0
    """The part of it that is the self-supervised task's, before alpha."""
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
    sparsity: Sparsity | None = None

    def after_step(self, loss: float, per_epoch: int, self_loss: float = 0.0) -> "Position":
        """One batch further."""
        every, batch = max(1, per_epoch // 20), self.batch + 1
        window, curve = self.window_loss + loss, self.curve
        if batch % every == 0:
            curve, window = (*curve, (self.epoch + batch / per_epoch, window / every)), 0.0
        moved = {"batch": batch, "step": self.step + 1, "window_loss": window, "curve": curve}
        sums = {"epoch_loss": self.epoch_loss + loss, "epoch_self_loss": self.epoch_self_loss + self_loss}
        return self.model_copy(update={**moved, **sums})


def weights(sharded: Sharded) -> dict[str, Tensor]:
    """This rank's tables and all other weights, under the plain model's names."""
    tables = {TABLE.format(name): table.weights_RD for name, table in sharded.tables.items()}
    sparse = {f"{module}.{n}": t for module, part in sharded.sparse.items() for n, t in part.tensors().items()}
    return tables | sparse | _plain(sharded.dense)


def save_best(folder: Path, sharded: Sharded, optimizer: torch.optim.Optimizer) -> str:
    """Publish the state as it is; returns its version. Older ones stay until a checkpoint lets go of them."""
    target = folder / "best"
    if dist.get_rank() != 0:
        _give(sharded)
        return agree(None)
    with publish(target, "state", overwrite=True) as staging:
        _write(staging, sharded, optimizer)
    return agree(version_name(resolve(target)))


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
    if dist.get_rank() != 0:
        _give(sharded)
        return
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


def stands_at(folder: Path) -> Position:
    """The same of a checkpoint that is there, its tensors unchecked. Raises ArtefactError if there is none."""
    return Position.model_validate(read_manifest(resolve(folder / "checkpoint", "checkpoint")).about)


def restore(folder: Path, sharded: Sharded, optimizer: torch.optim.Optimizer, *, accumulator: float = 0.0) -> None:
    """Put weights, masks and optimizer states back. Raises ArtefactError if a tensor is missing or of another shape."""
    stored = resolve(folder / "checkpoint", "checkpoint")
    with torch.no_grad():
        if sharded.sparse:
            found, states = load_tensors(stored / "weights"), load_tensors(stored / "table_states")
            _copy(found, _plain(sharded.dense), stored)
            for module, tables in sharded.sparse.items():
                tables.resume(_under(module, found), _under(module, states), accumulator, stored)
                tables.watch(_under(module, load_tensors(stored / "watched")))
        else:
            for part, target in (("weights", weights(sharded)), ("table_states", _table_states(sharded))):
                _copy(load_tensors(stored / part, target), target, stored)
        if sharded.beside:
            _copy(load_tensors(stored / BESIDE), _plain(sharded.beside), stored)
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
    if not sharded.sparse and load_tensors(warm.folder / "weights", {SIZES}):
        raise ArtefactError(
            f"{warm.folder}: its tables are sparse, those of this run dense; put its [sparsity] back, or train with "
            "--full"
        )
    stored = load_tensors(warm.folder / "weights", None if sharded.sparse else weights(sharded))
    states = load_tensors(warm.folder / "table_states", None if sharded.sparse else sharded.tables)
    with torch.no_grad():
        for module, tables in sharded.sparse.items():
            tables.carry(
                _under(module, stored),
                _under(module, states),
                [torch.tensor(warm.fresh[feature_of(t.name)]) for t in tables.tables],
                warm.folder,
                rule=warm.new_rows,
                seed=seed,
                accumulator=accumulator,
                decay=warm.accumulator_decay,
            )
        _copy(stored, _plain(sharded.dense), warm.folder)
        if sharded.beside and (warm.folder / BESIDE).is_dir():
            _copy(load_tensors(warm.folder / BESIDE), _plain(sharded.beside), warm.folder)
        for name, table in sharded.tables.items():
            before_RD, sums_R = stored.get(TABLE.format(name)), states.get(name)
            fresh_K = torch.tensor(warm.fresh[feature_of(name)])
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


class _Whole(Mapping[str, Tensor]):
    """Tensors of all ranks by name. Each table's is fetched to rank 0 when it is asked for, one after the other."""

    def __init__(self, here: Mapping[str, Tensor], tables: Mapping[str, tuple[int, Sequence[int]]]) -> None:
        self.here = here
        self.tables = tables
        """By name, the rank that has it, and its shape."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.here.keys() | self.tables.keys())

    def __len__(self) -> int:
        return len(self.here.keys() | self.tables.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tables:
            return self.here[name]
        tensor = to_first(self.here.get(name), *self.tables[name])
        assert tensor is not None
        return tensor

    def give(self) -> None:
        """What the other ranks do while rank 0 asks for all in the order of their names."""
        for name in sorted(self.tables):
            to_first(self.here.get(name), *self.tables[name])


def _wholes(sharded: Sharded) -> tuple[_Whole, _Whole]:
    """Weights, and states of tables."""
    places = sharded.places.items()
    shapes = {TABLE.format(name): (p.rank, (p.rows, p.dim)) for name, p in places}
    sums = {name: (p.rank, (p.rows,)) for name, p in places}
    return _Whole(weights(sharded), shapes), _Whole(_table_states(sharded), sums)


def _table_states(sharded: Sharded) -> dict[str, Tensor]:
    sparse = {f"{module}.{n}": t for module, part in sharded.sparse.items() for n, t in part.states().items()}
    return sparse | {name: table.state_R for name, table in sharded.tables.items()}


def _under(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of one module, by their names in it."""
    return {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}


def _give(sharded: Sharded) -> None:
    """The other ranks' part in `_write`."""
    for whole in _wholes(sharded):
        whole.give()


def _write(staging: Staging, sharded: Sharded, optimizer: torch.optim.Optimizer) -> None:
    for part, whole in zip(("weights", "table_states"), _wholes(sharded), strict=True):
        save_tensors(staging, part, whole)
    save_tensors(staging, "dense_states", _dense_states(sharded, optimizer))
    if sharded.beside:
        save_tensors(staging, BESIDE, _plain(sharded.beside))
    if sharded.sparse:
        watched = {f"{m}.{n}": t for m, part in sharded.sparse.items() for n, t in part.watched().items()}
        save_tensors(staging, "watched", watched)


def _restore_dense(stored: Path, sharded: Sharded, optimizer: torch.optim.Optimizer) -> None:
    states = load_tensors(stored / "dense_states")
    for name, parameter in (sharded.dense | sharded.beside).items():
        found = {key.rpartition("/")[2]: t for key, t in states.items() if key.rpartition("/")[0] == name}
        if found:
            optimizer.state[parameter] = {k: t if k == "step" else t.to(parameter.device) for k, t in found.items()}


def _dense_states(sharded: Sharded, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    trained = sharded.dense | sharded.beside
    return {f"{n}/{key}": value for n, p in trained.items() for key, value in optimizer.state[p].items()}


def _plain(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor], where: Path) -> None:
    for name, tensor in target.items():
        if name not in source or source[name].shape != tensor.shape:
            found: Any = tuple(source[name].shape) if name in source else "nothing"
            raise ArtefactError(
                f"{where}: {name!r} should be {tuple(tensor.shape)}, found {found}; train from the start"
            )
        tensor.copy_(source[name])
