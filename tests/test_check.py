"""The check of summaries: what each kind finds, what it leaves alone, its form, its time."""

import csv
import json
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SHARED_DATA
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft.grounding import PreparedNote, check_summary
from sft.grounding.acceptance import accept
from sft.grounding.check import TRAINING_THRESHOLD
from sft.grounding.citations import parse_citations
from sft.grounding.selector import not_mentioned
from sft.grounding.sentences import split_sentences
from sft.grounding.words import LEXICON, TOKEN

SHARED = SHARED_DATA.parent / "cases"
KINDS = "number unit drug unsupported misplaced negation certainty side person time citation".split()

CLINIC = (
    "68-year-old woman. Left hip replaced in 2011. Right knee pain for two weeks, worse on stairs. No fever, no rash. "
    "Takes metoprolol 50 mg twice daily; her sister has dementia. Possible meniscal tear. MRI on Tuesday, stop "
    "ibuprofen if the stomach hurts. Hemoglobin 11.2, platelets 180."
)
DIALOGUE = (
    "Doctor: Any chest pain?\nPatient: No.\nDoctor: Do you have a cough?\nPatient: Yes, for one twenty two days.\n"
    "Doctor: Are you allergic to penicillin?\nPatient: Yeah, I got a rash.\nDoctor: Your blood pressure was one ten "
    "over seventy. All right. You had the E K G in July of ninety five?\nPatient: Right."
)

WARD = (
    "Chronic kidney disease. Methotrexate 15 mg weekly for arthritis. CTG normal, sputum culture negative. Mild ankle "
    "edema. CRP 210 to 88. Furosemide, switched to bumetanide. Sacubitril not started. Physiotherapy to visit her."
)

ASKED = "70F, fall. Chest pain ? No. Low mood ? Denied."
WRONG = [
    ("negation", ASKED, "She has chest pain."),
    ("time", "Seen in March. DOB 12/04/1960.", "Seen in April."),
    ("number", CLINIC, "Hemoglobin is 12.1."),
    ("unit", CLINIC, "She takes metoprolol 50 mcg twice daily."),
    ("drug", CLINIC, "She takes metoprolol and lisinopril."),
    ("unsupported", CLINIC, "Pancreatitis, jaundice, gallstones, cirrhosis, melena and papilledema."),
    ("misplaced", CLINIC, "Hemoglobin 180."),
    ("misplaced", CLINIC, "Platelets were 11.2, hemoglobin was 180."),
    ("negation", CLINIC, "Right knee pain for two weeks, with fever."),
    ("negation", CLINIC, "There is no knee pain on stairs."),
    ("negation", DIALOGUE, "He has chest pain."),
    ("negation", DIALOGUE, "He denies cough."),
    ("certainty", CLINIC, "She has a meniscal tear of the knee."),
    ("side", CLINIC, "Left knee pain, worse on stairs."),
    ("side", "L knee pain. R hip replaced.", "The right knee hurts."),
    ("person", CLINIC, "Her brother has dementia."),
    ("person", CLINIC, "The patient has dementia."),
    ("person", "Cousin on dialysis. Patient has hypertension.", "She has hypertension and is on dialysis."),
    ("person", CLINIC, "He has right knee pain."),
    ("time", CLINIC, "Right knee pain for two months, worse on stairs."),
    ("time", CLINIC, "MRI on Friday."),
    ("number", DIALOGUE, "Blood pressure was 120/70."),
    ("misplaced", WARD, "Acute kidney disease."),
    ("misplaced", WARD, "Methotrexate 15 mg daily for arthritis."),
    ("misplaced", WARD, "The CTG was abnormal."),
    ("misplaced", WARD, "Sputum culture was positive."),
    ("misplaced", WARD, "Severe ankle edema."),
    ("misplaced", WARD, "CRP fell from 88 to 210."),
    ("misplaced", WARD, "She was switched from bumetanide to furosemide."),
    ("misplaced", WARD, "Sacubitril was started."),
    ("certainty", WARD, "Physiotherapy visited her."),
    *[
        ("certainty", f"Calf swelling. {doubt}. Bloods sent.", "He has cellulitis.")
        for doubt in (
            "Imp: ? cellulitis",
            *("?cellulitis", "Redness (?cellulitis)", "R/O cellulitis", "Ultrasound to rule out cellulitis"),
            *("The GP suspects cellulitis", "Suggestive of cellulitis", "Concern for cellulitis"),
        )
    ],
    *[
        ("certainty", f"Colonoscopy {plan}.", "The colonoscopy was performed.")
        for plan in ("is scheduled for June", "booked", "will follow")
    ],
    ("number", "ASA grade III, BMI 31.", "ASA grade II, BMI 31."),
    ("number", "CKD stage IV.", "Stage three CKD."),
    ("misplaced", "Gabapentin 300 mg TDS, senna at night.", "Gabapentin 300 mg twice a day."),
    ("misplaced", "Gabapentin 300 mg twice daily. Three falls.", "Gabapentin 300 mg three times daily."),
    ("time", "Clinic 11/09/2023: knee better.", "In the clinic on 11 December 2023 the knee was better."),
    ("time", "MRI 09/2023 normal.", "MRI in October 2023 was normal."),
    ("number", "Methotrexate 7½ mg weekly.", "Methotrexate 7 mg weekly."),
    ("time", "34+5 weeks, breech.", "34 weeks and three days, breech."),
    ("time", "Itch for a fortnight.", "Itch for 14 weeks."),
    ("time", "The fit lasted half an hour.", "The fit lasted 50 minutes."),
    ("number", "Fell at 6 pm.", "He fell at 19:00."),
    ("drug", "Frusemide 40 mg.", "Torasemide 40 mg."),
    ("person", "His uncle had retinoblastoma.", "He has retinoblastoma."),
    ("misplaced", "Ramipril started despite a cough.", "Despite a cough, ramipril was withheld."),
    ("misplaced", "Biopsy: malignancy.", "The biopsy was benign."),
    ("negation", "WCC not raised, CRP 3.", "The WCC was raised."),
]
TRUE = [
    (ASKED, "She has no low mood."),
    ("As a rule she takes ramipril 5 mg.", "She takes ramipril 5 mg."),
    (CLINIC, "A 68-year-old woman has had right knee pain for 14 days, without fever or rash."),
    (
        CLINIC,
        "Her left hip was replaced in 2011. Her sister has dementia. MRI is on Tuesday for a possible tear.",
    ),
    (CLINIC, "Metoprolol 50 mg BD. Hb 11.2, platelets 180."),
    (DIALOGUE, "Cough for 122 days, no chest pain. BP 110/70. EKG in July 1995. Rash from penicillin."),
    ("He is in his eighty second year, up at eleven thirty.", "Age 82, up at 11:30."),
    ("Between one o two and one o four, once one o two point six.", "Up to 104, from 102 to 102.6."),
    ("Glucagon given (no IV access), then toast. Foam negative pressure dressing.", "Glucagon, then toast."),
    ("No rash and no dementia, but her memory is failing.", "No rash, and her memory is failing."),
    ("I have one brother and two half brothers.", "One brother and 2 half-brothers."),
    ("Haloperidol .5 mg nocte", "haloperidol 0.5 mg"),
    ("Metformin 1 g daily for 3/52", "Metformin 1000 mg for three weeks"),
    ("Weight 70 kg. The patient is 5 months pregnant.", "1. Weight 70 kg. 2. Pregnant, 5 months."),
    ("Doctor: Do you smoke? Or drink every week.\nPatient: Nope.", "Drinking: No drinking, not a smoker."),
    (
        "Doctor: When was your last vaccine?\nPatient: I don't remember the month.",
        "Last vaccine: month not known.",
    ),
    ("Asked whether or not she would be a candidate for surgery.", "She may be a candidate for surgery."),
    ("Seen by Dr. May. No appetite for a week.", "No appetite for 7 days."),
    ("Return at once if fever or vomiting.", "She is to return at once for fever or vomiting."),
    ("Born 38/40 to a mother of 31. Now 40+2.", "Born at 38 weeks, now at 40+2 weeks."),
    ("Blood loss 400 mL. A drain in each wound.", "There is a drain in each wound. Blood loss 40"),
    ("CRP 402, now 260. GCS 13, down to 9.", "CRP 260 and GCS 9."),
    (WARD, "CRP fell from 210 to 88, and furosemide was switched to bumetanide."),
    (WARD, "Sacubitril has not been started; physiotherapy will visit her."),
    ("Hb raised in May, low now.", "Hb was raised in May and is low now."),
    ("No admissions, none since insulin was increased.", "Insulin was increased."),
    ("Doctor: How are you?\nPatient: My wife says she worries.", "He lives with his wife."),
    ("Imp: ?cholangitis. Bilirubin 60.", "Cholangitis is suspected."),
    ("R/O appendicitis.", "Appendicitis is to be ruled out."),
    ("Any fever? No. Any cough? Yes.", "He has a cough and no fever."),
    ("Her main concern is hair loss.", "She has hair loss."),
    ("Colonoscopy done, biopsies planned.", "Colonoscopy was performed."),
    ("Admitted for planned colonoscopy: no polyps.", "Colonoscopy was performed."),
    ("ASA grade III. CKD stage IV. T2DM.", "ASA grade 3, stage four CKD and type two diabetes."),
    ("One of two sisters has gout.", "One sister has gout."),
    ("Vomited twice. Gabapentin 300 mg TDS.", "He vomited two times. Gabapentin three times a day."),
    ("Cefalexin 500 mg every 8 hours.", "Cefalexin 500 mg three times daily."),
    ("Clinic 11/09/2023: knee better.", "In the clinic on 11 September 2023 the knee was better."),
    ("Clinic 2023-09-11: better. Pain since June.", "In the clinic on 11 September 2023 it was better."),
    ("MRI 09/2023 normal. Cast off on 8/11.", "MRI in September 2023 was normal. Cast off on 8 November."),
    (
        "Known COPD, CCF, PVD.",
        "Chronic obstructive pulmonary disease, congestive cardiac failure and peripheral vascular disease.",
    ),
    ("Methotrexate 7½ mg, ¼ tablet of digoxin.", "Methotrexate 7.5 mg, 0.25 tablets of digoxin."),
    ("34+5 weeks, breech.", "34 weeks and five days, breech."),
    ("Itch for a fortnight, a fit of half an hour.", "Itch for 14 days, a fit of 30 minutes."),
    ("Fell at 6 pm, seen at 18:30.", "He fell at 18:00 and was seen at 6:30 pm."),
    ("Frusemide 40 mg, noradrenaline off.", "Furosemide 40 mg, norepinephrine off."),
    ("His uncle had retinoblastoma.", "Retinoblastoma was found long ago in an uncle of his."),
    ("Ramipril not started because of cough.", "Because of cough, ramipril was withheld."),
    ("Biopsy: no malignancy. WCC not raised.", "The biopsy was benign. The WCC was not elevated."),
]


def kinds(note: str, summary: str) -> set[str]:
    return {finding.kind for finding in check_summary(note, summary).findings}


def test_every_word_of_the_lexicon_is_one_token():
    """Else it never matches a word of a text."""
    numbers = re.compile(r"[\d.e-]+=|=[\d.]+|\|")
    words = [word for words in LEXICON.values() for word in numbers.sub(" ", words).split()]
    assert not [word for word in words if not TOKEN.fullmatch(word)]


@pytest.mark.parametrize(("kind", "note", "summary"), WRONG)
def test_each_kind_is_found(kind, note, summary):
    assert kind in kinds(note, summary)


@pytest.mark.parametrize(("note", "summary"), TRUE)
def test_true_sentences_are_left_alone(note, summary):
    check = check_summary(note, summary)
    assert not kinds(note, summary) - {"unsupported", "misplaced"}
    assert not any(sentence.flagged for sentence in check.sentences)


def test_what_a_finding_says():
    summary = "Pain in the left knee, worse on stairs."
    check = check_summary(CLINIC, summary)
    side = next(finding for finding in check.findings if finding.kind == "side")
    assert summary[side.start : side.end] == side.says == "left knee"
    assert CLINIC[side.note_start : side.note_end] == side.note_says == "Right knee"
    assert side.note_sentence == 3
    assert 0 < check.score < 1
    assert check.risk == sum(sentence.risk for sentence in check.sentences) > 0
    assert check.sentences[0].flagged
    assert check.sentences[0].support[0] == 3
    assert (check.sentences[0].start, check.sentences[0].end) == (0, len(summary))


def test_a_note_supports_itself():
    """Also where a doctor is "she", two sides stand close together, or the order is another one."""
    note = (
        f"{CLINIC} His doctor thought it was gout: she may repeat the test if he has pain.\n"
        "Pain in both legs, left more than right\nPossible gout of the left toe"
    )
    check = check_summary(note, note)
    assert [sentence.support[0] for sentence in check.sentences] == list(range(1, len(check.sentences) + 1))
    for sentence in [
        *split_sentences(note),
        *note.split("\n")[1:],
        "Gout: Pain in both legs, left more than right.",
    ]:
        assert check_summary(note, sentence).risk == 0
    assert check_summary(note, "No fever, no rash [Evidence: S99; Conf: 0.9].").sentences[0].flagged
    assert check_summary(note, "Gout of the left toe.").sentences[0].flagged
    assert check_summary(note, "").score == 1
    assert check_summary("", "Fever.").score < 1


def test_a_loop_is_a_sign_and_counts_once():
    said = "She has dementia in the knee"
    once, twice = (check_summary(CLINIC, text) for text in (f"{said}.", f"{said}, dementia in the knee."))
    assert twice.risk > once.risk
    again = check_summary(CLINIC, f"{said}. " * 5)
    assert again.risk == once.risk
    assert len(again.sentences) == 5


def test_citations():
    good = "Left hip replaced in 2011 [Evidence: S2; Conf: 0.9]. Right knee pain [Evidence: S3; Conf: 0.9]."
    assert "citation" not in kinds(CLINIC, good)
    assert "citation" in kinds(CLINIC, good.replace("S2", "S6"))
    assert "citation" in kinds(CLINIC, good.replace("S2", "S99"))
    assert "citation" not in kinds(CLINIC, good.replace("S2", "S1-3"))
    # Without its end: the search for one must not take years
    check_summary(CLINIC, "Hip replaced [Evidence: S" + ", ".join(map(str, range(1, 60))))


def test_other_languages_get_no_findings():
    note = "Der Patient klagt über Schmerzen in der linken Schulter und nimmt Ibuprofen. Er hat kein Fieber."
    check = check_summary(note, "Der Patient hat Schmerzen in der rechten Schulter und Fieber seit 3 Tagen.")
    assert (check.language, check.findings, check.score) == ("other", [], 1)
    assert check_summary(CLINIC, "68F, R knee pain 2/52, MRI Tues").language == "en"


def test_a_reader_is_shown_what_is_flagged_and_no_more():
    summary = "A knee hurts for two weeks. She mentions dizziness. Left knee pain, worse on stairs."
    check = check_summary(CLINIC, summary)
    assert [sentence.flagged for sentence in check.sentences] == [False, False, True]
    assert check.sentences[1].risk > 0
    assert all(finding.start >= check.sentences[2].start for finding in check.findings)


def test_the_threshold_for_training_summaries_is_stricter():
    note = PreparedNote(CLINIC)
    summary = "Hemoglobin is 12.1."
    assert note.check(summary).sentences[0].flagged
    assert not note.check(summary, TRAINING_THRESHOLD).sentences[0].flagged


def shared_numbers():
    if not SHARED.is_dir():
        return [pytest.param("", "", "nothing", marks=pytest.mark.skip(reason="no ../shared/cases"))]
    cases = [
        (note, summary, right)
        for note, summary, _, right in json.loads((SHARED / "numbers.json").read_text())
    ]
    rows = csv.DictReader((SHARED / "03_numbers.csv").open(encoding="utf-8"))
    return cases + [(row["clinical_note"], row["model_summary"], "nothing") for row in rows]


@pytest.mark.parametrize(("note", "summary", "right"), shared_numbers())
def test_numbers_that_users_meet(note, summary, right):
    found = kinds(note, summary) & {"number", "unit", "time", "misplaced"}
    assert bool(found) == right.startswith("flag")


WORDS = st.sampled_from(
    "no not left right mother 5 mg 130/80 3/52 , . ? : \n if possible before Tuesday a week knee pain "
    "[Evidence: S1,2; Conf: 0.5] one twenty two over half R/L 1,000 .5 he she 12:30 é ß İ 🙂".split(" ")
)


NUMBER_WORDS = (
    [word.partition("=")[0] for name in ("numbers", "ordinals", "implied") for word in LEXICON[name].split()]
    + "point half and a over out of to by old mg % weeks yearold 1/2 3/52 12/03/2024 10:30 1,2 1.2.3 - . , ; ( ) ?".split()
    + "\n|no|fever|Plan:|F|[Evidence:|S1,2|Conf:|0.85]".split("|")
)
FREQUENT = st.sampled_from(["point", "half", "a", "and", "two", "thousand"])
SAID = st.lists(FREQUENT | st.sampled_from(NUMBER_WORDS) | st.text("0123456789.,/:", min_size=1), max_size=15)


@given(SAID.map(" ".join), SAID.map(" ".join))
@example("A1c went up a half point two months ago.", "Two and a half point five.")
@example("thousand " * 9 + "point five", "ten " + "thousand " * 9)
@settings(max_examples=150, deadline=None)
def test_numbers_in_any_words_are_read(note, summary):
    assert check_summary(note, summary).risk >= 0
    assert isinstance(accept(note, summary, note), list)
    assert all(fact.text for fact in not_mentioned(note, [summary]))
    assert all(citation["sentence_numbers"] for citation in parse_citations(summary, note))


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=40).map(" ".join)), st.lists(WORDS, max_size=40)
)
def test_any_text(note, words):
    summary = " ".join(words)
    check = check_summary(note, summary)
    assert check == check_summary(note, summary)
    assert 0 < check.score <= 1
    for finding in check.findings:
        assert finding.kind in KINDS
        assert summary[finding.start : finding.end].strip()
        assert finding.note_says is None or note[finding.note_start : finding.note_end] == finding.note_says


@pytest.mark.parametrize(
    "unit",
    ["left ", "no fever, ", "5 mg ", "mother ", "[Evidence: S1, 2, ", "1/2 ", "a/", "pain? No. ", "\n"],
)
def test_time_grows_with_length_alone(unit):
    def seconds(n: int) -> float:
        started = time.process_time()
        # Not the very words of the note, which are not compared further
        check_summary(unit * n, f"{unit * n} cough")
        return time.process_time() - started

    # Twice the text: 2 if linear, 4 if not
    assert min(seconds(800) for _ in range(2)) < 3 * max(0.01, min(seconds(400) for _ in range(2)))


def test_needs_no_torch():
    code = "import sys, sft.grounding; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_quality_on_the_validation_notes():
    """A floor under the figures of benchmarks/check_quality.py."""
    with open(ROOT / "phase1_data/sft/validation_set_processed.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    true = {row["clinical_note"]: row["model_summary"] for row in rows if row["label"] == "factual"}
    pairs = [(PreparedNote(row["clinical_note"]), row) for row in rows if row["label"] == "hallucinated"]
    risks = [
        (note.check(true[row["clinical_note"]]).risk, note.check(row["model_summary"]).risk)
        for note, row in pairs
    ]
    assert sum(wrong > right for right, wrong in risks) >= 0.85 * len(risks)
    checks = [check_summary(note, summary) for note, summary in true.items()]
    flags = [sentence.flagged for check in checks for sentence in check.sentences]
    assert sum(flags) <= 0.15 * len(flags)


@pytest.mark.parametrize(
    "layout", ["{}:\n- {}\n- {}\n\nHome.", "{}:\n\n• {}\n\n• {}\n\nHome.", "{}:\n{}\n{}\n\nHome."]
)
@pytest.mark.parametrize("heading", ["She denies", "No evidence of"])
def test_an_item_of_what_is_denied_is_not_said_alone(layout, heading):
    note = "52F with a cough.\n\n" + layout.format(heading, "chest pain", "syncope")
    assert check_summary(note, "Cough. Syncope. Chest pain.").sentences[-1].flagged
    for true in (
        f"{heading}: chest pain; syncope.",
        f"{heading} chest pain or syncope.",
        "No syncope.",
        "Home.",
    ):
        assert not any(sentence.flagged for sentence in check_summary(note, true).sentences)
    # The same items where nothing denies them
    assert check_summary(note.replace(heading, "She reports"), "Syncope. Chest pain.").risk == 0
