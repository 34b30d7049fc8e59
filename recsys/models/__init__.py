"""The models. Add one: write its file, add its config to `ModelConfig`, add its case to `build_model`."""

from typing import Annotated, assert_never

import torch
from pydantic import Field

from features.schema import Schema
from recsys.models.autoint import AutoInt, AutoIntConfig
from recsys.models.dcn import DCN, DCNConfig
from recsys.models.fm import FM, FMConfig
from recsys.models.lr import LR, LRConfig

ModelConfig = Annotated[AutoIntConfig | DCNConfig | FMConfig | LRConfig, Field(discriminator="name")]
Model = AutoInt | DCN | FM | LR


def build_model(config: ModelConfig, schema: Schema, *, table_device: str = "cpu") -> Model:
    """An untrained model. With `table_device="meta"` its tables take no memory until they are sharded or loaded."""
    device = torch.device(table_device)
    match config:
        case AutoIntConfig():
            return AutoInt(config, schema, device)
        case DCNConfig():
            return DCN(config, schema, device)
        case FMConfig():
            return FM(config, schema, device)
        case LRConfig():
            return LR(config, schema, device)
        case _:
            assert_never(config)
