"""Two models' rankings of the same items for the same users, as evidence for the gate: recall, whole and by slice.

Shapes: U users, S slices of the items, M models (candidate, then champion), D draws.
"""

import numpy as np
from numpy.typing import NDArray

from recsys import bootstrap
from recsys.gate import Comparison, Evidence, Gates, Limit, Reason
from recsys.retrieval import SLICES

OUTPUT = "similarity"
"""What a retrieval model's evidence is of."""


def compare_recall(
    candidate_US: NDArray[np.float64],
    champion_US: NDArray[np.float64] | None,
    gates: Gates,
    *,
    k: int,
    at_least: float,
) -> Evidence:
    """Measure a candidate's recall at `k` of each user, against the champion's of the same users if there is one.

    Columns are SLICES, NaN where a user should get nothing of a slice. Intervals are from a bootstrap over users. The
    same numbers and gates give the same evidence.
    """
    own, users = gates.retrieval, len(candidate_US)
    if users < own.min_users:
        text = f"only {users} users have something to find, fewer than gate.retrieval.min_users = {own.min_users}"
        return _only(f"{text}; judge on another day", champion=champion_US is not None)
    if champion_US is not None and not np.array_equal(np.isnan(candidate_US), np.isnan(champion_US)):
        return _only("candidate and champion were asked for other items; give both the same", champion=True)
    known_US = np.isfinite(candidate_US)
    # The champion's as differences, so that equal rankings differ by exactly 0.
    recall_MUS = np.nan_to_num(np.stack([candidate_US, *([] if champion_US is None else [candidate_US - champion_US])]))
    estimate_MS = recall_MUS.sum(1) / np.maximum(known_US.sum(0), 1)
    drawn_DMS = _drawn(recall_MUS, known_US, gates)
    comparisons: list[Comparison] = []
    if champion_US is not None:
        large = [s for s in range(1, len(SLICES)) if known_US[:, s].sum() >= own.min_slice_users]
        margins = own.margins
        for metric, places, margin in (("recall", [0], margins.recall), ("slice_recall", large, margins.slice_recall)):
            if not places:
                continue
            lower_K, upper_K = bootstrap.bounds(estimate_MS[1, places], drawn_DMS[:, 1, places], gates.confidence)
            for i, s in enumerate(places):
                candidate, difference = estimate_MS[:, s].tolist()
                champion = candidate - difference
                comparisons.append(
                    Comparison(
                        metric=f"{metric}@{k}",
                        output=OUTPUT,
                        slice="all" if s == 0 else f"items = {SLICES[s]}",
                        rows=int(known_US[:, s].sum()),
                        units=users,
                        candidate=candidate,
                        champion=champion,
                        difference=difference,
                        lower=float(lower_K[i]),
                        upper=float(upper_K[i]),
                        margin=margin.of(champion),
                        too_good=own.suspicious_gain.of(champion) if s == 0 else None,
                    )
                )
    (lower,), (upper,) = bootstrap.bounds(estimate_MS[0, :1], drawn_DMS[:, 0, :1], gates.confidence)
    number = {"metric": f"recall@{k}", "output": OUTPUT, "value": float(estimate_MS[0, 0])}
    number |= {"lower": float(lower), "upper": float(upper)}
    limits = (
        Limit(**number, at_least=at_least),
        Limit(**number, at_most=own.suspicious_recall, otherwise="hold"),
    )
    return Evidence(champion=champion_US is not None, comparisons=tuple(comparisons), limits=limits)


def _only(text: str, *, champion: bool) -> Evidence:
    return Evidence(champion=champion, reasons=(Reason(ruling="refuse", text=f"{OUTPUT}: {text}"),))


def _drawn(recall_MUS: NDArray[np.float64], known_US: NDArray[np.bool_], gates: Gates) -> NDArray[np.float64]:
    """mean_DMS under random weights of the users; NaN where nobody of a slice was drawn."""
    found: list[NDArray[np.float64]] = []
    for weights_DU in bootstrap.weights(len(known_US), gates.draws, gates.seed):
        w_DU = weights_DU.astype(np.float64)
        with np.errstate(invalid="ignore"):
            found.append((w_DU @ recall_MUS / (w_DU @ known_US)).swapaxes(0, 1))
    return np.concatenate(found)
