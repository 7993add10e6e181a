"""Citations in summaries: read against the note, removed, and harmless if malformed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.grounding.citations import (
    cited_sentence_numbers,
    has_citation,
    parse_citations,
    strip_citations,
)

text = st.text(max_size=200) | st.text(st.sampled_from("aB1.?! \n\t-:;,()é[]S\u200f\U0001f600"), max_size=200)
text_with_citations = text | st.lists(
    st.sampled_from(
        ["[Evidence: S", "[evidence:S", "1", "2", "99", ",", "-", "–", "S", "; Conf: 0.", "]", " ", "Fever."]
    )
).map("".join)


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
    assert second == {
        "claim": "Fever and cough.",
        "sentence_numbers": [1, 2, 9],
        "sentences": ["Fever.", "Cough."],
        "missing": [9],
        "confidence": 0.8,
    }
    assert strip_citations(summary) == "Influenza A. Fever and cough."
    assert has_citation(summary)
    assert not has_citation(strip_citations(summary))


@pytest.mark.parametrize(
    "cited, numbers",
    [
        ("S1,2", [1, 2]),  # the form of the documents
        ("S3-5, S4", [3, 4, 5]),
        ("S 5 – S 3", [5, 3]),
        ("S1-1001", list(range(1, 1002))),
        ("S1-1002", [1, 1002]),
    ],
)
def test_cited_sentence_numbers(cited, numbers):
    assert cited_sentence_numbers(f"x [Evidence: {cited}; Conf: 0.85]") == numbers


@pytest.mark.parametrize(
    "text",
    [
        "[Evidence: ; Conf: 0.8]",
        "[Evidence: S1]",
        "[Evidence: S1; Conf: high]",
        "Evidence: S1; Conf: 0.9",
        "[Evidence: S1-999999999999; Conf: 1]",
        f"[Evidence: S{'9' * 5000}; Conf: 1]",
    ],
)
def test_malformed_or_absurd_citations_do_no_harm(text):
    assert all(len(citation["sentence_numbers"]) <= 2 for citation in parse_citations(text, "One. Two."))


@given(text_with_citations, text)
def test_citation_parsing_never_fails(summary, note):
    for citation in parse_citations(summary, note):
        assert len(citation["sentences"]) + len(citation["missing"]) == len(citation["sentence_numbers"])
