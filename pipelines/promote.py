"""promote: challenger against champion on the same raw rows; the alias moves only if the gate says so."""

from collections.abc import Sequence

import mlflow
import polars as pl

from base.errors import RegistryError
from pipelines.config import Run
from pipelines.judgement import Judgement, publish_judgement
from pipelines.measure import check_outputs, held_out, scored_table
from pipelines.tracking import registry_of
from recsys.bundle import Bundle
from recsys.device import pick_device
from recsys.gate import Reason, Verdict, judge
from recsys.paired import compare
from recsys.registry import CHALLENGER

_TAGS = {"promoted": "passed", "refused": "refused", "held": "held"}


def promote(run: Run, *, version: str | None = None, partition: str | None = None, approve: bool = False) -> Verdict:
    """Judge a version (by default the challenger), publish the verdict, and promote the version if it passes.

    Each model computes its own features from the raw rows. `approve` promotes a version that is held, not one that is
    refused. Run again, it comes to the same verdict, and judging the champion changes nothing: the alias moves last.
    Raises RegistryError if another version has become champion meanwhile.
    """
    check_outputs(run)
    registry = registry_of(run)
    candidate = registry.find(version or CHALLENGER)
    champion = registry.champion()
    if champion == candidate:
        text = f"version {candidate.version} is the champion already"
        return Verdict(decision="promoted", reasons=(Reason(ruling="pass", text=text),))
    partitions = held_out(run, partition)
    bundle = registry.bundle_of(candidate)
    scored = _scored(run, bundle, partitions)
    reference = registry.bundle_of(champion) if champion else None
    reference_scored = _scored(run, reference, partitions) if reference else None
    evidence = compare(
        scored,
        reference_scored,
        bundle.outputs,
        run.gate,
        champion_outputs=reference.outputs if reference else (),
        by=run.evaluate.slices,
        user=run.evaluate.user,
    )
    found = judge(evidence, run.gate)
    verdict = found.approved() if approve else found
    judgement = Judgement(
        bundle=bundle.version,
        candidate=candidate.version,
        champion=champion.version if champion else None,
        partitions=tuple(partitions),
        approved=verdict != found,
        verdict=verdict,
        evidence=evidence,
        gates=run.gate,
    )
    outputs = [o.name for o in bundle.outputs]
    folder = publish_judgement(judgement, run.gate_path(partition or "test"), outputs, scored, reference_scored)
    with registry.run(candidate.run_id):
        mlflow.log_artifacts(str(folder), f"gate/version-{candidate.version}")
    decision = "approved" if judgement.approved else _TAGS[verdict.decision]
    against = [str(r) for r in verdict.reasons if r.ruling != "pass"]
    registry.tag(candidate, {"gate": decision, "gate.reasons": "; ".join(against)[:4000]})
    if verdict.promoted:
        if registry.champion() != champion:
            raise RegistryError(
                f"model {registry.name!r}: another version became champion while version {candidate.version} was "
                "judged; run `recsys promote` again"
            )
        registry.promote(candidate)
    return verdict


def _scored(run: Run, bundle: Bundle, partitions: Sequence[str]) -> pl.DataFrame:
    return scored_table(run, bundle.to(pick_device(run.device)), partitions)
