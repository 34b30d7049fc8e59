"""The item index: FAISS over the item vectors of a two-tower Bundle, with the items themselves and proof of both.

Similarities that it returns are exact inner products of the towers' vectors, whatever kind of index found the items.
Who has seen items is asked for that many more, so that K unseen ones are left; where an approximate index finds fewer,
that query is searched exactly, and counted.
"""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, assert_never

import faiss
import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PositiveInt, TypeAdapter

from base.config import Config
from base.errors import ArtefactError, ConfigError, DataError
from base.storage import publish, resolve, verify
from features.schema import carried
from recsys.bundle import Bundle
from recsys.retrieval import Places
from recsys.towers import inputs_of, towers_of, vectors_of

# Shape suffixes: I = items, Q = queries, C = queries of a chunk, A = items asked for, K = places, D = dimension,
# X = pairs of a query and an item.

KIND = "index"
QUERIES = 1000
"""Queries that recall is measured on, if there are as many."""

_FAISS, _ITEMS, _VECTORS, _GOLDEN = "items.faiss", "items.parquet", "vectors.npy", "golden.parquet"
_VECTOR = carried("vector")
_GOLDEN_ITEMS = 32
_GOLDEN_TOLERANCE = 1e-6
_CELLS = 2**23
"""Numbers computed at a time."""
_TRAINING_ITEMS = 39
"""Per centroid: FAISS calls fewer too few."""
_CODES = 256
"""Of each part of a vector: a byte."""

Vectors: TypeAlias = NDArray[np.float32]


class _Settings(Config):
    """What every kind of index has."""

    min_recall: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Share of the items of an exact search that it must find among the first K; below it nothing is published."""
    columns: tuple[str, ...] | None = None
    """Raw columns of the corpus to keep beside those of the item's features, for a ranking model to read: by default
    all of `retrieval.items`, or those of the log's [[tables]] whose key is the item."""
    threads: PositiveInt = 1
    """Of the build. With more than one it is faster, and its bytes are not the same twice."""


class ExactConfig(_Settings):
    """Every item is compared: up to some 100,000 items the simplest, and fast enough."""

    kind: Literal["exact"] = "exact"


class HNSWConfig(_Settings):
    """A graph of near items (Malkov and Yashunin 2018): fast; takes the vectors and 8 bytes × `neighbours` an item."""

    kind: Literal["hnsw"]
    neighbours: Annotated[int, Field(ge=4, le=256)] = 32
    """Edges of an item; twice as many on the ground level."""
    build_depth: PositiveInt = 64
    """Candidates looked at for the edges of each item."""
    search_depth: PositiveInt = 256
    """Candidates looked at for each query, or as many as are asked for. With 128 recall@20 of a million items was .92,
    below the default `min_recall`; with 256 .96."""


class IVFPQConfig(_Settings):
    """Inverted lists of compressed vectors (Jégou et al. 2011): a few bytes of memory an item, for very many items.

    The best candidates are compared by their whole vectors, which are read from disk.
    """

    kind: Literal["ivf_pq"]
    lists: PositiveInt | None = None
    """Into which the items are divided; by default 4 × the root of their number, with 39 items each at least."""
    probes: PositiveInt = 32
    """Lists that are searched for each query."""
    subvectors: PositiveInt | None = None
    """Bytes of a compressed vector, a divisor of its dimension; by default about a quarter of it."""
    refine: PositiveInt = 8
    """So many times the items asked for are compared by their whole vectors."""


def _exact_by_default(settings: Any) -> Any:
    """Pydantic takes no default for the field that tells kinds apart."""
    return {"kind": "exact", **settings} if isinstance(settings, Mapping) else settings


IndexConfig = Annotated[
    ExactConfig | HNSWConfig | IVFPQConfig, Field(discriminator="kind"), BeforeValidator(_exact_by_default)
]
_CONFIG: TypeAdapter[ExactConfig | HNSWConfig | IVFPQConfig] = TypeAdapter(IndexConfig)


@dataclass(frozen=True)
class Found:
    """The best items of each query that it has not seen, best first; ties in the order of the items."""

    places_QK: NDArray[np.int64]
    """Positions of items; -1 where there are no more."""
    similarity_QK: Vectors
    """-inf where there are no more."""
    exactly: int
    """Queries that were searched exactly since an approximate index had found too few."""


@dataclass(frozen=True)
class ItemIndex:
    """Items and their vectors, ready to be searched."""

    settings: ExactConfig | HNSWConfig | IVFPQConfig
    items: pl.DataFrame
    """Raw columns; an item's row is its position in the index."""
    vectors_ID: Vectors
    """As the item tower gives them; for `ivf_pq` they stay on disk."""
    about: Mapping[str, Any]
    """Of its manifest: bundle, kind, items, dimension, k, recall, queries, build_seconds, and what decided it."""
    faiss: Any

    def __len__(self) -> int:
        return len(self.vectors_ID)

    @classmethod
    def load(cls, target: Path, bundle: Bundle) -> "ItemIndex":
        """Read a published index for the towers of `bundle`.

        Raises ArtefactError where a file is missing or altered, or where index and bundle do not belong together: by
        the bundle's version, the dimension, the number of items, or the vectors that the bundle gives golden items.
        """
        folder = resolve(target, KIND, made_by="`recsys index`")
        about = verify(folder).about
        if about.get("bundle") != bundle.version:
            raise ArtefactError(
                f"{target}: is the index of bundle {about.get('bundle')}, the model is bundle {bundle.version}; build "
                "its own with `recsys index --overwrite` or `recsys recommend --build-index`, or name the model of the "
                "index with --model"
            )
        try:
            settings = _CONFIG.validate_python(about["index"])
            found: Any = faiss.read_index(str(folder / _FAISS))
            items, golden = pl.read_parquet(folder / _ITEMS), pl.read_parquet(folder / _GOLDEN)
            vectors_ID = _vectors_within(found, folder)
        except (KeyError, ValueError, RuntimeError, OSError, pl.exceptions.PolarsError) as error:
            first = str(error).splitlines()[0]
            raise ArtefactError(f"{target}: cannot be read ({first}); build it again with `recsys index`") from None
        dimensions = {
            "the bundle's vectors": towers_of(bundle).dim,
            "the index": found.d,
            _VECTORS: vectors_ID.shape[1],
        }
        numbers = {"the manifest": about.get("items"), _ITEMS: items.height, "the index": found.ntotal}
        for what, counts in (("dimension", dimensions), ("number of items", numbers)):
            if len(set(counts.values())) > 1:
                said = ", ".join(f"{count} in {where}" for where, count in counts.items())
                raise ArtefactError(f"{target}: differs in the {what}: {said}; build it again with `recsys index`")
        index = cls(settings, items, vectors_ID, about, found)
        index._check_golden(target, golden, bundle)
        return index

    def search(self, queries_QD: Vectors, seen: tuple[Places, Places], k: int) -> Found:
        """The first `k` items of each query without those seen: rows_X, ascending, and places_X, ascending in a row."""
        queries, items = len(queries_QD), len(self)
        hidden_X = seen[0].astype(np.int64) * items + seen[1]
        seen_Q = np.bincount(seen[0], minlength=queries)
        places_QK, similarity_QK = self._by_index(queries_QD, hidden_X, seen_Q, k)
        short_X = np.flatnonzero((places_QK >= 0).sum(1) < np.minimum(k, items - seen_Q))
        for which_C in _cut(short_X, items):
            places_QK[which_C], similarity_QK[which_C] = self._exact(queries_QD[which_C], which_C, hidden_X, k)
        return Found(places_QK, similarity_QK, len(short_X))

    def recall(self, queries_QD: Vectors, k: int) -> float:
        """Share of the first `k` items of an exact search that the index itself finds; of equal ones any."""
        queries = len(queries_QD)
        nothing = np.empty(0, dtype=np.int64)
        _, found_QK = self._by_index(queries_QD, nothing, np.zeros(queries, dtype=np.int64), k)
        hits = 0
        for which_C in _cut(np.arange(queries), len(self)):
            _, best_CK = self._exact(queries_QD[which_C], which_C, nothing, k)
            least_C1 = best_CK[:, -1:]
            hits += int((found_QK[which_C] >= least_C1 - 1e-6 * np.maximum(1, np.abs(least_C1))).sum())
        return hits / (queries * k)

    def _by_index(
        self, queries_QD: Vectors, hidden_X: NDArray[np.int64], seen_Q: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], Vectors]:
        """Places and similarities as in `Found`, of which an approximate index may leave some out."""
        queries, items = len(queries_QD), len(self)
        places_QK = np.full((queries, k), -1, dtype=np.int64)
        similarity_QK = np.full((queries, k), -np.inf, dtype=np.float32)
        # FAISS takes one number for all queries of a call: those who have seen much would slow down all others.
        ask_Q = np.minimum(k + _power_above(seen_Q), items)
        for ask in np.unique(ask_Q).tolist():
            for which_C in _cut(np.flatnonzero(ask_Q == ask), ask * self._refine):
                places_CA, similarity_CA = self._near(queries_QD[which_C], ask)
                is_hidden = (places_CA < 0) | _contains(hidden_X, which_C[:, None] * items + places_CA)
                similarity_CA[is_hidden] = -np.inf
                places_QK[which_C], similarity_QK[which_C] = _best(places_CA, similarity_CA, k)
        return places_QK, similarity_QK

    @property
    def _refine(self) -> int:
        return self.settings.refine if isinstance(self.settings, IVFPQConfig) else 1

    def _near(self, queries_CD: Vectors, ask: int) -> tuple[NDArray[np.int64], Vectors]:
        """Places, -1 where there are none, and exact similarities of at least the items asked for, in any order."""
        similarity_CA, places_CA = self.faiss.search(queries_CD, min(ask * self._refine, len(self)))
        if isinstance(self.settings, IVFPQConfig):
            for which in _cut(np.arange(len(queries_CD)), similarity_CA.shape[1] * queries_CD.shape[1]):
                vectors_CAD = self.vectors_ID[places_CA[which]]
                similarity_CA[which] = np.einsum("cd,cad->ca", queries_CD[which], vectors_CAD)
        return places_CA, similarity_CA

    def _exact(
        self, queries_CD: Vectors, which_C: NDArray[np.int64], hidden_X: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], Vectors]:
        """The same by comparing all items; queries are numbered by `which_C` in the hidden pairs."""
        items = len(self)
        scores_CI = queries_CD @ self.vectors_ID.T
        for i, query in enumerate(which_C.tolist()):
            first, last = np.searchsorted(hidden_X, (query * items, (query + 1) * items))
            scores_CI[i, hidden_X[first:last] - query * items] = -np.inf
        top_CK = np.argpartition(-scores_CI, k - 1, axis=1)[:, :k]
        return _best(top_CK, np.take_along_axis(scores_CI, top_CK, axis=1), k)

    def _check_golden(self, target: Path, golden: pl.DataFrame, bundle: Bundle) -> None:
        expected = golden[_VECTOR].to_numpy()
        found = np.concatenate(list(vectors_of(bundle, golden.lazy(), "item")))
        difference = float(np.abs(found - expected).max())
        if not difference <= _GOLDEN_TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise ArtefactError(
                f"{target}: bundle {bundle.version} gives its golden items other vectors, by {difference:g}: the index "
                "was altered, or this machine does not compute what the one did that built it; build it again with "
                "`recsys index --overwrite`"
            )


def publish_index(
    bundle: Bundle,
    items: pl.DataFrame,
    queries_QD: Vectors,
    target: Path,
    settings: ExactConfig | HNSWConfig | IVFPQConfig,
    *,
    k: int,
    about: Mapping[str, Any],
    overwrite: bool = False,
) -> Mapping[str, Any]:
    """Build the index of `items`, raw rows one each, measure its recall at `k` on the queries, and publish it.

    Returns the facts of its manifest. Raises ConfigError where `k` is larger than the corpus, it is too small for its
    kind, or recall is below what the settings require; then nothing is published.
    """
    if k > items.height:
        raise ConfigError(f"recommend asks for {k} items; the corpus has {items.height}: ask for fewer")
    with publish(target, KIND, overwrite=overwrite, keep=3) as staging:
        vectors_ID = _encoded(bundle, items)
        started = time.perf_counter()
        built = _built(settings, vectors_ID)
        seconds = time.perf_counter() - started
        index = ItemIndex(settings, items, vectors_ID, {}, built)
        recall = index.recall(queries_QD, k)
        if recall < settings.min_recall:
            raise ConfigError(
                f"index: recall@{k} is {recall:.4f} against exact search on {len(queries_QD)} users, index.min_recall "
                f"= {settings.min_recall:g}: {_remedy(settings)}"
            )
        staging.about.update(about)
        staging.about.update(
            bundle=bundle.version,
            index=settings.model_dump(mode="json"),
            kind=settings.kind,
            items=items.height,
            dimension=vectors_ID.shape[1],
            k=k,
            recall=recall,
            queries=len(queries_QD),
            build_seconds=round(seconds, 3),
        )
        faiss.write_index(built, str(staging / _FAISS))
        if isinstance(settings, IVFPQConfig):
            np.save(staging / _VECTORS, vectors_ID)
        items.write_parquet(staging / _ITEMS)
        _golden(bundle, items).write_parquet(staging / _GOLDEN)
    return staging.about


def _encoded(bundle: Bundle, items: pl.DataFrame) -> Vectors:
    vectors_ID = np.empty((items.height, towers_of(bundle).dim), dtype=np.float32)
    done = 0
    for part_BD in vectors_of(bundle, items.lazy(), "item"):
        vectors_ID[done : done + len(part_BD)] = part_BD
        done += len(part_BD)
    if done != items.height:
        raise DataError(f"of {items.height} items {done} got a vector; nothing is published")
    return vectors_ID


def _golden(bundle: Bundle, items: pl.DataFrame) -> pl.DataFrame:
    """A few items by themselves, as `load` computes them: in a larger batch the last bits differ."""
    places = np.unique(np.linspace(0, items.height - 1, _GOLDEN_ITEMS).astype(np.int64))
    rows = items[places].select(inputs_of(bundle, "item"))
    return rows.with_columns(pl.Series(_VECTOR, np.concatenate(list(vectors_of(bundle, rows.lazy(), "item")))))


def _built(settings: ExactConfig | HNSWConfig | IVFPQConfig, vectors_ID: Vectors) -> Any:
    items, dimension = vectors_ID.shape
    index: Any
    match settings:
        case ExactConfig():
            index = faiss.IndexFlatIP(dimension)
        case HNSWConfig():
            index = faiss.IndexHNSWFlat(dimension, settings.neighbours, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = settings.build_depth
            index.hnsw.efSearch = settings.search_depth
        case IVFPQConfig():
            lists, subvectors = _divided(settings, items, dimension)
            index = faiss.index_factory(dimension, f"IVF{lists},PQ{subvectors}x8", faiss.METRIC_INNER_PRODUCT)
            index.do_polysemous_training = False  # seconds a subvector, for a filter that no search here uses
            for learning in (index.cp, index.pq.cp):
                learning.max_points_per_centroid = 2 * _TRAINING_ITEMS  # more takes longer and finds nothing more
            index.nprobe = min(settings.probes, lists)
        case _:
            assert_never(settings)
    with _threads(settings.threads):
        if not index.is_trained:
            index.train(vectors_ID)
        index.add(vectors_ID)
    return index


def _divided(settings: IVFPQConfig, items: int, dimension: int) -> tuple[int, int]:
    """Lists and parts of a vector. Raises ConfigError where the items are too few to learn them from."""
    if items < _TRAINING_ITEMS * _CODES:
        raise ConfigError(
            f'index.kind = "ivf_pq" learns its codes from {_TRAINING_ITEMS * _CODES:,} items at least; the corpus has '
            f'{items:,}: choose "exact" or "hnsw"'
        )
    most = items // _TRAINING_ITEMS
    lists = settings.lists or min(round(4 * items**0.5), most)
    if lists > most:
        raise ConfigError(
            f"index.lists = {lists}: each needs {_TRAINING_ITEMS} items to learn from, and the corpus has {items:,}; "
            f"set it to {most} or fewer"
        )
    fitting = [n for n in range(1, dimension + 1) if dimension % n == 0]
    subvectors = settings.subvectors or max(n for n in fitting if n <= max(1, dimension // 4))
    if subvectors not in fitting:
        raise ConfigError(
            f"index.subvectors = {subvectors}: must divide the dimension {dimension}; choose of {fitting}"
        )
    return lists, subvectors


def _remedy(settings: ExactConfig | HNSWConfig | IVFPQConfig) -> str:
    match settings:
        case ExactConfig():
            return "its vectors cannot be compared; check the model"
        case HNSWConfig():
            return (
                f"raise index.search_depth ({settings.search_depth}), then index.build_depth ({settings.build_depth}) "
                f"or index.neighbours ({settings.neighbours})"
            )
        case IVFPQConfig():
            return (
                f"raise index.probes ({settings.probes}) or index.refine ({settings.refine}), then index.subvectors "
                f"({settings.subvectors or 'by default a quarter of the dimension'})"
            )
        case _:
            assert_never(settings)


def _vectors_within(index: Any, folder: Path) -> Vectors:
    """The items' vectors: within a flat index or the graph's, as a view; else from their file."""
    if (folder / _VECTORS).is_file():
        return np.load(folder / _VECTORS, mmap_mode="r")
    flat: Any = faiss.downcast_index(index.storage) if hasattr(index, "storage") else index
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)


@contextmanager
def _threads(number: int) -> Generator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _power_above(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The power of two that is not below each; 0 for 0."""
    powers = 2 ** np.ceil(np.log2(np.maximum(numbers, 1))).astype(np.int64)
    return np.where(numbers > 0, powers, 0)


def _cut(which: NDArray[np.int64], each: int) -> list[NDArray[np.int64]]:
    """In parts of which no more than _CELLS numbers are computed, `each` for one."""
    size = max(1, _CELLS // each)
    return [which[start : start + size] for start in range(0, len(which), size)]


def _contains(sorted_X: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not len(sorted_X):
        return np.zeros(wanted.shape, dtype=np.bool_)
    places = np.minimum(np.searchsorted(sorted_X, wanted), len(sorted_X) - 1)
    return sorted_X[places] == wanted


def _best(places_CA: NDArray[np.int64], similarity_CA: Vectors, k: int) -> tuple[NDArray[np.int64], Vectors]:
    """The first `k` by similarity, ties by place; -1 and -inf where it is -inf."""
    order_CK = np.lexsort((places_CA, -similarity_CA), axis=-1)[:, :k]
    similarity_CK = np.take_along_axis(similarity_CA, order_CK, axis=1)
    places_CK = np.take_along_axis(places_CA, order_CK, axis=1)
    return np.where(np.isneginf(similarity_CK), -1, places_CK), similarity_CK
