"""What is measured of a summary. Every measure is a numerator and a denominator per note: their sums over
notes give its value (see figures.py), and (0, 0) says that it does not apply to this note."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sft.data.rows import Row
from sft.grounding.citations import citation_spans, has_citation, parse_citations, strip_citations
from sft.grounding.quantities import Quantity, QuantityIndex
from sft.grounding.reading import Text
from sft.grounding.sentences import sentence_spans, split_sentences
from sft.grounding.words import TOKEN, bare_words, content_stems, is_telling

RUN = 5  # words in a row that count as copied, or as remembered
_HELD = 2 / 3  # of a phrase's words, for its fact to be held
_SUPPORTED = 0.8  # of a sentence's words, for it to be supported
_DOSED = ("mass", "volume", "amount")
_REACH = 6  # words between a drug and its dose
_INVENTED = ("unsupported", "number", "drug")
_KINDS = "number unit drug unsupported misplaced negation certainty side person time citation".split()


class Measure(NamedTuple):
    """`better`: 1 more, -1 less, 0 neither. `scale`: 100 for shares."""

    name: str
    title: str
    explanation: str
    better: int
    scale: int = 100


MEASURES = {measure.name: measure for measure in (
    Measure("clean", "Summaries without a finding, %", "no sentence flagged by the check against the note", 1),
    Measure("flagged", "Sentences with a finding, per 100", "sentences flagged by the check", -1),
    Measure("rewritten", "Rewritten sentences with a finding, per 100", "of those not copied from the note as they are", -1),
    Measure("invented", "Invented, per 100 rewritten sentences", "words, numbers and drugs that the note lacks", -1),
    Measure("check_score", "Check score", "1 = nothing found; falls with the sum of what is", 1, 1),
    Measure("coverage", "Coverage of the reference's facts, %", "numbers, doses with their drug, phrases (problems, plan): "
            "two thirds of a phrase's words", 1),
    Measure("supported", "Supported sentences, %", "at least 80 % of their words stand in the note", 1),
    Measure("model_support", "Support by the model, nats", "by how much the note makes a token of its own sentences "
            "likelier; says nothing of truth", 0, 1),
    Measure("own_share", "Sentences in the model's own words, %", "of verified summaries; the others are the note's", 0),
    Measure("loss", "Loss per token, nats", "of the reference summary, written freely after the note", -1, 1),
    Measure("rouge1", "ROUGE-1", "words shared with the reference, F", 1, 1),
    Measure("rouge2", "ROUGE-2", "pairs of words shared with the reference, F", 1, 1),
    Measure("rougeL", "ROUGE-L", "longest common sequence with the reference, F", 1, 1),
    Measure("length_ratio", "Length, of the reference's", "words, divided by the reference's", 0, 1),
    Measure("copied", "Copied words, %", f"in runs of {RUN} or more words of the note", 0),
    Measure("format", "Format kept, %", "of the marks of training summaries: citations, headings, lists, lines", 1),
    Measure("citations_valid", "Valid citations, %", "cite only sentences that the note has", 1),
    Measure("citations_supporting", "Supporting citations, %", "the cited sentences hold what is claimed", 1),
    Measure("memorized", "Memorized runs, %", f"{RUN}-word runs that training summaries have and the note has not", -1),
    Measure("empty", "Empty summaries, %", "nothing written, or failed", -1),
    Measure("repeats", "Repeating summaries, %", "a sentence twice, or a loop", -1),
    Measure("cut", "Cut summaries, %", "stopped by --max_new_tokens", -1),
    Measure("seconds", "Seconds a note", "in batches, as the file was written", 0, 1),
    *(Measure(f"finding_{kind}", f"{kind.capitalize()}, per 100 sentences", "findings of this kind", -1) for kind in _KINDS),
)}  # fmt: skip
HEADLINE = list(MEASURES)[:15]


class Sentence(NamedTuple):
    """A summary's sentence, as the check reads it. `findings`: the check's; `support`: note sentences."""

    start: int
    end: int
    findings: list[dict]
    support: list[int]


class Measured(NamedTuple):
    """One summary of one system. `result`: as of SFTInference.generate_summary, its summary and its check."""

    result: dict
    sentences: list[Sentence]
    sums: dict[str, tuple[float, float]]

    @property
    def faults(self) -> list[str]:
        """Why a reader should look."""
        return [name for name in ("flagged", "empty", "repeats", "cut") if self.sums[name][0]]


def text_spans(summary: str) -> list[tuple[int, int]]:
    """(start, end) of the sentences that the check reads, which has spaces for citations."""
    characters = list(summary)
    for start, end in citation_spans(summary):
        characters[start:end] = " " * (end - start)
    text = "".join(characters)
    return [(start, end) for start, end in sentence_spans(text) if TOKEN.search(text, start, end)]


def word_runs(text: str) -> list[tuple[str, ...]]:
    """All runs of RUN words, in order."""
    words = bare_words(text)
    return [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]


def copied_words(summary: str, note: str) -> tuple[int, int]:
    """(words in runs of at least RUN words that stand in the note, words)."""
    known = set(word_runs(note))
    copied = {i + k for i, run in enumerate(word_runs(summary)) if run in known for k in range(RUN)}
    return len(copied), len(bare_words(summary))


def facts_held(reference: str, summary: str) -> tuple[int, int]:
    """(facts of `reference` that `summary` holds, facts): each number, each dose together with the word
    before it (its drug), each phrase of two or more telling words, cut at punctuation and conjunctions."""
    said = Text(reference)
    found = Text(summary)
    index = QuantityIndex(found.quantities)
    stems = set(found.stems)
    held = []
    for quantity in said.quantities:
        if not quantity.is_implied:
            places = [other.index for other in index.matches(quantity)]
            drug = _drug_of(said, quantity)
            near = (found.stems[max(0, i - _REACH) : i + _REACH] for i in places)
            held.append(any(drug in words for words in near) if drug else bool(places))
    phrases: dict[tuple[int, int], set[str]] = {}
    for i, word in enumerate(said.words):
        if is_telling(word):
            phrases.setdefault((said.sentence_of[i], said.clauses[i]), set()).add(said.stems[i])
    held += [len(words & stems) >= _HELD * len(words) for words in phrases.values() if len(words) > 1]
    return sum(held), len(held)


def _drug_of(text: Text, quantity: Quantity) -> str:
    """The stem of the telling word before a dose, "" if it is no dose, or there is none."""
    if not quantity.unit or quantity.unit[0] not in _DOSED:
        return ""
    before = range(quantity.index - 1, max(-1, quantity.index - 4), -1)
    return next((text.stems[i] for i in before if is_telling(text.words[i])), "")


def marks(summary: str) -> set[str]:
    """What gives a summary its form: citations, headings by name, a list, several lines."""
    found = set(re.findall(r"^[ \t]{0,8}([A-Z][\w /-]{1,40}:)", summary, re.MULTILINE))
    found |= {"citations"} if has_citation(summary) else set()
    found |= {"list"} if re.search(r"^[ \t]{0,8}(?:[-*•]|\d{1,2}[.)])[ \t]", summary, re.MULTILINE) else set()
    return found | ({"lines"} if "\n" in summary.strip() else set())


def usual_marks(summaries: Iterable[str]) -> set[str]:
    """The marks of at least half of the summaries; empty: free text."""
    all_marks = [marks(summary) for summary in summaries]
    counts = Counter(mark for found in all_marks for mark in found)
    return {mark for mark, n in counts.items() if 2 * n >= len(all_marks)}


def measure(row: Row, result: dict, rouge, expected: set[str], version: int) -> Measured:
    """Everything that one summary tells alone. `rouge`: a RougeScorer; `expected`: the marks of its format;
    `version`: of the note's sentence numbers."""
    written = result["generated_summary"]
    summary = strip_citations(written)
    reference = strip_citations(row.model_summary)
    sentences = [
        Sentence(start, end, [one for one in result["findings"] if start <= one["start"] < end], support)
        for (start, end), support in zip(text_spans(written), result["support"])
    ]
    # In another language nothing is checked, and nothing is counted
    checked = [] if result["check_score"] is None else sentences
    is_checked = bool(checked)
    n_flagged = sum(bool(s.findings) for s in checked)
    known = f" {' '.join(bare_words(row.clinical_note))} "
    own = [s for s in checked if f" {' '.join(bare_words(written[s.start : s.end]))} " not in known]
    kinds = Counter(result["n_findings"])
    in_note = set(content_stems(row.clinical_note, numbers=False))
    stems = [set(content_stems(written[s.start : s.end], numbers=False)) for s in checked]
    likelihoods = result.get("model_support", [])
    citations = parse_citations(written, row.clinical_note, version)
    texts = split_sentences(summary)
    sources = [sentence["source"] for sentence in result.get("sentences", [])]
    ending = result.get("finish_reason")
    sums = {
        "clean": (is_checked and not n_flagged, is_checked),
        "flagged": (n_flagged, len(checked)),
        "rewritten": (sum(bool(s.findings) for s in own), len(own)),
        "invented": (sum(kinds[kind] for kind in _INVENTED) if own else 0, len(own)),
        "check_score": (result["check_score"] if is_checked else 0, is_checked),
        "coverage": facts_held(reference, summary),
        "supported": (sum(len(words & in_note) >= _SUPPORTED * len(words) for words in stems), len(stems)),
        "model_support": (sum(after - alone for after, alone in likelihoods), len(likelihoods)),
        "own_share": (sources.count("written"), len(sources)),
        "loss": result.get("reference_loss", (0, 0)),
        "length_ratio": (len(summary.split()), len(reference.split())),
        "copied": copied_words(summary, row.clinical_note),
        "format": (len(expected & marks(written)), len(expected)),
        "citations_valid": (sum(not citation["missing"] for citation in citations), len(citations)),
        "citations_supporting": (max(0, len(citations) - kinds["citation"]), len(citations)),
        "empty": (not summary, 1),
        "repeats": (len(set(texts)) < len(texts) or ending == "loop", 1),
        "cut": (ending == "length", 1),
        "seconds": (result.get("seconds", 0), "seconds" in result),
    }
    sums |= {name: (score.fmeasure, 1) for name, score in rouge.score(reference, summary).items()}
    sums |= {f"finding_{kind}": (kinds[kind], len(checked)) for kind in _KINDS}
    return Measured(result, sentences, sums)


def add_memorized(measured: Mapping[str, Mapping], rows: Mapping[int, Row], training: Sequence[Row]) -> None:
    """Adds `memorized` to every summary: its different runs that training summaries have and the note has
    not. Of the training summaries only the runs that some summary has are held in memory."""
    ones = [(one, rows[number]) for summaries in measured.values() for number, one in summaries.items()]
    said = [set(word_runs(strip_citations(one.result["generated_summary"]))) for one, _ in ones]
    new = [runs - set(word_runs(row.clinical_note)) for runs, (_, row) in zip(said, ones)]
    wanted = set().union(*new)
    summaries = (strip_citations(row.model_summary) for row in training)
    known = {run for summary in summaries for run in word_runs(summary) if run in wanted}
    for (one, _), runs, unlike in zip(ones, said, new):
        one.sums["memorized"] = (len(unlike & known), len(runs) if training else 0)
