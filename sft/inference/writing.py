"""Summaries written sentence by sentence: sentences of the note, chosen by the adapter's selector, stand as
they are ("quote") or in the specialist's words where these can be traced to the note ("verified"). Needs no
torch."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sft.cli import InputError
from sft.grounding.acceptance import accept
from sft.grounding.citations import strip_citations
from sft.grounding.parts import Part, make_parts
from sft.grounding.selector import Quoted, Selector, quote
from sft.grounding.sentences import split_sentences
from sft.grounding.words import bare_words
from sft.inference.prompts import NotePrompts
from sft.inference.results import (
    COMPUTED_NAN,
    OUT_OF_MEMORY,
    check_result,
    failure,
    make_result,
    mean_probability,
    missing_facts,
    unchecked,
)

SENTENCE_TOKENS = 96  # no sentence of a summary needs more
_LONG_SENTENCE = 100  # words: hardly one

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
    texts: Mapping[int, str], prompts: NotePrompts, decode: Callable[..., Iterator], max_new_tokens: int
) -> Iterator[tuple[int, dict]]:
    """Yields (number, result) of each text's summary, written from the whole of it. `decode` is
    decode_within_memory with its model and settings."""
    encoded = {number: prompts.ids(text, max_new_tokens) for number, text in texts.items()}
    encoder = prompts.encoder
    for number, sequence in decode({number: ids for number, (ids, _) in encoded.items()}, max_new_tokens):
        if sequence is None:
            yield number, failure(OUT_OF_MEMORY)
        else:
            warnings = encoded[number][1]
            version = encoder.template.sentence_version
            yield number, make_result(texts[number], sequence, encoder.tokenizer, warnings, version)


@dataclass(frozen=True)
class Answer:
    """What the specialist wrote from a part, or the problem that kept it from that."""

    problem: str = ""
    text: str = ""
    log_probs: tuple[float, ...] = ()  # of its tokens, with the end token
    n_prompt_tokens: int = 0


def ask_specialist(
    prompts: NotePrompts,
    decode: Callable[..., Iterator],
    max_new_tokens: int,
    parts: Mapping[Key, Part],
) -> Iterator[tuple[Key, Answer]]:
    """Yields (key, answer) of each part, all of them decoded together; `decode` as in write_freely."""
    max_new_tokens = min(max_new_tokens, SENTENCE_TOKENS)
    limit = prompts.max_note_tokens(max_new_tokens)
    encoder = prompts.encoder
    encoded = {}
    texts = [encoder.template.render_note(part.text) for part in parts.values()]
    for key, ids in zip(parts, encoder.encode_texts(texts)):
        if len(ids) > limit:
            yield key, Answer("too long for the model")
        else:
            encoded[key] = encoder.prompt(ids)
    for key, sequence in decode(encoded, max_new_tokens):
        if sequence is None:
            yield key, Answer(OUT_OF_MEMORY)
            continue
        is_whole = sequence.finish_reason == "stop"
        written = encoder.tokenizer.decode(sequence.ids[:-1], skip_special_tokens=True) if is_whole else ""
        text = " ".join(strip_citations(written).split())
        problem = COMPUTED_NAN if sequence.finish_reason == "nan" else "" if text else "not finished"
        yield key, Answer(problem, text, tuple(sequence.log_probs), len(sequence.prompt))


# ------------------------------------------------------------------------------- sentence by sentence


class NoteWords(str):
    """A piece of a summary in the note's own words."""


@dataclass
class _Summary:
    """A note's summary while its sentences are written."""

    note: str
    parts: list[Part]
    answers: dict[int, Answer] = field(default_factory=dict)
    sentences: list[dict] = field(default_factory=list)

    def next_sentences(self, shorthand: dict) -> Iterator[dict]:
        """Adds and yields the sentences that are next and have their answers."""
        while (i := len(self.sentences)) in self.answers:
            self.sentences.append(_sentence(self.note, self.parts[i], self.answers[i], shorthand))
            yield self.sentences[i]


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
    order of the summary; `should_stop` is asked before each note if there is no `ask`."""
    selector = read_selector(sft_config)
    shorthand = sft_config.get("shorthand", {})
    for group in [texts] if ask else ({number: text} for number, text in texts.items()):
        if not ask and should_stop and should_stop():
            return
        summaries = {}
        for number, text in group.items():
            # Of a note in which nothing is a sentence to quote, its beginning
            quoted = quote(text, selector) or [Quoted(split_sentences(text)[0], (1,))]
            summaries[number] = _Summary(text, make_parts(text, quoted))
        parts = {(n, i): part for n, summary in summaries.items() for i, part in enumerate(summary.parts)}
        for (number, i), answer in ask(parts) if ask else ((key, Answer()) for key in parts):
            summary = summaries[number]
            summary.answers[i] = answer
            for sentence in summary.next_sentences(shorthand):
                if on_text:
                    space = " " if sentence is not summary.sentences[0] else ""
                    kind = NoteWords if sentence["source"] == "quoted" else str
                    on_text(number, kind(space + shown(sentence, citations)))
            if len(summary.sentences) == len(summary.parts):
                yield number, _result(summaries.pop(number), citations, selector.supported)


def _sentence(note: str, part: Part, answer: Answer, shorthand: dict) -> dict:
    """The specialist's sentence if it can be traced to its part and does more than repeat it, else the note's
    own."""
    refused = [answer.problem] if answer.problem else []
    if answer.text:
        refused = accept(part.quoted, answer.text, note, shorthand)
    is_repeated = bare_words(answer.text) == bare_words(part.quoted)
    is_written = bool(answer.text) and not refused and not is_repeated
    return {
        "text": answer.text if is_written else part.quoted,
        "source": "written" if is_written else "quoted",
        "note_sentences": list(part.note_sentences),
        # In a citation: the words are the note's
        "confidence": mean_probability(answer.log_probs) if is_written else 1.0,
        "refused": refused,
    }


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
    answers = [summary.answers[i] for i in range(len(sentences))]
    written = [answer for answer, s in zip(answers, sentences) if s["source"] == "written"]
    log_probs = [log_prob for answer in written for log_prob in answer.log_probs]
    warnings = [
        fault for fault in (COMPUTED_NAN, OUT_OF_MEMORY) if any(fault in s["refused"] for s in sentences)
    ]
    if not supported:
        warnings.append("the adapter's training summaries are not made of their notes' sentences")
    longest = max(len(sentence["text"].split()) for sentence in sentences)
    if longest > _LONG_SENTENCE:
        warnings.append(f"quotes a sentence of {longest:,} words, as long as the note has it")
    text = " ".join(shown(sentence, citations) for sentence in sentences)
    checked = check_result(summary.note, text)
    return {
        "generated_summary": text,
        "sentences": sentences,
        "not_mentioned": missing_facts(summary.note, [sentence["text"] for sentence in sentences]),
        "evidence": evidence if citations else [],
        **checked,
        "confidence": mean_probability(log_probs) if log_probs else None,
        "warnings": warnings + unchecked(text, checked),
        "n_prompt_tokens": sum(answer.n_prompt_tokens for answer in answers),
        "n_new_tokens": sum(len(answer.log_probs) for answer in answers),
        "finish_reason": "stop",
    }
