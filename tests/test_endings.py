"""Loops are found, what is kept of a text ends well, and what does not repeat itself is left alone."""

import re
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from sft.data.rows import read_rows
from sft.inference.endings import ended_text, number_ids, repeated_from, without_fragment

PHASE1 = ROOT / "phase1_data" / "sft" / "train_set_evidence.csv"
words = st.integers(100, 200)


class Words:
    """A tokenizer whose tokens are words, signs and white space, and digits."""

    def __init__(self):
        self.tokens = [str(digit) for digit in range(10)]

    def encode(self, text: str) -> list[int]:
        found = re.findall(r"\d|[^\W\d]+|\W", text)
        self.tokens += dict.fromkeys(token for token in found if token not in self.tokens)
        return [self.tokens.index(token) for token in found]

    def decode(self, ids) -> str:
        return "".join(self.tokens[token] for token in ids)


def written(text: str) -> tuple[str, str]:
    """(finish reason, what is kept) of a text that is written token by token, and cut at its end."""
    tokenizer = Words()
    ids = tokenizer.encode(text)
    for n in range(1, len(ids) + 1):
        n_kept = repeated_from(ids[:n], set(range(10)))
        if n_kept is not None:
            sequence = SimpleNamespace(ids=ids[:n], n_kept=n_kept, finish_reason="loop")
            kept, (warning,) = ended_text(sequence, tokenizer.decode)
            assert "repeated itself" in warning
            return "loop", kept
    return "length", ended_text(SimpleNamespace(ids=ids, finish_reason="length"), tokenizer.decode)[0]


@pytest.mark.parametrize(
    "text, kept",
    [
        ("Seen today. " + "He is well. " * 20, "Seen today. He is well."),
        ("Fever. He has had a cough since May, and is well.\n\n" * 3, "Fever. He has had a cough since May, and is well."),
        ("A. " + "He has pain. She has none. " * 9, "A. He has pain. She has none."),
        ("Well. Neck: " + "no nodes, " * 20, "Well. Neck: no nodes"),
        ("Well. No mass, no big nodes" + ", no nodes" * 20, "Well. No mass, no big nodes, no nodes"),
        ("No nodes; " * 20, "No nodes"),
        ("Well. He has a lot of " + "a lot of " * 20, "Well."),
        ("Fever. [Evidence: S1; Conf: 0.9] " * 9, "Fever. [Evidence: S1; Conf: 0.9]"),
        ("Fever. [Evidence: S1" + ",1" * 40, "Fever."),
        ("Fever. [Evidence: S" + ",".join(map(str, range(1, 120))), "Fever."),
        ("Plan. " + "".join(f"{n}. Rest at home. " for n in range(1, 50)), "Plan. 1. Rest at home."),
    ],
)  # fmt: skip
def test_a_loop_is_stopped_and_its_first_time_kept(text, kept):
    assert written(text) == ("loop", kept)


@pytest.mark.parametrize(
    "text",
    [
        "No fever. No cough. No rash. No pain. No nausea. No vomiting. No chills. No edema. No bleeding.",
        "".join(f"{dose} mg daily for 7 days, then " for dose in (60, 50, 40, 30, 20, 15, 10, 5, 2))
        + "stop.",
        "BP " + ", ".join(f"{120 + n}/{80 - n}" for n in range(15)) + ".",
        "".join(f"Day {day}: 5 mg in the morning.\n" for day in range(1, 7)),
        "Very, very, very, very, very sick. " + "-" * 12 + " Okay. Okay. Okay. Bye bye bye.",
        "Ulcers on his left abdomen, then on his left abdomen, then on his right abdomen.",
    ],
)
def test_lists_and_readings_are_no_loops(text):
    assert written(text)[0] == "length"


def test_what_people_wrote_is_no_loop():
    assert not [row.id for row in read_rows(PHASE1) if written(row.model_summary)[0] == "loop"]


@given(st.lists(words, unique=True, max_size=60), st.lists(words, min_size=1, max_size=6))
def test_what_is_not_repeated_is_never_stopped(different, same):
    """Words of which none comes twice, alone and each with the same words around it."""
    listed = [token for word in different for token in (*same, word + 1000)]
    for ids in (different, listed):
        assert all(repeated_from(ids[:n], {5}) is None for n in range(len(ids) + 1))


@given(st.lists(words, max_size=20), st.lists(words, min_size=1, max_size=30))
def test_what_is_repeated_is_found_within_four_times_and_some_tokens(before, unit):
    ids = before + unit * (3 + 20 // len(unit))
    ends = [n for n in range(len(ids) + 1) if repeated_from(ids[:n]) is not None]
    n_kept = repeated_from(ids[: ends[0]])
    assert n_kept <= len(before) + len(unit)
    assert ids[n_kept : ends[0]] == ids[n_kept:][: ends[0] - n_kept]


@pytest.mark.parametrize(
    "text, kept",
    [
        ("Fever. He was given", "Fever."),
        ("Fever. He was seen.", "Fever. He was seen."),
        ("Fever. He was seen by Dr.", "Fever."),
        ("Fever. Potassium was 6.", "Fever."),  # .5?
        ("Fever. Cough. [Evidence: S1", "Fever. Cough."),
        ("Fever. [Evidence: S1; Conf: 0.9] Cou", "Fever. [Evidence: S1; Conf: 0.9]"),
        ("Fever [Evidence: S1; Conf: 0.9] and cough [Evidence: S2; Conf: 0.", "Fever [Evidence: S1; Conf: 0.9]"),
        ("Fever. Cough 【S", "Fever."),
        ("Fever.\nPlan:\n- Aspi", "Fever."),
        ("Plan:\n- Aspirin 75 mg\n- Ome", "Plan:\n- Aspirin 75 mg"),
        ("1. Asthma\n2.", "1. Asthma"),
        ("He was given", "He was given"),
        ("Fever (38", "Fever"),
        ("Fi\u00e8vre\ufffd", "Fi\u00e8vre"),
        ("", ""),
    ],
)  # fmt: skip
def test_at_the_limit_the_unfinished_sentence_is_dropped(text, kept):
    assert without_fragment(text) == kept


def test_the_warning_says_whether_something_was_dropped():
    tokenizer = Words()
    for text, dropped in (("Fever. He was", True), ("Fever. Cough.", False), ("He was", False)):
        sequence = SimpleNamespace(ids=tokenizer.encode(text), finish_reason="length")
        kept, (warning,) = ended_text(sequence, tokenizer.decode)
        assert warning.startswith(f"summary cut after {len(sequence.ids)} tokens: ")
        assert ("unfinished sentence was dropped" in warning) == dropped == (kept != text)


@given(st.text(st.sampled_from("aB1.?! \n:,[]()ES\ufffd"), max_size=80))
def test_what_is_kept_is_the_beginning(text):
    kept = without_fragment(text)
    assert text.startswith(kept)
    # Without what came after it, "38." may have been about to be 38.5
    is_open = not re.search(r"[.!?\n]", kept) or re.search(r"\d\.\Z", kept)
    assert is_open or without_fragment(f"{kept}\n") == kept


def test_numbers_are_known_in_any_vocabulary():
    tokenizer = tiny_tokenizer()
    numbers = number_ids(tokenizer)
    digits = tokenizer("0 12", add_special_tokens=False).input_ids
    assert numbers & set(digits)
    assert all(tokenizer.decode([token]).strip().isdecimal() for token in numbers)
