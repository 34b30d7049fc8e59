"""promote: challenger against champion on the same raw rows; the alias moves only if the gate says so."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlflow
import polars as pl

from base.errors import ConfigError, DataError, Superseded
from base.storage import read_manifest, resolve
from pipelines.config import Run
from pipelines.evaluate import rank_each, record, record_ranking
from pipelines.judgement import Judgement, publish_judgement
from pipelines.line import follow
from pipelines.measure import check_outputs, held_out, scored_table
from pipelines.rankings import ask
from pipelines.tracking import registry_alone, registry_of
from recsys.bundle import Bundle
from recsys.device import pick_device
from recsys.gate import Evidence, Reason, Verdict, judge, seen, superseded
from recsys.models.two_tower import TwoTower
from recsys.paired import compare
from recsys.paired_recall import compare_recall
from recsys.registry import CHALLENGER, ModelRegistry, Registered
from recsys.retrieval import recall_by_chance, recall_by_popularity

_TAGS = {"promoted": "passed", "refused": "refused", "held": "held"}


def promote(
    run: Run,
    *,
    version: str | None = None,
    partition: str | None = None,
    approve: bool = False,
    say: Callable[[str], None] = print,
) -> Verdict:
    """Judge a version (by default the day's, or else the challenger), publish the verdict, promote it if it passes.

    Each model computes its own features from the raw rows; retrieval models are judged by full ranking. `approve`
    promotes a version that is held, not one that is refused. Run again, it comes to the same verdict, and judging the
    champion changes nothing: the alias moves last. Of two at once, the second judges against what the first left.
    Raises RegistryError if another version has become champion meanwhile, Superseded if the champion has learned from
    later days than the candidate, DataError if either has learned from the day.
    """
    check_outputs(run)
    registry = registry_of(run)
    with registry_alone(run, say):
        return _promote(run, registry, version, partition, approve=approve)


def _promote(
    run: Run, registry: ModelRegistry, version: str | None, partition: str | None, *, approve: bool
) -> Verdict:
    candidate = _candidate(run, registry, version)
    champion = registry.champion()
    partition = partition or (f"day={run.day}" if run.day else None)
    partitions = held_out(run, partition)
    bundle = registry.bundle_of(candidate)
    if champion == candidate:
        follow(run, bundle.origin.line)  # a run that was killed before it came to that
        return _said("promoted", "pass", f"version {candidate.version} is the champion already")
    if candidate.rolled_back and version is None:
        said = f"version {candidate.version} was rolled back at {candidate.rolled_back}; promote it with --version"
        return _said("refused", "refuse", said)
    reference = registry.bundle_of(champion) if champion else None
    _require_unseen(partitions, bundle, reference)
    measured = (_by_scores if run.retrieval is None else _by_recall)(run, bundle, reference, partitions)
    found = judge(measured.evidence, run.gate)
    verdict = found.approved() if approve else found
    judgement = Judgement(
        bundle=bundle.version,
        candidate=candidate.version,
        champion=champion.version if champion else None,
        candidate_origin=bundle.origin,
        champion_origin=reference.origin if reference else None,
        partitions=tuple(partitions),
        approved=verdict != found,
        verdict=verdict,
        evidence=measured.evidence,
        gates=run.gate,
    )
    outputs = [o.name for o in bundle.outputs if o.name in measured.scored.columns]
    target = run.gate_path(partition or "test")
    folder = publish_judgement(judgement, target, outputs, measured.scored, measured.reference)
    if run.day:
        measured.record(f"day={run.day}")
    with registry.run(candidate.run_id):
        mlflow.log_artifacts(str(folder), f"gate/version-{candidate.version}")
    decision = "approved" if judgement.approved else _TAGS[verdict.decision]
    against = [str(r) for r in verdict.reasons if r.ruling != "pass"]
    registry.tag(candidate, {"gate": decision, "gate.reasons": "; ".join(against)[:4000]})
    if verdict.promoted:
        against_it = f"version {candidate.version} was judged against it; run `recsys promote` again"
        registry.require_champion(champion and champion.version, against_it)
        registry.promote(candidate, again=version is not None)
        follow(run, bundle.origin.line)
    return verdict


def _candidate(run: Run, registry: ModelRegistry, version: str | None) -> Registered:
    """The version asked for; that of the run's day; without days the challenger."""
    if version is not None or run.day is None:
        return registry.find(version or CHALLENGER)
    folder = resolve(run.bundle_path, "bundle", made_by=f"`recsys train --day {run.day}`")
    return registry.of_training(read_manifest(folder).version)


def _require_unseen(partitions: Sequence[str], candidate: Bundle, champion: Bundle | None) -> None:
    """Neither model may have learned from the rows that they are judged on."""
    if champion and superseded(candidate.origin.trained_to, champion.origin.trained_to):
        raise Superseded(
            f"the candidate is trained to {candidate.origin.trained_to}, the champion to "
            f"{champion.origin.trained_to}: a later day has been promoted already"
        )
    # Of two models of one day, the one that was trained anew takes the place of the one that went on.
    ours, theirs = candidate.origin, champion.origin if champion else None
    same_day = theirs is not None and ours.trained_to == theirs.trained_to
    if same_day and ours.line and theirs and theirs.line and ours.line < theirs.line:
        raise Superseded(f"the champion was trained anew on {theirs.line}, the candidate goes back to {ours.line}")
    beside = "measured" if isinstance(candidate.model, TwoTower) else "calibrated"
    origins = {"candidate": candidate.origin} | ({"champion": champion.origin} if champion else {})
    days = [(partition, partition.removeprefix("day=")) for partition in partitions if partition.startswith("day=")]
    for name, origin in origins.items():
        for partition, day in days:
            for how, last in (("trained", origin.trained_to), (beside, origin.calibrated_on)):
                if seen(last, day):
                    raise DataError(
                        f"{partition}: the {name} has been {how} on days to {last}, which would flatter it; judge on a "
                        "later day"
                    )


def _said(decision: Literal["promoted", "refused"], ruling: Literal["pass", "refuse"], text: str) -> Verdict:
    return Verdict(decision=decision, reasons=(Reason(ruling=ruling, text=text),))


@dataclass(frozen=True)
class _Measured:
    """What was found of candidate and champion on the same raw rows."""

    evidence: Evidence
    record: Callable[[str], Any]
    """Publishes what was measured of the candidate as the evaluation of this name."""
    scored: pl.DataFrame
    """Of the candidate; empty for a retrieval model."""
    reference: pl.DataFrame | None
    """Of the champion."""


def _by_scores(run: Run, bundle: Bundle, reference: Bundle | None, partitions: Sequence[str]) -> _Measured:
    comparable = None if reference is not None and isinstance(reference.model, TwoTower) else reference
    scored = _scored(run, bundle, partitions)
    reference_scored = _scored(run, comparable, partitions) if comparable else None
    evidence = compare(
        scored,
        reference_scored,
        bundle.outputs,
        run.gate,
        champion_outputs=comparable.outputs if comparable else (),
        by=run.evaluate.slices,
        user=run.evaluate.user,
    )
    if reference is not comparable and reference is not None:
        evidence = _against_another_kind(evidence, reference, "gives no probabilities")
    return _Measured(evidence, lambda name: record(run, bundle, scored, name), scored, reference_scored)


def _scored(run: Run, bundle: Bundle, partitions: Sequence[str]) -> pl.DataFrame:
    return scored_table(run, bundle.to(pick_device(run.device)), partitions)


def _by_recall(run: Run, bundle: Bundle, reference: Bundle | None, partitions: Sequence[str]) -> _Measured:
    """Both rank the same raw items for the same users, each by its own features.

    Slices are by the training rows that the candidate's features have counted: what it takes for cold it must find as
    well as the champion, which may know it.
    """
    if not isinstance(bundle.model, TwoTower):
        raise ConfigError(
            f"promote: the version is of model {bundle.model_config.name!r}, which ranks no items; give each kind of "
            "model an mlflow.model of its own"
        )
    comparable = reference if reference is not None and isinstance(reference.model, TwoTower) else None
    asked = ask(run, bundle, comparable, partitions, may_be_empty=True)
    slices_I = asked[0].slices()
    both = [bundle] if comparable is None else [bundle, comparable]
    ranked = [rank_each(b.to(pick_device(run.device)), r, slices_I) for b, r in zip(both, asked, strict=True)]
    recalls = [found.recall_QS for found in ranked]
    floor = run.gate.retrieval.min_recall
    if isinstance(floor, str):
        floor = {"chance": recall_by_chance, "popularity": recall_by_popularity}[floor](asked[0])
    champion_US = recalls[1] if comparable is not None else None
    evidence = compare_recall(recalls[0], champion_US, run.gate, k=asked[0].cuts.k[0], at_least=floor)
    if reference is not comparable and reference is not None:
        evidence = _against_another_kind(evidence, reference, "ranks no items")
    table = ranked[0].table
    return _Measured(evidence, lambda name: record_ranking(run, bundle, asked[0], table, name), pl.DataFrame(), None)


def _against_another_kind(evidence: Evidence, champion: Bundle, lack: str) -> Evidence:
    """Refused, since the champion cannot be measured as the candidate is."""
    text = f"the champion is of model {champion.model_config.name!r}, which {lack}"
    reason = Reason(ruling="refuse", text=f"{text}; give this model an mlflow.model of its own")
    return evidence.model_copy(update={"champion": True, "reasons": (*evidence.reasons, reason)})
