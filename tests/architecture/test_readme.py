"""The README's generated parts are true: the tree, from each file's first line; the tables, from the records.

UPDATE_README=1 writes them anew.
"""

import ast
import os
import re
from pathlib import Path

import pytest

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
