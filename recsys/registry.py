"""MLflow: runs that remember how a model was made, registered versions, and aliases that say which one is in use."""

import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException, RestException
from mlflow.models import ModelSignature
from mlflow.pyfunc import log_model
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType
from requests import ConnectionError, RequestException, Timeout
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from base.errors import RegistryError, SetupError, UserError, causes, explained, machine_error
from base.faults import faultpoint
from base.storage import MANIFEST, Staging, read_manifest, resolve
from recsys.bundle import Bundle
from recsys.reference import FILE, Reference, load_registered

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
TRAINING = "training"
"""Tag of a run: what was trained, so that a retry continues it."""
_BUNDLE_TAG, _FOLDER_TAG, _ROLLED_BACK_TAG, _RETURNING_TAG = "bundle", "bundle_folder", "rolled_back", "returning"
_MEGABYTE = 2**20


@dataclass(frozen=True)
class Registered:
    """One version of the registered model."""

    version: str
    run_id: str
    bundle: str
    """Version of the Bundle it holds or refers to."""
    rolled_back: str = ""
    """When `rollback` took it out of use; empty if it never did."""
    folder: Path | None = None
    """The published Bundle, if it was registered by reference."""
    returning: bool = False
    """Whether a `rollback` to it has begun and not ended."""


class ModelRegistry:
    """The registered model `name` of one experiment on one MLflow server or database.

    Of its versions, `challenger` is the one trained last, `champion` the one in use, `previous` the champion before.
    """

    def __init__(self, uri: str, *, experiment: str, name: str, reference_above_mb: float = 500) -> None:
        """Connect. Raises RegistryError, soon, if nothing answers there."""
        self.uri, self.name, self.reference_above_mb = uri, name, reference_above_mb
        # Fail within seconds where a server is down: a scheduler retries, a person waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("PGCONNECT_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        with _explained(uri):
            if not uri.startswith("http"):
                _require_database(uri)
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            self._client = MlflowClient(uri, uri)
            found = self._client.get_experiment_by_name(experiment)
            location = self._artifacts_beside_database()
            self.experiment = found.experiment_id if found else self._client.create_experiment(experiment, location)

    def _artifacts_beside_database(self) -> str | None:
        """Without a server that proxies artifacts, MLflow would put them into the working directory."""
        file = _file(self.uri)
        return None if file is None else (file.absolute().parent / "mlartifacts").as_uri()

    @contextmanager
    def run(
        self, run_id: str | None = None, *, name: str | None = None, tags: Mapping[str, str] | None = None
    ) -> Iterator[mlflow.ActiveRun]:
        """A new run of the experiment, with its tags from the first moment, or an old one to add to."""
        with (
            _explained(self.uri),
            mlflow.start_run(
                run_id, experiment_id=self.experiment, run_name=name, tags=None if tags is None else dict(tags)
            ) as active,
        ):
            yield active

    def aliases(self) -> dict[str, str]:
        """Numbers of versions by alias, whether there are such versions or not."""
        with _explained(self.uri):
            try:
                found: Mapping[str, Any] = self._client.get_registered_model(self.name).aliases
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return {}
        return {alias: str(version) for alias, version in found.items()}

    def find(self, selector: str) -> Registered:
        """A version by number or alias. Raises RegistryError if there is none, or the alias points nowhere."""
        aliases = self.aliases()
        number = selector if selector.isdigit() else aliases.get(selector)
        with _explained(self.uri):
            found = self._version(number) if number else None
        if found:
            return found
        can_return = selector == CHAMPION and PREVIOUS in aliases
        what = f"version {selector}" if selector.isdigit() else f"{selector!r}"
        if number and number != selector:
            remedy = "run `recsys rollback`" if can_return else "remove the alias in MLflow and promote another version"
            raise RegistryError(f"{self._here}: {what} points to version {number}, which is gone; {remedy}")
        remedy = "run `recsys promote` first" if selector == CHAMPION else "run `recsys train` first"
        raise RegistryError(f"{self._here} has no {what}; {remedy}{', or `recsys rollback`' if can_return else ''}")

    def champion(self) -> Registered | None:
        """The version in use, if there is one. Raises RegistryError if the alias points nowhere."""
        return self.find(CHAMPION) if CHAMPION in self.aliases() else None

    def bundle_of(self, registered: Registered) -> Bundle:
        """The Bundle of a version, verified. Raises RegistryError or ArtefactError if it is gone or altered."""
        what = f"model {self.name!r} version {registered.version}"
        remedy = "return to another version with `recsys rollback`, or promote one"
        with _explained(self.uri), tempfile.TemporaryDirectory() as folder:
            try:
                download_artifacts(artifact_uri=f"models:/{self.name}/{registered.version}", dst_path=folder)
            except (MlflowException, FileNotFoundError, RequestException) as error:
                if _not_of_the_model(self.uri, error):
                    raise
                raise RegistryError(
                    f"{what}: its artifacts cannot be fetched ({_first_line(error)}); {remedy}"
                ) from error
            artifacts = Path(folder) / "artifacts"
            found = [*(m.parent for m in artifacts.glob(f"*/{MANIFEST}")), *artifacts.glob(FILE)]
            if len(found) != 1:
                raise RegistryError(f"{what}: its artifacts are gone; {remedy}")
            bundle = load_registered(found[0])
        if bundle.version != registered.bundle:
            raise RegistryError(
                f"{what}: holds bundle {bundle.version}, but {registered.bundle} was registered; register it again"
            )
        return bundle

    def register(self, bundle: Bundle, folder: Path, code: Path, run_id: str) -> Registered:
        """Register the bundle published as `folder` as the one version of the active run, and the challenger.

        A retry goes on where an earlier attempt ended. Raises RegistryError if the run has registered another bundle.
        """
        with _explained(self.uri):
            if not self._versions(run_id):
                model = self._logged(run_id) or self._log(bundle, folder, code)
                faultpoint("registry.logged")
                tags = {key: model.tags[key] for key in (_BUNDLE_TAG, _FOLDER_TAG) if key in model.tags}
                mlflow.register_model(model.model_uri, self.name, tags=tags)  # with its tags, at once
                faultpoint("registry.created")
            first, *twins = self._versions(run_id)
            for twin in twins:  # where an answer gets lost, MLflow's client sends the request again
                if str(twin.version) not in self.aliases().values():
                    self._client.delete_model_version(self.name, str(twin.version))
            registered = _registered(first)
            if registered.bundle != bundle.version:
                raise RegistryError(
                    f"MLflow run {run_id} has registered bundle {registered.bundle} as version {registered.version} of "
                    f"{self.name!r}; register bundle {bundle.version} from a run of its own"
                )
            self._client.set_registered_model_alias(self.name, CHALLENGER, registered.version)
            return registered

    def promote(self, registered: Registered, *, again: bool = False) -> None:
        """Make a version the champion, and the champion until now `previous`. Call only with a verdict that says so.

        Promoting the champion changes nothing. Raises RegistryError for a version that was rolled back, which a
        repeated step would otherwise bring back, unless `again` says that a person wants it.
        """
        with _explained(self.uri):
            current = self.find(registered.version)
            if current.rolled_back and not again:
                raise RegistryError(
                    f"{self._here}: version {current.version} was rolled back at {current.rolled_back}; to promote it "
                    f"nevertheless, ask for it by its number"
                )
            number = self.aliases().get(CHAMPION)
            if number == current.version:
                return
            if current.rolled_back:
                self._client.delete_model_version_tag(self.name, current.version, _ROLLED_BACK_TAG)
            if current.returning:
                self._client.delete_model_version_tag(self.name, current.version, _RETURNING_TAG)
            # In this order: killed in between, the champion stays and a repetition does the rest.
            champion = self._version(number) if number else None
            if champion and not champion.rolled_back:
                self._client.set_registered_model_alias(self.name, PREVIOUS, champion.version)
            faultpoint("registry.previous")
            self._client.set_registered_model_alias(self.name, CHAMPION, current.version)

    def require_champion(self, number: str | None, while_: str) -> None:
        """Raises RegistryError if the champion is no longer the version of this number, as others may have moved it."""
        now = self.aliases().get(CHAMPION)
        if now != number:
            one, other = (f"version {n}" if n else "none" for n in (number, now))
            raise RegistryError(f"{self._here}: the champion moved from {one} to {other} while {while_}")

    def previous(self) -> Registered:
        """The version that `rollback` returns to, or has returned to where it was killed before it ended.

        Raises RegistryError if nothing was promoted since the last rollback, or there was no champion before.
        """
        return self._return()[1]

    def rollback(self) -> Registered:
        """Make `previous` the champion again and return it; the champion until now is marked as rolled back.

        Raises RegistryError as `previous` does.
        """
        left, previous = self._return()
        with _explained(self.uri):
            # In this order: killed in between, there is a champion, and a repetition does the rest.
            self._client.set_model_version_tag(self.name, previous.version, _RETURNING_TAG, "true")
            if left and not left.rolled_back:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                self._client.set_model_version_tag(self.name, left.version, _ROLLED_BACK_TAG, now)
            faultpoint("registry.marked")
            self._client.set_registered_model_alias(self.name, CHAMPION, previous.version)
            faultpoint("registry.returned")
            if PREVIOUS in self.aliases():
                self._client.delete_registered_model_alias(self.name, PREVIOUS)
            faultpoint("registry.forgotten")
            self._client.delete_model_version_tag(self.name, previous.version, _RETURNING_TAG)
        return self.find(previous.version)

    def _return(self) -> tuple[Registered | None, Registered]:
        """The version that a rollback leaves, if it has not left it yet, and the one that it returns to.

        Both are of one look at the aliases: a champion that is moved meanwhile is never taken for the one to leave.
        """
        aliases = self.aliases()
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        with _explained(self.uri):
            left = self._version(champion) if champion else None
            if previous in (None, champion):
                if left and left.returning:
                    return None, left
                now = f"version {champion}, the champion" if champion else "now"
                raise RegistryError(f"{self._here} has no champion before {now}; promote another version")
            found = self._version(previous)
        return left, found or self.find(PREVIOUS)  # which raises what is to be said of an alias to nowhere

    def referenced(self) -> set[Path]:
        """The Bundle folders that champion, previous and challenger refer to, which must not be removed."""
        with _explained(self.uri):
            aliases = self.aliases()
            found = [self._version(aliases[name]) for name in (CHAMPION, PREVIOUS, CHALLENGER) if name in aliases]
        return {version.folder for version in found if version and version.folder}

    def tag(self, registered: Registered, tags: Mapping[str, str]) -> None:
        """Write tags on a version."""
        with _explained(self.uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, registered.version, key, value)

    def versions_of_run(self, run_id: str | None) -> list[int]:
        """Numbers of the versions registered from a run."""
        with _explained(self.uri):
            return [int(v.version) for v in self._versions(run_id)] if run_id else []

    def run_of_training(self, key: str) -> str | None:
        """The run that was started for a training run `key`, so that a retry continues it."""
        with _explained(self.uri):
            which = f"tags.{TRAINING} = '{key}'"
            found = self._client.search_runs([self.experiment], which, max_results=1, order_by=["start_time"])
            return found[0].info.run_id if found else None

    def of_training(self, key: str) -> Registered:
        """The version that a training run `key` registered. Raises RegistryError if it has not."""
        run_id = self.run_of_training(key)
        with _explained(self.uri):
            found = self._versions(run_id) if run_id else []
        if not found:
            raise RegistryError(f"{self._here} has no version of bundle {key}; run `recsys train` of that day first")
        return _registered(found[0])

    @property
    def _here(self) -> str:
        return f"model {self.name!r} at {self.uri}"

    def _version(self, number: str) -> Registered | None:
        try:
            return _registered(self._client.get_model_version(self.name, number))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None

    def _versions(self, run_id: str) -> list[ModelVersion]:
        """What was registered from a run, oldest first."""
        found = self._client.search_model_versions(f"name = '{self.name}' AND run_id = '{run_id}'")
        return sorted(found, key=lambda v: int(v.version))

    def _logged(self, run_id: str) -> LoggedModel | None:
        """The model that an earlier attempt uploaded whole from this run."""
        found = self._client.search_logged_models([self.experiment], f"source_run_id = '{run_id}'")
        return next((m for m in found if m.status == LoggedModelStatus.READY and _BUNDLE_TAG in m.tags), None)

    def _log(self, bundle: Bundle, folder: Path, code: Path) -> LoggedModel:
        """Upload a bundle as a model of the active run, or the reference to it where it is large."""
        published = resolve(folder)
        size = sum(file.bytes for file in read_manifest(published).files.values())
        tags, artifact = {_BUNDLE_TAG: bundle.version}, published
        with tempfile.TemporaryDirectory() as temporary:
            if size > self.reference_above_mb * _MEGABYTE:
                artifact = Reference.to(bundle, published).write(Staging(Path(temporary)))
                tags[_FOLDER_TAG] = str(published)
            info = log_model(
                name="model",
                python_model=str(code),
                artifacts={"bundle": str(artifact)},
                signature=signature_of(bundle),
                pip_requirements=[],
                tags=tags,
            )
        return self._client.get_logged_model(str(info.model_id))


def signature_of(bundle: Bundle) -> ModelSignature:
    """Raw columns and probabilities. Only text is typed: MLflow refuses an integer for a double, and missing lists.

    The bundle checks every column itself, and that it is there: MLflow would refuse a request without rows.
    """
    kinds = {**dict.fromkeys(bundle.inputs, "other"), **bundle.features.kinds}
    types: dict[str, Any] = {c: DataType.string if kinds[c] == "text" else AnyType() for c in bundle.inputs}
    inputs: list[Any] = [ColSpec(types[c], name=c, required=False) for c in bundle.inputs]
    outputs: list[Any] = [ColSpec(DataType.float, name=o.name) for o in bundle.outputs]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def _registered(version: ModelVersion) -> Registered:
    bundle, rolled_back, folder = (version.tags.get(t, "") for t in (_BUNDLE_TAG, _ROLLED_BACK_TAG, _FOLDER_TAG))
    where = Path(folder) if folder else None
    number, run_id, returning = str(version.version), str(version.run_id), _RETURNING_TAG in version.tags
    return Registered(number, run_id, bundle, rolled_back, where, returning)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """MLflow's errors as one sentence."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:  # OSError: RequestException is one
        told = _not_of_the_model(uri, error)
        if told is None and isinstance(error, OSError) and not isinstance(error, RequestException):
            raise
        raise told or RegistryError(
            f"MLflow at {uri} says: {_first_line(error)}; check mlflow.uri and that the server runs"
        ) from error


def _require_database(uri: str) -> None:
    """Connect once. MLflow tries for 100 s, without a word. Raises RegistryError for what no driver can open."""
    try:
        if file := _file(uri):
            file.parent.mkdir(parents=True, exist_ok=True)
        create_engine(uri, poolclass=NullPool).connect().close()
    except (ArgumentError, ValueError) as error:
        said = "" if "@" in uri else f" ({_first_line(error)})"  # which may quote a part of the password
        raise RegistryError(f"mlflow.uri = {uri!r}: no driver can open this{said}; correct it") from None
    except ModuleNotFoundError as error:
        raise RegistryError(
            f"mlflow.uri = {uri!r}: the driver {error.name!r} is not installed; install it, or name another: "
            "postgresql+psycopg2://… (pip install psycopg2-binary), mysql+pymysql://… (pip install pymysql)"
        ) from None
    except FileNotFoundError as error:
        raise RegistryError(f"mlflow.uri = {uri!r}: {error.filename} cannot be made; name another folder") from None


def _not_of_the_model(uri: str, error: Exception) -> UserError | None:
    """What to do about a machine, a database or a server that fails; None for what MLflow says of its contents."""
    file = _file(uri)
    for cause in causes(error):
        if isinstance(cause, sqlite3.Error):
            what = f"MLflow's database {file}: {cause}"
            if "locked" in str(cause):
                return RegistryError(
                    f"{what} by another process; run again when that has ended, or let an MLflow server have the "
                    "database (mlflow.uri)"
                )
            if re.search(r"full|readonly|I/O|unable to open", str(cause)):
                return RegistryError(f"{what}; see that its disk has space and can be written to, and run again")
        if isinstance(cause, ConnectionError | Timeout):
            return RegistryError(f"MLflow at {uri} does not answer; check mlflow.uri and that the server runs")
        if isinstance(cause, OperationalError) and file is None:
            said = _first_line(cause.orig or cause)
            return RegistryError(
                f"MLflow's database at {uri} says: {said}; check mlflow.uri and that the database runs"
            )
    if isinstance(error, RestException) or not (refused := machine_error(error)):
        return None
    temporary, path = tempfile.gettempdir(), refused.filename
    of_mlflow = file is not None and path is not None and Path(path).is_relative_to(file.absolute().parent)
    if path is not None and (of_mlflow or not Path(path).is_relative_to(temporary)):
        return explained(refused)
    return SetupError(
        f"{temporary}: {refused.strerror}; MLflow copies models by way of the temporary folder: free some space there, "
        "or set TMPDIR to another folder, and run again"
    )


def _file(uri: str) -> Path | None:
    """Of an SQLite database."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
