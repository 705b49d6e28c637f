"""JSON with one meaning."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.cache_format.strict_json import parse_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":1,"b":{"c":1,"c":2}}', "expected each key once, found 'c' twice"),
        (b'{"a":NaN}', "expected finite numbers, found NaN"),
        (b"[-Infinity]", "expected finite numbers, found -Infinity"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'"\xff"', "decode"),
        (b"9" * 100_000, "digits"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
    ],
)
def test_what_has_no_single_meaning_is_refused(text: bytes, message: str) -> None:
    """Repeated keys, NaN, bottomless nesting, bytes that are no UTF-8: a ValueError that says which."""
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_what_json_writes_is_read(value: object) -> None:
    """Everything that the standard writer makes comes back."""
    assert parse_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:1eEN\\u-', max_size=60).map(str.encode))
def test_any_bytes_are_json_or_a_value_error(data: bytes) -> None:
    """No input raises anything else."""
    with contextlib.suppress(ValueError):
        parse_json(data)
