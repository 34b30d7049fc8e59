"""The MLflow of a run."""

from pipelines.config import Run
from recsys.registry import ModelRegistry


def registry_of(run: Run) -> ModelRegistry:
    """The run's MLflow. Raises RegistryError if it does not answer."""
    return ModelRegistry(run.tracking_uri, experiment=run.mlflow.experiment, name=run.mlflow.model)
