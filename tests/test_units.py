"""Numbers as people read them."""

import pytest

from lsr_scale.units import amount, byte_size


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "row", "0 rows"),
        (1, "row", "1 row"),
        (2000, "more note", "2,000 more notes"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (2, "batch", "2 batches"),
    ],
)
def test_one_of_a_thing_is_no_plural(number, noun, text):
    assert amount(number, noun) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (812, "812 bytes"),
        (999, "999 bytes"),
        (1000, "0.98 KiB"),
        (33_400, "32.6 KiB"),
        (1023 * 1024, "1.00 MiB"),
        (2**20, "1.00 MiB"),
        (5_590_000, "5.33 MiB"),
        (28.1 * 2**30, "28.1 GiB"),
        (140 * 2**30, "140 GiB"),
        (3 * 2**60, "3072 PiB"),
    ],
)
def test_bytes_are_in_the_unit_that_suits_them(num_bytes, text):
    assert byte_size(num_bytes) == text


@pytest.mark.parametrize("num_bytes", [1, 40_000, 52_000, 10**6, 10**9, 10**12])
def test_what_is_something_is_never_shown_as_zero(num_bytes):
    assert float(byte_size(num_bytes).split()[0]) > 0.9
