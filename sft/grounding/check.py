"""Is it true? Compares every sentence of a summary with its note, by rules that can be read and explained.

Three things are compared. *Place*: for a side, a number, a time, a relative, the content words around it
point to places in the note; what stands there must be the same (that the note holds it somewhere says
little). *What holds* for a word: denied or not, certain or not, the patient's or a relative's. *Wording*:
words that the note lacks, words said more often than there, words joined that it keeps apart, breaks between
runs of its words. Each sentence gets one sum, its risk; a summary's risk is the sum over its different
sentences. What the note says itself, as a whole sentence or line, has none. Time is linear in the length of
the texts."""

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from sft.grounding.citations import Citation, find_citations
from sft.grounding.places import NotePlaces, pairs
from sft.grounding.reading import Text
from sft.grounding.rules import RULES, WEIGHT, Finding, Sentence
from sft.grounding.sentences import SENTENCE_VERSION
from sft.grounding.words import detect_language, is_content, is_telling

# The sums from which a sentence of a summary is flagged, and, stricter, one of a training summary
FLAG_THRESHOLD = 1.55
TRAINING_THRESHOLD = 3.0

# What a sentence's wording adds, fitted by hand to the judged set and to phase1's true and changed sentences.
# Clinicians' long sentences join many facts in words of their own: the more content words a sentence has, the
# less each of these counts, by _LENGTH
_MISSING = 0.35  # for a word that the note lacks
_MISSING_IN_DIALOGUE = 0.2  # ... of a dialogue, whose everyday words become clinical ones
_REPEATED = 0.7  # for a word or number said more often than in the note: small models fall into loops
_POLARITY = 0.2  # for a word that the note affirms where the summary denies it, or the other way round
_GAP = 0.12  # for two words joined that the note keeps apart
_BREAK = 0.02  # for two words that do not follow each other in the note, or one that every summary uses
_LENGTH = 10
_TELLING = 0.5  # the weight of a finding that says something of itself
_NEAR = 6  # tokens


@dataclass
class CheckedSentence:
    """A sentence of the summary; `support` holds 1-based numbers of note sentences, best first."""

    start: int
    end: int
    support: list[int]
    risk: float = 0.0
    flagged: bool = False


@dataclass
class Check:
    """What was found. `score`: 1 is nothing, and it falls with `risk`, a sum over the summary."""

    risk: float = 0.0
    sentences: list[CheckedSentence] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    language: str = "en"

    @property
    def score(self) -> float:
        return math.exp(-self.risk / 4)


def check_summary(clinical_note: str, model_summary: str, *, threshold: float = FLAG_THRESHOLD) -> Check:
    """Checks one summary against its note; for several summaries of one note, see PreparedNote."""
    return PreparedNote(clinical_note).check(model_summary, threshold)


class PreparedNote:
    """A note, read once. `sentence_version`: of the numbers of its sentences."""

    def __init__(self, clinical_note: str, sentence_version: int = SENTENCE_VERSION):
        self._note = NotePlaces(clinical_note, sentence_version)
        self._language = detect_language(clinical_note)

    def check(self, model_summary: str, threshold: float = FLAG_THRESHOLD) -> Check:
        """The risk of each sentence, and what was found where it reaches `threshold`. Texts in another
        language than English get neither."""
        citations = list(find_citations(model_summary))
        characters = list(model_summary)
        # Citations are not the summary's words; spaces keep the positions
        for start, end, *_ in citations:
            characters[start:end] = " " * (end - start)
        text = "".join(characters)
        language = self._language if self._language != "en" else detect_language(text)
        result = Check(language=language)
        summary = Text(text)
        cited = _citation_findings(self._note, model_summary, summary, citations)
        risks = {}
        for first, last in summary.ranges:
            if first == last:
                continue
            sentence = Sentence(self._note, summary, first, last)
            checked = _support(sentence)
            if language == "en":
                found = [finding for finding in cited if checked.start <= finding.start < checked.end]
                checked.risk = _risk(sentence, found)
                checked.flagged = checked.risk >= threshold
                result.findings += sorted(found, key=lambda one: one.start) if checked.flagged else []
            result.sentences.append(checked)
            risks[" ".join(summary.words[first:last]).rstrip(" .")] = checked.risk
        # What is said again counts once
        result.risk = sum(risks.values())
        return result


def _risk(sentence: Sentence, found: list[Finding]) -> float:
    """The sum of a sentence; adds the findings that a reader is shown if it is flagged to `found`."""
    if sentence.is_quoted():
        return sum(finding.weight for finding in found)
    for rule in RULES:
        found += rule(sentence)
    wording, risk = _wording(sentence)
    risk += sum(finding.weight for finding in found + wording)
    # A single word that the note lacks is shown only where nothing else explains a flag
    is_explained = any(finding.weight >= _TELLING for finding in found)
    found += [one for one in wording if one.weight >= _TELLING or not is_explained]
    return risk


def _wording(sentence: Sentence) -> tuple[list[Finding], float]:
    """Findings for words that the note lacks, keeps apart or says less often; the risk of the rest."""
    note, summary = sentence.note, sentence.summary
    words = [index for index in range(sentence.first, sentence.last) if is_content(summary.words[index])]
    telling = {index for index in words if is_telling(summary.words[index])}
    spelled_out = note.spelled_out(summary, sentence.first, sentence.last)
    known = spelled_out.union(index for index in words if note.has(summary, index))
    weight = _MISSING_IN_DIALOGUE if note.is_dialogue else _MISSING
    findings = []
    for is_known, row in groupby(words, key=known.__contains__):
        missing = [] if is_known else [index for index in row if index in telling]
        if missing:
            findings.append(
                sentence.finding("unsupported", missing[0], missing[-1], weight=weight * len(missing))
            )
    for before, index in pairwise(sorted(telling & known)):
        places, others = note.of(summary.stems[before]), note.of(summary.stems[index])
        is_near = any(abs(place - other) <= _NEAR for place in places for other in others)
        # A word that the note holds in a short form alone has no place there
        if index - before <= 3 and places and others and not is_near:
            findings.append(sentence.finding("misplaced", before, index, weight=_GAP))
    findings += _repeated(sentence, sorted(telling - spelled_out))
    n_breaks = sum(pair not in note.pairs for pair in pairs(summary, sentence.first, sentence.last))
    risk = _BREAK * (n_breaks + len(set(words) - known - telling))
    # Words that stand nowhere in the note as here, denied or not
    states = (({note.text.denied[at] for at in note.of(summary.stems[i])}, summary.denied[i]) for i in words)
    risk += _POLARITY * sum(in_note == {not denied} for in_note, denied in states if denied is not None)
    scale = 2 * _LENGTH / (_LENGTH + len(words))
    for finding in findings:
        finding.weight *= scale
    return findings, risk * scale


def _repeated(sentence: Sentence, telling: list[int]) -> list[Finding]:
    """A finding for each telling word or number that comes again, and oftener than in the note."""
    note, stems = sentence.note, sentence.summary.stems
    items = [(stems[index], index, index, len(note.of(stems[index]))) for index in telling]
    for quantity in sentence.quantities():
        if not quantity.is_implied:
            items.append(
                (quantity.values, quantity.index, quantity.last, len(note.quantities.matches(quantity)))
            )
    said: Counter = Counter()
    findings = []
    for key, first, last, n_in_note in items:
        said[key] += 1
        if said[key] > max(1, n_in_note):
            findings.append(sentence.finding("unsupported", first, last, weight=_REPEATED))
    return findings


def _support(sentence: Sentence) -> CheckedSentence:
    """The note sentences that hold most of the sentence's words, rare words counting more."""
    note, summary = sentence.note, sentence.summary
    votes: Counter[int] = Counter()
    stems = [word_stem for word_stem in summary.stems[sentence.first : sentence.last] if word_stem]
    for word_stem in dict.fromkeys(stems):
        numbers = {note.text.sentence_of[place] + 1 for place in note.of(word_stem)}
        for number in numbers:
            votes[number] += 1 / len(numbers)
    support = sorted(votes, key=lambda number: (-votes[number], number))[:3]
    return CheckedSentence(summary.spans[sentence.first][0], summary.spans[sentence.last - 1][1], support)


def _citation_findings(
    note: NotePlaces, model_summary: str, summary: Text, citations: list[Citation]
) -> list[Finding]:
    """Citations whose sentences hold few of the claim's words that the note has, or do not exist."""
    findings = []
    position = 0
    for citation in citations:
        first = position
        while position < len(summary.spans) and summary.spans[position][0] < citation.start:
            position += 1
        numbers = {number - 1 for number in citation.numbers}
        known = [stem for stem in set(summary.stems[first:position]) if stem in note.places]
        n_cited = sum(any(note.text.sentence_of[at] in numbers for at in note.of(stem)) for stem in known)
        is_wrong = len(known) >= 2 and n_cited < 0.34 * len(known)
        is_missing = any(not 0 <= number < len(note.text.ranges) for number in numbers)
        if position > first and numbers and (is_wrong or is_missing):
            start, end = summary.spans[first][0], summary.spans[position - 1][1]
            says = model_summary[citation.start : citation.end]
            findings.append(Finding("citation", start, end, says, weight=WEIGHT))
    return findings
