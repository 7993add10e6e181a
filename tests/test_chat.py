"""The conversation: with a function in the place of a model, through a pipe, on a terminal."""

import io
import json
import os
import pty
import select
import signal
import sys
import time

import pytest
from conftest import ROOT, run_inference
from tiny import NOTES

from sft.cli import InputError, RunError, log, open_standard_streams
from sft.inference.chat import converse, print_piece, read_block, read_one_note, read_piped, show_evidence
from sft.inference.results import check_result, to_json
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
    text = f"{note!r} {max_new_tokens} {temperature} {seed}"
    (on_text or str)(text)
    return {
        "generated_summary": text,
        "evidence": [EVIDENCE] if "fever" in note else [],
        "confidence": 0.5,
        "warnings": ["made up"],
        **check_result(note, "No fever."),
        "sentences": [],
        "not_mentioned": [],
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


def test_findings_in_plain_words(typed):
    err = typed("Seen today. She has a fever and a cough.", "")[1]
    assert "check: negation: says 'fever'; the note says 'has a fever' (S2)" in err


def test_evidence_without_a_confidence():
    text = show_evidence({"evidence": [EVIDENCE | {"confidence": None}], "sentences": []})
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
    lines = result.stdout.removesuffix("\n").split("\n")
    assert lines == [one["generated_summary"] for one in expected]
    assert "/temperature takes a number from 0" in result.stderr
    assert "/evidence" in result.stderr
    assert not any(words in result.stderr for words in ("hot", "Smith", "38.5", "smoking", "q8h"))


@pytest.mark.parametrize("word", ["exit", "quit", "/exit"])
def test_words_that_leave_and_help(typed, word):
    out, err = typed("help", "", word, "", "never", "")
    assert out == ""
    assert "/evidence" in err


def test_piped_notes_as_json(typed):
    out, said = typed("too long", "", "pain /tokens", "", json=True)
    assert "Paste" not in said
    failed, done = [json.loads(line) for line in out.splitlines()]
    assert failed["error"] == "out of memory on this note"
    assert done["confidence"] == 0.5


def piped(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_nothing_but_blanks_through_a_pipe(monkeypatch, typed):
    for one_note in ("auto", "file", "line"):
        piped(monkeypatch, " \n\n")
        with pytest.raises(InputError, match="no note on standard input"):
            read_piped(one_note)
    with pytest.raises(InputError, match="no note on standard input"):
        typed(" ", "", one_note="paragraph")
    assert typed("/help")[0] == ""


def test_a_piped_letter_is_not_taken_apart(monkeypatch, capsys):
    letter = "Discharge letter.\n\nDIAGNOSES:\n\nPneumonia.\n"
    piped(monkeypatch, letter)
    with pytest.raises(InputError, match="headings stand alone"):
        read_piped("auto")
    piped(monkeypatch, letter)
    converse(made_up, InferenceConfig(), read_piped("file"))
    assert capsys.readouterr().out.startswith(repr(letter.strip()))
    piped(monkeypatch, "pain\n/tokens 5\n\nfever.\n")
    assert read_piped("auto") is None
    converse(made_up, InferenceConfig(max_new_tokens=150))
    assert capsys.readouterr().out.splitlines() == ["'pain' 150 0.0 0", "'fever.' 5 0.0 0"]
    piped(monkeypatch, "Chest pain since Monday.\n\x0cTroponin negative.\n")
    assert read_piped("auto") is None
    assert read_block("").count("\n") == 1
    for one_note in ("auto", "paragraph"):
        for end in ("\r", "\r\n"):
            piped(monkeypatch, end.join(["Chest pain.", "", "Fever.", ""]))
            assert read_piped(one_note) is None
            assert [read_block(""), read_block("")] == ["Chest pain.\n", "Fever."]


def test_a_note_in_another_encoding_is_read_as_from_a_file(monkeypatch, capsys):
    """Not with its degree sign replaced: on the command line, piped, and block by block."""
    note = "Temp 38.5 °C, given 5 µg."
    data = note.encode("latin-1")
    assert read_one_note(os.fsdecode(data)) == read_one_note(note) == note
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_one_note("-") == note
    with pytest.raises(InputError, match="--clinical_note is empty"):
        read_one_note("\u200b")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data + b"\n\nNo fever.\n")))
    open_standard_streams()
    converse(made_up, InferenceConfig(max_new_tokens=5), read_piped("paragraph"))
    assert capsys.readouterr().out.splitlines() == [f"{note!r} 5 0.0 0", "'No fever.' 5 0.0 0"]


def test_control_characters_never_reach_a_terminal(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", Screen())
    print_piece("\x1b]0;x\x07\x9b2J\u202e\rfine\n\tü")
    log("\x1b[31mred")
    log("\x1b[0mfound", is_colored=True)
    monkeypatch.setenv("NO_COLOR", "1")
    log("plain", is_colored=True)
    assert sys.stdout.getvalue() == "\ufffd]0;x\ufffd\ufffd2J\ufffd\ufffdfine\n\tü"
    assert sys.stderr.getvalue() == "\ufffd[31mred\n\x1b[33m\ufffd[0mfound\x1b[0m\nplain\n"
    assert json.loads(to_json("\x9b2J\u202e", sys.stdout)) == "\x9b2J\u202e"
    assert to_json("\x9b\u202e", sys.stdout).isascii()


ECHO = """
import time
from sft.inference.chat import converse, note_terminal
from sft.options import InferenceConfig
def summarize(note, max_new_tokens, temperature, *, seed, on_text):
    on_text(f"<{len(note)} characters, {note.count(chr(10))} line ends>")
    time.sleep(1.0 if note == "wait" else 0)
    result = {"confidence": 1, "warnings": [], "n_prompt_tokens": 1, "n_new_tokens": 1, "evidence": []}
    result |= {"sentences": [], "not_mentioned": []}
    print(" done")
    return result
with note_terminal(True):
    converse(summarize, InferenceConfig())
"""


class Terminal:
    """A program on a pseudo-terminal: what it writes is read as it is waited for."""

    def __init__(self, code: str, *options: str):
        self.child, self.ours = pty.fork()
        if self.child == 0:
            os.chdir(ROOT)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-c", code, *options])
        self.screen = ""

    def write(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, words: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.screen:
            assert time.monotonic() < deadline, self.screen
            if select.select([self.ours], [], [], 0.2)[0]:
                self.screen += os.read(self.ours, 65536).decode(errors="replace")
        self.screen = self.screen.partition(words)[2]

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error:
            os.kill(self.child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        os.close(self.ours)
        assert error or status == 0


def test_pastes_stay_whole():
    """Marked by the terminal, slow without marks, and a long line while a summary is written."""
    lines = ["CC:", "", "Right elbow pain.", "", "PLAN", "Rest."]
    note = "\n".join(lines)
    long_line = "Day 1: afebrile, BP 111/61. " * 210
    with Terminal(ECHO) as terminal:
        terminal.until("note> ")
        terminal.write(f"\x1b[200~{note}\n\x1b[201~")
        time.sleep(0.5)
        terminal.write("\n")
        terminal.until(f"<{len(note)} characters, 5 line ends>")
        terminal.until("note> ")
        for line in lines:
            terminal.write(f"{line}\n")
            time.sleep(0.12)
        terminal.until(f"<{len(note)} characters, 5 line ends>")
        terminal.until("note> ")
        terminal.write("wait")
        terminal.until("wait")  # readline's echo
        terminal.write("\n")
        terminal.until("<4 characters")
        # As a terminal writes it: as fast as it is taken
        data = f"{long_line}\n".encode()
        while data:
            data = data[os.write(terminal.ours, data[:512]) :]
        terminal.until(" done")
        terminal.until(f"<{len(long_line.strip())} characters, 0 line ends>")
        terminal.until("note> ")
        terminal.write("\x1b[A")  # the history has notes, not lines
        time.sleep(0.3)
        terminal.write("\n")
        terminal.until(f"<{len(long_line.strip())} characters, 0 line ends>")
        terminal.until("note> ")
        terminal.write("quit\n")


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
    with Terminal(SLOW_MOTION, *options) as terminal:
        terminal.until("note> ")
        terminal.write("Fever since Monday.\nNo cough.\n\nBP 120/80.\n")  # with an empty line in it
        time.sleep(1)
        terminal.write("\x03")
        terminal.until("(stopped)")
        terminal.until("note> ")
        terminal.write("/Smith seen today")
        terminal.until("/Smith seen today")  # readline's echo
        terminal.write("\n")
        terminal.until("no such command; /help lists them")
        terminal.until("note> ")
        terminal.write("/temperature 0\n")
        terminal.until("note> ")
        terminal.write("/tokens 4\n")
        terminal.until("note> ")
        terminal.write(f"{NOTES[1][0]}\n")
        terminal.until("4 new in")
        terminal.until("note> ")
        terminal.write("/quit\n")
