"""A summary in the note's own words: which of a note's sentences a summary of this kind would use.

Ridge regression learns from training pairs what share of each note sentence's words the summary uses; rules
add what a reader must not miss and keep together what belongs together. Fitted in milliseconds; no torch.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from sft.grounding.structure import Unit, content_stems, read_units, shown_label, topic_of

_VERSION = 1
_DISEASE = (
    r"\b(?:\w{3,}(?:itis|oma|osis|a?emia|opathy|rrhage|plegia|ectomy|otomy)|perforat\w+|ulcer\w*|bleed\w*|bled|"
    r"tumou?r|mass|ruptur\w+|thromb\w+|embol\w+|infarct\w*|stones?|calcul(?:us|i)|abscess|obstruct\w+|"
    r"infect\w+|stroke|dissection|seizure|arrest|hernia|cancer|malignan\w+|syndrome|deliri\w+|fracture\w*|effusion|"
    r"tear|overdose|rash|erythema|o?edema|nodules?|lump|pneumonia|haematoma|wound|DVT|pancreat\w+)\b"
)
_CUES = {
    "plan": r"\b(?:plan|continue|follow|review|refer|repeat|tomorrow|weeks?|months?|again|check|await|discharge|clinic|recheck|return|to be|"
    r"will|advi[sc]e|book|r/v|f/u|if|monitor|pending|due|arrange|[1-9]/(?:7|52|12))\b",
    "treatment": r"\b(?:\d+(?:\.\d+)?\s?(?:mg|mcg|micrograms?|g|ml|units?|puffs?|l)|started?|stopped|given|gave|treated|"
    r"tablets?|iv|im|po|od|bd|tds|qds|daily|increased?|changed|switch(?:ed)?|held|hold)\b",
    "diagnosis": r"\b(?:diagnos\w+|consistent|likely|probabl[ey]|possibl[ey]|suggest\w*|confirmed|excluded?|imp|impression|"
    r"conclusion|suspect\w*|shows?|secondary to|due to)\b|\?\w",
    "person": r"\b\d{1,3}\s?(?:-year|yo\b|y/o|[mf]\b|y\b)|\b(?:man|woman|boy|girl|baby|male|female|lady|gentleman)\b",
    "negation": r"\b(?:no|not|denies|denied|without|never|nil|none|neg(?:ative)?)\b",
    "others": r"\b(?:mother|father|mum|dad|sister|brother|son|daughter|wife|husband|partner|cousin|aunt|uncle|neighbour|"
    r"neighbor|cat|dog|lives|works|smok\w+|alcohol|drives|retired|school|holiday)\b",
    "tests": r"\b(?:ct|mri|x-?ray|cxr|ecg|echo|biopsy|hb|crp|wcc|na|k|creat\w*|lactate|culture|scan|ultrasound|bp|hr|rr|"
    r"spo2|sats|temp|t)\b",
    "presentation": r"\b(?:admitted|presents?|presented|presenting|came|found|complain\w*|c/o|history of|referred|seen|"
    r"day \d+|fell|fall|pain|after|since|collapsed|found)\b",
    "finding": r"\b(?:positive|new|raised|elevated|low|high|moderate|severe|large|lesion|fracture|effusion|tear|"
    r"tender|worse|swelling|weak\w*|drowsy|confus\w+|reduced|rose|fell|cm|mm)\b|POS|↑|↓|->",
    "normal": r"\b(?:normal|fine|intact|clear|well|unremarkable|satisfactory|equal|soft|settled)\b",
    "decision": r"\b(?:wants?|declin\w+|agreed?s?|prefers?|undecided|accept\w*|refus\w+|consent\w*|dnacpr|not for)\b",
    "past": r"(?<!/)\b(?:(?:19|20)\d\d|last (?:week|month|year|season|winter|summer)|years ago|as a child|previous\w*|old|childhood)\b",
    "disease": _DISEASE,
    "procedure": r"\b(?:laser|biops(?:y|ies|ied)|surgery|drained?|stent(?:ed)?|repair(?:ed)?|excis\w+|inject(?:ed|ion)|"
    r"(?:in|ex)tubat\w+|transfus\w+|thrombolys\w+|dialys\w+|aspirat\w+|closed|sutur\w+|removed|\w+ectomy|\w+plasty)\b",
    "trivia": r"\b(?:lovely|nice|kind|grumbles?|supple|football|cardigan|flight|cruise|holiday|leaflet|enclosed|insurer|grateful|pleasant|parking|biscuits?|tea|photographs?|incidentally|sends?)\b",
}
_CUES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _CUES.items()}
_TOPICS = ("plan", "diagnosis", "reason", "result", "operation", "family", "review")
_ENOUGH_KIN = 0.55  # of a training set's summary sentences; .75 on invented notes, .36 on dialogues
_COVERED = 0.65
_DRUG = re.compile(
    r"\b(?!about|nearly|around|roughly|another|under|daily|twice)([A-Za-z][a-z-]{4,})(?:\s[A-Z]{2})?\s+\d+(?:\.\d+)?\s?(?:mg|mcg|micrograms?|g|units?|puffs?)\b(?!/)"
)
_ABNORMAL = re.compile(
    r"\b(?:elevated|raised|abnormal|low|high|reduced|positive|critical|deranged)\b", re.IGNORECASE
)
_DIRECTIVE = re.compile(
    r"\b(?:will|start|stop|continue|increase|reduce|repeat|refer|review|return|recheck|order|follow|hold|avoid|switch|"
    r"arrange|order(?:ed)?|obtain|perform|schedul\w+|consider|provided|given(?! h| th)|recommend\w*|advis\w+|prescri\w+|initiate|asked for|offered|requested|referred|reassess|book\w*|due(?! to)|await\w*|if|r/v|no more|to be)\b",
    re.IGNORECASE,
)
_FINDING = re.compile(
    r"\b(?:positive|grew|growing|shows?|showed|demonstrat\w+|reveals?|confirm\w*|diagnos\w+|likel\w+|probabl\w+|"
    r"possibl[ey]|suspect\w*|consistent|excluded|suggests|could represent|evidence of|active)\b|\?[A-Za-z]|"
    + _DISEASE,
    re.IGNORECASE,
)
_DIAGNOSIS = re.compile(
    r"^this is (?!an? \d)|\b(?:diagnosis|consistent with|in keeping with|likel(?:y|iest)|probabl[ey]|possibl[ey]|possibility|"
    r"suspect\w*|excluded|explanation|represents?|impression|confirmed|shows?|NOT detected)\b|\?[A-Za-z]",
    re.IGNORECASE,
)
_WARNING = re.compile(
    r"\b(?:(?:do|must|should) not|avoid(?:ed)?|not for cpr|dnacpr|until)\b|"
    r"\b(?:stop|call|ring|return|back|review)\b.{0,30}\bif\b|^No \w+(?: \w+)?(?: until.*)?\.?$",
    re.IGNORECASE,
)
_COURTESY = re.compile(
    r"\b(?:agrees? with|understands? and|in agreement|agreed to (?:this|the) plan|discussed in detail|reviewed and|"
    r"any (?:additional |other |further )?(?:questions|concerns|issues)|options were discussed|questions (?:were )?answered|discuss\w* (?:the )?(?:diagnosis and )?treatment options|"
    r"verbalized|lengthy discussion|consent taken)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Quoted:
    """A sentence of a summary in the note's own words."""

    text: str
    note_sentences: tuple[int, ...]  # 1-based


@dataclass(frozen=True)
class NotMentioned:
    """Something that a note holds and its summary lacks."""

    kind: str  # plan, drug, abnormal or problem
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
        """Raises ValueError for what is no selector, or one of a newer version."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("version", None) != _VERSION:
            raise ValueError("not a selector of this version")
        try:
            return Selector(**values)
        except TypeError as error:
            raise ValueError("not a selector: fields are missing or unknown") from error

    def budget(self, n_note_words: int) -> float:
        """The words that a summary of such a note has."""
        return min(self.base_words + self.words_per_note_word * n_note_words, self.most_words)


def fit_selector(pairs: Iterable[tuple[str, str]]) -> Selector:
    """Learns from (note, summary) pairs; without any, a selector that is not supported."""
    import numpy

    rows, targets, lengths, covered = [], [], [], []
    for note, summary in pairs:
        units = read_units(note)
        used = set(content_stems(summary))
        for unit, features in zip(units, _features(units), strict=True):
            stems = set(content_stems(unit.text))
            if unit.kind == "sentence" and stems:
                rows.append(features)
                targets.append(len(stems & used) / len(stems))
        covered += _covered(units, summary)
        lengths.append((len(note.split()), len(summary.split())))
    if not rows:
        return Selector({}, 0.0, 60.0, 0.0, 60.0, 0.0, False, len(lengths))
    names = list(rows[0])
    x = numpy.array([[row[name] for name in names] for row in rows])
    y = numpy.array(targets)
    mean = x.mean(axis=0)
    deviation = x.std(axis=0) + 1e-9
    z = (x - mean) / deviation
    weights = numpy.linalg.solve(z.T @ z + 20.0 * numpy.eye(len(names)), z.T @ (y - y.mean())) / deviation
    n_words = numpy.array(lengths, dtype=float)
    # A line through the training lengths, level where no training summary is longer
    steep = numpy.var(n_words[:, 0]) > 0
    slope = float(numpy.cov(n_words.T, bias=True)[0, 1] / numpy.var(n_words[:, 0])) if steep else 0.0
    slope = max(slope, 0.0)
    kinship = sum(covered) / max(len(covered), 1)
    return Selector(
        weights={name: round(float(weight), 5) for name, weight in zip(names, weights, strict=True)},
        bias=round(float(y.mean() - mean @ weights), 5),
        base_words=round(float(n_words[:, 1].mean() - slope * n_words[:, 0].mean()), 2),
        words_per_note_word=round(slope, 4),
        most_words=round(float(numpy.percentile(n_words[:, 1], 98)), 1),
        kinship=round(kinship, 3),
        supported=kinship >= _ENOUGH_KIN,
        n_pairs=len(lengths),
    )


def quote(note: str, selector: Selector) -> list[Quoted]:
    """The summary of `note` in its own sentences, in the note's order."""
    units = read_units(note)
    chosen = _choose(units, selector, len(note.split()))
    return _render(units, sorted(chosen))


def not_mentioned(note: str, summary_sentences: Iterable[str]) -> list[NotMentioned]:
    """Plans, drugs with a dose, abnormal results and problems that the summary does not speak of."""
    said = set(content_stems(" ".join(summary_sentences)))
    missing, seen = [], set()
    for unit in read_units(note):
        stems = set(content_stems(unit.text))
        share = len(stems & said) / max(len(stems), 1)
        drugs = [name for name in _DRUG.findall(unit.text) if not set(content_stems(name)) & (said | seen)]
        kind = ""
        if _COURTESY.search(unit.text):
            continue
        if unit.kind == "sentence" and drugs:
            kind = "drug"
        elif unit.kind == "sentence" and share < 0.4 and not stems & seen - said:
            if "plan" in unit.topic and _DIRECTIVE.search(unit.text):
                kind = "plan"
            elif _ABNORMAL.search(unit.text) and any(s[0].isdigit() for s in stems - said):
                kind = "abnormal"
            elif unit.topic == "diagnosis" and len(stems) > 1:
                kind = "problem"
        if kind:
            missing.append(NotMentioned(kind, unit.text, unit.number))
            seen |= stems
    return missing


def _features(units: list[Unit]) -> list[dict[str, float]]:
    """The same numbers for every sentence of a note, by name."""
    stems = [set(content_stems(unit.text)) for unit in units]
    count = {}
    for words in stems:
        for word in words:
            count[word] = count.get(word, 0) + 1
    sentences = [unit.number for unit in units if unit.kind == "sentence"]
    place = {number: i for i, number in enumerate(sentences)}
    n = max(len(sentences), 1)
    rows = []
    for unit, words in zip(units, stems, strict=True):
        i = place.get(unit.number, 0)
        text = f"{unit.label} {unit.text}"
        row = {
            "first": float(i == 0),
            "second": float(i == 1),
            "last three": float(i >= n - 3),
            "place": i / n,
            "place squared": (i / n) ** 2,
            "length": min(len(words), 40) / 20,
            "very short": float(len(words) < 3),
            "number": float(bool(re.search(r"\d", unit.text))),
            "recurs": sum(count[word] > 1 for word in words) / max(len(words), 1),
            "sentences": min(n, 30) / 20,
        }
        row |= {f"cue {name}": float(bool(cue.search(text))) for name, cue in _CUES.items()}
        row |= {f"topic {name}": float(name in unit.topic) for name in _TOPICS}
        rows.append(row)
    return rows


def _covered(units: list[Unit], summary: str) -> list[bool]:
    """For each summary sentence, whether some three note sentences cover most of its content words."""
    sources = [set(content_stems(f"{unit.label} {unit.text}")) for unit in units]
    covered = []
    for sentence in read_units(summary):
        words = set(content_stems(sentence.text))
        if len(words) < 3:
            continue
        left = set(words)
        for _ in range(3):
            left -= max(sources, key=lambda source: len(source & left), default=set())
        covered.append(1 - len(left) / len(words) >= _COVERED)
    return covered


def _choose(units: list[Unit], selector: Selector, n_note_words: int) -> set[int]:
    """The numbers of the sentences that the summary quotes."""
    # A problem that is listed, and heads its plan below, is said there
    headings = {frozenset(content_stems(unit.text)) for unit in units if unit.kind == "heading"}
    scores = {
        unit.number: selector.bias + sum(selector.weights.get(k, 0.0) * v for k, v in features.items())
        for unit, features in zip(units, _features(units), strict=True)
        if unit.kind == "sentence"
        and not _COURTESY.search(unit.text)
        and frozenset(content_stems(unit.text)) not in headings
    }
    budget = selector.budget(n_note_words)
    stems = {unit.number: set(content_stems(unit.text)) for unit in units}
    n_words = {unit.number: len(unit.text.split()) + len(unit.label.split()) for unit in units}
    chosen, said = set(), {}

    def repeats(number: int) -> float:
        words = stems[number]
        return sum(word in said for word in words) / max(len(words), 1)

    def add(numbers: set[int]) -> None:
        for number in numbers - chosen:
            said.update(dict.fromkeys(stems[number], True))
        chosen.update(numbers)

    def length() -> int:
        return sum(n_words[number] for number in chosen)

    essential, wanted = _required(units, scores)
    for number, room in [*((n, 1.4) for n in essential), *((n, 1.15) for n in wanted)]:
        group = _closure(units, number)
        if not group or number in chosen or repeats(number) > 0.7:
            continue
        if length() + sum(n_words[k] for k in group - chosen) <= room * budget or not chosen:
            add(group)
    rest = [number for number in scores if not _is_trivial(units[number - 1], units)]
    waiting = {number: group for number in rest if (group := _closure(units, number))}
    while waiting:
        value = {}
        for number, group in waiting.items():
            new = group - chosen
            cost = sum(n_words[k] for k in new)
            if new and length() + cost <= 1.15 * budget and repeats(number) < 0.7:
                gain = sum(n_words[k] * (scores.get(k, 0.0) - 0.3 * repeats(k)) for k in new)
                value[number] = gain / max(cost, 1)
        if not value:
            break
        best = max(value, key=lambda number: (value[number], -number))
        add(waiting.pop(best))
    return chosen


def _required(units: list[Unit], scores: dict[int, float]) -> tuple[list[int], list[int]]:
    """What a reader must not miss, and what matters next, each with the most important first."""
    sentences = [u for u in units if u.number in scores and u.topic not in ("family", "review")]
    if not sentences:
        return [], []

    def best(candidates: list[Unit], n: int = 1) -> list[int]:
        return sorted((u.number for u in candidates), key=lambda number: (-scores[number], number))[:n]

    plans = [unit for unit in sentences if "plan" in unit.topic and not _COURTESY.search(unit.text)]
    actions = [unit for unit in plans if _DIRECTIVE.search(unit.text)] or plans
    required = [sentences[0].number]
    required += [unit.number for unit in sentences if unit.names_patient][:1]
    required += [u.number for u in sentences if u.topic == "reason" and u.label_number == u.number][:1]
    required += best([u for u in sentences if u.topic == "operation"])
    required += best([u for u in sentences if u.topic == "diagnosis"])
    # For each problem of a plan what is to be done, if it says so; then all else that is to be done
    problems = {}
    for unit in plans:
        head = units[unit.heading - 1] if unit.heading else None
        if head and not topic_of(head.text):
            problems.setdefault(head.number, []).append(unit)
    told = [u for u in sentences if not _CUES["others"].search(u.text) and not _CUES["past"].search(u.text)]
    said = [u for u in told if _DIAGNOSIS.search(u.text)]
    findings = best(said, 1) + best(
        [u for u in told if _FINDING.search(u.text) or _ABNORMAL.search(u.text)], 2
    )
    for group in problems.values():
        treats = [u for u in group if u in actions and u.topic == "plan"]
        doses = [u for u in treats if _DRUG.search(u.text)]
        required += best(doses or treats or [u for u in group if u in actions] or group)
    essential = required + findings[:2]
    required = []
    if problems:
        required += [unit.number for unit in sorted(actions, key=lambda u: not _DRUG.search(u.text))]
    else:
        late = plans or [u for u in sentences[len(sentences) // 2 :] if _is_action(u.text)]
        required += [unit.number for unit in late if _is_action(unit.text)][-1:]
        required += best([u for u in late if _DIRECTIVE.search(u.text)], 2)
    required += best(
        [
            u
            for u in sentences
            if _DRUG.search(u.text) and _CUES["treatment"].search(u.text) and u.topic != "drugs"
        ],
        2,
    )
    required += findings[2:]
    required += best(
        [u for u in told if _CUES["procedure"].search(u.text) and not _CUES["negation"].search(u.text)]
    )
    required += best([u for u in told[: max(4, len(told) // 3)] if _CUES["presentation"].search(u.text)])
    required += [unit.number for unit in plans if not _CUES["trivia"].search(unit.text)]
    required += [unit.number for unit in sentences[len(sentences) // 2 :] if _WARNING.search(unit.text)]
    return essential, required


def _is_trivial(unit: Unit, units: list[Unit]) -> bool:
    """What else was asked or found normal, in a section for that; and what is no medicine."""
    heading = units[unit.heading - 1].text if unit.heading else ""
    is_normal = _CUES["normal"].search(unit.text) or _CUES["negation"].search(unit.text)
    is_routine = topic_of(heading) in ("review", "family", "drugs") or (
        re.search(r"(?i)exam|vital", heading) and is_normal
    )
    return bool(is_routine or _CUES["trivia"].search(unit.text))


def _is_action(text: str) -> bool:
    """Whether a sentence under no plan's label says what is done or to be done."""
    acts = _DIRECTIVE.search(text) or _CUES["plan"].search(text) or _CUES["treatment"].search(text)
    return bool(acts) and not any(_CUES[name].search(text) for name in ("others", "past", "trivia"))


def _closure(units: list[Unit], number: int) -> set[int]:
    """The sentence with those it refers back to; empty if these cannot be quoted."""
    group = set()
    while number:
        unit = units[number - 1]
        if unit.kind != "sentence" or len(group) > 2:
            return set()
        group.add(number)
        number = unit.needs
    return group


def _render(units: list[Unit], numbers: list[int]) -> list[Quoted]:
    """The chosen sentences as a reader wants them: each under its heading, label or question once."""
    quoted = []
    shown = ()
    for number in numbers:
        unit = units[number - 1]
        head = units[unit.heading - 1] if unit.heading else None
        heads = []
        if head:
            heads.append((head.number, shown_label(head.text)))
        if unit.label:
            heads.append((unit.label_number, shown_label(unit.label)))
        if unit.asked:
            asked = units[unit.asked - 1].text
            is_topic = len(asked.split()) <= 3 and not unit.label
            heads.append((unit.asked, asked.rstrip('?"”') if is_topic else asked))
        heads = [(n, text) for n, text in heads if text]
        # Leaving a problem: what is said next is no longer about it
        if (
            not heads
            and head
            and any(units[n - 1].kind == "heading" and not units[n - 1].topic for n, _ in shown)
        ):
            heads = [(head.number, head.text.capitalize())]
        new = [pair for pair in heads if pair not in shown]
        shown = tuple(heads)
        parts = [text if text.endswith("?") else f"{text}." for _, text in sorted(new)]
        # "CT KUB. Clinical details: left loin pain."
        parts[-1:] = [re.sub(r"\.$", ":", part) for part in parts[-1:]]
        text = " ".join([*parts, unit.text])
        text = text[0].upper() + text[1:] if text[:2].islower() else text
        text = text if re.search(r"[.!?…][\"”'’)]*$", text) else text.rstrip(" ,;:") + "."
        quoted.append(Quoted(text, tuple(sorted({n for n, _ in new} | {number}))))
    return quoted
