"""Summaries by sentences: what training learns of them, quoted and verified writing, what is shown."""

import csv
import io
import json
import math
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_adapter, run_python, short_run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NOTES, rows_of, write_csv

from sft.cli import InputError
from sft.data.text import clean_text
from sft.files import sha256, write_checksums
from sft.grounding.acceptance import accept
from sft.grounding.citations import parse_citations, strip_citations
from sft.grounding.parts import make_parts
from sft.grounding.selector import quote
from sft.grounding.sentences import split_sentences
from sft.inference.chat import left_out, own_words, print_piece, show_evidence
from sft.inference.checks import fingerprint, log_idle_options
from sft.inference.note_files import check_fingerprint, summarize_file
from sft.inference.notes import Note
from sft.inference.results import COMPUTED_NAN, OUT_OF_MEMORY, kinds_of, note_problem
from sft.inference.writing import Answer, NoteWords, read_selector, way_of_writing, write_by_sentence
from sft.options import InferenceConfig, TrainConfig
from sft.training.parts import learn_writing
from sft_inference import SFTInference, read_adapter_folder

# Summaries are sentences of their notes; few different ones, so that a tiny model learns them in seconds
PEOPLE = [
    f"{'Man' if i % 2 else 'Woman'} of {31 + i} with {('gout', 'asthma', 'eczema', 'migraine')[i // 3 % 4]}."
    for i in range(24)
]
PAIRS = [
    (
        f"{person} Lives with a cat. Drives a bus.\nStarted {drug} daily. Throat swab taken.",
        f"{person} Started {drug} daily. Throat swab was taken.",
    )
    for person, drug in zip(PEOPLE, ("naproxen", "insulin", "iron") * 8)
]
TEXTS = [note for note, _ in PAIRS] + [note for note, _ in NOTES]


def trained(model: Path, folder: Path, pairs, on_step=None, **options) -> Path:
    from stage_a_sft_training import train

    folder.mkdir(exist_ok=True)
    rows = [(f"r{i}", *pair, "factual", "") for i, pair in enumerate(pairs)]
    files = (write_csv(folder / "rows.csv", rows), write_csv(folder / "val.csv", rows[:2]))
    values = {
        "part_rows": True,
        "num_epochs": 1,
        "batch_size": 8,
        "lora_r": 16,
        "learning_rate": 1e-2,
        "lora_dropout": 0.0,
        "target_modules": ["all-linear"],
    }
    train(short_run(model, files, folder / "out", **{**values, **options}), on_step)
    return folder / "out" / "final_model"


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    return trained(model_folder(), tmp_path_factory.mktemp("by_sentence"), PAIRS, num_epochs=8)


@pytest.fixture(scope="module")
def verified(adapter):
    return SFTInference(adapter, device="cpu", writing="verified")


def without_confidence(results) -> list[dict]:
    """Neighbors in a batch move its last digit."""
    results = [{**result, "confidence": None} for result in results]
    for result in results:
        result["sentences"] = [{**sentence, "confidence": None} for sentence in result["sentences"]]
    return results


@pytest.fixture(scope="module")
def learned():
    return learn_writing(rows_of(PAIRS), TrainConfig(part_rows=True), False)


def written(text: str, *log_probs: float) -> Answer:
    return Answer("", text, log_probs or (-0.1, -0.3), 10)


def summarize(note: str, settings: dict, answers: dict[int, Answer] | None = None, **options) -> dict:
    """The summary of a note for which the specialist gives these answers, the last part's first; to the other
    parts its own words, but for one."""

    def ask(parts):
        for key, part in reversed(parts.items()):
            yield key, answers.get(key[1], written(part.quoted.replace("swab taken", "swab was taken")))

    options = {"citations": False, **options}
    return dict(write_by_sentence({5: note}, settings, ask=None if answers is None else ask, **options))[5]


# ------------------------------------------------------------------------------- training


def test_training_saves_selector_shorthand_and_default(adapter, learned):
    sft_config = read_adapter_folder(adapter)[1]
    assert sft_config["writing"] == "quote"
    assert {name: sft_config[name] for name in learned.settings} == learned.settings
    assert sft_config["rows"]["parts"] == learned.counts
    assert sft_config["rows"]["train"]["used"] == len(PAIRS)
    # One hash over the folder stands for it, and what was changed is refused
    damaged = adapter.parent / "damaged"
    shutil.copytree(adapter, damaged)
    text = (damaged / "sft_config.json").read_text()
    (damaged / "sft_config.json").write_text(text.replace('"n_pairs": ', '"n_pairs": 1'))
    with pytest.raises(InputError, match="changed"):
        SFTInference(damaged)


def test_parts_hold_what_their_sentences_say(learned):
    assert learned.counts["used"] == len(learned.rows) > len(PAIRS)
    for row in learned.rows:
        words = set(re.findall(r"\w+", row.model_summary.lower()))
        assert words <= {"was", *re.findall(r"\w+", row.clinical_note.lower())}
    assert learned.digest != learn_writing(rows_of(PAIRS[1:]), TrainConfig(part_rows=True), False).digest


@pytest.mark.parametrize(
    "pairs, options, numbered, why",
    [
        (
            [(note, f"Nothing of interest {i}.") for i, (note, _) in enumerate(PAIRS)],
            {},
            False,
            "kinship 0.0",
        ),
        (PAIRS[:19], {}, False, "19 notes, needs 20"),
        (PAIRS, {}, False, "quote by default"),
        (PAIRS, {"part_rows": True}, True, "numbered sentences"),
    ],
)
def test_no_parts_and_why(pairs, options, numbered, why, capsys):
    rows = rows_of(pairs)
    learned = learn_writing(rows, TrainConfig(**options), numbered)
    assert learned.rows == []
    assert learned.digest == ""
    assert learned.settings["writing"] == ("quote" if pairs is PAIRS else "free")
    assert why in capsys.readouterr().err


def test_a_run_with_parts_resumes_to_the_bit(model_folder, tmp_path):
    def interrupt(run, metrics):
        if metrics["step"] == 8:
            raise KeyboardInterrupt

    whole = trained(model_folder(), tmp_path / "whole", PAIRS, num_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        trained(model_folder(), tmp_path / "cut", PAIRS, interrupt, num_epochs=2, save_steps=3)
    with pytest.raises(InputError, match="part_rows"):
        trained(model_folder(), tmp_path / "cut", PAIRS, num_epochs=2, resume=True, part_rows=False)
    resumed = trained(model_folder(), tmp_path / "cut", PAIRS, num_epochs=2, resume=True)
    assert_same_adapter(whole, resumed)
    assert len((whole.parent / "metrics.jsonl").read_text().splitlines()) > 2 * (-(-len(PAIRS) // 8)) + 3


# ------------------------------------------------------------------------------- what stands


def test_a_sentence_stands_if_it_can_be_traced(learned):
    note = PAIRS[1][0]
    answers = {0: written("The patient died."), 1: written("Throat swab taken, started insulin daily.")}
    result = summarize(note, learned.settings, answers)
    assert [bool(sentence["refused"]) for sentence in result["sentences"]] == [True, True, False]
    for sentence in result["sentences"]:
        # The note's words that are only repeated are the note's
        assert (sentence["source"] == "written") == (sentence["text"] == "Throat swab was taken.")
        assert not (sentence["refused"] and sentence["source"] == "written")
        assert set(sentence["note_sentences"]) <= set(range(1, 6))
    assert "died" not in result["generated_summary"]
    assert result["generated_summary"] == " ".join(sentence["text"] for sentence in result["sentences"])
    assert result["finish_reason"] == "stop"


@pytest.mark.parametrize("fault", [COMPUTED_NAN, OUT_OF_MEMORY, "not finished"])
def test_what_fails_is_quoted(learned, fault):
    quoted = summarize(PAIRS[0][0], learned.settings)
    result = summarize(PAIRS[0][0], learned.settings, {2: Answer(fault)})
    assert result["sentences"][2] == quoted["sentences"][2] | {"refused": [fault]}
    assert result["generated_summary"] == quoted["generated_summary"]
    assert result["warnings"] == ([] if fault == "not finished" else [fault])


def test_confidence_is_of_the_words_that_stand(learned):
    answers = {0: Answer("not finished", "", (-9.0,), 10)}
    result = summarize(PAIRS[0][0], learned.settings, answers)
    assert result["confidence"] == pytest.approx(math.exp(-0.2), abs=1e-4)
    assert result["n_new_tokens"] == 1 + 2 * (len(result["sentences"]) - 1)
    quoted = summarize(PAIRS[0][0], learned.settings)
    assert (quoted["confidence"], quoted["n_prompt_tokens"], quoted["n_new_tokens"]) == (None, 0, 0)


@pytest.mark.parametrize("note", [note for note, _ in NOTES] + [PAIRS[0][0]])
def test_citations_parse_and_name_the_sentences(learned, note):
    result = summarize(note, learned.settings, {0: Answer("not finished")}, citations=True)
    assert parse_citations(result["generated_summary"], note) == result["evidence"]
    sentences = result["sentences"]
    assert len(result["evidence"]) == len(sentences)
    assert strip_citations(result["generated_summary"]) == " ".join(s["text"] for s in sentences)
    assert result["evidence"][0]["confidence"] == 1.0
    assert result["evidence"][0]["sentence_numbers"] == sentences[0]["note_sentences"]


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("Aa1 .\n-:?[]S§µ\u0301"), min_size=1, max_size=80).filter(
        lambda note: not note_problem(note)
    )
)
def test_any_note_can_be_quoted(learned, note):
    note = clean_text(note)
    result = summarize(note, learned.settings, citations=True)
    n_sentences = len(split_sentences(note))
    assert result["generated_summary"]
    for sentence in result["sentences"]:
        assert set(sentence["note_sentences"]) <= set(range(1, n_sentences + 1))


def test_a_note_without_marks_between_sentences_is_named(learned):
    result = summarize("fever and cough since monday " * 30, learned.settings)
    assert result["warnings"] == ["quotes a sentence of 150 words, as long as the note has it"]


def test_pieces_come_in_order_and_say_whose_words_they_are(learned):
    pieces = []
    answers = {1: Answer("not finished")}
    result = summarize(PAIRS[0][0], learned.settings, answers, on_text=lambda _, text: pieces.append(text))
    assert "".join(pieces) == result["generated_summary"]
    is_quoted = [sentence["source"] == "quoted" for sentence in result["sentences"]]
    assert [isinstance(piece, NoteWords) for piece in pieces] == is_quoted


# ------------------------------------------------------------------------------- the specialist


def test_verified_is_equal_alone_and_in_any_batch(verified):
    together = verified.generate_batch(TEXTS)
    sources = {sentence["source"] for result in together for sentence in result["sentences"]}
    assert sources == {"written", "quoted"}
    alone = [verified.generate_summary(note) for note in TEXTS[::7]]
    small = verified.generate_batch(TEXTS[::7], batch_size=2)
    for results in (alone, small):
        assert without_confidence(results) == without_confidence(together[::7])
    # A sample depends on the seed, the note's number and the part alone
    drawn = dict(verified.summarize(dict(enumerate(TEXTS)), temperature=1.5, seed=3))
    some = dict(verified.summarize({7: TEXTS[7], 9: TEXTS[9]}, temperature=1.5, seed=3, batch_size=1))
    assert without_confidence([some[7], some[9]]) == without_confidence([drawn[7], drawn[9]])


def test_every_sentence_is_accepted_or_the_notes_own(verified, learned):
    for note, result in zip(TEXTS, verified.generate_batch(TEXTS)):
        parts = make_parts(note, quote(note, read_selector(learned.settings)))
        for part, sentence in zip(parts, result["sentences"], strict=True):
            if sentence["source"] == "quoted":
                assert sentence["text"] == part.quoted
            else:
                assert accept(part.quoted, sentence["text"], note, learned.settings["shorthand"]) == []
        assert result["made_by"]["writing"] == "verified"


def test_an_interrupted_file_ends_the_same(verified, tmp_path):
    notes = [Note(i, str(i), text) for i, text in enumerate(TEXTS)]

    def run(name: str, n_results: int | None = None, **options) -> bytes:
        def summarize(window, should_stop):
            for i, result in enumerate(verified.summarize(window, batch_size=4, should_stop=should_stop)):
                if i == n_results:
                    raise KeyboardInterrupt
                yield result

        config = InferenceConfig(output_file=str(tmp_path / name), batch_size=4, **options)
        summarize_file(notes, config, {"x": 1}, summarize)
        return (tmp_path / name).read_bytes()

    with pytest.raises(KeyboardInterrupt):
        run("cut.jsonl", 3)
    assert run("cut.jsonl", resume=True) == run("whole.jsonl")


def test_quote_loads_a_model_only_when_asked_for_another_way(adapter, verified):
    inference = SFTInference(adapter, device="cpu")
    assert inference.writing == "quote"
    quoted = inference.generate_summary(PAIRS[3][0])
    assert not hasattr(inference, "model")
    assert quoted["made_by"]["dtype"] is None
    for way in ("free", "verified"):
        results = [one.generate_batch([PAIRS[3][0]], writing=way)[0] for one in (inference, verified)]
        assert results[0] == results[1]
        assert bool(results[0]["sentences"]) == (way == "verified")
    with pytest.raises(InputError, match="choose verified, quote or free"):
        inference.generate_summary("Fever.", writing="fast")


def test_weights_that_another_tool_trained_are_used_unless_quotes_are_asked(adapter, capsys, monkeypatch):
    read_again = []
    hashed = "sft.model.folder.remembered_sha256"
    monkeypatch.setattr(hashed, lambda path, again: read_again.append(again) or sha256(path))
    _, sft_config, _ = read_adapter_folder(adapter, adapter, verify=True)
    assert read_again and all(read_again)
    assert way_of_writing(None, sft_config) == "free"
    assert way_of_writing("verified", sft_config) == "verified"
    log_idle_options(
        InferenceConfig(writing=way_of_writing("quote", sft_config), prompt_from="x", model_path="dpo")
    )
    assert "the weights in dpo are not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"use_8bit": "yes"}, {"merge": "no"}, {"verify": 3}, {"citations": "x"}, {"writing": "fast"}]
)
def test_values_of_the_wrong_kind_from_python(adapter, options):
    with pytest.raises(InputError, match=f"^{next(iter(options))} is "):
        SFTInference(adapter, **options)


def test_quote_needs_neither_torch_nor_a_base_model(adapter, tmp_path):
    lost = shutil.copytree(adapter, tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}))
    write_checksums(lost)
    notes = write_csv(tmp_path / "notes.csv", [(note,) for note, _ in PAIRS], ["clinical_note"])
    out = tmp_path / "out.csv"
    code = "import sys; from sft_inference import main; main(); assert 'torch' not in sys.modules"
    options = ["--model_path", str(lost), "--writing", "quote", "--citations", "--temperature", "1"]
    options += ["--input_file", str(notes), "--output_file", str(out), "--resume"]
    # No partial file to resume yet: a run may begin with --resume
    result = run_python("-c", code, *options)
    assert result.returncode == 0, result.stderr
    assert "no model, so --temperature changes nothing" in result.stderr
    rows = list(csv.DictReader(out.read_text(encoding="utf-8-sig").splitlines()))
    sentences = [json.loads(row["sentences"]) for row in rows]
    n = sum(map(len, sentences))
    assert f"{n} of {n} sentences are the notes' own words" in result.stderr
    for row, (note, _) in zip(rows, PAIRS, strict=True):
        assert parse_citations(row["generated_summary"], note) == json.loads(row["evidence"])
    assert "nothing to do" in run_python("-c", code, *options).stderr


def test_each_way_has_its_own_fingerprint(adapter):
    sft_config = read_adapter_folder(adapter)[1]
    notes = [Note(1, "1", "Fever.")]
    ways = [("free", False), ("quote", False), ("verified", False), ("quote", True), ("verified", True)]
    made = [
        fingerprint(InferenceConfig(writing=way, citations=citations), sft_config, notes, "1")
        for way, citations in ways
    ]
    for one in made:
        for other in made:
            if one is not other:
                with pytest.raises(InputError, match="was written with a different"):
                    check_fingerprint(Path("out.jsonl"), one, other, "")
    other = fingerprint(InferenceConfig(writing="free"), sft_config, notes, "2")
    with pytest.raises(InputError, match="different toolkit"):
        check_fingerprint(Path("out.jsonl"), made[0], other, "")


def test_specialists_of_evidence_rows_always_cite(adapter, tmp_path):
    numbered = shutil.copytree(adapter, tmp_path / "numbered")
    sft_config = json.loads((numbered / "sft_config.json").read_text())
    sft_config["prompt"]["number_sentences"] = True
    (numbered / "sft_config.json").write_text(json.dumps(sft_config))
    write_checksums(numbered)
    inference = SFTInference(numbered, device="cpu", writing="verified")
    for way in ("quote", "verified"):
        result = inference.generate_summary(PAIRS[0][0], writing=way)
        assert result["evidence"] == parse_citations(result["generated_summary"], PAIRS[0][0]) != []


def test_older_adapters_write_freely(monkeypatch):
    monkeypatch.chdir(ROOT)
    older = Path("tests") / "fixtures" / "format_1" / "run" / "final_model"
    inference = SFTInference(older, device="cpu")
    assert inference.generate_summary("Fever.", 5)["made_by"]["writing"] == "free"
    for ask in (
        lambda: SFTInference(older, writing="quote"),
        lambda: inference.generate_batch(["x"], writing="quote"),
    ):
        with pytest.raises(InputError, match="no selector"):
            ask()
    with pytest.raises(InputError, match="--citations needs --writing"):
        SFTInference(older, citations=True)


def test_citations_of_free_text_are_refused_in_any_call(adapter):
    inference = SFTInference(adapter, device="cpu", citations=True)
    with pytest.raises(InputError, match="--citations needs --writing"):
        inference.generate_summary("Fever.", writing="free")
    assert not hasattr(inference, "model")
    assert inference.generate_summary("Fever.", writing="quote")["made_by"]["citations"]


def test_threads_load_the_model_once(adapter, monkeypatch):
    loaded = []
    load = SFTInference._load_now

    def count(self, *arguments):
        loaded.append(threading.get_ident())
        load(self, *arguments)

    monkeypatch.setattr(SFTInference, "_load_now", count)
    inference = SFTInference(adapter, device="cpu")
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(inference.load) for _ in range(3)]
        calls.append(threads.submit(inference.generate_summary, "Fever.", 3, writing="free"))
        assert [call.result() for call in calls[:3]] == [None] * 3
        calls[3].result()
    assert len(loaded) == 1
    # Loaded already: harmless from inside a call
    inference.generate_summary("Fever.", 3, on_text=lambda text: inference.load())


# ------------------------------------------------------------------------------- what is shown


def test_the_notes_words_look_different_on_a_terminal(monkeypatch):
    class Screen(io.StringIO):
        is_terminal = True

        def isatty(self):
            return self.is_terminal

    def shown(text: str, is_terminal: bool = True, **environment) -> str:
        screen = Screen()
        screen.is_terminal = is_terminal
        monkeypatch.setattr("sys.stdout", screen)
        for name, value in {"TERM": "xterm", "NO_COLOR": "", **environment}.items():
            monkeypatch.setenv(name, value)
        print_piece(text)
        return screen.getvalue()

    own = NoteWords(" Fever.\x1b[2J")
    assert shown(own) == " \x1b[3mFever.\ufffd[2J\x1b[23m"
    assert shown(own, NO_COLOR="1") == shown(own, TERM="dumb") == " “Fever.\ufffd[2J”"
    assert shown(own, is_terminal=False) == own
    assert shown(" Fever.") == " Fever."


def test_what_stands_under_a_summary(learned):
    note = PAIRS[0][0]
    result = summarize(note, learned.settings, {0: Answer("not finished")})
    n = len(result["sentences"])
    assert (
        own_words(result)
        == f"{n - 1} of {n} sentences are the note's own words (--writing free writes freely)"
    )
    assert own_words({"sentences": []}) == ""
    assert show_evidence(result).startswith(f"{PEOPLE[0]}  (quoted: S1)\n")
    assert show_evidence(result).count("(written: S") == 1
    missing = {"not_mentioned": [{"kind": "drug", "text": "Stop warfarin 5 mg.", "note_sentence": 5}] * 7}
    assert left_out(missing, True).startswith("not mentioned: Stop warfarin 5 mg. (S5); Stop")
    assert left_out(missing, True).endswith("; 2 more")
    assert left_out(missing, False) == "not mentioned: 7 drug"
    assert left_out({"not_mentioned": []}, True) == ""
    kinds = list(kinds_of(result | missing))
    assert kinds.count("sentence quoted") == 2
    assert kinds.count("sentence written") == 1
    assert kinds.count("not mentioned: drug") == 1


def test_free_summaries_list_what_they_do_not_mention(verified):
    result = verified.generate_summary("Fever. Start warfarin 5 mg.", 5, writing="free")
    assert result["sentences"] == []
    assert [item["kind"] for item in result["not_mentioned"]] == ["drug"]
