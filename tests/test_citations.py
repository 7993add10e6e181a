"""Citations in summaries: read against the note, removed, and harmless if malformed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.grounding.citations import (
    citation_spans,
    cited_sentence_numbers,
    has_citation,
    parse_citations,
    strip_citations,
    unreadable_citations,
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
    "citation, numbers, confidence",
    [
        ("[Evidence: S2 and S1; Conf: 0.8]", [2, 1], 0.8),
        ("[Evidence: S1]", [1], None),
        ("[Evidence: S1; Conf: 90%]", [1], 0.9),
        ("[Evidence: S1; Confidence: 85]", [1], 0.85),
        ("[Evidence: S1; conf 0,7]", [1], 0.7),
        ("[Evidence: S1; 0.85]", [1], 0.85),
        ("[Evidence: S1; Confidence high]", [1], None),
        ("[Evidence: S1; Conf: 7]", [1], None),  # of 10?
        ("[Evidence: S1-S3; Conf: .9]", [1, 2, 3], 0.9),
        ("[evidence: s1–3]", [1, 2, 3], None),
        ("[Evidence S1 to S3]", [1, 2, 3], None),
        ("[Evidence S1, S2]", [1, 2], None),
        ("[Evidence: S1; S2; Conf: 1]", [1, 2], 1.0),
        ("[Evidence: S1/S2 & S3.]", [1, 2, 3], None),
        ("[Evidence: 1, 2; Conf: 0.9]", [1, 2], 0.9),
        ("[Evidence: sentences 1 and 2]", [1, 2], None),
        ("[Sentences 1 and 2]", [1, 2], None),
        ("(Evidence: S3)", [3], None),
        ("(S1)", [1], None),
        ("[S1, S4]", [1, 4], None),
        ("Evidence: S1, S2", [1, 2], None),
        ("Evidence: S1.", [1], None),
        ("Source: S1.", [1], None),
        ("[Evidence: S1].", [1], None),
        ("【S1】", [1], None),
        ("【Evidence: S1; Conf: 0.9】", [1], 0.9),
        ("{Evidence: S1}", [1], None),
        ("<Evidence: S1, S3; Conf: 0.9>", [1, 3], 0.9),
        ("[Source: S1]", [1], None),
        ("(Source: sentences 1 and 2)", [1, 2], None),
        ("[see S1]", [1], None),
        ("[Ev: S1, 2]", [1, 2], None),
        ("[Ref S1-3]", [1, 2, 3], None),
        ("[cite: S2]", [2], None),
        ("[Cited: S2]", [2], None),
        ("[Citations: S1, S2]", [1, 2], None),
        ("[supported by S2]", [2], None),
        ("[from sentence 2]", [2], None),
        ("⟦S1⟧", [1], None),
        ("«S1»", [1], None),
        ("[[S1]]", [1], None),
        ("*[S1]*", [1], None),
        ("**[Evidence: S1; Conf: 0.9]**", [1], 0.9),
        ("[^S1]", [1], None),
        ("[S1|S2 or S3]", [1, 2, 3], None),
        ("[Evidence: S1 (Conf: 0.9)]", [1], 0.9),
        ("[Evidence: S1; Score: 0.8]", [1], 0.8),
        ("[Evidence: S1; high confidence]", [1], None),
    ],
)
def test_other_forms_are_read(citation, numbers, confidence):
    summary = f"Claim. {citation} Next claim."
    (read,) = parse_citations(summary, "One. Two. Three. Four.")
    assert (read["claim"], read["sentence_numbers"], read["confidence"]) == ("Claim.", numbers, confidence)
    assert strip_citations(summary) == "Claim. Next claim."
    assert not unreadable_citations(summary)


@pytest.mark.parametrize(
    "summary, stripped",
    [
        ("Fever. [1] Cough. [2]", "Fever. Cough."),
        ("Fever [1]. Cough [2].", "Fever. Cough."),
        ("Fever.[^1] Cough.[^2]", "Fever. Cough."),
        ("Fever and cough Evidence: S1, S2. Flu Source: S3.", "Fever and cough. Flu."),
        ("Fever 【S1】. Cough (Source: S2).", "Fever. Cough."),
        ("Fever.\nEvidence: S1.\nCough.\nEvidence: S2.", "Fever.\nCough."),
    ],
)
def test_citations_inside_sentences_and_plain_numbers(summary, stripped):
    assert cited_sentence_numbers(summary)[:2] == [1, 2]
    assert strip_citations(summary) == stripped
    spans = citation_spans(summary)
    assert len(spans) == len(parse_citations(summary, "One. Two. Three."))


@pytest.mark.parametrize(
    "citation",
    [
        "[Evidence: none]",
        "【Evidence: see above】",
        "{Evidence: S1, 2",
        "[Source: S1 (vitals)]",
        "[Evidence]",
        "[Evidence: S1 (vitals)]",
        "[Conf: 0.9]",
        "[Evidence: S1, 2, 3",
        "[evidence from S2]",
        "[as in S2]",
        "[vitals, S2]",
        "[[the note's S1]]",
    ],
)
def test_what_cannot_be_read_is_reported_and_removed(citation):
    summary = f"Claim. {citation}\nNext claim."
    start, end = unreadable_citations(summary)[0]
    assert summary[start:end] == citation
    assert strip_citations(summary) == "Claim.\nNext claim."
    assert not has_citation(summary)
    assert not parse_citations(summary, "One. Two.")


@pytest.mark.parametrize(
    "summary",
    [
        "Pain at the nerve root (S1). Heart sounds (S1, S2) normal.",
        "No evidence of pneumonia [evidence of edema] (no evidence of S1 compression).",
        "Odds ratio 2 (confidence interval 0.8-1.2) [confirmed] [1, 2].",
        "Stable (evidence: normal X-ray). No evidence: S1 is free.",
        "Evidence: S1 is compressed. Pain (S1 root) [S1 dermatome].",
        "Results [1]. As before.",
        "Disc [L5-S1] [S3 gallop] [S1, S2 normal] [patient's 3 children] [from home] (from S1 to S3).",
        "**Plan:** [none] «rest» [[x]] Pain.[^1]\n\n[^1]: a footnote",
        "Results [1].",
        "[1] Diabetes. [2] Asthma.",
        "Problems. [1] Diabetes. [2] Asthma.",
        "Tumor grade [2] of 3. Pain [3/10]. Seen [2021].",
        "tTG-IgA 96 (ref 0-7), TSH 9 [ref: 0.4-4], (reference: 4-11). [Source: patient] (see 2) [see S-line].",
        "Pulse <90 and BP >60. {1} <2> 【1】",
    ],
)
def test_clinical_text_is_no_citation(summary):
    assert not has_citation(summary)
    assert not unreadable_citations(summary)
    assert strip_citations(summary) == summary


def test_numbers_are_those_of_the_version():
    note = "The patient denies chest pain and has no\nfever. Cough."
    (old,) = parse_citations("Cough. [Evidence: S3]", note, 1)
    assert old["sentences"] == ["Cough."]
    (new,) = parse_citations("Cough. [Evidence: S2]", note, 2)
    assert new["sentences"] == ["Cough."]


@pytest.mark.parametrize(
    "text",
    [
        "[Evidence: ; Conf: 0.8]",
        "[Evidence: S1-999999999999; Conf: 1]",
        f"[Evidence: S{'9' * 5000}; Conf: 1]",
        f"[Evidence: S1; Conf: {'9' * 5000}]",
    ],
)
def test_malformed_or_absurd_citations_do_no_harm(text):
    assert all(len(citation["sentence_numbers"]) <= 2 for citation in parse_citations(text, "One. Two."))


@given(text_with_citations, text)
def test_citation_parsing_never_fails(summary, note):
    for citation in parse_citations(summary, note):
        assert len(citation["sentences"]) + len(citation["missing"]) == len(citation["sentence_numbers"])
    starts = [start for start, _ in unreadable_citations(summary)]
    assert starts == sorted(starts)
