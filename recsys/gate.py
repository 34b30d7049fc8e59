"""The gate: a pure function of two evaluations that says whether a candidate may replace the champion, and why."""

import math
from collections.abc import Mapping

from pydantic import NonNegativeFloat

from base.config import Config


class Gates(Config):
    """How much worse than the champion a candidate may be, per output; it need not be better, so that equals pass."""

    max_auc_loss: NonNegativeFloat = 0.0005
    max_log_loss_increase: NonNegativeFloat = 0.0005
    min_auc: NonNegativeFloat = 0.5
    """Also without a champion."""


class Verdict(Config):
    """What the gate says, and why."""

    promoted: bool
    reasons: tuple[str, ...]


Metrics = Mapping[str, Mapping[str, float]]
"""Headline metrics by output."""


def judge(candidate: Metrics, champion: Metrics | None, gates: Gates) -> Verdict:
    """Compare two evaluations of the same raw rows. NaN never passes."""
    refusals: list[str] = []
    passes: list[str] = []
    for output, found in candidate.items():
        if not found or found.get("rows") == 0:
            why = "their label is not known yet, or what it presupposes never happened"
            refusals.append(f"{output}: there are no rows to measure ({why}); judge on another day")
            continue
        checks = [(f"AUC {found['auc']:.5f} >= {gates.min_auc} required", found["auc"] >= gates.min_auc)]
        if not math.isfinite(found["log_loss"]):
            checks.append((f"log loss is {found['log_loss']}", False))
        reference = champion.get(output) if champion is not None else None
        if reference:
            loss, increase = reference["auc"] - found["auc"], found["log_loss"] - reference["log_loss"]
            checks += [
                (
                    f"AUC {found['auc']:.5f} against champion {reference['auc']:.5f}, margin {gates.max_auc_loss}",
                    loss <= gates.max_auc_loss,
                ),
                (
                    f"log loss {found['log_loss']:.5f} against champion {reference['log_loss']:.5f}, "
                    f"margin {gates.max_log_loss_increase}",
                    increase <= gates.max_log_loss_increase,
                ),
            ]
        for text, passed in checks:
            (passes if passed else refusals).append(f"{output}: {text}")
    for output in sorted((champion or {}).keys() - candidate.keys()):
        refusals.append(f"{output}: the champion gives it, the candidate does not")
    if not candidate:
        refusals.append("the candidate has no measured outputs")
    if champion is None:
        passes.append("there is no champion yet")
    return Verdict(promoted=not refusals, reasons=tuple(refusals or passes))
