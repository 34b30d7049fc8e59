"""The item index by itself: recall, what has been seen, determinism, settings, and artefacts that do not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
import pytest
import torch
from pydantic import TypeAdapter

from base.errors import ArtefactError, ConfigError
from base.storage import publish, read_manifest, resolve
from features.pipeline import FeaturePipeline
from features.transforms import Vocabulary
from recsys.bundle import Bundle
from recsys.models import build_model
from recsys.models.two_tower import TwoTowerConfig
from recsys.retrieval import Pairs
from recsys.towers import vectors_of
from serving.index import KIND, ExactConfig, HNSWConfig, IndexConfig, ItemIndex, IVFPQConfig, Vectors, publish_index

MANY, FEW, USERS, DIM, GROUPS = 11_000, 500, 60, 16, 40


def settings_of(**settings: Any) -> Any:
    return TypeAdapter(IndexConfig).validate_python(settings)


EXACT = settings_of(kind="exact")
HNSW = settings_of(kind="hnsw", neighbours=16, search_depth=96)
IVF_PQ = settings_of(kind="ivf_pq", probes=64)
KINDS = pytest.mark.parametrize("settings", [EXACT, HNSW, IVF_PQ], ids=lambda s: s.kind)


def test_a_kind_need_not_be_given() -> None:
    assert settings_of(min_recall=0.5) == settings_of(kind="exact", min_recall=0.5)


def bundle_of(folder: Path, items: int, seed: int = 0) -> Bundle:
    """Two towers of ids alone, their vectors drawn around a few centres, as those of trained ones lie."""
    frame = pl.DataFrame({"user": np.arange(max(items, USERS)) % USERS, "item": np.arange(max(items, USERS)) % items})
    fitted = FeaturePipeline((Vocabulary(column="user"), Vocabulary(column="item"))).fit(frame.lazy())
    config = TwoTowerConfig(query=("user",), item=("item",), dim=DIM)
    schema = fitted.schema(["user", "item"], ["liked"], item="item")
    model = build_model(config, schema)
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(GROUPS, DIM, generator=draw)
    with torch.no_grad():
        for weights in model.parameters():
            which = torch.randint(GROUPS, (len(weights),), generator=draw)
            weights.copy_(centres[which] + 0.5 * torch.randn(weights.shape, generator=draw))
    parts: Any = {"model_config": config, "features": fitted, "schema": schema, "settings": {}, "metrics": {}}
    return Bundle(model=model.eval(), golden=pl.DataFrame(), **parts).save(folder)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(tmp_path_factory.mktemp("many") / "bundle", MANY)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(tmp_path_factory.mktemp("few") / "bundle", FEW)


def corpus(items: int) -> pl.DataFrame:
    return pl.DataFrame({"item": np.arange(items), "genre": [[f"g{i % 3}"] * (i % 2) for i in range(items)]})


def queries_of(bundle: Bundle) -> Vectors:
    return np.concatenate(list(vectors_of(bundle, pl.LazyFrame({"user": np.arange(USERS)}), "query")))


def build(bundle: Bundle, items: int, target: Path, settings: Any = EXACT, k: int = 20, **options: Any) -> ItemIndex:
    publish_index(bundle, corpus(items), queries_of(bundle), target, settings, k=k, about={"of": "a test"}, **options)
    return ItemIndex.load(target, bundle)


@pytest.fixture(scope="module")
def built(many: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """An index of many items, of each kind once."""
    folder = tmp_path_factory.mktemp("built")

    def built(settings: Any) -> Path:
        if not (folder / settings.kind).exists():
            build(many, MANY, folder / settings.kind, settings)
        return folder / settings.kind

    return built


def drawn_pairs(items: int, most: int = 100, seed: int = 1) -> Pairs:
    """What users have seen: nothing, or up to `most` items."""
    draw = np.random.default_rng(seed)
    seen = [
        np.sort(draw.choice(items, n, replace=False))
        for n in draw.integers(0, most + 1, USERS) * (np.arange(USERS) % 5 > 0)
    ]
    bounds = np.concatenate([[0], np.cumsum([len(s) for s in seen])])
    return Pairs(bounds, np.concatenate(seen).astype(np.int32))


def brute_force(index: ItemIndex, queries_QD: Vectors, seen: Pairs, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All inner products in double precision, those of seen items removed."""
    scores = queries_QD.astype(np.float64) @ index.vectors_ID.astype(np.float64).T
    rows, items = seen.of(0, len(queries_QD))
    scores[rows, items] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


@KINDS
def test_it_finds_what_an_exact_search_finds_without_what_was_seen(
    many: Bundle, built: Callable[[Any], Path], settings: Any
) -> None:
    index = ItemIndex.load(built(settings), many)
    queries, seen = queries_of(many), drawn_pairs(MANY)
    found = index.search(queries, seen.of(0, USERS), 20)
    expected, best = brute_force(index, queries, seen, 20)
    assert (found.places_QK >= 0).all()
    rows, places = seen.of(0, USERS)
    assert not np.isin(np.arange(USERS)[:, None] * MANY + found.places_QK, rows * MANY + places).any()
    assert all(len(set(row)) == 20 for row in found.places_QK.tolist())
    exact = np.einsum("qd,qkd->qk", queries, index.vectors_ID[found.places_QK])
    np.testing.assert_allclose(found.similarity_QK, exact, atol=1e-6)  # of compressed vectors as well
    assert (np.diff(found.similarity_QK, axis=1) <= 0).all()
    share = np.mean(
        [len(set(a) & set(b)) / 20 for a, b in zip(found.places_QK.tolist(), expected.tolist(), strict=True)]
    )
    assert share >= (1 if settings.kind == "exact" else 0.95)
    if settings.kind == "exact":
        np.testing.assert_allclose(found.similarity_QK, best, atol=1e-6)
    about = read_manifest(resolve(built(settings), KIND)).about
    assert (about["kind"], about["items"], about["dimension"], about["k"]) == (settings.kind, MANY, DIM, 20)
    assert (about["bundle"], about["queries"], about["of"]) == (many.version, USERS, "a test")
    assert settings.min_recall <= about["recall"] <= 1
    assert about["build_seconds"] >= 0
    assert index.items.equals(corpus(MANY))


@KINDS
def test_built_twice_it_has_the_same_bytes(
    many: Bundle, built: Callable[[Any], Path], tmp_path: Path, settings: Any
) -> None:
    build(many, MANY, tmp_path / "again", settings)
    first, second = (read_manifest(resolve(path)).files for path in (built(settings), tmp_path / "again"))
    assert first == second
    assert ("vectors.npy" in first) == (settings.kind == "ivf_pq")


def test_an_approximate_index_that_finds_too_few_is_searched_exactly(
    many: Bundle, built: Callable[[Any], Path]
) -> None:
    index = ItemIndex.load(built(IVF_PQ), many)
    assert (index.faiss.nlist, index.faiss.pq.M) == (282, 4)  # the defaults suit corpus and dimension
    index.faiss.nprobe = 1
    queries, seen = queries_of(many), drawn_pairs(MANY)
    found = index.search(queries, seen.of(0, USERS), 300)
    assert found.exactly > USERS / 2
    assert (found.places_QK >= 0).all()
    expected, _ = brute_force(index, queries, seen, 300)
    same = [set(a) == set(b) for a, b in zip(found.places_QK.tolist(), expected.tolist(), strict=True)]
    assert sum(same) >= found.exactly
    assert index.recall(queries, 300) < 0.5  # which is of the index alone
    exact = ItemIndex.load(built(EXACT), many)
    assert exact.search(queries, seen.of(0, USERS), 300).exactly == 0


def test_who_has_seen_almost_all_gets_the_rest(few: Bundle, tmp_path: Path) -> None:
    for settings in (EXACT, HNSW):
        index = build(few, FEW, tmp_path / settings.kind, settings)
        everything, rest = np.arange(FEW), np.delete(np.arange(FEW), [3, 77, 200])
        rows = np.repeat([0, 1], [FEW, FEW - 3])
        found = index.search(queries_of(few)[:3], (rows, np.concatenate([everything, rest]).astype(np.int32)), 5)
        assert found.places_QK[0].tolist() == [-1] * 5
        assert np.isneginf(found.similarity_QK[0]).all()
        assert sorted(found.places_QK[1].tolist()) == [-1, -1, 3, 77, 200]
        assert (found.places_QK[2] >= 0).all()


def test_equal_items_come_in_their_order(few: Bundle, tmp_path: Path) -> None:
    items = pl.DataFrame({"item": np.arange(FEW) + 10**6})  # all unknown: one vector
    publish_index(few, items, queries_of(few), tmp_path / "index", EXACT, k=FEW, about={})
    index = ItemIndex.load(tmp_path / "index", few)
    nothing = np.empty(0, dtype=np.int64)
    found = index.search(queries_of(few)[:2], (nothing, nothing), FEW)
    assert found.places_QK.tolist() == [list(range(FEW))] * 2


def test_a_build_that_finds_too_little_publishes_nothing(many: Bundle, tmp_path: Path) -> None:
    poor = settings_of(kind="ivf_pq", lists=20, probes=1, refine=1, subvectors=2)
    with pytest.raises(
        ConfigError,
        match=r"recall@20 is 0\.\d{4} against exact search on 60 users, index\.min_recall = 0\.95: raise index\.probes "
        r"\(1\) or index\.refine \(1\), then index\.subvectors \(2\)",
    ):
        build(many, MANY, tmp_path / "index", poor)
    assert list(tmp_path.glob("index*")) == []
    assert list(tmp_path.glob(".versions/*")) == []
    sparse = settings_of(kind="hnsw", neighbours=4, build_depth=1, search_depth=1, min_recall=1)
    with pytest.raises(
        ConfigError, match=r"raise index\.search_depth \(1\), then index\.build_depth \(1\) or index\.n"
    ):
        build(many, MANY, tmp_path / "index", sparse)


@pytest.mark.parametrize(
    ("items", "settings", "message"),
    [
        (FEW, IVF_PQ, r'"ivf_pq" learns its codes from 9,984 items at least; the corpus has 500: choose "exact"'),
        (MANY, settings_of(kind="ivf_pq", lists=283), r"index\.lists = 283: .* 11,000; set it to 282 or fewer"),
        (MANY, settings_of(kind="ivf_pq", subvectors=5), r"index\.subvectors = 5: must divide the dimension 16"),
    ],
)
def test_corpora_that_do_not_fit_the_kind(
    many: Bundle, few: Bundle, tmp_path: Path, items: int, settings: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(few if items == FEW else many, items, tmp_path / "index", settings)


def test_more_than_the_corpus_holds_is_refused(few: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="asks for 501 items; the corpus has 500"):
        build(few, FEW, tmp_path / "index", k=FEW + 1)


def test_towers_of_another_version_are_refused(few: Bundle, tmp_path: Path) -> None:
    build(few, FEW, tmp_path / "index")
    other = bundle_of(tmp_path / "other", FEW, seed=1)
    with pytest.raises(
        ArtefactError, match=f"is the index of bundle {few.version}, the model is bundle {other.version}"
    ):
        ItemIndex.load(tmp_path / "index", other)


def test_towers_that_compute_something_else_are_refused(few: Bundle, tmp_path: Path) -> None:
    build(few, FEW, tmp_path / "index")
    other = replace(bundle_of(tmp_path / "other", FEW, seed=1), version=few.version)
    with pytest.raises(ArtefactError, match=rf"bundle {few.version} gives its golden items other vectors, by [\d.]+"):
        ItemIndex.load(tmp_path / "index", other)


def altered(few: Bundle, target: Path, change: Callable[[Path], None]) -> Path:
    """An index that is whole by its manifest, which was made after the change."""
    build(few, FEW, target)
    folder = resolve(target)
    with publish(target, KIND, overwrite=True) as staging:
        for name in read_manifest(folder).files:
            (staging / name).write_bytes((folder / name).read_bytes())
        change(staging.folder)
        staging.about.update(read_manifest(folder).about)
    return target


def of_other_size(items: int, dimension: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index: Any = faiss.IndexFlatIP(dimension)
        index.add(np.ones((items, dimension), dtype=np.float32))
        faiss.write_index(index, str(folder / "items.faiss"))

    return change


def fewer_items(folder: Path) -> None:
    corpus(FEW - 1).write_parquet(folder / "items.parquet")


def no_index(folder: Path) -> None:
    (folder / "items.faiss").write_bytes(b"no index at all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_other_size(FEW, 8), "differs in the dimension: 16 in the bundle's vectors, 8 in the index"),
        (
            of_other_size(FEW + 2, DIM),
            "differs in the number of items: 500 in the manifest, 500 in items.parquet, 502 in",
        ),
        (fewer_items, "differs in the number of items: 500 in the manifest, 499 in items.parquet, 500 in the index"),
        (no_index, "cannot be read"),
    ],
)
def test_parts_that_do_not_belong_together(
    few: Bundle, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    with pytest.raises(ArtefactError, match=message):
        ItemIndex.load(altered(few, tmp_path / "index", change), few)


def test_an_altered_file_is_named(few: Bundle, tmp_path: Path) -> None:
    build(few, FEW, tmp_path / "index")
    path = resolve(tmp_path / "index") / "items.faiss"
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"items\.faiss: differs from its checksum"):
        ItemIndex.load(tmp_path / "index", few)
    with pytest.raises(ArtefactError, match="nothing is published there; run `recsys index`"):
        ItemIndex.load(tmp_path / "elsewhere", few)


def test_threads_of_the_build_do_not_outlive_it(few: Bundle, tmp_path: Path) -> None:
    before = faiss.omp_get_max_threads()
    build(few, FEW, tmp_path / "index", settings_of(kind="hnsw", threads=before + 1))
    assert faiss.omp_get_max_threads() == before


@pytest.mark.parametrize("config", [ExactConfig, HNSWConfig, IVFPQConfig])
def test_every_kind_needs_the_same_recall_by_default(config: Any) -> None:
    assert config.model_fields["min_recall"].default == 0.95
