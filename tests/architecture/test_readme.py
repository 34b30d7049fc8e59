"""The README is true: the tree, from each file's first line; the tables, from the records; its settings load.

UPDATE_README=1 writes them anew.
"""

import ast
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from base.config import parse_config
from base.errors import ConfigError

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PACKAGES = ("base", "features", "recsys", "serving", "pipelines", "dags", "bench")


def tree() -> str:
    """One phrase per file."""
    lines: list[str] = []
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py"), key=lambda f: (f.parent, f.name != "__init__.py", f.name)):
            docstring = ast.get_docstring(ast.parse(file.read_text()))
            assert docstring, f"{file}: its first line should say what it is"
            name = str(file.relative_to(ROOT)).removesuffix("__init__.py")
            lines.append(f"{name:38} {docstring.splitlines()[0]}")
    return "\n".join(["```", *lines, "```"])


def quality() -> str:
    """The table of measured quality."""
    from bench.quality import table

    return table()


def conversion() -> str:
    """The tables of measured conversion models and gates."""
    from bench.conversion import tables

    return tables()


def days() -> str:
    """The table of 30 drifting days."""
    from bench.days import table

    return table()


def sparsity() -> str:
    """The tables of sparse tables."""
    from bench.sparsity import tables

    return "\n\n".join(text for text in tables().values() if text)


def retrieval() -> str:
    """The tables of retrieval and self-supervision."""
    from bench.retrieval import tables

    return "\n\n".join(text for text in tables().values() if text)


@pytest.mark.parametrize("make", [tree, quality, conversion, days, sparsity, retrieval])
def test_generated_part_is_up_to_date(make) -> None:
    text = README.read_text()
    found = re.search(rf"(<!-- {make.__name__} -->\n)((?:(?!<!--).)*?)(\n<!-- end -->)", text, re.DOTALL)
    assert found, f"README.md has no <!-- {make.__name__} --> part"
    if os.environ.get("UPDATE_README"):
        README.write_text(text[: found.start(2)] + make() + text[found.end(2) :])
    else:
        assert found[2] == make(), "run UPDATE_README=1 make test"


# --- settings --------------------------------------------------------------------------------------------------------

DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables key by key, all else as in `above`; so is a table that says with `name` or `kind` that it is another."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        same = isinstance(old, dict) and isinstance(value, dict) and not {"name", "kind"} & value.keys()
        found[key] = overlaid(old, value) if same else value
    return found


def run_files(text: str, whole: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every TOML block with the run file that it makes: one with `output` is whole, another one a part of the last
    whole one before it."""
    for block in BLOCK.findall(text):
        tree = tomllib.loads(block)
        whole = tree if "output" in tree else whole
        yield block, overlaid(whole, tree)


def settings() -> Iterator[Any]:
    whole: dict[str, Any] = tomllib.loads(BLOCK.findall(README.read_text())[0])
    for document in DOCUMENTS:
        for number, (_, tree) in enumerate(run_files(document.read_text(), whole)):
            yield pytest.param(tree, id=f"{document.name}-{number}")


@pytest.mark.parametrize("tree", list(settings()))
def test_settings_in_the_documents_load(tree: Mapping[str, Any]) -> None:
    from pipelines.config import Run

    parse_config(Run, tree, source="the document")


def test_settings_that_do_not_load_are_noticed() -> None:
    from pipelines.config import Run

    whole, text = dict(next(settings()).values[0]), README.read_text()
    assert len(list(run_files(text, whole))) == text.count("```toml") > 6
    [(_, good)] = run_files("```toml\n[train]\nepochs = 2\n```\n", whole)
    assert parse_config(Run, good, source="here").train.epochs == 2
    [(_, bad)] = run_files("```toml\n[train]\nepoch = 2\n```\n", whole)
    with pytest.raises(ConfigError, match=r"unknown key train\.epoch; did you mean 'epochs'"):
        parse_config(Run, bad, source="here")
