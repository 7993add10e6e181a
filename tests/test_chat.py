"""The conversation: with a function in the place of a model, through a pipe, on a terminal."""

import io
import os
import pty
import select
import signal
import sys
import time

import pytest
from conftest import ROOT, run_inference
from tiny import NOTES

from sft.cli import RunError
from sft.inference.chat import converse, show_evidence
from sft.options import InferenceConfig

EVIDENCE = {
    "claim": "Fever.",
    "sentence_numbers": [1, 9],
    "sentences": ["Fever since Monday."],
    "missing": [9],
    "confidence": 0.85,
}


def made_up(note, max_new_tokens, temperature, *, seed, on_text):
    """A result as SFTInference.generate_summary gives it; its text is what it was called with."""
    if note == "too long":
        raise RunError("out of memory on this note", "lower --max_length")
    on_text(f"{note!r} {max_new_tokens} {temperature} {seed}")
    return {
        "evidence": [EVIDENCE] if "fever" in note else [],
        "confidence": 0.5,
        "warnings": ["made up"],
        "n_prompt_tokens": 1000,
        "n_new_tokens": 3,
    }


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed(lines): (standard output, standard error) of a conversation through a pipe."""

    def talk(*lines: str, **options) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        converse(made_up, InferenceConfig(**options))
        return capsys.readouterr()

    return talk


def test_commands_change_what_follows(typed):
    lines = ["pain", "", "/temperature 0.5", "/tokens\t7", "two", "lines", "/tokens 0", "x", "/q", "never"]
    out, err = typed(*lines, max_new_tokens=20, seed=3)
    assert out.splitlines() == ["'pain' 20 0.0 3", r"'two\nlines' 7 0.5 3", "'x' 7 0.5 3"]
    assert "error: /tokens takes a whole number from 1" in err
    assert "(1,000 prompt tokens, 3 new in" in err
    assert err.count("warning: made up") == 3


def test_a_note_that_fails_does_not_end_the_conversation(typed):
    out, err = typed("too long", "", "pain", "")
    assert "error: out of memory on this note\nfix:   lower --max_length\n" in err
    assert out.startswith("'pain'")


def test_evidence_of_the_last_summary(typed):
    _, err = typed("/evidence", "fever", "/evidence", "pain", "/evidence")
    first, second = (
        "no summary yet",
        "Fever.  (confidence the model wrote: 0.85)\n    S1: Fever since Monday.\n",
    )
    third = "the last summary cites nothing"
    assert err.index(first) < err.index(second) < err.index(third)


def test_evidence_without_a_confidence():
    text = show_evidence({"evidence": [EVIDENCE | {"confidence": None}]})
    assert text.startswith("Fever.  (confidence the model wrote: none)\n")


def test_conversation_through_a_pipe(adapters, specialist):
    # A note, no command
    slashes = "/Smith, J./ seen today.\n/temperature 38.5 since Monday\n/quitting smoking\n/q8h paracetamol."
    typed = f"{NOTES[1][0]}\n\n/tokens 5\n{NOTES[2][0]}\n/temperature hot\n{slashes}\n/help\n/quit\n"
    typed += f"{NOTES[3][0]}\n"
    result = run_inference("--model_path", adapters(), "--max_new_tokens", 20, stdin=typed)
    expected = [
        specialist.generate_summary(note, n)
        for note, n in ((NOTES[1][0], 20), (NOTES[2][0], 5), (slashes, 5))
    ]
    assert result.returncode == 0, result.stderr
    lines = [line.strip() for line in result.stdout.strip().split("\n")]
    assert lines == [one["generated_summary"] for one in expected]
    assert "/temperature takes a number from 0" in result.stderr
    assert "/evidence" in result.stderr
    assert not any(words in result.stderr for words in ("hot", "Smith", "38.5", "smoking", "q8h"))


SLOW_MOTION = """
import time
import sft_inference
from sft.inference import decoding
fast = decoding.sample
def slow(*arguments):
    time.sleep(0.05)
    return fast(*arguments)
decoding.sample = slow
sft_inference.run_script(sft_inference.main)
"""


def test_conversation_on_a_terminal(adapters):
    """Paste many lines, stream, interrupt, continue, leave; tokens in slow motion, so that there is time to
    interrupt."""
    options = f"--device cpu --model_path {adapters()} --max_new_tokens 900 --temperature 50".split()
    child, ours = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", SLOW_MOTION, *options])
    screen = ""

    def until(words: str, seconds: float = 60) -> None:
        nonlocal screen
        deadline = time.monotonic() + seconds
        while words not in screen:
            assert time.monotonic() < deadline, screen
            if select.select([ours], [], [], 0.2)[0]:
                screen += os.read(ours, 4096).decode(errors="replace")
        screen = screen.partition(words)[2]

    try:
        until("note> ")
        os.write(ours, b"Fever since Monday.\nNo cough.\n\nBP 120/80.\n")  # a paste with an empty line in it
        time.sleep(0.5)
        os.write(ours, b"\x03")
        until("(stopped)")
        until("note> ")
        os.write(ours, b"/Smith seen today\n")
        until("/Smith seen today")  # the terminal's own echo
        until("no such command; /help lists them")
        until("note> ")
        os.write(ours, b"/temperature 0\n")
        until("note> ")
        os.write(ours, b"/tokens 4\n")
        until("note> ")
        os.write(ours, f"{NOTES[1][0]}\n".encode())
        until("4 new in")
        os.write(ours, b"/quit\n")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(ours)
