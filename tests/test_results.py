"""What a result says about its summary, and text while it is written."""

import csv
import io
from types import SimpleNamespace

import pytest
from tiny import tiny_tokenizer

from sft.grounding.citations import parse_citations
from sft.grounding.sentences import split_sentences
from sft.inference.results import (
    check_result,
    csv_row,
    defuse,
    describe_finding,
    failure,
    kinds_of,
    make_result,
    note_problem,
    summary_warnings,
    text_stream,
)


def test_warnings_name_what_is_wrong_with_a_summary():
    def warnings_of(summary, note):
        return summary_warnings(summary, parse_citations(summary, note))

    warnings = warnings_of("BP 120/80. BP 120/80. [Evidence: S7; Conf: 0.9]", "BP 110/70.")
    assert warnings == [
        "the summary repeats itself",
        "cites sentences that are not in the note: S7",
    ]
    assert warnings_of("Fever. [Evidence: none]", "Fever.") == ["1 citation cannot be read"]
    assert warnings_of("", "BP 110/70.") == ["the model wrote nothing"]
    assert warnings_of("BP 110/70. [Evidence: S1; Conf: 0.9]", "BP 110/70.") == []


def test_warnings_of_prompt_ending_and_text_come_in_this_order():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("BP 120/70. BP 120/70. Pulse", add_special_tokens=False).input_ids
    values = {"prompt": [1] * 5, "ids": ids, "log_probs": [-1.0] * len(ids), "finish_reason": "length"}
    result = make_result("BP 110/70.", SimpleNamespace(**values), tokenizer, ["note shortened: x"])
    assert [warning.split()[0] for warning in result["warnings"]] == ["note", "summary", "the"]
    assert f"cut after {len(ids)} tokens" in result["warnings"][1]
    assert result["confidence"] == pytest.approx(0.3679)
    assert result["n_prompt_tokens"] == 5


def test_what_the_check_found():
    note = "The left hip is fine. The right knee hurts on stairs."
    found = check_result(note, "The left knee hurts on stairs.")
    (finding,) = found["findings"]
    assert describe_finding(finding) == "says 'left knee'; the note says 'right knee' (S2)"
    assert (found["n_findings"], found["support"][0][0]) == ({"side": 1}, 2)
    assert found["check_risk"] > 0
    assert found["check_score"] < 1
    assert list(kinds_of(found)) == ["done", "flagged", "the check found: side"]
    (finding,) = check_result(note, "Hematuria, jaundice, cirrhosis, gallstones, melena, seizures.")[
        "findings"
    ]
    assert describe_finding(finding).startswith("not in the note: 'Hematuria")
    assert failure("x").keys() >= found.keys()


def test_support_has_the_sentence_numbers_of_the_adapter():
    note = "Seen today for pain that has been there for\nweeks. The left hip is fine. The right knee hurts."
    numbers = [check_result(note, "The right knee hurts.", version)["support"][0][0] for version in (1, 2)]
    sentences = [split_sentences(note, version)[number - 1] for version, number in zip((1, 2), numbers)]
    assert numbers[0] != numbers[1]
    assert all("right knee" in sentence for sentence in sentences)


def test_in_another_language_nothing_is_checked():
    note = "Der Patient klagt über Schmerzen in der linken Schulter und nimmt Ibuprofen. Er hat kein Fieber."
    found = check_result(note, "Der Patient hat Schmerzen in der rechten Schulter.")
    assert (found["check_score"], found["check_risk"], found["findings"]) == (None, None, [])


@pytest.mark.parametrize("writing", ["quote", "free"])
def test_what_was_not_checked_is_named_however_it_was_written(specialist, writing):
    notes = [
        "Der Patient klagt über Schmerzen in der Schulter und hat kein Fieber.",
        "Fever and cough today.",
    ]
    for result in specialist.generate_batch(notes, 8, writing=writing):
        is_named = any(warning.startswith("not checked against the note") for warning in result["warnings"])
        assert is_named == (result["check_score"] is None)


@pytest.mark.parametrize(
    "note, problem",
    [(" \x00", "empty"), ("<p>&nbsp;&#8203;</p><br>", "empty"), (None, "not text"), ("x", "")],
)
def test_notes_without_text(note, problem):
    found = note_problem(note)
    assert problem in found
    assert bool(found) == bool(problem)


def test_text_waits_for_whole_characters_and_is_never_repeated():
    """Sequences that take turns; one of them is written again from its start, as after running out of
    memory."""
    tokenizer = tiny_tokenizer()
    texts = ["Fi\u00e8vre \U0001f600", "Toux."]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    pieces = {0: [], 1: []}
    on_token = text_stream(tokenizer, [4], lambda number, text: pieces[number].append(text))
    for n in range(1, len(ids[0]) + 1):
        on_token(SimpleNamespace(index=0, ids=ids[0][:n], finish_reason=""))
        on_token(SimpleNamespace(index=1, ids=ids[1][: 1 + n % len(ids[1])], finish_reason=""))
    on_token(SimpleNamespace(index=1, ids=[*ids[1], 4], finish_reason="stop"))
    assert ["".join(pieces[number]) for number in (0, 1)] == texts
    assert not any("\ufffd" in piece for piece in pieces[0])
    on_token(SimpleNamespace(index=0, ids=[*ids[0], ids[0][-1]], finish_reason="length"))
    assert "".join(pieces[0]).endswith("\ufffd")


def test_a_text_that_is_hardly_a_note_is_named(specialist):
    texts = [
        r"{\rtf1\ansi Fever and cough since Monday.}",
        "<p>Fever and cough.</p>",
        "Fever and cough today.",
    ]
    warnings = [" ".join(result["warnings"]) for result in specialist.generate_batch(texts, 3)]
    assert "looks like RTF" in warnings[0]
    assert "the note was HTML: its tags are left out" in warnings[1]
    assert "looks like" not in warnings[2]


def test_a_line_end_in_a_cell_does_not_end_its_row():
    for separator in ",;":
        row = csv_row(["a\rb", "c\nd", "e\r\n", 5], separator)
        assert row.endswith("5\n")
        assert list(csv.reader(io.StringIO(row, newline=""), delimiter=separator)) == [
            ["a\rb", "c\nd", "e\r\n", "5"]
        ]


def test_spreadsheet_formulas_are_defused():
    cells = "=1+1|+1+1|-1e5x|-1+2|@x|\uff1d1|\uff0b1+1|\uff0d1+1|\uff20x|\u200b=1| \ufeff-x|\tx".split("|")
    assert [defuse(cell) for cell in cells] == [f"'{cell}" for cell in cells]
    harmless = ["fine", "", -1.5, "-7", "-7.5", "+5", "-1e5", "+1,5E-3", "a=b", None]
    assert [defuse(cell) for cell in harmless] == harmless
