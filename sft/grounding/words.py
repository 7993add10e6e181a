"""Words of clinical English: tokens, stems, content words, English or not.

A stem stands for the forms and the plain synonyms of a word (kidney, renal), so that notes and summaries can be
compared word by word. The lists are short on purpose: what they lack costs a little risk, never a finding alone.
"""

import re
from functools import lru_cache

TOKEN = re.compile(
    r"(?<![\w.])\.\d+|(?<!\w)[a-z]/[a-z](?!\w)|\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*|[^\w\s]"
)

STOP_WORDS = frozenset(
    """a an the and or but nor of in on at by to for from with without within into onto over under about as is are
    was were be been being am has have had having do does did doing done will would shall should can could may might
    must this that these those there here it its he him his she her hers they them their i me my we us our you your
    who whom whose which what when where why how if then than so such not no none any some all both each every other
    another same only just also too very more most less least much many few several own again further once up down
    out off between through during before after above below because while until since although though however per
    via due upon either neither whether let s t d ll m re ve don didn isn wasn doesn hasn hadn aren won't can't i'm
    it's that's you're he's she's don't didn't i've i'll okay ok yes yeah no oh uh um well right left bilateral
    bilaterally now still yet already ago""".split()
)
# Words with which summaries report: their absence from a note says nothing
_REPORTING = frozenset(
    """patient patients report reports reported reporting deny denies denied denying present presents presented
    presenting presentation complain complains complained complaint complaints state states stated describe describes
    described note notes noted notable history significant remarkable unremarkable reveal reveals revealed show shows
    showed shown find finding findings found include includes included including undergo underwent undergoes undergone
    receive received receives give gives gave given get gets got take takes took taken taking use uses used using
    treat treated treats treatment start started starts starting begin began begins stop stopped continue continues
    continued follow follows followed following plan plans planned advise advised advises recommend recommended
    refer referred review reviewed perform performed evaluation evaluate evaluated assess assessed assessment exam
    examination see saw seen go went come came make made want wanted feel feels felt say says said tell told know
    known think thought like need needed try tried work remain remains remained able unable currently current
    recent recently previous previously prior past last next further additional well good normal negative positive
    status post associated related secondary consistent likely possible possibly probable probably suspected
    suspect apparent evidence sign signs symptom symptoms condition problem problems issue issues medical surgical
    family social daily day days week weeks month months year years hour hours minute minutes time times old age
    man woman male female boy girl lady gentleman person people she he mr mrs ms dr doctor however admission admitted
    discharge discharged home hospital clinic visit chronic acute new increased decreased develop developed need
    onset approximately around least multiple various non contributory occasionally occasional regular regularly
    mg ml mcg kg cm mm mmol bd tds od qds prn bid tid po iv im am pm mmhg bpm min hr hrs wk yr
    one two three four five six seven eight nine ten first second third single result results test tests tested
    level levels area side sided part type kind thing things lot bit way back little really going regarding
    goes moment morning evening night managed reached qualifies wait against measured roughly early late full completely direct early onset allow
    allowed require required requires resident lives require agreed call calls""".split()
)
_SYNONYMS = """kidney renal | liver hepatic | heart cardiac | lung lungs pulmonary chest thoracic | brain cerebral
| stomach belly abdomen abdominal abdo tummy gastric | pain painful ache aching hurt hurts hurting sore soreness
discomfort tender tenderness | fever febrile temperature temp pyrexia feverish | vomit vomiting emesis | breath
breathing breathless dyspnea dyspnoea sob breathlessness | smoke smoking smoker tobacco cigarette cigarettes packs pack
| alcohol drink drinks drinking beer wine etoh | surgery operation surgeries operated | medication medications
medicine medicines meds drug drugs pill pills tablet tablets | hypertension htn hypertensive | diabetes diabetic dm |
infarction mi | stool stools bowel bowels | urine urinary urinate pee urination | throat pharynx pharyngeal | skin
cutaneous dermal | eye eyes ocular | ear ears aural | nose nasal | allergy allergies allergic | swelling swollen swell
edema oedema | itch itching itchy pruritus pruritic | tired fatigue tiredness fatigued exhausted | dizzy dizziness
lightheaded lightheadedness vertigo | sleep sleeping slept insomnia | cancer malignancy carcinoma tumor tumour |
appendix appendectomy appendicectomy | gallbladder cholecystectomy | uterus hysterectomy womb | tonsil tonsils
tonsillectomy | fracture fractured broke broken break | injury injured trauma | numb numbness | weak weakness |
walk walking ambulate ambulation gait | fall fell fallen falls | faint fainted syncope fainting | bruise bruising
ecchymosis | rash rashes hives urticaria | depressed depression depressive | anxious anxiety | married spouse | eat
eating ate appetite food diet | weight weigh weighs weighed | occupation job employed | deceased died dead death
passed | wound wounds ulcer | shot injection injections vaccine vaccination | xray x-ray radiograph cxr | ekg ecg
electrocardiogram | pulse hr | physician gp doctor | potassium k | sodium na | creatinine creat | hemoglobin haemoglobin
hb hgb | glucose bm sugar | aid assistance help | intravenous iv ivi | intramuscular im | subcutaneous sc subcut |
immediate immediately once stat | repeat repeated redo again | advice advise advised | removal remove removed |
awaited await pending outstanding | saturation saturations sats sat spo2 | respiratory rr resp | leukocyte wcc wbc white |
platelets plt | grade g stage | oxygen o2 | culture cultures mcs | nightly nocte | laboratory labs lab bloods |
transfusion transfused | history hx | fracture fx | radiotherapy rt | chemotherapy chemo | review reviewed r/v rv f/u followup follow-up recheck | overdose overdosed od |
bypass cabg | metastases metastasis metastatic mets | antibiotics antibiotic abx"""

_SUFFIXES = re.compile(
    r"(?:ically|ation|ations|ements?|ingly|ities|ings?|edly|ness|ously|ious|ous|ives?|ally|ical|ies|ied|ers?|ors?|"
    r"ions?|als?|ics?|ed|es|ly|ity|e|s|y|i)$"
)
_OTHER_LANGUAGES = frozenset(
    """der die das und ist nicht mit von ein eine auf für dem den im zu wurde wird bei le la les des et est une dans
    pour avec sur du au par el los las del y es una con por para en il lo gli di che è per non nel della het een van
    met niet voor op zijn werd o os da do não uma com är och att inte som på na się jest nie w z ve bir ile""".split()
)


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """The stem of a lower-case word, or the first word of its group of synonyms."""
    word = word.replace("’", "'").removesuffix("'s").replace("'", "")
    return _GROUPS.get(word) or _GROUPS.get(_strip(word)) or _strip(word)


def _strip(word: str) -> str:
    if len(word) > 5:
        word = word.replace("ae", "e").replace("oe", "e")
    for _ in range(2):
        shorter = _SUFFIXES.sub("", word)
        if len(shorter) < 3 or len(word) <= 4 and word[-1] != "s":
            break
        word = shorter
    return word


_GROUPS: dict[str, str] = {}
_GROUPS = {
    form: group.split()[0]
    for group in _SYNONYMS.split("|")
    for word in group.split()
    for form in (word, _strip(word))
}


@lru_cache(maxsize=50_000)
def is_content(word: str) -> bool:
    """Whether a lower-case word carries meaning of its own; numbers do not count, letters such as K do not."""
    return (len(word) > 1 or word == "k") and word[0].isalpha() and word not in STOP_WORDS


@lru_cache(maxsize=50_000)
def is_telling(word: str) -> bool:
    """A content word that is not one of those with which every summary reports."""
    return len(word) > 1 and is_content(word) and word not in _REPORTING


_CLINICAL = re.compile(
    r".{2,}(?:itis|osis|[ae]mia|oma|omas|pathy|algia|ectomy|otomy|uria|plegia|paresis|rrhea|rrhoea|phagia|pnea|pnoea|"
    r"megaly|stenosis|sclerosis|trophy|plasia|penia|cytosis|cele|lith|ism|tension|thrombus|embolus|embolism|infarct)"
)


@lru_cache(maxsize=50_000)
def missing_weight(word: str) -> float:
    """What a telling word that the note lacks adds to the risk: most for a clinical name, least for a verb."""
    if _CLINICAL.fullmatch(word):
        return 0.5
    return 0.12 if word.endswith(("ing", "ed", "ly")) else 0.3


def content_stems(text: str) -> list[str]:
    """The stems of the content words, in order, repeated as they are."""
    return [stem(word) for word in TOKEN.findall(text.lower()) if is_content(word)]


def detect_language(text: str) -> str:
    """ "en" or "other", by the share of English stop words among those of common languages.

    Text too short or too telegraphic to tell counts as English.
    """
    words = [word for word in TOKEN.findall(text[:20_000].lower()) if word[0].isalpha()]
    if not words:
        return "en"
    if sum(not "a" <= word[0] <= "ɏ" for word in words) > len(words) / 2:
        return "other"
    n_english = sum(word in STOP_WORDS for word in words)
    n_other = sum(word in _OTHER_LANGUAGES and word not in STOP_WORDS for word in words)
    is_foreign = n_other >= 2 and n_other > n_english or len(words) >= 40 and n_english < 0.02 * len(words)
    return "other" if is_foreign else "en"
