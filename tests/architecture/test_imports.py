"""Imports go one way (the contracts are in pyproject.toml), and what is quick to import stays so."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("base", "features", "recsys", "pipelines", "serving", "dags")
HEAVY = ("polars", "numpy", "pandas", "pyarrow", "torch", "torchrec", "fbgemm_gpu", "mlflow", "airflow", "matplotlib")


def loaded_by(code: str) -> set[str]:
    """Which of the heavy libraries a fresh process has loaded after `code`."""
    report = f"\nimport sys; print('\\n', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_contracts_are_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    arguments = ["--cache-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_nothing_imports_tests_or_bench() -> None:
    for package in OURS:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {n.split(".")[0] for n in names} & {"tests", "bench"}, path


def test_every_package_has_a_docstring_and_no_heavy_import() -> None:
    assert loaded_by(f"import {', '.join(OURS)}") == set()
    for package in OURS:
        for path in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path}: says nothing about itself"


def test_the_bottom_layer_is_light() -> None:
    assert loaded_by("import base.config, base.errors, base.faults, base.storage") == set()


def test_features_load_no_torch() -> None:
    modules = sorted(
        str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for p in (ROOT / "features").rglob("*.py")
    )
    assert "features.pipeline" in modules
    assert not loaded_by(f"import {', '.join(modules)}") & {"torch", "torchrec", "fbgemm_gpu", "mlflow", "airflow"}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["generate", "--help"], ["--version"]])
def test_the_command_line_answers_without_heavy_imports(arguments: list[str]) -> None:
    code = f"from pipelines.cli import main\ntry: main({arguments!r})\nexcept SystemExit as end: assert not end.code"
    assert loaded_by(code) == set()
