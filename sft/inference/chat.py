"""Chat."""

import argparse
import re
import sys
import time
from contextlib import suppress

from sft.cli import InputError, RunError, log
from sft.options import InferenceConfig, number

HELP = """Type or paste a note and press Enter; it may have many lines. Lines typed one by one: end each but the last with \\.
  /temperature T   0 writes the likeliest summary, above 0 draws (now {temperature:g})
  /tokens N        the longest summary in tokens (now {max_new_tokens})
  /evidence        the sentences the last summary cites, and its warnings
  /help            this
  /quit            leave (also Ctrl-D). Ctrl-C stops a summary being written."""


COMMAND = re.compile(
    r"/((temperature|tokens)(\s+\S+)?|evidence|help|quit|exit|q)\s*"
)  # any other line is patients' text: never echoed


def read_block(prompt: str) -> str:
    """One note or command from standard input. Raises EOFError at its end.

    On a terminal, Enter ends it unless more pasted lines wait or the line ends in a backslash. Piped, an empty line or a
    command ends it.
    """
    terminal = sys.stdin.isatty()
    lines = [input(prompt if terminal else "")]
    if terminal:
        import select

        def more() -> bool:
            return lines[-1].endswith("\\") or bool(select.select([sys.stdin], [], [], 0.05)[0])

        with suppress(EOFError):
            while more():
                lines[-1] = lines[-1].removesuffix("\\")
                lines.append(input(""))
    else:
        with suppress(EOFError):
            while lines[-1].strip() and not COMMAND.fullmatch(lines[-1]):
                lines.append(input(""))
    return "\n".join(lines)


def converse(inference: object, config: InferenceConfig) -> None:
    """The interactive session. What is typed stays in memory: it is patient text."""
    with suppress(ImportError):
        import readline  # noqa: F401 (line editing and in-memory history for input())
    temperature, max_new_tokens, last = config.temperature, config.max_new_tokens, None
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
        *note_lines, command = (
            block.split("\n") if COMMAND.fullmatch(block.split("\n")[-1]) else [*block.split("\n"), ""]
        )
        note = "\n".join(note_lines).strip()
        if note:
            try:
                started = time.perf_counter()
                last = inference.generate_summary(
                    note,
                    max_new_tokens,
                    temperature,
                    seed=config.seed,
                    on_text=lambda text: print(text, end="", flush=True),
                )
                print(flush=True)
                log_result(last, time.perf_counter() - started)
            except KeyboardInterrupt:
                print(flush=True)
                log("(stopped)")
            except (
                InputError,
                RunError,
            ) as error:  # too little memory for this note, say: the conversation goes on
                log(f"error: {error.problem}")
        word, value = (*command.split(), "", "")[:2]
        try:
            if word in ("/quit", "/exit", "/q"):
                return
            elif word == "/temperature":
                temperature = number(float, 0)(value)
            elif word == "/tokens":
                max_new_tokens = number(int, 1)(value)
            elif word == "/evidence":
                log(show_evidence(last) if last else "no summary yet")
            elif word == "/help":
                log(HELP.format(temperature=temperature, max_new_tokens=max_new_tokens))
        except argparse.ArgumentTypeError:
            log(
                "error: "
                + (
                    "/temperature takes a number from 0"
                    if word == "/temperature"
                    else "/tokens takes a whole number from 1"
                )
            )


def show_evidence(result: dict) -> str:
    lines = []
    for citation in result["evidence"]:
        lines.append(f"{citation['claim']}  (confidence the model wrote: {citation['confidence']:.2f})")
        lines += [
            f"    S{n}: {text}"
            for n, text in zip(
                (n for n in citation["sentence_numbers"] if n not in citation["missing"]),
                citation["sentences"],
            )
        ]
    return "\n".join(lines or ["the last summary cites nothing"])


def log_result(result: dict, seconds: float) -> None:
    """Timing and warnings of one summary, to stderr."""
    rate = result["n_new_tokens"] / seconds
    log(
        f"({result['n_prompt_tokens']:,} prompt tokens, {result['n_new_tokens']} new in {seconds:.1f} s, {rate:.0f}/s; confidence {result['confidence']:.2f})"
    )
    for warning in result["warnings"]:
        log(f"warning: {warning}")
