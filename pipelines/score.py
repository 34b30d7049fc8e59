"""score: raw partitions through the champion, published with one probability per output and row."""

from collections.abc import Callable
from pathlib import Path

from base.storage import MANIFEST
from pipelines.config import Run
from pipelines.measure import held_out
from pipelines.tracking import registry_of
from recsys.bundle import Bundle
from recsys.device import pick_device
from recsys.registry import CHAMPION
from serving.score import publish_scores


def score(
    run: Run,
    *,
    partition: str | None = None,
    model: str = CHAMPION,
    overwrite: bool = False,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Score partitions (by default the test ones) with a registered version, an alias, or a bundle's folder."""
    if (Path(model) / MANIFEST).is_file():
        bundle = Bundle.load(Path(model))
        version = f"bundle-{bundle.version}"
    else:
        registry = registry_of(run)
        registered = registry.find(model)
        bundle, version = registry.bundle_of(registered), registered.version
    bundle = bundle.to(pick_device(run.device))
    published: list[Path] = []
    for name in held_out(run, partition):
        target = run.scores_path(name)
        rows = publish_scores(
            bundle,
            run.source.raw(name),
            target,
            key=run.data.key,
            model_version=version,
            overwrite=overwrite,
            on_rows=on_rows,
        )
        say(f"{name}: {rows:,} rows scored by version {version} -> {target}")
        published.append(target)
    return published
