"""Calibration: a monotone map from a model's probability to the one that a held-out day shows."""

from typing import Annotated, Literal, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from base.config import Config
from base.errors import DataError
from recsys.metrics import CLIP

# Shape suffixes: N = rows, K = knots.

Method = Literal["platt", "isotonic"]


class Platt(Config):
    """σ(slope · logit(p) + intercept). Platt 1999; two numbers, so that few positives suffice."""

    method: Literal["platt"] = "platt"
    slope: float
    intercept: float


class Isotonic(Config):
    """Piecewise linear between knots, flat outside. Zadrozny and Elkan 2002; any monotone shape, for many positives."""

    method: Literal["isotonic"] = "isotonic"
    predicted: tuple[float, ...]
    """Ascending."""
    observed: tuple[float, ...]


Calibrator = Annotated[Platt | Isotonic, Field(discriminator="method")]


def fit_calibrator(method: Method, labels_N: ArrayLike, probabilities_N: ArrayLike, *, name: str) -> Calibrator:
    """Learn the map of one output. Raises DataError if the rows hold only one class of its label."""
    y_N, p_N = np.asarray(labels_N, np.float64), np.asarray(probabilities_N, np.float64)
    positives = int(y_N.sum())
    if positives in (0, y_N.size):
        raise DataError(
            f"output {name!r} cannot be calibrated on {y_N.size:,} rows of which {positives:,} are positive: "
            "set calibrate.partition to a day with both, or leave the output out of calibrate.outputs"
        )
    match method:
        case "platt":
            fitted = LogisticRegression(C=np.inf, max_iter=1000).fit(_logit(p_N)[:, None], y_N)
            return Platt(slope=float(fitted.coef_[0, 0]), intercept=float(fitted.intercept_[0]))
        case "isotonic":
            # A day without an event of probability p says p is small, not that it is 0.
            least = 1 / (y_N.size + 2)
            regression = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(p_N, y_N)
            return Isotonic(
                predicted=tuple(regression.X_thresholds_.tolist()), observed=tuple(regression.y_thresholds_.tolist())
            )
        case _:
            assert_never(method)


def calibrated(calibrator: Calibrator, probabilities_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Calibrated probabilities of the same shape."""
    p_N = probabilities_N.astype(np.float64)
    match calibrator:
        case Platt():
            q_N = 1 / (1 + np.exp(-(calibrator.slope * _logit(p_N) + calibrator.intercept)))
        case Isotonic():
            q_N = np.interp(p_N, calibrator.predicted, calibrator.observed)
        case _:
            assert_never(calibrator)
    return q_N.astype(np.float32)


def _logit(p_N: NDArray[np.float64]) -> NDArray[np.float64]:
    p_N = np.clip(p_N, CLIP, 1 - CLIP)
    return np.log(p_N) - np.log1p(-p_N)
