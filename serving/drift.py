"""Drift: a day's profile beside what the model has seen. Pure: two profiles and thresholds in, findings out."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, assert_never, cast

from pydantic import BeforeValidator, Field, NonNegativeFloat, ValidationError, model_validator

from base.config import Config
from base.errors import ConfigError, did_you_mean
from features.profile import IdBins, Profile, Reference
from recsys.metrics import psi, used_bins

What = Literal["volume", "label_rate", "missing", "unknown", "psi", "score_psi"]
Verdict = Literal["ok", "warn", "stop"]
Interval = tuple[float | None, float | None]
"""Lowest and highest value allowed; None: any."""

_SIGMAS = 4
"""Standard errors that chance alone explains: no finding below them, however tight the thresholds."""


def _or_never(value: Any) -> Any:
    return None if value == "never" else value


class Limit(Config):
    """How large a number may be before it is worth a warning, and before the day is refused; "never" turns one off."""

    warn: Annotated[NonNegativeFloat | None, BeforeValidator(_or_never)] = None
    stop: Annotated[NonNegativeFloat | None, BeforeValidator(_or_never)] = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.warn is not None and self.stop is not None and self.stop < self.warn:
            raise ValueError(f"stop = {self.stop:g} lies below warn = {self.warn:g}; it must be the larger one")
        return self


Multiples = tuple[NonNegativeFloat, NonNegativeFloat]


class Bounds(Config):
    """Between which multiples of the reference a day's number may lie; "never" turns one off."""

    warn: Annotated[Multiples | None, BeforeValidator(_or_never)] = None
    stop: Annotated[Multiples | None, BeforeValidator(_or_never)] = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for name, bounds in (("warn", self.warn), ("stop", self.stop)):
            if bounds is not None and not bounds[0] <= 1 <= bounds[1]:
                raise ValueError(f"{name} = {list(bounds)}: write the lowest and the highest multiple, around 1")
        if self.warn and self.stop and not self.stop[0] <= self.warn[0] <= self.warn[1] <= self.stop[1]:
            raise ValueError(f"stop = {list(self.stop)} does not enclose warn = {list(self.warn)}")
        return self


class Override(Config):
    """Thresholds of one name; what they leave unsaid holds as for all."""

    psi: Limit | None = None
    """Of a feature."""
    unknown: Limit | None = None
    """Of a feature that is looked up in a table."""
    missing: Limit | None = None
    """Of a raw column."""
    label_rate: Bounds | None = None
    """Of a label."""

    @property
    def said(self) -> list[str]:
        """Which of them are given."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]


class Checks(Config):
    """Thresholds for a day beside what the model has seen. Of each pair, what is left unsaid keeps its default."""

    psi: Limit = Limit(warn=0.2)
    """Population stability index of a feature: below 0.1 nothing has changed, above 0.25 much has."""
    unknown: Limit = Limit(warn=0.1, stop=0.5)
    """Of the ids that would have a row of their own, as held-out ones did, the share that is unknown instead."""
    missing: Limit = Limit(warn=0.1, stop=0.3)
    """Of the rows that would have a value, as those of training did, the share that has none, per raw column."""
    label_rate: Bounds = Bounds(warn=(0.5, 2), stop=(0.1, 10))
    """Share of positives, as a multiple of that in training."""
    volume: Bounds = Bounds(warn=(0.5, 2), stop=(0.2, 5))
    """Rows of the day, as a multiple of the mean day in training."""
    score_psi: Limit = Limit(warn=0.2)
    """PSI of a model's probabilities."""
    overrides: dict[str, Override] = Field(default={})
    """By feature, raw column or label."""

    @model_validator(mode="before")
    @classmethod
    def _keep_unsaid(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        tree = cast(dict[str, Any], given)
        defaults = {n: field.default.model_dump() for n, field in cls.model_fields.items() if n != "overrides"}
        return tree | {n: defaults[n] | v for n, v in tree.items() if n in defaults and isinstance(v, dict)}

    @model_validator(mode="after")
    def _overrides_in_order(self) -> Self:
        for name, override in self.overrides.items():
            for what in override.said:
                try:
                    _replaced(getattr(self, what), getattr(override, what))
                except ValidationError as error:
                    said = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"overrides.{name}.{what}: {said}") from None
        return self

    def limit(self, what: Literal["psi", "unknown", "missing"], name: str) -> Limit:
        """The thresholds of one feature or raw column."""
        own = self.overrides.get(name, Override())
        match what:
            case "psi":
                return _replaced(self.psi, own.psi)
            case "unknown":
                return _replaced(self.unknown, own.unknown)
            case "missing":
                return _replaced(self.missing, own.missing)
            case _:
                assert_never(what)

    def bounds(self, label: str) -> Bounds:
        """The thresholds of one label's rate."""
        return _replaced(self.label_rate, self.overrides.get(label, Override()).label_rate)

    def require_names(self, features: Sequence[str], columns: Sequence[str], labels: Sequence[str]) -> None:
        """Raise ConfigError where an override names nothing that it could hold for."""
        known = {"psi": features, "unknown": features, "missing": columns, "label_rate": labels}
        kinds = {"missing": "raw column that a feature reads", "label_rate": "label"}
        for name, override in self.overrides.items():
            for what in override.said:
                if name not in known[what]:
                    hint = did_you_mean(name, known[what], f"; there are {', '.join(known[what])}")
                    kind = kinds.get(what, "feature")
                    raise ConfigError(f"checks.overrides.{name}.{what}: {name!r} is no {kind}{hint}")


T = TypeVar("T", Limit, Bounds)


def _replaced(general: T, own: T | None) -> T:
    """`general`, but for what `own` says."""
    return general if own is None else type(general)(**{**dict(general), **own.model_dump(exclude_unset=True)})


class Finding(Config):
    """One number of a day, beside the model's, and what is allowed."""

    name: str
    """The feature, raw column, label or output; `rows` for the volume."""
    what: What
    reference: float | None
    """The same number in training, or of held-out rows; None where the number is a comparison itself."""
    found: float
    warn: Interval
    stop: Interval
    verdict: Verdict

    def written(self, value: float) -> str:
        """A value of this kind, for a person."""
        match self.what:
            case "volume":
                return f"{value:,.0f}"
            case "psi" | "score_psi":
                return f"{value:.3f}"
            case "label_rate" | "missing" | "unknown":
                return f"{value:.2%}"
            case _:
                assert_never(self.what)

    @property
    def beside(self) -> str:
        """The reference, for a person."""
        return "-" if self.reference is None else self.written(self.reference)

    @property
    def allowed(self) -> str:
        """What would have passed without a warning, or else without a stop, in words."""
        low, high = self.stop if self.verdict == "stop" or self.warn == (None, None) else self.warn
        if low is None and high is None:
            return "any"
        if high is None or low is None:
            return f"at most {self.written(high)}" if high is not None else f"at least {self.written(low or 0.0)}"
        return f"{self.written(low)} to {self.written(high)}"

    @property
    def sentence(self) -> str:
        """All of it in a phrase."""
        beside = "" if self.reference is None else f", {self.written(self.reference)} before"
        what = self.what.replace("_", " ").replace("psi", "PSI")
        return f"{self.name}: {what} {self.written(self.found)}{beside} ({self.allowed} is allowed)"


def compare(reference: Reference, found: Profile, checks: Checks) -> list[Finding]:
    """Everything that can be compared, in a fixed order: volume, labels, raw columns, features, scores.

    A threshold counts only beyond what chance explains in so many rows: 4 standard errors of a share, and of a PSI
    its mean and 4 standard deviations among equals.
    """
    training = reference.training
    return [
        *_volume(training, found, checks),
        *_label_rates(training, found, checks),
        *_missing(training, found, checks),
        *_features(reference, found, checks),
        *_scores(reference, found, checks),
    ]


def psi_by_chance(expected: Sequence[int], found: Sequence[int]) -> float:
    """What two samples of one distribution hardly exceed: mean and 4 standard deviations, PSI being nearly χ²."""
    p, q = used_bins(expected, found)
    freedom = max(p.size - 1, 0)
    return (freedom + _SIGMAS * math.sqrt(2 * freedom)) * (1 / max(p.sum(), 1) + 1 / max(q.sum(), 1))


# Each kind


def _volume(training: Profile, found: Profile, checks: Checks) -> Iterator[Finding]:
    if training.days and found.days:
        mean = training.rows / training.days
        bounds = ((mean * b[0], mean * b[1]) if b else (None, None) for b in (checks.volume.warn, checks.volume.stop))
        yield _finding("rows", "volume", mean, found.rows / found.days, *bounds)


def _label_rates(training: Profile, found: Profile, checks: Checks) -> Iterator[Finding]:
    for label, known in found.known.items():
        if known and training.known.get(label):
            rate, of_day = training.positives[label] / training.known[label], found.positives[label] / known
            noise = _noise(training.positives[label], training.known[label], found.positives[label], known)
            bounds = checks.bounds(label)
            allowed = (_around(rate, noise, b) for b in (bounds.warn, bounds.stop))
            yield _finding(label, "label_rate", rate, of_day, *allowed)


def _missing(training: Profile, found: Profile, checks: Checks) -> Iterator[Finding]:
    for column, rows in found.missing.items():
        if column in training.missing and training.rows and found.rows:
            limit = checks.limit("missing", column)
            yield _loss(column, "missing", (training.missing[column], training.rows), (rows, found.rows), limit)


def _features(reference: Reference, found: Profile, checks: Checks) -> Iterator[Finding]:
    """A day that is like the training rows or like the held-out ones is no news.

    The rows that a feature was fitted on have few unknown ids, and ids that were frequent in them by luck.
    """
    both = (reference.training, reference.held_out)
    for name, bins in reference.bins.items():
        counts = found.features[name]
        known = [p.features[name] for p in both]
        if isinstance(bins, IdBins):
            shares = [bins.unknown(c) for c in known]
            if (of_day := bins.unknown(counts))[1] and any(n for _, n in shares):
                highest = max((s for s in shares if s[1]), key=lambda s: s[0] / s[1])
                yield _loss(name, "unknown", highest, of_day, checks.limit("unknown", name))
            known, counts = [bins.known(c) for c in known], bins.known(counts)
        yield from _psi(name, "psi", known, counts, checks.limit("psi", name))


def _scores(reference: Reference, found: Profile, checks: Checks) -> Iterator[Finding]:
    for output, counts in found.scores.items():
        if output in reference.held_out.scores:
            yield from _psi(output, "score_psi", [reference.held_out.scores[output]], counts, checks.score_psi)


def _psi(
    name: str, what: What, references: Sequence[Sequence[int]], counts: Sequence[int], limit: Limit
) -> Iterator[Finding]:
    """Against the reference that is nearest."""
    values = [(psi(r, counts), psi_by_chance(r, counts)) for r in references]
    values = [(value, chance) for value, chance in values if math.isfinite(value)]
    if values:
        value, chance = min(values)
        yield _finding(name, what, None, value, *(_up_to(0.0, chance, above) for above in (limit.warn, limit.stop)))


def _loss(name: str, what: What, training: tuple[int, int], day: tuple[int, int], limit: Limit) -> Finding:
    share, of_day = training[0] / training[1], day[0] / day[1]
    noise = _noise(*training, *day)
    parts = (None if part is None else (1 - share) * part for part in (limit.warn, limit.stop))
    return _finding(name, what, share, of_day, *(_up_to(share, noise, above) for above in parts))


def _noise(k: int, n: int, of_k: int, of_n: int) -> float:
    """Difference that two samples with one share between them hardly exceed."""
    share = (k + of_k) / (n + of_n)
    return _SIGMAS * math.sqrt(share * (1 - share) * (1 / n + 1 / of_n))


def _up_to(reference: float, noise: float, above: float | None) -> Interval:
    return (None, None) if above is None else (None, reference + max(above, noise))


def _around(reference: float, noise: float, bounds: tuple[float, float] | None) -> Interval:
    if bounds is None:
        return None, None
    low, high = min(reference * bounds[0], reference - noise), max(reference * bounds[1], reference + noise)
    return max(low, 0.0), min(high, 1.0)


def _finding(name: str, what: What, reference: float | None, found: float, warn: Interval, stop: Interval) -> Finding:
    verdict: Verdict = "ok" if _inside(found, warn) else "warn"
    verdict = verdict if _inside(found, stop) else "stop"
    return Finding(name=name, what=what, reference=reference, found=found, warn=warn, stop=stop, verdict=verdict)


def _inside(value: float, interval: Interval) -> bool:
    low, high = interval
    return (low is None or value >= low) and (high is None or value <= high)
