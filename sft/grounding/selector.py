"""A summary in the note's own words: which of a note's sentences a summary of this kind would use.

Ridge regression learns from training pairs what share of each note sentence's words the summary uses; rules
add what a reader must not miss and keep together what belongs together. Fitted in milliseconds; no torch."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from sft.grounding.cues import CUES, DOSE, MATTERS, cues_of
from sft.grounding.sentences import split_sentences
from sft.grounding.structure import Unit, is_next_item, read_units, shown_label, shown_question, topic_of
from sft.grounding.words import content_stems

_VERSION = 2  # 1 had more features
ENOUGH_KIN = 0.55  # of a training set's summary sentences: .73 on phase1_data, .27 on MTS-Dialog's dialogues
_COVERED = 0.65


@dataclass(frozen=True)
class Quoted:
    """A sentence of a summary in the note's own words."""

    text: str
    note_sentences: tuple[int, ...]  # 1-based


@dataclass(frozen=True)
class NotMentioned:
    """Something that a note holds and its summary lacks."""

    kind: str  # plan, drug, abnormal, problem or other
    text: str
    note_sentence: int


@dataclass(frozen=True)
class Selector:
    """What the training pairs taught: weights by feature, and how long a summary is."""

    weights: dict[str, float]
    bias: float
    base_words: float
    words_per_note_word: float
    most_words: float
    kinship: float  # share of summary sentences that three note sentences nearly cover
    supported: bool
    n_pairs: int

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Selector":
        """Raises ValueError for what is no selector of this version or an older one with more weights."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("version", None) not in (1, _VERSION):
            raise ValueError("not a selector of this version")
        try:
            if all(map(math.isfinite, ({**values, "weights": 0} | values["weights"]).values())):
                return Selector(**values)
        except (TypeError, KeyError, OverflowError):
            pass
        raise ValueError("not a selector: fields are missing, unknown or no numbers")

    def score(self, features: dict[str, float]) -> float:
        return self.bias + sum(self.weights.get(name, 0.0) * value for name, value in features.items())


class _Note:
    """A note's sentences by their number, what each speaks of, and its words."""

    def __init__(self, text: str):
        self.units = read_units(text)
        self.n_words = len(text.split())
        self.sentences = [unit for unit in self.units if unit.kind == "sentence"]
        self.stems = {unit.number: frozenset(content_stems(unit.text)) for unit in self.units}
        self.cues = {unit.number: cues_of(unit) for unit in self.sentences}
        labels = Counter(unit.label for unit in self.units if unit.label_number == unit.number)
        # That name neither a part of the note, as "Plan" does, nor who speaks again
        self.own_labels = {x for x, n in labels.items() if n == 1 and shown_label(x) and not topic_of(x)}

    def is_plan(self, unit: Unit) -> bool:
        """By its label or heading, or as one of a note's last bullets if these have none."""
        n = len(self.units)
        if unit.topic or not unit.listed or unit.heading >= n // 2 or unit.number <= n // 2:
            return "plan" in unit.topic
        # Of bullets that make up the whole note only some are its plan
        is_last = any(unit.listed == last.listed for last in self.units[-3:])
        is_plan = is_last and (unit.listed > n // 3 or "action" in self.cues[unit.number])
        return is_plan and "others" not in self.cues[unit.number]

    def heading(self, unit: Unit) -> Unit | None:
        return self.units[unit.heading - 1] if unit.heading else None

    def features(self) -> list[dict[str, float]]:
        """The same numbers for every sentence, by name."""
        count = Counter(word for words in self.stems.values() for word in words)
        rows = []
        for i, unit in enumerate(self.sentences):
            stems = self.stems[unit.number]
            row = {
                "first": float(i == 0),
                "place": i / len(self.sentences),
                "very short": float(len(stems) < 3),
                "number": float(any(word[0].isdigit() for word in stems)),
                "recurs": sum(count[word] > 1 for word in stems) / max(len(stems), 1),
            }
            rows.append(row | {f"cue {name}": float(name in self.cues[unit.number]) for name in CUES})
        return rows


def fit_selector(pairs: Iterable[tuple[str, str]]) -> Selector:
    """Learns from (note, summary) pairs; without any sentence, a selector that is not supported."""
    import numpy

    rows, targets, lengths, covered = [], [], [], []
    for text, summary in pairs:
        note = _Note(text)
        used = set(content_stems(summary))
        rows += note.features()
        targets += [len(words & used) / max(len(words), 1) for words in map(note.stems.get, note.cues)]
        sources = {unit.number: set(content_stems(f"{unit.label} {unit.text}")) for unit in note.units}
        for words in (set(content_stems(sentence)) for sentence in split_sentences(summary)):
            covered += (
                [len(cover(words, sources)[1]) <= (1 - _COVERED) * len(words)] if len(words) > 2 else []
            )
        lengths.append((note.n_words, len(summary.split())))
    if not rows:
        return Selector({}, 0.0, 60.0, 0.0, 60.0, 0.0, False, len(lengths))
    names = list(rows[0])
    x = numpy.array([[row[name] for name in names] for row in rows])
    y = numpy.array(targets)
    mean = x.mean(axis=0)
    deviation = x.std(axis=0) + 1e-9
    z = (x - mean) / deviation
    weights = numpy.linalg.solve(z.T @ z + 20.0 * numpy.eye(len(names)), z.T @ (y - y.mean())) / deviation
    # A line through the training lengths, level where no training summary is longer
    n_note, n_summary = numpy.array(lengths, dtype=float).T
    slope = max(0.0, float(numpy.cov(n_note, n_summary, bias=True)[0, 1] / (n_note.var() + 1e-9)))
    kinship = sum(covered) / max(len(covered), 1)
    return Selector(
        weights={name: round(float(weight), 5) for name, weight in zip(names, weights, strict=True)},
        bias=round(float(y.mean() - mean @ weights), 5),
        base_words=round(float(n_summary.mean() - slope * n_note.mean()), 2),
        words_per_note_word=round(slope, 4),
        most_words=round(float(numpy.percentile(n_summary, 98)), 1),
        kinship=round(kinship, 3),
        supported=kinship >= ENOUGH_KIN,
        n_pairs=len(lengths),
    )


def quote(note: str, selector: Selector) -> list[Quoted]:
    """The summary of `note` in its own sentences, in the note's order."""
    read = _Note(note)
    return _render(read, sorted(_choose(read, selector)))


def not_mentioned(note: str, summary_sentences: Iterable[str]) -> list[NotMentioned]:
    """Plans, drugs with a dose, abnormal results, problems and, last, other things that the summary lacks."""
    missing = _missing(_Note(note), set(content_stems(" ".join(summary_sentences))), with_others=True)
    return sorted(missing, key=lambda one: one.kind == "other")


def _missing(note: _Note, said: set[str], with_others: bool = False) -> list[NotMentioned]:
    """The same, of a note that is read, with the stems of what the summary says."""
    listed = []
    for unit in note.sentences:
        stems, cues = note.stems[unit.number], note.cues[unit.number]
        is_new = len(stems & said) < 0.4 * len(stems)
        # "INR today: 5.8" says nothing without its label
        is_labeled = unit.label_number == unit.number and unit.label in note.own_labels
        if "courtesy" in cues:
            continue
        if any(not set(content_stems(drug)) & said for drug in DOSE.findall(unit.text)):
            kind = "drug"
        elif is_new and note.is_plan(unit) and "action" in cues and not _is_routine(note, unit):
            kind = "plan"
        elif is_new and cues & {"finding", "abnormal"} and any(word[0].isdigit() for word in stems - said):
            kind = "abnormal"
        elif is_new and unit.topic == "diagnosis":
            kind = "problem"
        elif not with_others or "others" in cues or _is_routine(note, unit):
            continue
        elif is_new and len(stems) + is_labeled > 1:
            kind = "other"
        else:
            continue
        text = f"{shown_label(unit.label)}: {unit.text}" if is_labeled else unit.text
        listed.append(NotMentioned(kind, text, unit.number))
        # What is said twice is missing once
        said = said | stems
    return listed


def cover(wanted: set[str], words: dict[int, set[str]]) -> tuple[list[int], set[str]]:
    """Up to three note sentences that hold most of the words, and the words that none of them holds."""
    left = wanted
    numbers = []
    for _ in range(3):
        best = max(words, key=lambda number: (len(words[number] & left), -len(words[number])), default=0)
        # One word more is no reason for one sentence more
        if not best or len(words[best] & left) < (2 if numbers else 1):
            break
        numbers.append(best)
        left = left - words[best]
    return sorted(numbers), left


def _choose(note: _Note, selector: Selector) -> set[int]:
    """The numbers of the sentences that the summary quotes."""
    # A problem that is listed, and heads its plan below, is said there
    headings = {note.stems[unit.number] for unit in note.units if unit.kind == "heading"}
    scores = {
        unit.number: selector.score(row)
        for unit, row in zip(note.sentences, note.features(), strict=True)
        if "courtesy" not in note.cues[unit.number] and note.stems[unit.number] not in headings
    }
    budget = min(selector.base_words + selector.words_per_note_word * note.n_words, selector.most_words)
    n_words = {unit.number: len(f"{unit.label} {unit.text}".split()) for unit in note.sentences}
    groups = {number: group for number in scores if (group := _group(note, number))}
    chosen, said = set(), set()

    def repeats(number: int) -> float:
        return len(note.stems[number] & said) / max(len(note.stems[number]), 1)

    def fits(number: int, room: float) -> bool:
        words = sum(n_words[k] for k in groups[number] | chosen)
        is_short = words <= min(room * budget, 1.35 * selector.most_words)
        # What is denied, stopped or under a label of its own is said only where all of it is
        is_more = note.cues[number] & {"negation", "done"} or note.units[number - 1].label in note.own_labels
        is_said = repeats(number) >= 0.8 and not (is_more and not _is_in_another(note, number, chosen))
        return number not in chosen and is_short and not is_said

    def add(number: int) -> None:
        chosen.update(groups[number])
        said.update(word for k in groups[number] for word in note.stems[k])

    for number in _required(note, scores):
        if number in groups and (fits(number, 1.5) or not chosen):
            add(number)
    reasons = {u.number for u in note.sentences if u == note.sentences[0] or u.topic == "reason"}
    chosen -= {number for number in reasons & chosen if _is_in_another(note, number, chosen)}
    for missing in _missing(note, said):
        if missing.note_sentence in groups and fits(missing.note_sentence, 1.5):
            add(missing.note_sentence)
    # The budget ends this after at most as many rounds as a summary has sentences
    waiting = {u.number for u in note.sentences if u.number in groups and not _is_routine(note, u)}
    room = {n: 1.3 if note.cues[n] & MATTERS else 1.1 for n in waiting}
    while waiting := {n for n in waiting if fits(n, room[n])}:
        add(max(waiting, key=lambda number: (scores[number] - 0.3 * repeats(number), -number)))
    # "Fluid: pH 7.2. Culture sent.": the label of one thing comes with it
    labeled = {u.label_number for u in note.sentences if u.number in chosen and u.label in note.own_labels}
    for number in sorted(labeled & groups.keys()):
        if len(note.stems[number]) > 1 and fits(number, math.inf):
            add(number)
    return chosen


def _is_in_another(note: _Note, number: int, chosen: Collection[int]) -> bool:
    """Whether a sentence says it all: "Chief complaint: Knee pain." before "She presents with ...". What is
    denied or stopped says something else."""

    def says(k: int) -> tuple[set[str], frozenset[str]]:
        unit = note.units[k - 1]
        label = unit.label if unit.label in note.own_labels else ""
        return {*note.stems[k], *content_stems(label)}, note.cues[k] & {"negation", "done"}

    words, state = says(number)
    others = (says(k) for k in chosen if k != number)
    return any(words <= known and state == known_state for known, known_state in others)


def _required(note: _Note, scores: dict[int, float]) -> list[int]:
    """What a reader must not miss, then the plan, then what matters next."""
    sentences = [u for u in note.sentences if u.number in scores and u.topic not in ("family", "review")]
    # Of the patient, and of now
    told = [u for u in sentences if note.cues[u.number].isdisjoint(("others", "trivia"))]
    plans = [u for u in sentences if note.is_plan(u) and not _is_routine(note, u)]
    planned = set(plans)
    reported = [u for u in told if u not in planned]

    def about(units: Collection[Unit], cues: str) -> list[Unit]:
        return [u for u in units if not note.cues[u.number].isdisjoint(cues.split())]

    def best(units: Collection[Unit], n: int = 1, first: str = "") -> list[Unit]:
        ahead = set(about(units, first))
        return sorted(units, key=lambda u: (u not in ahead, -scores[u.number], u.number))[:n]

    def of_topic(topic: str) -> list[Unit]:
        return [u for u in sentences if u.topic == topic]

    present = {u for u in told if "negation" not in note.cues[u.number]}
    findings = best(about(present, "diagnosis finding disease"), 2)
    tests = about(about(told, "test"), "disease finding abnormal")
    tested = best([u for u in tests if u in present] or tests)
    came = set(about(told[: max(4, len(told) // 3)], "presentation"))
    first_told = best([u for u in came if len(note.stems[u.number]) > 3], 2)
    # Short ones first: more is said
    todo = plans or about(told[len(told) // 3 :], "action done dose")
    # For each problem of a plan its treatment, else what is to be done, else what it says
    of_problems = [u for u in plans if u.heading and not note.units[u.heading - 1].topic]
    treatments = about([u for u in of_problems if u.topic == "plan"], "action")
    by_worth = best(treatments, len(plans), "dose") + best(of_problems, len(plans), "action")
    for_problems = {u.heading: u for u in reversed(by_worth)}
    required = [
        *[u for u in sentences[:1] if not u.asked],
        *[u for u in sentences if u.names_patient][:1],
        *[u for u in of_topic("reason") if u.label_number == u.number][:1],
        *about(sentences, "correction"),
        *best(of_topic("operation"), first="disease"),
        *best(of_topic("diagnosis"), first="disease"),
        *best(of_topic("result"), first="disease"),
        *for_problems.values(),
        *best(about(told, "diagnosis")),
        *best(about(plans, "action"), 3, first="procedure dose"),
        *(tested or findings[:1]),
        *best(about(reported[1:], "procedure"), 2),
        *first_told[:1],
        *sorted(about(todo, "action dose"), key=lambda u: len(u.text)),
        *best(about(reported, "abnormal")),
        *best([u for u in about(reported, "done") if u in present and u not in came]),
        *best(about(sentences, "warning")),
        *sorted(todo, key=lambda u: len(u.text)),
        *findings,
        *first_told,
        *best(about(sentences, "warning"), 2),
        *best(about(reported, "abnormal"), 2),
        # What a note ends with is often its plan
        *[u for u in told[-2:] if not u.needs],
    ]
    return [u.number for u in required]


def _is_routine(note: _Note, unit: Unit) -> bool:
    """What else was asked or found normal, in a section for that; what is no medicine."""
    cues = note.cues[unit.number]
    # "Tender, no mass" and "no rash; power 2/5" are found, "no tender mass" is not
    begins = [CUES["negation"].split(clause, maxsplit=1)[0] for clause in re.split("; | but ", unit.text)]
    tells = any(re.search(r"\d", c) or CUES["finding"].search(c) or CUES["disease"].search(c) for c in begins)
    is_denied = "negation" in cues and not tells
    is_plain = unit.topic == "exam" and (is_denied or len(note.stems[unit.number]) < 3)
    head = note.heading(unit)
    is_listed = head and head.topic in ("review", "family", "drugs")
    return bool("trivia" in cues or is_plain or is_listed)


def _group(note: _Note, number: int) -> set[int]:
    """The sentence with those it refers back to; empty if these cannot be quoted."""
    group = set()
    while number and not (group and "trivia" in note.cues.get(number, ())):
        unit = note.units[number - 1]
        # "Handing over bed 6? Yes." only starts the talk
        is_empty = unit.asked and len(unit.text.split()) < 2 and not shown_question(note.units, unit)
        if unit.kind != "sentence" or is_empty or len(group) > 2:
            return set()
        group.add(number)
        number = unit.needs
    last = note.units[max(group) - 1]
    # The other bullets of a short list under a label of its own, "Given:": one of a few would mislead
    if last.listed and last.heading == last.listed - 1 and "plan" not in last.topic:
        items = [u for u in note.units[last.heading : last.heading + 7] if u.listed == last.listed]
        if len(items) < 6 and sum(len(u.text.split()) for u in items) <= 24:
            group |= {u.number for u in items if u.kind == "sentence"}
    return group


def _render(note: _Note, numbers: list[int]) -> list[Quoted]:
    """The chosen sentences as a reader wants them: each under its heading, label or question once."""
    quoted, shown, last = [], [], None
    for number in numbers:
        unit = note.units[number - 1]
        head = note.heading(unit)
        heads = [(unit.asked, shown_question(note.units, unit))]
        heads += [(head.number, shown_label(head.text))] if head else []
        heads += [(unit.label_number, shown_label(unit.label))]
        heads = sorted((n, text) for n, text in heads if text)
        # Leaving a problem: what is said next is no longer about it
        was_problem = any(
            note.units[n - 1].kind == "heading" and not note.units[n - 1].topic for n, _ in shown
        )
        if head and not heads and was_problem:
            heads = [(head.number, head.text.rstrip(": ").capitalize())]
        is_item = is_next_item(note.units, unit, last)
        last = unit
        new = [pair for pair in heads if pair not in shown]
        shown = heads
        # "CT KUB. Clinical details: left loin pain."
        before = ". ".join(text for _, text in new).replace("?.", "?")
        text = f"{before}{' ' if before.endswith('?') else ': '}{unit.text}" if before else unit.text
        text = text[0].upper() + text[1:] if text[:2].islower() and not is_item else text
        text = text if re.search(r"[.!?…][\"”'’)]*$", text) else text.rstrip(" ,;:") + "."
        sources = {n for n, _ in new} | {number}
        # Alone, "Syncope." would say the opposite of "She denies:"
        if is_item:
            text = f"{quoted[-1].text.rstrip('.')}; {text}"
            sources |= set(quoted.pop().note_sentences)
        quoted.append(Quoted(text, tuple(sorted(sources))))
    return quoted
