"""The MLflow model, from code: raw columns in, the bundle's probabilities out, the same numbers as batch scoring."""

from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from recsys.reference import load_registered


class BundleModel(PythonModel):
    """Serves a Bundle, held or referred to. Columns that it does not need are ignored."""

    def load_context(self, context: Any) -> None:
        self.bundle = load_registered(Path(context.artifacts["bundle"]))
        self.bundle.check_golden()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  (MLflow inspects the signature itself)
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Probabilities of raw rows, in their order. Raises DataError on a missing column or one of a wrong type."""
        present = [c for c in self.bundle.inputs if c in model_input.columns]
        frame = pl.DataFrame({c: pl.from_pandas(model_input[c]) for c in present})
        return pl.concat(self.bundle.predict(frame.lazy())).to_pandas()


set_model(BundleModel())
