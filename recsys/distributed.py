"""Sharding: a model becomes TorchRec's DistributedModelParallel, also on one process, its tables updated by fbgemm.

Every table is constrained to the fused kernel and to failing bounds checks: left alone, the planner puts small tables
on the dense optimizer, and fbgemm reads row 0 for an id that does not exist.
"""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from recsys.embeddings import Embeddings, reset_table

# Shape suffixes: R = rows of a table, D = embedding dimension.


@dataclass(frozen=True)
class Table:
    """A whole embedding table and its optimizer's state, both the very memory that fbgemm updates."""

    weights_RD: Tensor
    state_R: Tensor
    """Row-wise Adagrad: the sum of mean squared gradients of each row."""


@dataclass(frozen=True)
class Sharded:
    """A model ready to train."""

    module: DistributedModelParallel
    tables: dict[str, Table]
    """By feature name; those that lie on this rank."""
    dense: dict[str, nn.Parameter]
    """By parameter name; everything that is not a table."""
    init_std: dict[str, float]
    """By feature name: how widely its table is initialised."""

    def set_table_learning_rate(self, value: float) -> None:
        """Takes effect from the next backward pass on."""
        optimizer = self.module.fused_optimizer
        groups: Any = optimizer.param_groups
        for group in groups:
            group["lr"] = value
        optimizer.step()  # the fused kernel reads the rate here; gradients are applied in backward


def join_process_group(device: torch.device) -> None:
    """Join torchrun's group, or make one of this process alone."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
        return
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def shard(model: nn.Module, device: torch.device, adagrad: Mapping[str, float], *, batch_size: int) -> Sharded:
    """Put `model` (tables on the meta device) under DistributedModelParallel. Tables are initialised by `reset_tables`.

    `adagrad`: options of RowWiseAdagrad, taken because fbgemm's Adam has no CPU kernel; its state is one float a row.
    """
    join_process_group(device)
    collections = [m for m in model.modules() if isinstance(m, Embeddings)]
    for collection in collections:
        parameters = collection.tables.parameters()
        apply_optimizer_in_backward(RowWiseAdagrad, parameters, dict(adagrad))
    constraints = {
        name: ParameterConstraints(
            sharding_types=["table_wise"], compute_kernels=["fused"], bounds_check_mode=BoundsCheckMode.FATAL
        )
        for collection in collections
        for name in collection.table_names
    }
    world = dist.get_world_size()
    topology = Topology(world_size=world, compute_device=device.type)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints, batch_size=batch_size)
    sharders = get_default_sharders()
    group = dist.group.WORLD
    plan = planner.plan(model, sharders) if world == 1 else planner.collective_plan(model, sharders, group)
    module = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    init_std = {name: c.init_std for c in collections for name in c.table_names}
    return Sharded(module, _tables(module), _dense(module), init_std)


def reset_tables(sharded: Sharded, seed: int, accumulator: float = 0.0) -> None:
    """Initialise every table from its name and `seed`: independent of sharding and of the other tables.

    `accumulator` is what Adagrad's sum of squared gradients begins at.
    """
    for name, table in sharded.tables.items():
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        reset_table(table.weights_RD, sharded.init_std[name], generator)
        table.state_R.fill_(accumulator)


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
