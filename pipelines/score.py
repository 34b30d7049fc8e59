"""score: raw partitions through the champion, published with one probability per output and row."""

from collections.abc import Callable
from pathlib import Path

from base.storage import is_published, read_manifest, resolve
from pipelines.config import Run
from pipelines.measure import held_out
from pipelines.tracking import model_of
from recsys.device import pick_device
from recsys.registry import CHAMPION
from serving.score import publish_scores


def score(
    run: Run,
    *,
    partition: str | None = None,
    model: str = CHAMPION,
    overwrite: bool = False,
    if_missing: bool = False,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Score partitions (by default the test ones) with a registered version, an alias, or a bundle's folder.

    Rows without a key of their own are set aside and told, up to data.max_bad_share.

    With `if_missing` scores that are published stay as they are, where they would be an error.
    """
    missing = [n for n in held_out(run, partition) if not (if_missing and is_published(run.scores_path(n)))]
    for name in held_out(run, partition):
        if name not in missing:
            say(f"{name}: scored already")
    if not missing:
        return []
    bundle, version, _ = model_of(run, model)
    bundle = bundle.to(pick_device(run.device))
    published: list[Path] = []
    for name in missing:
        target = run.scores_path(name)
        rows = publish_scores(
            bundle,
            run.source.raw(name),
            target,
            key=run.data.key,
            model_version=version,
            overwrite=overwrite,
            max_bad_share=run.data.max_bad_share,
            on_rows=on_rows,
        )
        bad = read_manifest(resolve(target)).about["bad"]
        aside = "".join(f"; set aside {n} x {reason}" for reason, n in bad.items())
        aside += f" -> {target}/rejected.parquet" if bad else ""
        say(f"{name}: {rows:,} rows scored by version {version} -> {target}{aside}")
        published.append(target)
    return published
