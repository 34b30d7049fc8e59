"""Sparse tables through training: one budget, resumed to the bit, gone on from after growth; what is refused."""

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import recsys.sparsity.schedule
from base.errors import ArtefactError, ConfigError
from base.storage import resolve
from features.schema import NewRows, Schema
from recsys import checkpoint, processes
from recsys.bundle import load_model
from recsys.checkpoint import WarmStart
from recsys.device import CPU
from recsys.distributed import Sharded, reset_tables, shard
from recsys.draws import normal_rows
from recsys.models import AutoIntConfig, build_model
from recsys.sparsity.collect import Seen
from recsys.sparsity.config import Schedule, Sparsity
from recsys.sparsity.layout import even_sizes, even_total
from recsys.sparsity.tables import SparseTables, read_groups
from recsys.tensors import load_tensors
from recsys.trainer import Trained, train
from tests.marks import quick
from tests.recsys import expanded
from tests.recsys.test_trainer import FAST, SCHEMA, InterruptionError, grown, run, same, streams, with_config

MODEL = AutoIntConfig(dim=12, layers=1, heads=1, attention_dim=4, attention_dropout=0.3, embedding_dropout=0.2)
MOVING: dict[str, Any] = {"interval": 5, "window": 3, "stop": 0.8}
"""Of 24 steps: after 5, 10, for which two epochs are watched, and 15."""
KINDS = {
    "row": Sparsity(density=0.4, schedule=Schedule(**MOVING)),
    "element": Sparsity(density=0.4, state="element", schedule=Schedule(**MOVING)),
    "random": Sparsity(density=0.4, schedule=Schedule(**MOVING, grow="random")),
    "sampled": Sparsity(density=0.4, schedule=Schedule(**MOVING, window_rows=12)),
    "between rows": Sparsity(density=0.4, schedule=Schedule(**MOVING, redistribute=1.0)),
    "between rows, element": Sparsity(density=0.4, state="element", schedule=Schedule(**MOVING, redistribute=0.6)),
    "popular": Sparsity(density=0.4, allocation="popularity", schedule=Schedule(**MOVING)),
    "er": Sparsity(density=0.4, allocation="er", schedule=Schedule(**MOVING)),
    "er, between rows": Sparsity(density=0.4, allocation="er", schedule=Schedule(**MOVING, redistribute=0.5)),
    "one table": Sparsity(density=0.4, features=("a",), schedule=Schedule(**MOVING, redistribute=0.5)),
    "fixed": Sparsity(density=0.4, schedule=Schedule(grow="none"), positions="nested"),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
SOME = pytest.mark.parametrize(
    "kind",
    quick({kind: kind for kind in KINDS}, "row", "between rows, element", "popular", "one table", "fixed"),
)


@pytest.fixture
def data(tmp_path: Path) -> Any:
    return streams(tmp_path / "examples")


def stored(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Everything that the last checkpoint holds."""
    path = resolve(folder / "checkpoint")
    return {p: load_tensors(path / p) for p in ("weights", "table_states", "dense_states", "watched")}


def tables_in(weights: Mapping[str, Tensor], sparsity: Sparsity, schema: Schema = SCHEMA) -> SparseTables:
    """The sparse tables among a model's weights."""
    model = load_model(MODEL, schema, weights, where=Path("here"), sparsity=sparsity)
    assert isinstance(model.embed.tables, SparseTables)
    return model.embed.tables


# --- one budget, exactly ----------------------------------------------------------------------------------------------


@EVERY
def test_every_update_keeps_the_budget_and_the_mask_moves(
    kind: str, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparsity, masks, budgets = KINDS[kind], [], []
    move = recsys.sparsity.schedule.move

    def watched(tables: SparseTables, seen: Seen, *rest: Any, **named: Any) -> None:
        budgets.append(tables.budget)
        assert len(seen.rows_K) <= sparsity.schedule.window_rows
        move(tables, seen, *rest, **named)
        read_groups(tables.tensors(), tables.dim, "here")
        budgets.append(sum(int(m.sum()) for m in expanded.masks(tables).values()))
        masks.append(torch.cat(list(expanded.masks(tables).values())))
        for group in tables.groups:
            assert not group.values_NS[:, group.size :].any()

    monkeypatch.setattr(recsys.sparsity.schedule, "move", watched)
    trained = run(data, tmp_path / "state", model=MODEL, sparsity=sparsity)
    after = tables_in(load_tensors(resolve(tmp_path / "state/checkpoint") / "weights"), sparsity)
    assert len(masks) == (0 if kind == "fixed" else 3)
    assert {*budgets, after.budget} == {after.budget}
    assert all((a != b).any() for a, b in pairwise(masks))
    if masks:
        assert masks[-1].equal(torch.cat(list(expanded.masks(after).values())))
    if kind not in ("er", "one table"):
        assert after.budget == even_total(20, 12, sparsity.density, unequal=sparsity.unequal) + even_total(
            9, 12, sparsity.density, unequal=sparsity.unequal
        )
    if kind == "one table":
        assert expanded.masks(after)["bag"].all()
    assert trained.history[-1]["train_loss"] < trained.history[0]["train_loss"]


def test_with_every_weight_the_mask_has_nowhere_to_go(data: Any, tmp_path: Path) -> None:
    first, second = (
        run(data, tmp_path / grow, model=MODEL, sparsity=Sparsity(density=1.0, schedule=Schedule(**moving)))
        for grow, moving in (("gradient", MOVING), ("none", {"grow": "none"}))
    )
    assert same(first.weights, second.weights)


def test_a_table_that_is_kept_whole_does_not_depend_on_the_sparse_ones_kind(data: Any, tmp_path: Path) -> None:
    trained = run(data, tmp_path / "state", model=MODEL, sparsity=KINDS["one table"])
    sizes_R = trained.weights["embed.tables.sizes_R"]
    assert (sizes_R[20:] == 12).all()
    assert int(sizes_R[:20].sum()) == even_total(20, 12, 0.4, unequal=True)


# --- resuming ---------------------------------------------------------------------------------------------------------


@SOME
def test_resumed_anywhere_it_is_as_if_never_interrupted(kind: str, data: Any, tmp_path: Path) -> None:
    """Bit for bit in masks, weights, all states and the window that is being watched."""
    config, sparsity = with_config(checkpoint_every=1), KINDS[kind]
    whole = run(data, tmp_path / "whole", config, MODEL, sparsity=sparsity)
    for stop_at in (4, 6, 10, 14):
        with pytest.raises(InterruptionError):
            run(data, tmp_path / "state", config, MODEL, stop_at=stop_at, sparsity=sparsity)
    resumed = run(data, tmp_path / "state", config, MODEL, sparsity=sparsity)
    assert resumed.resumed_at == 13
    assert resumed.history == whole.history
    assert same(resumed.weights, whole.weights)
    for part, tensors in stored(tmp_path / "whole").items():
        assert same(stored(tmp_path / "state")[part], tensors), part
    assert checkpoint.position_of(tmp_path / "state") == checkpoint.position_of(tmp_path / "whole")


def test_a_checkpoint_in_a_window_holds_what_was_watched(data: Any, tmp_path: Path) -> None:
    config, sparsity = with_config(checkpoint_every=1), KINDS["row"]
    for stop_at, rows in ((3, 0), (5, 20), (6, 0), (10, 20), (21, 0)):
        with pytest.raises(InterruptionError):
            run(data, tmp_path / f"{stop_at}", config, MODEL, stop_at=stop_at, sparsity=sparsity)
        watched = stored(tmp_path / f"{stop_at}")["watched"]
        assert len(watched.get("embed.tables.rows_K", ())) >= rows
        assert bool(watched) == bool(rows), stop_at


# --- going on after growth --------------------------------------------------------------------------------------------

FRESH = {"a": np.array([3, *range(20, 33)], dtype=np.int64), "bag": np.array([9, 10], dtype=np.int64)}
LARGER = SCHEMA.model_copy(
    update={
        "sparse": tuple(f.model_copy(update={"rows": rows}) for f, rows in zip(SCHEMA.sparse, (33, 11), strict=True))
    }
)


def start(warm: WarmStart, sparsity: Sparsity | None, schema: Schema = LARGER) -> Sharded:
    model = build_model(MODEL, schema, table_device="meta", sparsity=sparsity)
    sharded = shard(model, CPU, {"lr": 0.1, "eps": 1e-8}, batch_size=100)
    optimizer = torch.optim.Adam(sharded.dense.values())
    checkpoint.start_from(warm, sharded, optimizer, seed=7, accumulator=0.25)
    return sharded


def once(data: Any, folder: Path, sparsity: Sparsity | None) -> Trained:
    return train(MODEL, SCHEMA, data[0], None, FAST, folder, sparsity=sparsity)


@pytest.mark.parametrize("rule", ["mean", "hash"])
@SOME
def test_known_rows_keep_their_bits_and_new_ones_get_the_densitys_share(
    kind: str, rule: NewRows, data: Any, tmp_path: Path
) -> None:
    sparsity = KINDS[kind]
    trained = once(data, tmp_path / "state", sparsity)
    before = tables_in(trained.weights, sparsity)
    states = load_tensors(trained.state / "table_states")
    for group in before.groups:
        group.state = states.get(f"embed.tables.state.{group.size}")
    (after,) = start(WarmStart(trained.state, FRESH, new_rows=rule, accumulator_decay=0.5), sparsity).sparse.values()
    read_groups(after.tensors(), after.dim, "here")
    more = 0
    for table, old in zip(after.tables, before.tables, strict=True):
        share = sparsity.density if table.sparse else 1.0
        unequal = sparsity.unequal and table.sparse
        more += even_total(table.rows, 12, share, unequal=unequal) - even_total(old.rows, 12, share, unequal=unequal)
        start_, fresh = after.starts[after.tables.index(table)], FRESH[table.name]
        kept = np.setdiff1d(np.arange(old.rows), fresh)
        (w0, m0, s0), (w1, m1, s1) = (
            tuple(f(t)[table.name] for f in (expanded.weights, expanded.masks, expanded.sums)) for t in (before, after)
        )
        assert w1[kept].equal(w0[kept])
        assert m1[kept].equal(m0[kept])
        assert s1[kept].equal(s0[kept] * 0.5)
        sizes = even_sizes(table.rows - old.rows, 12, share, unequal=unequal, first=old.rows)
        assert m1[old.rows :].sum(1).tolist() == sizes.tolist()
        recycled = [n for n in fresh if n < old.rows]
        assert m1[recycled].sum(1).equal(m0[recycled].sum(1))
        assert after.sizes_R[start_ : start_ + table.rows].tolist() == m1.sum(1).tolist()
        held = m1[fresh] if sparsity.state == "element" else m1[fresh].any(1)
        assert s1[fresh][held].eq(0.25).all()
        mean_D = w0[kept[1:]].double().mean(0).float()
        for row in fresh.tolist():
            active = m1[row].nonzero().flatten()
            if rule == "mean" and sparsity.positions == "random":
                assert mean_D.abs()[active].sum().item() == pytest.approx(
                    mean_D.abs().topk(len(active)).values.sum().item(), rel=1e-5
                )
            if rule == "mean":
                torch.testing.assert_close(w1[row][active], mean_D[active], atol=1e-7, rtol=1e-5)
            if sparsity.positions == "nested":
                assert active.tolist() == list(range(len(active)))
        if rule == "hash":
            assert 0.05 < w1[fresh][m1[fresh]].std() < 0.2
    assert after.budget == before.budget + more
    assert {s for s, g in ((g.size, g) for g in after.groups) if s and g.kernel is None} == set()
    assert all((g.state is None) == (g.size == 0) for g in after.groups)


def test_a_new_rows_positions_follow_from_its_number_alone(data: Any, tmp_path: Path) -> None:
    trained = once(data, tmp_path / "state", KINDS["row"])
    (many,) = start(WarmStart(trained.state, FRESH, new_rows="hash"), KINDS["row"]).sparse.values()
    few = {"a": np.array([3, *range(20, 25)]), "bag": np.array([9, 10])}
    schema = grown(SCHEMA, 0).model_copy(
        update={"sparse": tuple(f.model_copy(update={"rows": r}) for f, r in zip(SCHEMA.sparse, (25, 11), strict=True))}
    )
    (some,) = start(WarmStart(trained.state, few, new_rows="hash"), KINDS["row"], schema).sparse.values()
    for part in (expanded.weights, expanded.masks, expanded.sums):
        assert part(many)["a"][:25].equal(part(some)["a"])
    patterns = {tuple(m.nonzero().flatten().tolist()) for m in expanded.masks(many)["a"][20:]}
    assert len(patterns) > 8
    assert not torch.equal(normal_rows(torch.arange(3), 12, 7), normal_rows(torch.arange(3), 12, 8))


@SOME
def test_growth_and_training_go_on_day_after_day(kind: str, data: Any, tmp_path: Path) -> None:
    """Sizes grow with the rows; the budget that a state must have is known after any number of growths."""
    sparsity = KINDS[kind]
    schema, state = SCHEMA, once(data, tmp_path / "0", sparsity).state
    budgets: list[int] = []
    for number in (1, 2, 3):
        larger = grown(schema, 7)
        fresh = {
            f.name: np.array([2, *range(f.rows, f.rows + 7)]) for f in schema.sparse
        }  # every day one id is retired
        fit = replace(data[0], schema=larger)
        trained = train(
            MODEL, larger, fit, None, FAST, tmp_path / f"{number}", warm=WarmStart(state, fresh), sparsity=sparsity
        )
        budgets.append(tables_in(trained.weights, sparsity, larger).budget)
        schema, state = larger, trained.state
    assert budgets[2] - budgets[0] == pytest.approx(0.4 * 28 * 12, abs=8) or (
        kind == "one table" and budgets[2] - budgets[0] == pytest.approx(0.4 * 14 * 12 + 14 * 12, abs=8)
    )


def test_going_on_from_a_state_is_going_on(data: Any, tmp_path: Path) -> None:
    """Two epochs are one epoch and, from its state, another: the same steps on the same rows."""
    plain = replace(data[0], shuffle=False)
    model = MODEL.model_copy(update={"attention_dropout": 0.0, "embedding_dropout": 0.0})
    nothing = {"a": np.array([], np.int64), "bag": np.array([], np.int64)}
    for kind in ("fixed", "element"):
        sparsity = KINDS[kind].model_copy(update={"schedule": Schedule(grow="none")})
        states = []
        for name, epochs, warm in (("two", 2, None), ("one", 1, None), ("again", 1, "one")):
            config = FAST.model_copy(update={"epochs": epochs})
            folder = tmp_path / kind / name
            from_ = WarmStart(states[-1], nothing) if warm else None
            trained = train(model, SCHEMA, plain, None, config, folder, warm=from_, sparsity=sparsity)
            states.append(trained.state)
        for part in ("weights", "table_states"):
            assert same(load_tensors(states[2] / part), load_tensors(states[0] / part))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (0.4, 0.5, r"sparsity\.density = 0\.5, but the training in .*state stands at step 4 with 0\.4; set it back"),
        (0.4, None, r"sparsity\.density = nothing: tables are dense, but .* stands at step 4 with 0\.4; set it back"),
        (
            None,
            0.4,
            r"sparsity\.density = 0\.4, but .* with dense tables; set it back to go on .*, or remove the folder",
        ),
    ],
)
def test_an_unfinished_training_of_another_density_is_refused(
    before: float | None, now: float | None, message: str, data: Any, tmp_path: Path
) -> None:
    config = with_config(checkpoint_every=1)
    was, is_ = (None if d is None else KINDS["row"].model_copy(update={"density": d}) for d in (before, now))
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", config, MODEL, stop_at=5, sparsity=was)
    with pytest.raises(ConfigError, match=message):
        run(data, tmp_path / "state", config, MODEL, sparsity=is_)
    assert run(data, tmp_path / "state", config, MODEL, sparsity=was).resumed_at == 4
    assert run(data, tmp_path / "state", config, MODEL, sparsity=is_).resumed_at == 0  # that one is finished


def test_an_unfinished_training_of_another_schedule_is_refused(data: Any, tmp_path: Path) -> None:
    config = with_config(checkpoint_every=1)
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", config, MODEL, stop_at=5, sparsity=KINDS["row"])
    other = Sparsity(density=0.4, schedule=Schedule(**{**MOVING, "window": 2}))
    with pytest.raises(ConfigError, match=r"sparsity\.schedule\.window = 2, but .* at step 4 with 3; set it back"):
        run(data, tmp_path / "state", config, MODEL, sparsity=other)


def test_an_interval_longer_than_training_is_refused_before_any_step(data: Any, tmp_path: Path) -> None:
    long = Sparsity(density=0.4, schedule=Schedule(interval=100))
    with pytest.raises(ConfigError, match=r"schedule\.interval = 100 steps: the mask would never move, .* 22 of 24"):
        run(data, tmp_path / "state", model=MODEL, sparsity=long)
    assert not (tmp_path / "state/checkpoint").exists()


def test_several_processes_are_refused(data: Any, tmp_path: Path) -> None:
    config = with_config(processes=2)
    with pytest.raises(ConfigError, match=r"train\.processes = 2: sparse tables are trained by one process; set it to"):
        processes.train(MODEL, SCHEMA, *data, config, tmp_path / "state", sparsity=KINDS["row"])


def test_states_of_other_tables_are_refused(data: Any, tmp_path: Path) -> None:
    nothing = {"a": np.array([], np.int64), "bag": np.array([], np.int64)}
    states = {
        name: once(data, tmp_path / name, sparsity).state
        for name, sparsity in (("dense", None), ("row", KINDS["row"]), ("between rows", KINDS["between rows"]))
    }

    def refused(name: str, sparsity: Sparsity | None, message: str, fresh: Any = nothing, schema: Any = SCHEMA) -> None:
        with pytest.raises(ArtefactError, match=re.escape(str(states[name])) + message):
            start(WarmStart(states[name], fresh), sparsity, schema)

    half = KINDS["row"].model_copy(update={"density": 0.5})
    refused(
        "row", half, r": holds 136 weights, a density of 0\.3908, .* density 0\.5, means 172; set it back, or train"
    )
    refused("row", None, r": its tables are sparse, those of this run dense; put its \[sparsity\] back, or train")
    refused("dense", half, r": holds no sparse tables; the model was trained without \[sparsity\]")
    refused(
        "row",
        KINDS["element"],
        r': has not the sums of each element with 4 weights, as sparsity\.state = "elem',
    )
    refused(
        "row",
        KINDS["row"],
        r": sparse tables of \[20, 9\] rows, the model needs \[19, 8\]; train",
        schema=grown(SCHEMA, -1),
    )
    refused(
        "row",
        KINDS["row"],
        r": sparse table 'a' holds 20 rows, the model needs 33, of which 1 are new; train with",
        fresh={**FRESH, "a": np.array([20])},
        schema=LARGER,
    )


def broken(tensors: dict[str, Tensor]) -> dict[str, tuple[dict[str, Tensor], str]]:
    """By what is wrong with them: tensors of tables of width 12 whose rows hold 4 and 8, and how they are refused."""

    def but(name: str, place: tuple[int, int], *values: int) -> dict[str, Tensor]:
        changed = tensors[name].clone()
        row, slot = place
        changed[row, slot : slot + len(values)] = torch.tensor(values, dtype=changed.dtype)
        return {**tensors, name: changed}

    shorter = {**tensors, "positions.4": tensors["positions.4"][:-1]}
    count, rows = len(tensors["positions.4"]), len(tensors["sizes_R"])
    without = {n: t for n, t in tensors.items() if n != "values.8"}
    sizes_R = tensors["sizes_R"].clone()
    sizes_R[(sizes_R == 4).nonzero()[0]] = 8
    ascending = "are not ascending numbers below 12; restore or rebuild it"
    return {
        "twice": (
            but("positions.4", (2, 0), 1, 3, 3, 5),
            rf"positions \[1, 3, 3, 5\] of a row with 4 weights {ascending}",
        ),
        "falling": (
            but("positions.4", (2, 0), 1, 5, 3, 9),
            rf"positions \[1, 5, 3, 9\] of a row with 4 weights {ascending}",
        ),
        "beyond": (but("positions.8", (0, 7), 12), rf"12\] of a row with 8 weights {ascending}"),
        "fewer": (
            shorter,
            rf"positions of rows with 4 weights should be \({count}, 4\), found \({count - 1}, 4\); rest",
        ),
        "wider": (
            {**tensors, "values.4": tensors["values.4"].double()},
            r"values of rows with 4 weights should be torch\.float32, found torch\.float64; restore or rebuild it",
        ),
        "missing": (
            without,
            r"values of rows with 8 weights should be \(.*, 8\), found nothing; restore or rebuild it",
        ),
        "sizes": (
            {**tensors, "sizes_R": sizes_R},
            rf"values of rows with 4 weights should be \({count - 1}, 4\), found",
        ),
        "rows": ({**tensors, "sizes_R": sizes_R[:-1]}, rf"sizes of {rows - 1} rows for {rows}; restore or rebuild it"),
        "none": ({}, r"holds no sparse tables; the model was trained without \[sparsity\]"),
        "more": ({**tensors, "values.12": torch.zeros(1, 12)}, r"values\.12 is of no row; restore or rebuild it"),
    }


def test_inconsistent_tables_are_refused_by_name(data: Any, tmp_path: Path) -> None:
    """In a Bundle's weights, in a checkpoint, in a state to go on from."""
    sparsity = KINDS["row"]
    config = with_config(checkpoint_every=1)
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", config, MODEL, stop_at=5, sparsity=sparsity)
    folder = resolve(tmp_path / "state/checkpoint")
    path = folder / "weights/small.safetensors"
    good = load_file(path)
    inner = {n.removeprefix("embed.tables."): t for n, t in good.items() if n.startswith("embed.tables.")}
    outer = {n: t for n, t in good.items() if not n.startswith("embed.tables.")}
    assert set(inner) == {"sizes_R", "rows_T", "values.4", "positions.4", "values.8", "positions.8"}
    for name, (tensors, message) in broken(inner).items():
        wrong = {**outer, **{f"embed.tables.{n}": t for n, t in tensors.items()}}
        with pytest.raises(ArtefactError, match=rf"bundle: .*{message}"):
            load_model(MODEL, SCHEMA, wrong, where=Path("bundle"), sparsity=sparsity)
        save_file({n: t.clone() for n, t in wrong.items()}, path)
        for again in (start_again, go_on):
            with pytest.raises(ArtefactError, match=rf"{re.escape(str(folder))}: .*{message}"):
                again(tmp_path / "state", sparsity)
        assert name
    save_file({n: t.clone() for n, t in good.items()}, path)
    start_again(tmp_path / "state", sparsity)
    go_on(tmp_path / "state", sparsity)


@EVERY
def test_rows_of_unknown_ids_can_be_silenced(kind: str) -> None:
    """Whatever the rows' sizes are; all others are something."""
    model = build_model(MODEL, SCHEMA, table_device="meta", sparsity=KINDS[kind])
    sharded = shard(model, CPU, {"lr": 0.1, "eps": 1e-8}, batch_size=100)
    counts = {f.name: torch.arange(f.rows).flip(0) for f in SCHEMA.sparse}
    reset_tables(sharded, 0, counts=counts)
    sharded.silence_unknown()
    (tables,) = sharded.sparse.values()
    for table, start in zip(tables.tables, tables.starts, strict=True):
        e_RD = expanded.weights(tables)[table.name]
        assert not e_RD[0].any()
        assert (e_RD[1:].any(1) | (tables.sizes_R[start + 1 : start + table.rows] == 0)).all()


def start_again(folder: Path, sparsity: Sparsity) -> None:
    model = build_model(MODEL, SCHEMA, table_device="meta", sparsity=sparsity)
    sharded = shard(model, CPU, {"lr": 0.1, "eps": 1e-8}, batch_size=100)
    reset_tables(sharded, 0)
    checkpoint.restore(folder, sharded, torch.optim.Adam(sharded.dense.values()), accumulator=0.0)


def go_on(folder: Path, sparsity: Sparsity) -> None:
    nothing = {"a": np.array([], np.int64), "bag": np.array([], np.int64)}
    start(WarmStart(resolve(folder / "checkpoint"), nothing), sparsity, SCHEMA)


def test_slots_that_only_fill_up_must_be_empty() -> None:
    model = AutoIntConfig(dim=4, layers=1, heads=1, attention_dim=4)
    sparsity = Sparsity(density=0.5)
    weights = dict(build_model(model, SCHEMA, sparsity=sparsity).state_dict())
    assert weights["embed.tables.values.2"].shape == (29, 4)
    load_model(model, SCHEMA, weights, where=Path("here"), sparsity=sparsity)
    for name in ("values", "positions"):
        wrong = weights[f"embed.tables.{name}.2"].clone()
        wrong[3, 3] = 1
        with pytest.raises(
            ArtefactError, match="here: rows with 2 weights hold something where their slots only fill up"
        ):
            load_model(
                model, SCHEMA, {**weights, f"embed.tables.{name}.2": wrong}, where=Path("here"), sparsity=sparsity
            )


def test_sums_that_do_not_fit_are_refused(data: Any, tmp_path: Path) -> None:
    config = with_config(checkpoint_every=1)
    with pytest.raises(InterruptionError):
        run(data, tmp_path / "state", config, MODEL, stop_at=5, sparsity=KINDS["row"])
    path = resolve(tmp_path / "state/checkpoint") / "table_states/small.safetensors"
    good = load_file(path)
    for wrong in (
        {n: t for n, t in good.items() if not n.endswith("state.8")},
        {**good, "embed.tables.state.8": good["embed.tables.state.8"][1:].clone()},
    ):
        save_file(wrong, path)
        with pytest.raises(ArtefactError, match=r"the sums of rows with 8 weights should be \(5,\); train from the"):
            start_again(tmp_path / "state", KINDS["row"])


def test_a_bundles_weights_of_another_density_are_refused(data: Any, tmp_path: Path) -> None:
    trained = run(data, tmp_path / "state", model=MODEL, sparsity=KINDS["row"])
    half = KINDS["row"].model_copy(update={"density": 0.5})
    with pytest.raises(ArtefactError, match=r"here: holds 136 weights, a density of 0\.3908, where \[sparsity\] of"):
        load_model(MODEL, SCHEMA, trained.weights, where=Path("here"), sparsity=half)
    with pytest.raises(ArtefactError, match=r"sparse tables of \[20, 9\] rows, the model has \[21, 10\]"):
        load_model(MODEL, grown(SCHEMA, 1), trained.weights, where=Path("here"), sparsity=KINDS["row"])
