"""MLflow: runs that remember how a model was made, registered versions, and aliases that say which one is in use."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.pyfunc import log_model
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType

from base.errors import RegistryError
from base.storage import MANIFEST
from recsys.bundle import Bundle

CHAMPION, CHALLENGER = "champion", "challenger"
_BUNDLE_TAG = "bundle"


@dataclass(frozen=True)
class Registered:
    """One version of the registered model."""

    version: str
    run_id: str
    bundle: str
    """Version of the Bundle it holds."""


class ModelRegistry:
    """The registered model `name` of one experiment on one MLflow server or database."""

    def __init__(self, uri: str, *, experiment: str, name: str) -> None:
        """Connect. Raises RegistryError, soon, if nothing answers there."""
        self.uri, self.name = uri, name
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        # Fail within seconds where a server is down: a scheduler retries, a person waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        self._client = MlflowClient(uri, uri)
        with _explained(uri):
            found = self._client.get_experiment_by_name(experiment)
            location = self._artifacts_beside_database()
            self.experiment = found.experiment_id if found else self._client.create_experiment(experiment, location)

    def _artifacts_beside_database(self) -> str | None:
        """Without a server that proxies artifacts, MLflow would put them into the working directory."""
        if not self.uri.startswith("sqlite:///"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()

    @contextmanager
    def run(self, run_id: str | None = None, *, name: str | None = None) -> Iterator[mlflow.ActiveRun]:
        """A new run of the experiment, or an old one to add to."""
        with _explained(self.uri), mlflow.start_run(run_id, experiment_id=self.experiment, run_name=name) as active:
            yield active

    def find(self, selector: str) -> Registered:
        """A version by number or alias. Raises RegistryError if there is none."""
        with _explained(self.uri):
            try:
                if selector.isdigit():
                    return _registered(self._client.get_model_version(self.name, selector))
                return _registered(self._client.get_model_version_by_alias(self.name, selector))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        what = f"version {selector}" if selector.isdigit() else f"{selector!r}"
        remedy = "run `recsys promote` first" if selector == CHAMPION else "run `recsys train` first"
        raise RegistryError(f"model {self.name!r} at {self.uri} has no {what}; {remedy}")

    def champion(self) -> Registered | None:
        """The version in use, if there is one."""
        try:
            return self.find(CHAMPION)
        except RegistryError as error:
            if isinstance(error.__cause__, MlflowException):
                raise
            return None

    def bundle_of(self, registered: Registered) -> Bundle:
        """The Bundle of a version, verified."""
        with _explained(self.uri):
            uri = f"models:/{self.name}/{registered.version}"
            folder = download_artifacts(artifact_uri=uri)
        found = [m.parent for m in Path(folder).glob(f"artifacts/*/{MANIFEST}")]
        if len(found) != 1:
            raise RegistryError(
                f"model {self.name!r} version {registered.version}: holds {len(found)} bundles, not one"
            )
        bundle = Bundle.load(found[0])
        if bundle.version != registered.bundle:
            raise RegistryError(
                f"model {self.name!r} version {registered.version}: holds bundle {bundle.version}, but "
                f"{registered.bundle} was registered; register it again"
            )
        return bundle

    def register(self, bundle: Bundle, folder: Path, code: Path, run_id: str) -> Registered:
        """Log the bundle as a model of the active run, make it the challenger; once, whatever retries happen."""
        with _explained(self.uri):
            for known in self._client.search_model_versions(f"name = '{self.name}'"):
                if known.tags.get(_BUNDLE_TAG) == bundle.version and known.run_id == run_id:
                    self._client.set_registered_model_alias(self.name, CHALLENGER, known.version)
                    return _registered(known)
            info = log_model(
                name="model",
                python_model=str(code),
                artifacts={"bundle": str(folder)},
                signature=signature_of(bundle),
                pip_requirements=[],
                registered_model_name=self.name,
            )
            version = str(info.registered_model_version)
            self._client.set_model_version_tag(self.name, version, _BUNDLE_TAG, bundle.version)
            self._client.set_registered_model_alias(self.name, CHALLENGER, version)
            return self.find(version)

    def promote(self, registered: Registered) -> None:
        """Make a version the champion. Call only with a verdict that says so."""
        with _explained(self.uri):
            self._client.set_registered_model_alias(self.name, CHAMPION, registered.version)

    def tag(self, registered: Registered, tags: Mapping[str, str]) -> None:
        """Write tags on a version."""
        with _explained(self.uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, registered.version, key, value)

    def versions_of_run(self, run_id: str | None) -> list[int]:
        """Numbers of the versions registered from a run."""
        with _explained(self.uri):
            found = self._client.search_model_versions(f"name = '{self.name}'")
        return [int(v.version) for v in found if v.run_id == run_id]

    def run_of_training(self, key: str) -> str | None:
        """The run that was started for a training run `key`, so that a retry continues it."""
        with _explained(self.uri):
            found = self._client.search_runs([self.experiment], f"tags.training = '{key}'", max_results=1)
            return found[0].info.run_id if found else None


def signature_of(bundle: Bundle) -> ModelSignature:
    """Raw columns and probabilities. Only text is typed: MLflow refuses an integer for a double, and missing lists.

    The bundle checks every column itself.
    """
    kinds = {**dict.fromkeys(bundle.inputs, "other"), **bundle.features.kinds}
    types: dict[str, Any] = {c: DataType.string if kinds[c] == "text" else AnyType() for c in bundle.inputs}
    inputs: list[Any] = [ColSpec(types[c], name=c, required=True) for c in bundle.inputs]
    outputs: list[Any] = [ColSpec(DataType.float, name=o.name) for o in bundle.outputs]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def _registered(version: ModelVersion) -> Registered:
    return Registered(str(version.version), str(version.run_id), str(version.tags.get(_BUNDLE_TAG, "")))


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """MLflow's errors as one sentence."""
    try:
        yield
    except MlflowException as error:
        first = str(error).splitlines()[0]
        what = "does not answer" if "Max retries exceeded" in first else f"says: {first}"
        raise RegistryError(f"MLflow at {uri} {what}; check mlflow.uri and that the server runs") from error
