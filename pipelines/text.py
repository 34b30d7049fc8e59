"""Tables as text, for a terminal."""

from collections.abc import Sequence

import polars as pl

from serving.drift import Finding

_COLUMNS = ("auc", "log_loss", "normalized_entropy", "calibration_ratio", "ece", "user_auc")


def metrics_table(evaluation: pl.DataFrame) -> str:
    """One line per output and slice; of rankings, per slice and number of items shown."""
    if "recall" in evaluation.columns:
        return _ranking_table(evaluation)
    head = ["output", "measured on", "slice", "rows", "AUC", "log loss", "NE", "calibration", "ECE", "user AUC"]
    rows = [
        [r["output"], r["space"], "all" if r["slice"] == "all" else f"{r['slice']} = {r['value']}", f"{r['rows']:,}"]
        + ["-" if r[c] is None else f"{r[c]:.4f}" for c in _COLUMNS]
        for r in evaluation.iter_rows(named=True)
    ]
    return aligned([head, *rows], left=3)


def _ranking_table(evaluation: pl.DataFrame) -> str:
    head = ["items", "number", "users", "K", "recall", "NDCG", "MAP", "MRR", "coverage"]
    rows = [
        [r["slice"], f"{r['items']:,}", f"{r['users']:,}", str(r["k"])]
        + ["-" if r[c] is None else f"{r[c]:.4f}" for c in ("recall", "ndcg", "map", "mrr", "coverage")]
        for r in evaluation.iter_rows(named=True)
    ]
    return aligned([head, *rows], left=1)


def findings_table(findings: Sequence[Finding]) -> str:
    """One line per finding, the worst first."""
    head = ["name", "what", "verdict", "reference", "found", "allowed"]
    order = {"stop": 0, "warn": 1, "ok": 2}
    rows = [
        [f.name, f.what.replace("_", " "), f.verdict, f.beside, f.written(f.found), f.allowed]
        for f in sorted(findings, key=lambda f: order[f.verdict])
    ]
    return aligned([head, *rows], left=3)


def aligned(rows: list[list[str]], *, left: int = 2) -> str:
    """Columns of equal width; the first `left` to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    return "\n".join("  ".join(p(c, w) for p, c, w in zip(pad, row, widths, strict=True)).rstrip() for row in rows)
