import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.grounding.citations import cited_sentence_numbers, parse_citations, strip_citations
from sft.grounding.numbers import unsupported_numbers
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
def test_splitting_is_stable_for_numbered_lines(text):
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
            "A line that was wrapped by an old system after sixty characters or so and\ngoes on here.",
            ["A line that was wrapped by an old system after sixty characters or so and goes on here."],
        ),
        ("Any pain? No. Room no. 4.", ["Any pain?", "No.", "Room no. 4."]),
        ('He said "stop." Then left.', ['He said "stop."', "Then left."]),
        ("", []),
    ],
)
def test_clinical_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_citations_are_read_against_the_note():
    note = "Fever. Cough. Flu A positive."
    summary = "Influenza A. [Evidence: S3; Conf: 0.95] Fever and cough. [evidence: S1-2, S9; conf: 0.8]"
    first, second = parse_citations(summary, note)
    assert first == {
        "claim": "Influenza A.",
        "sentence_numbers": [3],
        "sentences": ["Flu A positive."],
        "missing": [],
        "confidence": 0.95,
    }
    assert (second["sentence_numbers"], second["missing"], second["confidence"]) == ([1, 2, 9], [9], 0.8)
    assert strip_citations(summary) == "Influenza A. Fever and cough."
    assert cited_sentence_numbers("x [Evidence: S1,2; Conf: 0.85]") == [1, 2]  # the form of the documents


@pytest.mark.parametrize(
    "text",
    [
        "[Evidence: ; Conf: 0.8]",
        "[Evidence: S1]",
        "[Evidence: S1; Conf: high]",
        "Evidence: S1; Conf: 0.9",
        "[Evidence: S1-999999999999; Conf: 1]",
    ],
)
def test_malformed_or_absurd_citations_do_no_harm(text):
    assert all(len(citation["sentence_numbers"]) <= 2 for citation in parse_citations(text, "One. Two."))


@given(clinical_text, clinical_text)
def test_citation_parsing_never_fails(summary, note):
    for citation in parse_citations(summary, note):
        assert len(citation["sentences"]) + len(citation["missing"]) == len(citation["sentence_numbers"])


def test_numbers_without_support():
    note = "BP 120/80, platelets 1,200, dose 5.0 mg on day 03"
    assert (
        unsupported_numbers("BP 120/80, platelets 1200, 5 mg, day 3 [Evidence: S77; Conf: 0.85]", note) == []
    )
    assert unsupported_numbers("BP 130/80 and 50 mg", note) == ["130", "50"]
