"""A line: features, examples and training states that follow one another day by day, since one full training.

lines/2026-03-05/features/day=2026-03-06    what the days to that one taught, extending the day before
lines/2026-03-05/examples/day=2026-03-06    encoded by the features of the same day
lines/2026-03-05/states/day=2026-03-06      weights and optimizer states, trained to that day
"""

from dataclasses import dataclass
from datetime import date
from pathlib import Path

from base.errors import DataError
from base.storage import is_published, publish, published, read_manifest, resolve
from features.pipeline import FittedPipeline
from pipelines.settings import FeatureRun

KIND = "line"


@dataclass(frozen=True)
class Line:
    """Paths below one line's folder."""

    folder: Path

    @property
    def name(self) -> str:
        """The day of the full training that it began with."""
        return self.folder.name

    def features_path(self, day: date) -> Path:
        return self.folder / "features" / f"day={day}"

    def examples_path(self, partition: str) -> Path:
        return self.folder / "examples" / partition

    def state_path(self, day: date) -> Path:
        return self.folder / "states" / f"day={day}"

    def days(self, kind: str) -> list[date]:
        """The days of which `features`, `examples` or `states` are published, in order."""
        return [date.fromisoformat(path.name.removeprefix("day=")) for path in published(self.folder / kind)]

    def features(self, day: date) -> FittedPipeline:
        """The features that encode a day: its own, or the line's first. Raises ArtefactError if they are not there."""
        first = min(self.days("features"), default=day)
        path = self.features_path(max(day, first))
        return FittedPipeline.load(resolve(path, "features", made_by="`recsys prepare --day` of that day"))


def lines(run: FeatureRun) -> list[Line]:
    """All lines of an output folder, oldest first."""
    folder = run.output / "lines"
    return [Line(f) for f in sorted(folder.iterdir())] if folder.is_dir() else []


def current_line(run: FeatureRun) -> Line | None:
    """The line that daily steps go on with; None before the first full training."""
    if not is_published(run.line_path):
        return None
    return Line(run.output / "lines" / str(read_manifest(resolve(run.line_path, KIND)).about["line"]))


def line_of(run: FeatureRun) -> Line:
    """The line that a step works on: a new one with `--full`, else the current one."""
    if run.full:
        return Line(run.output / "lines" / str(run.on_day))
    line = current_line(run)
    if line is None:
        raise DataError(
            f"{run.output}: there is no model to go on with for {run.on_day}; begin with "
            f"`recsys prepare --day {run.on_day} --full`, then train the same way"
        )
    return line


def follow(run: FeatureRun, name: str | None) -> None:
    """Daily steps go on with the line of the champion, if it knows one and it is still there."""
    line = current_line(run)
    if name is not None and line is not None and line.name != name and Line(run.output / "lines" / name).days("states"):
        adopt(run, Line(run.output / "lines" / name))


def adopt(run: FeatureRun, line: Line) -> None:
    """From now on daily steps go on with `line`."""
    with publish(run.line_path, KIND, overwrite=True, keep=3) as staging:
        staging.about["line"] = line.name
