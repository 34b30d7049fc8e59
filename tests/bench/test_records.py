"""In which order jobs are measured, and what is not measured again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench import records


def jobs_noted(measured: list[str]) -> list[records.Job]:
    def job(name: str, seeds: int) -> records.Job:
        def measure(seed: int) -> Mapping[str, Any]:
            measured.append(f"{name}{seed}")
            return {"figure": float(seed)}

        return records.Job(name, {"name": name}, seeds, measure)

    return [job("a", 3), job("few", 1), job("b", 3)]


@pytest.mark.slow
def test_the_headline_is_measured_first_seed_by_seed(tmp_path: Path) -> None:
    measured: list[str] = []
    records.run_jobs(tmp_path / "r.jsonl", jobs_noted(measured), budget_seconds=60)
    assert measured == ["a1", "b1", "a2", "b2", "a3", "b3", "few1"]


def test_what_is_recorded_is_not_measured_again(tmp_path: Path) -> None:
    first: list[str] = []
    records.run_jobs(tmp_path / "r.jsonl", jobs_noted(first)[:1], budget_seconds=60)
    second: list[str] = []
    records.run_jobs(tmp_path / "r.jsonl", jobs_noted(second), budget_seconds=60)
    assert second == ["b1", "b2", "b3", "few1"]
    found = records.summary(tmp_path / "r.jsonl", ["a", "few", "none"], ["figure"])
    assert [(row["name"], row["n"], row["figure"]) for row in found] == [("a", 3, 2.0), ("few", 1, 1.0)]


def test_a_spent_budget_leaves_the_rest_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured: list[str] = []
    records.run_jobs(tmp_path / "r.jsonl", jobs_noted(measured), budget_seconds=0)
    assert measured == []
    assert capsys.readouterr().out.count("left out, the budget of 0 s would not suffice") == 7
