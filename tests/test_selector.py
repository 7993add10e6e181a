"""Note sentences chosen by a selector fitted on training rows, and what a summary leaves out."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import quoted, selector

from sft.grounding.selector import Selector, fit_selector, not_mentioned, quote
from sft.grounding.sentences import split_sentences
from sft.grounding.structure import SPELLED_OUT, read_units, shown_label

PLAN = "Plan:\n- start amoxicillin 500 mg three times daily\n- chest film in six weeks"
LINES = [
    "Dear Dr Jones,",
    "Kind regards",
    "45F with three days of cough.",
    "Mrs Hill is a 71-year-old woman.",
    "HPC: fever since Monday, no rash.",
    "It settled after an hour.",
    "Any pain?",
    "- no chest pain",
    "P: home today",
    "PMH: asthma. Her sister had a stroke.",
    "ASSESSMENT AND PLAN",
    "Type 2 diabetes.\n• Medical Treatment: Increase metformin to 1000 mg.",
    PLAN,
]
notes = st.lists(st.sampled_from(LINES) | st.text(max_size=40), max_size=12).map("\n".join) | st.text(
    max_size=200
)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


@settings(max_examples=150, deadline=None)
@given(notes)
def test_every_word_stands_in_its_note_sentences_in_order(note):
    sentences = split_sentences(note)
    result = quote(note, selector())
    assert result == quote(note, selector())
    spelled_out = set(words(" ".join(SPELLED_OUT.values())))
    last = 0
    for quoted_sentence in result:
        numbers = quoted_sentence.note_sentences
        assert list(numbers) == sorted(set(numbers))
        # A heading may be shown again; the sentence itself comes later than the one before
        assert last < numbers[-1] <= len(sentences)
        last = numbers[-1]
        source = iter(words(" ".join(sentences[number - 1] for number in numbers)))
        assert all(word in spelled_out or word in source for word in words(quoted_sentence.text))
        # A salutation that runs on into the text is no salutation alone
        is_short = len(quoted_sentence.text.split()) <= 7
        assert not (is_short and quoted_sentence.text.startswith(("Dear", "Kind regards")))
        assert quoted_sentence.text[-1] in ".!?…\"”'’)"


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=40, deadline=None)
def test_any_pairs_fit_and_are_read_back(note, summary):
    fitted = fit_selector([(note, summary)])
    assert Selector.from_json(fitted.to_json()) == fitted
    quote(note, fitted)


def test_saved_selector_is_small_and_other_files_are_refused():
    assert len(selector().to_json()) < 5_000
    assert Selector.from_json(selector().to_json()) == selector()
    # One of version 1 has weights for features that are no more
    older = selector().to_json().replace('"version": 2', '"version": 1').replace('"place"', '"place squared"')
    assert quote(NOTE, Selector.from_json(older))
    for text in ["{}", "[]", '{"version": 99}', '{"version": 1}', "no JSON"]:
        with pytest.raises(ValueError):
            Selector.from_json(text)
    values = json.loads(selector().to_json())
    for odd in ({"weights": [1]}, {"weights": {"place": "1"}}, {"bias": None}, {"most_words": 10**400}):
        with pytest.raises(ValueError, match="not a selector"):
            Selector.from_json(json.dumps(values | odd))
    with pytest.raises(ValueError, match="not a selector"):
        Selector.from_json(json.dumps(values | {"bias": float("nan")}))


def test_kin_summaries_support_quoting_and_others_do_not():
    assert selector().supported
    note = "Doctor: What brings you in?\nPatient: My foot hurts when I walk the dog.\nDoctor: Since when?"
    fitted = fit_selector(
        [(note, "A two-day history of left plantar fasciitis was reported by the individual.")]
    )
    assert not fitted.supported
    assert fitted.kinship == 0
    assert not fit_selector([]).supported


NOTE = """Dear Dr Jones,
Thank you for referring this lady.
Mrs Hill is a 71-year-old woman with two weeks of breathlessness.
Her neighbour's cat was very lovely.
Examination showed a right pleural effusion. It reached the third rib.
The pathology report confirmed adenocarcinoma of the lung.
Plan:
- drain the effusion tomorrow
- refer to the oncologist within one week
Kind regards
"""


def test_a_letter_keeps_who_what_and_plan_and_drops_the_rest():
    text = quoted(NOTE)
    for wanted in ["71-year-old", "adenocarcinoma", "Plan: drain the effusion", "oncologist"]:
        assert wanted in text
    for unwanted in ["Dear", "Thank", "regards", "cat"]:
        assert unwanted not in text


def test_labels_and_bullets_become_sentences():
    text = quoted(
        "HPC: 34M, fall from a ladder.\nO: right wrist swollen\nImp: Colles fracture\nP: backslab, clinic 1/52"
    )
    assert text.split("\n") == [
        "34M, fall from a ladder.",
        "Right wrist swollen.",
        "Impression: Colles fracture.",
        "Plan: backslab, clinic 1/52.",
    ]
    assert shown_label("HISTORY OF PRESENT ILLNESS") == ""
    assert shown_label("PAST MEDICAL HISTORY") == "Past medical history"


STRUCTURED = """HISTORY OF PRESENT ILLNESS

John Poe is a 60-year-old male with COPD and diabetes who presents for follow-up.

REVIEW OF SYSTEMS

• Cardiovascular: Denies chest pain.

ASSESSMENT AND PLAN

COPD.
• Medical Reasoning: He is stable.
• Medical Treatment: Continue current regimen.

Diabetes type 2.
• Medical Reasoning: His hemoglobin A1c is elevated at 8.
• Medical Treatment: Increase metformin to 1000 mg twice daily.

Patient Agreements: The patient understands and agrees with the plan.

INSTRUCTIONS

Return in 3 months.
"""


def test_a_plan_stands_under_its_problem():
    text = quoted(STRUCTURED).split("\n")
    assert any(line.startswith("COPD: ") for line in text)
    assert any("Continue current regimen" in line for line in text)
    assert any(line.startswith("Diabetes type 2: ") for line in text)
    assert any("metformin to 1000 mg" in line for line in text)
    # What follows is no longer about diabetes
    assert "Instructions: Return in 3 months." in text
    assert not any("agrees" in line or "Denies" in line for line in text)


def test_headings_salutations_and_questions_alone_are_no_summary():
    for note in ["", "Dear Dr Smith,", "Any pain?", "HISTORY\n\nPLAN\n", "Kind regards"]:
        assert quote(note, selector()) == []


def test_numbered_lists_are_no_headings():
    note = "74F with stiff shoulders.\nImp: polymyalgia.\n1) prednisolone 15 mg\n2) alendronate\n3) call if headache."
    units = read_units(note)
    assert {unit.kind for unit in units} == {"sentence"}
    assert "Alendronate: " not in quoted(note)


@pytest.mark.parametrize(
    "note, number, needs",
    [
        ("The left ovary was torn. It was removed.", 2, 1),
        ("A 5 cm ovary was seen. The uterus was normal. The ovary was removed.", 3, 1),
        ("Oxytocin ran for an hour. Stopped there.", 2, 1),
        ("She spoke of wishes. Nothing in writing.", 2, 1),
        ("Her sister takes lithium. She is well.", 2, 1),
        ("A letter came. This 44-year-old man is well.", 2, 0),
        ("Seen today. There is a tear.", 2, 0),
        ("Never had a colonoscopy. We asked for one within a month.", 2, 1),
        ("Haemoglobin is 104. To repeat it at 21:00.", 2, 1),
        ("Seen today. We think it is gout.", 2, 0),
        ("Her sister has diabetes. She was given saline.", 2, 0),
    ],
)
def test_what_a_sentence_refers_back_to(note, number, needs):
    assert read_units(note)[number - 1].needs == needs


def test_an_answer_comes_with_its_question():
    note = 'Handover of 66M after liver resection.\n"Bleeding?"\n"None, Hb 104, repeat at 21:00."\n"Ready for the ward?"'
    text = quoted(note)
    assert "Bleeding? None, Hb 104" in text
    assert "Ready" not in text


def test_what_is_said_twice_is_quoted_once():
    note = "66M with gout of the right toe.\nAcute gout of the right toe confirmed by aspirate.\n" * 3 + PLAN
    assert quoted(note).count("66M") == 1
    complaint = "Chief complaint: Knee pain.\n\nMs. Roy presents with knee pain after a fall.\n\n" + PLAN
    assert "complaint" not in quoted(complaint)
    assert "Chief complaint: No knee pain" in quoted(complaint.replace(": Knee", ": No knee"))


def test_last_bullets_are_the_plan_where_something_is_to_be_done():
    note = (
        "67M, fall from a ladder this morning.\nCT head: small right subdural, no shift. GCS 15 throughout.\n"
        "On apixaban for AF. He was a carpenter and likes football. Platelets 210.\nNo pain.\nSleeps well.\n"
        "- neuro obs hourly\n- likes tea\n- repeat CT head at 24 h\n- wife to call if drowsy"
    )
    assert "Repeat CT head at 24 h." in quoted(note)
    assert {m.kind for m in not_mentioned(note, ["67M fell."]) if "repeat CT" in m.text} == {"plan"}


# Who, then small talk that fills a note, then what must be there
SMALL_TALK = (
    "She walks by the river every day and has joined a choir. Her garden is doing well this summer. "
    "Older brother has his own appointment next week. She asks whether she may have a beer. Options discussed. "
    "Husband brought her phone charger and slippers. Chest clear. Sleeps eight hours and eats three meals. Shoes are comfortable. "
)


@pytest.mark.parametrize(
    "lines, wanted",
    [
        ("Creatinine has crept from 112 to 148 since May.", ["crept from 112"]),
        (
            "Viral PCR is 42,000 copies/mL, negative in the spring.\nIGRA positive at 1.92 IU/mL.",
            ["IGRA positive"],
        ),
        ("Saturday 06:30: went stiff in bed, shook for 90 seconds.", ["went stiff"]),
        ("Done today: sputum sent, baseline eye test.", ["sputum sent"]),
        ("Given:\n- 6-in-1 dose 1\n- MenB dose 1\n- Rotavirus dose 1", ["6-in-1", "MenB", "Rotavirus"]),
        (
            "- Cot on the neonatal unit\n- Echo this afternoon\n- Doppler again tomorrow\nBoth parents told.",
            ["neonatal", "Echo", "Doppler"],
        ),
        ("V/Q scan instead of CTPA: hives with contrast last year.", ["hives with contrast"]),
        ("She takes codeine and senna.\nPlan: rest.\nStop codeine and senna.", ["Stop codeine"]),
    ],
)
def test_what_matters_comes_before_small_talk(lines, wanted):
    text = quoted(f"Clinic review, 54-year-old woman.\n{SMALL_TALK}\n{lines}")
    assert [one for one in wanted if one not in text] == []
    assert not any(trivia in text for trivia in ("garden", "brother", "beer", "Options", "charger"))


def test_a_question_that_opens_a_talk_is_not_told():
    note = "Night handover.\nNurse A: Handing over bed 6?\nNurse B: Yes, Mr Cole, 69, day 1 after aneurysm repair."
    assert "Handing" not in quoted(note)
    assert "Yes." not in quoted(note.replace("Yes, Mr Cole", "Yes. Mr Cole"))
    assert "Mr Cole" in quoted(note)


def test_airway_is_no_assessment():
    note = "58F, anaphylaxis to penicillin.\nA: talking, hoarse\nB: RR 28, wheeze\nC: BP 88/50\nD: alert\nPlan: adrenaline 0.5 mg IM."
    assert "Assessment" not in quoted(note)
    assert "Airway: Talking, hoarse." in quoted(note).replace("talking", "Talking")
    soap = "S: sore throat\nO: red tonsils\nA: tonsillitis\nP: penicillin V 500 mg QDS"
    assert "Assessment: tonsillitis." in quoted(soap)


def test_the_label_of_one_thing_comes_with_it():
    lines = (
        "Fluid: protein 44 g/L, straw-colored. Cytology and AFB culture sent. Plan: rest. Repeat CT tomorrow."
    )
    text = quoted(f"54-year-old man with a pleural effusion.\n{lines}")
    assert "Fluid: protein 44 g/L" in text
    assert "Fluid: Cytology" not in text
    assert "Cytology and AFB culture sent." in text


def test_a_time_goes_with_its_line():
    note = "10:50 Arrived, 4-year-old boy. Calm.\n10:58 Laryngospasm, silent chest. SpO2 81%.\n11:00 Propofol 10 mg IV."
    assert "10:58: Laryngospasm" in quoted(note)


def test_length_stays_that_of_training_summaries():
    name = lambda n: "".join(chr(97 + n * k % 26) for k in (1, 3, 7, 11, 17))  # noqa: E731
    lines = [
        f"Wound {name(n)} {name(n + 1)} was {n} cm, dressed with {name(3 * n)} gauze." for n in range(1, 200)
    ]
    note = "70M with a leg ulcer.\n" + " ".join(lines)
    assert 0.7 * selector().most_words < len(quoted(note).split()) < 1.4 * selector().most_words


def test_time_grows_linearly():
    def seconds(n: int) -> float:
        note = STRUCTURED * n + "Dr. a: " * n + "it " * n + "- \n" * n + "aa-" * n
        started = time.process_time()
        quote(note, selector())
        return time.process_time() - started

    seconds(10)
    assert seconds(160) < 8 * seconds(40) + 0.1


def test_not_mentioned():
    note = STRUCTURED + "\nMEDICATIONS\n\nLisinopril 10 mg daily.\n"
    missing = not_mentioned(
        note, ["A 60-year-old man with COPD, stable, continues his current regimen.", "A1c is 8."]
    )
    assert {(m.kind, m.text) for m in missing} == {
        ("drug", "Lisinopril 10 mg daily."),
        ("plan", "Increase metformin to 1000 mg twice daily."),
        ("plan", "Return in 3 months."),
    }
    assert all(split_sentences(note)[m.note_sentence - 1].endswith(m.text) for m in missing)
    assert not_mentioned(note, split_sentences(note)) == []


def test_not_mentioned_ends_with_what_else_is_left_out():
    note = "ECG, 34M. No ischaemic ST change. QTc 418 ms. Her sister likes tea. Chest clear.\nPlan: refer to cardiology."
    missing = not_mentioned(note, ["ECG, 34M.", "Chest clear."])
    assert [(m.kind, m.text) for m in missing] == [
        ("plan", "refer to cardiology."),
        ("other", "No ischaemic ST change."),
        ("other", "QTc 418 ms."),
    ]
