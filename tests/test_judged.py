"""The judged summaries: their format, the claims of their card, and what the figures count."""

import re
import sys
from collections import defaultdict

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from judged_set import (
    FOLDER,
    NOTES,
    Sentence,
    Summary,
    half,
    is_copy,
    measure,
    read_notes,
    read_set,
    threshold_at,
    wilson,
)

SETS = {name: read_set(FOLDER / f"{name}.jsonl") for name in ("phase1", "mts_dialog")}
RECORDS = [record for records in SETS.values() for record in records]
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
KINDS = set(re.findall(r"^\| `([a-z]+)` ", CARD, re.MULTILINE))


def test_the_verdicts_agree_with_the_marks():
    assert len({record["id"] for record in RECORDS}) == len(RECORDS)
    for record in RECORDS:
        marks = record["wrong"]
        assert {mark["kind"] for mark in marks} <= KINDS, record["id"]
        assert record["dangerous"] == any(mark["dangerous"] for mark in marks), record["id"]
        if record["usable"]:
            assert record["finding_and_plan"] and not marks and not record["cut_off"], record["id"]


def test_spans_lie_in_sentences_in_order():
    for record in RECORDS:
        ends = [position for sentence in record["sentences"] for position in sentence]
        assert ends == sorted(ends), record["id"]
        for mark in record["wrong"]:
            assert 0 <= mark["start"] < mark["end"] <= ends[-1], record["id"]
            assert any(start <= mark["start"] < end for start, end in record["sentences"]), record["id"]


def test_quotes_are_the_marked_spans_of_notes_that_no_test_is_made_from():
    notes = read_notes(NOTES)
    for record in SETS["phase1"]:
        assert record["note"] in notes
        for mark in record["wrong"]:
            assert record["summary"][mark["start"] : mark["end"]] == mark["text"], record["id"]


def test_size_and_halves():
    notes = read_notes(NOTES)
    phase1 = SETS["phase1"]
    rewritten = [
        (record["id"], start)
        for record in phase1
        for start, end in record["sentences"]
        if not is_copy(record["summary"][start:end], notes[record["note"]][2])
    ]
    assert len(phase1) >= 150
    assert len(rewritten) >= 300
    n_build = sum(half(record["note"]) == "build" for record in phase1)
    assert 0.4 <= n_build / len(phase1) <= 0.6


def test_no_text_of_the_dialogues_is_kept():
    assert len(SETS["mts_dialog"]) == 40
    for record in SETS["mts_dialog"]:
        assert record["note"].startswith("mts-train-")
        assert re.fullmatch(r"[0-9a-f]{64}", record["sha256"])
        assert "summary" not in record
        assert all("text" not in mark for mark in record["wrong"])


@pytest.mark.parametrize(("name", "title"), [("phase1", "phase1 notes"), ("mts_dialog", "MTS-Dialog")])
def test_the_card_counts_what_is_there(name, title):
    """Its tables: summaries, those with a wrong statement, dangerous and usable ones of each system."""
    table = CARD.partition(f"### {title}")[2].partition("###")[0]
    claimed = dict(re.findall(r"^\| (\S+, .+?) \| (.+) \|$", table, re.MULTILINE))
    groups = defaultdict(list)
    for record in SETS[name]:
        temperature = f"sampled at {record['temperature']}" if record["temperature"] else "greedy"
        groups[f"{record['system']}, {temperature}"].append(record)
    assert set(groups) == set(claimed)
    for system, records in groups.items():
        counts = [int(cell) for cell in claimed[system].split(" | ")]
        found = [
            len(records),
            *(sum(bool(one[key]) for one in records) for key in ("wrong", "dangerous", "usable")),
        ]
        assert [counts[0], *counts[4:6], counts[7]] == found, system


NOTE = "Left knee pain since Monday. Takes ibuprofen. No fever."
SUMMARY = "Right knee pain since Monday. Takes ibuprofen. 2. Right knee pain since Monday. No cough seen."
RECORD = {
    "summary": SUMMARY,
    "sentences": [[0, 29], [30, 46], [47, 79], [80, 94]],
    "wrong": [{"start": 0, "end": 10, "kind": "side"}, {"start": 50, "end": 60, "kind": "side"}],
}


def test_a_sentence_said_again_counts_once():
    measured = measure(RECORD, NOTE)
    assert [one.is_wrong for one in measured.sentences] == [True, False, False]
    assert [one.is_copy for one in measured.sentences] == [False, True, False]
    assert len(measured.marks) == 1


def test_the_threshold_flags_no_more_than_its_share():
    sentences = [Sentence(risk, 0, False, False) for risk in (0.0, 1.0, 1.0, 2.0)]
    notes = [[Summary(4.0, 0, False, sentences, [])]]
    flagged = {
        share: sum(one.risk >= threshold_at(notes, share) for one in sentences) for share in (0.2, 0.3, 0.8)
    }
    assert flagged == {0.2: 0, 0.3: 1, 0.8: 3}


def test_an_interval_contains_the_share_and_stays_within_bounds():
    for n_hits, n in ((0, 5), (5, 5), (3, 10)):
        low, high = wilson(n_hits, n)
        assert -1e-9 <= low <= n_hits / n <= high <= 1 + 1e-9
