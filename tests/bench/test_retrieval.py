"""`bench.retrieval`: everyone is asked the same, nothing is learned of new items, the tables say what was recorded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from bench import catalogue, rankers, records
from bench import retrieval as bench
from features.readers.catalogue import CatalogueConfig
from recsys.retrieval import COUNT, ITEM, ITEMS, RELEVANT, SEEN, USER, USERS

MOVIES, PEOPLE = 60, 80


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People of one age like the movies of one genre."""
    folder = tmp_path_factory.mktemp("ml-1m")
    rng = np.random.default_rng(0)
    movies = [f"{m}::word{m % 7} film ({1990 + m % 5})::g{m % 4}" for m in range(MOVIES)]
    (folder / "movies.dat").write_text("\n".join(movies))
    people = [f"{u}::{'FM'[u % 2]}::{u % 4}::{u % 3}::00{u}" for u in range(PEOPLE)]
    (folder / "users.dat").write_text("\n".join(people))
    rows = [
        {"user_id": u, "movie_id": int(m), "rating": 5 if m % 4 == u % 4 or rng.random() < 0.2 else 2}
        for u in range(PEOPLE)
        for m in rng.choice(MOVIES, 30, replace=False)
    ]
    pl.DataFrame(rows).write_parquet(folder / "ratings.parquet")
    return folder


@pytest.fixture(scope="module")
def jobs(movielens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, records.Job]:
    work = tmp_path_factory.mktemp("work")
    return {j.name: j for j in bench.movielens_jobs(movielens, work, quick=True, choose=False)}


def log_of(movielens: Path, work: Path, where: str) -> rankers.Log:
    asking = bench._run("ml-1m-retrieval.toml", movielens, work / "asked", bench.MOVIELENS, quick=True)
    data = asking.data.model_copy(update={"where": where})
    return rankers.log_of(asking, asking.model_copy(update={"output": work / "learned", "data": data}))


def test_what_is_asked_does_not_depend_on_what_was_learned(movielens: Path, tmp_path: Path) -> None:
    new = rankers.new_items(pl.Series(range(MOVIES)), 1)
    whole = log_of(movielens, tmp_path / "whole", "rating > 3")
    without = log_of(movielens, tmp_path / "without", f"rating > 3 AND movie_id NOT IN ({', '.join(map(str, new))})")
    assert len(new) == MOVIES // 10
    for one, other in ((whole.valid, without.valid), (whole.test, without.test)):
        users = [pl.read_parquet(r.folder / USERS, columns=[USER, SEEN, RELEVANT]) for r in (one, other)]
        items = [pl.read_parquet(r.folder / ITEMS, columns=[ITEM, COUNT]) for r in (one, other)]
        assert users[0].equals(users[1])
        assert items[0][ITEM].equals(items[1][ITEM])
        cold = items[1].filter(pl.col(COUNT) == 0)[ITEM].to_list()
        assert set(new) & set(items[0][ITEM]) <= set(cold)
    assert not set(without.positives[ITEM]) & set(new)
    assert set(without.positives[ITEM]) | set(new) >= set(whole.positives[ITEM])
    learned = pl.read_parquet(list(without.files)).height
    assert learned == without.positives.height < whole.positives.height
    assert without.counts[1:].sum() == learned  # row 0 stands for no item that is trained on


def test_new_items_are_drawn_anew_for_each_seed() -> None:
    items = pl.Series([f"i{n}" for n in range(200)] * 2)
    drawn = [rankers.new_items(items, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20


def test_popularity_is_what_counting_says(movielens: Path, tmp_path: Path) -> None:
    log = log_of(movielens, tmp_path, "rating > 3")
    found = rankers.popularity(log).figures(log.test)
    counts = dict(log.positives[ITEM].value_counts().iter_rows())
    items = pl.read_parquet(log.test.folder / ITEMS, columns=[ITEM])[ITEM].to_list()
    recalls: list[float] = []
    for seen, relevant in pl.read_parquet(log.test.folder / USERS, columns=[SEEN, RELEVANT]).iter_rows():
        left = sorted((i for i in range(len(items)) if i not in seen), key=lambda i: -counts.get(items[i], 0))
        last = counts.get(items[left[rankers.K - 1]], 0)
        sure = {i for i in left if counts.get(items[i], 0) > last}
        tied = [i for i in left if counts.get(items[i], 0) == last]
        chance = (rankers.K - len(sure)) / len(tied)  # which of those as popular as the last is shown, nobody says
        recalls.append(sum(1 if i in sure else chance * (i in tied) for i in relevant) / len(relevant))
    assert found["recall_all"] == pytest.approx(np.mean(recalls), abs=0.05)


def test_what_was_never_learned_comes_last() -> None:
    users, items = pl.Series([3, 5]), pl.Series(["a", "b", "c", "d"])
    vectors = rankers.Vectors(users, items, torch.tensor([[1.0], [-1.0]]), torch.tensor([[-9.0], [2.0], [5.0], [0.0]]))
    known = rankers.known_first(vectors, np.array([0, 1, 1]))
    order_UI = (known.users_UD @ known.items_ID.T).argsort(1, descending=True)
    assert order_UI[:, :2].tolist() == [[1, 0], [0, 1]]
    score_UI = known.users_UD @ known.items_ID.T
    assert score_UI[:, :2].tolist() == [[-9.0, 2.0], [9.0, -2.0]]  # the others' scores are as they were


def test_ids_are_found_by_value() -> None:
    known = pl.Series([2, 3, 5, 7])
    assert rankers.places(known, pl.Series([7, 2, 7])).tolist() == [3, 0, 3]
    with pytest.raises(AssertionError, match="not known"):
        rankers.places(known, pl.Series([4]))


@pytest.mark.parametrize("name", ["ml-1m | two-tower", "new items | two-tower, CFM"])
def test_a_model_is_trained_and_asked(jobs: dict[str, records.Job], name: str) -> None:
    found = jobs[name].measure(1)
    assert 0 < found["recall_all"] <= 1
    assert 0 < found["valid_recall_all"] <= 1
    assert (found["recall_cold"] is not None) == name.startswith("new")


def test_records_of_different_settings_have_different_keys(jobs: dict[str, records.Job]) -> None:
    hashes = [records.config_hash(j.config) for j in jobs.values()]
    assert len(set(hashes)) == len(hashes)


def test_every_ssl_of_esmm_is_of_the_item(tmp_path: Path) -> None:
    first, *others = bench.esmm_jobs(tmp_path, quick=True, choose=False)
    assert first.config["ssl"] is None
    assert all(job.config["ssl"]["item"] == bench._OF_ITEM["item"] for job in others)
    assert all(job.config["model"] == first.config["model"] for job in others)


def test_the_truth_ranks_clicks_best(tmp_path: Path) -> None:
    config = CatalogueConfig(items=400, users=200, themes=10, rows_per_day=4_000)
    log = catalogue.catalogue_log(config, catalogue.catalogue_run(tmp_path), 3)
    best = catalogue.oracle(config.model_copy(update={"seed": 3}), log.test, catalogue.DAYS - 1)
    other = catalogue.oracle(config.model_copy(update={"seed": 4}), log.test, catalogue.DAYS - 1)
    assert best["recall_all"] > 2 * other["recall_all"]
    assert best["recall_all"] > 1.5 * rankers.popularity(log).figures(log.test)["recall_all"]


def test_fewer_users_are_asked_the_same(movielens: Path, tmp_path: Path) -> None:
    whole = log_of(movielens, tmp_path, "rating > 3").test
    fewer = rankers.asking_fewer(whole, 10, tmp_path / "fewer")
    users, all_users = (pl.read_parquet(r.folder / USERS) for r in (fewer, whole))
    assert users.height == 10
    assert users.equals(all_users.filter(pl.col(USER).is_in(users[USER].implode())))
    assert pl.read_parquet(fewer.folder / ITEMS).equals(pl.read_parquet(whole.folder / ITEMS))
    assert rankers.asking_fewer(whole, 1000, tmp_path / "all") is whole


# --- the tables -------------------------------------------------------------------------------------------------------


def written(folder: Path, *found: dict[str, Any]) -> Path:
    path = folder / "records.jsonl"
    lines = [{"config_hash": "x", "commit": "c", "seed": 1, **record} for record in found]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def record(name: str, value: float | None, seed: int = 1, key: str = "x", epochs: int = 1) -> dict[str, Any]:
    figures: dict[str, Any] = dict.fromkeys((*bench._OF_LOG.values(), *bench._OF_NEW.values()), value)
    return {"name": name, "seed": seed, "config_hash": key, "config": {"train": {"epochs": epochs}}, **figures}


def test_gains_are_within_a_seed(tmp_path: Path) -> None:
    first, second = bench.MOVIELENS_KINDS[0].name, bench.MOVIELENS_KINDS[1].name
    file = written(
        tmp_path,
        record(f"ml-1m | {second}", 0.9, key="older"),
        record(f"ml-1m | {first}", 0.20),
        record(f"ml-1m | {first}", 0.30, seed=2),
        record(f"ml-1m | {first}", 0.10, seed=3),
        record(f"ml-1m | {second}", 0.22),
        record(f"ml-1m | {second}", 0.29, seed=2),
    )
    *_, row = bench.tables(file)["ml-1m gains"].splitlines()
    assert row == f"| {second} |{' +0.0050 ± 0.0212 (1/2) |' * len(bench._BY_SLICE)}"
    *_, one, other = bench.tables(file)["ml-1m"].splitlines()
    assert one == f"| {first} |{' 0.2000 ± 0.1000 |' * len(bench._OF_LOG)} 3 |"
    assert other == f"| {second} |{' 0.2550 ± 0.0495 |' * len(bench._OF_LOG)} 2 |"


def test_gains_are_over_what_was_trained_in_the_same_way(tmp_path: Path) -> None:
    first, second, third = (kind.name for kind in bench.MOVIELENS_KINDS[:3])
    found = [record(f"ml-1m | {name}", 0.2, seed, epochs=2) for name in (first, third) for seed in (1, 2)]
    found += [record(f"ml-1m | {second}", 0.3, seed, epochs=3) for seed in (1, 2)]
    assert [row.split(" | ")[0] for row in bench.tables(written(tmp_path, *found))["ml-1m gains"].splitlines()[2:]] == [
        f"| {third}"
    ]


def test_a_slice_without_items_is_said_to_have_none(tmp_path: Path) -> None:
    *_, row = bench.tables(written(tmp_path, record("ml-1m | popularity", None)))["ml-1m"].splitlines()
    assert row == f"| popularity |{' – |' * len(bench._OF_LOG)} 1 |"


def test_what_was_published_stands_below_gowalla(tmp_path: Path) -> None:
    head, _, _, landmark = bench.tables(written(tmp_path, record("gowalla | popularity", 0.1)))["gowalla"].splitlines()
    assert ".1824" in landmark
    assert landmark.count("|") == head.count("|")


def test_an_index_is_a_row_of_what_serving_it_takes(tmp_path: Path) -> None:
    figures = {"recall": 0.98765, "build_seconds": 61.4, "bytes": 3 * 2**20, "queries_per_second": 1234.5}
    figures |= {"users_per_second": 987.6, "peak": 2**31}
    found = {f"{kind}_{name}": value for kind in catalogue.INDEXES for name, value in figures.items()}
    head, _, *rows = bench.serving_table(written(tmp_path, {"name": bench.SERVING, **found})).splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| exact", "| hnsw", "| ivf_pq"]
    assert rows[1] == "| hnsw | 0.9877 | 61 s | 3 MiB | 1,234 | 988 | 2,048 MiB | 1 |"
    assert head.count("|") == rows[1].count("|")


def test_without_records_there_are_no_tables(tmp_path: Path) -> None:
    assert set(bench.tables(tmp_path / "none.jsonl").values()) == {""}
