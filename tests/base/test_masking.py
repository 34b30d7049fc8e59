"""No password of an address becomes text, whatever it consists of; the rest of the text stays."""

import pytest

from base.errors import RegistryError, Superseded, UserError
from base.masking import has_password, masked

SECRET = [
    ("http://user:S3cret@h:5000/x", "http://…@h:5000/x"),
    ("https://S3cret@h", "https://…@h"),  # a token
    ("postgresql+psycopg2://u:S3%40cret@db/x", "postgresql+psycopg2://…@db/x"),
    ("postgresql://u:S3cret@S3cret/S3cret@db/x", "postgresql://…@db/x"),  # not encoded, as drivers allow
    ("postgresql://:S3cret@db/x", "postgresql://…@db/x"),
    ("postgresql://db/x?password=S3cret", "postgresql://db/x?password=…"),
    ("postgresql://db/x?user=u&password=S3%26cret&port=1", "postgresql://db/x?user=u&password=…&port=1"),
    ("mysql+pymysql://db/x?sslpassword=S3'cret&PASSWD=S3cret", "mysql+pymysql://db/x?sslpassword=…&PASSWD=…"),
    ("https://h/x?access_token=S3cret", "https://h/x?access_token=…"),
]
OPEN = [
    *("sqlite:////srv/a@b/mlflow.db", "http://127.0.0.1:5000", "postgresql://db/x?passfile=/etc/pgpass"),
    *("sqlite:////srv/a:b@c/mlflow.db", "logs/day=*/*.parquet"),
]


@pytest.mark.parametrize(("uri", "shown"), SECRET)
def test_a_password_is_masked_wherever_it_stands(uri: str, shown: str) -> None:
    assert masked(uri) == masked(shown) == shown
    assert has_password(uri)
    for around in (
        "MLflow at {} does not answer",
        "--set 'mlflow.uri={}': no",
        '{{\n  "uri": "{}",\n  "k": 1\n}}',
        "({}).",
    ):
        assert masked(around.format(uri)) == around.format(shown)


@pytest.mark.parametrize("uri", OPEN)
def test_other_addresses_stay(uri: str) -> None:
    assert masked(uri) == uri
    assert not has_password(uri)


def test_a_user_of_a_database_is_no_password() -> None:
    assert not has_password("postgresql+psycopg2://mlflow@db/mlflow")


@pytest.mark.parametrize("kind", [UserError, RegistryError, Superseded])
def test_no_message_repeats_a_password(kind: type[UserError]) -> None:
    assert str(kind("at http://u:S3cret@h, see")) == "at http://…@h, see"
