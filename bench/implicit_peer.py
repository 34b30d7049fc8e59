"""Trains implicit's ALS or BPR on pairs of users and items, and writes both sides' vectors.

It runs in the environment of `make peer`, from the repository root:
    .venv-peer/bin/python -m bench.implicit_peer --pairs pairs.npy --shape 6040,3706 --model als --seed 1 --out FOLDER

pairs.npy holds int32 pairs_X2, a user's number and an item's; FOLDER gets users.npy and items.npy, float32, whose inner
products rank. BPR's items have their bias as one more dimension, in which users have 1. One thread, so that a seed has
one result.
"""

# pyright: reportMissingImports=false
# implicit is not in the main environment, where the types are checked.
import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from implicit.cpu.bpr import BayesianPersonalizedRanking
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

MODELS = {"als": AlternatingLeastSquares, "bpr": BayesianPersonalizedRanking}


def trained(pairs_X2: Any, shape: tuple[int, int], model: str, options: dict[str, Any], seed: int) -> Any:
    """A model of implicit's; its `user_factors` and `item_factors` are the vectors."""
    ones_X = np.ones(len(pairs_X2), dtype=np.float32)
    matrix_UI = csr_matrix((ones_X, (pairs_X2[:, 0], pairs_X2[:, 1])), shape=shape)
    peer = MODELS[model](**options, random_state=seed, num_threads=1)
    with threadpool_limits(limits=1):
        peer.fit(matrix_UI, show_progress=False)
    return peer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train implicit's ALS or BPR on pairs.")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--shape", required=True, help="numbers of users and items: 6040,3706")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the model, as JSON")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    users, items = (int(n) for n in options.shape.split(","))
    begun = time.perf_counter()
    peer = trained(np.load(options.pairs), (users, items), options.model, options.options, options.seed)
    seconds = round(time.perf_counter() - begun, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    np.save(options.out / "users.npy", np.asarray(peer.user_factors, dtype=np.float32))
    np.save(options.out / "items.npy", np.asarray(peer.item_factors, dtype=np.float32))
    print(json.dumps({"train_seconds": seconds}))


if __name__ == "__main__":
    main()
