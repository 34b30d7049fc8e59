"""Retrieval beside its rivals, self-supervision beside none: recall by popularity of the item, on items never seen.

    python -m bench.retrieval --data PATH                  everything, 5 seeds; PATH holds ml-1m/ and gowalla/
    python -m bench.retrieval --data PATH --quick          one seed on little training
    python -m bench.retrieval --part ml-1m                 one of ml-1m, gowalla, synthetic, esmm
    python -m bench.retrieval --choose                     the settings tried, by what the validation rows say
    python -m bench.retrieval --table                      print the tables from the records

All models are asked the same: every item is ranked for every user without what they have seen, and one implementation
measures (`recsys.retrieval`). implicit runs in an environment of its own (`make peer`), on the same pairs of ids.
Epochs and settings were chosen on the validation rows; the test rows are read once per seed, by the best weights.

MovieLens-1M: what a user rated above 3, 80/10/10 of each user's rows. "New items" are the same questions to models that
learned without a tenth of the items, drawn anew for each seed: none of their rows is trained on, and they are known by
features alone. What knows ids alone cannot rank these, so they come last with it, and its recall of them is 0. The
towers do not read the id there, which a new item has not; "with the id" they do.

Synthetic: a catalogue whose truth is known, `features.readers.catalogue`; a million items, learned from the clicks of
four days, 4,000 users of the sixth. ESMM: the funnel of `bench.conversion`; the views are of the item's features.

What was tried, with validation Recall@20 of seed 1, is in records/retrieval_tried.jsonl (towers after four epochs). Of
MovieLens-1M: implicit ALS .236 to .293 by regularization and alpha, its defaults .236; BPR .127 to .204, its defaults
.178; two-tower .265 to .279 by temperature and table rate, .266 with a hidden layer, .140 with inner products; CFM .277
with alpha 0.1, .276 with 0.3, .270 with 1, .276 with alpha 0.1 and temperature 0.3, where none has .278; RFM .275 with
alpha 0.1, .266 with 1; spread-out .273 to .275; feature dropout .271 to .263. With Adagrad's sums decayed to a tenth an
epoch, 12 epochs reach .290, as 20 without do. Of Gowalla: implicit ALS .104 to .160 by both; BPR .080 to .115;
two-tower .153 to .174 by temperature and table rate.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl
import torch

from base.config import load_config
from bench import catalogue, conversion, records
from bench.rankers import (
    COLD,
    PEER,
    ROOT,
    Kind,
    Log,
    Peer,
    log_of,
    new_items,
    ours,
    peer,
    popularity,
    told,
    trained_model,
)
from features.pipeline import FittedPipeline
from pipelines.config import Run
from pipelines.examples import examples_of, good_rows
from recsys.data import ExampleStream

RUNS = ROOT / "pipelines" / "runs"
RECORDS = records.FOLDER / "retrieval.jsonl"
TRIED = records.FOLDER / "retrieval_tried.jsonl"
BRIEFLY = {"epochs": 4, "table_accumulator_decay": 1.0}
"""How settings are tried: not for long, with sums that forget nothing."""
SEEDS = 5
PARTS = ("ml-1m", "gowalla", "synthetic", "esmm")


# What was chosen on validation rows, by one seed: see --choose.
MOVIELENS = Kind(
    "",
    model={"temperature": 0.2},
    train={"table_learning_rate": 0.2, "table_accumulator_decay": 0.1, "epochs": 12, "patience": 2},
)
_SSL = {"alpha": 0.1, "temperature": 0.1, "batch_size": 512}
MOVIELENS_KINDS = (
    Kind("two-tower"),
    Kind("two-tower, spread-out", {**_SSL, "baseline": "spread_out"}),
    Kind("two-tower, feature dropout", {"baseline": "feature_dropout", "dropout": 0.1}),
    Kind("two-tower, RFM", {**_SSL, "masking": "rfm"}),
    Kind("two-tower, CFM", {**_SSL, "masking": "cfm"}),
    Kind("two-tower, CFM + embedding masking", {**_SSL, "masking": "cfm", "embedding_masking": 0.1}),
)
MOVIELENS_TRIED = (
    *(
        Kind(f"temperature {t:g}, table rate {rate:g}", model={"temperature": t}, train={"table_learning_rate": rate})
        for t, rate in (
            *((0.07, 0.1), (0.1, 0.1), (0.2, 0.1), (0.3, 0.1)),
            *((0.2, 0.05), (0.2, 0.2), (0.2, 0.4), (0.2, 0.8), (0.15, 0.4)),
        )
    ),
    Kind(
        "temperature 0.1, table rate 0.1, a hidden layer of 128 each",
        model={"temperature": 0.1, "query_hidden": [128], "item_hidden": [128]},
        train={"table_learning_rate": 0.1},
    ),
    *(
        Kind(
            f"dot, table rate 0.1, table_l2 {l2:g}",
            model={"similarity": "dot", "temperature": 1.0},
            train={"table_learning_rate": 0.1, "table_l2": l2},
        )
        for l2 in (1e-3, 1e-2)
    ),
    *(
        Kind(f"CFM, alpha {a:g}, its temperature {t:g}", {**_SSL, "masking": "cfm", "alpha": a, "temperature": t})
        for a, t in ((0.1, 0.1), (0.3, 0.1), (1.0, 0.1), (0.1, 0.3))
    ),
    *(Kind(f"RFM, alpha {a:g}", {**_SSL, "masking": "rfm", "alpha": a}) for a in (0.1, 1.0)),
    *(Kind(f"spread-out, alpha {a:g}", {**_SSL, "baseline": "spread_out", "alpha": a}) for a in (0.01, 0.1, 1.0)),
    *(Kind(f"feature dropout {p:g}", {"baseline": "feature_dropout", "dropout": p}) for p in (0.1, 0.2, 0.4)),
    *(
        Kind(
            f"{epochs} epochs, sums decayed to {decay:g}, table rate {rate:g}",
            train={"table_accumulator_decay": decay, "epochs": epochs, "table_learning_rate": rate},
        )
        for decay, epochs, rate in ((1.0, 20, 0.2), (0.1, 12, 0.2), (0.3, 12, 0.3), (0.3, 16, 0.1))
    ),
)
_PEER = {"factors": 64}
MOVIELENS_PEERS = (
    Peer("implicit ALS", "als", {**_PEER, "regularization": 100.0, "alpha": 16.0}),
    Peer("implicit BPR", "bpr", {**_PEER, "learning_rate": 0.01, "regularization": 1e-4, "iterations": 30}),
)
_ALS_TRIED = {
    **{0.01: (1.0, 4.0, 16.0), 1.0: (1.0, 4.0, 16.0), 10.0: (1.0, 4.0, 16.0), 30.0: (1.0, 4.0, 8.0, 16.0)},
    **{100.0: (4.0, 8.0, 16.0, 32.0), 200.0: (8.0, 16.0, 32.0)},
}
"""Weights of the positives, by regularization."""
_BPR_TRIED = {
    **{(0.01, 1e-4): (30, 100), (0.01, 1e-3): (30, 60, 100), (0.01, 0.01): (10, 30, 100, 300)},
    **{(0.01, 0.1): (100,), (0.05, 1e-3): (10,), (0.05, 0.01): (10, 100)},
}
"""Iterations, by learning rate and regularization."""


def _als(tried: Mapping[float, Sequence[float]]) -> list[Peer]:
    return [
        Peer(f"implicit ALS, regularization {r:g}, alpha {a:g}", "als", {**_PEER, "regularization": r, "alpha": a})
        for r, alphas in tried.items()
        for a in alphas
    ]


def _bpr(tried: Mapping[tuple[float, float], Sequence[int]]) -> list[Peer]:
    return [
        Peer(
            f"implicit BPR, learning rate {rate:g}, regularization {r:g}, {n} iterations",
            "bpr",
            {**_PEER, "learning_rate": rate, "regularization": r, "iterations": n},
        )
        for (rate, r), iterations in tried.items()
        for n in iterations
    ]


MOVIELENS_PEERS_TRIED = (*_als(_ALS_TRIED), *_bpr(_BPR_TRIED))
_NO_ID = {"item": ["genres", "year", "title_words"]}
NEW_KINDS = (*(replace(k, model=_NO_ID) for k in MOVIELENS_KINDS), Kind("two-tower, with the id"))
"""Without the id, which says nothing of a new item: chosen by the validation rows' recall of new items."""
NEW_TRIED = (
    Kind("two-tower"),
    Kind("two-tower, no id", model=_NO_ID),
    *(
        Kind(f"CFM, {what}, alpha {a:g}", {**_SSL, "masking": "cfm", "alpha": a}, model)
        for what, model in (("id", {}), ("no id", _NO_ID))
        for a in (0.1, 1.0)
    ),
)
GOWALLA = Kind("")
GOWALLA_KINDS = (Kind("two-tower"), Kind("two-tower without logQ", model={"log_q": False}))
GOWALLA_TRIED = tuple(
    Kind(f"temperature {t:g}, table rate {rate:g}", model={"temperature": t}, train={"table_learning_rate": rate})
    for t, rate in ((0.1, 0.1), (0.15, 0.1), (0.2, 0.1), (0.15, 0.2), (0.1, 0.3), (0.15, 0.4), (0.07, 0.3), (0.1, 0.6))
)
GOWALLA_PEERS = (
    Peer("implicit ALS", "als", {**_PEER, "regularization": 100.0, "alpha": 128.0}),
    Peer("implicit BPR", "bpr", {**_PEER, "learning_rate": 0.01, "regularization": 1e-3, "iterations": 1000}),
)
GOWALLA_PEERS_TRIED = (
    *_als({1.0: (1.0,), 10.0: (4.0, 16.0), 30.0: (16.0, 64.0), 100.0: (16.0, 32.0, 64.0, 128.0, 256.0)}),
    *_bpr({(0.01, 1e-4): (100, 300, 1000), (0.01, 1e-3): (100, 300, 1000), (0.01, 0.01): (100, 300)}),
    *_bpr({(0.05, 1e-3): (100,), (0.05, 0.01): (100, 300)}),
)
SYNTHETIC = Kind("", train={"batch_size": 1024, "epochs": 4, "patience": 2, "table_learning_rate": 0.2})
SYNTHETIC_KINDS = (
    Kind("two-tower"),
    Kind("two-tower, RFM", {"masking": "rfm", "alpha": 1.0}),
    Kind("two-tower, CFM", {"masking": "cfm", "alpha": 1.0}),
)
_CATALOGUE = [
    *("department", "category", "brand", "line", "colour", "material", "price_band", "price"),
    *("shelf", "tags", "series", "seller", "pattern", "words", "delivery", "warranty"),
]
"""What is known of an item beside its id."""
_HIDDEN = {"alpha": 0.3, "hidden": ["item_id"]}
SYNTHETIC_TRIED = (
    Kind("no id", model={"item": _CATALOGUE}),
    *(
        Kind(f"temperature {t:g}, table rate {rate:g}", model={"temperature": t}, train={"table_learning_rate": rate})
        for t, rate in ((0.07, 0.1), (0.15, 0.1), (0.2, 0.1), (0.1, 0.05), (0.1, 0.2))
    ),
    Kind("a hidden layer of 128 each", model={"query_hidden": [128], "item_hidden": [128]}),
    *(Kind(f"CFM, alpha {a:g}", {"masking": "cfm", "alpha": a}) for a in (0.1, 0.3, 1.0)),
    *(Kind(f"RFM, alpha {a:g}", {"masking": "rfm", "alpha": a}) for a in (0.1, 0.3, 1.0)),
    *(
        Kind(f"{how.upper()}, id hidden, {n or 'half'} masked", {**_HIDDEN, "masking": how, "masked": n})
        for how, n in (("cfm", None), ("cfm", 3), ("rfm", None), ("rfm", 3))
    ),
    *(Kind(f"feature dropout {p:g}", {"baseline": "feature_dropout", "dropout": p}) for p in (0.2, 0.5)),
)
SERVED, SERVING = SYNTHETIC_KINDS[-1], "serving | a million items"
FUNNEL = conversion.LOGS[1]
_OF_ITEM = {"item": ["item_id", "advertiser", "category", "tags"], "alpha": 0.01}
ESMM_KINDS = (
    Kind("ESMM"),
    Kind("ESMM, RFM", {**_OF_ITEM, "masking": "rfm"}),
    Kind("ESMM, CFM", {**_OF_ITEM, "masking": "cfm"}),
    Kind(
        "ESMM, CFM + embedding masking, no false negatives",
        {**_OF_ITEM, "masking": "cfm", "embedding_masking": 0.1, "eliminate_false_negatives": True},
    ),
)
ESMM_TRIED = (
    ESMM_KINDS[0],
    *(
        Kind(f"CFM, alpha {a:g}, its temperature {t:g}", {**_OF_ITEM, "masking": "cfm", "alpha": a, "temperature": t})
        for a, t in ((0.01, 0.1), (0.1, 0.1), (1.0, 0.1), (0.1, 0.5))
    ),
    Kind("CFM, alpha 0.01, id hidden", {**_OF_ITEM, "masking": "cfm", "hidden": ["item_id"]}),
    Kind("RFM, alpha 0.01", {**_OF_ITEM, "masking": "rfm"}),
)


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds ml-1m/ and gowalla/")
    parser.add_argument("--work", type=Path, default=Path("build/bench/retrieval"), help="where examples are prepared")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--choose", action="store_true", help="measure the settings tried, on validation rows alone")
    parser.add_argument("--budget", default="2h", help="e.g. 90m or 2h")
    parser.add_argument("--only", help="names of rows, separated by /")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    file = TRIED if options.choose else RECORDS
    if options.quick:
        file = options.work / "quick.jsonl"  # quick figures are no measurements
    if not options.table:
        jobs = _jobs(options)
        if options.only:
            jobs = [j for j in jobs if j.name.split(" | ")[1] in options.only.split("/")]
        records.run_jobs(file, jobs, budget_seconds=records.seconds(options.budget))
    for text in tables(file).values():
        if text:
            print(f"\n{text}")


def _jobs(options: argparse.Namespace) -> list[records.Job]:
    parts = [options.part] if options.part else list(PARTS)
    need_data = bool({"ml-1m", "gowalla"} & {*parts})
    if need_data and options.data is None:
        raise SystemExit("--data is needed: the folder that holds ml-1m/ and gowalla/")
    if need_data and not PEER.exists():
        print("implicit is left out: run `make peer` first", file=sys.stderr)
    data, how = options.data or Path(), {"quick": options.quick, "choose": options.choose}
    jobs: list[records.Job] = []
    for part in parts:
        match part:
            case "ml-1m":
                jobs += movielens_jobs(data / "ml-1m", options.work, **how)
            case "gowalla":
                jobs += gowalla_jobs(data / "gowalla", options.work, **how)
            case "synthetic":
                jobs += synthetic_jobs(options.work, **how)
            case _:
                jobs += esmm_jobs(options.work, **how)
    return jobs


# --- the parts -------------------------------------------------------------------------------------------------------


def movielens_jobs(data: Path, work: Path, *, quick: bool, choose: bool) -> list[records.Job]:
    """MovieLens-1M, asked of models that know all items, then of models that have not learned from a tenth."""
    run = _run("ml-1m-retrieval.toml", data, work / "ml-1m", MOVIELENS, quick=quick, choose=choose)
    log = log_of(run, run)
    movies = pl.concat([good_rows(run, f"split={r}").select("movie_id") for r in ("train", "valid", "test")])
    known = movies.collect()["movie_id"]

    @lru_cache(maxsize=1)
    def without_new(seed: int) -> Log:
        unseen = ", ".join(str(movie) for movie in new_items(known, seed))
        folder = work / f"ml-1m-new-{seed}"
        learning = run.model_copy(
            update={
                "output": folder / "learned",
                "data": run.data.model_copy(update={"where": f"movie_id NOT IN ({unseen})"}),
            }
        )
        return log_of(run.model_copy(update={"output": folder / "asked"}), learning)

    common = {"bench": "retrieval", "rows": _rows(log), "quick": quick}
    without = {**common, "new_items": COLD}
    how = {"quick": quick, "choose": choose}
    if choose:
        tried = _jobs_of("ml-1m, tried", lambda _: log, run, MOVIELENS_TRIED, MOVIELENS_PEERS_TRIED, common, **how)
        return tried + _jobs_of("new items, tried", without_new, run, NEW_TRIED, (), without, **how)
    jobs = _jobs_of("ml-1m", lambda _: log, run, MOVIELENS_KINDS, MOVIELENS_PEERS, common, **how)
    return jobs + _jobs_of("new items", without_new, run, NEW_KINDS, MOVIELENS_PEERS, without, **how)


def gowalla_jobs(data: Path, work: Path, *, quick: bool, choose: bool) -> list[records.Job]:
    """Ids alone, in LightGCN's split."""
    run = _run("gowalla.toml", data / "*.txt", work / "gowalla", GOWALLA, quick=quick, choose=choose)
    log = log_of(run, run)
    common = {"bench": "retrieval", "rows": _rows(log), "quick": quick}
    how = {"quick": quick, "choose": choose}
    if choose:
        return _jobs_of("gowalla, tried", lambda _: log, run, GOWALLA_TRIED, GOWALLA_PEERS_TRIED, common, **how)
    return _jobs_of("gowalla", lambda _: log, run, GOWALLA_KINDS, GOWALLA_PEERS, common, **how)


def _run(file: str, data: Path, folder: Path, chosen: Kind, *, quick: bool, choose: bool = False) -> Run:
    run = load_config(Run, RUNS / file, [f'data.path="{data}"', f'output="{folder}"'])
    shorter = {"epochs": 1} if quick else BRIEFLY if choose else {}
    return Kind("", train=shorter).of(chosen.of(run))


def _rows(log: Log) -> str:
    """What is learned from and asked, as a part of a record's key."""
    return records.rows_hash(log.files[0].parent, log.valid.folder, log.test.folder)


def _jobs_of(
    part: str,
    log_of_seed: Callable[[int], Log],
    run: Run,
    kinds: Sequence[Kind],
    peers: Sequence[Peer],
    common: Mapping[str, Any],
    *,
    quick: bool,
    choose: bool = False,
) -> list[records.Job]:
    """A job for each model, the cheap ones first."""
    seeds = 1 if quick or choose else SEEDS

    def job(name: str, config: Mapping[str, Any], found: Callable[[Log, int], dict[str, Any]]) -> records.Job:
        def measure(seed: int) -> Mapping[str, Any]:
            return found(log_of_seed(seed), seed)

        return records.Job(f"{part} | {name}", {**common, **config}, seeds, measure)

    def of_peer(kind: Peer) -> records.Job:
        config = {"peer": kind.model, "options": dict(kind.options)}
        return job(kind.name, config, lambda log, seed: told(peer(kind, log, seed).figures, log, choose=choose))

    def of_kind(kind: Kind) -> records.Job:
        return job(kind.name, identity(kind.of(run)), lambda log, seed: ours(kind, log, seed, choose=choose))

    popular = job(
        "popularity", {"peer": "popularity"}, lambda log, _: told(popularity(log).figures, log, choose=choose)
    )
    jobs = [of_peer(kind) for kind in peers] if PEER.exists() else []
    return [*([] if choose else [popular]), *jobs, *(of_kind(kind) for kind in kinds)]


def identity(run: Run) -> dict[str, Any]:
    """What of a run decides a result."""
    ssl = None if run.ssl is None else records.settings_of(run.ssl)
    train = records.settings_of(run.train, "seed", "threads")
    return {"model": run.model.model_dump(mode="json"), "train": train, "ssl": ssl}


def synthetic_jobs(work: Path, *, quick: bool, choose: bool) -> list[records.Job]:
    """A million items of a known truth: what is found of them, and how fast they are served."""
    config = catalogue.catalogue_config(quick=quick)
    run = SYNTHETIC.of(catalogue.catalogue_run(work / f"catalogue{'-quick' if quick else ''}"))
    common = {"bench": "retrieval", **catalogue.catalogue_key(config), "quick": quick}

    @lru_cache(maxsize=1)
    def log_of_seed(seed: int) -> Log:
        return catalogue.catalogue_log(config, run, seed)

    how = {"quick": quick, "choose": choose}
    if choose:
        return _jobs_of("synthetic, tried", log_of_seed, run, SYNTHETIC_TRIED, (), common, **how)

    def truth(seed: int) -> Mapping[str, Any]:
        log, of_seed = log_of_seed(seed), config.model_copy(update={"seed": seed})
        days = {log.valid.folder: catalogue.DAYS - 2, log.test.folder: catalogue.DAYS - 1}
        return told(lambda ranking: catalogue.oracle(of_seed, ranking, days[ranking.folder]), log, choose=False)

    def serving(seed: int) -> Mapping[str, Any]:
        return catalogue.served(SERVED, log_of_seed(seed), seed)

    jobs = _jobs_of("synthetic", log_of_seed, run, SYNTHETIC_KINDS, (), common, **how)
    jobs.insert(0, records.Job("synthetic | oracle", {**common, "peer": "oracle"}, jobs[0].seeds, truth))
    indexes = {kind: settings.model_dump() for kind, settings in catalogue.INDEXES.items()}
    key = {**common, **identity(SERVED.of(run)), "indexes": indexes}
    return [*jobs, records.Job(SERVING, key, 1, serving)]


def esmm_jobs(work: Path, *, quick: bool, choose: bool) -> list[records.Job]:
    """ESMM on the synthetic funnel of `bench.conversion`, its item side told apart in a second task."""
    config = conversion.funnel_config(FUNNEL, quick=quick)
    folder = work / ("esmm-quick" if quick else "esmm")
    common = {"bench": "retrieval", **conversion.funnel_key(config), "quick": quick}

    @lru_cache(maxsize=1)
    def prepared(seed: int) -> tuple[Run, FittedPipeline, pl.DataFrame]:
        return conversion.funnel_log(config, folder, seed)

    def job(kind: Kind) -> records.Job:
        def measure(seed: int) -> Mapping[str, Any]:
            run, fitted, test = prepared(seed)
            return conversions(kind.of(run), fitted, test, seed, kind.name, choose=choose)

        part = "esmm, tried" if choose else "esmm"
        key = {**common, **identity(kind.of(conversion.funnel_run(config, folder)))}
        return records.Job(f"{part} | {kind.name}", key, 1 if quick or choose else SEEDS, measure)

    return [job(kind) for kind in (ESMM_TRIED if choose else ESMM_KINDS)]


def conversions(
    run: Run, fitted: FittedPipeline, test: pl.DataFrame, seed: int, name: str, *, choose: bool
) -> dict[str, Any]:
    """AUC of the conversion if clicked on the validation day's clicks, and what `bench.conversion` measures."""
    files = {role: tuple(examples_of(run, run.source.partitions(role), fitted)) for role in ("train", "valid")}
    schema = run.schema_of(fitted)
    valid = ExampleStream(files["valid"], schema, run.train.batch_size)
    model, trained = trained_model(run, fitted, files["train"], valid, seed, name)
    found = {"valid_auc": trained.history[-1]["p_conversion_given_click.auc"]}
    return found if choose else found | conversion.funnel_figures(conversion.Measured(model, schema), test)


# --- tables ----------------------------------------------------------------------------------------------------------

_BY_SLICE = {
    "Recall@20": "recall_all",
    "NDCG@20": "ndcg_all",
    "Recall@20, head": "recall_head",
    "torso": "recall_torso",
    "tail": "recall_tail",
}
_OF_LOG = {**_BY_SLICE, "items shown to anybody": "coverage"}
_OF_NEW = {
    "Recall@20": "recall_all",
    "NDCG@20": "ndcg_all",
    "Recall@20, new": "recall_cold",
    "NDCG@20, new": "ndcg_cold",
}
_OF_SYNTHETIC = {**_BY_SLICE, "never clicked": "recall_cold"}
_OF_ESMM = {"pCVR AUC, clicked": "clicked_auc", "pCVR AUC, all": "entire_auc", "pCTCVR AUC, all": "ctcvr_auc"}


def tables(file: Path = RECORDS) -> dict[str, str]:
    """The README's tables, from the records; empty where there are none."""
    movielens = ["popularity", *(k.name for k in (*MOVIELENS_PEERS, *MOVIELENS_KINDS))]
    new = ["popularity", *(k.name for k in (*MOVIELENS_PEERS, *NEW_KINDS))]
    gowalla = ["popularity", *(k.name for k in (*GOWALLA_PEERS, *GOWALLA_KINDS))]
    synthetic = ["oracle", "popularity", *(k.name for k in SYNTHETIC_KINDS)]
    esmm = [k.name for k in ESMM_KINDS]
    published = f"{records.LIGHTGCN}{' |' * len(_OF_LOG)}"
    of_gowalla = _table(file, "gowalla", gowalla, _OF_LOG)
    return {
        "ml-1m": _table(file, "ml-1m", movielens, _OF_LOG),
        "ml-1m gains": _gains(file, "ml-1m", MOVIELENS_KINDS, _BY_SLICE),
        "new items": _table(file, "new items", new, _OF_NEW),
        "new items gains": _gains(file, "new items", NEW_KINDS, _OF_NEW),
        "gowalla": of_gowalla and f"{of_gowalla}\n{published}",
        "synthetic": _table(file, "synthetic", synthetic, _OF_SYNTHETIC),
        "synthetic gains": _gains(file, "synthetic", SYNTHETIC_KINDS, _OF_SYNTHETIC),
        "serving": serving_table(file),
        "esmm": _table(file, "esmm", esmm, _OF_ESMM),
        "esmm gains": _gains(file, "esmm", ESMM_KINDS, _OF_ESMM),
    }


def _table(file: Path, part: str, names: Sequence[str], columns: Mapping[str, str]) -> str:
    rows = records.summary(file, [f"{part} | {name}" for name in names], list(columns.values()))
    if not rows:
        return ""
    lines = [f"| {part} | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = [_cell(row, figure) for figure in columns.values()]
        lines.append(f"| {row['name'].split(' | ')[1]} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], figure: str) -> str:
    if math.isnan(row[figure]):
        return "–"
    return f"{row[figure]:.4f}" + (f" ± {row[f'{figure}_sd']:.4f}" if row["n"] > 1 else "")


def _gains(file: Path, part: str, kinds: Sequence[Kind], columns: Mapping[str, str]) -> str:
    """Differences to the first kind within a seed: mean, deviation, and in how many seeds it is a gain."""
    lines = [f"| {part}, gain over {kinds[0].name} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for kind in kinds[1:]:
        names = (f"{part} | {kind.name}", f"{part} | {kinds[0].name}")
        found = records.differences(file, *names, list(columns.values()))
        if len(found[0]) > 1:
            lines.append(f"| {kind.name} | {' | '.join(records.told(d) for d in found)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def serving_table(file: Path) -> str:
    """By kind of index."""
    figures = [f"{kind}_{what}" for kind in catalogue.INDEXES for what in _OF_INDEX]
    rows = records.summary(file, [SERVING], figures)
    if not rows:
        return ""
    (row,) = rows
    columns = [
        "recall@20 of exact search",
        "build",
        "on disk",
        "queries/s",
        "users/s of `recommend`",
        "its peak memory",
    ]
    lines = [f"| index | {' | '.join(columns)} | runs |", "|---" * (len(columns) + 2) + "|"]
    for kind in catalogue.INDEXES:
        cells = [show(row[f"{kind}_{what}"]) for what, show in _OF_INDEX.items()]
        lines.append(f"| {kind} | {' | '.join(cells)} | {row['n']} |")
    return "\n".join(lines)


def _mebibytes(number: float) -> str:
    return f"{number / 2**20:,.0f} MiB"


_OF_INDEX: dict[str, Callable[[float], str]] = {
    "recall": "{:.4f}".format,
    "build_seconds": "{:,.0f} s".format,
    "bytes": _mebibytes,
    "queries_per_second": "{:,.0f}".format,
    "users_per_second": "{:,.0f}".format,
    "peak": _mebibytes,
}


if __name__ == "__main__":
    main()
