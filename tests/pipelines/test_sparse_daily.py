"""Daily training with sparse tables: vocabularies grow, the budget grows with them, days go on from each other."""

from pathlib import Path

import pytest
import torch

from base.errors import ArtefactError, ConfigError
from base.storage import resolve
from pipelines.config import Run
from pipelines.line import line_of
from pipelines.promote import promote
from recsys.bundle import Bundle
from recsys.sparsity.layout import even_total
from recsys.tensors import load_tensors
from tests.pipelines.test_daily import FIRST, begin, day, live, run_of, write

SPARSITY = {"density": 0.5, "schedule": {"interval": 2, "window": 2, "redistribute": 0.5}}
MODEL = {"name": "fm", "dim": 11}


def weights(run: Run, number: int) -> dict[str, torch.Tensor]:
    found = load_tensors(resolve(line_of(run).state_path(day(number))) / "weights")
    return {n.removeprefix("embed.tables."): t for n, t in found.items()}


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("sparse")
    run = begin(folder, sparsity=SPARSITY, model=MODEL)
    for number in (5, 6):
        write(folder, number)
        live(run, number)
    return folder, run


def test_every_day_adds_the_densitys_share_of_its_new_rows(lived: tuple[Path, Run]) -> None:
    _, run = lived
    now = run.on(day(6))
    rows: list[list[int]] = []
    for number in (2, 3, 4):
        stored = weights(now, number)
        rows.append(stored["rows_T"].tolist())
        expected = sum(even_total(n, 12, 0.5, unequal=True) for n in rows[-1])
        assert int(stored["sizes_R"].sum(dtype=torch.int64)) == expected
        assert len(stored["sizes_R"].unique()) > 2
    assert rows[0] < rows[1] < rows[2]
    first = [weights(now, n)["sizes_R"][: rows[0][0]] for n in (2, 3)]
    assert not first[0].equal(first[1])  # a day has 6 steps: its mask moves after 2, and after 4 by nothing


def test_its_bundle_scores_and_passes_the_gate(lived: tuple[Path, Run]) -> None:
    _, run = lived
    for now in (run.on(FIRST, full=True), run.on(day(6))):
        bundle = Bundle.load(now.bundle_path)
        assert bundle.sparsity is not None
        assert bundle.sparsity.density == 0.5
        bundle.check_golden()
    promote(run.on(FIRST, full=True))


def test_days_of_another_density_do_not_go_on_from_each_other(lived: tuple[Path, Run]) -> None:
    folder, _ = lived
    write(folder, 7)
    for sparsity, message in (
        ({**SPARSITY, "density": 0.25}, r"a density of 0\.5.*, where \[sparsity\] of this run, density 0\.25, means"),
        (None, r"its tables are sparse, those of this run dense; put its \[sparsity\] back"),
    ):
        other = run_of(folder, sparsity=sparsity, model=MODEL)
        with pytest.raises(ArtefactError, match=message):
            live(other, 7)
    live(run_of(folder, sparsity=SPARSITY, model=MODEL), 7)


def test_several_processes_are_refused_when_the_run_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.processes = 2: sparse tables are trained by one process; set it to 1"
    ):
        run_of(tmp_path, sparsity=SPARSITY, train={"processes": 2})
