"""Numbers that a summary states and its note does not hold."""

from sft.grounding.numbers import unsupported_numbers

NOTE = "BP 120/80, platelets 1,200, dose 5.0 mg on day 03"


def test_equal_numbers_in_other_spellings_are_supported():
    assert unsupported_numbers("BP 120/80, platelets 1200, 5 mg, day 3", NOTE) == []


def test_numbers_of_citations_are_not_stated():
    assert unsupported_numbers("BP 120/80 [Evidence: S77; Conf: 0.85]", NOTE) == []


def test_numbers_without_support():
    assert unsupported_numbers("BP 130/80 and 50 mg", NOTE) == ["130", "50"]


def test_a_point_without_a_zero_is_a_decimal_point():
    assert unsupported_numbers("Give 0.5 mg.", "Give .5 mg.") == []
    assert unsupported_numbers("Give .5 mg.", "Give 0.50 mg.") == []
    assert unsupported_numbers("Give 5 mg.", "Give .5 mg.") == ["5"]
    assert unsupported_numbers("Give .5 mg.", "Give 5 mg.") == [".5"]
    assert unsupported_numbers("q.4h, 5 mg", "every 4 h...5 mg") == []
