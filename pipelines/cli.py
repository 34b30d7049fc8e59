"""recsys: the command line. Each verb reads one run file; imports stay inside, so that `--help` is quick."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from base.config import load_config
from base.errors import UserError

if TYPE_CHECKING:
    from pipelines.config import Run

NOT_PROMOTED = 99
"""Exit status of `promote` when the gate refuses; Airflow shows it as skipped, not failed."""


@click.group()
@click.version_option(package_name="recsys")
def main() -> None:
    """Features, training, promotion and scoring of click models, each from one TOML file."""


def verb(function: Callable[..., None]) -> click.Command:
    """A command over a run file: --config and --set become a Run; errors become one line and exit status 2."""

    @wraps(function)
    def call(config: Path, settings: tuple[str, ...], **options: Any) -> None:
        with _reported():
            from pipelines.config import Run

            function(load_config(Run, config, settings), **options)

    config = click.option("--config", type=click.Path(path_type=Path), required=True, help="The run file (TOML).")
    settings = click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override, e.g. train.epochs=1."
    )
    return main.command()(config(settings(call)))


partition_option = click.option("--partition", help="e.g. day=2026-03-07; by default the test rows of the split.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is published there.")


@verb
@overwrite_option
def prepare(run: "Run", overwrite: bool) -> None:
    """Fit the features, write the examples of training and validation."""
    from pipelines.prepare import prepare

    prepare(run, overwrite=overwrite)


@verb
def train(run: "Run") -> None:
    """Train, register as challenger. Killed, it goes on from its last checkpoint."""
    from pipelines.progress import Ticker
    from pipelines.train import train

    ticker = Ticker(run.name or run.model.name)
    train(run, on_step=ticker.on_step)
    ticker.close()


@verb
@partition_option
def evaluate(run: "Run", partition: str | None) -> None:
    """Measure the trained model on held-out raw rows."""
    from pipelines.evaluate import evaluate
    from pipelines.text import metrics_table

    click.echo(metrics_table(evaluate(run, partition=partition)))


@verb
@partition_option
@click.option("--version", help="Of the registered model; by default the challenger.")
def promote(run: "Run", partition: str | None, version: str | None) -> None:
    """Compare challenger and champion; move the alias if the gate allows. Exit status 99 if it does not."""
    from pipelines.promote import promote

    verdict = promote(run, version=version, partition=partition)
    click.echo("promoted" if verdict.promoted else "not promoted")
    for reason in verdict.reasons:
        click.echo(f"  {reason}")
    if not verdict.promoted:
        sys.exit(NOT_PROMOTED)


@verb
@partition_option
@overwrite_option
@click.option(
    "--model", default="champion", show_default=True, help="An alias, a version number, or a bundle's folder."
)
def score(run: "Run", partition: str | None, overwrite: bool, model: str) -> None:
    """Score raw rows and publish the partition."""
    from pipelines.progress import Ticker
    from pipelines.score import score

    ticker = Ticker("score")
    score(run, partition=partition, model=model, overwrite=overwrite, on_rows=ticker.on_rows)


@verb
@partition_option
@click.option(
    "--model", default="champion", show_default=True, help="An alias, a version number, or a bundle's folder."
)
def check(run: "Run", partition: str | None, model: str) -> None:
    """Compare raw rows, and scores if there are any, with what the model has seen; stops at exit status 2."""
    from pipelines.check import check

    check(run, partition=partition, model=model)


@verb
@partition_option
def report(run: "Run", partition: str | None) -> None:
    """Write the report page of the last evaluation."""
    from pipelines.report import report

    click.echo(report(run, partition=partition))


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the day=... partitions.")
@click.option("--days", required=True, help="2026-03-01 or 2026-03-01..2026-03-07")
@click.option("--rows", default=100_000, show_default=True, help="Impressions per day.")
@click.option("--seed", default=0, show_default=True)
@click.option("--click-rate", type=float, help="Mean click probability.  [default: 0.2]")
@click.option("--conversion-rate", type=float, help="Add conversions: their mean probability, if clicked.")
@click.option("--taste", type=float, help="Weight of a hidden affinity of user and item in clicks and conversions.")
@click.option("--confounding", type=float, help="Weight of a hidden cause of both that nothing can teach.")
@click.option("--delay-days", "conversion_delay_days", type=float, help="Mean delay of the conversions.")
@click.option("--observed-until", metavar="DAY", help="The last day whose conversions are in the log.")
@overwrite_option
def generate(out: Path, days: str, rows: int, seed: int, overwrite: bool, **dials: Any) -> None:
    """Write days of the synthetic log, whose click (and conversion) probabilities are known."""
    with _reported():
        from base.config import parse_config
        from base.errors import ConfigError
        from features.readers.synthetic import SyntheticConfig
        from features.split import days_of
        from pipelines.generate import generate

        try:
            wanted = days_of(days)
        except ValueError as error:
            raise ConfigError(f"--days {error}") from None
        given = {name: value for name, value in dials.items() if value is not None}
        config = parse_config(SyntheticConfig, {"rows_per_day": rows, "seed": seed, **given}, source="generate")
        generate(config, wanted, out, overwrite=overwrite)


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--rows", default=100_000, show_default=True, help="Impressions per day.")
def demo(output: Path, rows: int) -> None:
    """The main job on the synthetic log: seven days in, published scores and a report out."""
    with _reported():
        from pipelines.demo import demo

        demo(output, rows)


@main.command()
@click.option("--config", type=click.Path(path_type=Path), help="A run file, to check its MLflow as well.")
def doctor(config: Path | None) -> None:
    """Check the installation: one line each, with a remedy where something is wrong."""
    from pipelines.doctor import examine

    findings = examine(config)
    for finding in findings:
        click.echo(finding)
    sys.exit(0 if all(f.ok for f in findings) else 1)


@contextmanager
def _reported() -> Iterator[None]:
    """User errors, and a full disk, as one sentence."""
    # Spinning OpenMP threads collapse when another process wants a core: measured, 0.4-1.8 s a step instead of 0.08 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _quiet()
    try:
        yield
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = error.filename or "the output folder"
        click.echo(f"error: {where}: {error.strerror}; nothing was published: free some space and run again", err=True)
        sys.exit(2)


def _quiet() -> None:
    """Libraries' chatter on import is not the user's business."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for name in ("torchrec", "torch", "mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
