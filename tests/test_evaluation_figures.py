"""Measures, statistics, the page and the blind sheet of the evaluation: text and numbers, no model."""

import html
import json
import shutil

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from tiny import NOTES, rows_of

from sft.cli import InputError
from sft.data.rows import factual_rows, read_rows
from sft.evaluation.figures import (
    answer_questions,
    auroc,
    changes,
    compared_with,
    figure_of,
    figures,
    resample,
    twins,
    verdict,
)
from sft.evaluation.measures import (
    MEASURES,
    Measured,
    add_memorized,
    copied_words,
    facts_held,
    marks,
    measure,
    text_spans,
    usual_marks,
)
from sft.evaluation.page import write_csv, write_report
from sft.evaluation.sheet import agreement, read_key, read_ratings, report_ratings, write_sheet
from sft.evaluation.systems import write_without_model
from sft.grounding import check_summary
from sft.grounding.sentences import SENTENCE_VERSION
from sft.inference.results import check_result

ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def measure_systems(rows, systems):
    """{system: {number: Measured}} of {system: summaries in the order of the rows}."""
    measured = {}
    for name, texts in systems.items():
        measured[name] = {}
        for (number, row), text in zip(rows.items(), texts):
            result = {"generated_summary": text, **check_result(row.clinical_note, text)}
            measured[name][number] = measure(row, result, ROUGE, set(), SENTENCE_VERSION)
    add_memorized(measured, rows, list(rows.values()))
    return measured


# ------------------------------------------------------------------------------- statistics


def test_the_bootstrap_is_the_normal_interval_of_a_mean():
    values = np.random.default_rng(1).normal(5, 2, 400)
    table = np.stack([values, np.ones(400)], axis=-1)[:, None]
    [value], samples = resample(table)
    _, low, high = figure_of(value, samples[:, 0]).values()
    half = 1.96 * values.std() / 20
    assert np.allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.03)
    assert figure_of(5, np.full(10, np.nan)) == {"value": 5, "low": None, "high": None}


def test_differences_are_paired():
    """A system that is better by the same amount on every note: the difference has no spread."""
    values = np.random.default_rng(2).normal(size=60)
    pair = np.stack([values, values + 1], axis=1)
    _, samples = resample(np.stack([pair, np.ones_like(pair)], axis=-1))
    assert figure_of(1, samples[:, 1] - samples[:, 0]) == pytest.approx({"value": 1, "low": 1, "high": 1})


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20)
)
def test_auroc_counts_pairs(scores, others):
    pairs = [(a > b) + (a == b) / 2 for a in scores for b in others]
    assert auroc(scores, others) == pytest.approx(sum(pairs) / len(pairs))


def test_agreement_beyond_chance():
    # Cohen 1960: observed .7, expected .5
    first = [True] * 50 + [False] * 50
    second = [True] * 35 + [False] * 15 + [True] * 15 + [False] * 35
    readings = [{i: {"usable": a, "wrong": []} for i, a in enumerate(answers)} for answers in (first, second)]
    found = agreement(*readings)
    assert found["usable"] == pytest.approx({"n": 100, "same": 0.7, "kappa": 0.4})
    assert found["wrong"] == {"n": 100, "same": 1.0, "kappa": None}
    assert agreement(readings[0], {}) == {}


# ------------------------------------------------------------------------------- measures


@pytest.mark.parametrize(
    "reference, summary, held",
    [
        ("Fever of 38.5 and dry cough.", "Dry cough with a fever of 38.5.", (2, 2)),
        ("Fever of 38.5 and dry cough.", "Dry cough with a fever of 39.", (1, 2)),
        ("Amoxicillin 500 mg daily.", "Takes amoxicillin 0.5 g a day.", (1, 1)),
        ("Metformin 500 mg.", "Amoxicillin 500 mg and, for the last three years or so, once a day, metformin.", (0, 1)),
        ("Two weeks of low mood.", "Low mood for 2 weeks.", (2, 2)),
        ("Well.", "Anything.", (0, 0)),
    ],
)  # fmt: skip
def test_coverage_counts_numbers_doses_and_phrases(reference, summary, held):
    assert facts_held(reference, summary) == held


@given(st.text(max_size=60))
def test_a_text_holds_all_of_itself(text):
    held, n_facts = facts_held(text, text)
    assert held == n_facts
    copied, n_words = copied_words(text, text)
    assert copied == (n_words if n_words >= 5 else 0)


def test_copied_words_stand_in_long_runs():
    note = "He has had a dry cough since Monday and no fever."
    assert copied_words("He has had a dry cough. No fever since Monday.", note) == (6, 10)


def test_marks_of_the_format():
    summary = "Problem: cough [Evidence: S1; Conf: 0.9]\nPlan:\n- review"
    assert marks(summary) == {"Problem:", "Plan:", "citations", "list", "lines"}
    assert usual_marks([summary, "Problem: fever", "Free text."]) == {"Problem:"}


def test_memorized_runs_are_of_training_summaries_and_not_of_the_note():
    rows = {0: rows_of([("No fever today at all.", "Please review him in the clinic next week.")])[0]}
    one, two = "please review him in the clinic", "No fever today at all."
    measured = measure_systems(rows, {"a": [one], "b": [two]})
    assert measured["a"][0].sums["memorized"] == (2, 2)
    assert measured["b"][0].sums["memorized"] == (0, 1)


def test_a_summary_is_measured():
    note = "Left wrist painful after a fall. X-ray shows no fracture."
    [row] = rows_of([(note, "Left wrist injury without fracture.")])
    summary = "Right wrist painful after a fall. Right wrist painful after a fall."
    sums = measure_systems({0: row}, {"a": [summary]})["a"][0].sums
    assert sums["clean"] == (0, 1) and sums["flagged"] == (2, 2) and sums["finding_side"][0] == 2
    assert sums["repeats"] == (1, 1) and sums["length_ratio"] == (12, 5)
    assert sums["rougeL"] == (ROUGE.score(row.model_summary, summary)["rougeL"].fmeasure, 1)


@given(
    st.lists(st.sampled_from(["Fever. ", "No cough [Evidence: S1]. ", "\n- BP 120/80", "[S2]", "Été ", "* "]))
)
def test_sentences_are_those_of_the_check(pieces):
    """So that findings, support and likelihoods stand with the right ones, with citations between them."""
    text = "".join(pieces)
    checked = check_summary("No fever. Cough.", text).sentences
    spans = text_spans(text)
    assert len(spans) == len(checked)
    assert all(start <= one.start < one.end <= end for (start, end), one in zip(spans, checked))


def test_systems_without_a_model():
    rows = dict(
        enumerate(
            [*rows_of([("One. Two. Three. Four. Five. Six.", "X."), ("One. Two.", "Y.")]), *rows_of(NOTES)]
        )
    )
    training = [rows[1], rows[2], rows[2]]

    def texts(name, training=training):
        written = dict(write_without_model(name, rows, training, SENTENCE_VERSION))
        return {number: result["generated_summary"] for number, result in written.items()}

    assert (texts("lead")[0], texts("lead")[1]) == ("One. Two. Four. Five. Six.", "One. Two.")
    assert texts("reference")[5] == NOTES[3][1]
    assert set(texts("commonest").values()) == {rows[2].model_summary}
    selected = texts("selected", list(rows.values()))
    assert all(check_summary(rows[n].clinical_note, text).risk < 0.1 for n, text in selected.items())


def test_quality_of_eight_validation_notes_does_not_fall():
    """A guard of selector, check and measures together: .80 of the references' facts are quoted, one quoted
    sentence is flagged, 2 of 19 of the references, 22 of 72 after errors were put into the quotes."""
    files = (ROOT / "phase1_data" / "sft" / f"{kind}_set_processed.csv" for kind in ("train", "validation"))
    training, validation = (factual_rows(read_rows(file)) for file in files)
    rows = dict(enumerate(validation[:8]))
    written = dict(write_without_model("selected", rows, training, SENTENCE_VERSION))
    quoted = [result["generated_summary"] for result in written.values()]
    wrong = [
        text.replace(" no ", " ").replace("left", "right") + " Started warfarin 15 mg." for text in quoted
    ]
    references = [row.model_summary for row in rows.values()]
    measured = measure_systems(rows, {"quoted": quoted, "wrong": wrong, "reference": references})
    found = figures(measured, list(rows))
    assert found["quoted"]["coverage"]["value"] > 0.75
    assert found["quoted"]["flagged"]["value"] < 0.04
    assert found["quoted"]["length_ratio"]["value"] < 1.4
    assert found["reference"]["flagged"]["value"] < 0.2
    assert found["wrong"]["flagged"]["value"] > 0.25
    assert min(one.sums["coverage"][0] / one.sums["coverage"][1] for one in measured["quoted"].values()) > 0.4


# ------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def evaluated():
    """(rows, measured): a good specialist, a base that says the same of everyone."""
    rows = dict(enumerate(rows_of(NOTES)))
    notes = [row.clinical_note for row in rows.values()]
    summaries = [row.model_summary for row in rows.values()]
    base = ["Right knee replaced by Dr Smith in 1987 for gout."] * len(rows)
    return rows, measure_systems(rows, {"base": base, "specialist": notes, "reference": summaries})


def figures_of(evaluated) -> dict:
    rows, measured = evaluated
    return figures(measured, list(rows))


def test_figures_tell_a_good_system_from_a_bad_one(evaluated):
    found = figures_of(evaluated)
    moved = changes(found, "specialist")
    assert {"flagged", "coverage", "rouge1", "check_score"} <= set(moved["better"]) and not moved["worse"]
    flagged = found["specialist"]["flagged"]
    assert flagged["value"] == 0 and flagged["high"] == pytest.approx(3 / flagged["n"])
    assert changes(found, "base") == {"better": [], "worse": []}
    json.dumps(found, allow_nan=False)


def test_the_four_questions(evaluated):
    found = figures_of(evaluated)
    assert [answer["passed"] for answer in answer_questions(found, "base")][2:] == [False, False]
    assert verdict(answer_questions(found, "base"), found["base"], 40).startswith("Do not go on")
    answers = answer_questions(found, "specialist")
    # Without a model there is no loss
    assert answers[0]["passed"] is None and answers[1]["passed"]
    assert verdict(answers, {"rewritten": {}}, 40).startswith("Not shown")
    passed = [answer | {"passed": True} for answer in answers]
    assert verdict(passed, {"rewritten": {}}, 40).startswith("Go on")
    assert verdict(passed, {"rewritten": {}}, 4).startswith("Not shown")
    assert "--max_new_tokens" in answers[1]["advice"]
    # Quoted sentences are as the note has them, whatever a model could write
    quoted = {"specialist": found["specialist"] | {"own_share": {"value": 0.0}}}
    for answer in answer_questions(quoted, "specialist")[1:]:
        assert "no model writes these" in answer["advice"]
    # A heading that is spelled out counts as rewritten
    assert "nothing for Stage B" in verdict(passed, {"rewritten": {}, "own_share": {"value": 0.0}}, 40)


def test_a_system_is_compared_with_its_own_adapters_sentences():
    systems = ["base", "free_1", "free_2", "quote_1", "quote_2", "selected", "reference"]
    assert compared_with("free_2", systems) == {"base": "base", "reference": "reference", "chosen": "quote_2"}
    assert compared_with("free", ["free", "selected"]) == {"chosen": "selected"}
    assert compared_with("quote", ["quote", "base"]) == {"base": "base"}


def test_who_rewrites_nothing_invents_nothing(evaluated):
    """Whole notes are no sentence of the model's own; coverage alone decides whether they are accurate."""
    rows, measured = evaluated
    found = figures(measured, list(rows))
    answers = answer_questions(found, "specialist")
    assert [answer["passed"] for answer in answers[2:]] == [True, True]
    assert "applies to none" in answers[3]["figure"]
    assert "nothing for Stage B to correct" in verdict(answers, found["specialist"], 40)


def test_a_number_cut_at_its_end_is_no_copy(evaluated):
    row = rows_of([("67-year-old man. CRP 120.", "CRP 120.")])[0]
    measured = measure_systems({0: row}, {"cut": ["CRP 12."], "copied": ["CRP 120."]})
    assert [measured[name][0].sums["rewritten"] for name in measured] == [(1, 1), (0, 0)]


def test_few_sentences_without_a_finding_show_nothing():
    """Nothing found in ten sentences: the difference from others is as uncertain as the rule of three."""

    def of(*counts):
        sums = dict.fromkeys(MEASURES, (0, 0))
        return {n: Measured({}, [], sums | {"rewritten": (count, 1)}) for n, count in enumerate(counts)}

    for counts, high in (([1] * 5 + [0] * 5, -0.2), ([0] * 10, 0.3)):
        measured = {"verified": of(*[0] * 10), "reference": of(*counts)}
        found = figures(measured, range(10))["verified"]["rewritten"]
        assert (found["low"], found["high"]) == (0, 0.3)
        assert found["minus"]["reference"]["high"] >= high - 1e-9


def test_twins_rank_the_check():
    [true] = rows_of([("Left wrist painful after a fall.", "Left wrist pain.")])
    false = true.__class__(3, "h", true.clinical_note, "Right wrist pain.", "hallucinated", "side")
    found = twins([true, false])
    assert found["side"] == found["all"] and found["all"]["value"] == found["all"]["auroc"] == 1
    assert twins([true]) == {}


# ------------------------------------------------------------------------------- page and sheet


def write_page(folder, rows, measured):
    found = figures(measured, list(rows))
    evaluation = {
        "figures": found,
        "answers": {"specialist": answer_questions(found, "specialist")},
        "verdicts": {"specialist": "No."},
        "changes": {"specialist": changes(found, "specialist")},
        "systems": dict.fromkeys(measured, "a system"),
        **{"twins": {}, "groups": {}, "n_leaked": 0},
    }
    write_report(folder / "report.html", rows, measured, evaluation, SENTENCE_VERSION)
    return (folder / "report.html").read_text()


def test_a_note_that_holds_markup_is_text(evaluated, tmp_path):
    evil = "<script>alert(1)</script> </span><img src=x onerror=alert(1)> {{ 7 * 7 }} No fever."
    rows = dict(enumerate(rows_of([(evil, evil)])))
    page = write_page(tmp_path, rows, measure_systems(rows, {"base": [evil], "specialist": [evil]}))
    assert page.count("<script") == 1 and "<img" not in page and "&lt;img" in page and "{{ 7 * 7 }}" in page
    assert "default-src 'none'" in html.unescape(page) and "http" not in page.replace("http-equiv", "")
    write_sheet(tmp_path, rows, measure_systems(rows, {"base": [evil]}))
    assert "<img" not in (tmp_path / "blind_sheet.html").read_text()


def test_files_hold_figures_and_the_page_holds_the_notes(evaluated, tmp_path):
    rows, measured = evaluated
    page = write_page(tmp_path, rows, measured)
    assert page.count("<article") == len(rows) and "number: not in the note: &#39;1987&#39;" in page
    write_csv(tmp_path / "evaluation.csv", rows, measured)
    text = (tmp_path / "evaluation.csv").read_text()
    assert text.count("\n") == 1 + 3 * len(rows) and "knee" not in text
    assert (tmp_path / "report.html").stat().st_mode & 0o77 == 0


def write_readings(folder, rows, judge) -> dict:
    """A sheet of two systems, one of which is never wrong; {item: line} as a reader fills it in."""
    faithful = [row.model_summary for row in rows.values()]
    write_sheet(
        folder, rows, measure_systems(rows, {"faithful": faithful, "invented": ["Gout in 1987."] * len(rows)})
    )
    lines = ["item,usable,wrong,dangerous,finding,plan"]
    for item in read_key(folder).values():
        is_bad = item["systems"] == ["invented"]
        lines.append(
            f"{item['item']},{judge(is_bad)},{'in  1987' if is_bad else ''},{'0-4' if is_bad else ''},yes,yes"
        )
    (folder / "ratings.csv").write_text("\n".join(lines))
    return read_key(folder)


def test_a_sheet_is_read_back(evaluated, tmp_path):
    rows, _ = evaluated
    items = write_readings(tmp_path, rows, lambda is_bad: "no" if is_bad else "Yes")
    assert len(items) == 2 * len(rows)
    sheet = (tmp_path / "blind_sheet.html").read_text() + (tmp_path / "blind_sheet.csv").read_text()
    assert "faithful" not in sheet and "does not support" in sheet
    file = str(tmp_path / "ratings.csv")
    text = report_ratings(tmp_path, [file, file])
    report = json.loads((tmp_path / "ratings.json").read_text())
    counts = report["readings"][0]
    assert counts["faithful"]["usable"]["value"] == 1 and counts["invented"]["usable"]["count"] == 0
    assert counts["invented"]["wrong statements"]["count"] == 2 * len(rows)
    assert counts["the check"]["found"]["value"] > 0.9
    assert report["agreement"]["usable"] == {"n": len(items), "same": 1.0, "kappa": 1.0}
    assert "kappa 1.00" in text


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("no,", "perhaps,", "column usable is neither yes nor no"),
        ("0-4", "nonsense", "column dangerous: not words of the summary"),
        ("0-4", "3-999", "column dangerous: not words of the summary"),
        ("item,usable", "a,b", "no columns item and usable"),
    ],
)
def test_a_sheet_that_cannot_be_understood(evaluated, tmp_path, old, new, words):
    items = write_readings(tmp_path, evaluated[0], lambda is_bad: "no")
    file = tmp_path / "ratings.csv"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError, match=words):
        read_ratings(str(file), items)


def test_nothing_written_is_read_too(tmp_path):
    rows = dict(enumerate(rows_of([("No fever.", "No fever.")])))
    write_sheet(tmp_path, rows, measure_systems(rows, {"silent": [""], "copied": ["No fever."]}))
    assert len(read_key(tmp_path)) == 2
    assert (tmp_path / "blind_sheet.html").read_text().count("(nothing written)") == 1


def test_another_sheets_ratings_are_refused(evaluated, tmp_path):
    write_readings(tmp_path, evaluated[0], lambda is_bad: "no")
    with pytest.raises(InputError, match="not of this folder's sheet"):
        read_ratings(str(tmp_path / "ratings.csv"), {})
    with pytest.raises(InputError, match="no key of a blind sheet"):
        read_key(tmp_path / "nowhere")


def test_the_pages_in_a_browser(evaluated, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = shutil.which("chromium")
    if not browser_path:
        pytest.skip("no chromium here")
    rows, measured = evaluated
    write_page(tmp_path, rows, measured)
    items = write_readings(tmp_path, rows, lambda is_bad: "no")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        said, requests = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        page.select_option("#filter", "specialist")
        assert page.locator("article:visible").count() < len(rows)
        page.select_option("#filter", "base")
        assert page.locator("mark:visible").count() > 0
        page.locator(".s:visible").nth(1).focus()
        assert page.locator(".note .lit").count() > 0
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")

        page.goto((tmp_path / "blind_sheet.html").as_uri())
        item = page.locator(".item").first
        item.locator(".summary").select_text()
        item.locator("[data-kind=wrong]").click()
        for question in ("finding", "plan", "usable"):
            item.locator(f"[name={question}]").select_option("no")
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "saved.csv")
        browser.close()
    [(name, rating)] = read_ratings(str(tmp_path / "saved.csv"), items).items()
    assert rating["wrong"] == [(0, len(items[name]["summary"]))] and not rating["usable"]
    assert not said and all(url.startswith("file:") for url in requests)
