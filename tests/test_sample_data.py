"""The claims of phase1_data's data card, checked on the shipped files."""

import csv
import itertools
import re
import statistics

import pytest
from conftest import ROOT

from sft.data.rows import COLUMNS, leaked_rows, read_rows, repeated_rows
from sft.files import sha256
from sft.grounding import check_summary
from sft.grounding.citations import parse_citations, strip_citations
from sft.grounding.sentences import split_sentences

FOLDER = ROOT / "phase1_data" / "sft"
MIN_FACTUAL = {"train": 120, "validation": 24, "test": 40}  # rows of each split
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
MAX_SHARED_WORDING = 0.05  # of two notes' five-word sequences (Jaccard index)
# Words of a note
SHORT = (20, 60)
MEDIUM = (61, 149)
LONG = (150, 300)
HEDGES = re.compile(
    r"\b(possibl[ey]|probabl[ey]|likely|unlikely|suspect\w*|suspicious|suspicion|may|might|could|query"
    r"|uncertain|unclear|excluded|suggest\w*|provisional\w*|presumed|appears?|equivocal|indeterminate"
    r"|differential)\b",
    re.IGNORECASE,
)
STOP_WORDS = set(
    "a an the and or of in on at to for with without by from as is was are were be been had has have he she"
    " they it his her their who which that this no not after before under over".split()
)


def load(kind: str) -> dict[str, list]:
    return {split: read_rows(FOLDER / f"{split}_set_{kind}.csv") for split in MIN_FACTUAL}


PLAIN = load("processed")
EVIDENCE = load("evidence")
FACTUAL = [row for rows in PLAIN.values() for row in rows if row.label == "factual"]


def test_datasets_reads_the_same_rows(tmp_path):
    """With the options of the guide: else an empty cell and "NA" are None, and an id of digits a number."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features({name: datasets.Value("string") for name in COLUMNS})
    for path in sorted(FOLDER.glob("*.csv")):
        loaded = datasets.load_dataset(
            "csv", data_files=str(path), split="train", keep_default_na=False, features=features,
            cache_dir=str(tmp_path),
        )  # fmt: skip
        expected = [
            (row.id, row.clinical_note, row.model_summary, row.label, row.hallucination_type)
            for row in read_rows(path)
        ]
        assert [tuple(row[name] for name in COLUMNS) for row in loaded] == expected


def test_columns_ids_and_checksums():
    for path in FOLDER.glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            assert tuple(next(csv.reader(file))) == COLUMNS
    ids = [row.id for rows in PLAIN.values() for row in rows]
    assert len(set(ids)) == len(ids)
    listed = dict(reversed(line.split()) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    assert listed == {path.name: sha256(path) for path in FOLDER.glob("*.csv")}


@pytest.mark.parametrize("split", MIN_FACTUAL)
def test_counts_and_pairs(split):
    rows = PLAIN[split]
    factual = {row.id: row for row in rows if row.label == "factual"}
    hallucinated = [row for row in rows if row.label == "hallucinated"]
    assert len(factual) >= MIN_FACTUAL[split]
    assert len(hallucinated) >= len(factual) / 2
    assert all(not row.hallucination_type for row in factual.values())
    for row in hallucinated:
        twin = factual[row.id.removesuffix("-h")]
        assert row.hallucination_type in TYPES
        assert row.clinical_note == twin.clinical_note
        right = split_sentences(twin.model_summary)
        wrong = split_sentences(row.model_summary)
        assert len(right) == len(wrong), row.id
        n_different = sum(a != b for a, b in zip(right, wrong))
        assert n_different == 1, row.id
    assert not repeated_rows(rows)


def test_every_type_of_error_occurs():
    rows = itertools.chain.from_iterable(PLAIN.values())
    assert {row.hallucination_type for row in rows if row.label == "hallucinated"} == TYPES


def test_no_note_is_in_two_splits():
    for one, other in itertools.combinations(PLAIN, 2):
        assert not leaked_rows(PLAIN[one], PLAIN[other])


def test_notes_hold_the_numbers_of_their_factual_summaries():
    for row in FACTUAL:
        found = check_summary(row.clinical_note, row.model_summary).findings
        assert not [finding for finding in found if finding.kind == "number"], row.id


def test_notes_share_little_wording():
    def shingles(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    sets = [shingles(row.clinical_note) for row in FACTUAL]
    highest = max(len(a & b) / max(1, len(a | b)) for a, b in itertools.combinations(sets, 2))
    assert highest <= MAX_SHARED_WORDING


def test_lengths_as_claimed():
    for split in MIN_FACTUAL:
        words = [len(row.clinical_note.split()) for row in PLAIN[split] if row.label == "factual"]
        assert min(words) >= 20
        assert max(words) <= 300
        for low, high in (SHORT, MEDIUM, LONG):
            share = sum(low <= n <= high for n in words) / len(words)
            assert 0.25 <= share <= 0.45, (split, low)


def test_summaries_grow_with_their_notes():
    def sentence_counts(low: int, high: int) -> list[int]:
        rows = [row for row in FACTUAL if low <= len(row.clinical_note.split()) <= high]
        return [len(split_sentences(row.model_summary)) for row in rows]

    assert statistics.mean(n == 1 for n in sentence_counts(*SHORT)) > 0.9
    assert all(2 <= n <= 5 for n in sentence_counts(*LONG))


def confidence_by_the_rule(claim: str, cited: list[str]) -> float:
    """The data card's rule for Conf."""
    if len(cited) == 1:
        claimed = content_words(claim)
        shared = claimed & content_words(cited[0])
        confidence = 0.95 if len(shared) >= 0.8 * len(claimed) else 0.90
    else:
        confidence = 0.85 if len(cited) <= 3 else 0.80
    return confidence - 0.10 * bool(HEDGES.search(claim))


def content_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+(?:\.[0-9]+)?", text.lower())) - STOP_WORDS


@pytest.mark.parametrize("split", MIN_FACTUAL)
def test_evidence_files_are_the_same_rows_with_citations(split):
    for plain, cited in zip(PLAIN[split], EVIDENCE[split], strict=True):
        for field in ("id", "clinical_note", "label", "hallucination_type"):
            assert getattr(plain, field) == getattr(cited, field)
        assert strip_citations(cited.model_summary) == plain.model_summary
        citations = parse_citations(cited.model_summary, cited.clinical_note)
        assert [citation["claim"] for citation in citations] == split_sentences(plain.model_summary)
        # Written for the sentences of version 1, which are those of the newest
        assert citations == parse_citations(cited.model_summary, cited.clinical_note, 1)
        for citation in citations:
            assert citation["sentences"], cited.id
            assert not citation["missing"], cited.id
            if cited.label == "factual":
                expected = confidence_by_the_rule(citation["claim"], citation["sentences"])
                assert citation["confidence"] == pytest.approx(expected), cited.id
