"""Trains FuxiCTR's AutoInt on a folder that our own model trained on, and writes its scores as JSON.

It runs in an environment of its own, from the repository root:
    python3.11 -m venv .venv-peer
    .venv-peer/bin/python -m pip install torch==2.13.0 -c requirements.lock
    .venv-peer/bin/python -m pip install --no-deps -r bench/requirements-peer.txt
    .venv-peer/bin/python -m bench.fuxictr_peer --data FOLDER --seed 1 --out result.json

FOLDER holds train.parquet, valid.parquet, test.parquet (ids already encoded, 0 = unknown) and schema.json:
    {"label": "click", "dense": ["price"], "sparse": [{"name": "genres", "rows": 19, "multi": true}]}

FuxiCTR's embeddings, attention, losses, regularizers and training loop are used as they are. Its reader is
not: rows are sliced from memory, which is faster. The PyPI package leaves AutoInt itself out, so it is put
together here to the same equations (linear Q, K, V without bias; LayerNorm, if any, before the ReLU).
"""

# pyright: reportMissingImports=false
# FuxiCTR is not in the main environment, where the types are checked.
import argparse
import json
import logging
import math
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

# FuxiCTR's layers import its preprocessing, which imports Ray and h5py for work that is not done here.
for _name in ("fuxictr.preprocess", "fuxictr.preprocess.tokenizer"):
    sys.modules[_name] = ModuleType(_name)
vars(sys.modules["fuxictr.preprocess.tokenizer"])["load_pretrain_emb"] = None

import fuxictr  # noqa: E402
from fuxictr.features import FeatureMap  # noqa: E402
from fuxictr.pytorch import layers  # noqa: E402
from fuxictr.pytorch.models import BaseModel  # noqa: E402
from fuxictr.pytorch.torch_utils import seed_everything  # noqa: E402

LABEL = "label"
DEFAULTS: dict[str, int | float | bool] = {
    "epochs": 50,
    "batch-size": 4096,
    "learning-rate": 1e-3,
    "patience": 2,  # evaluations without a better AUC before it stops; each cuts the rate to a tenth
    "embedding-dim": 16,
    "attention-layers": 3,
    "heads": 2,
    "attention-dim": 64,  # of all heads together
    "dropout": 0.0,  # of the attention weights and the MLP
    "use-scale": False,
    "layer-norm": False,
    "residual": True,
    "wide": False,
    "batch-norm": False,  # in the MLP
}


class Interaction(nn.Module):
    """One self-attention layer over the fields, as FuxiCTR's AutoInt computes it."""

    def __init__(self, width_in: int, options: argparse.Namespace) -> None:
        super().__init__()
        width = options.attention_dim
        if width % options.heads:
            raise ValueError(f"--attention-dim {width} is not divisible by --heads {options.heads}")
        self.heads = options.heads
        self.scale = (width // options.heads) ** 0.5 if options.use_scale else None
        self.projections = nn.ModuleList(nn.Linear(width_in, width, bias=False) for _ in "qkv")
        self.attend = layers.ScaledDotProductAttention(options.dropout)
        self.residual: nn.Module | None = None
        if options.residual:
            self.residual = nn.Identity() if width_in == width else nn.Linear(width_in, width, bias=False)
        self.norm = nn.LayerNorm(width) if options.layer_norm else nn.Identity()

    def forward(self, fields: Tensor) -> Tensor:
        split = (layer(fields).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.projections)
        mixed, _ = self.attend(*split, scale=self.scale)
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.residual is not None:
            mixed = mixed + self.residual(fields)
        return self.norm(mixed).relu()


class AutoInt(BaseModel):
    """Interaction layers over the embeddings, with an MLP and a linear part beside them if asked for."""

    def __init__(self, feature_map: FeatureMap, options: argparse.Namespace, model_root: str) -> None:
        super().__init__(
            feature_map,
            model_id="autoint",
            early_stop_patience=options.patience,
            embedding_regularizer=options.embedding_regularizer or None,  # 0.0 would be computed, at a cost
            net_regularizer=options.net_regularizer or None,
            model_root=model_root,
            metrics=["AUC", "logloss"],
            verbose=0,
        )
        Path(self.model_dir).mkdir(parents=True, exist_ok=True)  # save_weights expects it to be there
        self.best_epoch = 0
        self.epoch_aucs: list[float] = []
        self.embedding = layers.FeatureEmbedding(feature_map, options.embedding_dim)
        widths = [options.embedding_dim] + [options.attention_dim] * (options.attention_layers - 1)
        self.interactions = nn.Sequential(*(Interaction(width, options) for width in widths))
        self.out = nn.Linear(feature_map.num_fields * options.attention_dim, 1)
        self.dnn: nn.Module | None = None
        if options.dnn:
            mlp = {"hidden_units": options.dnn, "output_dim": 1, "dropout_rates": options.dropout}
            self.dnn = layers.MLP_Block(feature_map.sum_emb_out_dim(), batch_norm=options.batch_norm, **mlp)
        self.wide = layers.LogisticRegression(feature_map, False) if options.wide else None
        self.compile("adam", "binary_crossentropy", options.learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        columns = self.get_inputs(inputs)
        fields = self.embedding(columns)
        logit = self.out(self.interactions(fields).flatten(1))
        if self.dnn is not None:
            logit = logit + self.dnn(fields.flatten(1))
        if self.wide is not None:
            logit = logit + self.wide(columns)
        return {"y_pred": self.output_activation(logit)}

    def checkpoint_and_earlystop(self, logs: dict[str, float], min_delta: float = 1e-6) -> None:
        """FuxiCTR's own rule; it only forgets which epoch it kept."""
        before = self._best_metric
        super().checkpoint_and_earlystop(logs, min_delta)
        self.epoch_aucs.append(float(logs["AUC"]))
        if self._best_metric != before:
            self.best_epoch = len(self.epoch_aucs)


class Batches:
    """Batches of one split from memory: shuffled as a whole before every pass if a seed is given."""

    def __init__(self, columns: dict[str, Tensor], size: int, seed: int | None = None) -> None:
        self.columns, self.size, self.rows = columns, size, len(columns[LABEL])
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(self.rows / self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.generator is None:
            parts = zip(*(column.split(self.size) for column in self.columns.values()), strict=True)
            yield from (dict(zip(self.columns, part, strict=True)) for part in parts)
            return
        for rows in torch.randperm(self.rows, generator=self.generator).split(self.size):
            yield {name: column[rows] for name, column in self.columns.items()}


def fields_of(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every column with FuxiCTR's description of it."""
    fields: list[tuple[str, dict[str, Any]]] = [(name, {"type": "numeric"}) for name in schema["dense"]]
    for column in schema["sparse"]:
        if column["multi"]:  # row 0 must stay free: FuxiCTR pads with it and keeps its vector at zero
            pooled = {"padding_idx": 0, "feature_encoder": "layers.MaskedAveragePooling()"}
            fields.append((column["name"], {"type": "sequence", "vocab_size": column["rows"] + 1, **pooled}))
        else:
            fields.append((column["name"], {"type": "categorical", "vocab_size": column["rows"]}))
    return fields


def feature_map_of(schema: dict[str, Any], embedding_dim: int) -> FeatureMap:
    # Numbered names, because FuxiCTR keys an nn.ModuleDict by them: "type" or "a.b" would be refused.
    feature_map = FeatureMap("peer", "")
    feature_map.features = OrderedDict((f"f{i}", spec) for i, (_, spec) in enumerate(fields_of(schema)))
    feature_map.labels = [LABEL]
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.default_emb_dim = embedding_dim
    return feature_map


def load(file: Path, schema: dict[str, Any]) -> dict[str, Tensor]:
    """One split as tensors: int64 ids, float32 numbers, lists padded with 0 after a shift by one."""
    frame = pl.read_parquet(file)
    columns = {LABEL: torch.from_numpy(frame[schema["label"]].cast(pl.Float32).to_numpy(writable=True))}
    for i, (name, spec) in enumerate(fields_of(schema)):
        if frame[name].null_count():
            raise ValueError(f"{file.name}: column {name!r} holds nulls")
        if spec["type"] == "sequence":
            longest = max(frame[name].list.len().to_list(), default=0) or 1
            places = [pl.col(name).list.get(j, null_on_oob=True).alias(str(j)) + 1 for j in range(longest)]
            values = frame.select(places).fill_null(0).cast(pl.Int64).to_numpy(writable=True)
        else:
            kind = pl.Float32 if spec["type"] == "numeric" else pl.Int64
            values = frame[name].cast(kind).to_numpy(writable=True)
        columns[f"f{i}"] = torch.from_numpy(values)
    return columns


def score(model: AutoInt, batches: Batches) -> dict[str, float]:
    truth, predicted = batches.columns[LABEL].numpy(), model.predict(batches)
    return {"auc": float(roc_auc_score(truth, predicted)), "logloss": float(log_loss(truth, predicted))}


def regularizer(text: str) -> float | str:
    """0.01 or FuxiCTR's l1(x), l2(x), l1_l2(x,y); it ignores an int, so numbers become floats."""
    return text if text.startswith("l") else float(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train FuxiCTR's AutoInt on an encoded folder.")
    for name, kind in (("data", Path), ("out", Path), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name, default in DEFAULTS.items():
        how: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name}", default=default, **how)
    for name in ("embedding-regularizer", "net-regularizer"):
        parser.add_argument(f"--{name}", type=regularizer, default=0.0)
    parser.add_argument("--dnn", type=lambda text: [int(x) for x in text.split(",") if x], default=[])
    return parser.parse_args()


def main() -> None:
    options = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    schema = json.loads((options.data / "schema.json").read_text())
    splits = {part: load(options.data / f"{part}.parquet", schema) for part in ("train", "valid", "test")}
    held = {part: Batches(splits[part], options.batch_size) for part in ("valid", "test")}
    seed_everything(options.seed)
    batches = Batches(splits["train"], options.batch_size, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = AutoInt(feature_map_of(schema, options.embedding_dim), options, folder)
        start = time.perf_counter()
        model.fit(batches, epochs=options.epochs, validation_data=held["valid"])  # ends on the best weights
        seconds = time.perf_counter() - start
    config = {key: value for key, value in vars(options).items() if key not in ("data", "out", "seed")}
    result = {
        "peer": "fuxictr",
        "version": fuxictr.__version__,
        "seed": options.seed,
        "config": config,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "best_epoch": model.best_epoch,
        "epochs_run": len(model.epoch_aucs),
        "valid_auc_by_epoch": model.epoch_aucs,
        **{part: score(model, rows) for part, rows in held.items()},
        "train_seconds": round(seconds, 3),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
