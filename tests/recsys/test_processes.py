"""Two processes train as one does: the same batches, losses, updates and files."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from base.errors import ConfigError, DataError, SetupError, UserError
from base.storage import resolve
from features.schema import Schema, Sparse
from recsys import checkpoint, processes, trainer
from recsys.checkpoint import WarmStart
from recsys.device import CPU
from recsys.distributed import shard
from recsys.models import LRConfig, ModelConfig, build_model
from recsys.tensors import load_tensors
from recsys.trainer import TrainConfig, run_hash
from tests.recsys.conftest import Examples
from tests.recsys.ranks import (
    SCHEMAS,
    config_of,
    published_again,
    started_from,
    streams,
    trained,
    write_examples,
)

TOWER = {"kind": "mlp", "hidden": [8]}
AUTOINT = {"name": "autoint", "dim": 4, "layers": 1, "heads": 1, "attention_dim": 4}
EXPERTS = {"gate": "softmax", "count": 3, "hidden": [8]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "lr": ("plain", {"name": "lr"}),
    "autoint": ("plain", AUTOINT),
    "mmoe": ("two", {"name": "multitask", "dim": 4, "tower": TOWER, "experts": EXPERTS}),
    "esmm": ("funnel", {"name": "esmm", "dim": 4, "tower": TOWER, "shared_embeddings": False}),
    "escm2": ("funnel", {"name": "escm2", "dim": 4, "tower": TOWER, "risk": "dr"}),
    "nise": ("funnel", {"name": "nise", "dim": 4, "tower": TOWER}),
    "two_tower": ("items", {"name": "two_tower", "dim": 4, "query": ["type", "tags"], "item": ["word", "genres"]}),
}
DROPPING = AUTOINT | {"embedding_dropout": 0.3}
TOLERANCE = 1e-5
"""Weights after 25 to 30 steps: seen 8e-7. A tenth of it for losses and metrics: seen 1.2e-7, the last bit."""
PAIR = 3e-5
"""An AUC counts pairs: one of these some 36,000 may be so near a tie that the last bit turns it."""


@dataclass(frozen=True)
class Ran:
    """What two ranks have made of the orders below."""

    root: Path
    resumed_at: dict[str, int]
    places: dict[str, int]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("ranks")
    write_examples(root)
    for name, (kind, model) in MODELS.items():
        trained(str(root), str(root / "one" / name), kind, model)
    kind, esmm = MODELS["esmm"]
    trained(str(root), str(root / "one-two"), kind, esmm, stop_at=8, checkpoint_every=5)
    published_again(str(root / "one-two"), str(root / "one-two-one"), kind, esmm)
    state = str(state_of(root / "one/esmm"))

    def order(folder: str, kind: str, model: dict[str, Any], **settings: Any) -> tuple[str, dict[str, Any]]:
        return "trained", {"root": str(root), "folder": str(root / folder), "kind": kind, "model": model, **settings}

    def again(folder: str, target: str) -> tuple[str, dict[str, Any]]:
        paths = {"folder": str(root / folder), "again": str(root / target)}
        return "published_again", {**paths, "kind": kind, "model": esmm}

    def start(rule: str) -> tuple[str, dict[str, Any]]:
        paths = {"state": state, "folder": str(root / f"two-{rule}")}
        return "started_from", {**paths, "kind": kind, "model": esmm, "rule": rule}

    orders = {
        **{name: order(f"two/{name}", *model) for name, model in MODELS.items()},
        "odd": order("two/odd", *MODELS["autoint"], batch_size=67, epochs=1),
        "whole": order("whole", "plain", DROPPING, checkpoint_every=5),
        "stopped": order("resumed", "plain", DROPPING, checkpoint_every=5, stop_at=8),
        "resumed": order("resumed", "plain", DROPPING, checkpoint_every=5),
        "places": again("one-two", "one-two-two"),
        "one-two": order("one-two", kind, esmm),
        "two-one": order("two-one", kind, esmm, stop_at=8, checkpoint_every=5),
        "two-one again": again("two-one", "two-one-two"),
        "mean": start("mean"),
        "hash": start("hash"),
    }
    path = root / "orders"
    path.write_text(json.dumps(list(orders.values())))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    ended = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "-m", "tests.recsys.ranks", str(path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    results = dict(zip(orders, json.loads(path.with_suffix(".results").read_text()), strict=True))
    return Ran(root, {n: r for n, r in results.items() if isinstance(r, int)}, results["places"])


def state_of(folder: Path) -> Path:
    """The best weights that a training has left."""
    best = checkpoint.stands_at(folder).best
    assert best is not None
    return checkpoint.best_of(folder, best)


def check_close(one: Path, two: Path) -> None:
    """The last and the best weights and table states of two trainings, and what was measured, are the same."""
    for a, b in ((state_of(one), state_of(two)), (resolve(one / "checkpoint"), resolve(two / "checkpoint"))):
        for part in ("weights", "table_states", "dense_states"):
            first, second = load_tensors(a / part), load_tensors(b / part)
            assert first.keys() == second.keys()
            for name in first:
                torch.testing.assert_close(second[name], first[name], rtol=0, atol=TOLERANCE, msg=f"{part} {name}")
    there, here = checkpoint.stands_at(one), checkpoint.stands_at(two)
    assert (here.step, here.best_epoch, here.run) == (there.step, there.best_epoch, there.run)
    for first, second in zip(there.history, here.history, strict=True):
        ranks = {name: value for name, value in first.items() if name.endswith(".auc")}
        assert {name: second[name] for name in ranks} == pytest.approx(ranks, abs=PAIR)
        rest = {name: value for name, value in second.items() if name not in ranks}
        assert rest == pytest.approx({n: v for n, v in first.items() if n not in ranks}, abs=TOLERANCE / 10)
    assert [y for _, y in here.curve] == pytest.approx([y for _, y in there.curve], abs=TOLERANCE / 10)


# --- two as one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_as_one(name: str, ran: Ran) -> None:
    """Also where the loss is a mean over the clicked or the labelled rows of a batch, or a ratio of such means.

    Or where the negatives are the others of the whole batch, corrected for by their counts.
    """
    check_close(ran.root / "one" / name, ran.root / "two" / name)
    position = checkpoint.stands_at(ran.root / "two" / name)
    assert position.step >= 25
    assert position.history[-1]["train_loss"] != pytest.approx(position.history[0]["train_loss"], abs=1e-3)


def test_both_have_tables(ran: Ran) -> None:
    assert set(ran.places.values()) == {0, 1}
    assert len(ran.places) == 2 * len(SCHEMAS["funnel"].sparse)


def test_a_batch_need_not_divide(ran: Ran) -> None:
    kind, model = MODELS["autoint"]
    trained(str(ran.root), str(ran.root / "one/odd"), kind, model, batch_size=67, epochs=1)
    check_close(ran.root / "one/odd", ran.root / "two/odd")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_two_resume_as_if_never_interrupted(ran: Ran) -> None:
    """With dropout, to the bit: the files and the position in them have the same hash."""
    assert ran.resumed_at["whole"] == 0
    assert ran.resumed_at["resumed"] == 5
    assert resolve(ran.root / "whole/checkpoint").name == resolve(ran.root / "resumed/checkpoint").name
    assert state_of(ran.root / "whole").name == state_of(ran.root / "resumed").name


@pytest.mark.parametrize("way", ["one-two", "two-one"])
def test_a_checkpoint_of_one_number_is_read_by_another_to_the_bit(way: str, ran: Ran) -> None:
    """Restored by one process or by two, and published again, its files have the same hash."""
    if way == "two-one":
        published_again(str(ran.root / "two-one"), str(ran.root / "two-one-one"), *MODELS["esmm"])
    versions = {resolve(ran.root / f"{way}-{by}" / "best").name for by in ("one", "two")}
    assert len(versions) == 1


def test_one_begins_and_two_go_on(ran: Ran) -> None:
    assert ran.resumed_at["one-two"] == 5
    check_close(ran.root / "one/esmm", ran.root / "one-two")


def test_two_begin_and_one_goes_on(ran: Ran) -> None:
    assert trained(str(ran.root), str(ran.root / "two-one"), *MODELS["esmm"]) == 5
    check_close(ran.root / "one/esmm", ran.root / "two-one")


@pytest.mark.parametrize("rule", ["mean", "hash"])
def test_a_warm_start_is_the_same(rule: str, ran: Ran) -> None:
    """To the bit: carried rows, new rows, states."""
    started_from(str(state_of(ran.root / "one/esmm")), str(ran.root / f"one-{rule}"), *MODELS["esmm"], rule)
    assert resolve(ran.root / f"one-{rule}" / "best").name == resolve(ran.root / f"two-{rule}" / "best").name


def test_the_number_of_processes_is_free_to_change() -> None:
    one, two = (run_hash(LRConfig(), SCHEMAS["plain"], TrainConfig(processes=n), "") for n in (1, 2))
    assert one == two


def test_the_ranks_are_told_what_the_caller_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, settings and a warm start travel through a file and come out equal."""
    write_examples(tmp_path)
    fit, valid = streams(tmp_path, "funnel", 100)
    schema, config = SCHEMAS["funnel"], config_of(processes=2, table_learning_rate=0.1 + 0.2)
    model = TypeAdapter(ModelConfig).validate_python(MODELS["esmm"][1])
    warm = WarmStart(tmp_path / "state", {"word": np.array([3, 5]), "only": np.array([], np.int64)}, "hash", 0.7)
    told: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(trainer, "learn", lambda *arguments, **options: told.append((arguments, options)))
    monkeypatch.setattr(trainer, "outcome", lambda folder, pace: None)
    monkeypatch.setattr(processes, "_run", lambda job, config, on_step: processes._learn(job, 0))
    processes.train(model, schema, fit, valid, config, tmp_path / "state", identity="monday", warm=warm)
    processes.train(model, schema, fit, None, config, tmp_path / "state")
    assert told[0][0] == (model, schema, fit, valid, config, tmp_path / "state")
    assert told[1][0] == (model, schema, fit, None, config, tmp_path / "state")
    first, second = (options for _, options in told)
    assert (first["identity"], first["device"]) == ("monday", CPU)
    assert (second["identity"], second["warm"]) == ("", None)
    found = first["warm"]
    assert (found.folder, found.new_rows, found.accumulator_decay) == (warm.folder, "hash", 0.7)
    assert {n: r.tolist() for n, r in found.fresh.items()} == {"word": [3, 5], "only": []}
    assert all(rows.dtype == np.int64 for rows in found.fresh.values())


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_more_processes_than_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Examples.schema()
    model = build_model(LRConfig(), schema, table_device="meta")
    monkeypatch.setattr(dist, "get_world_size", lambda: 7)
    with pytest.raises(ConfigError, match=r"train\.processes = 7: .* there are 6 tables; use at most 6"):
        shard(model, CPU, {"lr": 0.1}, batch_size=10)


def test_tables_that_fit_nowhere_are_refused() -> None:
    schema = Schema(keys=(), dense=(), sparse=(Sparse(name="a", rows=2**34),), labels=("click",))
    model = build_model(LRConfig(), schema, table_device="meta")
    with pytest.raises(SetupError, match="1 tables on 1 processes: the planner found no place for them"):
        shard(model, CPU, {"lr": 0.1}, batch_size=10)


def test_training_asks_for_the_group_it_needs(tmp_path: Path) -> None:
    write_examples(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.processes = 2: this process group has 1"):
        trained(str(tmp_path), str(tmp_path / "state"), "plain", {"name": "lr"}, processes=2)


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    data = streams(tmp_path, "plain", 100)
    with pytest.raises(SetupError, match=r"train\.processes = 2: torch sees 1 CUDA devices"):
        processes.train(
            LRConfig(), SCHEMAS["plain"], *data, config_of(processes=2), tmp_path, device=torch.device("cuda")
        )


def test_more_processes_than_cores_can_carry_are_refused(tmp_path: Path) -> None:
    write_examples(tmp_path)
    data = streams(tmp_path, "plain", 100)
    with pytest.raises(SetupError, match=r"train\.processes = 10000: this machine has \d+ cores for them; use at most"):
        processes.train(LRConfig(), SCHEMAS["plain"], *data, config_of(processes=10_000), tmp_path / "state")
    assert not (tmp_path / "state").exists()


# --- what a failure says ----------------------------------------------------------------------------------------------

TRACE = "Traceback (most recent call last):\n  ...\nValueError: no such thing\n"
USER = {"rank": 0, "user": True, "text": "the loss became nan", "errno": None, "path": None, "trace": TRACE}
BUG = USER | {"rank": 1, "user": False, "text": "no such thing"}
LOST = USER | {"user": False, "text": "Connection closed by peer"}
RESET = LOST | {"errno": errno.ECONNRESET}
FULL = LOST | {"text": "No space left on device", "errno": errno.ENOSPC, "path": "/out/checkpoint"}


@pytest.mark.parametrize(("failures", "exits", "kind", "text"), [
    ([USER, USER], {"0": 1, "1": 1}, UserError, r"^the loss became nan$"),
    ([LOST], {"0": 1, "1": -9}, SetupError, r"process 1 of 2 was killed by SIGKILL \(.* memory .*\); run again: "),
    ([RESET], {"0": 1, "1": -11}, SetupError, r"process 1 of 2 was killed by SIGSEGV; run again: "),
    ([], {"0": -15, "1": -9}, SetupError, r"process 1 of 2 was killed by SIGKILL"),
    ([], {"0": -15}, SetupError, r"process 0 of 2 was killed by SIGTERM; run again"),
    ([BUG, LOST], {"0": 1, "1": 1}, SetupError, r"process 1 of 2 failed: ValueError: no such thing; run again"),
    ([FULL], {"0": 1}, OSError, r"\[Errno 28\] No space left on device: '/out/checkpoint'"),
    ([], {}, SetupError, r"2 training processes could not be started or ended: No module named torch; run again"),
])  # fmt: skip
def test_a_failure_names_the_process_that_began_it(
    failures: list[dict[str, Any]], exits: dict[str, int], kind: type[Exception], text: str
) -> None:
    error = processes._failure(failures, exits, 2, "Trying\nNo module named torch\n")
    with pytest.raises(kind, match=text):
        raise error


def test_a_process_reports_what_went_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, rank: int) -> None:
        raise errors[rank]

    errors = [DataError("rows are missing" + 5000 * "!"), OSError(errno.ENOSPC, "No space left on device", "/out")]
    monkeypatch.setattr(processes, "_learn", failing)
    monkeypatch.setattr(processes, "_die_with", lambda parent: None)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit):
            processes._rank(str(tmp_path), "1")
    lines = capfd.readouterr().out.strip("\x1e").split("\x1e")
    assert max(map(len, lines)) < 4096
    messages = [json.loads(line)["failure"] for line in lines]
    told = [processes._failure([message], {}, 2, "") for message in messages]
    assert isinstance(told[0], UserError)
    assert str(told[0]).startswith("rows are missing!")
    assert isinstance(told[1], OSError)
    assert (told[1].errno, told[1].filename) == (errno.ENOSPC, "/out")
