"""Stop strings: the same end however the text was cut, nothing shown too early or kept too long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.text.stop import StopMatch, StopMatcher


def run(stops, pieces):
    """(text shown, stop string or None)"""
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        out = matcher.push(piece)
        if isinstance(out, StopMatch):
            return shown + out.text, out.stop
        shown += out
    return shown + matcher.flush(), None


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["STOP"], ["Hello ST", "OP world"], ("Hello ", "STOP")),
        (["STOP"], ["S", "T", "O", "P"], ("", "STOP")),
        (["STOP"], ["STO", "STOP"], ("STO", "STOP")),
        (["STOP"], ["STOST"], ("STOST", None)),
        (["aab"], ["aaab"], ("a", "aab")),
        (["b", "abc"], ["xabc"], ("xa", "b")),  # ends first
        (["bc", "abc"], ["xabc"], ("x", "abc")),  # end together: the longest
        (["\n\n"], ["a\n", "b\n", "\nc"], ("a\nb", "\n\n")),
        (["é"], ["caf", "é!"], ("caf", "é")),
        ([], ["anything"], ("anything", None)),
    ],
)
def test_stop_strings(stops, pieces, expected):
    assert run(stops, pieces) == expected


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["<end>"])
    assert matcher.push("a <en") == "a "
    assert matcher.push("velope") == "<envelope"


def reference(stops, text):
    ends = sorted(
        (text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text
    )
    if not ends:
        return text, None
    end, minus_len, stop = ends[0]
    return text[: end + minus_len], stop


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_the_cut_does_not_matter(stops, pieces):
    assert run(stops, pieces) == reference(stops, "".join(pieces))


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_held_text_is_always_a_prefix_of_a_stop_string(stops, pieces):
    matcher = StopMatcher(stops)
    seen = shown = ""
    for piece in pieces:
        out = matcher.push(piece)
        if isinstance(out, StopMatch):
            return
        seen, shown = seen + piece, shown + out
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert any(stop.startswith(held) and held != stop for stop in stops)
