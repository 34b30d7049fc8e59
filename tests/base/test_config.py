"""Run files: each fault is one line that names the file, the key as the user wrote it, and what would be right."""

import copy
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from base.config import Config, load_config, parse_config
from base.errors import ConfigError
from features.split import DaySplit
from features.transforms import AnyTransform, Vocabulary
from pipelines.config import Run
from recsys.gate import Gates
from recsys.models import AutoIntConfig, DCNConfig, ModelConfig
from recsys.trainer import TrainConfig

DEMO = Path(__file__).parents[2] / "pipelines/runs/demo.toml"
TREE = tomllib.loads(DEMO.read_text(encoding="utf-8"))

FEATURES = len(TREE["features"])


def keys(*configs: type[Config]) -> str:
    return ", ".join(sorted({name for config in configs for name in config.model_fields}))


def kinds(union: Any, tag: str) -> str:
    """The members of a discriminated union, by their tag."""
    return ", ".join(sorted(member.model_fields[tag].default for member in get_args(get_args(union)[0])))


VOCABULARY, AUTOINT = keys(Vocabulary), keys(AutoIntConfig)


def refusal(change: Callable[[dict[str, Any]], object]) -> list[str]:
    """What is said of the demo's run file after `change`, one line per fault."""
    tree = copy.deepcopy(TREE)
    change(tree)
    with pytest.raises(ConfigError) as caught:
        parse_config(Run, tree, source="run.toml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("run.toml: ") for line in lines)
    return [line.removeprefix("run.toml: ") for line in lines]


def refusal_of(overrides: Sequence[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, DEMO, overrides)
    return str(caught.value)


def test_the_demo_is_a_run_file() -> None:
    run = load_config(Run, DEMO)
    assert run == parse_config(Run, TREE, source="demo")
    assert run.features[0] == Vocabulary(**TREE["features"][0])
    assert run.data.split == DaySplit(**TREE["data"]["split"])


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(Run, DEMO).train.epochs = 4  # pyright: ignore[reportAttributeAccessIssue]


# Unknown keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update(modle={}),
            f"unknown key modle; did you mean 'model'? Known: {keys(Run)}",
        ),
        (
            lambda t: t["features"][2].update(mincount=3),
            f"unknown key features[2].mincount; did you mean 'min_count'? Known: {VOCABULARY}",
        ),
        (
            lambda t: t["model"].update(layer=3),
            f"unknown key model.layer; did you mean 'layers'? Known: {AUTOINT}",
        ),
        (
            lambda t: t["data"]["split"].update(tset="2026-03-08"),
            "unknown key data.split.tset; did you mean 'test'? Known: test, train, valid",
        ),
        (
            lambda t: t["data"].update(split={"train": 0.8, "valid": 0.1, "sed": 1}),
            "unknown key data.split.sed; did you mean 'seed'? Known: by, seed, test, train, valid",
        ),
        (
            lambda t: t["data"].update(time={"column": "day", "fromat": "%Y"}),
            "unknown key data.time.fromat; did you mean 'format'? Known: column, format, unit",
        ),
        (
            lambda t: t.update(gate={"min_acu": 0.7}),
            f"unknown key gate.min_acu; did you mean 'min_auc'? Known: {keys(Gates)}",
        ),
        (
            lambda t: t.update(tables=[{"path": "u.csv", "on": "user_id", "as_of": {"column": "t", "unti": "s"}}]),
            "unknown key tables[0].as_of.unti; did you mean 'unit'? Known: column, format, unit",
        ),
        (
            lambda t: t["train"].update(xyzzy=1),
            f"unknown key train.xyzzy. Known: {keys(TrainConfig)}",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_known(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    [line] = refusal(change)
    assert line == message


@pytest.mark.parametrize("key", ["vocabulary", "kind2"])
def test_a_key_called_like_the_tag_of_a_union_keeps_its_own_path(key: str) -> None:
    [line] = refusal(lambda t: t["features"][2].update({key: 3}))
    assert line.startswith(f"unknown key features[2].{key}")
    assert line.endswith(f"Known: {VOCABULARY}")
    [line] = refusal(lambda t: t["data"]["split"].update(days=3))
    assert line == "unknown key data.split.days. Known: test, train, valid"
    [line] = refusal(lambda t: t["model"].update(autoint=3))
    assert line.startswith("unknown key model.autoint.")


def test_every_fault_has_a_line() -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["model"]["dims"] = 3
        tree["train"]["epochs"] = 0
        del tree["features"][1]["column"]

    assert refusal(change) == [
        "features[1].column is missing; it must be given",
        f"unknown key model.dims; did you mean 'dim'? Known: {AUTOINT}",
        "train.epochs = 0: Input should be greater than 0",
    ]


# Addresses of MLflow, and passwords in them


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://u:S3cret@h", "'http://…@h' holds a password, which MLflow would print; leave user and password out, "
         "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://u:S3cret@db/x", "'postgresql://…@db/x' holds a password, which every Bundle would keep; put "
         'the address into an environment variable and write "$RECSYS_MLFLOW_URI", for instance, or leave the password '
         "to ~/.pgpass or PGPASSWORD (PostgreSQL)"),
        ("postgresql://db/x?password=S3cret", "'postgresql://db/x?password=…' holds a password"),
        ("postgresql://u:S3 cret@db/x", "the address holds a blank; write it as %20"),
        ("junk://x", "'junk://x' is no address of MLflow; write http://…, https://…, sqlite:///FILE, "),
        ("file:///srv/mlruns", "'file:///srv/mlruns' is no address of MLflow"),
        ("sqlite://mlflow.db", "'sqlite://mlflow.db' is no address of MLflow"),
        ("", "'' is no address of MLflow"),
        ("$MLFLOW_TRACKING_URI", "'$MLFLOW_TRACKING_URI' is no environment variable that can hold an address: MLflow "),
        ("$http://u:S3cret@h", "what is given is no environment variable"),
        ("u:S3cret@h/x", "what is given is no address of MLflow"),
        ("postgres://u:my S3cret@h/x", "what is given is no address of MLflow"),
        ("postgresql://u:p@S3cret@h/x", "the address holds more than one @; write those of user and password as %40"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_or_tells_a_password(uri: str, said: str) -> None:
    [line] = refusal(lambda t: t.update(mlflow={"uri": uri}))
    assert line.startswith(f"mlflow.uri: {said}")
    for override in (f"mlflow.uri={uri}", f"mlflow={uri}", f"mlflow.uri.x={uri}", f"mlflow.modle={uri}"):
        assert "S3cret" not in refusal_of([override])


def test_an_address_with_a_password_stays_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_config(Run, DEMO, ["mlflow.uri=$OURS"])
    with pytest.raises(ConfigError, match=r"mlflow\.uri = '\$OURS': that environment variable is not set; export"):
        _ = run.tracking_uri
    monkeypatch.setenv("OURS", "postgresql+psycopg2://u:S3cret@db/x")
    assert run.tracking_uri == "postgresql+psycopg2://u:S3cret@db/x"
    assert "S3cret" not in f"{run!r} {run.model_dump_json()} {run.mlflow}"
    monkeypatch.setenv("OURS", "https://u:S3cret@h")
    with pytest.raises(ConfigError, match=r"'\$OURS': 'https://…@h' holds a password, which MLflow would print"):
        _ = run.tracking_uri


# Names that do not exist, missing keys, wrong types


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["model"].update(name="autont"),
            f"model.name = 'autont' does not exist; did you mean 'autoint'? Known: {kinds(ModelConfig, 'name')}",
        ),
        (
            lambda t: t["model"].pop("name"),
            f"model.name is missing; it says which kind this is. Known: {kinds(ModelConfig, 'name')}",
        ),
        (lambda t: t.update(model="autoint"), "model = 'autoint': must be a table of: alpha, attention_dim, "),
        (
            lambda t: t["features"][3].update(kind="vocab"),
            "features[3].kind = 'vocab' does not exist; did you mean 'vocabulary'? Known: "
            + kinds(AnyTransform, "kind"),
        ),
        (
            lambda t: t["features"][3].pop("kind"),
            f"features[3].kind is missing; it says which kind this is. Known: {kinds(AnyTransform, 'kind')}",
        ),
        (lambda t: t["features"][3].pop("column"), "features[3].column is missing; it must be given"),
        (lambda t: t.pop("output"), "output is missing; it must be given"),
        (lambda t: t["data"]["split"].pop("valid"), "data.split.valid is missing; it must be given"),
        (lambda t: t["data"].update(split="2026-03-01"), "data.split = '2026-03-01': must be a table of: "),
        (lambda t: t.update(features={"kind": "log"}), "features = {'kind': 'log'}: must be a list"),
        (
            lambda t: t["train"].update(batch_size="big"),
            "train.batch_size = 'big': Input should be a valid integer, unable to parse string as an integer",
        ),
        (
            lambda t: t["features"][0].update(min_count=0),
            "features[0].min_count = 0: Input should be greater than 0",
        ),
        (
            lambda t: t["train"].update(seed=2**70),
            "train.seed = 1180591620717411303424: Input should be less than 9223372036854775808",
        ),
        (lambda t: t.update(output="a\0b"), "output: 'a\\x00b' holds a NUL, which no path can; remove it"),
        (
            lambda t: t["data"].update(types={"zip": "string"}),
            "data.types.zip = 'string': Input should be 'integer', 'float', 'text' or 'boolean'",
        ),
        (
            lambda t: t["data"]["split"].update(valid="yesterday"),
            "data.split: 'yesterday' is not a day or a range of days: write 2026-03-01 or 2026-03-01..2026-03-05",
        ),
        (
            lambda t: t["data"].update(split={"train": 0.8, "valid": 0.4}),
            "data.split: shares add up to 1.2; they may not exceed 1",
        ),
        (
            lambda t: t["features"].append({"kind": "boundaries", "column": "age", "boundaries": [3, 2]}),
            f"features[{FEATURES}]: boundaries of 'age' must increase: [3.0, 2.0]",
        ),
    ],
)
def test_what_cannot_be_meant_is_named_with_its_value(change: Callable[[dict[str, Any]], object], message: str) -> None:
    [line] = refusal(change)
    assert line.startswith(message)
    assert line == message or message.endswith((", ", ": "))


def test_a_fault_of_the_whole_needs_no_path() -> None:
    class Pair(Config):
        kind: Literal["pair"] = "pair"
        low: int

    with pytest.raises(ConfigError, match=r"^call: low = 'x': Input should be a valid integer"):
        parse_config(Pair, {"low": "x"}, source="call")


# Files


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    assert str(caught.value) == f"{path}: no such run file; pass --config with the path of a TOML file"


def test_a_folder_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, tmp_path)
    assert str(caught.value) == f"{tmp_path}: Is a directory; pass --config with the path of a TOML file"


@pytest.mark.parametrize("text", [b'output = "a\n', b"[data\n", b"a = 1\na = 2\n", b'name = "\xff"\n'])
def test_a_file_that_is_not_toml(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    assert str(caught.value).startswith(f"{path}: not valid TOML: ")
    assert "line" in str(caught.value) or "decode" in str(caught.value)


def test_names_need_not_be_ascii(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(DEMO.read_bytes().replace(b'output = "runs/demo"', 'output = "läufe/größe"'.encode()))
    assert load_config(Run, path).output == Path("läufe/größe")


# --set


def test_overrides() -> None:
    overrides = [
        *("train.batch_size=8192", "train.learning_rate=1e-4", "output=elsewhere", 'mlflow.uri="http://m:5000"'),
        *("features.0.min_count=7", "data.split.test=2026-03-08", "evaluate.slices=['hour']", "gate.min_auc=0.6"),
    ]
    run = load_config(Run, DEMO, overrides)
    assert (run.train.batch_size, run.train.learning_rate, run.train.epochs) == (8192, 1e-4, TREE["train"]["epochs"])
    assert run.output == Path("elsewhere")
    assert run.mlflow.uri == "http://m:5000"
    assert run.features[0] == Vocabulary(column="user_id", min_count=7)
    assert run.data.split == DaySplit(**TREE["data"]["split"] | {"test": "2026-03-08"})
    assert run.evaluate.slices == ("hour",)
    assert run.gate.min_auc == 0.6  # a table that the file does not have


def test_the_last_override_wins_and_tables_can_be_replaced() -> None:
    run = load_config(Run, DEMO, ["train.seed=1", "model={name='dcn'}", "train.seed=2", "model.dim=4"])
    assert run.train.seed == 2
    assert run.model == DCNConfig(dim=4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "--set 'train.epochs': write it as path.to.key=value, e.g. train.batch_size=8192"),
        ("=3", "--set '=3': write it as path.to.key=value, e.g. train.batch_size=8192"),
        ("output.x.y=3", "--set 'output.x.y=3': output is 'runs/demo', not a table"),
        ("output.x=3", "--set 'output.x=3': output is 'runs/demo', not a table"),
        (
            "features.99.column=x",
            f"--set 'features.99.column=x': '99' is not an index into a list of {FEATURES}; count from 0",
        ),
        ("features.last=x", f"--set 'features.last=x': 'last' is not an index into a list of {FEATURES}; count from 0"),
        ("train.epoch=3", f"{DEMO}: unknown key train.epoch; did you mean 'epochs'? Known: batch_size, "),
        ("features.2.mincount=3", f"{DEMO}: unknown key features[2].mincount; did you mean 'min_count'? Known: col"),
        ("model.name=autont", f"{DEMO}: model.name = 'autont' does not exist; did you mean 'autoint'? Known: aut"),
        ("train.epochs=many", f"{DEMO}: train.epochs = 'many': Input should be a valid integer, unable to parse s"),
        ("train.epochs=", f"{DEMO}: train.epochs = '': Input should be a valid integer, unable to parse string"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    assert refusal_of([override]).startswith(message)
