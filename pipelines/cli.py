"""recsys: the command line. Each verb reads one run file; imports stay inside, so that `--help` is quick."""

import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from base.config import load_config
from base.errors import Superseded, UserError, explained, machine_error
from base.masking import masked
from base.process import keep_memory
from base.storage import set_down

if TYPE_CHECKING:
    from pipelines.config import Run
    from pipelines.settings import FeatureRun

NOT_PROMOTED = {"refused": 99, "held": 98}
"""Exit statuses of `promote` by the gate's decision; Airflow shows both as skipped, not failed."""
SUPERSEDED = 99
"""Exit status of a step whose work a later day has done already."""
USER_ERROR, UNEXPECTED = 2, 1
"""Exit statuses: what a sentence says how to mend; and what only the traceback in a file explains."""


@click.group()
@click.version_option(package_name="recsys")
def main() -> None:
    """Features, training, promotion and scoring of click models, each from one TOML file."""


settings_option = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override, e.g. train.epochs=1."
)


def verb(function: Callable[..., None]) -> click.Command:
    """A command over a run file: --config and --set become a Run; errors become one line, see `_reported`."""
    return _over_run_file(function, features_only=False)


def feature_verb(function: Callable[..., None]) -> click.Command:
    """The same of a step that knows no model: torch is not imported, so that it starts in a second."""
    return _over_run_file(function, features_only=True)


def _over_run_file(function: Callable[..., None], *, features_only: bool) -> click.Command:
    """What `verb` and `feature_verb` have in common; --day and --full make the run that of one day."""

    @wraps(function)
    def call(
        config: Path, settings: tuple[str, ...], day: str | None = None, full: bool = False, **options: Any
    ) -> None:
        with _reported():
            from base.errors import ConfigError
            from features.split import days_of
            from pipelines.settings import FeatureRun

            if features_only:
                run = load_config(FeatureRun, config, settings)
            else:
                from pipelines.config import Run

                run = load_config(Run, config, settings)
            if day is not None:
                try:
                    (wanted,) = days_of(day)
                except ValueError:
                    raise ConfigError(f"--day {day!r} is not a day: write --day 2026-03-07") from None
                run = run.on(wanted, full=full)
            elif full:
                raise ConfigError("--full is a form of --day: pass both")
            with _reported(run.output), nullcontext() if features_only else _quick():
                function(run, **options)

    config = click.option("--config", type=click.Path(path_type=Path), required=True, help="The run file (TOML).")
    return main.command()(config(settings_option(call)))


day_option = click.option("--day", metavar="DAY", help="The day to live through, e.g. 2026-03-07; see [daily].")
full_option = click.option("--full", is_flag=True, help="With --day: fit and train anew on a window of days.")
partition_option = click.option("--partition", help="e.g. day=2026-03-07; by default the test rows of the split.")
given_partition_option = click.option("--partition", required=True, help="e.g. day=2026-03-07")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is published there.")


@verb
@overwrite_option
@day_option
@full_option
def prepare(run: "Run", overwrite: bool) -> None:
    """Fit the features, or extend those of the day before; write the examples."""
    from pipelines.daily import prepare_day
    from pipelines.prepare import prepare

    if run.day is None:
        prepare(run, overwrite=overwrite)
    else:
        prepare_day(run)


@feature_verb
@day_option
@full_option
def plan(run: "FeatureRun") -> None:
    """Print, as JSON, which partitions `prepare --day` would count and encode."""
    from pipelines.daily import plan

    click.echo(plan(run).model_dump_json())


@feature_verb
@day_option
@full_option
@given_partition_option
def count(run: "FeatureRun", partition: str) -> None:
    """The first part of `prepare --day`: one partition's integer statistics."""
    from pipelines.daily import count

    count(run, partition)


@feature_verb
@day_option
@full_option
def fit(run: "FeatureRun") -> None:
    """The second part of `prepare --day`: features from what was counted."""
    from pipelines.daily import fit

    fit(run)


@feature_verb
@day_option
@full_option
@given_partition_option
def encode(run: "FeatureRun", partition: str) -> None:
    """The third part of `prepare --day`: one partition's examples."""
    from pipelines.daily import encode

    encode(run, partition)


@verb
@day_option
@full_option
def train(run: "Run") -> None:
    """Train, register as challenger. Killed, it goes on from its last checkpoint."""
    from pipelines.progress import Ticker
    from pipelines.train import train
    from pipelines.train_day import train_day

    ticker = Ticker(run.name or run.model.name)
    if run.day is None:
        train(run, on_step=ticker.on_step)
    else:
        train_day(run, on_step=ticker.on_step)
    ticker.close()


@verb
@day_option
@full_option
@partition_option
def evaluate(run: "Run", partition: str | None) -> None:
    """Measure the trained model on held-out raw rows."""
    from pipelines.evaluate import evaluate
    from pipelines.text import metrics_table

    click.echo(metrics_table(evaluate(run, partition=partition)))


@verb
@day_option
@full_option
@partition_option
@click.option("--version", help="Of the registered model; by default the challenger.")
@click.option("--approve", is_flag=True, help="Promote a version that the gate holds for a person, not a refused one.")
def promote(run: "Run", partition: str | None, version: str | None, approve: bool) -> None:
    """Compare challenger and champion; move the alias if the gate allows.

    Exit status 99 if it refuses, 98 if it holds the version for a person, who may --approve it.
    """
    from pipelines.promote import promote

    verdict = promote(run, version=version, partition=partition, approve=approve)
    click.echo(verdict.decision)
    for reason in verdict.reasons:
        click.echo(f"  {reason}")
    if not verdict.promoted:
        sys.exit(NOT_PROMOTED[verdict.decision])


@verb
def rollback(run: "Run") -> None:
    """Return to the champion before this one; the next scoring uses it."""
    from pipelines.rollback import rollback

    rollback(run, say=click.echo)


@verb
@partition_option
@overwrite_option
@click.option(
    "--model", default="champion", show_default=True, help="An alias, a version number, or a bundle's folder."
)
@click.option("--if-missing", is_flag=True, help="Leave a partition that is scored already as it is.")
def score(run: "Run", partition: str | None, overwrite: bool, if_missing: bool, model: str) -> None:
    """Score raw rows and publish the partition."""
    from base.errors import ConfigError
    from pipelines.progress import Ticker
    from pipelines.score import score

    if overwrite and if_missing:
        raise ConfigError("--overwrite and --if-missing contradict each other: pass one of them")
    ticker = Ticker("score")
    score(run, partition=partition, model=model, overwrite=overwrite, if_missing=if_missing, on_rows=ticker.on_rows)


@verb
@overwrite_option
@click.option(
    "--model", default="champion", show_default=True, help="An alias, a version number, or a bundle's folder."
)
@click.option("--if-missing", is_flag=True, help="Leave an index of that very model and corpus as it is.")
def index(run: "Run", overwrite: bool, if_missing: bool, model: str) -> None:
    """Index the corpus by a two-tower model, for `recommend` to look items up in."""
    from base.errors import ConfigError
    from pipelines.index import index

    if overwrite and if_missing:
        raise ConfigError("--overwrite and --if-missing contradict each other: pass one of them")
    index(run, model=model, overwrite=overwrite, if_missing=if_missing)


@verb
@partition_option
@overwrite_option
@click.option(
    "--model", default="champion", show_default=True, help="An alias, a version number, or a bundle's folder."
)
@click.option("--build-index", is_flag=True, help="Build the index of that model first, if there is another or none.")
@click.option("--if-missing", is_flag=True, help="Leave a partition that is published already as it is.")
def recommend(
    run: "Run", partition: str | None, overwrite: bool, if_missing: bool, build_index: bool, model: str
) -> None:
    """Publish the top items for every user of the partition, what they have seen removed."""
    from base.errors import ConfigError
    from pipelines.progress import Ticker
    from pipelines.recommend import recommend

    if overwrite and if_missing:
        raise ConfigError("--overwrite and --if-missing contradict each other: pass one of them")
    ticker = Ticker("recommend", rows="users")
    recommend(
        run,
        partition=partition,
        model=model,
        overwrite=overwrite,
        if_missing=if_missing,
        build_index=build_index,
        on_users=ticker.on_rows,
    )
    ticker.close()


@verb
@day_option
@full_option
@partition_option
@click.option(
    "--model", default="champion", show_default=True, help="An alias, a version number, or a bundle's folder."
)
def check(run: "Run", partition: str | None, model: str) -> None:
    """Compare raw rows, and scores if there are any, with what the model has seen; stops at exit status 2."""
    from pipelines.check import check

    check(run, partition=partition, model=model)


@verb
@day_option
@full_option
@partition_option
def report(run: "Run", partition: str | None) -> None:
    """Write the report page of the last evaluation."""
    from pipelines.report import report

    click.echo(report(run, partition=partition))


@verb
@click.option("--keep", type=click.IntRange(min=1), required=True, metavar="DAYS", help="How many days to keep.")
def clean(run: "Run", keep: int) -> None:
    """Remove what days long past left behind; never what a model in use or the next day needs."""
    from pipelines.clean import clean

    clean(run, keep=keep)


@main.command()
@click.option(
    "--kind",
    type=click.Choice(["clicks", "retrieval"]),
    default="clicks",
    show_default=True,
    help="Impressions with features, or a catalogue of items and who was shown which.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the day=... partitions.")
@click.option("--days", required=True, help="2026-03-01 or 2026-03-01..2026-03-07")
@click.option("--rows", default=100_000, show_default=True, help="Impressions per day.")
@click.option("--seed", default=0, show_default=True)
@click.option("--users", type=int, help="Before the first day.  [default: 150000; retrieval: 20000]")
@click.option("--items", type=int, help="Before the first day.  [default: 20000]")
@click.option("--click-rate", type=float, help="Mean click probability.  [default: 0.2]")
@click.option("--themes", type=int, help="retrieval: what items belong to, and users like.  [default: 400]")
@click.option("--conversion-rate", type=float, help="clicks: add conversions; their mean probability, if clicked.")
@click.option("--taste", type=float, help="clicks: weight of a hidden affinity of user and item in both.")
@click.option("--confounding", type=float, help="clicks: weight of a hidden cause of both that nothing can teach.")
@click.option("--drift", type=float, help="clicks: share of taste that a day forgets; ids fade, too.  [default: 0]")
@click.option("--delay-days", "conversion_delay_days", type=float, help="clicks: mean delay of the conversions.")
@click.option("--observed-until", metavar="DAY", help="clicks: the last day whose conversions are in the log.")
@overwrite_option
def generate(kind: str, out: Path, days: str, rows: int, seed: int, overwrite: bool, **dials: Any) -> None:
    """Write days of a synthetic log, whose click (and conversion) probabilities are known.

    For retrieval, the items lie beside the days, in items/part-*.parquet.
    """
    with _reported():
        from base.config import parse_config
        from base.errors import ConfigError
        from features.readers.catalogue import CatalogueConfig
        from features.readers.synthetic import SyntheticConfig
        from features.split import days_of
        from pipelines.generate import generate

        try:
            wanted = days_of(days)
        except ValueError as error:
            raise ConfigError(f"--days {error}") from None
        given = {name: value for name, value in dials.items() if value is not None}
        kind_of_log = CatalogueConfig if kind == "retrieval" else SyntheticConfig
        config = parse_config(kind_of_log, {"rows_per_day": rows, "seed": seed, **given}, source=f"generate {kind}")
        generate(config, wanted, out, overwrite=overwrite)


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--rows", default=100_000, show_default=True, help="Impressions per day.")
def demo(output: Path, rows: int) -> None:
    """The main job on the synthetic log: seven days in, published scores and a report out."""
    with _reported(output), _quick():
        from pipelines.demo import demo

        demo(output, rows)


@main.command("demo-retrieval")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/demo-retrieval"), show_default=True)
@click.option("--rows", default=100_000, show_default=True, help="Impressions per day.")
@click.option("--items", default=20_000, show_default=True, help="Of the catalogue, on the first day.")
def demo_retrieval(output: Path, rows: int, items: int) -> None:
    """Two stages on a synthetic catalogue: candidates by two towers, put in order by a ranking model, and a report."""
    with _reported(output), _quick():
        from base.config import parse_config
        from features.readers.catalogue import CatalogueConfig
        from pipelines.demo_retrieval import demo_retrieval

        log = parse_config(CatalogueConfig, {"rows_per_day": rows, "items": items}, source="demo-retrieval")
        demo_retrieval(output, log)


@main.command("production-demo")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/production"), show_default=True)
@click.option("--rows", default=50_000, show_default=True, help="Impressions per day.")
@click.option("--days", default=5, show_default=True, type=click.IntRange(min=1), help="How many days to live through.")
def production_demo(output: Path, rows: int, days: int) -> None:
    """A real MLflow and a real Airflow live through some days of a drifting log, one table row a day."""
    with _reported(output), _quick():
        from pipelines.production_demo import production_demo

        production_demo(output, rows, days)


@main.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def diff(before: Path, after: Path, as_json: bool) -> None:
    """What changed between the features of BEFORE and AFTER, each a published folder of features, or a bundle."""
    with _reported():
        from pipelines.diff import diff, diff_text

        found = diff(before, after)
        click.echo(found.model_dump_json(indent=2) if as_json else diff_text(found))


@main.command()
@click.option(
    "--config", type=click.Path(path_type=Path), help="A run file, to check its output folder and MLflow as well."
)
@settings_option
def doctor(config: Path | None, settings: tuple[str, ...]) -> None:
    """Check the installation: one line each, with a remedy where something is wrong."""
    from pipelines.doctor import examine

    findings = examine(config, settings)
    for finding in findings:
        click.echo(finding)
    sys.exit(0 if all(f.ok for f in findings) else 1)


@contextmanager
def _reported(output: Path | None = None) -> Iterator[None]:
    """Errors as one sentence: 2 is the exit status of those that it says how to mend, 1 of any other.

    The traceback of the latter goes into a file in the output folder, or else in the temporary one.
    """
    # Spinning OpenMP threads collapse when another process wants a core: measured, 0.4-1.8 s a step instead of 0.08 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _quiet()
    try:
        yield
    except Superseded as news:
        click.echo(str(news), err=True)
        sys.exit(SUPERSEDED)
    except (KeyboardInterrupt, SystemExit, GeneratorExit, click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except BrokenPipeError:  # click ends without a word where nobody reads on
        raise
    except BaseException as error:  # a panic of Polars is no Exception
        told = error
        if not isinstance(error, UserError):
            refused = machine_error(error)
            told = refused and explained(refused)
        if told is not None:
            click.echo(f"error: {told}", err=True)
            sys.exit(USER_ERROR)
        click.echo(f"error: {_unexpected(error, output)}", err=True)
        sys.exit(UNEXPECTED)


@contextmanager
def _quick() -> Iterator[None]:
    """How torch computes in our own processes, from before its first threads."""
    from recsys.device import denormals_flushed

    with denormals_flushed(own_process=True):
        yield


def _unexpected(error: BaseException, output: Path | None) -> str:
    """A sentence about an error that nobody foresaw, and where its traceback is."""
    trace = masked("".join(traceback.format_exception(error)))
    folders = [] if output is None else [output / "tracebacks"]
    with suppress(OSError):  # there may be no temporary folder
        folders.append(Path(tempfile.gettempdir()))
    name = f"recsys-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.txt"
    file = set_down(trace, folders, name)
    if file is None:
        click.echo(trace, err=True)
    first = masked(next(iter(str(error).splitlines()), ""))
    where = f"the traceback is in {file}" if file else "the traceback is above, since no folder takes it"
    return f"unforeseen: {type(error).__name__}: {first}; {where}; send it to whoever maintains recsys"


def _quiet() -> None:
    """Libraries' chatter on import is not the user's business."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for name in ("torchrec", "torch", "mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what we tell in a sentence


def run() -> None:
    """The command `recsys`: a process of our own."""
    keep_memory()
    main()


if __name__ == "__main__":
    run()
