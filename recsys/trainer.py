"""Training: epochs over a stream, exact metrics on held-out examples, the best weights kept, resumable at any step."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from base.config import Config
from base.errors import ArtefactError, ConfigError, DataError
from base.faults import faultpoint
from features.schema import Schema
from recsys import checkpoint
from recsys.batch import Batch
from recsys.checkpoint import Position, WarmStart
from recsys.contrast.corpus import Corpus
from recsys.contrast.task import SelfTask, drop_features, require_trainable
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.distributed import Sharded, agree, join_process_group, reset_tables, shard, whole_batch
from recsys.metrics import evaluate, headline
from recsys.models import Model, ModelConfig, build_model
from recsys.models.two_tower import TwoTower
from recsys.retrieval import Ranking, rank_items
from recsys.sparsity.config import Sparsity
from recsys.sparsity.describe import Watch
from recsys.sparsity.schedule import Mover
from recsys.tensors import load_tensors

_DECAY_EVERY = 25
"""Steps whose share of what tables lose by themselves is taken at once."""


class TrainConfig(Config):
    """How to train. Fields not given have defaults that work on a laptop."""

    batch_size: PositiveInt = 4096
    epochs: PositiveInt = 3
    learning_rate: PositiveFloat = 1e-3
    """Of Adam, for everything but the tables."""
    table_learning_rate: PositiveFloat = 0.2
    """Of row-wise Adagrad, for the tables: it falls with the gradients a row has seen, so it starts high."""
    table_eps: PositiveFloat = 1e-8
    table_accumulator: NonNegativeFloat = 0.0
    """What row-wise Adagrad's sum of mean squared gradients begins at. From 0 a row's first step has the size of the
    learning rate, however rare its id; a larger value lets rows move by what they have seen."""
    table_accumulator_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What an epoch leaves of row-wise Adagrad's sum, in equal shares of it every 25 steps. At 1 the steps of a row
    shrink for as long as it is trained; below, the sum speaks of the last epochs and the row keeps moving. With
    `table_l2` rows that no example looks up any more go to 0."""
    table_l2: NonNegativeFloat = 0.0
    """L2 of the tables: λ/2 Σ w² is added to the loss, so that rows of rare ids stay small. It takes a pass over all
    tables every 25 steps."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 in Adam (dense parameters only)."""
    decay_on_plateau: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Multiplies both learning rates after an evaluation without improvement."""
    monitor: Literal["log_loss", "auc", "recall", "ndcg"] = "log_loss"
    """Decides which weights are best and when to stop; the mean over outputs. The last two are of retrieval models, at
    the first of `retrieval.k`."""
    evaluate_every: PositiveInt = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    patience: PositiveInt = 2
    """Stop after so many evaluations in a row without improvement."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    shuffle_window: PositiveInt = 8
    """Row groups of 131,072 examples that are shuffled together."""
    checkpoint_every: PositiveInt = 2000
    """Steps between checkpoints inside an epoch; there is one after every epoch as well."""
    threads: PositiveInt | None = None
    """CPU threads of each process; by default torch's choice, or a process's share of the cores. Weights are
    bit-identical only for equal numbers of threads."""
    processes: PositiveInt = 1
    """Processes that share the work of every batch and, table by table, the tables; on CUDA at most one for each GPU.
    Weights are the same up to rounding, so that a run may go on with another number."""


@dataclass(frozen=True)
class Progress:
    """Where training stands, for whoever watches."""

    epoch: int
    epochs: int
    step: int
    steps: int
    """Of all epochs."""
    rows_per_second: float
    eta_seconds: float
    loss: float


@dataclass(frozen=True)
class Trained:
    """The outcome: the best weights and how they came about."""

    weights: dict[str, Tensor]
    state: Path
    """Where these weights and the optimizers' states lie, for the next day to start from."""
    history: list[dict[str, float]]
    """One entry per epoch: training loss, its self-supervised part before alpha; metrics on the validation rows and
    densities of sparse tables, if any."""
    curve: list[tuple[float, float]]
    """Training loss by epochs done."""
    best_epoch: int
    """Counted from 1."""
    rows_per_second: float
    resumed_at: int
    """Step at which this process took over; 0 if it started from nothing."""


@dataclass(frozen=True)
class Pace:
    """What this process, or group of processes, has done of the training."""

    rows_per_second: float
    resumed_at: int


def train(
    model_config: ModelConfig,
    schema: Schema,
    fit: ExampleStream,
    valid: ExampleStream | Ranking | None,
    config: TrainConfig,
    folder: Path,
    *,
    device: torch.device = CPU,
    identity: str = "",
    warm: WarmStart | None = None,
    sparsity: Sparsity | None = None,
    item_counts: NDArray[np.int64] | None = None,
    corpus: Corpus | None = None,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Train on `fit`, measure on `valid` after every epoch, return the best weights; without `valid`, the last.

    `item_counts` are what a retrieval model's correction is taken from: the rows of each id of `schema.item`.

    With a `corpus` a self-supervised task over its items is part of the loss, or the main task is as its baseline says.

    `folder` holds the checkpoint; one whose configuration and data (`identity`) are the same is resumed. With `warm`
    training goes on from an earlier state instead of from nothing.
    Raises DataError if there is nothing to train on or the loss is not finite, ConfigError where the process group is
    not one of `config.processes` (`recsys.processes` makes one).
    """
    arguments = (model_config, schema, fit, valid, config, folder)
    options: Any = {"device": device, "identity": identity, "warm": warm, "sparsity": sparsity}
    return outcome(folder, learn(*arguments, **options, item_counts=item_counts, corpus=corpus, on_step=on_step))


def outcome(folder: Path, pace: Pace) -> Trained:
    """What a finished training has left in `folder`. Raises ArtefactError if it is gone or altered."""
    at = checkpoint.stands_at(folder)
    if at.best is None or not at.finished:
        raise ArtefactError(f"{folder}: holds no finished training; train again")
    state = checkpoint.best_of(folder, at.best)
    history, kept = [dict(entry) for entry in at.history], load_tensors(state / "weights")
    return Trained(kept, state, history, list(at.curve), at.best_epoch, pace.rows_per_second, pace.resumed_at)


def learn(
    model_config: ModelConfig,
    schema: Schema,
    fit: ExampleStream,
    valid: ExampleStream | Ranking | None,
    config: TrainConfig,
    folder: Path,
    *,
    device: torch.device = CPU,
    identity: str = "",
    warm: WarmStart | None = None,
    sparsity: Sparsity | None = None,
    item_counts: NDArray[np.int64] | None = None,
    corpus: Corpus | None = None,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> Pace:
    """`train`, the outcome left in `folder`: what each rank of a process group does, all with the same arguments."""
    if not fit.rows() or (valid is not None and not valid.rows()):
        held_out = "" if valid is None else f" and {valid.rows()} validation rows"
        raise DataError(f"{fit.rows()} training{held_out}: there must be some; prepare again")
    run = run_hash(model_config, schema, config, identity, sparsity, corpus)
    join_process_group(device)
    rank, world = dist.get_rank(), dist.get_world_size()
    if world != config.processes:
        raise ConfigError(f"train.processes = {config.processes}: this process group has {world}")
    if corpus is not None:
        require_trainable(model_config, world)
    fit = replace(fit, rank=rank, world=world)
    valid = valid and replace(valid, rank=rank, world=world)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = build_model(model_config, schema, table_device="meta", sparsity=sparsity)
    adagrad = {"lr": config.table_learning_rate, "eps": config.table_eps}
    sharded = shard(model, device, adagrad, batch_size=config.batch_size)
    if isinstance(model, TwoTower) and item_counts is not None:
        model.count_items(torch.from_numpy(item_counts).to(device))
    task = None
    if corpus is not None:
        drop_features(corpus, model, schema)
        if corpus.config.baseline != "feature_dropout":
            task = SelfTask(corpus, model, schema, config.batch_size, config.seed).to(device)
            sharded = replace(sharded, beside={f"ssl.{name}": p for name, p in task.named_parameters()})
    trained = [*sharded.dense.values(), *sharded.beside.values()]
    optimizer = torch.optim.Adam(trained, config.learning_rate, weight_decay=config.weight_decay)
    at = _agreed(checkpoint.position_of(folder) if rank == 0 else None)
    refuse_other_density(at, run, sparsity, folder)
    counts = fit.row_counts() if sparsity and sparsity.unequal else None
    if at is None or at.run != run:
        if warm is None:
            reset_tables(sharded, config.seed, config.table_accumulator, counts)
            if isinstance(model, TwoTower):
                sharded.silence_unknown()  # new items are in every ranking, and a random vector would be in theirs
        else:
            checkpoint.start_from(warm, sharded, optimizer, seed=config.seed, accumulator=config.table_accumulator)
        at = Position(run=run, sparsity=sparsity)
    else:
        checkpoint.restore(folder, sharded, optimizer, accumulator=config.table_accumulator)
    steps = fit.batches_per_epoch(0)
    mover = Mover(list(sharded.sparse.values()), config.epochs * steps, steps, config.seed, warm=warm is not None)
    watches = [Watch.over(tables, counts) for tables in sharded.sparse.values()]
    resumed_at, seen, started = at.step, 0, time.perf_counter()
    while not at.finished:
        per_epoch = fit.batches_per_epoch(at.epoch)
        _set_rates(sharded, optimizer, config, at)
        sharded.module.train()
        sizes = fit.batch_rows(at.epoch)[at.batch :]
        for batch, rows in zip(fit.epoch(at.epoch, start=at.batch), sizes, strict=True):
            # Dropout follows from the step, so resuming repeats it.
            torch.manual_seed(hash((config.seed, at.step, rank) if rank else (config.seed, at.step)))
            mover.before_step(at.step)
            logits_BL, labels_BT = _whole(sharded.module, batch.to(device), rows, world)
            loss, self_value = model.loss(logits_BL, labels_BT), 0.0
            if task is not None:
                self_loss = task.loss(model, at.step, device)
                loss, self_value = loss + task.config.alpha * self_loss, self_loss.detach().item()
                del self_loss
            optimizer.zero_grad()
            (loss * world).backward()  # TorchRec and DDP take the mean of what the ranks' rows give; it is the sum
            optimizer.step()
            if (at.step + 1) % _DECAY_EVERY == 0:
                _decay(sharded, config, at, per_epoch)
            value = loss.detach().item()
            if not np.isfinite(value):
                raise DataError(
                    f"the loss became {value} at step {at.step}: lower train.table_learning_rate or learning_rate"
                )
            del loss, logits_BL  # they hold the kernels that an update may replace
            mover.after_step(at.step)
            at = at.after_step(value, per_epoch, self_value)
            seen += rows
            on_step(_progress(at, config, per_epoch, seen, resumed_at, time.perf_counter() - started, value))
            if at.batch % config.checkpoint_every == 0 and at.batch < per_epoch:
                checkpoint.save(folder, sharded, optimizer, at)
            faultpoint(f"trainer.step@{rank}" if rank else "trainer.step")
        found = {name: value for watch in watches for name, value in watch.densities().items()}
        if task is not None:
            found["self_loss"] = at.epoch_self_loss / at.batch
        at = _close_epoch(at, found, config, sharded, optimizer, model, valid, device, folder)
        checkpoint.save(folder, sharded, optimizer, at)
    if rank == 0:
        checkpoint.tidy(folder, at)  # a process killed at the very end did not come to it
    return Pace(seen / (time.perf_counter() - started), resumed_at)


def predict(module: Callable[..., Tensor], model: Model, stream: ExampleStream, device: torch.device) -> pl.DataFrame:
    """A scored table of a stream: a probability per output and the labels, null where not known yet."""
    probabilities: list[Tensor] = []
    labels: list[Tensor] = []
    for logits_BL, labels_BT in passed(module, stream, device):
        probabilities.append(model.probabilities(logits_BL).cpu())
        labels.append(labels_BT.cpu())
    p_RO, y_RT = torch.cat(probabilities).double().numpy(), torch.cat(labels).numpy()
    scored = {o.name: p_RO[:, i] for i, o in enumerate(model.outputs)}
    known = {label: pl.Series(y_RT[:, i]).fill_nan(None) for i, label in enumerate(stream.schema.labels)}
    return pl.DataFrame(scored | known)


def passed(
    module: Callable[..., Tensor], stream: ExampleStream, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of a stream's batches, without gradients; with several ranks of all of them together."""
    for batch, rows in zip(stream.epoch(0), stream.batch_rows(0), strict=True):
        with torch.no_grad():
            found = _whole(module, batch.to(device), rows, stream.world)
        yield found


def _whole(module: Callable[..., Tensor], batch: Batch, rows: int, world: int) -> tuple[Tensor, Tensor]:
    """Logits and labels of the whole batch of `rows`, of which `batch` is this rank's part."""
    logits_PL = module(batch)
    if world == 1:
        return logits_PL, batch.labels_BT
    both_BX = whole_batch(torch.cat([logits_PL, batch.labels_BT], 1), rows, world)
    logits_BL, labels_BT = both_BX.split([logits_PL.shape[1], batch.labels_BT.shape[1]], 1)
    return logits_BL, labels_BT


def _agreed(position: Position | None) -> Position | None:
    """Rank 0's."""
    found = agree(position and position.model_dump(mode="json"))
    return found and Position.model_validate(found)


def _close_epoch(
    at: Position,
    found: Mapping[str, float],
    config: TrainConfig,
    sharded: Sharded,
    optimizer: torch.optim.Optimizer,
    model: Model,
    valid: ExampleStream | Ranking | None,
    device: torch.device,
    folder: Path,
) -> Position:
    """Measure, keep the weights if they are the best so far, decide whether to go on."""
    epoch = at.epoch + 1
    entry = {"epoch": float(epoch), "step": float(at.step), "train_loss": at.epoch_loss / at.batch, **found}
    improved, skipped = True, epoch % config.evaluate_every != 0 and epoch < config.epochs
    if valid is not None and skipped:
        improved = False
    elif valid is not None:
        sharded.module.eval()
        entry = agree(entry | measured(sharded.module, valid, model, config, device))
        known = (h["objective"] for h in at.history if "objective" in h)
        improved = entry["objective"] < min(known, default=float("inf"))
    moved = {"best": checkpoint.save_best(folder, sharded, optimizer), "best_epoch": epoch} if improved else {}
    faultpoint("trainer.best")
    waited = 0 if improved or skipped else (epoch - at.best_epoch) // config.evaluate_every
    return at.model_copy(
        update={
            "epoch": epoch,
            "batch": 0,
            "epoch_loss": 0.0,
            "epoch_self_loss": 0.0,
            "window_loss": 0.0,
            "history": (*at.history, entry),
            "finished": epoch >= config.epochs or waited >= config.patience,
            **moved,
        }
    )


def measured(
    module: Callable[..., Tensor],
    valid: ExampleStream | Ranking,
    model: Model,
    config: TrainConfig,
    device: torch.device,
) -> dict[str, float]:
    """Exact metrics on what is held out, and the objective that they make; on rank 0, which the others help."""
    if isinstance(valid, Ranking):
        assert isinstance(model, TwoTower)
        table = rank_items(lambda stream: (x for x, _ in passed(module, stream, device)), model, valid, brief=True)
        if table.is_empty():
            return {}
        found = {
            f"{name}_{k}": value
            for k, recall, ndcg in table.select("k", "recall", "ndcg").iter_rows()
            for name, value in (("recall", recall), ("ndcg", ndcg))
        }
        return {"objective": -found[f"{config.monitor}_{valid.cuts.k[0]}"], **found}
    scored = predict(module, model, valid, device)
    return _measure_scored(scored, model, config) if dist.get_rank() == 0 else {}


def _measure_scored(scored: pl.DataFrame, model: Model, config: TrainConfig) -> dict[str, float]:
    """Of every output on the validation rows."""
    evaluation = evaluate(scored, model.outputs)
    metrics = {o.name: headline(evaluation, o.name) for o in model.outputs}
    for output in model.outputs:
        if not np.isfinite(metrics[output.name]["auc"]):
            raise DataError(
                f"label {output.label!r}: the validation rows, {output.space}, hold one class only; choose other days"
            )
    sign = -1.0 if config.monitor == "auc" else 1.0
    found = {"objective": sign * float(np.mean([m[config.monitor] for m in metrics.values()]))}
    for output, values in metrics.items():
        found |= {f"{output}.{k}": v for k, v in values.items() if k not in ("rows", "positives")}
    return found


def _set_rates(sharded: Sharded, optimizer: torch.optim.Optimizer, config: TrainConfig, at: Position) -> None:
    factor = _factor(config, at)
    sharded.set_table_learning_rate(config.table_learning_rate * factor)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor


def _decay(sharded: Sharded, config: TrainConfig, at: Position, per_epoch: int) -> None:
    """What tables and their sums lose by themselves in so many steps."""
    if config.table_l2:
        sharded.decay_tables(_DECAY_EVERY * config.table_l2 * config.table_learning_rate * _factor(config, at))
    if config.table_accumulator_decay < 1:
        sharded.decay_sums(config.table_accumulator_decay ** (_DECAY_EVERY / per_epoch))


def _factor(config: TrainConfig, at: Position) -> float:
    """What plateaus have made of the learning rates."""
    objectives = [h["objective"] for h in at.history if "objective" in h]
    return config.decay_on_plateau ** sum(o >= min(objectives[:i], default=np.inf) for i, o in enumerate(objectives))


def _progress(
    at: Position, config: TrainConfig, per_epoch: int, seen: int, resumed_at: int, elapsed: float, loss: float
) -> Progress:
    total = config.epochs * per_epoch
    eta = elapsed / max(1, at.step - resumed_at) * (total - at.step)
    return Progress(at.epoch + 1, config.epochs, at.step, total, seen / elapsed, eta, loss)


def refuse_other_density(at: Position | None, run: str, sparsity: Sparsity | None, folder: Path) -> None:
    """Raises ConfigError if an unfinished training has begun with other sparsity."""
    if at is None or at.run == run or at.finished or at.sparsity == sparsity:
        return
    was, now = _settings(at.sparsity), _settings(sparsity)
    key = next((k for k in was if k in now and was[k] != now[k]), "density")
    raise ConfigError(
        f"sparsity.{key} = {now.get(key, 'nothing: tables are dense')}, but the training in {folder} stands at step "
        f"{at.step} with {was.get(key, 'dense tables')}; set it back to go on with that one, or remove the folder"
    )


def _settings(sparsity: Sparsity | None) -> dict[str, Any]:
    """By name, those of the schedule among them; none of dense tables."""
    found = {} if sparsity is None else sparsity.model_dump(exclude={"schedule"})
    return found if sparsity is None else found | {f"schedule.{k}": v for k, v in sparsity.schedule}


def run_hash(
    model: ModelConfig,
    schema: Schema,
    config: TrainConfig,
    identity: str,
    sparsity: Sparsity | None = None,
    corpus: Corpus | None = None,
) -> str:
    """Of everything that decides the outcome; of `processes` it does not depend, up to rounding."""
    free = {"checkpoint_every", "processes"}  # may change between a run and its resumption
    parts = [
        model.model_dump(mode="json"),
        schema.model_dump(mode="json"),
        config.model_dump(mode="json", exclude=free),
    ]
    if sparsity is not None:
        parts.append(sparsity.model_dump(mode="json"))
    if corpus is not None:
        parts.append({**corpus.config.model_dump(mode="json"), "item": list(corpus.item)})
    return hashlib.sha256(json.dumps([*parts, identity], sort_keys=True).encode()).hexdigest()[:16]
