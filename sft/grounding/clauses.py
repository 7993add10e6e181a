"""The clauses of a part of a note, and which of them make up a sentence.

A clause is what may be left out or moved as a whole. Each is marked with what it leans on: some clauses say
something only after the one before them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from sft.grounding.reading import CONDITIONS, GENERAL_KIN, HEDGES, KIN
from sft.grounding.shorthand import key, spell_out
from sft.grounding.structure import topic_of
from sft.grounding.words import TOKEN, stem

_LISTS = """
articles: a an the
past: was were had
be: is are was were be been being
have: has have had
subject: he she they patient patients pt
report: report reports reported complains presents presented presenting states stated
joiners: and but with who which while although though however
light: his her their of in on at there also still currently " “ ” ‘ ’ *
others: i me my mine we us our you your donor donors recipient relative relatives please kindly dr doctor doctors gp gps nurse nurses surgeon surgeons consultant team teams midwife physio therapist paramedic paramedics baby twin staff pharmacist dietitian radiologist oncologist cardiologist neurologist colleague
scopes: no not never neither cannot between both either
undone: but although though however except while when once stopped held withheld discontinued ceased canceled cancelled declined refused failed changed switched removed instead until unless now from reason only rather versus vs down up reduced increased withdrawn abandoned withhold omit skip taper wean halve
limits: none nor neg absent negative unlikely left right both bilaterally family ago last previous previously childhood after then later rising rose fell falling improving improved resolved settled better worse worsen yesterday max maximum limit ceiling usual baseline best normal predicted total
future: will plan planned tomorrow tonight due await awaiting awaited pending book booked to should would may might if once when aim target next request requested consider considered repeat
commands: start stop continue increase reduce refer review return recheck order follow hold avoid switch arrange obtain perform proceed schedule give take check monitor keep remove send ring call discuss restart discharge admit add change commence complete wean transfer use for
prepositions: for from to by after before due because since until despite via per under over into onto than as if unless or within between through during about around when where whether so like plus times off out
leaning: last largest maximum not now then later previously recently never subsequently again but although though however except while once
own verbs: fell took drank woke tested developed collapsed vomited complained improved remained recovered noticed responded fainted tripped tolerated settled deteriorated survived slipped
ahead: in at after every within
times: minute hour day week fortnight month year
stamps: ward bed bay room theatre theater cubicle resus recovery icu itu hdu nicu picu clinic
male: he him his man boy mr
female: she her hers woman girl mrs ms
"""
WORDS = {name: frozenset(words.split()) for name, words in re.findall("(.+): (.+)", _LISTS)}
WORDS["undone"] |= CONDITIONS
# What is said of or to anybody but the patient keeps every word
OTHERS = WORDS["others"] | frozenset(KIN) | frozenset(GENERAL_KIN)
# A denial, doubt or condition reaches over what follows; without any of the guards, what stays would say more
SCOPES = WORDS["scopes"] | HEDGES | CONDITIONS
GUARDS = SCOPES | OTHERS | WORDS["undone"] | WORDS["limits"] | WORDS["future"]
GUARDS |= set(map(key, GUARDS))
BREAKS = frozenset(", ; : . ( ) - – — / ! ? \n".split(" "))
AUXILIARY = WORDS["be"] | WORDS["have"]
PARTING = WORDS["joiners"] | WORDS["have"] | BREAKS
PLACES = frozenset("of in on at".split())
FREE = AUXILIARY.union(*(WORDS[name] for name in ("articles", "subject", "report", "joiners", "light")))
_LABEL = re.compile(r"\s*([^.;:?!\n]{1,45}|\d\d?[:.]\d\d):(?=\s)")
# No article stands before these
NO_NOUNS = SCOPES.union(
    "i we it this he she they".split(), *map(WORDS.get, ("commands", "prepositions", "light"))
)
PARTICIPLE = re.compile(
    r"\w+ed|given|taken|seen|done|sent|held|told|found|shown|known|put|kept|begun|driven|drawn"
)
# What may be said with "is" or "was"
PREDICATE = re.compile(
    r"\w+(?:ed|en|ly|ing|ive|al|ous|ic|ful|less|[ai]ble|ent|ant|ular|tory|ary)|clear|clean|dry|wet|soft|firm|high|low|"
    r"better|worse|aware|up|down|poor|good|fair|mild|severe|equal|alert|well|due|warm|cold|pink|tender|not|now|very|"
    r"done|gone|held|sent"
)
# What a patient can have, and what a patient can be; else a part without a verb may be a thing or an order
CONDITION = re.compile(
    r"\w{3,}(?:itis|oma|osis|emia|pathy|rrhage|rrhea|plegia|phasia|uria|algia|pnea|pnoea|cardia|penia|tension|phagia|"
    r"sthenia|ness|ache)|fever|cough|pain|cramp|spasm|rash|nausea|vomiting|diarrhea|wheezing|itching|itch|"
    r"swelling|bleeding|tingling|fatigue|lethargy|seizure|symptom|allergy|history|asthma|diabetes|dementia|copd|"
    r"stroke|cancer|tumou?r|gout|angina|syndrome|disease|disorder|failure|injury|infection|fracture|ulcer|abscess|"
    r"embolism|effusion|dvt|pe|uti|hernia|stone|thrombus|infarct|infarction|overdose|lesion|nodule|mass|edema|"
    r"erythema|murmur|tremor|insomnia|anxiety|depression|confusion|delirium|palpitation|syncope|jaundice"
)
# What may be left out with its value, as "BP 120/80" may: no limit, order or degree ("max 3 g", "omit HR 50")
MEASURE = re.compile(
    r"(?:bp|(?:blood )?pressure|(?:heart|respiratory) rate|pulse|hr|rr|t|temp|temperature|sat|saturation|weight|"
    r"height|bmi|gcs|peak flow|pef|hb|hemoglobin|hba 1 c|wcc|wbc|platelet|plt|neut|neutrophil|crp|esr|na|sodium|k|"
    r"potassium|urea|egfr|creat|creatinine|lactate|glucose|gluc|bm|ck|inr|alt|bilirubin|albumin|lipase|troponin|"
    r"ferritin|tsh|ph|(?:spo|fio|pa?co|pa?o) 2)(?: \d\S*)+(?: (?:%|kg|cm|mmhg|bpm|ra|air|[gu]/l))*"
)
STATE = re.compile(
    r"\w*(?:febrile|oriented|tensive)|drowsy|alert|rousable|pregnant|unwell|fit|stable|pale|dizzy|tired|weak|thirsty|"
    r"unsteady|breathless|comfortable|anxious|confused|jaundiced|depressed|man|woman|yearold|delirious|"
    r"admitted|discharged|transferred|intubated|extubated|catheteri[sz]ed|referred|treated|warned|"
    r"reassured|immuni[sz]ed|smoker|allergic|safe"
)


class Reading:
    """The content words of a text as keys, and the light words and marks before each and after the last."""

    def __init__(self, text: str, free: frozenset[str]):
        self.words: list[str] = []
        self.content: list[str] = []
        self.gaps: list[list[str]] = [[]]
        for word in re.findall(rf"\n|{TOKEN.pattern}", spell_out(text).lower()):
            self.words.append(key(word))
            # "LMA in," ends with what it says
            if word in BREAKS and self.gaps[-1] and self.gaps[-1][-1] in PLACES:
                self.content.append(self.gaps[-1].pop())
                self.gaps.append([])
            if word in free or word in BREAKS:
                self.gaps[-1].append(word)
            else:
                self.content.append(key(word))
                self.gaps.append([])


@dataclass
class Clause:
    """Some content words of the part that stand or fall together."""

    first: int  # of its content words, in the part
    last: int  # one past the last
    sentence: int  # of the part, up to a full stop or semicolon
    leans: bool  # it says nothing without the clause before it
    words: frozenset[str] = frozenset()
    label: str = ""  # the label that it is, as it stands
    is_plan: bool = False  # it, or another clause of its sentence


def _stem(word: str) -> str:
    """Of "stop", "stopping" and "stopped" the same."""
    return re.sub(r"(.)\1$", r"\1", stem(word))


_GUARD_STEMS = frozenset(map(_stem, WORDS["undone"] | WORDS["limits"] | WORDS["future"]))


def guards(words: Iterable[str]) -> set[str]:
    """Those of the words without which what stays would say more."""
    return {word for word in words if word in GUARDS or _stem(word) in _GUARD_STEMS}


def read_clauses(part: str, source: Reading) -> list[Clause]:
    """The clauses of the part: cut at marks, at joining words and before "of 38.5"."""
    clauses: list[Clause] = []
    sentence = 0
    for index, word in enumerate(source.content):
        gap = set(source.gaps[index])
        is_anew = index > 0 and not gap.isdisjoint(".;\n?!")
        sentence += is_anew
        if clauses and not gap & (BREAKS | WORDS["joiners"]) and not (word[0].isdigit() and "of" in gap):
            clauses[-1].last = index + 1
            continue
        leans = index > 0 and not is_anew and (not gap & BREAKS or bool(gap & WORDS["joiners"] - {"and"}))
        clauses.append(Clause(index, index + 1, sentence, leans))
    lines = re.split(r"(?<=[.;?!])\s+|\n", part)
    labels = [match[1] for line in lines if (match := _LABEL.match(line))]
    before, is_plan, planned = None, False, set()
    for clause in clauses:
        content = source.content[clause.first : clause.last]
        clause.words = frozenset(content) | frozenset(source.gaps[clause.first])
        is_first = before is None or before.sentence != clause.sentence
        if is_first and labels and ":" in source.gaps[clause.last]:
            clause.label = labels.pop(0)
        clause.leans = clause.leans or (before is not None and not _stands_alone(content, before, is_first))
        is_plan = "plan" in topic_of(clause.label) if clause.label else is_plan
        if is_plan or _says_plan(source, clause, content):
            planned.add(clause.sentence)
        before = clause
    for clause in clauses:
        clause.is_plan = clause.sentence in planned
    return clauses


def _stands_alone(content: list[str], before: Clause, is_first: bool) -> bool:
    """Whether a clause says something without the one before it, which ends with a comma, or its sentence."""
    is_done = bool(PARTICIPLE.fullmatch(content[0]))
    if is_first or before.label:
        return bool(before.label) or not is_done or content[0] in WORDS["own verbs"]
    if content[0][0].isdigit() or content[0] in WORDS["prepositions"] | WORDS["leaning"] or is_done:
        return False
    # "BP 120/80, pulse 76", but not "HIV negative, hepatitis C positive, RNA awaited"
    return all(any(word[0].isdigit() for word in words) for words in (content[1:], before.words))


def _says_plan(source: Reading, clause: Clause, content: list[str]) -> bool:
    """A command, a word for what is to come, or "at 2 and 4 weeks"."""
    future = WORDS["future"] - ({"to"} if {"secondary", "allergic", "related"} & set(content) else set())
    if content[0] in WORDS["commands"] or future & set(content):
        return True
    for index in range(clause.first, clause.last):
        is_time = source.content[index][0].isdigit() and WORDS["times"] & set(
            source.content[index + 1 : index + 4]
        )
        before = {*source.gaps[index], *source.content[max(0, index - 1) : index]}
        if is_time and before & WORDS["ahead"]:
            return True
    return False


def match_clauses(clauses: list[Clause], part: list[str], words: list[str]) -> list[int] | None:
    """The clauses that make up the sentence, whole and each once; None if they do not."""
    waiting: dict[str, list[int]] = {}
    for number in range(len(clauses) - 1, -1, -1):
        waiting.setdefault(part[clauses[number].first], []).append(number)
    kept, used, position = [], set(), 0
    while position < len(words):
        following = kept[-1] + 1 if kept else 0
        stack = waiting.get(words[position], [])
        while stack and stack[-1] in used:
            stack.pop()
        # The next clause, else the first that begins with this word
        for number in [following, *stack[-1:]]:
            clause = clauses[number] if number < len(clauses) else None
            end = position + clause.last - clause.first if clause else 0
            if clause and number not in used and words[position:end] == part[clause.first : clause.last]:
                break
        else:
            return None
        kept.append(number)
        used.add(number)
        position = end
    return kept
