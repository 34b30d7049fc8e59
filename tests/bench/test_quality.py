"""What `bench.quality` makes of its records."""

import json
import math
from pathlib import Path
from statistics import mean, variance

import pytest

from bench import quality

OURS = {1: 0.81, 2: 0.83, 3: 0.84}
THEIRS = {1: 0.80, 2: 0.805}


def written(folder: Path, model: str, aucs: dict[int, float]) -> Path:
    file = folder / "records.jsonl"
    with file.open("a") as out:
        for seed, auc in aucs.items():
            about = {"name": f"ids | {model}", "seed": seed, "config_hash": "1", "commit": "1"}
            out.write(json.dumps({**about, "auc": auc, "log_loss": 1 - auc}) + "\n")
    return file


def test_the_difference_to_the_peer_has_welchs_t(tmp_path: Path) -> None:
    written(tmp_path, "AutoInt", OURS)
    *_, line = quality.table(written(tmp_path, "FuxiCTR 2.3.10 AutoInt", THEIRS)).splitlines()
    ours, theirs = [*OURS.values()], [*THEIRS.values()]
    t = (mean(ours) - mean(theirs)) / math.sqrt(variance(ours) / 3 + variance(theirs) / 2)
    assert line == f"| ids | AutoInt | +0.0242 | {t:.1f} | -0.0242 | {-t:.1f} |"


@pytest.mark.parametrize("aucs", [{}, {1: 0.8}])
def test_a_peer_without_a_spread_has_no_difference(tmp_path: Path, aucs: dict[int, float]) -> None:
    written(tmp_path, "AutoInt", OURS)
    *_, last = quality.table(written(tmp_path, "FuxiCTR 2.3.10 AutoInt", aucs)).splitlines()
    assert last == "|---|---|---|---|---|---|"


def test_seeds_that_are_all_alike_give_no_t(tmp_path: Path) -> None:
    written(tmp_path, "AutoInt", {1: 0.81, 2: 0.81})
    *_, line = quality.table(written(tmp_path, "FuxiCTR 2.3.10 AutoInt", {1: 0.80, 2: 0.80})).splitlines()
    assert line == "| ids | AutoInt | +0.0100 | nan | -0.0100 | nan |"
