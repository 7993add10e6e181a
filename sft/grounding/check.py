"""Is it true? Compares every sentence of a summary with its note, by rules that can be read and explained.

Three things are compared. *Place*: for a side, a number, a time, a relative, the content words around it
point to places in the note; what stands there must be the same (that the note holds it somewhere says
little). *What holds* for a word: denied or not, certain or not, the patient's or a relative's. *Wording*:
words that the note lacks, words joined that it keeps apart, breaks between runs of its words. Each sentence
gets one sum, its risk; a summary's risk is the sum over its sentences. Time is linear in the length of the
texts.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from sft.grounding.places import NotePlaces, pairs
from sft.grounding.reading import Text
from sft.grounding.rules import RULES, Finding, Sentence, drug_findings
from sft.grounding.words import detect_language, is_content, is_telling

# The sums from which a sentence of a summary is flagged, and, stricter, one of a training summary
FLAG_THRESHOLD = 1.6
TRAINING_THRESHOLD = 2.45

_MISSING = 0.3  # for a word that the note lacks
_MISSING_REPORT = 0.02  # ... if it is one of those with which every summary reports
_MISSING_VERB = 0.12  # ... if it looks like a verb
_GAP = 0.15  # for two words joined that the note keeps apart
_BREAK = 0.008  # for two words that do not follow each other in the note
_TELLING = 0.5  # the weight of a finding that says something of itself
_NEAR = 6  # tokens
_APART = 16
_CITED_RANGE = re.compile(r"(\d{1,9})(?:\s?[–-]\s?S?(\d{1,9}))?", re.IGNORECASE)
_CITED = re.compile(r"\[\s*evidence[^\[\]]{0,400}\]?", re.IGNORECASE)


@dataclass
class CheckedSentence:
    """A sentence of the summary; `support` holds 1-based numbers of note sentences, best first."""

    start: int
    end: int
    support: list[int]
    supported_share: float
    risk: float
    flagged: bool


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


def check_summary(
    clinical_note: str,
    model_summary: str,
    *,
    threshold: float = FLAG_THRESHOLD,
    generic_name: Callable[[str], str | None] | None = None,
) -> Check:
    """Checks one summary against its note; for several summaries of one note, see PreparedNote."""
    return PreparedNote(clinical_note, generic_name).check(model_summary, threshold)


class PreparedNote:
    """A note, read once.

    `generic_name`: a function from a word in lower case to the generic name of this drug, None for any other
    word; without it, drugs are known by their endings alone.
    """

    def __init__(self, clinical_note: str, generic_name: Callable[[str], str | None] | None = None):
        self._note = NotePlaces(clinical_note)
        self._language = detect_language(clinical_note)
        self._generic_name = generic_name
        self._drugs = set(map(generic_name, self._note.words)) if generic_name else set()

    def check(self, model_summary: str, threshold: float = FLAG_THRESHOLD) -> Check:
        """The findings and the risk of each sentence. Texts in another language than English get none."""
        # Citations are not the summary's words; spaces keep the positions
        text = _CITED.sub(lambda match: " " * len(match.group()), model_summary)
        language = self._language if self._language != "en" else detect_language(text)
        result = Check(language=language)
        summary = Text(text)
        cited = self._citation_findings(model_summary, summary) if language == "en" else []
        for first, last in summary.ranges:
            if first == last:
                continue
            sentence = Sentence(self._note, summary, first, last)
            checked = self._support(sentence)
            if language == "en":
                start, end = checked.start, checked.end
                found = [finding for finding in cited if start <= finding.start < end]
                checked.risk = self._risk(sentence, found, threshold)
                checked.flagged = checked.risk >= threshold
                result.findings += sorted(found, key=lambda finding: finding.start)
            result.risk += checked.risk
            result.sentences.append(checked)
        return result

    def _risk(self, sentence: Sentence, found: list[Finding], threshold: float) -> float:
        """The sum of a sentence; adds the findings that say something of themselves to `found`."""
        for rule in RULES:
            found += rule(sentence)
        drugs = list(drug_findings(sentence, self._generic_name, self._drugs))
        found += drugs
        wording, risk = self._wording(sentence)
        wording = [
            one
            for one in wording
            if not any(one.start <= drug.start and drug.end <= one.end for drug in drugs)
        ]
        risk += sum(finding.weight for finding in found + wording)
        # A single word that the note lacks is shown only where nothing else explains a flag
        is_explained = risk < threshold or any(finding.weight >= _TELLING for finding in found)
        found += [one for one in wording if one.weight >= _TELLING or not is_explained]
        return risk

    def _wording(self, sentence: Sentence) -> tuple[list[Finding], float]:
        """Findings for words that the note lacks and for words that it keeps apart; the risk of the rest."""
        note, summary = self._note, sentence.summary
        spelled_out = note.spelled_out(summary, sentence.first, sentence.last)
        findings = []
        missing: list[int] = []
        risk = 0.0
        before = None
        for index in range(sentence.first, sentence.last):
            word = summary.words[index]
            if not is_content(word):
                continue
            if index in spelled_out or note.has(summary, index):
                findings += _missing(sentence, missing)
                missing = []
                if not is_telling(word):
                    continue
                if before is not None and index - before <= 3:
                    distance = note.distance(summary.stems[before], summary.stems[index])
                    if distance > _NEAR:
                        weight = _GAP if distance > _APART else _GAP / 2
                        findings.append(sentence.finding("misplaced", before, index, weight))
                before = index
            elif is_telling(word):
                missing.append(index)
            else:
                risk += _MISSING_REPORT
        findings += _missing(sentence, missing)
        risk += _BREAK * sum(pair not in note.pairs for pair in pairs(summary, sentence.first, sentence.last))
        return findings, risk

    def _support(self, sentence: Sentence) -> CheckedSentence:
        """The note sentences that hold most of the sentence's words, rare words counting more."""
        note, summary = self._note, sentence.summary
        votes: Counter[int] = Counter()
        stems = [summary.stems[i] for i in range(sentence.first, sentence.last) if summary.stems[i]]
        for word_stem in dict.fromkeys(stems):
            numbers = {note.text.sentence_of[place] for place in note.of(word_stem)}
            for number in numbers:
                votes[number] += 1 / len(numbers)
        share = sum(word_stem in note.places for word_stem in stems) / len(stems) if stems else 1.0
        start, end = summary.spans[sentence.first][0], summary.spans[sentence.last - 1][1]
        support = [
            number + 1 for number, _ in sorted(votes.items(), key=lambda vote: (-vote[1], vote[0]))[:3]
        ]
        return CheckedSentence(start, end, support, share, 0.0, False)

    def _citation_findings(self, model_summary: str, summary: Text) -> list[Finding]:
        """Citations whose sentences hold few of the claim's words that the note has, or do not exist."""
        findings = []
        position = 0
        for match in _CITED.finditer(model_summary):
            numbers = _cited_numbers(match.group())
            stems = set()
            first = position
            while position < len(summary.spans) and summary.spans[position][0] < match.start():
                stems.add(summary.stems[position])
                position += 1
            known = [word_stem for word_stem in stems if word_stem in self._note.places]
            cited = 0
            for word_stem in known:
                cited += any(self._note.text.sentence_of[at] in numbers for at in self._note.of(word_stem))
            is_wrong = len(known) >= 2 and cited < 0.34 * len(known)
            is_missing = any(not 0 <= number < len(self._note.text.sentences) for number in numbers)
            if position > first and numbers and (is_wrong or is_missing):
                start, end = summary.spans[first][0], summary.spans[position - 1][1]
                findings.append(Finding("citation", start, end, match.group(), weight=1.0))
        return findings


def _cited_numbers(citation: str) -> set[int]:
    """ "[Evidence: S1,3-5; Conf: 0.9]" -> the sentences 0, 2, 3, 4."""
    ends = _CITED_RANGE.findall(citation.partition(";")[0])
    return {number - 1 for a, b in ends for number in range(int(a), min(int(b or a), int(a) + 1000) + 1)}


def _missing(sentence: Sentence, indices: list[int]) -> list[Finding]:
    """One finding for words in a row that the note lacks."""
    if not indices:
        return []
    words = [sentence.summary.words[index] for index in indices]
    weight = sum(_MISSING_VERB if word.endswith(("ing", "ed", "ly")) else _MISSING for word in words)
    return [sentence.finding("unsupported", indices[0], indices[-1], weight)]
