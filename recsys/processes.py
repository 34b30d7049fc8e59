"""Training on several processes of this machine: torchrun starts them, this process waits and takes the outcome.

Three kinds of process: the caller; torchrun, which it starts; the ranks, which torchrun starts and which train. Each
dies with the one that started it. They are told what to do by an artefact in the training folder, and tell what happens
by lines of JSON on standard output, which all inherit.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from base.config import Config
from base.errors import FULL, ConfigError, SetupError, UserError
from base.process import keep_memory
from base.storage import dump_json, publish, resolve
from features.schema import NewRows, Schema
from recsys import checkpoint, trainer
from recsys.checkpoint import WarmStart
from recsys.contrast.corpus import Corpus
from recsys.contrast.task import require_trainable
from recsys.data import ExampleStream
from recsys.device import CPU, denormals_flushed
from recsys.models import ModelConfig
from recsys.retrieval import Ranking
from recsys.sparsity.config import Sparsity
from recsys.tensors import load_tensors, save_tensors
from recsys.trainer import Pace, Progress, TrainConfig, Trained

_MARK = "\x1e"
"""Begins a line that is a message, as in RFC 7464."""

_PER_CORE = 4
"""Processes that a core can be asked for: more than one is slower, and a thousand never begin."""

_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


class Job(Config):
    """The arguments of `trainer.learn`, as they are handed to other processes."""

    model: ModelConfig
    contract: Schema
    fit: ExampleStream
    valid: ExampleStream | Ranking | None
    train: TrainConfig
    folder: Path
    device: str
    identity: str
    warm: "Warm | None"


class Warm(Config):
    """A WarmStart; its fresh rows lie beside the job as tensors."""

    folder: Path
    new_rows: NewRows
    accumulator_decay: float


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
    """`trainer.train` on as many processes as `config` says.

    If one of them fails or is killed all end; what was published stays, and the next call goes on from there. Raises
    what that one would have raised, or SetupError naming it.
    """
    if config.processes == 1:
        arguments = (model_config, schema, fit, valid, config, folder)
        options: Any = {"device": device, "identity": identity, "warm": warm, "sparsity": sparsity}
        return trainer.train(*arguments, **options, item_counts=item_counts, corpus=corpus, on_step=on_step)
    if corpus is not None:
        require_trainable(model_config, config.processes)
    if sparsity is not None:
        raise ConfigError(
            f"train.processes = {config.processes}: sparse tables are trained by one process; set it to 1, or leave "
            "[sparsity] out"
        )
    if device.type == "cuda" and torch.cuda.device_count() < config.processes:
        raise SetupError(
            f"train.processes = {config.processes}: torch sees {torch.cuda.device_count()} CUDA devices, and each "
            "process needs one; use so many processes, or device = 'cpu'"
        )
    most = _PER_CORE * len(os.sched_getaffinity(0))
    if config.processes > most:
        raise SetupError(
            f"train.processes = {config.processes}: this machine has {most // _PER_CORE} cores for them; use at most "
            f"{most}"
        )
    run = trainer.run_hash(model_config, schema, config, identity)
    at = checkpoint.position_of(folder)
    if at is not None and at.run == run and at.finished:
        return trainer.outcome(folder, Pace(0.0, at.step))
    job = Job(
        model=model_config,
        contract=schema,
        fit=fit,
        valid=valid,
        train=config,
        folder=folder.absolute(),
        device=device.type,
        identity=identity,
        warm=None if warm is None else _plain(warm),
    )
    with publish(folder / "job", "job", overwrite=True, keep=1) as staging:
        (staging / "job.json").write_bytes(dump_json(job.model_dump(mode="json")))
        save_tensors(staging, "fresh", {} if warm is None else {n: torch.tensor(r) for n, r in warm.fresh.items()})
        if item_counts is not None:
            save_tensors(staging, "item_counts", {"counts": torch.from_numpy(item_counts)})
    return trainer.outcome(folder, _run(resolve(folder / "job", "job"), config, on_step))


def _plain(warm: WarmStart) -> Warm:
    return Warm(folder=warm.folder.absolute(), new_rows=warm.new_rows, accumulator_decay=warm.accumulator_decay)


def _run(job: Path, config: TrainConfig, on_step: Callable[[Progress], None]) -> Pace:
    """Start torchrun and listen until all its processes have ended."""
    cores = str(config.threads or max(1, len(os.sched_getaffinity(0)) // config.processes))
    environment = {
        "POLARS_MAX_THREADS": cores,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "OMP_NUM_THREADS": cores,
    }
    failures: list[dict[str, Any]] = []
    exits: dict[str, int] = {}
    pace: Pace | None = None
    with tempfile.TemporaryDirectory() as logs, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "recsys.processes", "torchrun", job, os.getpid(), config.processes, logs]
        with subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # an interrupt from the keyboard reaches us alone
        ) as torchrun:
            assert torchrun.stdout
            try:
                for line in torchrun.stdout:
                    match json.loads(line[1:]) if line.startswith(_MARK) else line:
                        case {"progress": progress}:
                            on_step(Progress(**progress))
                        case {"failure": failure}:
                            failures.append(failure)
                        case {"exits": exits}:
                            pass
                        case {"pace": found}:
                            pace = Pace(**found)
                        case other:
                            print(other, end="", file=sys.stderr)
            finally:
                torchrun.kill()
                torchrun.stdout.read()  # until the ranks, which die with it, have let go of it
        if pace is None or torchrun.returncode:
            errors.seek(0)
            raise _failure(failures, exits, config.processes, errors.read())
    return pace


def _failure(failures: list[dict[str, Any]], exits: dict[str, int], processes: int, errors: str) -> Exception:
    """What to tell the user: what a rank says of itself, or how it ended. The others fail because one has."""
    again = "run again: training goes on from its last checkpoint"
    for failure in failures:
        if failure["user"]:
            return UserError(failure["text"])
        if failure["errno"] in FULL:
            return OSError(failure["errno"], failure["text"], failure["path"])
    for rank, status in sorted(exits.items(), key=lambda item: item[1] == -signal.SIGTERM):
        if status < 0:
            name = signal.Signals(-status).name
            memory = " (the system does so when memory runs out)" if name == "SIGKILL" else ""
            return SetupError(f"process {rank} of {processes} was killed by {name}{memory}; {again}")
    if failures:
        trace = failures[0]["trace"]
        print(trace, end="", file=sys.stderr)
        return SetupError(
            f"process {failures[0]['rank']} of {processes} failed: {trace.strip().splitlines()[-1]}; {again}"
        )
    last = errors.strip().splitlines()[-1:] or ["it said nothing"]
    return SetupError(f"{processes} training processes could not be started or ended: {last[0]}; {again}")


def _tell(**message: Any) -> None:
    """One message to the caller. Shorter than PIPE_BUF it stays in one piece, whoever else writes."""
    os.write(1, f"{_MARK}{json.dumps(message)}\n".encode())


def _die_with(parent: int) -> None:
    """Be killed as soon as `parent`, which started this process, ends, for whatever reason."""
    CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _torchrun(job: str, parent: str, processes: str, logs: str) -> None:
    """What `torchrun --standalone` does; how its processes ended is told as a message."""
    _die_with(int(parent))
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}", f"--log-dir={logs}"]
    try:
        run(parse_args([*options, "-m", "recsys.processes", "rank", job, str(os.getpid())]))
    except ChildFailedError as error:
        _tell(exits={rank: failure.exitcode for rank, failure in error.failures.items()})
        sys.exit(1)


def _rank(job: str, parent: str) -> None:
    """Train, as one of several."""
    _die_with(int(parent))
    rank = int(os.environ["RANK"])
    try:
        pace = _learn(Path(job), rank)
    except Exception as error:
        number, path = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
        text = (str(error) if number is None else os.strerror(number))[:1000]
        trace = "".join(traceback.format_exception(error))[-2000:]
        user = isinstance(error, UserError)
        _tell(failure={"rank": rank, "user": user, "text": text, "errno": number, "path": path, "trace": trace})
        sys.exit(1)
    if rank == 0:
        _tell(pace=asdict(pace))
    dist.destroy_process_group()


def _learn(path: Path, rank: int) -> Pace:
    job = Job.model_validate_json((path / "job.json").read_bytes())
    device = torch.device(job.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    warm = None
    if job.warm is not None:
        fresh = {name: rows_K.numpy() for name, rows_K in load_tensors(path / "fresh").items()}
        warm = WarmStart(job.warm.folder, fresh, job.warm.new_rows, job.warm.accumulator_decay)
    with denormals_flushed(own_process=True):
        return trainer.learn(
            job.model,
            job.contract,
            job.fit,
            job.valid,
            job.train,
            job.folder,
            device=device,
            identity=job.identity,
            warm=warm,
            item_counts=load_tensors(path / "item_counts")["counts"].numpy()
            if (path / "item_counts").is_dir()
            else None,
            on_step=(lambda progress: _tell(progress=asdict(progress))) if rank == 0 else lambda _: None,
        )


if __name__ == "__main__":
    keep_memory()
    {"torchrun": _torchrun, "rank": _rank}[sys.argv[1]](*sys.argv[2:])
