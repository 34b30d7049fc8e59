"""promote: challenger against champion on the same raw rows; the alias moves only if the gate says so."""

import mlflow

from pipelines.config import Run
from pipelines.measure import held_out, scored_table
from pipelines.tracking import registry_of
from recsys.bundle import Bundle
from recsys.device import pick_device
from recsys.gate import Verdict, judge
from recsys.metrics import evaluate, headline
from recsys.registry import CHALLENGER


def promote(run: Run, *, version: str | None = None, partition: str | None = None) -> Verdict:
    """Judge a version (by default the challenger), write the verdict to MLflow, and promote it if it passes.

    Each model computes its own features from the raw rows. Judging the champion again changes nothing.
    """
    registry = registry_of(run)
    candidate = registry.find(version or CHALLENGER)
    champion = registry.champion()
    if champion == candidate:
        return Verdict(promoted=True, reasons=(f"version {candidate.version} is the champion already",))
    partitions = held_out(run, partition)

    def measured(bundle: Bundle) -> dict[str, dict[str, float]]:
        # What only the champion gives cannot be measured by the candidate's labels; the gate names it by its absence.
        outputs = [o for o in bundle.outputs if {o.label, o.given or o.label} <= set(run.labels)]
        scored = scored_table(run, bundle.to(pick_device(run.device)), partitions)
        table = evaluate(scored, outputs)
        unmeasured: dict[str, dict[str, float]] = {o.name: {} for o in bundle.outputs if o not in outputs}
        return {o.name: headline(table, o.name) for o in outputs} | unmeasured

    found = measured(registry.bundle_of(candidate))
    reference = measured(registry.bundle_of(champion)) if champion else None
    verdict = judge(found, reference, run.gate)
    record = {
        "candidate": candidate.version,
        "champion": champion.version if champion else None,
        "partitions": partitions,
        "candidate_metrics": found,
        "champion_metrics": reference,
        "verdict": verdict.model_dump(mode="json"),
    }
    with registry.run(candidate.run_id):
        mlflow.log_dict(record, f"gate/version-{candidate.version}.json")
    registry.tag(
        candidate, {"gate": "passed" if verdict.promoted else "refused", "gate.reasons": "; ".join(verdict.reasons)}
    )
    if verdict.promoted:
        registry.promote(candidate)
    return verdict
