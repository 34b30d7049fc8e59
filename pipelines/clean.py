"""clean: remove what days long past left behind, and nothing that a model in use or the next day needs."""

from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

from base.errors import ConfigError
from base.storage import bytes_of, exclusive, published, versions_of, withdraw
from pipelines.config import Run
from pipelines.line import Line, current_line, lines
from pipelines.tracking import registry_of
from recsys.registry import CHAMPION, PREVIOUS, ModelRegistry


def clean(run: Run, *, keep: int, say: Callable[[str], None] = print) -> int:
    """Remove dated artefacts more than `keep` days older than the newest; returns the bytes that were freed.

    What stays whatever its age: scores; the bundles of champion, previous champion and challenger; of the current line
    the last state, the features it was trained with and the newest ones, and examples that are not trained on yet.
    Raises ConfigError if `keep` is shorter than the training window, RegistryError if MLflow cannot say what is in use.
    """
    if keep < run.daily.window_days:
        raise ConfigError(
            f"--keep {keep}: a full training needs {run.daily.window_days} days (daily.window_days); keep as many"
        )
    registry = registry_of(run)
    in_use, lines_in_use = registry.referenced(), _lines_in_use(registry)
    freed = 0
    with exclusive(run.output / "training", say):
        line = current_line(run)
        if line is None or not line.days("features"):
            say("nothing to clean: there is no line of days yet")
            return 0
        oldest = line.days("features")[-1] - timedelta(days=keep - 1)
        for target in _dated(run, line, oldest):
            if in_use & {version.resolve() for version in versions_of(target)}:
                continue
            freed += bytes_of(target)
            withdraw(target)
        for other in lines(run):
            newest = max([date.fromisoformat(other.name), *other.days("states")])
            if other != line and other.name not in lines_in_use and newest < oldest:
                left = [t for kind in ("features", "examples", "states") for t in published(other.folder / kind)]
                freed += sum(bytes_of(t) for t in left)
                for target in left:
                    withdraw(target)
    say(f"freed {freed / 1e6:,.1f} MB: kept {oldest} and later")
    return freed


def _lines_in_use(registry: ModelRegistry) -> set[str | None]:
    """Those that daily steps go on with, or would after a rollback."""
    aliases = registry.aliases()
    return {registry.bundle_of(registry.find(name)).origin.line for name in (CHAMPION, PREVIOUS) if name in aliases}


def _dated(run: Run, line: Line, oldest: date) -> Iterator[Path]:
    """Published artefacts of days before `oldest` that nothing needs."""
    states, features = line.days("states"), line.days("features")
    needed = {line.features_path(features[-1])}
    if states:
        first_needed = [f for f in features if f <= states[-1]][-1:] or features[:1]
        needed |= {line.state_path(states[-1]), *(line.features_path(f) for f in first_needed)}
    untrained = {line.examples_path(f"day={d}") for d in line.days("examples") if not states or d > states[-1]}
    untrained |= {line.features_path(d) for d in features if not states or d > states[-1]}
    folders = [line.folder / kind for kind in ("features", "examples", "states")]
    folders.append(run.counts_path("day").parent)
    models = run.output / "models"
    folders += [f for model in models.iterdir() for f in model.iterdir()] if models.is_dir() else []
    folders += sorted((run.output / "rankings").glob("*"))
    folders.append(run.checks_path("day").parent)
    for folder in folders:
        for target in published(folder):
            day = target.name.removeprefix("day=")
            if (
                target.name != day
                and ".." not in day
                and target not in needed | untrained
                and date.fromisoformat(day) < oldest
            ):
                yield target
