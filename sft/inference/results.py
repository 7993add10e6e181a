"""The result of one note: a dict with the summary, or with an `error`; its warnings; its line in a file; its
text while it is written."""

import csv
import functools
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from sft.cli import is_terminal, plural, preview_list, visible
from sft.data.formats import describe_problem, strip_markup
from sft.data.text import clean_text, is_blank
from sft.grounding.check import PreparedNote
from sft.grounding.citations import parse_citations, strip_citations, unreadable_citations
from sft.grounding.selector import not_mentioned
from sft.grounding.sentences import SENTENCE_VERSION, split_sentences
from sft.inference.endings import ended_text

RESULT_COLUMNS = (
    "generated_summary check_score check_risk n_findings confidence finish_reason n_prompt_tokens n_new_tokens "
    "warnings sentences not_mentioned findings support evidence made_by error"
).split()
_LONGEST_NOTE = 1_000_000  # characters that are checked: a second, 100 MB, and far more than a prompt holds
OUT_OF_MEMORY = "out of memory on this note"
COMPUTED_NAN = "the model computed NaN (not a number)"
FIXES = {
    OUT_OF_MEMORY: "lower --max_length or use --use_4bit",
    COMPUTED_NAN: "try --dtype float32; if it stays, the adapter is damaged: train again",
}


def note_problem(note: object) -> str:
    """Why a note cannot be summarized; "" if it can."""
    if not isinstance(note, str):
        return "the note is not text"
    return "the note is empty" if is_blank(strip_markup(clean_text(note))[0]) else ""


def read_note(note: str, language: str | None) -> tuple[str, list[str]]:
    """(the note's text without control characters and markup, what makes it hardly a note, as in "the note
    looks like RTF"); `language`: of the training notes."""
    text, markup = strip_markup(clean_text(note))
    warnings = [f"the note was {markup}: its tags are left out"] if markup else []
    problem = describe_problem(text, language)
    return text, warnings + ([f"the note {problem}"] if problem else [])


def failure(reason: str) -> dict:
    """The result of a note that could not be summarized: the keys of make_result, and `error`."""
    lists = {name: [] for name in ("sentences", "not_mentioned", "evidence")}
    checked = {"check_score": None, "check_risk": None, "findings": [], "n_findings": {}, "support": []}
    counts = {"n_prompt_tokens": None, "n_new_tokens": None, "finish_reason": None}
    written = {"confidence": None, "warnings": [], **counts}
    return {"generated_summary": "", **lists, **checked, **written, "error": reason}


def make_result(
    note: str, sequence, tokenizer, prompt_warnings: list[str], sentence_version: int = SENTENCE_VERSION
) -> dict:
    """The result of a GeneratedSequence, as SFTInference.generate_summary describes it; a failure if the
    model computed NaN. `sentence_version`: of the note's sentence numbers."""
    if sequence.finish_reason == "nan":
        return failure(COMPUTED_NAN)
    summary, ending = ended_text(sequence, functools.partial(tokenizer.decode, skip_special_tokens=True))
    warnings = prompt_warnings + ending
    evidence = parse_citations(summary, note, sentence_version)
    checked = check_result(note, summary, sentence_version)
    warnings += summary_warnings(summary, evidence) + unchecked(summary, checked)
    return {
        "generated_summary": summary,
        "sentences": [],
        "not_mentioned": missing_facts(note, [strip_citations(summary)]),
        "evidence": evidence,
        **checked,
        "confidence": mean_probability(sequence.log_probs),
        "warnings": warnings,
        "n_prompt_tokens": len(sequence.prompt),
        "n_new_tokens": len(sequence.ids),
        "finish_reason": sequence.finish_reason,
    }


def mean_probability(log_probs: Sequence[float]) -> float:
    """The geometric mean of the probabilities."""
    return round(math.exp(sum(log_probs) / len(log_probs)), 4)


def missing_facts(note: str, sentences: Sequence[str]) -> list[dict]:
    """What the note holds and a summary of these sentences lacks: its `kind` (plan, drug, abnormal or
    problem), `text`, `note_sentence`."""
    return [asdict(missing) for missing in not_mentioned(note, sentences)]


def check_result(note: str, summary: str, sentence_version: int = SENTENCE_VERSION) -> dict:
    """What the check of a summary found (see sft.grounding): its keys of a result. In another language than
    English, nothing is checked, and score and risk are None."""
    check = PreparedNote(note[:_LONGEST_NOTE], sentence_version).check(summary)
    is_checked = check.language == "en"
    return {
        "check_score": round(check.score, 4) if is_checked else None,
        "check_risk": round(check.risk, 4) if is_checked else None,
        "findings": [asdict(finding) for finding in check.findings],
        "n_findings": dict(Counter(finding.kind for finding in check.findings)),
        "support": [sentence.support for sentence in check.sentences],
    }


def describe_finding(finding: dict) -> str:
    """ "says 'left knee'; the note says 'right' (S4)": a finding in plain words, with the texts' own."""
    says, note_says = (" ".join((finding[name] or "").split()) for name in ("says", "note_says"))
    if finding["kind"] == "citation":
        return f"cites '{says}', which does not support the words before it"
    if finding["note_says"] is not None:
        return f"says '{says}'; the note says '{note_says}' (S{finding['note_sentence']})"
    if finding["kind"] == "misplaced":
        return f"joins '{says}', which the note keeps apart"
    return f"not in the note: '{says}'"


def summary_warnings(summary: str, evidence: Sequence[dict]) -> list[str]:
    """What is wrong with a summary's form and citations. A warning is a kind, or "KIND: details"."""
    sentences = split_sentences(strip_citations(summary))
    missing = [f"S{n}" for citation in evidence for n in citation["missing"]]
    n_unreadable = len(unreadable_citations(summary))
    warnings = {
        "the model wrote nothing": not summary,
        "the summary repeats itself": len(set(sentences)) < len(sentences),
        f"cites sentences that are not in the note: {preview_list(missing)}": missing,
        f"{plural(n_unreadable, 'citation')} cannot be read": n_unreadable,
    }
    return [warning for warning, is_so in warnings.items() if is_so]


def unchecked(summary: str, checked: dict) -> list[str]:
    """The warning that nothing was checked, where check_result says so of a summary."""
    is_so = summary and checked["check_score"] is None
    return ["not checked against the note: the check reads English only"] if is_so else []


def kinds_of(result: dict) -> Iterator[str]:
    """What is counted of a result: "done" or "failed", "flagged", its error, each kind of its warnings, of
    its findings and of what it does not mention once, and each sentence as "sentence quoted" or "sentence
    written"."""
    yield from ("failed", result["error"]) if "error" in result else ("done",)
    findings = result.get("n_findings", ())
    yield from ["flagged"] if findings else []
    yield from (f"the check found: {kind}" for kind in findings)
    # Of nearly every note something else is left out: that is no news at the end of a file
    missing = {missing["kind"] for missing in result.get("not_mentioned", [])} - {"other"}
    yield from (f"not mentioned: {kind}" for kind in sorted(missing))
    yield from (f"sentence {sentence['source']}" for sentence in result.get("sentences", []))
    kinds = (warning.partition(":")[0] for warning in result.get("warnings", []))
    yield from {re.sub(r"(?<![\w.])\d[\d,]*(?!\w)", "N", kind) for kind in kinds}


def needs_review(result: dict, max_risk: float | None) -> bool:
    """Whether a person should review a summary: its risk is above `max_risk`, or it could not be checked."""
    if max_risk is None or "error" in result:
        return False
    risk = result.get("check_risk")
    return risk is None or risk > max_risk


def to_json(value, stream=None) -> str:
    """Valid JSON in one line; with all but ASCII escaped where a terminal or an encoding other than UTF-8
    would change it."""
    is_utf_8 = stream is None or (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
    return json.dumps(value, ensure_ascii=not is_utf_8 or is_terminal(stream), allow_nan=False)


def format_result(result: dict, kind: str, stream=None, separator: str = ",") -> str:
    """One result as a line of .jsonl, a row of .csv, or readable text; `stream`: where it is printed, else it
    goes to a UTF-8 file."""
    if kind == ".jsonl":
        return to_json(result, stream) + "\n"
    if kind == ".csv":
        cells = {**result, "warnings": "; ".join(result.get("warnings", []))}
        return csv_row([cells.get(name, "") for name in csv_columns(result)], separator)
    name = f"row {result['row']}" if result["id"] is None else " ".join(result["id"].split())
    return visible(f"[{name}] {result.get('error') or result['generated_summary']}\n\n", stream)


def csv_columns(result: dict) -> list[str]:
    return [*(name for name in result if name not in RESULT_COLUMNS), *RESULT_COLUMNS]


def csv_row(cells: Sequence, separator: str = ",") -> str:
    row = io.StringIO()
    texts = [to_json(cell) if isinstance(cell, list | dict | bool) else cell for cell in cells]
    # Before Python 3.13 csv quotes, of line ends, those of its own alone: with "\n" a "\r" would tear the row
    csv.writer(row, delimiter=separator, lineterminator="\r\n").writerow([defuse(text) for text in texts])
    return row.getvalue().removesuffix("\r\n") + "\n"


def defuse(cell):
    """A cell that no spreadsheet takes for a formula. A number with a sign is none."""
    if not isinstance(cell, str) or re.fullmatch(r"[+-]\d+([.,]\d+)?(e[+-]?\d+)?", cell, re.IGNORECASE):
        return cell
    # Spreadsheets pass over what cannot be seen, and read full-width signs
    seen = (c for c in cell if c.isprintable() and not c.isspace() and unicodedata.category(c)[0] != "M")
    first = unicodedata.normalize("NFKC", next(seen, "."))[:1]
    return f"'{cell}" if first in "=+-@" or cell[:1] in ("\t", "\r") else cell


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
