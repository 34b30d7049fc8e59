"""generate: days of a synthetic log, published like any other log."""

from collections.abc import Callable
from datetime import date
from pathlib import Path

from base.errors import PublishedError
from base.storage import is_published, publish, read_manifest, resolve
from features.readers import catalogue, synthetic
from features.readers.catalogue import CatalogueConfig
from features.readers.synthetic import SyntheticConfig


def generate(
    config: SyntheticConfig | CatalogueConfig,
    days: list[date],
    folder: Path,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write each day as a partition `day=...` below `folder`; a day can be made again alone, with equal bytes.

    A log for retrieval has its catalogue beside the days, `items/part-*.parquet`: every item up to the last day made.
    """
    if isinstance(config, CatalogueConfig):
        _items(config, max(days), folder / "items", overwrite=overwrite, say=say)
    for day in days:
        rows = 0
        with publish(folder / f"day={day}", "log", overwrite=overwrite) as staging:
            for i, chunk in enumerate(_day(config, day)):
                chunk.drop("day").write_parquet(staging / f"part-{i:05}.parquet")
                rows += chunk.height
            staging.about["rows"] = rows
        say(f"day={day}: {rows:,} impressions")


def _day(config: SyntheticConfig | CatalogueConfig, day: date):
    if isinstance(config, CatalogueConfig):
        return catalogue.generate_day(config, day)
    return synthetic.generate_day(config, day)


def _items(config: CatalogueConfig, last: date, target: Path, *, overwrite: bool, say: Callable[[str], None]) -> None:
    """Publish the catalogue up to `last`, unless one that goes as far is there. Raises PublishedError over another."""
    settings = config.model_dump(mode="json", exclude={"rows_per_day"})
    if is_published(target):
        about = read_manifest(resolve(target, "items")).about
        if about["settings"] == settings and about["through"] >= str(last):
            return
        if about["settings"] != settings and not overwrite:
            raise PublishedError(f"{target}: holds the items of other settings; pass --overwrite, or another --out")
    with publish(target, "items", overwrite=True) as staging:
        for i, chunk in enumerate(catalogue.generate_items(config, last)):
            chunk.write_parquet(staging / f"part-{i:05}.parquet")
        staging.about.update(settings=settings, through=str(last), rows=config.items_by(last))
    say(f"items: {config.items_by(last):,}")
