"""Strict JSON: what is accepted is what json.loads reads, less what parsers disagree on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.api.errors import ApiError
from quire.gateway.json_body import MAX_DEPTH, parse

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text() | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values, st.booleans())
def test_json_is_read_as_json(value, ascii_only):
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=40))
def test_anything_else_is_one_error(data):
    try:
        parse(data)
    except ApiError as error:
        assert error.status == 400


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth(opening):
    closing = "]" if opening == "[" else "}"

    def nested(depth):
        return (opening * depth + ("" if closing == "]" else "1") + closing * depth).encode()

    parse(nested(MAX_DEPTH))
    with pytest.raises(ApiError, match="deeper"):
        parse(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'["\\ud800"]', "[0]"),
        (b'{"a":{"b":["x","\\udfff"]}}', "a.b[1]"),
        (b'{"\\ud800":1}', None),
    ],
)
def test_half_surrogates_are_named(body, param):
    with pytest.raises(ApiError) as error:
        parse(body)
    assert (error.value.code, error.value.param) == ("invalid_value", param)


def test_errors_do_not_repeat_the_body():
    with pytest.raises(ApiError) as error:
        parse(b'{"secret": oops}')
    assert "secret" not in error.value.message
    assert "column" in error.value.message
