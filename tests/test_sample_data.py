"""What the data card of phase1_data says, checked on the shipped files."""

import csv
import hashlib
import itertools
import re
import statistics

import pytest
from conftest import ROOT

from sft.data.rows import COLUMNS, leaked_rows, read_rows, repeated_rows
from sft.grounding.citations import parse_citations, strip_citations
from sft.grounding.numbers import unsupported_numbers
from sft.grounding.sentences import split_sentences

FOLDER = ROOT / "phase1_data" / "sft"
SPLITS = {"train": 120, "validation": 24, "test": 40}  # the least number of factual rows
TYPES = {
    "fabricated_finding",
    "wrong_number",
    "negation_flip",
    "wrong_laterality",
    "wrong_time",
    "wrong_person",
    "unsupported_diagnosis",
    "omitted_qualifier",
}
MOST_SHARED_WORDING = 0.05  # of two notes' five-word sequences (Jaccard)
HEDGES = re.compile(
    r"\b(possibl[ey]|probabl[ey]|likely|unlikely|suspect\w*|suspicious|suspicion|may|might|could|query|uncertain|unclear|excluded"
    r"|suggest\w*|provisional\w*|presumed|appears?|equivocal|indeterminate|differential)\b",
    re.IGNORECASE,
)
STOP_WORDS = set(
    "a an the and or of in on at to for with without by from as is was are were be been had has have he she they it his her their who "
    "which that this no not after before under over".split()
)


def load(kind: str) -> dict[str, list]:
    return {split: read_rows(FOLDER / f"{split}_set_{kind}.csv") for split in SPLITS}


PLAIN, EVIDENCE = load("processed"), load("evidence")
FACTUAL = [row for rows in PLAIN.values() for row in rows if row.label == "factual"]


def test_columns_ids_and_sums():
    for path in FOLDER.glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            assert tuple(next(csv.reader(file))) == COLUMNS
    ids = [row.id for rows in PLAIN.values() for row in rows]
    assert len(set(ids)) == len(ids)
    sums = dict(reversed(line.split()) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("*.csv")}


@pytest.mark.parametrize("split", SPLITS)
def test_counts_and_pairs(split):
    rows = PLAIN[split]
    factual = {row.id: row for row in rows if row.label == "factual"}
    hallucinated = [row for row in rows if row.label == "hallucinated"]
    assert len(factual) >= SPLITS[split] and len(hallucinated) >= len(factual) / 2
    assert all(not row.hallucination_type for row in factual.values())
    for row in hallucinated:
        twin = factual[row.id.removesuffix("-h")]
        assert row.hallucination_type in TYPES and row.clinical_note == twin.clinical_note
        right, wrong = split_sentences(twin.model_summary), split_sentences(row.model_summary)
        assert len(right) == len(wrong) and sum(a != b for a, b in zip(right, wrong)) == 1, (
            row.id
        )  # one sentence differs
    assert not repeated_rows(rows)


def test_every_type_of_error_is_there():
    assert {
        row.hallucination_type for rows in PLAIN.values() for row in rows if row.label == "hallucinated"
    } == TYPES


def test_no_note_stands_in_two_splits():
    for one, other in itertools.combinations(PLAIN, 2):
        assert not leaked_rows(PLAIN[one], PLAIN[other])


def test_numbers_of_factual_summaries_stand_in_their_notes():
    assert {
        row.id: unsupported_numbers(row.model_summary, row.clinical_note)
        for row in FACTUAL
        if unsupported_numbers(row.model_summary, row.clinical_note)
    } == {}


def test_notes_share_little_wording():
    def shingles(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    sets = [shingles(row.clinical_note) for row in FACTUAL]
    most = max(len(a & b) / max(1, len(a | b)) for a, b in itertools.combinations(sets, 2))
    assert most <= MOST_SHARED_WORDING


def test_lengths_as_claimed():
    for split in SPLITS:
        words = [len(row.clinical_note.split()) for row in PLAIN[split] if row.label == "factual"]
        assert min(words) >= 20 and max(words) <= 300
        shares = [
            sum(low <= n <= high for n in words) / len(words)
            for low, high in ((20, 60), (61, 149), (150, 300))
        ]
        assert all(0.25 <= share <= 0.45 for share in shares), (split, shares)
    by_length = {"short": (20, 60), "long": (150, 300)}
    sentences = {
        name: [
            len(split_sentences(row.model_summary))
            for row in FACTUAL
            if low <= len(row.clinical_note.split()) <= high
        ]
        for name, (low, high) in by_length.items()
    }
    assert statistics.mean(n == 1 for n in sentences["short"]) > 0.9 and all(
        2 <= n <= 5 for n in sentences["long"]
    )


def confidence_by_the_rule(claim: str, cited: list[str]) -> float:
    """The data card's rule for Conf."""
    words = [
        set(re.findall(r"[a-z0-9]+(?:\.[0-9]+)?", text.lower())) - STOP_WORDS for text in (claim, cited[0])
    ]
    if len(cited) == 1:
        confidence = 0.95 if len(words[0] & words[1]) >= 0.8 * len(words[0]) else 0.90
    else:
        confidence = 0.85 if len(cited) <= 3 else 0.80
    return confidence - 0.10 * bool(HEDGES.search(claim))


@pytest.mark.parametrize("split", SPLITS)
def test_evidence_files_are_the_same_rows_with_citations(split):
    for plain, cited in zip(PLAIN[split], EVIDENCE[split], strict=True):
        assert (plain.id, plain.clinical_note, plain.label, plain.hallucination_type) == (
            cited.id,
            cited.clinical_note,
            cited.label,
            cited.hallucination_type,
        )
        assert strip_citations(cited.model_summary) == plain.model_summary
        citations = parse_citations(cited.model_summary, cited.clinical_note)
        assert [citation["claim"] for citation in citations] == split_sentences(plain.model_summary)
        for citation in citations:
            assert citation["sentences"] and not citation["missing"], cited.id
            if cited.label == "factual":
                assert citation["confidence"] == pytest.approx(
                    confidence_by_the_rule(citation["claim"], citation["sentences"])
                ), cited.id
