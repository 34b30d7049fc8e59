"""A server of victims: it imports once, then forks a child for every order, which a test may have killed at any point.

Orders come as JSON lines [function below, its arguments, environment]; answers go as [exit status, output, result].
A child is forked before torch or Polars have run anything, since after that it would hang. Two variables arm it:

RECSYS_FAULT         the product's own fault points (base.faults)
KILL_BEFORE_CHANGE   n: killed just before the n-th change to the file system that Python itself makes
"""

import hashlib
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from base.storage import publish

CHANGES = {"os.rename", "os.symlink", "os.mkdir", "os.rmdir", "os.remove", "os.utime", "shutil.rmtree"}


def publish_files(target: str, files: dict[str, str]) -> None:
    """Overwrite `target` with these texts."""
    with publish(Path(target), "scores", overwrite=True, keep=1) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)
        staging.about["parts"] = len(files)


def train(config: str, folder: str) -> dict[str, Any]:
    """Train on what the run file has prepared; returns what must not depend on interruptions."""
    from base.config import load_config
    from base.storage import resolve
    from features.pipeline import FittedPipeline
    from pipelines.config import Run
    from pipelines.examples import examples_of
    from recsys import trainer
    from recsys.data import ExampleStream

    run = load_config(Run, Path(config))
    fitted = FittedPipeline.load(resolve(run.features_path))
    schema = fitted.schema(run.data.key, run.labels)
    fit, valid = (
        ExampleStream(
            tuple(examples_of(run, run.source.partitions(role), fitted)),
            schema,
            run.train.batch_size,
            shuffle=role == "train",
            seed=run.train.seed,
        )
        for role in ("train", "valid")
    )
    trained = trainer.train(run.model, schema, fit, valid, run.train, Path(folder), sparsity=run.sparsity)
    weights = {n: hashlib.sha256(w.numpy().tobytes()).hexdigest() for n, w in sorted(trained.weights.items())}
    return {"weights": weights, "history": trained.history, "resumed_at": trained.resumed_at}


def score(config: str, bundle: str, target: str, version: str, *, overwrite: bool, chunk: int = 1000) -> int:
    """Score the test day in parts of `chunk` rows; returns the rows."""
    return _score(config, bundle, target, version, overwrite=overwrite, chunk=chunk)


def recommend(config: str, bundle: str, k: int, chunk: int) -> None:
    """Recommend `k` items to the test users, in parts of `chunk` pairs, over what is there."""
    import pipelines.recommend
    import serving.recommend
    from base.config import load_config
    from pipelines.config import Run

    serving.recommend.CHUNK = chunk
    run = load_config(Run, Path(config), [f"recommend.k={k}"])
    pipelines.recommend.recommend(run, model=bundle, overwrite=True)


def race(config: str, bundle: str, target: str, versions: Sequence[str]) -> list[int]:
    """Scorers that have all begun before any finishes; returns their exit statuses."""
    context = get_context("fork")
    barrier = context.Barrier(len(versions))
    options = {"overwrite": False, "chunk": 10_000}
    processes = [
        context.Process(target=_race_one, args=(barrier, (config, bundle, target, version), options))
        for version in versions
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def program(code: str, arguments: list[str]) -> None:
    """A Python program, as `python -c` has it."""
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def command(arguments: list[str]) -> None:
    """The command line, in this process."""
    from pipelines.cli import main

    main(arguments)


def _score(
    config: str, bundle: str, target: str, version: str, *, overwrite: bool, chunk: int, on_rows: Any = None
) -> int:
    import serving.score
    from base.config import load_config
    from pipelines.config import Run
    from recsys.bundle import Bundle

    run = load_config(Run, Path(config))
    serving.score.CHUNK = chunk
    return serving.score.publish_scores(
        Bundle.load(Path(bundle)),
        run.source.raw(run.source.partitions("test")[0]),
        Path(target),
        key=run.data.key,
        model_version=version,
        overwrite=overwrite,
        on_rows=on_rows or (lambda done, total: None),
    )


def _race_one(barrier: Any, arguments: Sequence[str], options: dict[str, Any]) -> None:
    from base.errors import PublishedError

    try:
        _score(*arguments, **options, on_rows=lambda done, total: barrier.wait(60))
    except PublishedError as error:
        print(error, flush=True)
        sys.exit(3)


def _arm(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    last = int(environment.get("KILL_BEFORE_CHANGE", 0))
    passed = 0

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal passed
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or opened:
            passed += 1
            if passed == last:
                os.kill(os.getpid(), signal.SIGKILL)

    if last:
        sys.addaudithook(on_event)


def _child(order: str, output: int, result: int) -> None:
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        name, arguments, environment = json.loads(order)
        _arm(environment)
        returned = globals()[name](**arguments)
        os.write(result, json.dumps(returned).encode())
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Import the modules in the arguments, then serve orders until the input ends."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    if "numba" in sys.modules:  # what the first call of a compiled loop would load, in every child
        registry = importlib.import_module("numba.core.registry").cpu_target
        registry.typing_context.refresh()
        registry.target_context.refresh()
    folder = Path(os.environ["CHILDREN"])
    for order in sys.stdin:
        with (folder / "output").open("w+") as output, (folder / "result").open("w+") as result:
            child = os.fork()
            if child == 0:
                _child(order, output.fileno(), result.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            result.seek(0)
            answer = [status, output.read(), json.loads(result.read() or "null")]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
