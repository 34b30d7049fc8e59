"""Two models' scores of the same raw rows, as evidence for the gate: what a ranking task measures of a candidate.

Shapes: N rows, U units (users, or rows), D draws, M models (candidate, then champion), Q quantities.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.schema import Output
from recsys import bootstrap, metrics
from recsys.gate import Comparison, Evidence, Gates, Limit, Margins, OutputGates, Reason, Ruling

QUANTITIES = ("auc", "log_loss", "normalized_entropy", "calibration")
_SLICED = ("auc", "log_loss")
_NAMED = 5
"""Slices that are named in one sentence."""


def compare(
    candidate: pl.DataFrame,
    champion: pl.DataFrame | None,
    outputs: Sequence[Output],
    gates: Gates,
    *,
    champion_outputs: Sequence[Output] = (),
    by: Sequence[str] = (),
    user: str | None = None,
) -> Evidence:
    """Measure a candidate's scored table, against the champion's of the same rows in the same order if there is one.

    Of every output: AUC, log loss, normalized entropy and calibration of all its rows, AUC and log loss of the slices
    of the columns in `by` that are large enough, and how far its scores have moved. Intervals are from a bootstrap
    over the values of the column `user`, or else over rows. Slices of too few of them are reported as not measurable,
    and take no part in the intervals of the others. Whatever cannot be measured is a reason that the evidence gives,
    not an error. The same tables and gates give the same evidence.
    """
    if champion is not None and (fault := _unlike(candidate, champion, [*outputs, *champion_outputs])):
        return Evidence(champion=True, reasons=(Reason(ruling="refuse", text=fault),))
    found = [
        _of_output(candidate, champion, output, _named(champion_outputs, output.name), gates, by, user)
        for output in outputs
    ]
    missing = [o.name for o in champion_outputs if _named(outputs, o.name) is None]
    gone = [Reason(ruling="refuse", text=f"{name}: the champion gives it, the candidate does not") for name in missing]
    return Evidence(
        champion=champion is not None,
        comparisons=tuple(c for e in found for c in e.comparisons),
        limits=tuple(limit for e in found for limit in e.limits),
        reasons=(*(r for e in found for r in e.reasons), *gone),
    )


def _unlike(candidate: pl.DataFrame, champion: pl.DataFrame, outputs: Sequence[Output]) -> str | None:
    """Why the tables are not of the same rows."""
    if candidate.height != champion.height:
        return f"the candidate scored {candidate.height:,} rows, the champion {champion.height:,}; give both the same"
    scores = {o.name for o in outputs}
    for name in candidate.columns:
        if name in champion.columns and name not in scores and not candidate[name].equals(champion[name]):
            return f"candidate and champion scored rows that differ in {name!r}; give both the same, in the same order"
    return None


def _named(outputs: Sequence[Output], name: str) -> Output | None:
    return next((o for o in outputs if o.name == name), None)


def _of_output(
    candidate: pl.DataFrame,
    champion: pl.DataFrame | None,
    output: Output,
    reference: Output | None,
    gates: Gates,
    by: Sequence[str],
    user: str | None,
) -> Evidence:
    own = gates.of(output.name)

    def only(text: str, ruling: Ruling = "refuse") -> Evidence:
        return Evidence(champion=True, reasons=(Reason(ruling=ruling, text=f"{output.name}: {text}"),))

    if unknown := {output.label, output.given or output.label} - set(candidate.columns):
        return only(f"the rows have no label {min(unknown)!r} to measure it by; judge with a run file that has it")
    if fault := _not_probabilities(candidate[output.name]):
        return only(f"the candidate's scores: {fault}")
    compared = champion if reference is not None else None
    if compared is not None and reference != output:
        return only("the champion's is of another label or of other rows; give the candidate's another name")
    broken: tuple[Reason, ...] = ()
    if compared is not None and (fault := _not_probabilities(compared[output.name])):
        # The candidate is then measured by itself, and a person decides: a broken champion must be replaceable.
        broken, compared = only(f"the champion's scores: {fault}", "hold").reasons, None
    known_N = metrics.in_space(candidate, output).to_numpy()
    labels_N = (candidate[output.label].filter(known_N) == 1).to_numpy()
    units_N = _units(candidate, user, known_N)
    if fault := _too_few(labels_N, units_N, output, own, user):
        if own.required:
            return only(f"{fault}; judge on another day")
        return only(f"{fault}; it is not required, so the others decide", "pass")
    tables = [candidate] if compared is None else [candidate, compared]
    scores_MN = [table[output.name].filter(known_N).to_numpy().astype(np.float64) for table in tables]
    whole = _Rows("all", np.arange(labels_N.size), labels_N, scores_MN)
    slices: list[_Rows] = []
    few: list[str] = []
    reasons = list(broken)
    for name, inside in _slices(candidate, by, known_N, labels_N, own) if compared is not None else ():
        held = _holders(labels_N[inside], units_N if units_N is None else units_N[inside])
        if held < own.min_units:
            few.append(f"{name} ({held:,})")
        else:
            slices.append(_Rows(name, inside, labels_N, scores_MN))
    if few:
        reasons += only(_not_measurable(few, own, user), "pass").reasons
    units = labels_N.size if units_N is None else int(units_N.max()) + 1
    drawn = _draw([whole, *slices], units_N, units, gates)
    confidence = gates.confidence
    comparisons: list[Comparison] = []
    if compared is not None:
        for q, metric in enumerate(QUANTITIES):
            comparisons += _comparisons([whole], drawn[:1], q, metric, units, output.name, own, confidence)
        for metric in _SLICED if slices else ():
            q = QUANTITIES.index(metric)
            comparisons += _comparisons(slices, drawn[1:], q, f"slice_{metric}", units, output.name, own, confidence)
    limits = [*_limits(whole, drawn[0], output.name, own, confidence)]
    if compared is not None:
        limits += _shift(compared[output.name], candidate[output.name], output.name, own)
    return Evidence(champion=True, comparisons=tuple(comparisons), limits=tuple(limits), reasons=tuple(reasons))


def _not_probabilities(column: pl.Series) -> str | None:
    return metrics.probability_faults(column.drop_nulls().to_numpy(), nulls=column.null_count())


def _too_few(
    labels_N: NDArray[np.bool_], units_N: NDArray[np.int64] | None, output: Output, own: OutputGates, user: str | None
) -> str | None:
    """Why nothing can be said of these rows."""
    rows, positives = labels_N.size, int(labels_N.sum())
    if not rows:
        return "there are no rows to measure (their label is not known yet, or what it presupposes never happened)"
    if positives in (0, rows):
        return f"all {rows:,} labels {output.label!r} are {int(positives > 0)}, which leaves nothing to rank"
    if min(positives, rows - positives) < own.min_positives:
        few, what = min((positives, "positive"), (rows - positives, "negative"))
        return f"only {few} of {rows:,} rows are {what}, fewer than gate.min_positives = {own.min_positives}"
    if (units := _holders(labels_N, units_N)) < own.min_units:
        held = f"all its positive or all its negative rows are of {units:,} {_unit(user)}"
        return f"{held}, fewer than gate.min_units = {own.min_units}"
    return None


def _holders(labels_N: NDArray[np.bool_], units_N: NDArray[np.int64] | None) -> int:
    """How many units have a row of the class that fewer units have."""
    if units_N is None:
        return min(int(labels_N.sum()), int((~labels_N).sum()))
    return min(np.unique(units_N[labels_N]).size, np.unique(units_N[~labels_N]).size)


def _unit(user: str | None) -> str:
    return "rows" if user is None else f"values of {user!r}"


def _not_measurable(few: Sequence[str], own: OutputGates, user: str | None) -> str:
    """What is told of slices that the bootstrap can say nothing of; each is named with its number of units."""
    names = ", ".join(few[:_NAMED]) + (f" and {len(few) - _NAMED:,} more" if len(few) > _NAMED else "")
    slices = "1 slice is" if len(few) == 1 else f"{len(few):,} slices are"
    return (
        f"{slices} not measurable, since all positive or all negative rows are of fewer {_unit(user)} than "
        f"gate.min_units = {own.min_units}: {names}"
    )


def _units(table: pl.DataFrame, user: str | None, known_N: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """Whose row each is, counted from 0; rows of nobody are units of their own. None if all are."""
    if user is None:
        return None
    code_N = table[user].filter(known_N).rank("dense").cast(pl.Int64)
    nobody_N = code_N.is_null().cast(pl.Int64)
    last = int(str(code_N.max() or 0))
    return pl.select(pl.coalesce(code_N, nobody_N.cum_sum() + last)).to_series().to_numpy() - 1


class _Rows:
    """Rows of one slice, made ready to be weighed."""

    def __init__(
        self, name: str, inside: NDArray[np.int64], labels_N: NDArray[np.bool_], scores_MN: Sequence[NDArray[Any]]
    ) -> None:
        self.name, self.inside = name, inside
        y_N = labels_N[inside]
        self.size, self.positives = y_N.size, int(y_N.sum())
        self._aucs = [metrics.WeightedAuc(y_N, s_N[inside]) for s_N in scores_MN]
        loss_MN = [_losses(y_N, s_N[inside]) for s_N in scores_MN]
        # The others as differences from the last, so that equal scores have equal sums to the last bit.
        sums = [np.ones(y_N.size), y_N.astype(np.float64)]
        for m, s_N in enumerate(scores_MN):
            last = m == len(scores_MN) - 1
            sums += [loss_MN[m] - (0 if last else loss_MN[-1]), (s_N - (0 if last else scores_MN[-1]))[inside]]
        self._sums_NS = np.stack(sums, axis=1)

    def measure(self, weights_DN: NDArray[np.uint8]) -> NDArray[np.float64]:
        """quantities_DMQ under weights of these rows; calibration as the logarithm of its ratio."""
        sums_DS = weights_DN.astype(np.float64) @ self._sums_NS
        rows_D, positives_D = sums_DS[:, 0], sums_DS[:, 1]
        found: list[NDArray[np.float64]] = []
        with np.errstate(divide="ignore", invalid="ignore"):
            rate_D = positives_D / rows_D
            entropy_D = -(rate_D * np.log(rate_D) + (1 - rate_D) * np.log1p(-rate_D))
            for m, auc in enumerate(self._aucs):
                own_D2 = sums_DS[:, 2 + 2 * m : 4 + 2 * m]
                if m < len(self._aucs) - 1:
                    own_D2 = own_D2 + sums_DS[:, -2:]
                loss_D = own_D2[:, 0] / rows_D
                ratio_D = np.log(own_D2[:, 1] / positives_D)
                found.append(np.stack([auc(weights_DN), loss_D, loss_D / entropy_D, ratio_D], axis=1))
        return np.stack(found, axis=1)

    @cached_property
    def estimate(self) -> NDArray[np.float64]:
        """quantities_MQ of the rows as they are."""
        return self.measure(np.ones((1, self.size), np.uint8))[0]


def _losses(labels_N: NDArray[np.bool_], scores_N: NDArray[Any]) -> NDArray[np.float64]:
    """Each row's log loss, clipped as `metrics.log_loss` does."""
    p_N = np.clip(scores_N, metrics.CLIP, 1 - metrics.CLIP)
    return -np.where(labels_N, np.log(p_N), np.log1p(-p_N))


def _slices(
    table: pl.DataFrame,
    by: Sequence[str],
    known_N: NDArray[np.bool_],
    labels_N: NDArray[np.bool_],
    own: OutputGates,
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Names and rows of those that have rows enough."""
    for column in dict.fromkeys(by):
        part = metrics.cut(table[column])
        codes_N = part.codes[known_N]
        for code, value in enumerate(part.values):
            inside = np.flatnonzero(codes_N == code)
            positives = int(labels_N[inside].sum())
            fewer = min(positives, inside.size - positives)
            if inside.size >= own.min_slice_rows and fewer >= max(own.min_slice_positives, 1):
                yield f"{column} = {value}", inside


def _draw(
    parts: Sequence[_Rows], units_N: NDArray[np.int64] | None, units: int, gates: Gates
) -> list[NDArray[np.float64]]:
    """quantities_DMQ of every part under the same weights."""
    found: list[list[NDArray[np.float64]]] = [[] for _ in parts]
    for weights_DU in bootstrap.weights(units, gates.draws, gates.seed):
        weights_DN = weights_DU if units_N is None else weights_DU[:, units_N]
        for part, drawn in zip(parts, found, strict=True):
            whole = part.size == weights_DN.shape[1]
            drawn.append(part.measure(weights_DN if whole else weights_DN[:, part.inside]))
    return [np.concatenate(drawn) for drawn in found]


def _better(quantities_MQ: NDArray[np.float64], q: int) -> NDArray[np.float64]:
    """By how much the candidate is better; leading axes stay."""
    candidate, champion = quantities_MQ[..., 0, q], quantities_MQ[..., 1, q]
    match QUANTITIES[q]:
        case "auc":
            return candidate - champion
        case "calibration":
            return np.abs(champion) - np.abs(candidate)
        case _:
            return champion - candidate


def _comparisons(
    parts: Sequence[_Rows],
    drawn: Sequence[NDArray[np.float64]],
    q: int,
    metric: str,
    units: int,
    output: str,
    own: OutputGates,
    confidence: float,
) -> list[Comparison]:
    """One for each part, with intervals that hold for all of them together."""
    quantities = [part.estimate for part in parts]
    difference_K = np.array([_better(found_MQ, q) for found_MQ in quantities])
    drawn_DK = np.stack([_better(found_DMQ, q) for found_DMQ in drawn], axis=1)
    lower_K, upper_K = bootstrap.bounds(difference_K, drawn_DK, confidence)
    too_good = {"auc": own.suspicious_auc_gain, "normalized_entropy": own.suspicious_entropy_gain}.get(metric)
    comparisons: list[Comparison] = []
    for k, (part, found_MQ) in enumerate(zip(parts, quantities, strict=True)):
        candidate, champion = (_shown(metric, value) for value in found_MQ[:, q].tolist())
        comparisons.append(
            Comparison(
                metric=metric,
                output=output,
                slice=part.name,
                rows=part.size,
                units=units,
                candidate=candidate,
                champion=champion,
                difference=float(difference_K[k]),
                lower=float(lower_K[k]),
                upper=float(upper_K[k]),
                margin=_margin(own.margins, metric, champion),
                too_good=too_good,
            )
        )
    return comparisons


def _shown(metric: str, value: float) -> float:
    return math.exp(value) if metric == "calibration" else value


def _margin(margins: Margins, metric: str, champion: float) -> float:
    return {
        "auc": margins.auc,
        "log_loss": margins.log_loss,
        "normalized_entropy": margins.normalized_entropy,
        "calibration": margins.calibration,
        "slice_auc": margins.slice_auc,
        "slice_log_loss": margins.slice_log_loss,
    }[metric].of(champion)


def _limits(
    whole: _Rows, drawn_DMQ: NDArray[np.float64], output: str, own: OutputGates, confidence: float
) -> Iterator[Limit]:
    estimate_Q, drawn_DQ = whole.estimate[0], drawn_DMQ[:, 0]
    ends: dict[str, tuple[float, float, float]] = {}
    for q, metric in enumerate(QUANTITIES):
        lower_K, upper_K = bootstrap.bounds(estimate_Q[q : q + 1], drawn_DQ[:, q : q + 1], confidence)
        value, lower, upper = (_shown(metric, float(v)) for v in (estimate_Q[q], lower_K[0], upper_K[0]))
        ends[metric] = value, lower, upper

    def limit(metric: str, *, least: float | None = None, most: float | None = None, hold: bool = False) -> Limit:
        value, lower, upper = ends[metric]
        return Limit(
            metric=metric,
            output=output,
            value=value,
            lower=lower,
            upper=upper,
            at_least=least,
            at_most=most,
            otherwise="hold" if hold else "refuse",
        )

    yield limit("auc", least=own.min_auc)
    yield limit("auc", most=own.suspicious_auc, hold=True)
    yield limit("log_loss")
    yield limit("normalized_entropy", most=own.max_normalized_entropy)
    yield limit("calibration", least=own.calibration[0], most=own.calibration[1])


def _shift(champion: pl.Series, candidate: pl.Series, output: str, own: OutputGates) -> Iterator[Limit]:
    """How far the scores of all rows have moved, those without a label included."""
    psi = metrics.population_stability(champion.to_numpy(), candidate.to_numpy())
    moved = float(np.abs(candidate.to_numpy().astype(np.float64) - champion.to_numpy()).mean())
    yield Limit(metric="psi", output=output, value=psi, lower=psi, upper=psi, at_most=own.max_psi, otherwise="hold")
    yield Limit(metric="mean_score_change", output=output, value=moved, lower=moved, upper=moved)
