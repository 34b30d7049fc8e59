"""The gate: a pure function of what was measured that says whether a candidate may replace the champion, and why."""

import math
import re
from collections.abc import Sequence
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from base.config import Config

# Settings


class Share(Config):
    """A difference, or a share of the champion's value, which a run file writes as "0.5%"."""

    amount: NonNegativeFloat
    relative: bool = False

    def of(self, champion: float) -> float:
        """In the metric's own unit."""
        return self.amount * abs(champion) if self.relative else self.amount


def _share(value: Any) -> Any:
    if isinstance(value, str):
        if not re.fullmatch(r"\d+(\.\d+)?%", value):
            raise ValueError(f"{value!r} is neither a number nor a share of the champion's value like '0.5%'")
        return {"amount": float(value[:-1]) / 100, "relative": True}
    return {"amount": value} if isinstance(value, int | float) else value


AsShare = Annotated[Share, BeforeValidator(_share)]


class Margins(Config):
    """By how much a candidate may be worse than the champion and still pass."""

    auc: AsShare = Share(amount=0.001)
    log_loss: AsShare = Share(amount=0.002, relative=True)
    normalized_entropy: AsShare = Share(amount=0.002)
    calibration: AsShare = Share(amount=0.1)
    """Of |log(predicted / observed positives)|: 0.1 are 10 % further from the truth. Who bids with the probabilities
    wants less; the mean of a model without [calibrate] wanders by some percent from day to day."""
    slice_auc: AsShare = Share(amount=0.01)
    """In each slice."""
    slice_log_loss: AsShare = Share(amount=0.02, relative=True)


class OutputGates(Config):
    """What one output must keep to."""

    margins: Margins = Margins()
    required: bool = True
    """Whether a day on which the output cannot be measured is a reason to refuse; otherwise it is left out then."""
    min_auc: NonNegativeFloat = 0.5
    max_normalized_entropy: NonNegativeFloat = 1.0
    """1 is as good as always predicting the mean."""
    calibration: tuple[NonNegativeFloat, NonNegativeFloat] = (0.5, 2.0)
    """Predicted over observed positives: at least, at most."""
    min_positives: NonNegativeInt = 20
    """And as many negatives: on fewer rows of either class nothing is judged."""
    min_units: NonNegativeInt = 20
    """Users (without `evaluate.user`: rows) with a positive, and as many with a negative. An output of fewer is not
    judged, a slice of fewer not compared, since the bootstrap draws users: simulated slices of a candidate as good as
    the champion were called certainly worse in 2.5 to 3.8 % of cases with 20 to 50 users, in 4 to 4.8 % with 3 to
    10."""
    min_slice_rows: PositiveInt = 1000
    min_slice_positives: PositiveInt = 50
    """And as many negatives; smaller slices are not compared."""
    suspicious_auc: NonNegativeFloat = 0.99
    """Above it a label has probably leaked into a feature: held for a person."""
    suspicious_auc_gain: NonNegativeFloat = 0.02
    """So is a gain over the champion that is larger."""
    suspicious_entropy_gain: NonNegativeFloat = 0.05
    """The same of the normalized entropy."""
    max_psi: NonNegativeFloat = 0.5
    """Population stability index of the candidate's scores against the champion's; a larger shift is held."""


class RecallMargins(Config):
    """By how much a candidate's recall may be below the champion's."""

    recall: AsShare = Share(amount=0.02, relative=True)
    slice_recall: AsShare = Share(amount=0.1, relative=True)
    """Of the head, the torso, the tail and the cold items."""


class RetrievalGates(Config):
    """What a retrieval model must keep to: recall at the first of `retrieval.k`, the mean over users.

    Simulated share of candidates refused, for any reason (three relevant items a user, of which the champion finds a
    quarter; a fifth of them drawn anew for the candidate; half of them head, a twentieth cold; default settings; 200
    candidates on 1,000 users, 100 on 10,000):

        candidate's true loss of recall     0    0.005    0.015    same with unsure = "refuse"
        1,000 users                       4 %     20 %     90 %    92 %, 99 %, 100 %
        10,000 users                      0 %     59 %    100 %    31 %, 96 %, 100 %
    """

    margins: RecallMargins = RecallMargins()
    min_recall: Annotated[float, Field(ge=0, le=1)] | Literal["chance", "popularity"] = "chance"
    """At least this, or as much as a random order gives, or the order by training rows, which is the same for
    everybody; the last takes a further ranking."""
    min_users: PositiveInt = 50
    """On fewer users with something to find nothing is judged."""
    min_slice_users: PositiveInt = 200
    """Slices with fewer are not compared."""
    suspicious_recall: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Above it a feature of the query has probably told the item: held for a person."""
    suspicious_gain: AsShare = Share(amount=0.5, relative=True)
    """So is a gain over the champion that is larger."""


class Gates(OutputGates):
    """The gate of a run: what holds for every output, and under `outputs` what is different for one.

    A candidate need not be better than the champion, so that an equal model passes. It is refused where a difference
    is both material (worse than the margin) and certain (the whole interval is below 0). Noise therefore refuses an
    equally good model with half of 1 - confidence per comparison at most; the larger of margin and noise decides how
    much worse a model must be to be caught. Simulated share of retrained candidates refused, for any reason (every
    fifth row positive, champion's AUC 0.719, scores correlated at 0.95 to 0.97, default settings but a stricter
    calibration margin of 0.02; 400 candidates on 5,000 rows, 200 on 50,000):

        candidate's true loss of AUC        0    0.002    0.006    same with unsure = "refuse"
        5,000 rows a day                  2 %     10 %     50 %    95 %, 99 %, 100 %
        50,000 rows a day                 5 %     63 %    100 %    69 %, 100 %, 100 %
    """

    unsure: Literal["pass", "refuse"] = "pass"
    """What becomes of a candidate whose interval reaches below the margin without its being certainly worse: `refuse`
    promotes only what is shown to be no worse, which on small days few models are."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    draws: Annotated[int, Field(ge=50)] = 200
    """Of the paired bootstrap."""
    seed: NonNegativeInt = 0
    outputs: dict[str, OutputGates] = {}
    """By output; what is not given there is that of the whole gate."""
    retrieval: RetrievalGates = RetrievalGates()
    """Takes the place of all that speaks of outputs where the model is one of retrieval."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, tree: Any) -> Any:
        """What an output does not say, the whole gate says for it."""
        if not isinstance(tree, dict) or not isinstance(tree.get("outputs"), dict):
            return tree
        shared = {k: v for k, v in tree.items() if k in OutputGates.model_fields}
        outputs = {name: _over(shared, own) for name, own in tree["outputs"].items()}
        return {**tree, "outputs": outputs}

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for gates in (self, *self.outputs.values()):
            if gates.calibration[0] > gates.calibration[1]:
                raise ValueError(f"calibration = {list(gates.calibration)}: write [at least, at most]")
        return self

    def of(self, output: str) -> OutputGates:
        """What one output must keep to."""
        return self.outputs.get(output, self)


def _over(shared: Any, own: Any) -> Any:
    if not (isinstance(shared, dict) and isinstance(own, dict)) or "amount" in own:
        return own
    return {**shared, **{k: _over(shared.get(k), v) for k, v in own.items()}}


# What is measured


class Comparison(Config):
    """A number of both models on the same rows; the difference is positive where the candidate is better."""

    metric: str
    output: str
    slice: str = "all"
    rows: int
    units: int
    """What was drawn by the bootstrap: users, or rows."""
    candidate: float
    champion: float
    difference: float
    lower: float
    upper: float
    margin: float
    too_good: float | None = None
    """A difference above it is held for a person."""

    @property
    def worse(self) -> bool:
        """By more than the margin, and certainly; also where it is unknown."""
        return not (self.difference >= -self.margin or self.upper >= 0)

    @property
    def unsure(self) -> bool:
        """Whether being worse by more than the margin cannot be excluded."""
        return not self.lower >= -self.margin

    def __str__(self) -> str:
        where = "" if self.slice == "all" else f" where {self.slice}"
        chance = ", which may be chance" if self.difference < -self.margin and not self.worse else ""
        return (
            f"{self.output}: {title(self.metric)}{where} {self.candidate:.5f} against champion {self.champion:.5f}, "
            f"better by {self.difference:+.5f} [{self.lower:+.5f}, {self.upper:+.5f}], margin {self.margin:.5g}{chance}"
        )


class Limit(Config):
    """A number of the candidate by itself, and what it may be; the interval says what it could be by chance."""

    metric: str
    output: str
    value: float
    lower: float
    upper: float
    at_least: float | None = None
    at_most: float | None = None
    otherwise: Literal["refuse", "hold"] = "refuse"

    def broken(self, *, certainly: bool) -> bool:
        """Whether the value, or its whole interval, is outside; also where it is unknown."""
        most, least = (self.upper, self.lower) if certainly else (self.value, self.value)
        low = self.at_least is not None and not most >= self.at_least
        return low or (self.at_most is not None and not least <= self.at_most) or math.isnan(self.value)

    def __str__(self) -> str:
        bounds = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        return f"{self.output}: {title(self.metric)} {self.value:.5f}, {' and '.join(bounds) or 'for information'}"


Ruling = Literal["pass", "hold", "refuse"]


class Reason(Config):
    """One thing that speaks for or against."""

    ruling: Ruling
    text: str

    def __str__(self) -> str:
        return {"pass": "", "hold": "held: ", "refuse": "refused: "}[self.ruling] + self.text


class Evidence(Config):
    """All that a task has measured of a candidate; the gate needs to know nothing else about it."""

    champion: bool
    """Whether there is one."""
    comparisons: tuple[Comparison, ...] = ()
    limits: tuple[Limit, ...] = ()
    reasons: tuple[Reason, ...] = ()
    """What no number says: that there was nothing to measure, that the models are of different labels."""


class Verdict(Config):
    """What the gate says, and why: refusals first, then what is held, then what passes."""

    decision: Literal["promoted", "refused", "held"]
    reasons: tuple[Reason, ...]

    @property
    def promoted(self) -> bool:
        return self.decision == "promoted"

    def approved(self) -> "Verdict":
        """A person has looked at what is held, and takes it."""
        if self.decision != "held":
            return self
        return Verdict(decision="promoted", reasons=(*self.reasons, Reason(ruling="pass", text="a person approved it")))


# The verdict


def judge(evidence: Evidence, gates: Gates) -> Verdict:
    """Promoted unless something refuses or holds; refused is stronger. What is not a number never passes.

    Limits hold for the estimate where the champion does not give the output, and are broken only with certainty where
    it does: then chance must not throw out an output that lies near its limit every day.
    """
    reasons = [*evidence.reasons]
    compared = {c.output for c in evidence.comparisons}
    for limit in evidence.limits:
        certainly = limit.output in compared and limit.otherwise == "refuse"
        reasons.append(Reason(ruling=limit.otherwise if limit.broken(certainly=certainly) else "pass", text=str(limit)))
    passed: list[Comparison] = []
    for comparison in evidence.comparisons:
        if ruling := _against(comparison, gates):
            reasons.append(ruling)
        else:
            passed.append(comparison)
    reasons += [Reason(ruling="pass", text=text) for text in _told(passed)]
    if not evidence.comparisons and not evidence.limits:
        reasons.append(Reason(ruling="refuse", text="nothing of the candidate was measured"))
    if not evidence.champion:
        reasons.append(Reason(ruling="pass", text="there is no champion yet"))
    order: list[Ruling] = ["refuse", "hold", "pass"]
    reasons.sort(key=lambda reason: order.index(reason.ruling))
    decision = {"refuse": "refused", "hold": "held", "pass": "promoted"}[reasons[0].ruling]
    return Verdict.model_validate({"decision": decision, "reasons": reasons})


def _against(comparison: Comparison, gates: Gates) -> Reason | None:
    """Why it does not pass."""
    if not math.isfinite(comparison.difference):
        return Reason(ruling="refuse", text=f"{comparison}: these are not numbers that can be compared")
    if comparison.worse:
        return Reason(ruling="refuse", text=str(comparison))
    if gates.unsure == "refuse" and comparison.unsure:
        return Reason(ruling="refuse", text=f"{comparison}: too few rows to show that it is no worse")
    if comparison.too_good is not None and comparison.difference > comparison.too_good and comparison.lower > 0:
        limit = f"better by more than {comparison.too_good:g}, which a leaked label would explain"
        return Reason(ruling="hold", text=f"{comparison}: {limit}")
    return None


def _told(passed: Sequence[Comparison]) -> list[str]:
    """Each that is of all rows, and the worst slice of each metric."""
    told = [str(c) for c in passed if c.slice == "all"]
    slices: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in passed:
        if comparison.slice != "all":
            slices.setdefault((comparison.output, comparison.metric), []).append(comparison)
    for group in slices.values():
        told.append(f"{min(group, key=lambda c: c.difference)} (the worst of {len(group)} slices that pass)")
    return told


def title(metric: str) -> str:
    """A metric's name in words."""
    return metric.replace("_", " ").replace("auc", "AUC").replace("psi", "PSI")


# Which day did what


def superseded(candidate_trained_to: str | None, champion_trained_to: str | None) -> bool:
    """Whether the champion has been trained on later days (ISO dates) than the candidate; not where either is unknown.

    Raises ValueError on what is not a date.
    """
    if candidate_trained_to is None or champion_trained_to is None:
        return False
    return date.fromisoformat(candidate_trained_to) < date.fromisoformat(champion_trained_to)


def seen(trained_to: str | None, day: str) -> bool:
    """Whether a model trained up to a day (ISO dates) has been trained on `day`; not where that is unknown.

    Raises ValueError on what is not a date.
    """
    return trained_to is not None and date.fromisoformat(day) <= date.fromisoformat(trained_to)
