"""A summary in the note's own words: which of a note's sentences a summary of this kind would use.

Ridge regression learns from training pairs what share of each note sentence's words the summary uses; rules
add what a reader must not miss and keep together what belongs together. Fitted in milliseconds; no torch.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from sft.grounding.structure import KIN, Unit, content_stems, read_units, shown_label, topic_of

_VERSION = 1
# What a sentence speaks of, for the regression and the rules
_CUES = {
    "action": r"will|start|stop|continue|increase|reduce|repeat|refer(?:red|rals?)?|review|return|recheck|order(?:ed)?|follow|hold|"
    r"avoid|switch|arrange|obtain|perform|proceed|schedul\w+|consider|provided|given(?! h| th)|recommend\w*|advis\w+|prescri\w+|"
    r"initiate|asked for|offered|requested|reassess|book\w*|due(?! to)|await\w*|if|r/v|no more|to be",
    "plan": r"plan|tomorrow|weeks?|months?|again|check|discharge|clinic|f/u|monitor|pending|[1-9]/(?:7|52|12)",
    "treatment": r"\d+(?:\.\d+)?\s?(?:mg|mcg|micrograms?|g|ml|units?|puffs?|l)|started?|stopped|given|gave|treated|prescri\w+|tablets?|iv|"
    r"im|po|od|bd|tds|qds|daily|increased?|changed|switch(?:ed)?|held|hold",
    "diagnosis": r"this is (?!an? \d)\w+|diagnos[ei]\w*|consistent|in keeping with|likel(?:y|iest)|probabl[ey]|possibl[ey]|"
    r"possibility|suspect\w*|excluded|explanation|(?:I|we) (?:think|believe|suspect)|represents?|impression|confirm\w*|not detected|\?[a-z]+",
    "abnormal": r"(?<!not )(?:positive|raised|elevated|abnormal|critical|resistant)|target (?:under|below|over|above)|crept|climbed|rose|risen|doubled|peaked|grew|"
    r"(?:up|down|gone|fell|fallen|falling|dropped) (?:from|to)|from \d[^;]{0,40} to \d\S{0,9}|\d\S{0,9}\s?(?:->|→|↑|↓)\s?\d\S{0,9}|"
    r"\((?:lab )?(?:baseline|usual(?:ly)?|normal(?:ly)?|was|were|previous(?:ly)?|prev|last|limit|target|\d[\d.,]* (?:in|on|at|last|before))",
    "done": r"(?:was|were|been) given|gave|had \d|begins?|began|begun|starts|started|commenced|stopped|withheld|halved|paused|omitted|switched|(?:changed|down|up|cut|reduced|increased) (?:from .{1,20} )?to|supplied|drawn (?:today|at|for)|sent|done|given(?! th)",
    "test": r"MRI|CT|X-?rays?|XR|CXR|ultrasound|scans?|echo\w*|ECG|EEG|\w+gra(?:m|phy)|biops\w+|cultures?|films?|bloods|fluid|swab|"
    r"aspirate|PCR|histology|cytology|smear|sequencing|variant|tests?|specimen|\w+scopy",
    "finding": r"positive|elevated|raised|abnormal|low|high|reduced|critical|grew|growing|show(?:s|ed)?|demonstrat\w+|reveals?|suggests|"
    r"could represent|evidence of|active",
    "change": r"new|moderate|severe|large|tender|worse|swelling|weak\w*|drowsy|confus\w+|rose|fell|cm|mm|POS|↑|↓|->",
    "disease": r"\w{3,}(?:itis|oma|osis|a?emia|opathy|rrhage|plegia|ectomy|otomy)|perforat\w+|ulcer\w*|bleed\w*|bled|tumou?r|mass|"
    r"ruptur\w+|thromb\w+|embol\w+|infarct\w*|stones?|calcul(?:us|i)|abscess|obstruct\w+|infect\w+|stroke|dissection|seizure|"
    r"arrest|hernia|cancer|malignan\w+|syndrome|deliri\w+|fracture\w*|effusion|tear|compression|occlusion|vegetation|bruis\w+|burns?|laceration|sensorineural|fibrillation|overdose|rash|erythema|o?edema|nodules?|"
    r"lump|pneumonia|haematoma|wound|DVT|stenosis|failure|GDM|T[12]DM|diabetes|COPD|asthma|epilepsy|dementia|AF|AKI|CKD|pancreat\w+",
    "procedure": r"laser|biops(?:y|ies|ied)|drained?|stent(?:ed)?|repair(?:ed)?|excis\w+|inject(?:ed|ion)|aspirat\w+|"
    r"(?:in|ex)tubat\w+|transfus\w+|thrombolys\w+|dialys\w+|closed|sutur\w+|removed|applied|inserted|placed|bands?|shocks?|lavage|debrid\w+|clipped|embolis\w+|\w+ectomy|\w+plasty",
    "presentation": r"admitted|presents?|presented|presenting|came|found|complain\w*|c/o|history of|referred|seen|day \d+|fell|"
    r"fall|pain|ache|vomit\w*|since|collapsed|went|became|woke|shook|suddenly?|then|stung|hit|hurts?|jerk\w*|unresponsive|(?:hours?|days?|weeks?|months?|[1-9]/(?:7|52|12)) (?:of|history)",
    "person": r"\d{1,3}\s?(?:-year|yo|y/o|[mf]|y)|man|woman|boy|girl|baby|male|female|lady|gentleman",
    "negation": r"no|not|denies|denied|without|never|nil|none|neg(?:ative)?",
    "normal": r"normal|fine|intact|clear|well|unremarkable|satisfactory|equal|soft|settled",
    "others": r"(?:mother|father|mum|dad|sister|brother|son|daughter|wife|husband|partner|cousin|aunt|uncle|neighbou?r|(?:house|flat)mates?)"
    r"(?! (?:says?|said|reports?|noticed|found|rang|ringing))|cat|dog|"
    r"lives|works|smok\w+|alcohol|drives|retired|school|holiday",
    "past": r"(?<!/)(?:19|20)\d\d|last (?:month|year|season|winter|summer)|years ago|as a child|previous\w*|old|(?<!of )childhood",
    "warning": r"(?<!no )(?<!no known )(?<!nil )(?<!true )(?:allerg\w+|anaphyla\w+)|suicid\w*|self-harm|harm(?:ing)?|intrusive|safeguarding|"
    r"non-?immune|live vaccines?|NSAIDs?|(?:do|must|should) not|avoid(?:ed)?|not for cpr|dnacpr|until|(?:stop|call|ring|return|back|review)\b.{0,30}\bif",
    "trivia": r"lovely|nice|kind|grumbles?|supple|football|cardigan|flight|cruise|holiday|leaflet|enclosed|insurer|grateful|"
    r"pleasant|parking|biscuits?|tea|photo(?:graph)?s?|incidentally|chatty|cheerful|dogs?|cats?|pets?|garden\w*|likes|enjoys|prefers|hobb\w+|"
    r"(?:asks|asking|asked|wonders|know) (?:whether|if|where|about)|own appointment",
    "courtesy": r"agrees? with|understands? and|in agreement|agreed to (?:this|the) plan|discussed in detail|reviewed and|carefully reviewed|guidelines was reviewed|"
    r"any (?:additional |other |further )?(?:questions|concerns|issues)|options (?:were )?discussed|questions (?:were )?(?:invited and )?answered|"
    r"discuss\w* (?:the )?(?:diagnosis and )?treatment options(?!.*recommend)|verbaliz\w+|lengthy discussion|consent taken|applaud|reassured|"
    r"nature of (?:this|her|his|the)|risks?,? (?:and )?benefits|the risks? includes?",
    "dose": r"\d+(?:\.\d+)?\s?(?:mg|mcg|micrograms?|units?|puffs?|tablets?|gram)(?!/)",
}
_CUES = {cue: re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE) for cue, pattern in _CUES.items()}
_DOSE = re.compile(
    r"\b(?!about|nearly|around|roughly|another|under|daily|twice)([A-Za-z][a-z-]{4,})(?:\s[A-Z]{2})?\s+"
    r"\d+(?:\.\d+)?\s?(?:mg|mcg|micrograms?|g|units?|puffs?)\b(?!/)"
)
_OPEN_QUESTION = re.compile(
    r"(?:what (?:was|is|has|should|did|happened|else)|anything|any other|ready|handing)\b", re.IGNORECASE
)
_MATTERS = frozenset(
    "action diagnosis finding abnormal procedure done dose change warning presentation".split()
)
_NAMES_DIAGNOSIS = re.compile(r"this is|diagnosis|probabl[ey]|possibl[ey]|likely|\?", re.IGNORECASE)
_TOPICS = ("plan", "diagnosis", "reason", "result", "operation")
ENOUGH_KIN = 0.55  # of a training set's summary sentences: .72 on phase1_data, .41 on MTS-Dialog's dialogues
_COVERED = 0.65


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

    def score(self, features: dict[str, float]) -> float:
        return self.bias + sum(self.weights.get(name, 0.0) * value for name, value in features.items())


class _Note:
    """A note's sentences by their number, what each speaks of, and its words."""

    def __init__(self, text: str):
        self.units = read_units(text)
        self.n_words = len(text.split())
        self.sentences = [unit for unit in self.units if unit.kind == "sentence"]
        self.stems = {unit.number: frozenset(content_stems(unit.text)) for unit in self.units}
        self.cues = {unit.number: _cues(unit) for unit in self.sentences}
        self.count = Counter(word for words in self.stems.values() for word in words)

    def is_plan(self, unit: Unit) -> bool:
        """By its label or heading, or as one of the last bullets, if something is to be done."""
        cues = self.cues[unit.number]
        # Bullets that follow prose are a plan as a whole
        is_listed = unit.listed > len(self.units) // 3 and cues.isdisjoint(("others", "trivia"))
        is_done = is_listed or cues & {"action", "plan"}
        return "plan" in unit.topic or bool(unit.topic == "end" and is_done and "past" not in cues)

    def heading(self, unit: Unit) -> Unit | None:
        return self.units[unit.heading - 1] if unit.heading else None

    def features(self) -> list[dict[str, float]]:
        """The same numbers for every sentence, by name."""
        rows = []
        n = len(self.sentences)
        for i, unit in enumerate(self.sentences):
            stems = self.stems[unit.number]
            row = {
                "first": float(i == 0),
                "last three": float(i >= n - 3),
                "place": i / n,
                "place squared": (i / n) ** 2,
                "length": min(len(stems), 40) / 20,
                "very short": float(len(stems) < 3),
                "number": float(any(word[0].isdigit() for word in stems)),
                "recurs": sum(self.count[word] > 1 for word in stems) / max(len(stems), 1),
            }
            row |= {f"cue {name}": float(name in self.cues[unit.number]) for name in _CUES}
            row |= {f"topic {name}": float(name in unit.topic) for name in _TOPICS}
            rows.append(row)
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
        covered += _covered(note, summary)
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
    """Plans, drugs with a dose, abnormal results and problems that the summary does not speak of."""
    return _missing(_Note(note), set(content_stems(" ".join(summary_sentences))))


def _missing(note: _Note, said: set[str]) -> list[NotMentioned]:
    """The same, of a note that is read, with the stems of what the summary says."""
    listed = []
    for unit in note.sentences:
        stems, cues = note.stems[unit.number], note.cues[unit.number]
        is_new = len(stems & said) < 0.4 * len(stems)
        if "courtesy" in cues:
            continue
        if any(not set(content_stems(drug)) & said for drug in _DOSE.findall(unit.text)):
            kind = "drug"
        elif is_new and note.is_plan(unit) and "action" in cues:
            kind = "plan"
        elif is_new and cues & {"finding", "abnormal"} and any(word[0].isdigit() for word in stems - said):
            kind = "abnormal"
        elif is_new and unit.topic == "diagnosis" and len(stems) > 1:
            kind = "problem"
        else:
            continue
        listed.append(NotMentioned(kind, unit.text, unit.number))
        # What is said twice is missing once
        said = said | stems
    return listed


def _cues(unit: Unit) -> frozenset[str]:
    # What follows "Given: two units." on its line was not given
    text = f"{unit.label} {unit.text}" if unit.label_number == unit.number else unit.text
    # "Mother:" who tells of her child is no relative's history
    return frozenset(
        name for name, cue in _CUES.items() if cue.search(unit.text if name == "others" else text)
    )


def _covered(note: _Note, summary: str) -> list[bool]:
    """For each summary sentence, whether some three note sentences cover most of its content words."""
    sources = [set(content_stems(f"{unit.label} {unit.text}")) for unit in note.units]
    covered = []
    for sentence in read_units(summary):
        words = set(content_stems(sentence.text))
        left = set(words)
        for _ in range(3):
            left -= max(sources, key=lambda source: len(source & left), default=set())
        if len(words) > 2:
            covered.append(1 - len(left) / len(words) >= _COVERED)
    return covered


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
        # "CT in 6 weeks" is new unless one sentence says so
        stems = note.stems[number]
        is_plan = note.is_plan(note.units[number - 1])
        same = max((len(stems & note.stems[k]) for k in chosen), default=0) if is_plan else len(stems & said)
        return same / max(len(stems), 1)

    def fits(number: int, room: float) -> bool:
        words = sum(n_words[k] for k in groups[number] | chosen)
        return (
            number not in chosen
            and repeats(number) < 0.8
            and words <= min(room * budget, 1.35 * selector.most_words)
        )

    def add(number: int) -> None:
        chosen.update(groups[number])
        said.update(word for k in groups[number] for word in note.stems[k])

    def gain(number: int) -> float:
        new = groups[number] - chosen
        words = sum(n_words[k] for k in new)
        return sum(n_words[k] * (scores.get(k, 0.0) - 0.3 * repeats(k)) for k in new) / max(words, 1)

    for room, numbers in zip((1.7, 1.6, 1.45), _required(note, scores), strict=True):
        for number in numbers:
            if number in groups and (fits(number, room) or not chosen):
                add(number)
    for missing in sorted(_missing(note, said), key=lambda missing: missing.kind):
        if missing.note_sentence in groups and fits(missing.note_sentence, 1.4):
            add(missing.note_sentence)
    waiting = {u.number for u in note.sentences if u.number in groups and not _is_routine(note, u)}
    # The budget ends this after at most as many rounds as a summary has sentences
    room = {n: 1.3 if note.cues[n] & _MATTERS and "past" not in note.cues[n] else 1.1 for n in waiting}
    while waiting := {n for n in waiting if fits(n, room[n])}:
        add(max(waiting, key=lambda number: (gain(number), -number)))
    return chosen


def _required(note: _Note, scores: dict[int, float]) -> tuple[list[int], list[int], list[int]]:
    """What a reader must not miss, the plan, and what matters next, each with the most important first."""
    sentences = [u for u in note.sentences if u.number in scores and u.topic not in ("family", "review")]
    # Of the patient, and of now
    told = [u for u in sentences if not note.cues[u.number] & {"others", "past"}]

    def best(units: Iterable[Unit], n: int = 1, first: Iterable[Unit] = ()) -> list[int]:
        ahead = {u.number for u in first}
        return sorted(
            (u.number for u in units), key=lambda number: (number not in ahead, -scores[number], number)
        )[:n]

    def speaking(units: list[Unit], *cues: str) -> list[Unit]:
        return [u for u in units if note.cues[u.number] & set(cues)]

    plans = [u for u in sentences if note.is_plan(u) and not _is_routine(note, u)]
    present = [u for u in told if not note.cues[u.number] & {"negation", "normal"}]
    essential = [u.number for u in sentences[:1]]
    essential += [u.number for u in sentences if u.names_patient][:1]
    essential += [u.number for u in sentences if u.topic == "reason" and u.label_number == u.number][:1]
    for topic in ("operation", "diagnosis", "result"):
        essential += best((u for u in sentences if u.topic == topic), first=speaking(sentences, "disease"))
    essential += _for_each_problem(note, plans, best, speaking)
    # "This is gout", else what is only likely
    essential += best(speaking(told, "diagnosis"), first=[u for u in told if _NAMES_DIAGNOSIS.match(u.text)])
    essential += best(speaking(plans, "action"), 3, first=speaking(plans, "procedure", "dose"))
    # A test that shows something, else whatever is found
    tested = speaking(speaking(told, "test"), "disease", "finding", "abnormal")
    tested = best(tested, 3, first=[u for u in tested if u in present])
    findings = best(speaking(present, "diagnosis", "finding", "disease"), 2)
    essential += tested[:1] or findings[:1]
    essential += best((u for u in speaking(told, "procedure") if u not in plans and u.number > 1), 2)
    came = speaking(told[: max(4, len(told) // 3)], "presentation")
    came = best((u for u in came if len(note.stems[u.number]) > 3), 2)
    essential += came[:1]
    measured = [u for u in speaking(told, "abnormal") if u not in plans]
    essential += best(measured, first=[u for u in measured if re.search(r"\d", u.text)])
    done = [u for u in speaking(told, "done") if u not in plans and "negation" not in note.cues[u.number]]
    essential += best(done, first=speaking(done, "dose", "procedure"))
    essential += best(speaking(told, "warning"))
    # Actions and treatment first, and short ones: more is said
    todo = plans or speaking(told[len(told) // 3 :], "action", "plan", "treatment", "done")
    todo = [u for u in todo if "trivia" not in note.cues[u.number]]
    urgent = {u.number for u in speaking(todo, "action", "dose", "treatment")}
    wanted = [u.number for u in sorted(todo, key=lambda u: (u.number not in urgent, len(u.text)))]
    # A result begins with its place, and what a note ends with is often its plan
    more = [u.number for u in sentences if u.topic == "result" and u.label_number == u.number][:1]
    more += findings + tested + came + best(speaking(sentences, "warning"), 2)
    more += [u.number for u in told[-2:] if "trivia" not in note.cues[u.number] and not u.needs]
    return essential, wanted, more


def _for_each_problem(note: _Note, plans: list[Unit], best, speaking) -> list[int]:
    """For each problem of a plan what is to be done, if it says so."""
    problems = {}
    for unit in plans:
        head = note.heading(unit)
        if head and not topic_of(head.text):
            problems.setdefault(head.number, []).append(unit)
    for head, group in problems.items():
        treats = speaking([u for u in group if u.topic == "plan"], "action")
        problems[head] = best(speaking(treats, "dose") or treats or speaking(group, "action") or group)
    return [number for numbers in problems.values() for number in numbers]


def _is_routine(note: _Note, unit: Unit) -> bool:
    """What else was asked or found normal, in a section for that; what is no medicine; what others have."""
    cues = note.cues[unit.number]
    is_plain = unit.topic == "exam" and (cues & {"normal", "negation"} or len(note.stems[unit.number]) < 3)
    head = note.heading(unit)
    is_listed = head and head.topic in ("review", "family", "drugs")
    is_of_kin = KIN.search(unit.text[:14]) and cues.isdisjoint(_MATTERS - {"presentation"})
    return bool("trivia" in cues or is_plain or is_listed or is_of_kin)


def _group(note: _Note, number: int) -> set[int]:
    """The sentence with those it refers back to; empty if these cannot be quoted."""
    group = set()
    while number:
        unit = note.units[number - 1]
        if unit.kind != "sentence" or len(group) > 2:
            return set()
        if group and "trivia" in note.cues[number]:
            break
        group.add(number)
        number = unit.needs
    return group | _short_list(note, note.units[max(group) - 1])


def _short_list(note: _Note, unit: Unit) -> set[int]:
    """The other bullets of a list under a label of its own, "Given:": one of a few would mislead."""
    if not unit.listed or "plan" in unit.topic:
        return set()
    items = [u for u in note.units[unit.listed - 1 : unit.listed + 6] if u.listed == unit.listed]
    is_headed = unit.heading and unit.heading == unit.listed - 1
    is_short = is_headed and len(items) < 6 and sum(len(u.text.split()) for u in items) <= 24
    return {u.number for u in items if u.kind == "sentence"} if is_short else set()


def _render(note: _Note, numbers: list[int]) -> list[Quoted]:
    """The chosen sentences as a reader wants them: each under its heading, label or question once."""
    quoted, shown = [], []
    for number in numbers:
        unit = note.units[number - 1]
        head = note.heading(unit)
        heads = [(head.number, shown_label(head.text))] if head else []
        if unit.label:
            heads.append((unit.label_number, shown_label(unit.label)))
        if unit.asked:
            asked = note.units[unit.asked - 1].text
            # "Pain?" of a nurse who asks is the topic of what follows; a question of a patient stays one
            is_topic = len(asked.split()) <= 3 and not unit.label
            # "Anything else?" and "Handing over bed 6?" only start the talk
            is_empty = unit.names_patient or (
                _OPEN_QUESTION.match(asked) and len(note.stems[unit.asked]) < 4 < len(unit.text.split())
            )
            heads.append((unit.asked, "" if is_empty else asked.rstrip("?") if is_topic else asked))
        heads = sorted((n, text) for n, text in heads if text)
        # Leaving a problem: what is said next is no longer about it
        was_problem = any(
            note.units[n - 1].kind == "heading" and not note.units[n - 1].topic for n, _ in shown
        )
        if head and not heads and was_problem:
            heads = [(head.number, head.text.capitalize())]
        new = [pair for pair in heads if pair not in shown]
        shown = heads
        # "CT KUB. Clinical details: left loin pain."
        before = ". ".join(text for _, text in new).replace("?.", "?")
        text = f"{before}{' ' if before.endswith('?') else ': '}{unit.text}" if before else unit.text
        text = text[0].upper() + text[1:] if text[:2].islower() else text
        text = text if re.search(r"[.!?…][\"”'’)]*$", text) else text.rstrip(" ,;:") + "."
        quoted.append(Quoted(text, tuple(sorted({n for n, _ in new} | {number}))))
    return quoted
