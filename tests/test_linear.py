"""Time of the functions on text: linear in its length, whatever the text. A pattern with two ways to read the
same characters would take seconds on these, or years."""

import time

import pytest

from sft.data.text import clean_text, is_blank
from sft.grounding.citations import (
    cited_sentence_numbers,
    has_citation,
    parse_citations,
    strip_citations,
    unreadable_citations,
)
from sft.grounding.sentences import number_sentences, sentence_spans
from sft.inference.endings import without_fragment

UNITS = (
    *(" ", "\n", "a", "A", "1", ".", ",", "[", "(", "]", "?)", "'", "\u00a0", "S1", "1.", "1,000", "a.", "-"),
    *(
        "[Evidence: S1",
        "[evidence ",
        ", 2",
        "Evidence: S1 ",
        ". evidence S1",
        "(S1",
        "[[",
        "S1-",
        "; Conf: 0.",
        "conf",
        "【{<",
        "[[a",
        "*[S1]*",
        "«S1 ⟦",
        "supported  ",
        "high  ",
        "[1] ",
        "Source: S1, ",
    ),
    *(
        "1. A, 2. B, ",
        "Dr. ",
        "b.i.d.",
        "mg. and ",
        "no\n",
        "- x\n",
        "A:\n",
        "q.4-",
        ".,",
        ". \n",
        "x, 1. ",
        "\u2026",
    ),
)
SHORT, LONG = 3_000, 30_000  # characters

FUNCTIONS = {
    "sentence_spans 1": lambda text: sentence_spans(text, 1),
    "sentence_spans 2": lambda text: sentence_spans(text, 2),
    "number_sentences": number_sentences,
    "strip_citations": strip_citations,
    "citations": lambda text: (has_citation(text), cited_sentence_numbers(text), unreadable_citations(text)),
    "without_fragment": without_fragment,
    "parse_citations": lambda text: parse_citations(text, "One."),
    "clean_text": lambda text: is_blank(clean_text(text)),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_ten_times_the_text_takes_about_ten_times_the_time(function):
    # Also as the middle of a citation, a line, and a list
    shapes = [(before, unit) for unit in UNITS for before in ("", "[Evidence: S1, 2", "A line\n1. ")]
    for before, unit in shapes:
        short, long = (before + unit * (length // len(unit)) for length in (SHORT, LONG))
        # A quadratic function takes 100 times as long; other programs on the machine may slow one try
        for _ in range(4):
            ratio = seconds(function, long) / max(seconds(function, short), 2e-4)
            if ratio < 25:
                break
        assert ratio < 25, (before, unit)


def seconds(function, text: str) -> float:
    started = time.process_time()
    function(text)
    return time.process_time() - started
