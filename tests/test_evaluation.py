"""sft_evaluation.py on a tiny specialist: the base is the base, runs continue, what is refused, what stays
private."""

import csv
import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_input_error, run_python
from tiny import NOTES, write_csv

import sft_evaluation
from sft.cli import InputError
from sft.data.prompt import PromptTemplate
from sft.data.rows import factual_rows, read_rows
from sft.evaluation.systems import SYSTEMS, Adapter, reference_loss, sentence_support, with_examples
from sft.grounding import check_summary
from sft.grounding.sentences import split_sentences
from sft.options import SYSTEM_NAMES, EvaluationConfig


@pytest.fixture(scope="module")
def test_file(tmp_path_factory):
    rows = [
        (f"e{i}", f"Seen today. {note}", summary, "factual", "", "ab"[i % 2])
        for i, (note, summary) in enumerate(NOTES)
    ]
    for i in (0, 1):
        rows.append((f"e{i}-h", rows[i][1], "Influenza B with fever of 39.5.", "hallucinated", "number", "a"))
    header = "id clinical_note model_summary label hallucination_type specialty".split()
    return write_csv(tmp_path_factory.mktemp("evaluation") / "test.csv", rows, header)  # fmt: skip


@pytest.fixture
def evaluate(adapters, test_file, monkeypatch):
    """evaluate(output_dir, *arguments): runs the script in this process; returns evaluation.json."""

    def run(output_dir, *arguments):
        adapter = adapters()
        defaults = {
            "--model_path": adapter,
            "--train_csv": adapter.parent.parent / "rows.csv",
            "--test_csv": test_file,
            "--output_dir": output_dir,
            "--device": "cpu",
            "--max_new_tokens": 12,
        }
        values = [word for option in defaults.items() if option[0] not in arguments for word in option]
        monkeypatch.setattr(sys, "argv", ["sft_evaluation.py", *map(str, [*values, *arguments])])
        sft_evaluation.main()
        file = output_dir / "evaluation.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    return run


def summaries_of(output_dir) -> dict:
    """{system: {number: summary}} of the files in the output folder."""
    found = {}
    for file in (output_dir / "summaries").glob("*.jsonl"):
        entries = [json.loads(line) for line in file.read_text().splitlines()[1:]]
        summaries = {entry["number"]: entry["result"]["generated_summary"] for entry in entries}
        found[file.name.rpartition("-")[0]] = summaries
    return found


def test_the_base_is_the_base(adapters, model_folder):
    from transformers import AutoModelForCausalLM

    [adapter] = sft_evaluation.read_adapters([str(adapters())])
    base, tuned = (
        sft_evaluation.load(kind, adapter, EvaluationConfig(device="cpu")) for kind in ("base", "specialist")
    )
    ids = torch.tensor([tuned.prompt_ids(NOTES[0][0], 20)[0]])
    with torch.no_grad():
        found, other = (inference.model(ids).logits for inference in (base, tuned))
        expected = AutoModelForCausalLM.from_pretrained(model_folder()).eval()(ids).logits
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(other, expected, atol=1e-2)
    # What the decoder uses is this model too
    assert base._base is base.model


def test_the_loss_is_that_of_training(specialist, test_file):
    """Cross-entropy of summary and end token, as transformers computes it."""
    row = read_rows(test_file)[0]
    loss, n_tokens = reference_loss(specialist, row)
    prompt = specialist.prompt_ids(row.clinical_note, 50)[0]
    target = [*specialist.encoder.encode_texts([row.model_summary])[0], specialist.template.end_token_id]
    labels = torch.tensor([[-100] * len(prompt) + target])
    with torch.no_grad():
        mean = specialist.model(torch.tensor([prompt + target]), labels=labels).loss.item()
    assert n_tokens == len(target) and loss == pytest.approx(mean * n_tokens, rel=1e-3)
    # A summary that fills the context window has none, and ends no evaluation
    assert reference_loss(specialist, dataclasses.replace(row, model_summary="Fever. " * 5000)) == (0, 0)


def test_how_far_a_sentence_rests_on_its_note(specialist):
    """The likelihoods are those of the whole text, token by token, and the note's own words raise them."""
    note, summary = NOTES[0]
    with_note, without = zip(*sentence_support(specialist, note, f"{summary} {summary}"))
    assert len(with_note) == 2 * len(split_sentences(summary))
    assert sum(with_note) > sum(without)
    assert max(*with_note, *without) < 0
    (alone, _), *_ = sentence_support(specialist, note, summary)
    assert alone == pytest.approx(with_note[0], abs=1e-4)
    assert sentence_support(specialist, note, "") == []


def test_examples_are_earlier_turns(specialist, test_file, capsys):
    encoder = specialist.encoder
    rows = factual_rows(read_rows(test_file))
    shown = with_examples(encoder, rows, 500)
    text = encoder.tokenizer.decode(shown.prefix_ids)
    assert sum(row.model_summary + "<|im_end|>" in text for row in rows) == 2
    assert shown.prefix_ids[-len(encoder.prefix_ids) :] == encoder.prefix_ids
    assert with_examples(encoder, rows, 10).prefix_ids == encoder.prefix_ids
    assert "0 examples" in capsys.readouterr().err


def test_an_interrupted_run_continues(evaluate, tmp_path, adapters):
    before = {path: path.read_bytes() for path in adapters().iterdir()}
    whole = evaluate(tmp_path / "out", "--by", "specialty", "--blind_sheet")
    expected = summaries_of(tmp_path / "out")
    assert (
        set(expected) == set(SYSTEM_NAMES) - {"selected"}
        and [system.name for system in SYSTEMS] == SYSTEM_NAMES
    )
    assert whole["n_leaked"] > 0 and set(whole["groups"]) == {"a", "b"} and whole["twins"]["number"]["n"] == 2
    # A kill leaves an incomplete line, and lines that are missing
    for name in ("verified", "base"):
        [file] = (tmp_path / "out" / "summaries").glob(f"{name}-*")
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    again = evaluate(tmp_path / "out", "--by", "specialty")
    assert summaries_of(tmp_path / "out") == expected
    for figures in (whole["figures"], again["figures"]):
        for system in figures.values():
            system.pop("seconds", None)
    assert again["figures"]["reference"] == whole["figures"]["reference"]
    with pytest.raises(InputError, match=r"blind_sheet\.csv exists"):
        evaluate(tmp_path / "out", "--blind_sheet")
    for name, figure in whole["figures"]["verified"].items():
        assert again["figures"]["verified"][name]["value"] == pytest.approx(figure["value"], rel=1e-6), name
    assert {path: path.read_bytes() for path in adapters().iterdir()} == before
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o77 == 0, path
    # Figures alone
    text = (tmp_path / "out" / "evaluation.json").read_text() + (
        tmp_path / "out" / "evaluation.csv"
    ).read_text()
    assert not any(summary in text for _, summary in NOTES)


def test_groups_by_length_are_thirds_of_five_notes_or_more():
    def grouped(lengths: list[int]) -> dict[str, list[int]]:
        rows = {i: SimpleNamespace(clinical_note="word " * n) for i, n in enumerate(lengths)}
        return sft_evaluation.group_rows(EvaluationConfig(by="note_length"), SimpleNamespace(rows=rows))

    thirds = {
        "1 to 5 words": [0, 1, 2, 3, 4],
        "6 to 10 words": [5, 6, 7, 8, 9],
        "11 to 15 words": [*range(10, 15)],
    }
    assert grouped(list(range(1, 16))) == thirds
    assert grouped([20] * 6) == {"20 to 20 words": [*range(6)]}
    assert grouped([1, 2, 3, 4, 5, 6]) == {}


def test_some_systems_on_some_rows(evaluate, tmp_path):
    found = evaluate(tmp_path, "--systems", "lead", "reference", "--n_rows", 6, "--by", "note_length")
    assert set(found["figures"]) == {"lead", "reference"}
    assert found["n_notes"] == 6
    # Two notes are no group
    assert found["groups"] == {}
    with open(tmp_path / "evaluation.csv") as file:
        assert len(list(csv.DictReader(file))) == 12
    # Other systems are added to the same folder
    assert set(evaluate(tmp_path, "--systems", "free", "lead")["figures"]) == {"free", "lead"}


def test_adapters_side_by_side(evaluate, adapters, tmp_path):
    both = ["--model_path", adapters(), adapters("qwen2")]
    found = evaluate(tmp_path, *both, "--systems", "base", "free", "--n_rows", 3)
    assert set(found["figures"]) == {"base", "free_1", "free_2"}
    assert set(found["answers"]) == {"free_1", "free_2"}
    losses = [found["figures"][name]["loss"]["value"] for name in found["figures"]]
    assert len(set(losses)) == 3


def test_an_adapter_that_another_tool_trained_further(evaluate, adapters, tmp_path):
    theirs = tmp_path / "dpo"
    theirs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapters() / name, theirs)
    options = ["--systems", "free", "--n_rows", 2]
    found = evaluate(tmp_path / "out", "--model_path", theirs, "--prompt_from", adapters(), *options)
    own = evaluate(tmp_path / "own", *options)
    assert found["figures"]["free"]["loss"] == own["figures"]["free"]["loss"]
    assert found["adapters"] != own["adapters"]


def test_what_an_adapter_without_a_selector_cannot_do_is_left_out_and_said(capsys):
    old, new = (Adapter("", None, {}, has_selector) for has_selector in (False, True))
    data = sft_evaluation.Data(None, {}, [], ["a row"], 0, 2)
    found = {column.name for column in sft_evaluation.choose_columns(None, [old], data)}
    assert {"free", "selected"} <= found and not {"quote", "verified"} & found
    said = capsys.readouterr().err
    assert "quote is left out: the adapter has no selector" in said and "verified is left out" in said
    found = {column.name for column in sft_evaluation.choose_columns(None, [new], data)}
    assert {"free", "quote", "verified"} <= found and "selected" not in found


def test_a_file_is_never_continued_with_other_settings(evaluate, tmp_path):
    for n_tokens in (1, 2, 2):
        evaluate(tmp_path, "--systems", "free", "--n_rows", 2, "--max_new_tokens", n_tokens)
    assert len(list((tmp_path / "summaries").glob("free-*"))) == 2


def read_pairs(evaluate, folder) -> list[dict]:
    (folder / "pairs.jsonl").unlink(missing_ok=True)
    evaluate(folder / "out", "--export_preferences", folder / "pairs.jsonl", "--n_rows", 12)
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_preferences_are_the_specialists_own_worse_summaries(evaluate, tmp_path):
    """Those in which the check finds something, beside the training summary, once for each note."""
    pairs = read_pairs(evaluate, tmp_path)
    assert pairs and len({pair["prompt"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        [(note, summary)] = [one for one in NOTES if one[0] in pair["prompt"]]
        assert pair["chosen"] == summary and pair["id"] == f"{pair['factual_id']}-own"
        kinds = {finding.kind for finding in check_summary(note, pair["rejected"]).findings}
        assert pair["hallucination_type"] in kinds
    assert (tmp_path / "pairs.jsonl").stat().st_mode & 0o77 == 0
    with pytest.raises(InputError, match="exists"):
        evaluate(tmp_path / "out", "--export_preferences", tmp_path / "pairs.jsonl")
    # The samples are kept, and no figures are written
    assert read_pairs(evaluate, tmp_path) == pairs
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summaries"}


def test_trl_trains_on_preferences(evaluate, adapters, tmp_path):
    """Two steps of TRL's DPOTrainer on our adapter and pairs."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = read_pairs(evaluate, tmp_path)
    adapter = adapters()
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(ROOT / base)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "dpo"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", logging_steps=1, gradient_checkpointing=False,
    )  # fmt: skip

    class ExactDPOTrainer(trl.DPOTrainer):  # as in the guide
        def _prepare_dataset(self, dataset, *arguments):
            return dataset

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    texts = Dataset.from_list([{name: pair[name] for name in columns} for pair in pairs])
    trainer = ExactDPOTrainer(model, args=args, train_dataset=texts, processing_class=tokenizer)
    assert trainer.train().global_step == 2
    assert any(
        not torch.equal(before[name], weight) for name, weight in model.named_parameters() if name in before
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--systems", "best"], "invalid choice: best"),
        (["--by", "clinical_note"], "too many different values"),
        (["--by", "ward"], "no such column"),
        (["--by", "Zebra: BP 120/80, no cough"], r"--by \(not shown\)"),
        (["--systems", "Zebra: no cough"], r"\(not shown\)"),
        (["--summary_column", "Zebra: no cough"], "--summary_column says"),
        (["--train_csv", "{test}"], "not what the adapter was trained on"),
        (["--output_dir", "{adapter}/out"], "lies in the adapter's folder"),
        (["--ratings", "{test}"], "no key of a blind sheet"),
        (["--ratings", "{test}", "--blind_sheet"], "--ratings cannot be combined with --blind_sheet"),
        (
            ["--export_preferences", "a.jsonl", "--by", "x"],
            "--export_preferences cannot be combined with --by",
        ),
    ],
)
def test_what_is_refused(evaluate, adapters, test_file, tmp_path, arguments, words):
    values = [value.format(test=test_file, adapter=adapters()) for value in arguments]
    with pytest.raises(InputError, match=words) as refused:
        evaluate(tmp_path / "out", *values)
    assert "Zebra" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_other_rows_need_a_file(adapters, tmp_path):
    result = run_python("sft_evaluation.py", "--model_path", adapters())
    assert_input_error(result, "no test rows", "--test_csv")
    result = run_python(
        "sft_evaluation.py", "--model_path", adapters(), "--export_preferences", tmp_path / "a.jsonl"
    )
    assert_input_error(result, "no train rows", "--train_csv")


def test_a_base_that_moved_is_named(evaluate, adapters, model_folder, tmp_path):
    moved = shutil.copytree(model_folder(), tmp_path / "moved")
    options = ["--systems", "base", "--n_rows", 2, "--base_model"]
    assert evaluate(tmp_path / "out", *options, moved)["figures"]["base"]
    with pytest.raises(InputError, match="base model"):
        evaluate(tmp_path / "other", *options, model_folder("qwen2"))


def test_broken_specialists_beside_a_good_one(
    model_folder, csv_files, test_file, tmp_path, monkeypatch, capsys
):
    """benchmarks/broken_specialists.py, with tiny models: each is trained on what its name says."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import broken_specialists

    import stage_a_sft_training

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--device", "cpu"])
        {"stage_a_sft_training.py": stage_a_sft_training, "sft_evaluation.py": sft_evaluation}[script].main()

    monkeypatch.setattr(broken_specialists, "run", run)
    values = ["--train_csv", csv_files[0], "--val_csv", csv_files[1], "--test_csv", test_file, "--n_rows", 3]
    values += ["--model_name", model_folder(), "--num_epochs", 1]
    monkeypatch.setattr(sys, "argv", ["broken_specialists.py", *map(str, [tmp_path / "out", *values])])
    broken_specialists.main()
    printed = capsys.readouterr().out
    assert "ten_times_the_rate" in printed and ("told apart" in printed or "no difference shown" in printed)
    rows = {kind: read_rows(tmp_path / "out" / f"{kind}.csv") for kind in ("shuffled", "relabeled")}
    truth = dict(NOTES)
    assert all(row.model_summary != truth[row.clinical_note] for row in rows["shuffled"])
    assert {row.model_summary for row in rows["shuffled"]} == set(truth.values())
    wrong = [row.clinical_note for row in rows["relabeled"] if row.model_summary != truth[row.clinical_note]]
    assert wrong == [NOTES[0][0]] and len(rows["relabeled"]) == len(NOTES)
    recorded = json.loads((tmp_path / "out/ten_times_the_rate/final_model/sft_config.json").read_text())
    assert recorded["training"]["learning_rate"] == pytest.approx(2e-3)


def test_names_of_columns_are_those_of_the_files_that_were_named(tmp_path, monkeypatch):
    """Not of the bundled training rows, which come with the adapter."""
    test_csv = tmp_path / "test.csv"
    lines = [
        f"{i},{note},{summary}"
        for i, (note, summary) in enumerate([("Fever.", "Fever."), ("Gout.", "Gout.")])
    ]
    test_csv.write_text("\n".join(["nr,text,target", *lines]))
    train_csv = write_csv(tmp_path / "train.csv", [("t1", "Asthma.", "Asthma.", "factual", "")])
    names = {"id_column": "nr", "note_column": "text", "summary_column": "target", "label": "factual"}
    config = EvaluationConfig(test_csv=str(test_csv), **names)
    monkeypatch.setattr(sft_evaluation, "find_files", lambda *_: ([str(test_csv)], [str(train_csv)]))
    prompt = dataclasses.asdict(PromptTemplate("", "", False, 0, (0,), False))
    data = sft_evaluation.read_data(config, {"sha256": {}, "prompt": prompt})
    assert [row.clinical_note for row in data.rows.values()] == ["Fever.", "Gout."]
    assert [row.clinical_note for row in data.training] == ["Asthma."]
