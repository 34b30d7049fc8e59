"""Calibration: a monotone map from a model's probability, or its log-odds, to the one that a held-out day shows."""

from typing import Annotated, Literal, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from base.config import Config
from base.errors import DataError
from recsys.metrics import CLIP

# Shape suffixes: N = rows, K = blocks.

Method = Literal["platt", "isotonic"]

_AGREEING = 1


class Platt(Config):
    """σ(slope · x + intercept) of the log-odds x. Platt 1999; two numbers, so that few positives suffice."""

    method: Literal["platt"] = "platt"
    slope: float
    intercept: float
    of: Literal["probability", "log_odds"] = "probability"
    """Where x is from: the model's own logits, in which no two rows become one; in Bundles of before the Float32
    probability, cut at CLIP and 1 - CLIP, in which rows near 0 and 1 do."""


class Isotonic(Config):
    """Linear between knots, from (0, 0) to (1, 1), strictly increasing: ranks stay. Zadrozny and Elkan, KDD 2002."""

    method: Literal["isotonic"] = "isotonic"
    predicted: tuple[float, ...]
    """Ascending: the mean prediction of each block of the isotonic regression."""
    observed: tuple[float, ...]


Calibrator = Annotated[Platt | Isotonic, Field(discriminator="method")]


def fit_calibrator(
    method: Method, labels_N: ArrayLike, probabilities_N: ArrayLike, log_odds_N: ArrayLike, *, name: str
) -> Calibrator:
    """Learn the map of one output from its probabilities and their log-odds, of which Platt's takes the latter.

    Raises DataError if the rows hold only one class of its label.
    """
    y_N, p_N = np.asarray(labels_N, np.float64), np.asarray(probabilities_N, np.float64)
    positives = int(y_N.sum())
    if positives in (0, y_N.size):
        raise DataError(
            f"output {name!r} cannot be calibrated on {y_N.size:,} rows of which {positives:,} are positive: "
            "set calibrate.partition to a day with both, or leave the output out of calibrate.outputs"
        )
    match method:
        case "platt":
            # Platt's targets: a class of n rows says (n + 1) / (n + 2), not certainty, or separable rows had no slope.
            target_N = np.where(y_N == 1, (positives + 1) / (positives + 2), 1 / (y_N.size - positives + 2))
            x_N, ones_N = np.tile(np.asarray(log_odds_N, np.float64), 2)[:, None], np.ones(y_N.size)
            weight_N = np.concatenate([target_N, 1 - target_N])
            fitted = LogisticRegression(C=np.inf, max_iter=1000).fit(
                x_N, np.concatenate([ones_N, 0 * ones_N]), sample_weight=weight_N
            )
            return Platt(slope=float(fitted.coef_[0, 0]), intercept=float(fitted.intercept_[0]), of="log_odds")
        case "isotonic":
            return _isotonic(y_N, p_N)
        case _:
            assert_never(method)


def _isotonic(y_N: NDArray[np.float64], p_N: NDArray[np.float64]) -> Isotonic:
    """Knots at the blocks' centres; a block's rate is taken together with _AGREEING row that agrees with the model.

    A block may be a single row, whose rate of 0 or 1 is no probability to promise.
    """
    fitted_N = IsotonicRegression().fit_transform(p_N, y_N)
    _, block_N = np.unique(fitted_N, return_inverse=True)
    rows_K = np.bincount(block_N)
    centre_K = np.bincount(block_N, weights=p_N) / rows_K
    rate_K = (np.bincount(block_N, weights=y_N) + _AGREEING * centre_K) / (rows_K + _AGREEING)
    rate_K, run_K = np.unique(
        IsotonicRegression().fit_transform(centre_K, rate_K, sample_weight=rows_K + _AGREEING), return_inverse=True
    )  # the pseudo-rows may have turned neighbours around
    centre_K = np.bincount(run_K, weights=centre_K * rows_K) / np.bincount(run_K, weights=rows_K)
    inside_K = (centre_K > 0) & (centre_K < 1)
    knots = np.clip(rate_K[inside_K], CLIP, 1 - CLIP)
    return Isotonic(predicted=(0.0, *centre_K[inside_K].tolist(), 1.0), observed=(0.0, *knots.tolist(), 1.0))


def calibrated(
    calibrator: Calibrator, probabilities_N: NDArray[np.float32], log_odds_N: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Calibrated probabilities of the same shape."""
    p_N = probabilities_N.astype(np.float64)
    match calibrator:
        case Platt():
            x_N = log_odds_N if calibrator.of == "log_odds" else _logit(p_N)
            q_N = expit(calibrator.slope * x_N + calibrator.intercept)
        case Isotonic():
            q_N = np.interp(p_N, calibrator.predicted, calibrator.observed)
        case _:
            assert_never(calibrator)
    return q_N.astype(np.float32)


def _logit(p_N: NDArray[np.float64]) -> NDArray[np.float64]:
    p_N = np.clip(p_N, CLIP, 1 - CLIP)
    return np.log(p_N) - np.log1p(-p_N)
