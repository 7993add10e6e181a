"""Sentences of clinical text, as spans and as numbered lines."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.grounding.sentences import number_sentences, sentence_spans, split_sentences

clinical_text = st.text(st.sampled_from("aB1.?! \n\t-:;,()é[]S\u200f\U0001f600"), max_size=200) | st.text(
    max_size=200
)


@given(clinical_text)
def test_spans_are_ordered_and_hold_every_visible_character(text):
    spans = sentence_spans(text)
    assert all(start < end for start, end in spans)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    outside = text
    for start, end in reversed(spans):
        assert text[start:end] == text[start:end].strip()
        outside = outside[:start] + outside[end:]
    assert not outside.strip()


@given(clinical_text)
def test_numbered_lines_are_the_sentences(text):
    lines = number_sentences(text)
    assert [line.split(": ", 1)[1] for line in lines] == split_sentences(text)
    assert [line.split(":")[0] for line in lines] == [f"S{i}" for i in range(1, len(lines) + 1)]


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Fever of 38.5°C. Cough.", ["Fever of 38.5°C.", "Cough."]),
        (
            "Tested positive for influenza A. Recent contact.",
            ["Tested positive for influenza A.", "Recent contact."],
        ),
        ("Seen by Dr. Smith. Well.", ["Seen by Dr. Smith.", "Well."]),
        (
            "Aspirin 81 mg p.o. daily. Stop b.i.d. Metoprolol.",
            ["Aspirin 81 mg p.o. daily.", "Stop b.i.d.", "Metoprolol."],
        ),
        (
            "E. coli in urine. Severe MR. PR 96 ms. QT normal.",
            ["E. coli in urine.", "Severe MR.", "PR 96 ms.", "QT normal."],
        ),
        ("Meds:\nlisinopril 10 mg\nmetformin 500 mg", ["Meds:", "lisinopril 10 mg", "metformin 500 mg"]),
        ("1. Diabetes. A1c 8.2.\n2. HTN", ["1. Diabetes.", "A1c 8.2.", "2. HTN"]),
        (
            "A line that was wrapped by an old system after sixty characters or so and\ncontinues here.",
            ["A line that was wrapped by an old system after sixty characters or so and continues here."],
        ),
        ("Any pain? No. Room no. 4.", ["Any pain?", "No.", "Room no. 4."]),
        ('He said "stop." Then left.', ['He said "stop."', "Then left."]),
        ("", []),
    ],
)
def test_clinical_sentences(text, sentences):
    assert split_sentences(text) == sentences
