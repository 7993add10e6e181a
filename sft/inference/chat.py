"""The conversation on a terminal or through a pipe: notes and commands in, summaries out. Knows a function
that summarizes, no model. What is typed stays in memory: it is patients' text."""

import argparse
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from sft.cli import InputError, RunError, log
from sft.options import InferenceConfig, number

HELP = """\
Type or paste a note and press Enter. A pasted note may span several lines.
When typing, end every line except the last with \\.
  /temperature T   0 = greedy, above 0 = sampling (now {temperature:g})
  /tokens N        longest summary, in tokens (now {max_new_tokens})
  /evidence        the sentences that the last summary cites
  /help            this help
  /quit            leave (also Ctrl-D). Ctrl-C stops a summary that is being written."""

# Any other line is patients' text: never repeated in a message
COMMAND = re.compile(r"/((temperature|tokens)(\s+\S+)?|evidence|help|quit|exit|q)\s*")
VALUES = {"/temperature": "a number from 0", "/tokens": "a whole number from 1"}


def read_block(prompt: str) -> str:
    """One note or command from standard input. Raises EOFError at its end.

    On a terminal, Enter ends it unless more pasted lines wait or the line ends in a backslash. Piped, an
    empty line or a command ends it."""
    if sys.stdin.isatty():
        lines = [input(prompt)]
        with suppress(EOFError):
            while lines[-1].endswith("\\") or _more_lines_wait():
                lines[-1] = lines[-1].removesuffix("\\")
                lines.append(input(""))
    else:
        lines = [input("")]
        with suppress(EOFError):
            while lines[-1].strip() and not COMMAND.fullmatch(lines[-1]):
                lines.append(input(""))
    return "\n".join(lines)


def _more_lines_wait() -> bool:
    import select

    return bool(select.select([sys.stdin], [], [], 0.05)[0])


def split_block(block: str) -> tuple[str, str]:
    """(note, command) of what was typed; either may be empty. A command is the last line."""
    note, _, last_line = block.rpartition("\n")
    if COMMAND.fullmatch(last_line):
        return note.strip(), last_line
    return block.strip(), ""


def converse(summarize: Callable[..., dict], config: InferenceConfig) -> None:
    """The interactive session. `summarize(note, max_new_tokens, temperature, seed=..., on_text=...)` returns
    a result as SFTInference.generate_summary does."""
    with suppress(ImportError):
        import readline  # noqa: F401 (line editing and in-memory history for input())
    temperature = config.temperature
    max_new_tokens = config.max_new_tokens
    last_result = None
    log("Paste a clinical note and press Enter. /help for help, /quit to leave.")
    while True:
        try:
            block = read_block("note> ").strip()
        except EOFError:
            return log()
        except KeyboardInterrupt:
            log("\n(/quit or Ctrl-D leaves)")
            continue
        if sys.stdin.isatty() and re.fullmatch(r"/.*", block) and not COMMAND.fullmatch(block):
            log("no such command; /help lists them")
            continue
        note, command = split_block(block)
        if note:
            result = _summarize_aloud(summarize, note, max_new_tokens, temperature, config.seed)
            last_result = result or last_result
        word, *values = command.split() or [""]
        value = values[0] if values else ""
        try:
            if word in ("/quit", "/exit", "/q"):
                return
            elif word == "/temperature":
                temperature = number(float, 0)(value)
            elif word == "/tokens":
                max_new_tokens = number(int, 1)(value)
            elif word == "/evidence":
                log(show_evidence(last_result) if last_result else "no summary yet")
            elif word == "/help":
                log(HELP.format(temperature=temperature, max_new_tokens=max_new_tokens))
        except argparse.ArgumentTypeError:
            log(f"error: {word} takes {VALUES[word]}")


def _summarize_aloud(
    summarize: Callable[..., dict], note: str, max_new_tokens: int, temperature: float, seed: int
) -> dict | None:
    """Prints a summary as it is written; None if it was stopped or failed, which does not end the
    conversation."""
    started = time.perf_counter()
    try:
        result = summarize(note, max_new_tokens, temperature, seed=seed, on_text=print_piece)
    except KeyboardInterrupt:
        print(flush=True)
        log("(stopped)")
    except (InputError, RunError) as error:
        log(f"error: {error.problem}")
        if error.fix:
            log(f"fix:   {error.fix}")
    else:
        print(flush=True)
        log_result(result, time.perf_counter() - started)
        return result
    return None


def print_piece(text: str) -> None:
    print(text, end="", flush=True)


def show_evidence(result: dict) -> str:
    lines = []
    for citation in result["evidence"]:
        confidence = "none" if citation["confidence"] is None else f"{citation['confidence']:.2f}"
        lines.append(f"{citation['claim']}  (confidence the model wrote: {confidence})")
        known = [n for n in citation["sentence_numbers"] if n not in citation["missing"]]
        lines += [f"    S{n}: {text}" for n, text in zip(known, citation["sentences"])]
    return "\n".join(lines or ["the last summary cites nothing"])


def log_result(result: dict, seconds: float) -> None:
    """Logs timing and warnings of one summary."""
    prompt = f"{result['n_prompt_tokens']:,} prompt tokens"
    new = f"{result['n_new_tokens']} new in {seconds:.1f} s, {result['n_new_tokens'] / seconds:.0f}/s"
    log(f"({prompt}, {new}; confidence {result['confidence']:.2f})")
    for warning in result["warnings"]:
        log(f"warning: {warning}")
