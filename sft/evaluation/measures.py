"""What is measured of a summary. Every measure is a numerator and a denominator per note (see statistics.py):
their sums over notes give its value, and (0, 0) says that it does not apply to this note."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft.data.rows import Row
from sft.grounding import Check, PreparedNote
from sft.grounding.citations import has_citation, parse_citations, strip_citations
from sft.grounding.quantities import Quantity, QuantityIndex
from sft.grounding.reading import Text
from sft.grounding.sentences import SENTENCE_VERSION, split_sentences
from sft.grounding.words import TOKEN, is_telling

RUN = 5  # words in a row that count as copied, or as remembered
_HELD = 2 / 3  # of a phrase's words, for its fact to be held
_SUPPORTED = 0.8  # of a sentence's words, for it to be supported
_DOSED = ("mass", "volume", "amount")
_REACH = 6  # words between a drug and its dose
INVENTED = ("unsupported", "number", "drug")
KINDS = "number unit drug unsupported misplaced negation certainty side person time citation".split()


class Measure(NamedTuple):
    """`better`: 1 more, -1 less, 0 neither. `scale`: 100 for shares."""

    name: str
    title: str
    explanation: str
    better: int
    scale: int = 100


MEASURES = (
    Measure("clean", "Summaries without a finding, %", "no sentence flagged by the check against the note", 1),
    Measure("flagged", "Sentences with a finding, per 100", "sentences flagged by the check", -1),
    Measure("rewritten", "Rewritten sentences with a finding, per 100", "of those not copied from the note as they are", -1),
    Measure("invented", "Invented, per 100 rewritten sentences", "findings: unsupported, number, drug", -1),
    Measure("check_score", "Check score", "1 = nothing found; falls with the sum of what is", 1, 1),
    Measure("coverage", "Coverage of the reference's facts, %", "numbers, doses with their drug, phrases (problems, plan): "
            "two thirds of a phrase's words", 1),
    Measure("supported", "Supported sentences, %", "at least 80 % of their words stand in the note", 1),
    Measure("loss", "Loss per token, nats", "of the reference summary, written after the note", -1, 1),
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
    *(Measure(f"finding_{kind}", f"{kind}, per 100 sentences", "findings of this kind", -1) for kind in KINDS),
)  # fmt: skip
HEADLINE = [m.name for m in MEASURES[:13]]


@dataclass
class Measured:
    """One summary of one system, measured."""

    summary: str
    check: Check
    sums: dict[str, tuple[float, float]]

    @property
    def fails(self) -> bool:
        """Whether a reader should look: a finding, nothing written, cut or repeating."""
        return any(self.sums[name][0] for name in ("flagged", "empty", "repeats", "cut"))


# ------------------------------------------------------------------------------- runs of words


def word_runs(text: str) -> list[tuple[str, ...]]:
    """All runs of RUN words, in order, in lower case and without punctuation."""
    words = [word for word in TOKEN.findall(text.lower()) if word[0].isalnum()]
    return [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]


def copied_words(summary: str, note: str) -> tuple[int, int]:
    """(words in runs of at least RUN words that stand in the note, words)."""
    known = set(word_runs(note))
    runs = word_runs(summary)
    copied = {i + k for i, run in enumerate(runs) if run in known for k in range(RUN)}
    n_words = (
        len(runs) + RUN - 1 if runs else sum(word[0].isalnum() for word in TOKEN.findall(summary.lower()))
    )
    return len(copied), n_words


def new_runs(summary: str, note: str) -> tuple[set[tuple[str, ...]], int]:
    """(the summary's different runs that the note has not, how many different runs it has)."""
    runs = set(word_runs(summary))
    return runs - set(word_runs(note)), len(runs)


# ------------------------------------------------------------------------------- coverage


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


# ------------------------------------------------------------------------------- format


def marks(summary: str) -> set[str]:
    """What gives a summary its form: citations, headings by name, a list, several lines."""
    found = {
        f"heading {name}" for name in re.findall(r"^[ \t]{0,8}([A-Z][\w /-]{1,40}):", summary, re.MULTILINE)
    }
    found |= {"citations"} if has_citation(summary) else set()
    found |= {"list"} if re.search(r"^[ \t]{0,8}(?:[-*•]|\d{1,2}[.)])[ \t]", summary, re.MULTILINE) else set()
    return found | ({"lines"} if "\n" in summary.strip() else set())


def usual_marks(summaries: Iterable[str]) -> set[str]:
    """The marks of at least half of the summaries; empty: free text."""
    all_marks = [marks(summary) for summary in summaries]
    counts = Counter(mark for found in all_marks for mark in found)
    return {mark for mark, n in counts.items() if 2 * n >= len(all_marks)}


# ------------------------------------------------------------------------------- one summary


def make_scorer() -> Callable[[str, str], dict[str, float]]:
    """rouge(reference, summary) -> {"rouge1", "rouge2", "rougeL"}: F, with stems (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    return lambda reference, summary: {k: s.fmeasure for k, s in scorer.score(reference, summary).items()}


def _plain(text: str) -> str:
    """The words alone, to tell a copied sentence from a rewritten one."""
    return " ".join(re.findall(r"\w+", text.lower()))


def measure(
    row: Row,
    note: PreparedNote,
    result: Mapping,
    rouge: Callable,
    expected: set[str],
    version: int = SENTENCE_VERSION,
) -> Measured:
    """Everything that one summary tells alone. `expected`: the marks of its format; `version`: of the note's
    sentence numbers."""
    written = result["generated_summary"]
    summary = strip_citations(written)
    reference = strip_citations(row.model_summary)
    check = note.check(written)
    n_flagged = sum(sentence.flagged for sentence in check.sentences)
    known = _plain(row.clinical_note)
    rewritten = [s.flagged for s in check.sentences if _plain(written[s.start : s.end]) not in known]
    # In another language nothing is checked, and nothing is counted
    n_checked = len(check.sentences) if check.language == "en" else 0
    is_checked = float(check.language == "en" and bool(check.sentences))
    citations = parse_citations(written, row.clinical_note, version)
    n_valid = sum(not citation["missing"] for citation in citations)
    kinds = Counter(finding.kind for finding in check.findings)
    sentences = split_sentences(summary)
    sums = {
        "clean": ((n_flagged == 0) * is_checked, is_checked),
        "flagged": (n_flagged * is_checked, n_checked),
        "rewritten": (sum(rewritten) * is_checked, len(rewritten) * is_checked),
        "invented": (sum(kinds[kind] for kind in INVENTED) * is_checked, len(rewritten) * is_checked),
        "check_score": (check.score * is_checked, is_checked),
        "coverage": facts_held(reference, summary),
        "supported": (sum(s.supported_share >= _SUPPORTED for s in check.sentences), len(check.sentences)),
        "loss": (result.get("reference_loss", 0.0), result.get("n_reference_tokens", 0)),
        "length_ratio": (len(summary.split()), len(reference.split())),
        "copied": copied_words(summary, row.clinical_note),
        "format": (len(expected & marks(written)), len(expected)),
        "citations_valid": (n_valid, len(citations)),
        "citations_supporting": (max(0, len(citations) - kinds["citation"]), len(citations)),
        "empty": (float(not summary), 1),
        "repeats": (float(len(set(sentences)) < len(sentences) or result.get("finish_reason") == "loop"), 1),
        "cut": (float(result.get("finish_reason") == "length"), 1),
        "seconds": (result.get("seconds", 0.0), float("seconds" in result)),
    }
    sums |= {name: (value, 1) for name, value in rouge(reference, summary).items()}
    sums |= {f"finding_{kind}": (kinds[kind], n_checked) for kind in KINDS}
    return Measured(written, check, sums)


def add_memorized(
    measured: Mapping[str, Mapping[int, Measured]], rows: Mapping[int, Row], training: Sequence[Row]
) -> None:
    """Adds `memorized` to every summary. Of the training summaries only the runs that some summary has are
    held in memory."""
    found = {
        (system, number): new_runs(strip_citations(one.summary), rows[number].clinical_note)
        for system, summaries in measured.items()
        for number, one in summaries.items()
    }
    wanted = set().union(*(runs for runs, _ in found.values())) if training else set()
    known = {
        run for row in training for run in word_runs(strip_citations(row.model_summary)) if run in wanted
    }
    for (system, number), (runs, n_runs) in found.items():
        measured[system][number].sums["memorized"] = (len(runs & known), n_runs if training else 0)
