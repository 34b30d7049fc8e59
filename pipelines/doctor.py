"""doctor: is the installation one that works? One finding a line, with a remedy where it does not."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from base import process
from base.config import load_config
from base.errors import UserError, explained, machine_error
from base.masking import masked
from base.storage import check_filesystem

if TYPE_CHECKING:
    from pipelines.config import Run


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    ok: bool
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{'ok ' if self.ok else 'BAD'} {self.what}" + (f"  -> {self.remedy}" if self.remedy else "")


def examine(config: Path | None = None, settings: Sequence[str] = ()) -> list[Finding]:
    """Python, versions, the ABI triple, the kernels, the device; with a run file, its output folder and its MLflow."""
    python = sys.version_info[:3]
    findings = [
        Finding(
            (3, 11) <= python[:2] < (3, 13),
            f"Python {'.'.join(map(str, python))}",
            "" if (3, 11) <= python[:2] < (3, 13) else "use Python 3.11 or 3.12",
        )
    ]
    for package in ("polars", "mlflow", "apache-airflow"):
        found = _version(package)
        findings.append(Finding(found is not None, f"{package} {found}", "" if found else "run `make setup`"))
    cpu, cuda = _version("fbgemm-gpu-cpu"), _version("fbgemm-gpu")
    if cpu and cuda:
        findings.append(
            Finding(
                False,
                f"fbgemm-gpu-cpu {cpu} and fbgemm-gpu {cuda} are both installed and share one folder",
                "uninstall both, then `make setup` (ACCEL=cuda for a GPU)",
            )
        )
    findings.append(judge_triple(_version("torch"), _version("torchrec"), cpu or cuda))
    findings.append(_kernels())
    findings.append(_device(bool(cuda)))
    findings += [_memory(), _denormals()]
    if config is not None:
        findings.extend(_run(config, settings))
    return findings


def judge_triple(torch: str | None, torchrec: str | None, fbgemm: str | None) -> Finding:
    """The rule that pip does not check: fbgemm 1.X is built against torch 2.(X+5), and torchrec 1.X calls it."""
    what = f"torch {torch}, torchrec {torchrec}, fbgemm {fbgemm}"
    if not (torch and torchrec and fbgemm):
        return Finding(False, what, "run `make setup`")
    (tm, tn), (rm, rn), (fm, fn) = (_numbers(v) for v in (torch, torchrec, fbgemm))
    if fm == 1 and (tm, tn) == (2, fn + 5) and (rm, rn) == (1, fn):
        return Finding(True, what)
    need = f"torch 2.{fn + 5} and torchrec 1.{fn}" if fm == 1 else "fbgemm 1.X"
    return Finding(False, what, f"fbgemm {fbgemm} needs {need}: run `make setup`")


def _kernels() -> Finding:
    try:
        import torch
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen  # noqa: F401

        torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(False, f"fbgemm's kernels do not load: {first}", "remove .venv and run `make setup`")
    return Finding(True, "fbgemm's kernels load and run")


def _device(cuda_build: bool) -> Finding:
    try:
        import torch
    except (ImportError, OSError):
        return Finding(False, "torch does not import", "remove .venv and run `make setup`")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        return Finding(cuda_build, f"device: {name}", "" if cuda_build else "run `make setup ACCEL=cuda` to use it")
    return Finding(
        not cuda_build,
        f"device: CPU, {torch.get_num_threads()} threads",
        "fbgemm's CUDA build needs a GPU: run `make setup ACCEL=cpu`" if cuda_build else "",
    )


def _memory() -> Finding:
    if process.kept is None:
        return Finding(True, "malloc: as it is, since the C library is not glibc; steps may wait for memory")
    return Finding(True, f"malloc: keeps what is freed, blocks below {process.kept.mapped_from >> 20} MiB at least")


def _denormals() -> Finding:
    try:
        from recsys.device import denormals_flushed, flushes_denormals
    except (ImportError, OSError):
        return Finding(False, "torch does not import", "remove .venv and run `make setup`")
    with denormals_flushed():
        flushed = flushes_denormals()
    return Finding(True, "denormal numbers: " + ("flushed to zero" if flushed else "kept, this processor cannot flush"))


def _run(config: Path, settings: Sequence[str]) -> list[Finding]:
    from pipelines.config import Run

    try:
        run = load_config(Run, config, settings)
    except UserError as error:
        return [Finding(False, str(error))]
    return [_output(run.output), _databases(run), _registry(run)]


def _output(folder: Path) -> Finding:
    try:
        check_filesystem(folder)
    except UserError as error:
        return Finding(False, str(error))
    return Finding(True, f"{folder}: rename, links, locks and fsync work")


def _databases(run: "Run") -> Finding:
    from pipelines.tracking import airflow_databases, refuse_shared

    try:
        refuse_shared(run, airflow_databases())
    except UserError as error:
        return Finding(False, str(error))
    return Finding(True, "MLflow and Airflow have databases of their own")


def _registry(run: "Run") -> Finding:
    from pipelines.tracking import registry_of

    try:
        champion = registry_of(run).champion()
    except UserError as error:
        return Finding(False, str(error))
    except OSError as error:
        if (refused := machine_error(error)) is None:
            raise
        return Finding(False, str(explained(refused)))
    use = f"champion is version {champion.version}" if champion else "no champion yet"
    uri = run.tracking_uri
    kind = uri.partition("://")[0]
    what = "a server over HTTP" if kind.startswith("http") else f"the database itself ({kind}), without a server"
    return Finding(True, f"MLflow at {masked(uri)} answers, {what}; {use} of {run.mlflow.model!r}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
