"""Texts of flags and variables turned into values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.config.values import check_scalar, nearest, parse_bool, parse_float, parse_int

POWERS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40} | {
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "Ki": 2**10, "GiB": 2**30, "kB": 1000,
}  # fmt: skip


@given(st.integers(-(10**12), 10**12), st.sampled_from(sorted(POWERS)))
def test_an_integer_is_scaled_by_its_suffix(number, suffix):
    assert parse_int(f"{number}{suffix}") == number * POWERS[suffix]
    assert parse_int(f" {number:_} {suffix}") == number * POWERS[suffix]


@given(st.integers(0, 10**6), st.integers(1, 999), st.sampled_from("kmgt"))
def test_a_decimal_fraction_of_a_decimal_suffix_is_exact(whole, thousandths, suffix):
    assert parse_int(f"{whole}.{thousandths:03}{suffix}") * 1000 == (
        (whole * 1000 + thousandths) * POWERS[suffix]
    )


def test_a_binary_fraction_works_when_the_result_is_whole():
    assert parse_int("1.5G") == 3 * 2**29
    assert parse_int("-0.5K") == -512
    with pytest.raises(ValueError, match="not a whole number"):
        parse_int("1.3K")
    with pytest.raises(ValueError, match="not a whole number"):
        parse_int("1.0")


@pytest.mark.parametrize("text", ["", "k", "4 Q", "0x10", "1e3", "4i", "nan", "--", "1,000", "٣K2"])
def test_what_is_no_integer_is_refused(text):
    with pytest.raises(ValueError, match="integer"):
        parse_int(text)


@given(st.text(max_size=20))
def test_no_text_crashes_the_parsers(text):
    for parse in (parse_int, parse_float, parse_bool):
        try:
            parse(text)
        except ValueError as error:
            assert "\n" not in str(error)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_round_trip(number):
    assert parse_float(repr(number)) == number


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x"])
def test_a_float_is_finite(text):
    with pytest.raises(ValueError, match="number is needed"):
        parse_float(text)


def test_truths():
    assert [parse_bool(t) for t in ("1", "True", " yes", "ON")] == [True] * 4
    assert [parse_bool(t) for t in ("0", "false", "No ", "off")] == [False] * 4


def test_typed_values_are_not_converted_silently():
    assert check_scalar(float, 1) == 1.0
    assert check_scalar(int, "4K") == 4096
    for kind, value in ((int, True), (int, 1.5), (str, 1.10), (bool, 1), (float, None), (int, [])):
        with pytest.raises(ValueError, match="needed"):
            check_scalar(kind, value)


def test_the_nearest_word_is_named_and_a_far_one_is_not():
    known = ["--max-model-len", "--max-num-seqs", "--port"]
    assert nearest("--max-modle-len", known) == "--max-model-len"
    assert nearest("--zzz", known) is None
