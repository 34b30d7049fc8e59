"""Exact metrics, read from a scored table.

Shapes: N rows, T runs of tied rows, G groups, K bins. A label is 1 (it happened) or 0 (it did not).
Arrays may be anything numpy reads as one-dimensional: numpy arrays, Polars series, lists.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from base.errors import DataError, did_you_mean
from features.schema import Output

CLIP = 1e-7
"""Logarithms see probabilities inside [CLIP, 1 - CLIP]: certain and wrong costs 16.1 nats, not infinity."""

MAX_SLICES = 50
"""A column is cut into at most so many values, "(other)" included and "(missing)" not."""

ALL, OTHER, MISSING = "all", "(other)", "(missing)"

_EVALUATION_SCHEMA = {
    "output": pl.String,
    "space": pl.String,
    "slice": pl.String,
    "value": pl.String,
    "rows": pl.Int64,
    "positives": pl.Int64,
    "auc": pl.Float64,
    "log_loss": pl.Float64,
    "normalized_entropy": pl.Float64,
    "calibration_ratio": pl.Float64,
    "ece": pl.Float64,
    "user_auc": pl.Float64,
}


# Ranking


def roc_auc(labels_N: ArrayLike, scores_N: ArrayLike) -> float:
    """Probability that a random positive scores above a random negative; a tie counts one half.

    Mann-Whitney's U / (positives * negatives) (Hanley and McNeil 1982, Radiology 143), counted in whole
    numbers: exact but for one rounding, up to 6 billion rows. Scores may be on any scale, and infinite.
    nan when one class is missing. Raises DataError on unequal lengths, labels other than 0/1, and NaN scores.
    """
    y_N, s_N = _labels(labels_N), _scores(scores_N)
    _same_length(y_N, s_N)
    positive_P, negative_M = np.sort(s_N[y_N]), np.sort(s_N[~y_N])
    pairs = positive_P.size * negative_M.size
    if not pairs:
        return math.nan
    # Sorting the classes apart and looking the smaller up in the larger takes half the time of ranking rows.
    if positive_P.size <= negative_M.size:
        twice_won = _below_twice(positive_P, negative_M)
    else:
        twice_won = 2 * pairs - _below_twice(negative_M, positive_P)
    return twice_won / (2 * pairs)


def _below_twice(few_P: NDArray[Any], many_M: NDArray[Any]) -> int:
    """Twice the number of pairs whose first exceeds its second, ties one half; both arrays ascending."""
    below, below_or_tied = (np.searchsorted(many_M, few_P, side).sum() for side in ("left", "right"))
    return int(below) + int(below_or_tied)


class WeightedAuc:
    """The AUC of the same rows under many weights, as if each row were there so many times; sorted once.

    Shapes: D weightings, P positives, M negatives. Raises as `roc_auc` does.
    """

    def __init__(self, labels_N: ArrayLike, scores_N: ArrayLike) -> None:
        y_N, s_N = _labels(labels_N), _scores(scores_N)
        _same_length(y_N, s_N)
        # In the order of the scores, so that what is looked up next lies beside what was looked up before.
        order_N = np.argsort(s_N, kind="stable")
        self._positive_P, self._negative_M = order_N[y_N[order_N]], order_N[~y_N[order_N]]
        s_P, s_M = s_N[self._positive_P], s_N[self._negative_M]
        self._below_P, self._reached_P = (np.searchsorted(s_M, s_P, side) for side in ("left", "right"))

    def __call__(self, weights_DN: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """auc_D, exact as `roc_auc` is; nan where the weights leave one class out."""
        negatives_DM = np.zeros((len(weights_DN), self._negative_M.size + 1), np.int64)
        np.cumsum(weights_DN[:, self._negative_M], axis=1, out=negatives_DM[:, 1:])
        weights_DP = weights_DN[:, self._positive_P].astype(np.int64)
        twice_won_DP = negatives_DM[:, self._below_P] + negatives_DM[:, self._reached_P]
        pairs_D = weights_DP.sum(axis=1) * negatives_DM[:, -1]
        twice_won_D = np.einsum("dp,dp->d", twice_won_DP, weights_DP)
        return np.where(pairs_D > 0, twice_won_D / np.maximum(2 * pairs_D, 1), np.nan)


def grouped_auc(labels_N: ArrayLike, scores_N: ArrayLike, groups_N: ArrayLike) -> float:
    """AUC inside each group (a user), averaged over groups by their number of rows.

    Zhou et al. 2018 (Deep Interest Network, KDD), eq. 10. Groups with a single class have no AUC and are left
    out, together with their rows. `groups_N` holds any sortable values. nan when no group has both classes.
    Raises DataError on unequal lengths, labels other than 0/1, and NaN scores.
    """
    y_N, s_N, g_N = _labels(labels_N), _scores(scores_N), np.asarray(groups_N)
    _same_length(y_N, s_N, g_N)
    if not y_N.size:
        return math.nan
    order_N = np.lexsort((s_N, g_N))
    y_N, s_N, g_N = y_N[order_N], s_N[order_N], g_N[order_N]
    tie_T = _run_starts(g_N, s_N)
    positives_T = np.add.reduceat(y_N, tie_T, dtype=np.int64)
    negatives_T = np.diff(tie_T, append=y_N.size) - positives_T
    group_G = _run_starts(g_N[tie_T])  # each group's first tie
    ties_G = np.diff(group_G, append=tie_T.size)
    below_T = np.cumsum(negatives_T) - negatives_T
    below_T -= np.repeat(below_T[group_G], ties_G)
    twice_won_G = np.add.reduceat(positives_T * (2 * below_T + negatives_T), group_G)
    positives_G = np.add.reduceat(positives_T, group_G)
    negatives_G = np.add.reduceat(negatives_T, group_G)
    both_G = (positives_G > 0) & (negatives_G > 0)
    if not both_G.any():
        return math.nan
    auc_G = twice_won_G[both_G] / (2 * positives_G[both_G] * negatives_G[both_G])
    return float(np.average(auc_G, weights=(positives_G + negatives_G)[both_G]))


def roc_curve(labels_N: ArrayLike, scores_N: ArrayLike, points: int = 500) -> pl.DataFrame:
    """The ROC curve for a plot: columns fpr and tpr, ascending from (0, 0) to (1, 1), at most `points` rows.

    Every row is a point of the exact curve; thinning picks them evenly along fpr + tpr, so that a steep start
    keeps its shape. No rows when one class is missing. Raises DataError as `roc_auc` does, ValueError when
    `points` is below 2.
    """
    if points < 2:
        raise ValueError(f"points = {points}: a curve needs at least 2")
    y_N, s_N = _labels(labels_N), _scores(scores_N)
    _same_length(y_N, s_N)
    positives = int(y_N.sum())
    negatives = y_N.size - positives
    if not positives or not negatives:
        return pl.DataFrame(schema={"fpr": pl.Float64, "tpr": pl.Float64})
    order_N = np.argsort(s_N)[::-1]
    taken_T = np.append(_run_starts(s_N[order_N]), y_N.size)  # rows above each threshold, from none to all
    hits_T = np.append(0, np.cumsum(y_N[order_N]))[taken_T]
    fpr_T, tpr_T = (taken_T - hits_T) / negatives, hits_T / positives
    if fpr_T.size > points:
        along_T = fpr_T + tpr_T
        kept = np.unique(np.searchsorted(along_T, np.linspace(0.0, along_T[-1], points)))
        fpr_T, tpr_T = fpr_T[kept], tpr_T[kept]
    return pl.DataFrame({"fpr": fpr_T, "tpr": tpr_T})


# Likelihood


def log_loss(labels_N: ArrayLike, probabilities_N: ArrayLike) -> float:
    """Mean negative log likelihood, in nats per row.

    Probabilities are first made double precision and clipped to [CLIP, 1 - CLIP]. nan without rows.
    Raises DataError on unequal lengths, labels other than 0/1, probabilities that are NaN or outside [0, 1].
    """
    y_N, p_N = _labels(labels_N), _probabilities(probabilities_N)
    _same_length(y_N, p_N)
    if not y_N.size:
        return math.nan
    clipped_N = np.clip(p_N.astype(np.float64), CLIP, 1 - CLIP)
    return float(-(np.log(clipped_N[y_N]).sum() + np.log1p(-clipped_N[~y_N]).sum()) / y_N.size)


def normalized_entropy(labels_N: ArrayLike, probabilities_N: ArrayLike) -> float:
    """Log loss over the entropy of the base rate: 1 is as good as always predicting the mean, less is better.

    He et al. 2014 (Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD), eq. 1. The base rate
    is that of the rows measured, not of the training set. nan when one class is missing.
    Raises as `log_loss` does.
    """
    y_N = _labels(labels_N)
    loss = log_loss(y_N, probabilities_N)
    positives = int(y_N.sum())
    if positives in (0, y_N.size):
        return math.nan
    rate = positives / y_N.size
    return loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


# Calibration


def calibration_ratio(labels_N: ArrayLike, probabilities_N: ArrayLike) -> float:
    """Predicted positives over observed positives: sum(p) / sum(y); above 1 the model promises too much.

    He et al. 2014, section 2. Without positives: inf if anything was predicted, nan if sum(p) is 0 too (or
    there are no rows). Raises as `log_loss` does.
    """
    y_N, p_N = _labels(labels_N), _probabilities(probabilities_N)
    _same_length(y_N, p_N)
    predicted, observed = float(p_N.sum(dtype=np.float64)), int(y_N.sum())
    if observed:
        return predicted / observed
    return math.inf if predicted > 0 else math.nan


def expected_calibration_error(labels_N: ArrayLike, probabilities_N: ArrayLike, bins: int = 20) -> float:
    """Mean over rows of |mean p - mean y| of the row's bin, in probability; 0 is calibrated.

    The ECE of Naeini et al. 2015 (Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI), here
    always with bins of equal mass, because click probabilities crowd near 0. Rows of equal p share the bin
    that their middle rank falls in: the order of rows does not matter, and there may be fewer bins.
    nan without rows. Raises as `log_loss` does, and ValueError when `bins` is below 1.
    """
    count_K, predicted_K, observed_K = _equal_mass(labels_N, probabilities_N, bins)
    return float(np.abs(predicted_K - observed_K).sum() / count_K.sum()) if count_K.size else math.nan


def calibration_curve(labels_N: ArrayLike, probabilities_N: ArrayLike, bins: int = 20) -> pl.DataFrame:
    """The reliability diagram: columns mean_predicted (ascending), mean_observed, count; a row for each bin.

    The bins are those of `expected_calibration_error`. No rows without rows. Raises as it does.
    """
    count_K, predicted_K, observed_K = _equal_mass(labels_N, probabilities_N, bins)
    return pl.DataFrame(
        {"mean_predicted": predicted_K / count_K, "mean_observed": observed_K / count_K, "count": count_K},
        schema={"mean_predicted": pl.Float64, "mean_observed": pl.Float64, "count": pl.Int64},
    )


def _equal_mass(
    labels_N: ArrayLike, probabilities_N: ArrayLike, bins: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Rows, sum of p and sum of y of each bin that holds any row."""
    if bins < 1:
        raise ValueError(f"bins = {bins}: at least 1 is needed")
    y_N, p_N = _labels(labels_N), _probabilities(probabilities_N)
    _same_length(y_N, p_N)
    if not y_N.size:
        return np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64)
    order_N = np.argsort(p_N)
    y_N, p_N = y_N[order_N], p_N[order_N]
    start_T = _run_starts(p_N)
    end_T = np.append(start_T[1:], y_N.size)
    bin_T = bins * (start_T + end_T) // (2 * y_N.size)  # of the middle of the run
    start_K = start_T[_run_starts(bin_T)]
    return (
        np.diff(start_K, append=y_N.size),
        np.add.reduceat(p_N, start_K, dtype=np.float64),
        np.add.reduceat(y_N, start_K, dtype=np.int64),
    )


# Between two models


def psi(expected_K: ArrayLike, found_K: ArrayLike) -> float:
    """Population stability index of two counts in the same bins: Σ (q - p) ln(q / p); NaN where one counts nothing.

    Bins that are empty in both are left out. Every other count gets 1/2 more, so that one empty in either is finite:
    p = (count + 1/2) / (total + bins / 2). Among equals its mean is about (bins - 1)(1/n + 1/m) for n and m rows:
    few rows look like drift.
    """
    p, q = used_bins(expected_K, found_K)
    if not p.sum() or not q.sum():
        return math.nan
    p, q = ((x + 0.5) / (x.sum() + x.size / 2) for x in (p, q))
    return float(((q - p) * np.log(q / p)).sum())


def used_bins(expected_K: ArrayLike, found_K: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two counts of the same bins without those that are empty in both."""
    p, q = np.asarray(expected_K, np.float64), np.asarray(found_K, np.float64)
    used = (p > 0) | (q > 0)
    return p[used], q[used]


def population_stability(reference_N: ArrayLike, scores_M: ArrayLike, bins: int = 20) -> float:
    """The population stability index of scores against those of a reference: 0 is equally distributed.

    The `psi` of bins that lie between scores with equal mass between them in the reference, where each such score is a
    bin of its own, since it may be a common one. nan where either is empty. Raises DataError on NaN scores.
    """
    r_N, s_M = _scores(reference_N), _scores(scores_M)
    if not r_N.size or not s_M.size:
        return math.nan
    edges = np.unique(np.quantile(r_N, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    places = (np.searchsorted(edges, v, "left") + np.searchsorted(edges, v, "right") for v in (r_N, s_M))
    return psi(*(np.bincount(place, minlength=2 * edges.size + 1) for place in places))


# A whole table


def evaluate(
    scored: pl.DataFrame, outputs: Sequence[Output], *, by: Sequence[str] = (), user: str | None = None
) -> pl.DataFrame:
    """Measure every output on the whole table and on each value of each column in `by`.

    One row per (output, slice), in the order of `outputs` and `by`, the largest slice first:
        output              name of the probability's column
        space               the rows that it speaks of: all impressions, or those with the label it presupposes
        slice, value        the column and its value as text; "all", "all" for the whole table
        rows, positives     labelled rows, and those with label 1
        auc, log_loss (nats), normalized_entropy, calibration_ratio, ece (20 bins)
                            NaN where undefined, see each function
        user_auc            `grouped_auc` by the column `user`, rows without a user left out;
                            null if `user` is None

    Rows whose label is null do not count for that output: their truth is not known yet; neither do those outside
    its space. Slices are those of the whole table, the same for every output, so one may have 0 rows. Of a column
    with more than MAX_SLICES values the largest are kept (ties by value) and the rest is "(other)"; null is
    "(missing)".

    Raises DataError on an empty table, missing columns, probabilities that are null, NaN or outside [0, 1]
    (on any row, labelled or not), labels other than 0, 1 and null, columns that cannot be cut by, and outputs
    that are missing or share both name and space.
    """
    _check_request(scored, outputs, by, user)
    whole = Cut(ALL, [ALL], np.zeros(scored.height, np.uint8))
    cuts = [whole, *(cut(scored[name]) for name in dict.fromkeys(by))]
    # A dense rank is a whole number for each user whatever the type of their ids; 0 is nobody.
    users_N = None if user is None else scored[user].rank("dense").fill_null(0).to_numpy()
    found = []
    for output in outputs:
        known_N = in_space(scored, output).to_numpy()
        probabilities_N = _probability_column(scored[output.name])[known_N]
        labels_N = _label_column(scored[output.label].filter(known_N))
        known_users_N = None if users_N is None else users_N[known_N]
        for part in cuts:
            code_N = part.codes[known_N]
            for code, value in enumerate(part.values):
                inside_N = code_N == code
                slice_users_N = None if known_users_N is None else known_users_N[inside_N]
                measured = _measure(labels_N[inside_N], probabilities_N[inside_N], slice_users_N)
                where = {"output": output.name, "space": output.space, "slice": part.column, "value": value}
                found.append({**where, **measured})
    return pl.DataFrame(found, schema=_EVALUATION_SCHEMA)


def in_space(scored: pl.DataFrame, output: Output) -> pl.Series:
    """Which rows an output is measured on: its label is known, and the label it presupposes is 1."""
    known = scored[output.label].is_not_null()
    return known if output.given is None else known & (scored[output.given].cast(pl.Float64) == 1).fill_null(False)


def headline(evaluation: pl.DataFrame, output: str, space: str | None = None) -> dict[str, float]:
    """The whole table's numbers for one output, by column name: rows, positives and the metrics measured.

    In the first space that it was measured in, or the one asked for. `user_auc` is absent when no user was given;
    undefined metrics stay nan. Raises DataError naming the known outputs when `output` is not among them.
    """
    row = evaluation.filter(pl.col("output") == output, pl.col("slice") == ALL)
    row = row.head(1) if space is None else row.filter(pl.col("space") == space)
    if row.is_empty():
        known = evaluation["output"].unique(maintain_order=True).to_list()
        raise DataError(f"the evaluation has no output {output!r}{_suggest(output, known)}")
    numbers = row.drop("output", "space", "slice", "value").row(0, named=True)
    return {name: float(number) for name, number in numbers.items() if number is not None}


def _measure(
    labels_N: NDArray[np.bool_], probabilities_N: NDArray[Any], users_N: NDArray[Any] | None
) -> dict[str, float | None]:
    user_auc = None
    if users_N is not None:
        known_N = users_N > 0
        user_auc = grouped_auc(labels_N[known_N], probabilities_N[known_N], users_N[known_N])
    return {
        "rows": labels_N.size,
        "positives": int(labels_N.sum()),
        "auc": roc_auc(labels_N, probabilities_N),
        "log_loss": log_loss(labels_N, probabilities_N),
        "normalized_entropy": normalized_entropy(labels_N, probabilities_N),
        "calibration_ratio": calibration_ratio(labels_N, probabilities_N),
        "ece": expected_calibration_error(labels_N, probabilities_N),
        "user_auc": user_auc,
    }


@dataclass(frozen=True)
class Cut:
    """A column's values, and for each row of the table the position of its value."""

    column: str
    values: list[str]
    codes: NDArray[np.uint8]


def cut(column: pl.Series) -> Cut:
    named = column.cast(pl.String).fill_null(MISSING)
    sizes = named.to_frame("value").group_by("value").len()
    largest_first = sizes.sort("len", "value", descending=[True, False])["value"]
    present = largest_first.filter(largest_first != MISSING)
    values = present.to_list() if present.len() <= MAX_SLICES else [*present.head(MAX_SLICES - 1), OTHER]
    if present.len() < largest_first.len():
        values.append(MISSING)
    values = list(dict.fromkeys(values))  # the column may hold the word "(other)" itself
    rest = values.index(OTHER) if OTHER in values else None
    code = named.replace_strict(values, range(len(values)), default=rest, return_dtype=pl.UInt8)
    return Cut(column.name, values, code.to_numpy())


# Checks


def _check_request(scored: pl.DataFrame, outputs: Sequence[Output], by: Sequence[str], user: str | None) -> None:
    if not outputs:
        raise DataError("no outputs to evaluate; name at least one probability and its label")
    places = [(output.name, output.space) for output in outputs]
    for name, space in places:
        if (times := places.count((name, space))) > 1:
            raise DataError(f"output {name!r} is given {times} times on {space}; evaluate each label by itself")
    users = [] if user is None else [user]
    wanted = [(column, f"output {o.name!r}") for o in outputs for column in (o.name, o.label, o.given) if column]
    wanted += [(column, "slices") for column in by] + [(column, "user_auc") for column in users]
    for column, use in wanted:
        if column not in scored.columns:
            hint = _suggest(column, scored.columns)
            raise DataError(f"the scored table has no column {column!r}, needed for {use}{hint}")
    if scored.is_empty():
        raise DataError("the scored table has no rows; check the partition it was scored from and its filters")
    if ALL in by:
        raise DataError(f"cannot slice by a column named {ALL!r}, which means the whole table; rename it")
    for column in [*by, *users]:
        dtype = scored.schema[column]
        if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
            raise DataError(f"column {column!r} holds {dtype}, which has no groups; give single values")


def _probability_column(column: pl.Series) -> NDArray[Any]:
    if not column.dtype.is_numeric():
        raise DataError(f"column {column.name!r} holds {column.dtype}, not probabilities; give one of numbers")
    given = column.drop_nulls()
    given_N = (given if column.dtype.is_float() else given.cast(pl.Float64)).to_numpy()
    faults = probability_faults(given_N, nulls=column.null_count())
    if faults:
        raise DataError(f"column {column.name!r}: {faults}")
    return given_N


def _label_column(column: pl.Series) -> NDArray[np.bool_]:
    """The labels that are not null."""
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise DataError(f"column {column.name!r} holds {column.dtype}, not labels; give 0, 1, or null")
    if column.dtype == pl.Null:
        return np.empty(0, np.bool_)
    try:
        return _labels(column.drop_nulls().to_numpy())
    except DataError as error:
        raise DataError(f"column {column.name!r}: {error}") from None


def _labels(labels_N: ArrayLike) -> NDArray[np.bool_]:
    y_N = _flat(labels_N, "labels")
    if y_N.dtype == np.bool_:
        return y_N
    wrong_N = (y_N != 0) & (y_N != 1)
    wrong = int(wrong_N.sum())
    if wrong:
        example = y_N[np.argmax(wrong_N)]
        raise DataError(
            f"{wrong} of {y_N.size} labels are neither 0 nor 1 (the first is {example}); "
            "make the label binary, and null where it is not yet known"
        )
    return y_N.astype(np.bool_)


def _scores(scores_N: ArrayLike) -> NDArray[Any]:
    s_N = _flat(scores_N, "scores")
    missing = int(np.isnan(s_N).sum())
    if missing:
        raise DataError(f"{missing} of {s_N.size} scores are NaN and have no rank; remove the rows or the cause")
    return s_N


def _probabilities(probabilities_N: ArrayLike) -> NDArray[Any]:
    p_N = _flat(probabilities_N, "probabilities")
    faults = probability_faults(p_N)
    if faults:
        raise DataError(faults)
    return p_N


def probability_faults(given_N: NDArray[Any], *, nulls: int = 0) -> str | None:
    """What is wrong with them, as a sentence; `nulls` were left out of `given_N`."""
    nans = int(np.isnan(given_N).sum())
    outside_N = (given_N < 0) | (given_N > 1)
    outside = int(outside_N.sum())
    if not (nulls or nans or outside):
        return None
    counts = [f"{nulls} null"] * bool(nulls) + [f"{nans} NaN"] * bool(nans)
    if outside:
        counts.append(f"{outside} outside [0, 1], the first is {given_N[np.argmax(outside_N)]:.6g}")
    remedy = "give probabilities, not logits" if outside else "score every row from inputs without NaN"
    wrong, rows = nulls + nans + outside, given_N.size + nulls
    return f"{wrong} of {rows} values are not probabilities ({', '.join(counts)}); {remedy}"


def _flat(values_N: ArrayLike, what: str) -> NDArray[Any]:
    array_N = np.asarray(values_N)
    if array_N.ndim != 1:
        raise DataError(f"{what} have shape {array_N.shape}; give one dimension, one value for each row")
    return array_N


def _same_length(*arrays_N: NDArray[Any]) -> None:
    lengths = [array_N.size for array_N in arrays_N]
    if len(set(lengths)) > 1:
        raise DataError(f"arrays of unequal lengths {lengths}; give one value for each row in all of them")


def _run_starts(*sorted_N: NDArray[Any]) -> NDArray[np.int64]:
    """Positions at which any of the arrays (not empty) takes a new value, the first row included."""
    new_N = np.zeros(sorted_N[0].size, np.bool_)
    new_N[0] = True
    for values_N in sorted_N:
        new_N[1:] |= values_N[1:] != values_N[:-1]
    return np.flatnonzero(new_N)


def _suggest(name: str, known: Sequence[str]) -> str:
    return f"{did_you_mean(name, known, '; correct the name.')} It has: {', '.join(known)}"
