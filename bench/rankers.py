"""What ranks items for users, all asked the same: our towers, implicit's vectors, popularity, the truth."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from base.storage import publish, resolve
from features.pipeline import FittedPipeline
from pipelines.config import Run
from pipelines.examples import examples_of, good_rows
from pipelines.prepare import prepare
from pipelines.progress import Ticker
from pipelines.rankings import ranking_of, write_ranking
from pipelines.train import corpus_of
from recsys import trainer
from recsys.bundle import load_model
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.models.two_tower import TwoTower
from recsys.retrieval import ITEM, ITEMS, RELEVANT, SEEN, USER, USERS, Ranking, measure, rank_items

# Shape suffixes: I = items, U = users, Q = users who ask, D = dimension, X = pairs.

ROOT = Path(__file__).parent.parent
PEER = ROOT / ".venv-peer" / "bin" / "python"
K = 20
COLD = 0.1
"""Share of the items that are new in the second question about MovieLens-1M."""
_LAST = -1e9
"""Added to the scores of items that a model of ids cannot rank."""


@dataclass(frozen=True)
class Kind:
    """A way to train: what differs from the run file."""

    name: str
    ssl: Mapping[str, Any] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)

    def of(self, run: Run) -> Run:
        """The run, trained this way."""
        tree = run.model_dump(mode="json")
        changed = {n: {**tree[n], **getattr(self, n)} for n in ("model", "train")}
        return Run.model_validate({**tree, **changed, "ssl": self.ssl})


@dataclass(frozen=True)
class Peer:
    """A model of implicit's, with its arguments."""

    name: str
    model: Literal["als", "bpr"]
    options: Mapping[str, Any]


# --- logs and what is asked about them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    """What is learned from, and what is asked on validation and test rows."""

    run: Run
    fitted: FittedPipeline
    files: tuple[Path, ...]
    """Examples to learn from."""
    positives: pl.DataFrame
    """Raw user and item of each."""
    valid: Ranking
    test: Ranking

    @property
    def counts(self) -> Any:
        """Training rows by the item's row in its table."""
        return self.fitted.counts_of(self.run.item_feature)


def log_of(asking: Run, learning: Run) -> Log:
    """Both runs prepared: they may differ in the rows that are learned from, and then in their folder."""
    fitted, source = prepare(learning, say=_quiet), asking.source
    valid, test = source.partitions("valid"), source.partitions("test")
    for partitions in (valid, test):
        write_ranking(asking, fitted, partitions, say=_quiet)
    assert asking.retrieval is not None
    pair = (asking.retrieval.user, asking.retrieval.item)
    rows = pl.concat([good_rows(learning, p).select(pair) for p in source.partitions("train")])
    positives = rows.unique(maintain_order=True).collect(engine="streaming")
    files = tuple(examples_of(learning, source.partitions("train"), fitted))
    asked = (ranking_of(asking, fitted, p) for p in (valid, test))
    return Log(learning, fitted, files, positives.rename(dict(zip(pair, (USER, ITEM), strict=True))), *asked)


def asking_fewer(ranking: Ranking, users: int, target: Path) -> Ranking:
    """The same question of so many users, evenly from their order; published at `target`."""
    frame = pl.read_parquet(ranking.folder / USERS)
    if frame.height <= users:
        return ranking
    with publish(target, "ranking", overwrite=True, keep=1) as staging:
        chosen = frame[np.unique(np.linspace(0, frame.height - 1, users).astype(np.int64))]
        chosen.write_parquet(staging / USERS)
        shutil.copyfile(ranking.folder / ITEMS, staging / ITEMS)
    return replace(ranking, folder=resolve(target))


def _quiet(_: str) -> None:
    """Says nothing."""


def new_items(items: pl.Series, seed: int) -> list[Any]:
    """A tenth of the items, in order."""
    known = items.unique().sort()
    drawn = np.random.default_rng(seed).choice(len(known), round(COLD * len(known)), replace=False)
    return known[np.sort(drawn)].to_list()


# --- one run ---------------------------------------------------------------------------------------------------------


def figures(table: pl.DataFrame) -> dict[str, float | None]:
    """Recall and NDCG at K by slice, None where it has no relevant items; the share of the items that anybody gets."""
    found: dict[str, float | None] = {}
    for row in table.filter(k=K).iter_rows(named=True):
        found |= {f"{metric}_{row['slice']}": row[metric] for metric in ("recall", "ndcg")}
        if row["slice"] == "all":
            found["coverage"] = row["coverage"]
    return found


def ours(kind: Kind, log: Log, seed: int, *, choose: bool) -> dict[str, Any]:
    """A trained model's figures."""
    run = kind.of(log.run)
    model, trained = trained_model(run, log.fitted, log.files, log.valid, seed, kind.name, item_counts=log.counts)
    assert isinstance(model, TwoTower)

    def ranked(ranking: Ranking) -> dict[str, Any]:
        with torch.no_grad():
            return figures(rank_items(lambda s: (x for x, _ in trainer.passed(model, s, CPU)), model, ranking))

    return told(ranked, log, choose=choose) | {"best_epoch": trained.best_epoch, "epochs": len(trained.history)}


def told(ranked: Callable[[Ranking], dict[str, Any]], log: Log, *, choose: bool) -> dict[str, Any]:
    """Figures of the validation rows, and of the test rows unless settings are chosen."""
    held_out = {f"valid_{name}": value for name, value in ranked(log.valid).items()}
    return held_out if choose else held_out | ranked(log.test)


def trained_model(
    run: Run,
    fitted: FittedPipeline,
    files: tuple[Path, ...],
    valid: Ranking | ExampleStream,
    seed: int,
    name: str,
    **options: Any,
) -> tuple[Any, trainer.Trained]:
    """The model with the best weights of a training, and how it came about."""
    schema, config = run.schema_of(fitted), run.train.model_copy(update={"seed": seed, "threads": 1})
    fit = ExampleStream(files, schema, config.batch_size, shuffle=True, seed=seed, sampled=True)
    corpus = corpus_of(run, fit, valid)
    with tempfile.TemporaryDirectory() as scratch:
        ticker = Ticker(f"{name} seed {seed}", interval_seconds=60)
        trained = trainer.train(
            run.model, schema, fit, valid, config, Path(scratch), corpus=corpus, on_step=ticker.on_step, **options
        )
    return load_model(run.model, schema, trained.weights, where=Path(name)), trained


@dataclass(frozen=True)
class Vectors:
    """What a model of ids ranks by: inner products of vectors by raw id."""

    users: pl.Series
    """Ascending, as are the items."""
    items: pl.Series
    users_UD: Tensor
    items_ID: Tensor

    def figures(self, ranking: Ranking) -> dict[str, Any]:
        """As for our models."""
        asked = pl.read_parquet(ranking.folder / USERS, columns=[USER])[USER]
        listed = pl.read_parquet(ranking.folder / ITEMS, columns=[ITEM])[ITEM]
        queries_QD = self.users_UD[torch.from_numpy(places(self.users, asked))]
        items_ID = self.items_ID[torch.from_numpy(places(self.items, listed))]
        pairs = (ranking.pairs(SEEN), ranking.pairs(RELEVANT))
        return figures(measure([queries_QD], items_ID, *pairs, ranking.slices(), ranking.cuts.k).table)


def places(ascending: pl.Series, values: pl.Series) -> Any:
    """Where values stand; all must be there."""
    found = ascending.search_sorted(values).to_numpy().astype(np.int64)
    assert bool((ascending.gather(found) == values).all()), "an id that is not known"
    return found


def ids_of(log: Log) -> tuple[pl.Series, pl.Series]:
    """All users and items, ascending, of those that ask or have asked."""
    asked = [pl.read_parquet(r.folder / USERS, columns=[USER])[USER] for r in (log.valid, log.test)]
    users = pl.concat([log.positives[USER], *asked]).unique().sort()
    return users, pl.read_parquet(log.test.folder / ITEMS, columns=[ITEM])[ITEM]


def popularity(log: Log) -> Vectors:
    """Items by their number of training rows, for everyone the same."""
    users, items = ids_of(log)
    counts_I = np.bincount(places(items, log.positives[ITEM]), minlength=len(items))
    return Vectors(users, items, torch.ones(len(users), 1), torch.from_numpy(counts_I)[:, None].float())


def peer(kind: Peer, log: Log, seed: int) -> Vectors:
    """implicit's vectors, trained on the same pairs. Items without any come last."""
    users, items = ids_of(log)
    pairs_X2 = np.stack([places(users, log.positives[USER]), places(items, log.positives[ITEM])], 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.save(folder / "pairs.npy", pairs_X2.astype(np.int32))
        command = [PEER, "-m", "bench.implicit_peer", "--pairs", folder / "pairs.npy", "--out", folder]
        command += ["--shape", f"{len(users)},{len(items)}", "--model", kind.model, "--seed", str(seed)]
        command += ["--options", json.dumps(kind.options)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        subprocess.run([str(part) for part in command], cwd=ROOT, env=one_thread, check=True, stdout=subprocess.DEVNULL)
        users_UD, items_ID = (torch.from_numpy(np.load(folder / f"{n}.npy")) for n in ("users", "items"))
    return known_first(Vectors(users, items, users_UD, items_ID), pairs_X2[:, 1])


def known_first(vectors: Vectors, learned_X: Any) -> Vectors:
    """With one more dimension, which puts items that were never learned from behind all others."""
    last_I = torch.full((len(vectors.items), 1), _LAST)
    last_I[torch.from_numpy(np.unique(learned_X)).long()] = 0
    ones_U1 = torch.ones(len(vectors.users), 1)
    return Vectors(
        vectors.users,
        vectors.items,
        torch.cat([vectors.users_UD, ones_U1], 1),
        torch.cat([vectors.items_ID, last_I], 1),
    )
