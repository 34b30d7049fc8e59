"""The models. Add one: write its file, add its config to `ModelConfig`, add its case to `build_model`."""

from typing import Annotated, assert_never

import torch
from pydantic import Field

from features.schema import Schema
from recsys.embeddings import TableKind
from recsys.models.autoint import AutoInt, AutoIntConfig
from recsys.models.clicked import Clicked, ClickedConfig
from recsys.models.dcn import DCN, DCNConfig
from recsys.models.division import Division, DivisionConfig
from recsys.models.escm2 import ESCM2, ESCM2Config
from recsys.models.esmm import ESMM, ESMMConfig
from recsys.models.fm import FM, FMConfig
from recsys.models.lr import LR, LRConfig
from recsys.models.multitask import MultiTask, MultiTaskConfig
from recsys.models.nise import NISE, NISEConfig
from recsys.models.two_tower import TwoTower, TwoTowerConfig
from recsys.sparsity.config import Sparsity

_PerLabelConfig = AutoIntConfig | DCNConfig | FMConfig | LRConfig | MultiTaskConfig
_FunnelConfig = ClickedConfig | DivisionConfig | ESCM2Config | ESMMConfig | NISEConfig
ModelConfig = Annotated[_PerLabelConfig | _FunnelConfig | TwoTowerConfig, Field(discriminator="name")]
Model = AutoInt | Clicked | DCN | Division | ESCM2 | ESMM | FM | LR | MultiTask | NISE | TwoTower


def build_model(
    config: ModelConfig, schema: Schema, *, table_device: str = "cpu", sparsity: Sparsity | None = None
) -> Model:
    """An untrained model. With `table_device="meta"` its tables take no memory until they are sharded or loaded."""
    tables = TableKind(torch.device(table_device), sparsity)
    match config:
        case AutoIntConfig():
            return AutoInt(config, schema, tables)
        case ClickedConfig():
            return Clicked(config, schema, tables)
        case DCNConfig():
            return DCN(config, schema, tables)
        case DivisionConfig():
            return Division(config, schema, tables)
        case ESCM2Config():
            return ESCM2(config, schema, tables)
        case ESMMConfig():
            return ESMM(config, schema, tables)
        case FMConfig():
            return FM(config, schema, tables)
        case LRConfig():
            return LR(config, schema, tables)
        case MultiTaskConfig():
            return MultiTask(config, schema, tables)
        case NISEConfig():
            return NISE(config, schema, tables)
        case TwoTowerConfig():
            return TwoTower(config, schema, tables)
        case _:
            assert_never(config)
