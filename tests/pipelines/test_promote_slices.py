"""promote by the command line: a slice of too few users says nothing, and hides nothing that another slice says."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from pipelines import cli

ROWS = 8000
RUN = """
output = "{folder}/{name}"
name = "{name}"
features = [{{ kind = "vocabulary", column = "{feature}" }}]
model = {{ name = "lr" }}
train = {{ batch_size = 256, epochs = 1 }}
mlflow = {{ uri = "sqlite:///{folder}/mlflow.db" }}
evaluate = {{ slices = ["device"], user = "user" }}

[data]
path = "{folder}/log/day=*/*.parquet"
key = ["id"]
labels = ["click"]
time = "day"
split = {{ train = "2026-03-01", valid = "2026-03-02", test = "2026-03-03" }}

[derive]
blind = "CASE WHEN device = 'b' THEN 'nothing' ELSE taste END"

[gate]
min_slice_rows = 500
# The whole may lose what a tenth of the rows takes from it: here the slices' AUC decides.
margins = {{ auc = 0.1, log_loss = "10%", normalized_entropy = 0.1, calibration = 1, slice_log_loss = "100%" }}
"""


def log_of_a_day(seed: int) -> pl.DataFrame:
    """Clicks follow `taste` on every device; the sites kiosk_1, kiosk_2 and kiosk_3 are one, two and three users'."""
    rng = np.random.default_rng(seed)
    taste = rng.integers(0, 10, ROWS)
    user = rng.integers(10, 500, ROWS)
    sites = {}
    for users in (1, 2, 3):
        inside = rng.random(ROWS) < 0.1
        user[inside] = rng.integers(users, 2 * users, inside.sum())  # 1; 2 and 3; 3, 4 and 5
        sites[f"site_{users}"] = inside
    for users in (1, 2, 3):  # nobody else's, whatever the later ones took
        sites[f"site_{users}"] &= np.isin(user, np.arange(users, 2 * users))
    return pl.DataFrame(
        {
            "id": np.arange(ROWS),
            "user": user,
            "device": rng.choice([*"abcde"], ROWS, p=[0.3, 0.1, 0.2, 0.2, 0.2]),
            "taste": taste.astype(str),
            "click": (rng.random(ROWS) < 1 / (1 + np.exp(2.5 - 0.35 * taste))).astype(np.int8),
            **{name: np.where(inside, "kiosk", "elsewhere") for name, inside in sites.items()},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Champion: a model of `taste`. Challenger: the same model, blind to it on the tenth of rows of device b."""
    folder = tmp_path_factory.mktemp("slices")
    for day in (1, 2, 3):
        (folder / f"log/day=2026-03-0{day}").mkdir(parents=True)
        log_of_a_day(day).write_parquet(folder / f"log/day=2026-03-0{day}/part.parquet")
    for name, feature in (("sound", "taste"), ("blind", "blind")):
        (folder / f"{name}.toml").write_text(RUN.format(folder=folder, name=name, feature=feature))
        for verb in ("prepare", "train"):
            run(folder, verb, name)
        if name == "sound":
            assert run(folder, "promote", name)[0] == 0
    return folder


def run(folder: Path, verb: str, name: str, *options: str) -> tuple[int, str]:
    command = [verb, "--config", str(folder / f"{name}.toml"), *options]
    result = CliRunner().invoke(cli.main, command, catch_exceptions=False)
    return result.exit_code, result.output


@pytest.mark.parametrize("users", [0, 1, 2, 3])
def test_a_model_blind_on_a_tenth_of_the_rows_is_refused_whatever_slice_lies_beside(folder: Path, users: int) -> None:
    beside = [f"site_{users}"] if users else []
    status, said = run(folder, "promote", "blind", "--set", f"evaluate.slices={['device', *beside]}")
    assert status == 99, said
    assert "refused: p_click: slice AUC where device = b 0.5" in said
    assert "-inf, +inf" not in said
    told = "not measurable, since all positive or all negative rows are of fewer values of 'user' than gate.min_units"
    assert (told in said) == bool(users)
    assert (f"site_{users} = kiosk ({users})" in said) == bool(users)
