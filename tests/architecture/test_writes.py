"""Only base.storage makes things visible: everyone else writes to `staging / ...`, and nobody pickles or evaluates."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLISHER = ROOT / "base/storage.py"
SOURCES = sorted(
    path
    for package in ("base", "features", "recsys", "pipelines", "serving", "dags")
    for path in (ROOT / package).rglob("*.py")
    if path != PUBLISHER
)

LOGS = {"pipelines/deployment.py": ["(self.folder / 'logs' / f'{name}.log').open('ab')"]}
"""What servers say is appended to a file of their own; it is nobody's input."""

# Where the destination stands: in the receiver, or in one of the arguments.
METHODS_OF_PATHS = {"write_text", "write_bytes", "symlink_to", "hardlink_to", "touch", "unlink", "rmdir", "chmod"}
FUNCTIONS = {  # by the module that has them, with the position of the destination
    "os": dict.fromkeys(("rename", "renames", "replace", "symlink", "link"), 1)
    | dict.fromkeys(("open", "remove", "unlink", "rmdir", "removedirs", "truncate", "utime", "chmod"), 0),
    "shutil": dict.fromkeys(("move", "copy", "copy2", "copyfile", "copytree", "unpack_archive"), 1) | {"rmtree": 0},
    "faiss": {"write_index": 1},
    "json": {"dump": 1},
    "yaml": {"dump": 1},
    "np": dict.fromkeys(("save", "savez", "savez_compressed", "savetxt"), 0),
    "numpy": dict.fromkeys(("save", "savez", "savez_compressed", "savetxt"), 0),
    "pq": dict.fromkeys(("write_table", "write_to_dataset", "ParquetWriter"), 1),
}
ANYWHERE = {"savefig": 0, "save_file": 1, "tofile": 0, "dump_to": 0}  # attributes or bare names
DESTINATION_KEYWORDS = {"file", "path", "where", "filename", "fname", "dst", "target", "fp"}
TABLES = ("sink_", "write_", "to_csv", "to_parquet", "to_feather", "to_excel", "to_hdf", "to_sql", "to_pickle")
NEVER = {"eval", "exec", "compile", "__import__"}
NEVER_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NEVER_OF_TORCH = {"save", "load", "jit", "package", "compile"}


def stray_writes(source: str) -> list[str]:
    """Calls that write, move or remove something, whose destination is neither `staging / ...` nor memory."""
    tree = ast.parse(source)
    mappings = names_of(tree, lambda value: isinstance(value, ast.Dict | ast.DictComp))
    memory = names_of(tree, lambda value: ast.unparse(value) in ("io.StringIO()", "io.BytesIO()"))
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and any(not is_staging(d) and getattr(d, "id", None) not in memory for d in destinations(call, mappings))
    ]


def names_of(tree: ast.AST, wanted: Callable[[ast.expr], bool]) -> set[str]:
    """Names that are given such values, and no others."""
    values: dict[str, list[bool]] = {}
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            values.setdefault(ast.unparse(target), []).append(wanted(node.value))
    return {name for name, found in values.items() if all(found)}


def destinations(call: ast.Call, mappings: set[str]) -> Iterator[ast.expr | None]:
    """What a call would write to; None if that cannot be seen."""
    receiver = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    module = receiver.id if isinstance(receiver, ast.Name) else ""
    if module in FUNCTIONS and name in FUNCTIONS[module]:
        yield argument(call, FUNCTIONS[module][name])
    elif name == "open":
        path_is_receiver = receiver is not None and module not in ("io", "gzip", "bz2", "lzma", "codecs", "tarfile")
        if changes(argument(call, 0 if path_is_receiver else 1, {"mode"})):
            yield receiver if path_is_receiver else argument(call, 0)
    elif name in ("ZipFile", "TarFile", "FileIO"):
        if changes(argument(call, 1, {"mode"})):
            yield argument(call, 0)
    elif name in ANYWHERE:
        yield argument(call, ANYWHERE[name])
    elif receiver is None:
        return
    elif name in METHODS_OF_PATHS:
        yield receiver
    elif name in ("rename", "replace"):  # of a Path: one argument; of a string: two; of a table: a mapping
        only = call.args[0] if len(call.args) == 1 and not call.keywords else None
        if only is None or isinstance(only, ast.Dict | ast.DictComp | ast.Lambda):
            return
        if isinstance(only, ast.Name) and only.id in mappings:
            return
        yield only
    elif name.startswith(TABLES) or (name in ("to_json", "to_html", "to_string") and call.args):
        yield argument(call, 0)


def argument(call: ast.Call, position: int, keywords: set[str] = DESTINATION_KEYWORDS) -> ast.expr | None:
    named = [k.value for k in call.keywords if k.arg in keywords]
    return call.args[position] if len(call.args) > position else named[0] if named else None


def changes(mode: ast.expr | None) -> bool:
    """Whether a file opened in `mode` can be written to; a mode that cannot be read off counts."""
    if mode is None:
        return False
    return not isinstance(mode, ast.Constant) or not isinstance(mode.value, str) or bool(set(mode.value) & set("wax+"))


def is_staging(destination: ast.expr | None) -> bool:
    """Whether an expression is `staging / ...`, or `.staging / ...` of something; also as text."""
    if isinstance(destination, ast.Call) and ast.unparse(destination.func) == "str" and len(destination.args) == 1:
        destination = destination.args[0]
    if not isinstance(destination, ast.BinOp) or not isinstance(destination.op, ast.Div):
        return False
    root = destination.left
    while isinstance(root, ast.BinOp) and isinstance(root.op, ast.Div):
        root = root.left
    return getattr(root, "id", getattr(root, "attr", "")) == "staging"


def unsafe(source: str) -> list[str]:
    """Pickles, evaluation of text, and torch's own files, which are pickles."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad = any(a.name.split(".")[0] in NEVER_MODULES for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            of_torch = (node.module or "").startswith(("torch.serialization", "torch.distributed.checkpoint")) or (
                node.module == "torch" and any(a.name in NEVER_OF_TORCH for a in node.names)
            )
            bad = (node.module or "").split(".")[0] in NEVER_MODULES or of_torch
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            bad = node.func.id in NEVER
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            bad = (of_torch and node.func.attr in NEVER_OF_TORCH) or node.func.attr in ("to_pickle", "read_pickle")
            bad = bad or any(k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords)
        else:
            bad = isinstance(node, ast.Attribute) and ast.unparse(node).startswith(
                ("torch.distributed.checkpoint", "torch.serialization", "torch.jit", "torch.package")
            )
        if bad:
            found.append(f"line {getattr(node, 'lineno', '?')}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_only_storage_publishes(path: Path) -> None:
    found = [line.partition(": ")[2] for line in stray_writes(path.read_text())]
    assert found == LOGS.get(str(path.relative_to(ROOT)), [])


@pytest.mark.parametrize("path", [*SOURCES, PUBLISHER], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_pickled_or_evaluated(path: Path) -> None:
    assert unsafe(path.read_text()) == []


# The scanner itself


@pytest.mark.parametrize(
    "code",
    [
        "os.rename(a, b)",
        "os.replace(staging / 'a', target)",
        "os.symlink(a, target)",
        "os.open(path, os.O_WRONLY)",
        "shutil.move(a, b)",
        "shutil.copytree(a, b)",
        "shutil.rmtree(folder)",
        "path.rename(other)",
        "path.replace(other)",
        "(folder / 'a').rename(folder / 'b')",
        "path.write_text('x')",
        "(folder / 'a.json').write_bytes(b'x')",
        "path.unlink()",
        "path.touch()",
        "open(path, 'w')",
        "open(path, mode='ab')",
        "open(path, 'r+')",
        "open(path, mode)",
        "path.open('x')",
        "gzip.open(path, 'wt')",
        "zipfile.ZipFile(path, 'w')",
        "frame.sink_parquet(path)",
        "frame.sink_csv('out.csv')",
        "frame.write_parquet(folder / 'a.parquet')",
        "frame.write_csv(file=path)",
        "frame.write_csv()",
        "table.write_parquet(other.staged / 'x')",
        "frame.to_csv(path)",
        "frame.to_parquet(path)",
        "frame.to_json(path)",
        "json.dump(value, file)",
        "np.save(path, array)",
        "array.tofile(path)",
        "figure.savefig(path)",
        "save_file(tensors, path)",
        "faiss.write_index(index, path)",
        "faiss.write_index(index, str(path))",
        "safetensors.torch.save_file(tensors, filename=path)",
        "pq.write_table(table, path)",
        "table.write_parquet(path / staging)",
        "file = io.StringIO()\nfile = open(path)\nfigure.savefig(file)",
    ],
)
def test_the_scanner_sees(code: str) -> None:
    lines = code.splitlines()
    assert stray_writes(code) == [f"line {len(lines)}: {lines[-1]}"]


@pytest.mark.parametrize(
    "code",
    [
        "'text'.replace('a', 'b')",
        "column.str.replace_all('a', 'b')",
        "faiss.write_index(index, str(staging / 'a'))",
        "column.replace({1: 2})",
        "dataclasses.replace(bundle, golden=golden)",
        "moment.replace(tzinfo=None)",
        "frame.rename({'a': 'b'})",
        "frame.rename(lambda name: name.lower())",
        "names = {n: n for n in found}\nframe.rename(names)",
        "open(path)",
        "path.open('rb')",
        "path.open()",
        "path.read_text()",
        "json.dumps(value)",
        "frame.to_json()",
        "frame.write_parquet(staging / 'a.parquet')",
        "frame.write_parquet(staging / f'{folder}/a.parquet', compression='lz4')",
        "frame.sink_parquet(self.staging / 'a' / 'b.parquet')",
        "(staging / 'a.json').write_bytes(b'x')",
        "save_file(tensors, staging / 'a')",
        "figure.savefig(staging / 'a.png')",
        "file = io.StringIO()\nfigure.savefig(file, format='svg')",
    ],
)
def test_the_scanner_lets_pass(code: str) -> None:
    assert stray_writes(code) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import cloudpickle as p",
        "from pickle import loads",
        "torch.save(model, staging / 'model.pt')",
        "torch.load(path, weights_only=True)",
        "from torch import save",
        "import joblib",
        "eval(text)",
        "exec(text)",
        "frame.to_pickle(path)",
        "np.load(path, allow_pickle=True)",
        "torch.jit.load(path)",
        "from torch.distributed.checkpoint import save",
    ],
)
def test_the_scanner_sees_what_is_unsafe(code: str) -> None:
    assert unsafe(code)


def test_the_scanner_lets_safe_code_pass() -> None:
    assert unsafe("model.eval()\nliteral_eval(x)\nnp.load(path)\nmodule.load(path)\nload_file(path)") == []


def test_the_scanner_reads_the_sources() -> None:
    names = {str(p.relative_to(ROOT)) for p in SOURCES}
    assert {"recsys/bundle.py", "pipelines/prepare.py", "serving/score.py", "features/pipeline.py"} <= names
    assert stray_writes(PUBLISHER.read_text())  # the one that may
