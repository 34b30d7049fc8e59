"""The models. Add one: write its file, add its config to `ModelConfig`, add its case to `build_model`."""

from typing import Annotated, assert_never

import torch
from pydantic import Field

from features.schema import Schema
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

_PerLabelConfig = AutoIntConfig | DCNConfig | FMConfig | LRConfig | MultiTaskConfig
_FunnelConfig = ClickedConfig | DivisionConfig | ESCM2Config | ESMMConfig | NISEConfig
ModelConfig = Annotated[_PerLabelConfig | _FunnelConfig | TwoTowerConfig, Field(discriminator="name")]
Model = AutoInt | Clicked | DCN | Division | ESCM2 | ESMM | FM | LR | MultiTask | NISE | TwoTower


def build_model(config: ModelConfig, schema: Schema, *, table_device: str = "cpu") -> Model:
    """An untrained model. With `table_device="meta"` its tables take no memory until they are sharded or loaded."""
    device = torch.device(table_device)
    match config:
        case AutoIntConfig():
            return AutoInt(config, schema, device)
        case ClickedConfig():
            return Clicked(config, schema, device)
        case DCNConfig():
            return DCN(config, schema, device)
        case DivisionConfig():
            return Division(config, schema, device)
        case ESCM2Config():
            return ESCM2(config, schema, device)
        case ESMMConfig():
            return ESMM(config, schema, device)
        case FMConfig():
            return FM(config, schema, device)
        case LRConfig():
            return LR(config, schema, device)
        case MultiTaskConfig():
            return MultiTask(config, schema, device)
        case NISEConfig():
            return NISE(config, schema, device)
        case TwoTowerConfig():
            return TwoTower(config, schema, device)
        case _:
            assert_never(config)
