"""The acceptance of written sentences: what may be said in other words, and attacks that must not pass."""

import csv
import functools
import itertools
import re
import time

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.grounding.acceptance import accept
from sft.grounding.parts import make_parts
from sft.grounding.selector import fit_selector, quote

WOMAN = "Mrs Hill is a 71-year-old woman."
MAN = "60M, seen today."
FLU = "Patient reports fever of 38.5°C and cough. Tested positive for influenza A."


@pytest.mark.parametrize(
    "part, sentence",
    [
        (FLU, "The patient tested positive for influenza A and has fever."),
        (FLU, "The patient tested positive for influenza A and has fever. [Evidence: S1,2; Conf: 0.85]"),
        (FLU, "The patient reports fever of 38.5 °C and cough, and tested positive for influenza A."),
        ("29F, 3/52 pain in R calf.", "A 29-year-old woman has 3 weeks of pain in the right calf."),
        ("29F, 3/52 pain in R calf.", "A 29-year-old woman with three weeks of pain in the right calf."),
        (
            "Pt c/o chest pain, hx of asthma.",
            "The patient complains of chest pain and has a history of asthma.",
        ),
        ("BP 120/80, pulse 76.", "The pulse is 76 and the blood pressure is 120/80."),
        (
            "Stool toxin is negative; the cultures are outstanding.",
            "The cultures are outstanding and the stool toxin is negative.",
        ),
        ("Home visit Thursday.", "A home visit is on Thursday."),
        ("Night sitter arranged.", "A night sitter is arranged."),
        ("BP 120/80, pulse 76.", "The BP is 120/80."),
        ("BP 184/96, SpO2 95% air, GCS 14.", "BP 184/96, GCS 14."),
        ("Weight 60 kg, height 170 cm.", "The weight is 60 kg."),
        ("Fever, visible haematuria.", "The patient has fever."),
        ("GCS now 13, asking where he is.", "The GCS is now 13."),
        ("Impression: Colles fracture.", "Colles fracture."),
        ("Diagnosis: Colles fracture.", "The diagnosis is Colles fracture."),
        ("Plan: amoxicillin 500 mg TDS.", "Plan: amoxicillin 500 mg three times daily."),
        ("Denies fever, cough or rash.", "The patient has no fever, cough or rash."),
        ("?PE, awaiting CT.", "Possible PE, awaiting CT."),
        ("Drowsy, no rash.", "The patient is drowsy and has no rash."),
        ("Fever, no rash.", "The patient has fever and no rash."),
        ("Swelling of the ankle.", "The patient has swelling of the ankle."),
        ("Na 118 (139 in March).", "The Na is 118 (139 in March)."),
        ("Haemoglobin 104.0 g/L.", "The hemoglobin is 104 g/L."),
        ("HR 72, BP 130/70.", "The heart rate is 72 and the blood pressure is 130/70."),
        ("Flu A+, COVID-.", "Flu A positive and COVID negative."),
        ("Extubated at 10:00.", "The patient was extubated at 10:00."),
        ("Confusion secondary to hyponatraemia.", "The confusion is secondary to hyponatraemia."),
        ("Smear normal in May, low grade now.", "The smear was normal in May, and low grade now."),
        ("Still bleeding, stable.", "Still bleeding and stable."),
        ("No headache or rash.", "There is no headache or rash."),
    ],
)
def test_true_sentences_in_other_words_are_accepted(part, sentence):
    assert accept(part, sentence, f"{part}\n{WOMAN if 'F,' not in part else ''}") == []


def test_the_patient_is_named_as_the_note_does_it():
    part = "Tested positive for influenza A."
    assert accept(part, "The 71-year-old woman tested positive for influenza A.", f"{WOMAN} {part}") == []
    assert accept(part, "She tested positive for influenza A.", f"{WOMAN} {part}") == []
    assert accept(part, "He tested positive for influenza A.", f"{MAN} {part}") == []
    for note, opening in [
        (WOMAN, "A 60-year-old woman"),
        (WOMAN, "A 71-year-old man"),
        (WOMAN, "He"),
        (MAN, "She"),
        ("", "A 60-year-old man"),
        ("", "She"),
        ("His wife is 60.", "She"),
    ]:
        assert accept(part, f"{opening} tested positive for influenza A.", f"{note} {part}")


def test_a_learned_short_form_may_be_spelled_out():
    part = "Creat 212."
    assert accept(part, "The creatinine is 212.", part)
    assert accept(part, "The creatinine is 212.", part, {"creat": ["creatinine"]}) == []


@pytest.mark.parametrize("forms", [[], [""], None])
def test_a_short_form_that_was_emptied_stands_for_nothing(forms):
    part, sentence = "Creat 212, swab taken.", "The creat is 212, swab taken."
    assert accept(part, sentence, part, {"creat": forms}) == accept(part, sentence, part) == []
    assert accept(part, "The creatinine is 212, swab taken.", part, {"creat": forms})


# From the prototype: what slipped through it, or through looser rules
SLIPS = [
    ("LFTs at 2 and 4 weeks.", "LFTs were at 2 and 4 weeks."),
    (
        "Donor - 57F, sister of recipient, type 1 diabetes, hypertension.",
        "Donor - 57F, type 1 diabetes, hypertension.",
    ),
    (
        "Donor - 57F, sister of recipient. Recipient has type 1 diabetes.",
        "The donor, a 57-year-old woman, has type 1 diabetes.",
    ),
    ("N-acetylcysteine 1 g, stopped at 300 mg.", "N-acetylcysteine 1 g."),
    ("Lesion over the defect in the wall, which lies over the fascia.", "Lesion over the fascia."),
    ("Is he breathing normally?", "He is breathing normally."),
    ("Dribbling?", "The patient is dribbling."),
    ("MRI: both hips.", "MRI shows both hips."),
    ("Mother: Not swallowed.", "The mother has not swallowed."),
    ("Metoprolol increased from 750 to 500 mg.", "Metoprolol increased to 500 mg."),
    ("Right 80-89 %, left 50 % for surveillance.", "Right 80-89 % for surveillance."),
    ("Amitriptyline overdose 2 g.", "Overdose 2 g."),
    ("No reason for an MRI.", "No MRI."),
    ("No reason for an MRI.", "MRI."),
    ("QTc: 480 ms. Diagnosis: syncope.", "QTc 480 ms syncope."),
    ("Please repeat the bloods in a week.", "The patient should repeat the bloods in a week."),
    ("Please repeat the bloods in a week.", "She is to repeat the bloods in a week."),
    ("Please repeat the bloods in a week.", "The bloods repeat in a week."),
    ("Saline 500 mL given. Her own medicines: ramipril.", "Her own medicines: saline 500 mL, ramipril."),
]

ATTACKS = [
    # Reordered, dropped, doubled, fused
    ("Pain in the left knee.", "Left pain in the knee."),
    ("The rash spread from the arm to the leg.", "The rash spread from the leg to the arm."),
    ("Fever of 38.5°C and cough.", "Cough of 38.5°C and fever."),
    ("Fever of 38.5°C and cough.", "Fever and fever and cough."),
    ("Acute kidney injury on chronic kidney disease.", "Acute kidney disease."),
    ("Known with heart failure, renal failure excluded.", "Heart failure, renal failure."),
    ("Swelling of the ankle. Fracture of the wrist.", "Swelling of the wrist."),
    ("Swelling of the ankle. Fracture of the wrist.", "Swelling of the ankle fracture of the wrist."),
    ("Gallstones, drain in situ, 50 mL.", "Gallstones, 50 mL."),
    ("Family history of breast cancer, diabetes.", "The patient has diabetes."),
    ("Screened for diabetes, hypertension.", "Hypertension."),
    ("Allergies: penicillin, latex.", "Penicillin, latex."),
    ("Uterus normal. Ovary torn. Removed.", "Uterus normal and removed."),
    ("Cancer, liver.", "Cancer of liver."),
    ("Diabetes, asthma.", "Diabetes is asthma."),
    ("Wound infection.", "The wound has infection."),
    ("Heart failure.", "Heart and failure."),
    ("Aspirin 75 mg, warfarin.", "Aspirin, warfarin 75 mg."),
    ("High risk with postural drop.", "High risk has postural drop."),
    ("Takes doxazosin and amitriptyline.", "Takes doxazosin who amitriptyline."),
    ("HIV negative, hepatitis C positive, RNA awaited.", "HIV negative, RNA awaited."),
    ("Positive for influenza A.", "Positive for influenza."),
    ("Transesophageal echo this week.", "Transesophageal echo was week."),
    ("No seizures, GCS 15.", "No she seizures, GCS 15."),
    ("Calculus at left VUJ.", "Calculus is left VUJ."),
    ("Continue methotrexate and folate.", "Continue methotrexate and"),
    ("Hour 3: calf cramp, BP 94/50.", "BP 94/50."),
    # Numbers, units, what they measure
    ("BP 120/80, pulse 76.", "BP 76, pulse 120/80."),
    ("BP 120/80, pulse 76.", "BP 80/120, pulse 76."),
    ("Morphine 10 mg at 5 pm.", "Morphine 5 mg at 10 pm."),
    ("Morphine 10 mg.", "Morphine 10 mcg."),
    ("Morphine 10 mg.", "Morphine 100 mg."),
    ("Morphine 1.0 mg.", "Morphine 10 mg."),
    ("Prednisolone 40 mg for 5/7.", "Prednisolone 40 mg for 5 weeks."),
    ("Cough for 3/52.", "Cough for 3 months."),
    ("Cough, 3 weeks.", "Cough in 3 weeks."),
    ("Potassium 3.9, sodium 139.", "Potassium 139, sodium 3.9."),
    ("Potassium 2.8, now 3.9.", "Potassium now 2.8."),
    ("Potassium 2.8, now 3.9.", "The potassium is 2.8."),
    ("Infected PICC line, since removed.", "The patient has an infected PICC line."),
    ("Ramipril 5 mg, reduced to 2.5 mg.", "Ramipril 5 mg."),
    ("Ramipril cut from 5 mg to 2.5 mg.", "Ramipril cut from 2.5 mg to 5 mg."),
    ("Takes 2 of the 8 tablets.", "Takes the 8 tablets."),
    ("Base excess -8.", "The base excess is 8."),
    ("Base excess -8.", "A base excess of 8."),
    ("Warfarin 5 mg Monday, 3 mg Tuesday.", "Warfarin 5 mg Monday."),
    ("Creatinine 118, 156, 134.", "Creatinine 118, 134."),
    ("BP 88/54, after fluids 110/70.", "The BP is 88/54."),
    ("In pregnancy, BP was 160/90.", "BP was 160/90."),
    ("Stroke, in 2015.", "The patient has a stroke."),
    ("In 2015, stroke with weak arm.", "The patient has a stroke with weak arm."),
    ("CRP 40, yesterday 200.", "CRP 200."),
    ("Hb 104 g/L.", "Hb 104 g/dL."),
    ("FVC 1.9 L -> 1.6 L, sats 97%.", "FVC 1.9 L, sats 97%."),
    ("Seropositive RA, 49F, 6 yrs.", "A 49-year-old woman, 6 years."),
    # Sides
    ("Fracture of the left wrist, right wrist normal.", "Fracture of the right wrist, left wrist normal."),
    ("Fracture of the left wrist, right wrist normal.", "Fracture of the left wrist, wrist normal."),
    ("R calf swollen.", "The left calf is swollen."),
    ("L arm weak, face spared.", "Arm weak, face spared."),
    # Persons
    ("His brother had a stroke at 60.", "He had a stroke at 60."),
    ("His brother had a stroke at 60.", "The patient had a stroke at 60."),
    ("Wife has rheumatoid arthritis, smokes.", "The patient smokes."),
    ("I feel tired.", "She feels tired."),
    ("I explained the risks.", "The patient explained the risks."),
    ("GP to decide on statin.", "She is to decide on statin."),
    ("Dr Jones reviewed the scan.", "Dr Jones was reviewed."),
    ("Advised to stop smoking.", "She advised to stop smoking."),
    ("She was advised to stop smoking.", "She advised to stop smoking."),
    ("Patient refused surgery.", "The patient was refused surgery."),
    ("Oncology reviewed the scan.", "Oncology was reviewed, the scan."),
    ("Daughter reports confusion.", "The daughter has confusion."),
    ("Nurse gave paracetamol.", "She gave paracetamol."),
    ("Mother of twins, twin 2 has sepsis.", "The mother has sepsis."),
    # Tense, plans
    ("Plan: chest film in six weeks.", "The patient had a chest film in six weeks."),
    ("Start amoxicillin 500 mg.", "Amoxicillin 500 mg was started."),
    ("Start amoxicillin 500 mg.", "She started amoxicillin 500 mg."),
    ("Start amoxicillin 500 mg.", "She starts amoxicillin 500 mg."),
    ("Plan: start statin; chest film, physiotherapy.", "She has a chest film, physiotherapy."),
    ("CT tomorrow.", "CT was tomorrow."),
    ("Surgery planned.", "Surgery."),
    ("She will have surgery.", "She has surgery."),
    ("She was on warfarin.", "She is on warfarin."),
    ("She was on warfarin.", "The patient on warfarin."),
    ("She had asthma.", "She has asthma."),
    ("Previous stroke.", "The patient has a stroke."),
    ("Warfarin to be stopped.", "Warfarin stopped."),
    ("Bloods pending.", "Bloods."),
    ("For biopsy.", "Biopsy."),
    # Denials
    ("No fever, cough or rash.", "The patient has cough or rash."),
    ("No fever, cough or rash.", "No fever but cough or rash."),
    ("No fever, cough or rash.", "No fever, and has cough or rash."),
    ("No fever. Cough.", "No fever, cough."),
    ("Cough. No rash or fever.", "No cough, rash or fever."),
    ("Not in pain.", "In pain."),
    ("The scan was not normal.", "The scan was normal."),
    ("Has never smoked.", "Has smoked."),
    ("PE: not seen.", "PE."),
    ("Pain, none at rest.", "Pain at rest."),
    ("Swab negative.", "Swab."),
    ("She did not vomit and ate well.", "She did vomit and ate well."),
    # Doubts, conditions, alternatives, questions
    ("Possible PE.", "PE."),
    ("?NEC, not confirmed.", "NEC, not confirmed."),
    ("?NEC, not confirmed.", "Possible NEC."),
    ("Pneumonia, likely viral.", "Viral pneumonia."),
    ("PE or pneumonia.", "PE."),
    ("Mass, possibly a cyst.", "The patient has a mass, a cyst."),
    ("Home if afebrile.", "Home."),
    ("Return if worse, otherwise clinic in May.", "Return, clinic in May."),
    ("Reintubate if it fails, confirmed with him.", "Reintubate, confirmed with him."),
    ("Dialysis unless the potassium falls.", "Dialysis."),
    ("Any chest pain?", "The patient has chest pain."),
    ("Chest pain today.", "Chest pain today?"),
    ("Pain, except at night.", "Pain at night."),
    ("Enoxaparin 40 mg while immobilised.", "Enoxaparin 40 mg."),
    ("EEG requested; MRI only if that is abnormal.", "EEG requested; MRI only if."),
    ("Admit if febrile and neutropenic.", "Admit if febrile."),
    ("No rash with fever.", "No rash."),
    ("GDH and toxin positive.", "GDH."),
    ("LMA in, saturation 99%.", "LMA."),
    # Headings, and what is empty
    ("Indication: liver abscess.", "The indication is liver abscess."),
    ("Differential: lymphoma, sarcoid.", "Lymphoma, sarcoid."),
    ("Family history: asthma.", "Asthma."),
    ("DDx: lymphoma, sarcoid.", "Lymphoma, sarcoid."),
    ("Plan: insulin.", "Insulin."),
    ("His brother had a stroke; he had diabetes too.", "He had diabetes too."),
    ("Past medical history: stroke.", "The patient has a stroke."),
    ("Fever.", ""),
    ("Fever.", "The patient is."),
    # What is dropped corrects, ends or limits what stays
    ("Aspirin (omitted today), clopidogrel 75 mg.", "Aspirin."),
    ("Aspirin (omitted today), clopidogrel 75 mg.", "Aspirin, clopidogrel 75 mg (omitted today)."),
    ("Diazepam 5 mg, given in error.", "Diazepam 5 mg."),
    ("K 5.9 (haemolysed).", "The K is 5.9."),
    ("Gentamicin 5 mg/kg.", "Gentamicin 5 mg."),
    ("Migraine, gone since menopause.", "Migraine."),
    ("Upper limbs, face and speech spared.", "Upper limbs."),
    ("Chronic kidney and heart disease.", "Chronic kidney."),
    ("Pain with flexion of the elbow.", "Pain."),
    ("Pain was only associated with coughing.", "Pain was only associated."),
    ("Delirium. Resolved by day 3.", "The patient has delirium."),
    ("MS was suspected. It was later ruled out.", "MS was suspected."),
    ("Diagnosed with epilepsy. Diagnosis revised to syncope.", "Diagnosed with epilepsy."),
    ("Tamoxifen prescribed. She never took it.", "Tamoxifen was prescribed."),
    ("Clinic in 6 weeks, sooner for fever.", "Clinic in 6 weeks."),
    ("Aspirin 75 mg, avoid asthma.", "Aspirin 75 mg."),
    ("Apixaban dose of 5 mg stopping Friday.", "Apixaban dose."),
    ("Potassium 6.8, lactate 2, potassium 4.9.", "Potassium 6.8, lactate 2."),
    ("Fluids 5 L over 24 h, half by 04:30.", "Fluids 5 L over 24 h."),
    # What came first, what goes with what
    ("Rash appeared. Amoxicillin stopped.", "Amoxicillin was stopped and a rash appeared."),
    ("Stent placed. Chest pain returned.", "Chest pain returned. Stent placed."),
    ("Confused while febrile.", "Confused and febrile."),
    ("Pain with movement.", "Pain and movement."),
    ("Levels of sodium, and a urine sample.", "Levels of sodium, of a urine sample."),
    ("Also has gout.", "The patient still has gout."),
    ("He worked there.", "He currently worked there."),
    # Letters with two senses
    ("HR 72, BP 130/70.", "Hour 72, blood pressure 130/70."),
    ("PT 18 s, APTT 42 s.", "The patient has 18 s and APTT 42 s."),
    ("For PT and OT tomorrow.", "For the patient and OT tomorrow."),
    ("P 72, R 18.", "P 72, right 18."),
    ("14F catheter in situ.", "A 14-year-old woman, catheter in situ."),
    ("Nitrites -, leucocytes +.", "Nitrites and leucocytes."),
    ("Nitrites -, leucocytes +.", "Nitrites +, leucocytes -."),
    # No English
    ("Ibuprofen stopped, paracetamol instead.", "Ibuprofen was stopped, paracetamol was instead."),
    ("High blood sugar.", "High was blood sugar."),
    ("Levothyroxine 75 micrograms.", "Levothyroxine 75 was micrograms."),
    ("Recovery 14:10.", "Recovery is 14:10."),
    ("He fell.", "A he fell."),
    ("Denies chest pain.", "Is denies chest pain."),
    ("Vomited twice, tremor.", "Tremor with vomited twice."),
    ("TIVA, LMA.", "There is TIVA, LMA."),
    ("Ward ECG.", "The patient reports ward ECG."),
    # What no patient is or has
    ("Loose slippers.", "The patient is loose slippers."),
    ("No tampons for 5 days.", "The patient has no tampons for 5 days."),
    ("No pain diary for a week.", "She has no pain diary for a week."),
    ("No treatment unless the ECG is abnormal.", "The patient has no treatment unless the ECG is abnormal."),
    ("Observations stable.", "The patient is observations stable."),
    ("Probable gout.", "The patient is probable gout."),
    ("Ultrasound shows no stones.", "The patient has ultrasound shows no stones."),
    ("He was catheterised.", "The patient is he was catheterised."),
    ("Redressed with alginate.", "The patient is redressed with alginate."),
    # A stamp of place or time is no subject
    ("Recovery 14:10.", "Recovery is 14:10."),
    ("14:10 recovery.", "14:10 is recovery."),
    ("Resus 9:05 pm.", "The resus was 9:05 pm."),
    ("Clinic 12/03/2024.", "The clinic is 12/03/2024."),
    ("Theatre 3.", "The theatre is 3."),
    ("Dating scan Thursday.", "A dating scan was Thursday."),
    ("Growth scans from 28 weeks.", "Growth scans were from 28 weeks."),
    ("Day 2 of antibiotics.", "The day is 2 of antibiotics."),
    ("Base 80% granulation, no odour.", "The patient has a base 80% granulation with no odour."),
]


@pytest.mark.parametrize("part, sentence", SLIPS + ATTACKS)
def test_attacks_are_refused(part, sentence):
    reasons = accept(part, sentence, f"{WOMAN}\n{part}")
    assert reasons
    assert all(len(reason) < 100 for reason in reasons)


@pytest.mark.parametrize("mark", [", ", ". "])
@pytest.mark.parametrize(
    "limit",
    "stop Friday|stopping Friday|withholding this week|omitting doses|resolving|worsening|tapering|reducing 5 mg weekly|weaning|"
    "max 3 g|maximum 3 g|limit 2 litres|omit HR 50|usual 75 kg|best 500|baseline 80|predicted 500".split("|"),
)
def test_what_withdraws_or_limits_may_not_be_left_out(limit, mark):
    said = limit if mark == ", " else limit.capitalize()
    assert accept(f"Value 180 mg daily{mark}{said}.", "Value 180 mg daily.", "")


@pytest.mark.parametrize(
    "order", ["cap 3 g", "admission 120", "alternating with 4 mg", "holding for bleeding"]
)
def test_what_is_no_finding_nor_a_measured_value_may_not_be_left_out(order):
    assert accept(f"Warfarin 3 mg, {order}.", "Warfarin 3 mg.", "")


@functools.cache
def quoted_parts() -> list[tuple[str, str]]:
    """(quoted words, note) of every part of the validation notes."""
    rows = {}
    for name in ("train", "validation"):
        path = ROOT / "phase1_data" / "sft" / f"{name}_set_processed.csv"
        with open(path, encoding="utf-8", newline="") as file:
            rows[name] = [row for row in csv.DictReader(file) if row["label"] == "factual"]
    selector = fit_selector((row["clinical_note"], row["model_summary"]) for row in rows["train"])
    notes = [row["clinical_note"] for row in rows["validation"]]
    return [(part.quoted, note) for note in notes for part in make_parts(note, quote(note, selector))]


def test_the_notes_own_words_are_accepted():
    for quoted, note in quoted_parts():
        assert accept(quoted, quoted, note) == []
        assert accept(quoted, quoted.rstrip("."), note) == []


WORDS = st.sampled_from(
    "fever cough ulcer aspirin swollen ankle mild sodium CT biopsy rash tender cyst stent".split()
)
CLAUSES = st.lists(WORDS, min_size=3, max_size=5, unique=True).map(" ".join)
PARTS = st.lists(CLAUSES, min_size=1, max_size=4, unique=True).map(lambda clauses: ", ".join(clauses) + ".")


@given(PARTS, st.data())
@settings(max_examples=100, deadline=None)
def test_a_word_dropped_inside_a_clause_is_refused(part, data):
    words = part.split()
    inner = [i for i in range(1, len(words) - 1) if words[i][-1].isalpha() and words[i - 1][-1].isalpha()]
    index = data.draw(st.sampled_from(inner))
    assert accept(part, part, part) == []
    assert accept(part, " ".join(words[:index] + words[index + 1 :]), part)


def test_a_word_dropped_or_doubled_in_a_note_is_refused():
    for quoted, note in quoted_parts()[::3]:
        words = quoted.split()
        for i in range(1, len(words) - 1):
            # Of light words many may go
            inner = all(re.fullmatch("[a-z]{6,}", word) for word in words[i - 1 : i + 2])
            if inner and words[i] not in (
                "reports",
                "presented",
                "complains",
                "patient",
                "although",
                "however",
            ):
                assert accept(quoted, " ".join(words[:i] + words[i + 1 :]), note), (quoted, words[i])
                assert accept(quoted, " ".join(words[: i + 1] + words[i:]), note), (quoted, words[i])


def test_exchanged_numbers_are_refused():
    n_tried = 0
    for quoted, note in quoted_parts():
        numbers = list(re.finditer(r"(?<![\w./,:-])\d+(?:\.\d+)?(?![\w./,:-]*\d)", quoted))
        for first, second in itertools.pairwise(numbers):
            if float(first[0]) != float(second[0]):
                start, end = quoted[: first.start()], quoted[second.end() :]
                swapped = start + second[0] + quoted[first.end() : second.start()] + first[0] + end
                assert accept(quoted, swapped, note), (quoted, swapped)
                n_tried += 1
    assert n_tried > 50


@given(st.permutations("fever cough ulcer aspirin mild sodium rash cyst".split()), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_whole_sentences_may_change_places(words, cut):
    first, second = " ".join(words[:cut]), " ".join(words[cut:])
    assert accept(f"{first}. {second}.", f"{second}. {first}.", "") == []
    assert accept(f"{first}. {second}.", f"{second} and {first}.", "") == []


@given(st.text(max_size=80), st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_text_is_judged_and_itself_accepted(part, sentence):
    assert isinstance(accept(part, sentence, part), list)


def test_time_grows_linearly():
    def seconds(n: int) -> float:
        part = "fever " * n + "no cough, " * n + "a: b. " * n + "5 mg of 5, " * n
        started = time.process_time()
        accept(part, part + " more", part)
        accept(part, part.replace("cough", "a cough and"), part)
        return time.process_time() - started

    seconds(50)
    assert seconds(800) < 8 * seconds(200) + 0.1
