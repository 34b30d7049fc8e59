"""A small platform: three days of the synthetic log, prepared; a model of it trained without any interruption."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from base.config import load_config
from base.storage import resolve
from features.pipeline import FittedPipeline
from features.readers.synthetic import SyntheticConfig
from pipelines.config import Run
from pipelines.generate import generate
from pipelines.prepare import prepare
from recsys import checkpoint
from recsys.bundle import Bundle, golden_rows, load_model
from recsys.tensors import load_tensors

ROWS = 3000
RUN_FILE = """
output = "{output}"

[data]
path = "{logs}/day=*/*.parquet"
key = ["impression_id"]
labels = ["click"]
time = "day"
split = {{ train = "2026-03-01", valid = "2026-03-02", test = "2026-03-03" }}

[[features]]
kind = "vocabulary"
column = "user_id"

[[features]]
kind = "vocabulary"
column = "tags"
multi = true

[[features]]
kind = "hash"
column = "item_id"
buckets = 500

[[features]]
kind = "quantiles"
column = "age"
buckets = 5

[[features]]
kind = "log"
column = "price"

[model]
name = "autoint"
dim = 8
layers = 1
heads = 1
attention_dim = 8

[train]
batch_size = 512
epochs = 2
learning_rate = 0.001
table_learning_rate = 0.02
checkpoint_every = 2
threads = 1
"""


@dataclass(frozen=True)
class Answer:
    """How a child ended."""

    status: int
    """Exit status; negative the signal that killed it."""
    output: str
    result: Any


Order = Callable[..., Answer]


@dataclass(frozen=True)
class Platform:
    """Where everything lies."""

    config: Path
    logs: Path
    run: Run
    mlflow: str
    """A database for all: making one takes seconds."""

    def at(self, output: Path, **settings: str) -> Run:
        """The run with another output folder, and overrides with __ for the dots."""
        overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        return load_config(Run, self.config, [f"output='{output}'", f"mlflow.uri='{self.mlflow}'", *overrides])


@contextmanager
def children(folder: Path, modules: Sequence[str], environment: Mapping[str, str] = os.environ) -> Iterator[Order]:
    """A process that has imported these, and forks another for every order."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("children.py"))]
    with subprocess.Popen(
        [*command, *modules],
        env={**environment, "CHILDREN": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdin
        assert server.stdout
        orders, answers = server.stdin, server.stdout

        def order(function: str, environment: Mapping[str, str] = {}, /, **arguments: Any) -> Answer:
            plain = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
            print(json.dumps([function, plain, environment]), file=orders, flush=True)
            return Answer(*json.loads(answers.readline()))

        yield order
        orders.close()


@pytest.fixture(scope="session")
def order(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Order]:
    """Calls a function of children.py in a process of its own: order("train", {"FAULT": ...}, folder=...)."""
    modules = ["pipelines.config", "pipelines.prepare", "pipelines.score", "recsys.trainer", "torch.distributed.optim"]
    with children(tmp_path_factory.mktemp("children"), modules) as order:
        yield order


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """A prepared run. Leave it as it is; write elsewhere, with `at`."""
    root = tmp_path_factory.mktemp("platform")
    logs, config = root / "logs", root / "run.toml"
    config.write_text(RUN_FILE.format(output=root / "out", logs=logs))
    run = load_config(Run, config)
    days = [date(2026, 3, day) for day in (1, 2, 3)]
    generate(SyntheticConfig(rows_per_day=ROWS, users=400, items=300), days, logs, say=lambda _: None)
    prepare(run, say=lambda _: None)
    return Platform(config, logs, run, f"sqlite:///{root / 'mlflow.db'}")


@pytest.fixture(scope="session")
def uninterrupted(platform: Platform, order: Order, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """The training folder of a run that nothing happened to, and its outcome."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    answer = order("train", config=platform.config, folder=folder)
    assert answer.status == 0, answer.output
    return folder, answer


@pytest.fixture(scope="session")
def bundle_path(
    platform: Platform, uninterrupted: tuple[Path, Answer], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The published Bundle of that run."""
    run, folder = platform.run, uninterrupted[0]
    fitted = FittedPipeline.load(resolve(run.features_path))
    schema = fitted.schema(run.data.key, run.labels)
    position = checkpoint.position_of(folder)
    assert position
    assert position.best
    model = load_model(
        run.model, schema, load_tensors(checkpoint.best_of(folder, position.best) / "weights"), where=folder
    )
    raw = run.source.raw("day=2026-03-02").head(64).collect()
    parts = {"model": model, "model_config": run.model, "features": fitted, "schema": schema}
    about = {"settings": run.model_dump(mode="json"), "metrics": {"best_epoch": 1}}
    plain = Bundle(**parts, **about, golden=raw.clear())
    target = tmp_path_factory.mktemp("bundle") / "bundle"
    Bundle(**parts, **about, golden=golden_rows(plain, raw)).save(target)
    return target
