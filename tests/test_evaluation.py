"""sft_evaluation.py on a tiny specialist: the base is the base, runs continue, what is refused, what stays
private."""

import csv
import json
import sys

import pytest
import torch
from conftest import assert_input_error, run_python
from tiny import NOTES, write_csv

import sft_evaluation
from sft.cli import InputError
from sft.evaluation.systems import SystemFile, reference_losses, remove_adapter, with_examples
from sft_inference import SFTInference


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
        values = [
            "--model_path",
            adapter,
            "--test_csv",
            test_file,
            "--train_csv",
            adapter.parent.parent / "rows.csv",
        ]
        values += ["--output_dir", output_dir, "--device", "cpu", "--max_new_tokens", 12, *arguments]
        monkeypatch.setattr(sys, "argv", ["sft_evaluation.py", *map(str, values)])
        sft_evaluation.main()
        return json.loads((output_dir / "evaluation.json").read_text())

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

    base = SFTInference(adapters(), device="cpu", writing="free", merge=False)
    ids = torch.tensor([base.prompt_ids(NOTES[0][0], 20)[0]])
    with torch.no_grad():
        tuned = base.model(ids).logits
        remove_adapter(base)
        found = base.model(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(model_folder()).eval()(ids).logits
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(tuned, expected, atol=1e-2)
    # What the decoder uses is this model too
    result = base.generate_summary(NOTES[0][0], max_new_tokens=1)
    assert result["n_new_tokens"] == 1


def test_the_loss_is_that_of_training(adapters, test_file):
    """Cross-entropy of summary and end token, as transformers computes it."""
    from sft.data.rows import read_rows

    inference = SFTInference(adapters(), device="cpu", writing="free")
    row = read_rows(test_file)[0]
    loss, n_tokens = reference_losses(inference, {7: row})[7]
    prompt = inference.prompt_ids(row.clinical_note, 50)[0]
    target = [*inference.encoder.encode_texts([row.model_summary])[0], inference.template.end_token_id]
    labels = torch.tensor([[-100] * len(prompt) + target])
    with torch.no_grad():
        mean = inference.model(torch.tensor([prompt + target]), labels=labels).loss.item()
    assert n_tokens == len(target) and loss == pytest.approx(mean * n_tokens, rel=1e-3)


def test_examples_are_earlier_turns(adapters, test_file, capsys):
    from sft.data.rows import factual_rows, read_rows

    encoder = SFTInference(adapters(), device="cpu", writing="free").encoder
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
    assert set(expected) == {
        "base",
        "base_examples",
        "free",
        "verified",
        "quote",
        "lead",
        "commonest",
        "reference",
    }
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


def test_some_systems_on_some_rows(evaluate, tmp_path):
    found = evaluate(tmp_path, "--systems", "lead", "reference", "--n_rows", 6, "--by", "note_length")
    assert (
        set(found["figures"]) == {"lead", "reference"} and found["n_notes"] == 6 and len(found["groups"]) == 3
    )
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
    import shutil

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
    old, new = (sft_evaluation.Adapter("", None, {}, False, has_selector) for has_selector in (False, True))
    data = sft_evaluation.Data(None, {}, [], ["a row"], 0, 2)
    found = {column.name for column in sft_evaluation.choose_columns(None, [old], data)}
    assert {"free", "selected"} <= found and not {"quote", "verified"} & found
    said = capsys.readouterr().err
    assert "quote is left out: the adapter has no selector" in said and "verified is left out" in said
    found = {column.name for column in sft_evaluation.choose_columns(None, [new], data)}
    assert {"free", "quote", "verified"} <= found and "selected" not in found


def test_a_file_is_never_continued_with_other_settings(tmp_path):
    one = SystemFile(tmp_path, "base", {"max_new_tokens": 1})
    one.write([0], lambda numbers, _: ((n, {"generated_summary": "x"}) for n in numbers))
    assert SystemFile(tmp_path, "base", {"max_new_tokens": 1}).missing([0, 1]) == [1]
    assert SystemFile(tmp_path, "base", {"max_new_tokens": 2}).missing([0, 1]) == [0, 1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--systems", "best"], "unknown: best"),
        (["--by", "clinical_note"], "too many different values"),
        (["--by", "ward"], "no such column"),
        (["--by", "Zebra: BP 120/80, no cough"], r"--by \(not shown\)"),
        (["--systems", "Zebra: no cough"], r"unknown: \(not shown\)"),
        (["--summary_column", "Zebra: no cough"], "--summary_column says"),
        (["--train_csv", "{test}"], "not what the adapter was trained on"),
        (["--output_dir", "{adapter}/out"], "lies in the adapter's folder"),
        (["--ratings", "{test}"], "no key of a blind sheet"),
    ],
)
def test_what_is_refused(evaluate, adapters, test_file, tmp_path, arguments, words):
    values = [value.format(test=test_file, adapter=adapters()) for value in arguments]
    with pytest.raises(InputError, match=words) as refused:
        evaluate(tmp_path / "out", *values)
    assert "Zebra" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_other_rows_need_a_test_file(adapters):
    result = run_python("sft_evaluation.py", "--model_path", adapters())
    assert_input_error(result, "no test rows", "--test_csv")
