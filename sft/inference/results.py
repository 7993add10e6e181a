"""The result of one note: a dict with the summary, or with an `error`; its warnings; its text while it is
written."""

import math
from collections.abc import Callable, Sequence

from sft.cli import plural, preview_list
from sft.data.text import clean_text, is_blank
from sft.grounding.citations import parse_citations, strip_citations, unreadable_citations
from sft.grounding.numbers import unsupported_numbers
from sft.grounding.sentences import SENTENCE_VERSION, split_sentences


def note_problem(note: object) -> str:
    """Why a note cannot be summarized; "" if it can."""
    if not isinstance(note, str):
        return "the note is not text"
    return "the note is empty" if is_blank(clean_text(note)) else ""


def failure(reason: str) -> dict:
    """The result of a note that could not be summarized."""
    return {"generated_summary": "", "error": reason}


def make_result(
    note: str,
    summary: str,
    sequence,
    prompt_warnings: list[str],
    sentence_version: int = SENTENCE_VERSION,
) -> dict:
    """The result of a GeneratedSequence whose text is `summary`, as SFTInference.generate_summary describes
    it. `sentence_version`: of the note's sentence numbers."""
    warnings = list(prompt_warnings)
    n_new_tokens = len(sequence.ids)
    if sequence.finish_reason == "length":
        warnings.append(f"summary cut after {n_new_tokens} tokens: raise max_new_tokens")
    return {
        "generated_summary": summary,
        "evidence": parse_citations(summary, note, sentence_version),
        "confidence": round(math.exp(sum(sequence.log_probs) / n_new_tokens), 4),
        "warnings": warnings + summary_warnings(summary, note, sentence_version),
        "n_prompt_tokens": len(sequence.prompt),
        "n_new_tokens": n_new_tokens,
        "finish_reason": sequence.finish_reason,
    }


def summary_warnings(summary: str, note: str, sentence_version: int = SENTENCE_VERSION) -> list[str]:
    """What is wrong with a summary, as far as its text and the note's show."""
    warnings = []
    if not summary:
        warnings.append("the model wrote nothing")
    sentences = split_sentences(strip_citations(summary))
    if len(set(sentences)) < len(sentences):
        warnings.append("the summary repeats itself")
    citations = parse_citations(summary, note, sentence_version)
    missing = [f"S{n}" for citation in citations for n in citation["missing"]]
    if missing:
        warnings.append(f"cites sentences that are not in the note: {preview_list(missing)}")
    n_unreadable = len(unreadable_citations(summary))
    if n_unreadable:
        warnings.append(f"{plural(n_unreadable, 'citation')} cannot be read")
    numbers = unsupported_numbers(summary, note)
    if numbers:
        warnings.append(f"states numbers that are not in the note: {preview_list(numbers)}")
    return warnings


def text_stream(tokenizer, stop_ids: Sequence[int], on_text: Callable[[int, str], None]) -> Callable:
    """A function for each new token of any sequence, that hands on (number, text added) as soon as characters
    are complete."""
    shown: dict[int, str] = {}

    def on_token(sequence) -> None:
        ids = [token for token in sequence.ids if token not in stop_ids]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        is_complete = sequence.finish_reason or not text.endswith("\ufffd")
        before = shown.get(sequence.index, "")
        # Text is not longer while a sequence that ran out of memory is written again
        if is_complete and len(text) > len(before):
            on_text(sequence.index, text[len(before) :])
            shown[sequence.index] = text

    return on_token
