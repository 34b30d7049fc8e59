"""Sharding: a model becomes TorchRec's DistributedModelParallel, also on one process, its tables updated by fbgemm.

Each table lies whole on one rank. On every rank the loss is that of the whole batch, from the logits of all ranks, so
that losses may normalise by whatever they find in a batch; a rank's gradients are those of its own rows.

Every table is constrained to the fused kernel and to failing bounds checks: left alone, the planner puts small tables
on the dense optimizer, and fbgemm reads row 0 for an id that does not exist.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from base.errors import ConfigError, SetupError
from features.transforms import UNKNOWN
from recsys.batch import part_of
from recsys.embeddings import Embeddings, reset_table
from recsys.sparsity.tables import SparseTables

# Shape suffixes: R = rows of a table, D = embedding dimension, B = batch, P = a rank's part of it, X = anything.

_PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others, one of which may be writing a checkpoint. Dead ones are noticed at once."""

_BLOCK = 2**20
"""Rows that travel between ranks at a time."""


@dataclass(frozen=True)
class Table:
    """A whole embedding table and its optimizer's state, both the very memory that fbgemm updates."""

    weights_RD: Tensor
    state_R: Tensor
    """Row-wise Adagrad: the sum of mean squared gradients of each row."""


@dataclass(frozen=True)
class Place:
    """Where a table lies, and its size."""

    rank: int
    rows: int
    dim: int


@dataclass(frozen=True)
class Sharded:
    """A model ready to train."""

    module: nn.Module
    tables: dict[str, Table]
    """By feature name; those that lie on this rank."""
    dense: dict[str, nn.Parameter]
    """By parameter name; everything that is not a table."""
    init_std: dict[str, float]
    """By feature name: how widely its table is initialised."""
    places: dict[str, Place]
    """By feature name; the tables of all ranks."""
    sparse: dict[str, SparseTables] = field(default_factory=dict[str, SparseTables])
    """By the name of the module; then there are no others."""
    beside: dict[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])
    """By name; what training has beside the model, and a Bundle does not."""

    def set_table_learning_rate(self, value: float) -> None:
        """Takes effect from the next backward pass on."""
        for tables in self.sparse.values():
            tables.set_learning_rate(value)
        if not isinstance(self.module, DistributedModelParallel):
            return
        optimizer = self.module.fused_optimizer
        groups: Any = optimizer.param_groups
        for group in groups:
            group["lr"] = value
        optimizer.step()  # the fused kernel reads the rate here; gradients are applied in backward

    def silence_unknown(self) -> None:
        """Set the rows of unknown ids to 0: one that training never meets then says nothing, rather than anything."""
        with torch.no_grad():
            for table in self.tables.values():
                table.weights_RD[UNKNOWN] = 0
            for tables in self.sparse.values():
                tables.silence(torch.tensor(tables.starts) + UNKNOWN)

    def decay_tables(self, strength: float) -> None:
        """Take the steps that L2 alone would make: w <- w exp(-strength / √G), G being Adagrad's sum of the row.

        `strength` is λ times the learning rate times the steps. Data and L2 thus move a row at one rate, and come to
        rest where the gradient of the loss is -λ w. A row without gradients so far stays as it is.
        """
        with torch.no_grad():
            for weights, sums in self._tables():
                for block, of_block in zip(weights.split(_BLOCK), sums.split(_BLOCK), strict=True):
                    kept = torch.exp(-strength / of_block.sqrt()).masked_fill_(of_block == 0, 1.0)
                    block.mul_(kept.unsqueeze(1) if kept.ndim == 1 else kept)

    def decay_sums(self, factor: float) -> None:
        """Leave so much of Adagrad's sums of squared gradients."""
        with torch.no_grad():
            for _, sums in self._tables():
                sums.mul_(factor)

    def _tables(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and sums of every table on this rank."""
        tables = [(table.weights_RD, table.state_R) for table in self.tables.values()]
        groups = [group for part in self.sparse.values() for group in part.groups]
        return tables + [(group.values_NS, group.state) for group in groups if group.state is not None]


def join_process_group(device: torch.device) -> None:
    """Join torchrun's group, or make one of this process alone."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=_PATIENCE)
        return
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def shard(model: nn.Module, device: torch.device, adagrad: Mapping[str, float], *, batch_size: int) -> Sharded:
    """Put `model` (tables on the meta device) under DistributedModelParallel. Tables are initialised by `reset_tables`.

    `adagrad`: options of RowWiseAdagrad, taken because fbgemm's Adam has no CPU kernel; its state is one float a row.
    `batch_size` is that of all ranks together. Raises ConfigError for fewer tables than ranks, SetupError if the
    planner finds no room.
    """
    join_process_group(device)
    if sparse := {name: m for name, m in model.named_modules() if isinstance(m, SparseTables)}:
        return _whole_model(model, sparse, device, adagrad)
    collections = [m for m in model.modules() if isinstance(m, Embeddings)]
    for collection in collections:
        assert isinstance(collection.tables, EmbeddingBagCollection)
        parameters = collection.tables.parameters()
        apply_optimizer_in_backward(RowWiseAdagrad, parameters, dict(adagrad))
    constraints = {
        name: ParameterConstraints(
            sharding_types=["table_wise"], compute_kernels=["fused"], bounds_check_mode=BoundsCheckMode.FATAL
        )
        for collection in collections
        for name in collection.table_names
    }
    tables = [
        table
        for collection in collections
        if isinstance(collection.tables, EmbeddingBagCollection)
        for table in collection.tables.embedding_bag_configs()
    ]
    world = dist.get_world_size()
    if world > len(constraints):
        raise ConfigError(
            f"train.processes = {world}: each table lies whole on one process, and there are {len(constraints)} "
            f"tables; use at most {len(constraints)}"
        )
    topology = Topology(world_size=world, compute_device=device.type)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints, batch_size=-(-batch_size // world))
    sharders = get_default_sharders()
    group = dist.group.WORLD
    try:
        plan = planner.plan(model, sharders) if world == 1 else planner.collective_plan(model, sharders, group)
    except PlannerError as error:
        reason = str(error).strip().splitlines()[0]
        raise SetupError(
            f"{len(constraints)} tables on {world} processes: the planner found no place for them ({reason}); "
            "choose other train.processes, a smaller model.dim or fewer rows"
        ) from None
    module = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    init_std = {name: c.init_std for c in collections for name in c.table_names}
    return Sharded(module, _tables(module), _dense(module), init_std, _places(plan, tables))


def _whole_model(
    model: nn.Module, sparse: dict[str, SparseTables], device: torch.device, adagrad: Mapping[str, float]
) -> Sharded:
    """A model with sparse tables: they update themselves, and lie whole in the only process."""
    if dist.get_world_size() > 1:
        raise ConfigError(
            f"train.processes = {dist.get_world_size()}: sparse tables are trained by one process; set it to 1, or "
            "leave [sparsity] out"
        )
    model.to(device)
    for tables in sparse.values():
        tables.prepare(adagrad, device)
    prefixes = tuple(f"{name}." for name in sparse)
    dense = {n: p for n, p in model.named_parameters() if not n.startswith(prefixes)}
    return Sharded(model, {}, dense, {}, {}, sparse)


def reset_tables(
    sharded: Sharded, seed: int, accumulator: float = 0.0, counts: Mapping[str, Tensor] | None = None
) -> None:
    """Initialise every table from its name and `seed`: independent of sharding and of the other tables.

    `accumulator` is what Adagrad's sum of squared gradients begins at. `counts`: of each sparse feature, how often each
    row is looked up in training, for sparse tables that are shared out by it.
    """
    for tables in sharded.sparse.values():
        tables.begin(seed, accumulator, counts)
    for name, table in sharded.tables.items():
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        reset_table(table.weights_RD, sharded.init_std[name], generator)
        table.state_R.fill_(accumulator)


def agree(value: Any) -> Any:
    """What rank 0 has, on every rank: numbers, text, and lists and dicts of them."""
    if dist.get_world_size() == 1:
        return value
    device = _device()
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor(text.numel(), device=device)
    dist.broadcast(size, 0)
    if dist.get_rank() != 0:
        text = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(text, 0)
    return json.loads(text.cpu().numpy().tobytes())


def whole_batch(part_PX: Tensor, rows: int, world: int) -> Tensor:
    """values_BX of a batch of `rows`, from the parts (`part_of`) of all ranks; gradients reach this rank's only."""
    parts = [torch.empty_like(part_PX) for _ in range(world)]
    dist.all_gather(parts, part_PX.detach().contiguous())
    parts[dist.get_rank()] = part_PX
    kept: list[Tensor] = []
    end = 0
    for rank, values_PX in enumerate(parts):
        place = part_of(rows, rank, world)
        kept.append(values_PX[end - place.start :])
        end = place.stop
    return torch.cat(kept)


def to_first(tensor: Tensor | None, owner: int, shape: Sequence[int]) -> Tensor | None:
    """On rank 0 the tensor of rank `owner`, in main memory unless it lies there; None on the others.

    All ranks call it together; `tensor` is None on those that do not have it.
    """
    rank = dist.get_rank()
    if owner == 0:
        return tensor
    if rank == owner:
        assert tensor is not None
        for block in tensor.split(_BLOCK):
            dist.send(block.contiguous(), 0)
    if rank != 0:
        return None
    whole = torch.empty(*shape)
    for block in whole.split(_BLOCK):
        received = torch.empty_like(block, device=_device())
        dist.recv(received, owner)
        block.copy_(received)
    return whole


def _device() -> torch.device:
    """Where tensors must lie to be sent."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _places(plan: ShardingPlan, tables: Sequence[EmbeddingBagConfig]) -> dict[str, Place]:
    ranks: dict[str, int] = {}
    for part in plan.plan.values():
        assert isinstance(part, EmbeddingModuleShardingPlan)
        ranks |= {name: table.ranks[0] for name, table in part.items() if table.ranks}
    return {t.name: Place(ranks[t.name], t.num_embeddings, t.embedding_dim) for t in tables}


def _tables(module: DistributedModelParallel) -> dict[str, Table]:
    found: dict[str, Table] = {}
    for part in module.modules():
        if isinstance(part, ShardedEmbeddingBagCollection):
            for lookup in part._lookups:
                for kernel in lookup._emb_modules:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
                    names = [t.name for t in kernel._config.embedding_tables]
                    weights = kernel.emb_module.split_embedding_weights()
                    states = kernel.emb_module.split_optimizer_states()
                    for name, weights_RD, (state_R,) in zip(names, weights, states, strict=True):
                        found[name] = Table(weights_RD, state_R)
    return found


def _dense(module: DistributedModelParallel) -> dict[str, nn.Parameter]:
    fused = set(module.fused_optimizer.params)
    return {n: p for n, p in module.named_parameters() if n not in fused and ".tables." not in n}
