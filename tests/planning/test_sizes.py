"""Amounts of memory as people write them."""

from __future__ import annotations

import pytest

from rankwise.errors import ConfigError
from rankwise.planning.sizes import parse_size


@pytest.mark.parametrize("text", ["24", "24GB", "24 gb", "24g", "24G", " 24 GB ", "24.0gb", "24000MB", 24])
def test_decimal_gigabytes(text):
    assert parse_size(text) == 24 * 10**9


@pytest.mark.parametrize("text", ["24GiB", "24 gib", "24576 MiB", "24Gib"])
def test_binary_gibibytes_are_kept_apart(text):
    assert parse_size(text) == 24 * 2**30


@pytest.mark.parametrize("text", ["", "0", "0GB", "-3", "24 bananas", "24i", "GB", "1e3", "nan", "inf", "24 GB B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="RW140"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "size"), [("1,024MB", 1024 * 10**6), ("1,024,000.5kB", 1_024_000_500), ("81,920 MiB", 80 * 2**30)]
)
def test_a_comma_before_three_digits_parts_thousands(text, size):
    assert parse_size(text) == size


def test_a_comma_may_be_the_decimal_point():
    assert parse_size("1,5 TB") == parse_size("1.5TB") == 1_500 * 10**9


@pytest.mark.parametrize(
    ("text", "meant"), [("24000000000", "24GB"), (100_001, "100.001kB"), ("25,769,803,776", "25.769803776GB")]
)
def test_a_bare_number_of_bytes_is_not_taken_for_gigabytes(text, meant):
    with pytest.raises(ConfigError, match=f"RW140.*did you mean bytes.*{meant}"):
        parse_size(text)
    assert parse_size(f"{text}B") == parse_size(meant)


@pytest.mark.parametrize("text", ["9" * 400, f"{'9' * 400}GB", f"1{'0' * 300} TiB", "9223372036854775808B"])
def test_more_than_any_machine_has_is_refused_in_a_line(text):
    """Digits beyond a float's range included."""
    with pytest.raises(ConfigError, match=r"RW140.*more than any machine has") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("letters", "said"), [(40, f"'{'x' * 40}'"), (41, f"'{'x' * 40}...'")])
def test_of_a_long_text_the_beginning_is_shown(letters, said):
    with pytest.raises(ConfigError) as caught:
        parse_size("x" * letters)
    assert f"the memory {said} is not a size" in caught.value.message


def test_large_numbers_of_gigabytes_stay():
    assert parse_size("100000") == parse_size("100TB")
