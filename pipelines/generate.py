"""generate: days of the synthetic log, published like any other log."""

from collections.abc import Callable
from datetime import date
from pathlib import Path

from base.storage import publish
from features.readers.synthetic import SyntheticConfig, generate_day


def generate(
    config: SyntheticConfig,
    days: list[date],
    folder: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write each day as a partition `day=...` below `folder`; a day can be made again alone, with equal bytes."""
    for day in days:
        rows = 0
        with publish(folder / f"day={day}", "log", overwrite=overwrite) as staging:
            for i, chunk in enumerate(generate_day(config, day)):
                chunk.drop("day").write_parquet(staging / f"part-{i:05}.parquet")
                rows += chunk.height
            staging.about["rows"] = rows
        say(f"day={day}: {rows:,} impressions")
