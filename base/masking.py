"""Passwords in addresses never become text."""

import re

_USER = re.compile(r"(?<=://)[^\s/:@]*(:(?:\S*|[^\n/@]*))?@")
"""To the last @, since a password may hold one that is not encoded, or a blank."""
_BARE = re.compile(r"(?<![\w/])[^\s/:@'\"=]+:[^\s/@]+@(?=\w)")
"""Where the scheme was forgotten; `models:/ctr@champion` has a slash there."""
_QUERY = re.compile(
    r"([?&;](?:\w*password|passwd|pass|pwd|\w*token|\w*secret|odbc_connect)=)[^\s&]+?(?=[^\w\s]*(?:\s|&|$))", re.I
)
"""To the next parameter, but for the quotes and stops of the text around."""


def masked(text: str) -> str:
    """The text with `…` for whoever logs in at an address in it: user and password before the host, and passwords and
    tokens after the question mark."""
    return _QUERY.sub(r"\1…", _BARE.sub("…@", _USER.sub("…@", text)))


def has_password(uri: str) -> bool:
    """Whether an address holds what must not be told. A user alone may be told, but for HTTP, where tokens stand so."""
    user = _USER.search(uri)
    return _QUERY.search(uri) is not None or (user is not None and bool(user[1] or uri.startswith("http")))
