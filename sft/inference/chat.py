"""The conversation on a terminal or through a pipe: notes and commands in, summaries out. Knows a function
that summarizes, no model. What is typed stays in memory: it is patients' text."""

import argparse
import io
import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from sft.cli import InputError, RunError, is_terminal, log, plural, visible
from sft.data.text import decode_bytes, is_blank
from sft.inference.notes import split_text
from sft.inference.results import describe_finding, failure, note_problem, to_json
from sft.inference.writing import NoteWords
from sft.options import InferenceConfig, number

HELP = """\
Type or paste a note and press Enter. A pasted note may span several lines.
When typing, end every line except the last with \\.
  /temperature T   0 = greedy, above 0 = sampling (now {temperature:g})
  /tokens N        longest summary, in tokens (now {max_new_tokens})
  /evidence        the note's sentences that the last summary cites or is made of
  /help            this help
  /quit            leave (also Ctrl-D). Ctrl-C stops a summary that is being written."""

# Any other line is patients' text: never repeated in a message
COMMAND = re.compile(r"/((temperature|tokens)(\s+\S+)?|evidence|help|quit|exit|q)\s*")
VALUES = {"/temperature": "a number from 0", "/tokens": "a whole number from 1"}

NO_NOTE = ("no note on standard input", "pipe a note with text")
PASTE_PAUSE = 0.4  # seconds without a further line after which a paste without marks is over


@contextmanager
def note_terminal(is_wanted: bool) -> Iterator[None]:
    """Inside, a terminal keeps what is typed and pasted for GNU readline, whole and without showing it: its
    own line mode drops what is beyond 4,095 characters of a line."""
    try:
        import readline
        import termios
    except ImportError:  # Windows
        is_wanted = False
    if not (is_wanted and is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        yield
        return
    for setting in ("enable-bracketed-paste on", "input-meta on", "output-meta on", "convert-meta off"):
        readline.parse_and_bind(f"set {setting}")
    readline.parse_and_bind("tab: self-insert")
    readline.set_auto_history(False)
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    mode = termios.tcgetattr(terminal)
    # Its echo stays on: readline shows nothing where it finds it off
    mode[3] &= ~termios.ICANON
    mode[6][termios.VMIN] = 1
    mode[6][termios.VTIME] = 0
    termios.tcsetattr(terminal, termios.TCSANOW, mode)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
        if marks_pastes():
            print("\x1b[?2004l", end="", flush=True)


def marks_pastes() -> bool:
    """Whether readline reads the marks that a terminal puts around a paste."""
    import readline

    return "libedit" not in (readline.__doc__ or "") and os.environ.get("TERM", "dumb") != "dumb"


def read_one_note(typed: str) -> str:
    """The note of --clinical_note, or of standard input for "-", whatever its encoding. Raises InputError if
    it is empty."""
    name = "standard input" if typed == "-" else "--clinical_note"
    # Python keeps bytes that are no UTF-8 as surrogates
    note = decode_bytes(sys.stdin.buffer.read() if typed == "-" else os.fsencode(typed), name)
    if note_problem(note):
        raise InputError("--clinical_note is empty", "pass a note with text")
    return note


def read_piped(one_note: str) -> list[str] | None:
    """The notes that are piped in, or None to read them block by block as they arrive. Raises InputError if
    there is none, or they look like parts of notes."""
    if one_note == "paragraph":
        # Else "\r" ends no line
        with suppress(AttributeError):
            sys.stdin.reconfigure(newline=None)
        return None
    text = decode_bytes(sys.stdin.buffer.read(), "standard input")
    if is_blank(text):
        raise InputError(*NO_NOTE)
    if one_note != "auto":
        return [note for _, note in split_text("standard input", text, one_note, "paragraph")]
    # input() ends a line at "\n" alone
    text = re.sub(r"\r\n?", "\n", text)
    lines = ["" if COMMAND.fullmatch(line) else line for line in text.split("\n")]
    split_text("standard input", "\n".join(lines), "auto", "paragraph")
    sys.stdin = io.StringIO(text)
    return None


def read_block(prompt: str) -> str:
    """One note or command from standard input. Raises EOFError at its end.

    On a terminal, Enter ends it unless more lines arrive or the line ends in a backslash; a paste that the
    terminal marks is one line to readline. Piped, an empty line or a command ends it."""
    if not is_terminal(sys.stdin):
        lines = [input("")]
        with suppress(EOFError):
            while lines[-1].strip() and not COMMAND.fullmatch(lines[-1]):
                lines.append(input(""))
        return decode_bytes("\n".join(lines).encode(errors="surrogateescape"), "standard input")
    lines = [input(prompt)]
    with suppress(EOFError):
        while lines[-1].endswith("\\") or (not COMMAND.fullmatch(lines[0]) and _more_lines_wait()):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(input(""))
    block = "\n".join(lines)
    with suppress(ImportError):
        import readline

        if block.strip():
            readline.add_history(block)
        # readline turns the marks off when it has a line; a paste may come while a summary is written
        if is_terminal(sys.stdout) and marks_pastes():
            print("\x1b[?2004h", end="", flush=True)
    return block


def _more_lines_wait() -> bool:
    import select

    with suppress(OSError):  # Windows has it for sockets only
        return bool(select.select([sys.stdin], [], [], PASTE_PAUSE)[0])
    return False


def converse(
    summarize: Callable[..., dict], config: InferenceConfig, piped: Sequence[str] | None = None
) -> None:
    """The interactive session. `summarize(note, max_new_tokens, temperature, seed=..., on_text=...)` returns
    a result as SFTInference.generate_summary does. `piped`: notes that have been read already. Raises
    InputError if nothing comes through a pipe."""
    config = replace(config)
    for note in piped or ():
        _summarize_aloud(summarize, note.strip(), config)
    if piped is not None:
        return
    last_result = None
    on_screen = is_terminal(sys.stdin)
    is_empty = not on_screen
    if on_screen:
        log("Paste a clinical note and press Enter. /help for help, /quit to leave.")
    while True:
        try:
            block = read_block("note> ").strip()
        except EOFError:
            if is_empty:
                raise InputError(*NO_NOTE) from None
            return log()
        except KeyboardInterrupt:
            log("\n(/quit or Ctrl-D leaves)")
            continue
        is_empty = is_empty and not block
        if block.lower() in ("exit", "quit", "help"):
            block = f"/{block.lower()}"
        if on_screen and re.fullmatch(r"/.*", block) and not COMMAND.fullmatch(block):
            log("no such command; /help lists them")
            continue
        # A command is the last line
        note, _, command = block.rpartition("\n")
        if not COMMAND.fullmatch(command):
            note, command = block, ""
        if note.strip():
            last_result = _summarize_aloud(summarize, note.strip(), config) or last_result
        if command and _obey(*command.split(), config=config, last_result=last_result):
            return


def _obey(word: str, value: str = "", *, config: InferenceConfig, last_result: dict | None) -> bool:
    """Does what a command says, and changes `config` by it; whether it ends the conversation."""
    if word in ("/quit", "/exit", "/q"):
        return True
    try:
        if word == "/temperature":
            config.temperature = number(float, 0)(value)
        elif word == "/tokens":
            config.max_new_tokens = number(int, 1)(value)
    except argparse.ArgumentTypeError:
        log(f"error: {word} takes {VALUES[word]}")
    if word == "/evidence":
        log(show_evidence(last_result) if last_result else "no summary yet")
    elif word == "/help":
        log(HELP.format(temperature=config.temperature, max_new_tokens=config.max_new_tokens))
    return False


def write_summary(summarize: Callable[..., dict], note: str, config: InferenceConfig) -> dict:
    """Prints the summary of a note, on a terminal as it is written, or its complete result as JSON, and logs
    what is to be known of it; `summarize` as in `converse`. Returns the result."""
    started = time.perf_counter()
    streams = not config.json and is_terminal(sys.stdout)
    on_text = print_piece if streams else None
    settings = (config.max_new_tokens, config.temperature)
    result = summarize(note, *settings, seed=config.seed, on_text=on_text)
    text = "" if streams else visible(result["generated_summary"], sys.stdout)
    print(to_json(result, sys.stdout) if config.json else text, flush=True)
    log_result(result, time.perf_counter() - started, config)
    return result


def _summarize_aloud(summarize: Callable[..., dict], note: str, config: InferenceConfig) -> dict | None:
    """The same in a conversation, which no failure ends: None if it was stopped or failed."""
    try:
        return write_summary(summarize, note, config)
    except KeyboardInterrupt:
        print(flush=True)
        log("(stopped)")
    except (InputError, RunError) as error:
        if config.json:
            print(to_json(failure(error.problem), sys.stdout), flush=True)
        log(f"error: {_as_command(error.problem, config)}")
        if error.fix:
            log(f"fix:   {_as_command(error.fix, config)}")
    return None


def _as_command(words: str, config: InferenceConfig) -> str:
    """Advice as it can be followed in a conversation on a terminal: by a command."""
    is_typed = config.clinical_note is None and is_terminal(sys.stdin)
    return re.sub("(--)?max_new_tokens", "/tokens", words) if is_typed else words


def print_piece(text: str) -> None:
    """On a terminal the note's own words are in italics, or in quotation marks where there are no styles."""
    shown = visible(text, sys.stdout)
    if isinstance(text, NoteWords) and is_terminal(sys.stdout):
        words = shown.lstrip()
        space = shown[: len(shown) - len(words)]
        has_styles = os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
        shown = f"{space}\x1b[3m{words}\x1b[23m" if has_styles else f"{space}“{words}”"
    print(shown, end="", flush=True)


def show_evidence(result: dict) -> str:
    lines = []
    for citation in result["evidence"]:
        confidence = "none" if citation["confidence"] is None else f"{citation['confidence']:.2f}"
        lines.append(f"{citation['claim']}  (confidence the model wrote: {confidence})")
        known = [n for n in citation["sentence_numbers"] if n not in citation["missing"]]
        lines += [f"    S{n}: {text}" for n, text in zip(known, citation["sentences"])]
    if not lines:
        for sentence in result["sentences"]:
            numbers = ", ".join(f"S{n}" for n in sentence["note_sentences"])
            lines.append(f"{sentence['text']}  ({sentence['source']}: {numbers})")
    return "\n".join(lines or ["the last summary cites nothing"])


def own_words(result: dict) -> str:
    """How many of a summary's sentences are the note's own words; "" for one that was written freely."""
    sources = [sentence["source"] for sentence in result["sentences"]]
    n_quoted = sources.count("quoted")
    which = f"{n_quoted} of {plural(len(sources), 'sentence')} {'is' if n_quoted == 1 else 'are'}"
    return f"{which} the note's own words (--writing free writes freely)" if sources else ""


def left_out(result: dict, with_text: bool) -> str:
    """What a summary does not mention, by sentence; without text, which is the patient's, by kind."""
    items = result["not_mentioned"]
    kinds = Counter(item["kind"] for item in items)
    parts = [f"{n} {kind}" for kind, n in sorted(kinds.items())]
    if with_text:
        shorten = partial(textwrap.shorten, width=80, placeholder=" …")
        parts = [f"{shorten(item['text'])} (S{item['note_sentence']})" for item in items[:5]]
        parts += [f"{len(items) - 5} more"] if len(items) > 5 else []
    return f"not mentioned: {('; ' if with_text else ', ').join(parts)}" if items else ""


def log_result(result: dict, seconds: float, config: InferenceConfig) -> None:
    """Logs timing, warnings, findings, whose words a summary is in, and what it does not mention."""
    if result["n_new_tokens"]:
        prompt = f"{result['n_prompt_tokens']:,} prompt tokens"
        new = f"{result['n_new_tokens']} new in {seconds:.1f} s, {result['n_new_tokens'] / seconds:.0f}/s"
        sure = "" if result["confidence"] is None else f"; confidence {result['confidence']:.2f}"
        log(f"({prompt}, {new}{sure})")
    for line in (own_words(result), left_out(result, is_terminal(sys.stderr))):
        if line:
            log(line)
    for warning in result["warnings"]:
        log(f"warning: {_as_command(warning, config)}")
    for finding in result.get("findings", ()):
        log(f"check: {finding['kind']}: {describe_finding(finding)}", is_colored=True)
