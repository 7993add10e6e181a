"""Nearly the same notes, texts that are no notes, citations without support: found, without false alarms."""

import csv
import random
import time
from dataclasses import replace

import pytest
from conftest import ROOT, SHARED_DATA
from hypothesis import given
from hypothesis import strategies as st
from tiny import NOTES, encoder_for, rows_of, tiny_tokenizer, write_csv

from sft.cli import InputError
from sft.data.dataset import SFTDataset, load_datasets, read_data
from sft.data.formats import describe_problem, find_language, main_language, strip_markup
from sft.data.prompt import build_template
from sft.data.report import log_data_warnings, log_unsupported_summaries
from sft.data.rows import drop_stray_citations, leaked_rows, read_rows
from sft.data.similar import groups_of_similar, similar_notes
from sft.data.text import clean_text
from sft.options import DataOptions


def notes_of(path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return list(dict.fromkeys(row["clinical_note"] for row in csv.DictReader(file)))


SAMPLE = notes_of(ROOT / "phase1_data/sft/train_set_processed.csv")


# ------------------------------------------------------------------------------- nearly the same


def changed(note: str, share: float, dice: random.Random) -> str:
    words = note.split()
    for i in dice.sample(range(len(words)), int(share * len(words))):
        words[i] = "xyz"
    return " ".join(words)


def test_near_copies_are_found_and_others_are_not():
    assert similar_notes(SAMPLE) == []
    dice = random.Random(0)
    for copies, fewest in (
        ([f"Seen on 3/4/2021. {note}" for note in SAMPLE], 1.0),
        ([". ".join(dice.sample(note.split(". "), note.count(". ") + 1)) for note in SAMPLE], 1.0),
        ([note.upper() for note in SAMPLE], 1.0),
        ([changed(note, 0.1, dice) for note in SAMPLE], 1.0),
        ([changed(note, 0.2, dice) for note in SAMPLE], 0.9),
    ):
        found = similar_notes(SAMPLE + copies, len(SAMPLE))
        assert all(note - len(SAMPLE) == known for note, known, _ in found)
        assert len(found) >= fewest * len(SAMPLE)
    assert groups_of_similar(["", "a", SAMPLE[0], f"New. {SAMPLE[0]}"]) in ([0, 1, 2, 2], [0, 1, 3, 3])


@pytest.mark.parametrize("seed", range(4))
def test_a_patients_notes_that_were_copied_forward_stay_together(seed):
    """Each is like its neighbors in time, the first hardly like the last; the file is in any order."""
    dice = random.Random(seed)
    notes = []
    for first in SAMPLE[:12]:
        notes.append(first)
        for _ in range(4):
            notes.append(changed(notes[-1], 0.15, dice))
    dice.shuffle(notes)
    groups = groups_of_similar(notes)
    assert len(set(groups)) == 12
    assert all(groups[note] == groups[known] for note, known, _ in similar_notes(notes))


def test_many_copies_of_one_note_cost_no_square():
    def seconds(n: int) -> float:
        start = time.process_time()
        notes = [f"{SAMPLE[i % 3]} {i}" for i in range(n)]
        assert len(similar_notes(notes, n // 2)) == n // 2
        return time.process_time() - start

    seconds(200)
    assert seconds(4000) < 14 * seconds(400) + 0.1


def test_texts_are_compared_under_nfc():
    decomposed = "Mu\u0308ller: U\u0308belkeit"
    assert clean_text(decomposed) == "Müller: Übelkeit"
    assert leaked_rows(rows_of([("Müller: Übelkeit", "x")]), rows_of([(clean_text(decomposed), "y")]))


# ------------------------------------------------------------------------------- what is no note


@pytest.mark.parametrize(
    "text, words",
    [
        ("{\\rtf1\\ansi Fever.\\par}", "RTF"),
        ("<div><p>Temp &gt; 38</p></div>", "HTML"),
        ('<?xml version="1.0"?><ClinicalDocument></ClinicalDocument>', "XML"),
        ("MSH|^~\\&|LAB|HOSP", "HL7"),
        ("\x0bMSH|^~\\&|LAB|HOSP\r\x1c\r", "HL7"),
        ("PID|1||000123||DOE^JANE\rOBX|1|TX|", "HL7"),
        ('{"resourceType": "Bundle"}', "FHIR"),
        ('[{"a": 1}]', "JSON"),
        ("Fever", "single word"),
        ("Der Patient klagt seit drei Tagen über Fieber und Husten, die Lunge ist frei.", "another language"),
        (
            "Le patient présente une toux et de la fièvre depuis trois jours, sans dyspnée.",
            "another language",
        ),
        ("Пациент жалуется на кашель", "another language"),
        ("Patient klagt über Husten und Fieber, keine Allergien.", "another language"),
        ("Patienten söker för hosta och feber sedan tre dagar, inte allergisk.", "another language"),
        ("Pacjent zgłasza kaszel i gorączkę od trzech dni, bez duszności.", "another language"),
        ("Hasta üç gün önce başlayan öksürük ve ateş şikayeti ile geldi.", "another language"),
        (
            "Potilas valittaa yskää ja kuumetta, mutta ei hengenahdistusta; allergioita ei ole.",
            "another language",
        ),
        ("Pacient si stěžuje na kašel a horečku tři dny, dušnost neguje.", "another language"),
        ("Pt José Muñoz, 45M, café owner, cough, fever, sputum, sats 97, no chest pain, 5 µg", None),
        ("[Sun] BP 120/80, WBC<5 and PLT>3, a <b> c", None),
        ("{ BP 120/80 } stable", None),
        ("", None),
    ],
)
def test_what_is_hardly_a_note(text, words):
    found = describe_problem(text, "en")
    assert (words in found) if words else not found
    assert found == describe_problem(text) or "language" in found or words == "single word"


@pytest.mark.parametrize(
    "text, plain, kind",
    [
        ("<p>Fever &amp; cough.", "Fever & cough.", "HTML"),
        ("Fever.<br/>Hb <8, Na<sup>+</sup> 131", "Fever.\nHb <8, Na+ 131", "HTML"),
        ("<ul><li>Temp &gt; 38&nbsp;&deg;C</li><li>Cough</li></ul>", "Temp > 38 °C\nCough", "HTML"),
        ("&lt;p&gt;SpO2 &amp;lt; 90&lt;/p&gt;", "SpO2 < 90", "HTML"),
        ("SpO2 &lt; 90&#37;, plt &gt;100", "SpO2 < 90%, plt >100", "HTML"),
        ("<style>p {<!-- x -->}</style><P class='a'>Fever<!-- > --></P>", "Fever", "HTML"),
        ("<!DOCTYPE html><table><tr><td>Na</td><td>131</td></tr></table>", "Na 131", "HTML"),
        ("<p>Fever<!-- never closed", "Fever<!-- never closed", "HTML"),
        ('<?xml version="1.0"?><a><title>Plan</title><b>Rest</b><c>Tea</c></a>', "Plan\nRest Tea", "XML"),
        ("<note><![CDATA[Fever]]></note>", "Fever", "XML"),
        ("<note><body>Fever <dose>5</dose></body></note>", "Fever 5", "XML"),
        ("<p><name> seen on <date></p>", "<name> seen on <date>", "HTML"),
        ("<ClinicalDocument id='1'/>", "", "XML"),
        ("{\\rtf1 <p>Fever</p>}", None, None),
        ("WBC<5 and PLT>3, a <b> c, <a few and >b, R&D", None, None),
    ],
)
def test_markup_is_removed_and_nothing_else(text, plain, kind):
    plain = text if plain is None else plain
    assert strip_markup(text) == (plain, kind)
    assert strip_markup(plain) == (plain, None)


@pytest.mark.parametrize(
    "piece", ["<a ", '<a b="', "<!--", "<![CDATA[", "<?", "<style>", "</", "&#", "<p>&lt;"]
)
def test_markup_takes_time_in_proportion(piece):
    for start in ("", "<p>x</p>", "<?xml "):
        strip_markup(start + piece * 100_000)  # a square would take minutes


@given(st.text("<>/&;!-pbr xml?[]'\"=\n"))
def test_any_markup_gives_text(text):
    plain, kind = strip_markup(text)
    assert plain or not text
    assert kind or plain == text


def test_rows_in_markup_are_counted(tmp_path, capfd):
    rows = [(i, f"<p>{note}</p>", summary, "factual", "") for i, (note, summary) in enumerate(NOTES)]
    assert read_rows(write_csv(tmp_path / "a.csv", rows))[0].clinical_note == NOTES[0][0]
    assert f"{len(NOTES)} notes in HTML, read without tags" in capfd.readouterr().err


def test_no_false_alarms_on_real_notes():
    notes = list(SAMPLE)
    if SHARED_DATA.is_dir():
        for file in sorted(SHARED_DATA.glob("*/*.csv")):
            notes += notes_of(file)
    assert main_language(notes) == "en"
    assert [
        note for note in notes if describe_problem(note, "en") or strip_markup(note) != (note, None)
    ] == []
    assert find_language("BP 120/80. Stable.") is None


# ------------------------------------------------------------------------------- citations, cut notes


def test_a_citation_without_support_is_dropped_or_refused(tmp_path, capfd):
    cited = [
        (i, note, f"{summary} [Evidence: S1; Conf: 0.9]", "factual", "")
        for i, (note, summary) in enumerate(NOTES[:5])
    ]
    plain = [(9 + i, note, summary, "factual", "") for i, (note, summary) in enumerate(NOTES[5:])]
    path = str(write_csv(tmp_path / "a.csv", cited + plain))
    options = DataOptions(train_csv=path, val_csv=path)
    rows = read_data(options)
    datasets = load_datasets(rows, tiny_tokenizer(), options)
    assert not any("Evidence" in row.model_summary for row in datasets[0].rows)
    log_data_warnings(rows, datasets, options)
    assert "5 rows whose summaries cite sentences, which the prompt does not number" in capfd.readouterr().err
    alone = [replace(row, model_summary="[Evidence: S9; Conf: 0.5]") for row in rows[0]]
    with pytest.raises(InputError, match=r"a\.csv: every summary is a citation that was dropped"):
        load_datasets((alone, alone), tiny_tokenizer("chatml"), options)
    options.stray_citations = "refuse"
    with pytest.raises(InputError, match="does not support: ids 0, 1, 2, 3, 4"):
        load_datasets(rows, tiny_tokenizer(), options)
    options.sentence_numbering = "on"
    assert "Evidence" in load_datasets(rows, tiny_tokenizer(), options)[0].rows[0].model_summary


def test_what_a_shortened_note_no_longer_says(capfd):
    long = "Seen today. " * 60
    rows = rows_of([(f"{long} Start warfarin 5 mg.", "Warfarin 5 mg."), (f"Fever. {long}", "Fever.")])
    dataset = SFTDataset(rows, encoder_for("none"), 200)
    log_data_warnings((rows, []), (dataset, SFTDataset([], dataset.encoder, 200)), DataOptions("x", "y"))
    logged = capfd.readouterr().err
    assert "1 of their summaries have words or numbers that stand only in the part that is cut" in logged
    assert "a model to invent: id r0\n" in logged
    whole_length = int(max(dataset.whole_lengths))
    assert not SFTDataset(rows, dataset.encoder, whole_length).shortened
    assert SFTDataset(rows, dataset.encoder, whole_length - 1).shortened


def test_an_instruction_is_stripped_as_templates_do():
    assert build_template(tiny_tokenizer(), instruction=" Be brief. ") == build_template(
        tiny_tokenizer(), instruction="Be brief."
    )


def test_one_summary_of_three_notes_in_five(capfd):
    rows = rows_of([(note, "Stable." if i < 3 else summary) for i, (note, summary) in enumerate(NOTES[:5])])
    dataset = SFTDataset(rows, encoder_for("none"), 512)
    log_data_warnings((rows, []), (dataset, SFTDataset([], dataset.encoder, 512)), DataOptions("x", "y"))
    assert "one summary stands under 3 of 5 different notes: ids r0, r1, r2" in capfd.readouterr().err


def test_ids_with_spaces_are_found_by_number(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("ward 3 0", "Fever.", "Fever.", "factual", "")])
    assert read_rows(path)[0].name == "row 2"


def test_citations_that_cannot_be_read_are_dropped_too():
    """Where the prompt numbers no sentences, no form of a citation is trained on."""
    rows = rows_of(
        [("Fever.", "Fever. [Evidence: see above]"), ("Cough.", "Cough. [Evidence: S1; Conf: 0.9]")]
    )
    kept, stray = drop_stray_citations(rows, None)
    assert [row.model_summary for row in kept] == ["Fever.", "Cough."]
    assert len(stray) == 2


def test_training_summaries_that_their_notes_do_not_support(capsys):
    good = [("No fever. Right knee pain.", "Right knee pain, no fever.")] * 30
    rows = rows_of([*good, ("Takes 5 mg. Right knee pain.", "Takes 7 mg, left knee hurts.")])
    log_unsupported_summaries("a.csv", rows)
    err = capsys.readouterr().err
    assert "1 of 31 training rows have summaries that may state what the note does not support" in err
    assert "(number 1, side 1)" in err or "(side 1, number 1)" in err
    assert err.rstrip().endswith(rows[-1].name)
    assert "knee" not in err
    same_id = [replace(row, id="n1") for row in rows[-1:] * 2 + rows[:1]]
    log_unsupported_summaries("a.csv", same_id)
    assert "2 of 3 training rows have" in capsys.readouterr().err
    log_unsupported_summaries("a.csv", rows_of(good[:1]) * 2_001)
    assert capsys.readouterr().err == (
        "info: a.csv: checked a sample of 2,000 of 2,001 training summaries against their notes\n"
    )


def test_factual_rows_that_name_a_kind_of_hallucination_are_named(capfd):
    """As labels that were mapped the wrong way round leave them."""
    kinds = ["", "wrong_number", "None", "n/a", "wrong dose"]
    rows = [replace(row, hallucination_type=kind) for row, kind in zip(rows_of(NOTES[:5]), kinds)]
    dataset = SFTDataset(rows, encoder_for("none"), 512)
    empty = SFTDataset([], dataset.encoder, 512)
    log_data_warnings((rows, []), (dataset, empty), DataOptions(train_csv="x.csv", val_csv="y.csv"))
    names = f"{rows[1].name}, {rows[4].name}"
    said = f"x.csv: 2 rows labeled factual that name a hallucination_type: ids {names}"
    assert said in capfd.readouterr().err
