"""Summaries written sentence by sentence: sentences of the note, chosen by the adapter's selector, stand as
they are ("quote") or in the specialist's words where these can be traced to the note ("verified"). Needs no
torch."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sft.cli import InputError
from sft.grounding.acceptance import accept
from sft.grounding.citations import strip_citations
from sft.grounding.parts import Part, make_parts
from sft.grounding.selector import Quoted, Selector, quote
from sft.grounding.sentences import split_sentences
from sft.inference.prompts import NotePrompts
from sft.inference.results import (
    COMPUTED_NAN,
    OUT_OF_MEMORY,
    check_result,
    failure,
    make_result,
    missing_facts,
)

SENTENCE_TOKENS = 96  # no sentence of a summary needs more
_LONG_SENTENCE = 100  # words: hardly one
CONFIDENCE_OF_QUOTED = 1.0  # in a citation: the words are the note's

# (number of the note, number of the part)
Key = tuple[int, int]


def way_of_writing(asked: str | None, sft_config: dict, citations: bool = False) -> str:
    """ "verified", "quote" or "free": what was `asked` for, else the adapter's default. That of older ones is
    free, and that of weights that another tool trained, which quotes would leave unused. Raises InputError
    for an adapter that can write freely only, and for citations of free text."""
    default = "free" if "prompt_from" in sft_config else sft_config.get("writing", "free")
    way = asked or default
    if way not in ("verified", "quote", "free"):
        raise InputError("writing is none of its choices", "choose verified, quote or free")
    if citations and way == "free":
        raise InputError("--citations needs --writing quote or verified", "add it, or leave out --citations")
    if way != "free":
        read_selector(sft_config)
    return way


def read_selector(sft_config: dict) -> Selector:
    """Raises InputError for an adapter without one that this version can read."""
    try:
        return Selector.from_json(json.dumps(sft_config.get("selector")))
    except ValueError:
        problem = "this adapter has no selector of note sentences that this version can read"
        raise InputError(problem, "use --writing free, or train again") from None


# ------------------------------------------------------------------------------- what the model writes


def write_freely(
    texts: Mapping[int, str],
    prompts: NotePrompts,
    tokenizer,
    decode: Callable[..., Iterator],
    max_new_tokens: int,
) -> Iterator[tuple[int, dict]]:
    """Yields (number, result) of each text's summary, written from the whole of it. `decode` is
    decode_within_memory with its model and settings."""
    encoded = {number: prompts.ids(text, max_new_tokens) for number, text in texts.items()}
    version = prompts.encoder.template.sentence_version
    for number, sequence in decode({number: ids for number, (ids, _) in encoded.items()}, max_new_tokens):
        if sequence is None:
            yield number, failure(OUT_OF_MEMORY)
        else:
            yield number, make_result(texts[number], sequence, tokenizer, encoded[number][1], version)


@dataclass(frozen=True)
class Answer:
    """What the specialist wrote from a part, or the problem that kept it from that."""

    problem: str = ""
    text: str = ""
    log_probs: tuple[float, ...] = ()  # of its tokens, with the end token
    n_prompt_tokens: int = 0


def ask_specialist(
    prompts: NotePrompts,
    tokenizer,
    decode: Callable[..., Iterator],
    max_new_tokens: int,
    parts: Mapping[Key, Part],
) -> Iterator[tuple[Key, Answer]]:
    """Yields (key, answer) of each part, all of them decoded together; `decode` as in write_freely."""
    max_new_tokens = min(max_new_tokens, SENTENCE_TOKENS)
    limit = prompts.max_note_tokens(max_new_tokens)
    texts = [prompts.encoder.template.render_note(part.text) for part in parts.values()]
    encoded = {}
    for key, ids in zip(parts, prompts.encoder.encode_texts(texts)):
        if len(ids) > limit:
            yield key, Answer("too long for the model")
        else:
            encoded[key] = prompts.encoder.prompt(ids)
    for key, sequence in decode(encoded, max_new_tokens):
        yield key, Answer(OUT_OF_MEMORY) if sequence is None else _answer(sequence, tokenizer)


def _answer(sequence, tokenizer) -> Answer:
    is_whole = sequence.finish_reason == "stop"
    written = tokenizer.decode(sequence.ids[:-1], skip_special_tokens=True) if is_whole else ""
    text = " ".join(strip_citations(written).split())
    problem = COMPUTED_NAN if sequence.finish_reason == "nan" else "" if text else "not finished"
    return Answer(problem, text, tuple(sequence.log_probs), len(sequence.prompt))


# ------------------------------------------------------------------------------- sentence by sentence


class NoteWords(str):
    """A piece of a summary in the note's own words."""


@dataclass
class _Summary:
    """A note's summary while its sentences are written."""

    note: str
    parts: list[Part]
    answers: list[Answer | None]
    sentences: list[dict] = field(default_factory=list)


def write_by_sentence(
    texts: Mapping[int, str],
    sft_config: dict,
    citations: bool,
    on_text: Callable[[int, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    ask: Callable[[dict[Key, Part]], Iterable[tuple[Key, Answer]]] | None = None,
) -> Iterator[tuple[int, dict]]:
    """Yields (number, result) of each text as its sentences are complete: the note's own, or what `ask` (see
    ask_specialist) has for them where it can be traced to the note. `on_text` gets (number, sentence) in the
    order of the summary; `should_stop` is asked after each note if there is no `ask`."""
    selector = read_selector(sft_config)

    def begin(text: str) -> _Summary:
        parts = make_parts(text, quote(text, selector) or [_beginning(text)])
        return _Summary(text, parts, [None] * len(parts))

    def go_on(number: int, summary: _Summary) -> bool:
        """Adds the sentences that are next and have their answers; whether all are there."""
        while (i := len(summary.sentences)) < len(summary.parts) and summary.answers[i]:
            sentence = _sentence(
                summary.note, summary.parts[i], summary.answers[i], sft_config.get("shorthand", {})
            )
            summary.sentences.append(sentence)
            if on_text:
                kind = NoteWords if sentence["source"] == "quoted" else str
                on_text(number, kind((" " if i else "") + shown(sentence, citations)))
        return len(summary.sentences) == len(summary.parts)

    if ask is None:
        for number, text in texts.items():
            if should_stop and should_stop():
                return
            summary = begin(text)
            summary.answers = [Answer() for _ in summary.parts]
            go_on(number, summary)
            yield number, _result(summary, citations, selector.supported)
        return
    summaries = {number: begin(text) for number, text in texts.items()}
    parts = {(n, i): part for n, summary in summaries.items() for i, part in enumerate(summary.parts)}
    for (number, i), answer in ask(parts):
        summaries[number].answers[i] = answer
        if go_on(number, summaries[number]):
            yield number, _result(summaries.pop(number), citations, selector.supported)


def _beginning(note: str) -> Quoted:
    """Of a note in which nothing is a sentence to quote."""
    return Quoted(split_sentences(note)[0], (1,))


def _sentence(note: str, part: Part, answer: Answer, shorthand: dict) -> dict:
    """The specialist's sentence if it can be traced to its part, else the note's own."""
    refused = [answer.problem] if answer.problem else []
    if answer.text:
        refused = accept(part.quoted, answer.text, note, shorthand)
    is_written = bool(answer.text) and not refused
    return {
        "text": answer.text if is_written else part.quoted,
        "source": "written" if is_written else "quoted",
        "note_sentences": list(part.note_sentences),
        "confidence": _mean_probability(answer.log_probs) if is_written else CONFIDENCE_OF_QUOTED,
        "refused": refused,
    }


def _mean_probability(log_probs: Sequence[float]) -> float:
    return round(math.exp(sum(log_probs) / len(log_probs)), 4)


def shown(sentence: dict, citations: bool) -> str:
    """A sentence as the summary has it, with its citation if there are `citations`."""
    if not citations:
        return sentence["text"]
    numbers = ",".join(map(str, sentence["note_sentences"]))
    return f"{sentence['text']} [Evidence: S{numbers}; Conf: {sentence['confidence']:.2f}]"


def _result(summary: _Summary, citations: bool, supported: bool) -> dict:
    """The keys of make_result. `supported`: by training summaries that are made of their notes' sentences."""
    sentences = summary.sentences
    of_note = split_sentences(summary.note)
    evidence = [
        {
            "claim": sentence["text"],
            "sentence_numbers": sentence["note_sentences"],
            "sentences": [of_note[n - 1] for n in sentence["note_sentences"]],
            "missing": [],
            "confidence": round(sentence["confidence"], 2),
        }
        for sentence in sentences
    ]
    pairs = list(zip(sentences, summary.answers))
    log_probs = [p for one, answer in pairs if one["source"] == "written" for p in answer.log_probs]
    warnings = [
        fault for fault in (COMPUTED_NAN, OUT_OF_MEMORY) if any(fault in s["refused"] for s in sentences)
    ]
    if not supported:
        warnings.append("the adapter's training summaries are not made of their notes' sentences")
    longest = max(len(sentence["text"].split()) for sentence in sentences)
    if longest > _LONG_SENTENCE:
        warnings.append(f"quotes a sentence of {longest:,} words, as long as the note has it")
    text = " ".join(shown(sentence, citations) for sentence in sentences)
    return {
        "generated_summary": text,
        "sentences": sentences,
        "not_mentioned": missing_facts(summary.note, [sentence["text"] for sentence in sentences]),
        "evidence": evidence if citations else [],
        **check_result(summary.note, text),
        "confidence": _mean_probability(log_probs) if log_probs else None,
        "warnings": warnings,
        "n_prompt_tokens": sum(answer.n_prompt_tokens for answer in summary.answers),
        "n_new_tokens": sum(len(answer.log_probs) for answer in summary.answers),
        "finish_reason": "stop",
    }
