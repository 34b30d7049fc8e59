"""Full ranking against a few lines of numpy that sort everything."""

from itertools import product
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray
from polars.testing import assert_frame_equal

from base.config import parse_config
from base.errors import ConfigError
from recsys import retrieval
from recsys.retrieval import SLICES, Cuts, Pairs, measure, measure_scores, popularity

Lists = list[NDArray[np.int64]]


def pairs(lists: Lists) -> Pairs:
    bounds = np.cumsum([0, *map(len, lists)])
    return Pairs(bounds, np.concatenate([*lists, np.arange(0)]))


def question(users: int, items: int, seed: int = 0) -> tuple[Any, Any, Lists, Lists, NDArray[np.int64]]:
    """Vectors, what users have seen and should get (some nothing), and training counts, of which some are 0."""
    rng = np.random.default_rng(seed)
    queries, vectors = rng.normal(size=(users, 8)), rng.normal(size=(items, 8))
    orders = [rng.permutation(items) for _ in range(users)]
    seen = [np.sort(order[: rng.integers(0, items - 10)]) for order in orders]
    relevant = [np.sort(order[-rng.integers(1, 9) :]) for order in orders]
    return queries, vectors, seen, [r if i % 5 else r[:0] for i, r in enumerate(relevant)], rng.integers(0, 6, items)


def by_sorting(queries: Any, vectors: Any, seen: Lists, relevant: Lists, slices: Any, k: int, name: str) -> list[Any]:
    own = {i for i in range(len(vectors)) if name == "all" or SLICES[slices[i]] == name}
    found: list[list[float]] = []
    shown: set[int] = set()
    for u, scores in enumerate(queries @ vectors.T):
        known = set(seen[u])
        unseen = [i for i in np.argsort(-scores) if i not in known]
        shown |= set(unseen[:k])
        wanted = set(relevant[u]) & own
        if not wanted:
            continue
        hits = [i in wanted for i in unseen[:k]]
        dcg = sum(hit / np.log2(place + 2) for place, hit in enumerate(hits))
        ideal = sum(1 / np.log2(place + 2) for place in range(min(k, len(wanted))))
        precisions = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
        first = 1 + min(unseen.index(i) for i in wanted)
        found.append([sum(hits) / len(wanted), dcg / ideal, sum(precisions) / min(k, len(wanted)), 1 / first])
    return [name, k, len(found), len(own), *np.mean(found, axis=0), len(shown & own) / len(own)]


@pytest.mark.parametrize(("items", "chunk"), [(60, 2**22), (60, 60 * 7), (1003, 1003 * 7)])
def test_every_metric_is_that_of_sorting(items: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last case there are blocks enough for the fast search of the first K."""
    monkeypatch.setattr(retrieval, "_CHUNK", chunk)
    queries, vectors, seen, relevant, counts = question(40, items)
    slices, k = popularity(counts, Cuts()), (3, 12)
    parts = torch.from_numpy(queries).split(13)
    table = measure(parts, torch.from_numpy(vectors), pairs(seen), pairs(relevant), slices, k).table
    assert table.height == len(SLICES) * len(k)
    for row, (name, cut) in zip(table.iter_rows(), product(SLICES, k), strict=True):
        expected = by_sorting(queries, vectors, seen, relevant, slices, cut, name)
        assert list(row[:4]) == expected[:4]
        np.testing.assert_allclose(row[4:], expected[4:], rtol=1e-9)
    users = table["users"].to_list()
    assert min(users) < max(users) < 40
    brief = measure(parts, torch.from_numpy(vectors), pairs(seen), pairs(relevant), slices, k, brief=True).table
    assert brief.drop("mrr").equals(table.filter(slice="all").drop("mrr"))
    assert brief["mrr"].null_count() == 2


@pytest.mark.parametrize("items", [61, 64])
def test_scores_of_any_origin_are_measured_alike(items: int) -> None:
    queries, vectors, seen, relevant, counts = question(40, items)
    slices = popularity(counts, Cuts())
    of_vectors = measure([torch.from_numpy(queries)], torch.from_numpy(vectors), pairs(seen), pairs(relevant),
                         slices, (3, 12))  # fmt: skip
    chunks = torch.from_numpy(queries @ vectors.T).split(11)
    found = measure_scores(chunks, pairs(seen), pairs(relevant), slices, (3, 12))
    assert_frame_equal(found.table, of_vectors.table, rel_tol=1e-12)
    np.testing.assert_allclose(found.recall_QS, of_vectors.recall_QS)
    with pytest.raises(ConfigError, match=rf"the corpus has {items} items"):
        measure_scores(chunks, pairs(seen), pairs(relevant), slices, (65,))


def test_each_querys_recall_has_the_means_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_CHUNK", 60 * 7)
    queries, vectors, seen, relevant, counts = question(40, 60)
    slices = popularity(counts, Cuts())
    parts = torch.from_numpy(queries).split(13)
    found = measure(parts, torch.from_numpy(vectors), pairs(seen), pairs(relevant), slices, (12, 3))
    assert found.recall_QS.shape == (40, len(SLICES))
    assert [np.isnan(row[0]) for row in found.recall_QS] == [not len(r) for r in relevant]
    table = found.table.filter(k=12)
    np.testing.assert_allclose(np.nanmean(found.recall_QS, axis=0), table["recall"], rtol=1e-12)
    assert np.isfinite(found.recall_QS).sum(axis=0).tolist() == table["users"].to_list()


def test_the_fast_search_finds_what_topk_finds() -> None:
    scores = torch.randn(20, 16 * 400, generator=torch.Generator().manual_seed(0))
    scores[:5, :6000] = -torch.inf
    best, places = retrieval._top(scores, 50)
    assert best.equal(scores.topk(50).values)
    assert scores.gather(1, places).equal(best)
    assert all(len(set(row)) == 50 for row in places.tolist())


def test_popularity_is_by_training_rows() -> None:
    counts = np.array([5, 0, 9, 1, 5, 2, 0, 7, 1, 3, 1, 1])
    found = [SLICES[i] for i in popularity(counts, Cuts(head=0.2, torso=0.3))]
    assert found == ["torso", "cold", "head", "tail", "torso", "tail", "cold", "head", "tail", "torso", "tail", "tail"]
    everything = popularity(counts, Cuts(head=1, torso=0))
    assert [SLICES[i] for i in everything] == ["cold" if not n else "head" for n in counts]


def test_ties_count_against_a_model_without_opinion() -> None:
    """One vector for all items: the reciprocal rank is that of the last one, not 1."""
    relevant, slices = pairs([np.array([3])] * 4), np.full(50, 1)
    table = measure([torch.ones(4, 4)], torch.ones(50, 4), pairs([np.array([7])] * 4), relevant, slices, (5,)).table
    assert table["mrr"][0] == pytest.approx(1 / 49)


def test_who_has_seen_almost_everything_is_shown_the_rest_alone() -> None:
    """The places left over are no hits, and cover nothing."""
    seen = pairs([np.arange(1, 10)])
    table = measure([torch.ones(1, 4)], torch.ones(10, 4), seen, pairs([np.array([0])]), np.full(10, 1), (1, 5)).table
    assert table.filter(slice="all").select("recall", "ndcg", "coverage").rows() == [(1.0, 1.0, 0.1)] * 2


def test_nobody_to_measure_gives_null_and_more_than_there_is_is_refused() -> None:
    nothing = pairs([np.arange(0)] * 3)
    table = measure([torch.ones(3, 4)], torch.ones(10, 4), nothing, nothing, np.full(10, 1), (5,)).table
    assert table["users"].to_list() == [0] * 5
    assert table.select(pl.col("recall", "ndcg", "map", "mrr").is_null().all()).row(0) == (True,) * 4
    with pytest.raises(ConfigError, match=r"retrieval\.k = \[5, 11\]: the corpus has 10 items; ask for fewer"):
        measure([torch.ones(3, 4)], torch.ones(10, 4), nothing, nothing, np.full(10, 1), (5, 11))
    with pytest.raises(ConfigError, match="head and torso add up to"):
        parse_config(Cuts, {"head": 0.8, "torso": 0.3}, source="test")
