"""Values as people read them."""

import pytest

from shortcut_cli.formatting import cell


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (-1234567, "-1,234,567"),
        (0.000123456, "0.0001235"),
        (3.14159, "3.142"),
        (9999.4, "9999"),
        (10_000.0, "10,000"),
        (-12_345.6, "-12,346"),
        (float("nan"), "nan"),
        ("text", "text"),
        ([1.25, None, 2000], "[1.25, , 2,000]"),
        ((0.5, [True]), "[0.5, [yes]]"),
    ],
)
def test_a_cell_is_short_and_exact_enough(value, shown):
    assert cell(value) == shown
