"""Configuration: frozen models that refuse unknown keys, read from TOML with errors a person can act on."""

import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, time
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, Union, cast, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Tag, ValidationError
from pydantic.fields import FieldInfo

from base.errors import ConfigError, did_you_mean


class Config(BaseModel):
    """Base of every configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def checked_name(text: str) -> str:
    """`text`, if it can be one part of a path. Raises ValueError saying what is wrong with it."""
    if not text.strip():
        raise ValueError(f"{text!r} is empty; give it a name with letters")
    if wrong := next((sign for sign in text if sign in r"/\@" or ord(sign) < 32 or ord(sign) == 127), None):
        raise ValueError(f"{text!r} holds {wrong!r}, which a name cannot, since files are named by it; use letters")
    if text.startswith("."):
        raise ValueError(f"{text!r} begins with a dot, as hidden files and parent folders do; leave it out")
    if len(text.encode()) > _LONGEST:
        raise ValueError(f"{text!r} is longer than {_LONGEST} bytes, which file names allow; shorten it")
    return text


_LONGEST = 150
"""Bytes of a name: a file's may have 255, and we add to it."""

Name = Annotated[str, AfterValidator(checked_name)]
"""What files, folders or the parts of a model are named by; it leads nowhere else."""

C = TypeVar("C", bound=Config)


def load_config(
    model: type[C],
    path: Path,
    overrides: Sequence[str] = (),
    *,
    remedy: str = "pass --config with the path of a TOML file",
) -> C:
    """Read `path` (TOML), apply `a.b=value` overrides, validate as `model`.

    Raises ConfigError naming the file, the key's path, the value and the nearest known name; `remedy` is said where
    there is no such file.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file; {remedy}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; {remedy}") from None
    for override in overrides:
        _override(tree, override)
    return parse_config(model, tree, source=str(path))


def parse_config(model: type[C], tree: Mapping[str, Any], *, source: str) -> C:
    """Validate a plain tree as `model`; every fault becomes one line of a ConfigError."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, fault) for fault in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {override!r}: write it as path.to.key=value, e.g. train.batch_size=8192")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: model.name=dcn
    if isinstance(value, date | time):
        value = text  # so is a bare day: data.split.test=2026-03-07
    *parents, last = key.split(".")
    node: Any = tree
    for i, name in enumerate(parents):
        node = _step(node, name, ".".join(parents[: i + 1]), override)
    if _is_list(node):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _step(node: Any, name: str, path: str, override: str) -> Any:
    child = node[_index(node, name, override)] if _is_list(node) else node.setdefault(name, {})
    if type(child) not in (dict, list):
        raise ConfigError(f"--set {override!r}: {path} is {child!r}, not a table")
    return child


def _index(node: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"--set {override!r}: {name!r} is not an index into a list of {len(node)}; count from 0")
    return int(name)


def _is_list(node: object) -> TypeGuard[list[Any]]:
    return isinstance(node, list)


def _explain(model: type[BaseModel], fault: Any) -> str:
    path, here = _walk(model, fault["loc"])
    match fault["type"]:
        case "extra_forbidden":
            _, around = _walk(model, fault["loc"][:-1])
            return f"unknown key {path}{_nearest(str(fault['loc'][-1]), _known_names(around))}"
        case "missing":
            return f"{path} is missing; it must be given"
        case "union_tag_invalid":
            context = fault["ctx"]
            tag, given = context["discriminator"].strip("'"), context["tag"]
            known = [name.strip(" '") for name in context["expected_tags"].split(",")]
            return f"{path}.{tag} = {given!r} does not exist{_nearest(given, known)}"
        case "union_tag_not_found":
            tag = fault["ctx"]["discriminator"].strip("'")
            known = {k for m in map(_plain, _members(here)) if _is_model(m) for k in _values(m.model_fields.get(tag))}
            return f"{path}.{tag} is missing; it says which kind this is{_nearest('', sorted(known))}"
        case "value_error":
            return f"{path}: {fault['ctx']['error']}" if path else str(fault["ctx"]["error"])
        case "model_type" | "model_attributes_type" | "dict_type":
            known = _known_names(here)
            return f"{path} = {fault['input']!r}: must be a table" + (f" of: {', '.join(known)}" if known else "")
        case "tuple_type":
            return f"{path} = {fault['input']!r}: must be a list"
        case _:
            return f"{path} = {fault['input']!r}: {fault['msg']}"


def _nearest(name: str, known: Sequence[str]) -> str:
    hint = did_you_mean(name, known)
    return f"{hint} Known: {', '.join(sorted(known))}" if known else hint


def _walk(model: type[BaseModel], location: Sequence[str | int]) -> tuple[str, Any]:
    """A fault's location as the user wrote it, and the type that is wanted there.

    Inside a union pydantic puts the tag of the member that it tried, which is no key of the run file.
    """
    path, here = "", cast(Any, model)
    for part in location:
        if part == "[key]":  # it is the key itself that is wrong, as `path` ends already
            continue
        members = _members(here)
        if len(members) > 1:
            here = next((m for m in members if part in _tags(m)), Any)
            continue
        here = _inside(members[0], part)
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path, here


def _members(annotation: Any) -> list[Any]:
    """The types that a union allows besides None; any other type alone."""
    if get_origin(annotation) is Annotated and not any(isinstance(m, Tag) for m in get_args(annotation)[1:]):
        return _members(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [m for argument in get_args(annotation) if argument is not NoneType for m in _members(argument)]


def _tags(member: Any) -> set[Any]:
    """By what a union may know this member: its Tag, or the values of its fields that are literals."""
    if get_origin(member) is Annotated:
        return {m.tag for m in get_args(member)[1:] if isinstance(m, Tag)}
    fields = member.model_fields.values() if _is_model(member) else ()
    return {value for field in fields for value in _values(field)}


def _values(field: FieldInfo | None) -> tuple[Any, ...]:
    """Those that a literal allows; none of any other field."""
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _inside(annotation: Any, part: str | int) -> Any:
    """The type of a model's field, or of a list's or a table's values."""
    plain = _plain(annotation)
    if _is_model(plain):
        return plain.model_fields[part].annotation if part in plain.model_fields else Any
    arguments = get_args(plain)
    return arguments[1 if get_origin(plain) is dict else 0] if arguments else Any


def _known_names(annotation: Any) -> list[str]:
    """Keys of the table that is wanted; of a union's members together."""
    found = [_plain(m) for m in _members(annotation)]
    return sorted({name for m in found if _is_model(m) for name in m.model_fields})


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
