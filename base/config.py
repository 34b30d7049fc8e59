"""Configuration: frozen models that refuse unknown keys, read from TOML with errors a person can act on."""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from base.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)


def load_config(model: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read `path` (TOML), apply `a.b=value` overrides, validate as `model`.

    Raises ConfigError naming the file, the key's path, the value and the nearest known name.
    """
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file; pass --config with the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _override(tree, override)
    return parse_config(model, tree, source=str(path))


def parse_config(model: type[C], tree: Mapping[str, Any], *, source: str) -> C:
    """Validate a plain tree as `model`; every fault becomes one line of a ConfigError."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, tree, fault) for fault in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {override!r}: write it as path.to.key=value, e.g. train.batch_size=8192")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: model.name=dcn
    *parents, last = key.split(".")
    node: Any = tree
    for i, name in enumerate(parents):
        node = _step(node, name, ".".join(parents[: i + 1]), override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _step(node: Any, name: str, path: str, override: str) -> Any:
    child = node[_index(node, name, override)] if isinstance(node, list) else node.setdefault(name, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {override!r}: {path} is {child!r}, not a table")
    return child


def _index(node: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"--set {override!r}: {name!r} is not an index into a list of {len(node)}; count from 0")
    return int(name)


def _explain(model: type[BaseModel], tree: Mapping[str, Any], fault: Any) -> str:
    location = [part for part in fault["loc"] if part != "function-after"]
    path = _readable(location, tree)
    match fault["type"]:
        case "extra_forbidden":
            known = _known_names(model, location[:-1], tree)
            return f"unknown key {path}{_nearest(str(location[-1]), known)}"
        case "missing":
            return f"{path} is missing; it must be given"
        case "union_tag_invalid":
            context = fault["ctx"]
            tag, given = context["discriminator"].strip("'"), context["tag"]
            known = [name.strip(" '") for name in context["expected_tags"].split(",")]
            return f"{path}.{tag} = {given!r} does not exist{_nearest(given, known)}"
        case "union_tag_not_found":
            tag = fault["ctx"]["discriminator"].strip("'")
            return f"{path}.{tag} is missing; it says which kind this is"
        case "value_error":
            return f"{path}: {fault['ctx']['error']}" if path else str(fault["ctx"]["error"])
        case _:
            return f"{path} = {fault['input']!r}: {fault['msg']}"


def _readable(location: Sequence[str | int], tree: Any) -> str:
    """The key's path as the user wrote it: union tags that pydantic inserts are left out."""
    parts: list[str] = []
    node = tree
    for i, part in enumerate(location):
        if (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]
        elif isinstance(node, Mapping) and i < len(location) - 1:
            continue  # the tag of a union, not a key
        parts.append(f"[{part}]" if isinstance(part, int) else f".{part}" if parts else str(part))
    return "".join(parts)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(sorted(known))}" if known else hint


def _known_names(model: type[BaseModel], location: Sequence[str | int], tree: Any) -> list[str]:
    """Field names of the configuration that stands at `location`."""
    candidates: list[type[BaseModel]] = [model]
    node: Any = tree
    for part in location:
        if isinstance(part, int):
            node = node[part] if isinstance(node, list) and part < len(node) else None
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
            fields = [m.model_fields[part].annotation for m in candidates if part in m.model_fields]
            candidates = [m for annotation in fields for m in _models(annotation)]
        else:  # a discriminator's value: keep the member of the union that carries it
            candidates = [m for m in candidates if any(part in get_args(f.annotation) for f in m.model_fields.values())]
    return sorted({name for m in candidates for name in m.model_fields})


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType) or get_args(annotation):
        for argument in get_args(annotation):
            yield from _models(argument)
