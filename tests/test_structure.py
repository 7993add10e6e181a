"""What the sentences of a note stand under, seen in its quotes: headings, lists, labels of relatives."""

import pytest
from tiny import quoted, selector

from sft.grounding.check import check_summary
from sft.grounding.cues import cues_of
from sft.grounding.selector import not_mentioned, quote
from sft.grounding.structure import read_units, shown_label

LAYOUTS = {
    "in the middle of a line": "45M, chest pain since Monday. {head}:\n- {one}\n- {two}\n\n{after}",
    "right below": "45M with chest pain.\n{head}:\n- {one}\n- {two}\n\n{after}",
    "empty line below the heading": "45M with chest pain.\n\n{head}:\n\n- {one}\n- {two}\n\n{after}",
    "empty lines everywhere": "45M with chest pain.\n\n{head}:\n\n1. {one}\n\n2. {two}\n\n{after}",
    "periods": "45M with chest pain.\n{head}:\n• {one}.\n• {two}.\n{after}",
    "a second list": "45M with chest pain.\n\n{head}:\n\n- {one}\n- {two}\n\n- {after}\n- home today",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "head, one, two",
    [
        ("Ruled out", "pulmonary embolism", "myocardial infarction"),
        ("She denies", "syncope", "haemoptysis"),
        ("Stopped", "warfarin 5 mg", "digoxin 62.5 mcg"),
        ("If the pain gets worse", "give morphine 5 mg", "repeat the ECG"),
        ("Donor", "hepatitis B in 1990", "treated syphilis"),
        (
            "At that time the patient told the team in clinic that there had never been any",
            "syncope",
            "cough",
        ),
    ],
)
def test_items_stand_behind_their_heading_alone(layout, head, one, two):
    note = LAYOUTS[layout].format(head=head, one=one, two=two, after="Ibuprofen 400 mg tds.")
    sentences = quote(note, selector())
    for sentence in sentences:
        if one in sentence.text or two in sentence.text:
            assert sentence.text.startswith(f"{head}: ")
            # Cited with its heading
            assert 2 in sentence.note_sentences
        else:
            assert head not in sentence.text
    assert any(f"{one}; {two}" in sentence.text for sentence in sentences)
    assert "Ibuprofen 400 mg tds." in [sentence.text for sentence in sentences]
    assert check_summary(note, " ".join(sentence.text for sentence in sentences)).risk == 0


def test_a_plan_by_item_stays_one():
    note = "45M with palpitations.\nPlan:\n1. apixaban 5 mg\n2. refer to cardiology\n\nAF:\n• Treatment: start bisoprolol 5 mg.\n• Treatment: repeat ECG."
    text = quoted(note)
    assert "Plan: apixaban 5 mg.\nRefer to cardiology." in text
    assert ";" not in text


@pytest.mark.parametrize(
    "note, wanted, unwanted",
    [
        ("PMH: COPD. Family history: mother had breast cancer. {}", "Family history: mother", ""),
        ("FH: mother had gout. Sister: stroke. {}", "", "Sister: CT"),
        ("Social history: smoker, lives alone. Retired. {}", "", ""),
        ("PMH: COPD. Medications: aspirin 75 mg. Ramipril 5 mg. {}", "Ramipril 5 mg", ""),
        ("Family history\nMother had breast cancer.\n\n{}", "", "breast cancer. CT"),
        ("SOCIAL HISTORY\n\nSmoker.\n\n{}", "", ""),
        ("Review of systems:\n- no fever\n\n- no cough\n\n{}", "", ""),
    ],
)
def test_what_is_said_of_relatives_ends_where_the_patient_comes_in(note, wanted, unwanted):
    note = "52F with a lump.\n" + note.format("CT shows a 4 cm mass.") + "\nPlan: biopsy."
    text = quoted(note)
    assert "CT shows a 4 cm mass." in text.split("\n")
    assert wanted in text
    assert not unwanted or unwanted not in text
    (mass,) = [unit for unit in read_units(note) if "CT shows" in unit.text]
    assert not (mass.topic or mass.label or mass.heading)
    missing = not_mentioned(note, ["A 52-year-old woman has a lump."])
    assert "CT shows a 4 cm mass." in [one.text for one in missing]


def test_a_relatives_second_disease_is_not_quoted_without_the_first():
    for label in ("FH", "Family history"):
        note = f"52F with a lump. PMH: COPD. {label}: breast cancer at 45. Ovarian cancer. Plan: biopsy."
        units = read_units(note)
        assert [units[unit.needs - 1].label for unit in units if "Ovarian" in unit.text] == [label]


@pytest.mark.parametrize(
    "note",
    [
        "{}:\n{}\n{}\n\nChest X-ray shows a right pneumonia.\nPlan: home.",
        "81M with a fall.\n{}:\n\n{}\n{}\n\nChest X-ray: right pneumonia.",
        "81M with a fall.\n{}:\n{}\n{}\n\n- right pneumonia\n- home today",
        "{}:\n{}\n{}\n81M, CKD 4. Chest X-ray shows a right pneumonia.",
        "{}:\n{}\n{}\n81M, CKD 4",
    ],
)
@pytest.mark.parametrize(
    "names",
    [
        ("Allergies", "Penicillin", "Latex"),
        ("Avoid", "Gentamicin", "Iodine contrast"),
        ("Background", "COPD", "AF"),
    ],
)
def test_the_last_line_of_a_list_is_no_heading(note, names):
    note = note.format(*names)
    units = read_units(note)
    assert {unit.text.rstrip(":") for unit in units if unit.kind == "heading"} == {names[0]}
    below = [unit for unit in units if unit.heading]
    assert {unit.text for unit in below} >= set(names[1:-1])
    assert not any("81M" in unit.text or "pneumonia" in unit.text for unit in below)
    said = quoted(note) + " ".join(one.text for one in not_mentioned(note, ["Fall."]))
    assert names[2] in said


def test_titles_are_headings_still():
    note = "81M with a fall.\nExamination:\nAbdomen\nSoft, no masses.\nChest\nClear.\n\nPlan: home."
    units = read_units(note)
    assert [unit.text.rstrip(":") for unit in units if unit.kind == "heading"] == [
        "Examination",
        "Abdomen",
        "Chest",
    ]


def test_short_forms_stay_in_capitals():
    for label in ("FH", "SH", "DH", "ROS", "OP", "CT KUB"):
        assert shown_label(label) == label
    assert [shown_label(label) for label in ("PLAN", "DIAGNOSIS")] == ["Plan", "Diagnosis"]


def test_diagnoses_below_each_other_are_no_headings_and_end_before_the_story():
    note = (
        "Diagnoses\nGout\nAtrial fibrillation\n\nThis 58M attended for review. CRP 48.\nReview in 3 months."
    )
    assert [u.text for u in read_units(note) if u.kind == "heading"] == ["Diagnoses"]
    assert [u.text for u in read_units(note) if u.heading] == ["Gout", "Atrial fibrillation"]


@pytest.mark.parametrize(
    "note, wanted",
    [
        (
            "Scan.\nImpression:\n1. Renal cyst.\n2. Aortic dissection.\nThank you for asking us",
            "Aortic dissection.",
        ),
        ("72F, fall at home.\nImp: ? hip fracture. Plan: X-ray pelvis.", "Impression: ?hip fracture."),
        ("70F, fall at home. Chest pain ? No. Low mood ? Denied. Plan: CT.", "Chest pain ? No."),
        ("? sepsis. 80M hot and confused. Plan: cultures.", "?sepsis."),
        (
            "33F. Scan: ectopic L tube? Right ovary normal. Plan: repeat.",
            "Ectopic L tube? Right ovary normal.",
        ),
        (
            "70M. Day 1: on vasopressin 0.03 units/min. Day 3: Off vasopressin. Plan: ward.",
            "Day 3: Off vasopressin.",
        ),
        (
            "Dear Dr Low,\nThank you for seeing this woman who fainted on stairs.\nKind regards",
            "Thank you for seeing",
        ),
        ("Histology. A: Squamous carcinoma. B: Benign naevus. C: Normal skin.", "(A): Squamous carcinoma."),
        ("Samples. A: benign naevus B: melanoma, 0.9 mm", "(A): benign naevus B: melanoma, 0.9 mm."),
    ],
)
def test_what_would_turn_its_meaning_stays(note, wanted):
    """The last item of a list, a doubt, a stop, a complaint in a greeting, a specimen's letter."""
    assert wanted in quoted(note)


def test_what_relatives_tell_is_of_the_patient():
    def is_of_others(text: str) -> bool:
        return "others" in cues_of(read_units(text)[0])

    told = [
        "Son states mum has not eaten.",
        "Last seen well 09:20 by wife.",
        "Mum was worried that he is limp.",
    ]
    assert not any(map(is_of_others, told))
    assert all(
        map(is_of_others, ["Son has diabetes.", "Mother says her sister has asthma.", "Wife had a stroke."])
    )


def test_retractions_laboratory_flags_and_listings_are_seen():
    def cues(text: str) -> frozenset[str]:
        return cues_of(read_units(text)[0])

    assert "correction" in cues("Last entry filed in error, please ignore.")
    assert "correction" not in cues("Refractive correction and INR correction discussed.")
    assert "abnormal" in cues("Potassium 7.1 mmol/L 3.5-5.3 HH")
    assert "abnormal" not in cues("Power 5/5 LL and 3-4 L of fluid.")
    assert "warning" in cues("Not for home, sepsis not settled.")
    assert "action" in cues("Listed for LEFT total knee replacement.")


@pytest.mark.parametrize(
    "note, wanted",
    [
        ("ALLERGIES: LATEX\nCODE STATUS: NOT FOR CPR\nDIET: SOFT\nTO DO: CT HEAD TODAY", "NOT FOR CPR"),
        (
            "Ward: 7\nReason for admission: Sepsis of the urinary tract\nMedications:\nAllergies: Codeine\nPlan:\nIV fluids",
            "Sepsis",
        ),
        (
            "Assessment and Plan\n1. Gout - better\nStatus: walks\nPlan: stop indapamide, no NSAIDs\n2. Asthma - stable",
            "no NSAIDs.",
        ),
        ("Trauma. A: nuts. M: apixaban. P: AF in 2018. L: 08:00. E: fell from a ladder.", "(A): nuts."),
        ("Q: Any rash? A: none. Q: Fever? A: since Monday, up to 39.", "Fever? since Monday"),
        (
            "Eyes today.\nRight eye   Left eye\nVA 6/12 6/60\nIOP 14 31\nPlan: drops to the left eye.",
            "Right eye Left eye: VA 6/12 6/60",
        ),
        ("Discharge.\n| Drug | Dose |\n| Codeine | stopped |\nPlan: home.", "Codeine | stopped."),
    ],
)
def test_lines_that_say_something_are_no_headings(note, wanted):
    assert wanted in quoted(note)


def test_page_ends_identifiers_and_signatures_are_not_quoted():
    note = (
        "MRN: 0012345\nPatient name: ROE, PAT\n64F with cellulitis of the left leg.\nPage 1 of 2\n"
        "Started flucloxacillin 1 g.\nWith best wishes\nDr J. Low\nConsultant in acute medicine\nSent from my phone"
    )
    text = quoted(note)
    assert "cellulitis" in text
    assert "flucloxacillin" in text
    for part in ("MRN", "ROE", "Page", "wishes", "Low", "Consultant", "Sent"):
        assert part not in text
    # Of the patient all the same
    assert "81F with chest pain" in quoted(
        "Name: Pat Roe 81F with chest pain\nPlan: ECG.\nSent: blood cultures"
    )
    assert "Sent: blood cultures" in quoted("81F with chest pain\nPlan: ECG.\nSent: blood cultures")


def test_what_is_missing_is_named_with_its_label():
    missing = not_mentioned(
        "66M, fall. INR today: 5.8. Impression: Sepsis. Plan: vitamin K.", ["A man fell."]
    )
    assert {"INR today: 5.8.", "Sepsis."} <= {one.text for one in missing}
    note = "70M, cough.\nExam:\nTender left calf, no redness.\nNo oedema.\nPlan: chest film."
    missing = not_mentioned(note, ["A 70-year-old man with cough has a chest film."])
    assert [one.text for one in missing] == ["Tender left calf, no redness."]
