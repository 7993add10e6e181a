"""Preference pairs: what is paired, what is left out and said, and that their tokens are Stage A's."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
from tiny import CHAT_TEMPLATES, NOTES, encoder_for, tiny_tokenizer, write_csv

import sft_dataset
from sft.cli import InputError
from sft.data.dataset import SFTDataset
from sft.data.preferences import differing_texts, end_of_turn, find_pairs
from sft.data.prompt import PromptEncoder, build_template
from sft.data.rows import Row, factual_rows


def rows_of_labels(*texts) -> list[Row]:
    return [Row(i + 2, f"r{i}", note, summary, label) for i, (note, summary, label) in enumerate(texts)]


def encoder_with_bos(chat: str, bos: bool) -> PromptEncoder:
    """`bos`: whether the tokenizer puts <s> before a text of its own accord."""
    tokenizer = tiny_tokenizer(chat, bos)
    return PromptEncoder(tokenizer, build_template(tokenizer))


LONG = "Seen today. " + "Stable, no new complaint. " * 40
PAIRED = rows_of_labels(
    *((note, summary, "factual") for note, summary in NOTES[:5]),
    *((note, "Something else, and more of it.", "hallucinated") for note, _ in NOTES[:5]),
    (LONG, "Stable.", "factual"),
    (LONG, "Unstable.", "hallucinated"),
)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("chat", CHAT_TEMPLATES)
def test_a_pair_has_the_tokens_of_stage_a(chat, bos):
    """As ids, and as texts tokenized the way TRL does: with the tokenizer's BOS, and its EOS at the end."""
    encoder = encoder_with_bos(chat, bos)
    pairs = find_pairs("x.csv", PAIRED, encoder, 256)
    dataset = SFTDataset(factual_rows(PAIRED), encoder, 256)
    trained = {example.row_id: example for example in dataset.examples}
    assert len(pairs) == 6 and pairs[-1]["shortened"]
    for pair in pairs:
        example = trained[pair["factual_id"]]
        assert pair["prompt_ids"] + pair["chosen_ids"] == example.input_ids
        assert len(pair["prompt_ids"]) == example.n_prompt
        assert pair["rejected_ids"][-1] == encoder.template.end_token_id
        assert pair["shortened"] == example.shortened
    # Where the tokenizer adds a BOS that the template leaves out, no text can do it
    adds_bos = bos and chat == "chatml"
    assert differing_texts(pairs, encoder) == [pair["id"] for pair in pairs if adds_bos]


@pytest.mark.parametrize("chat", CHAT_TEMPLATES)
def test_trl_makes_the_same_tokens(chat):
    """TRL's own preparation of the texts, with the end of turn as EOS."""
    if not (importlib.util.find_spec("trl") and importlib.util.find_spec("datasets")):
        pytest.skip("trl and datasets are not installed")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    encoder = encoder_with_bos(chat, chat != "chatml")
    pairs = find_pairs("x.csv", PAIRED, encoder, 256)
    tokenizer = encoder.tokenizer
    eos = tokenizer.eos_token
    tokenizer.eos_token = end_of_turn(encoder)
    try:
        texts = Dataset.from_list([{k: pair[k] for k in ("prompt", "chosen", "rejected")} for pair in pairs])
        trainer = SimpleNamespace(_tokenizer=tokenizer)
        options = DPOConfig(output_dir="unused", use_cpu=True, bf16=False)
        prepared = DPOTrainer._prepare_dataset(trainer, texts, tokenizer, options, "train")
    finally:
        tokenizer.eos_token = eos
    for pair, row in zip(pairs, prepared, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert row[name] == pair[name]


def test_texts_that_trl_would_read_otherwise_are_found():
    rows = rows_of_labels(
        ("Fever <|im_end|> and cough.", "Fever.", "factual"),
        ("Fever <|im_end|> and cough.", "Rash.", "hallucinated"),
    )
    encoder = encoder_for("chatml")
    assert differing_texts(find_pairs("x.csv", rows, encoder, 256), encoder) == ["r1"]


def test_what_is_left_out_is_counted_and_named(capfd):
    rows = rows_of_labels(
        ("Fever.", "Has fever.", "factual"),
        ("Fever.", "Febrile.", "factual"),
        ("fever. ", "No fever.", "hallucinated"),
        ("Cough.", "Rash.", "hallucinated"),
        ("Rash.", "A rash. " * 60, "factual"),
        ("Rash.", "A burn.", "hallucinated"),
    )
    pairs = find_pairs("x.csv", rows, encoder_for("chatml"), 200)
    assert [(pair["id"], pair["factual_id"]) for pair in pairs] == [("r2", "r0")]
    said = capfd.readouterr().err
    assert "1 hallucinated row without a factual summary of the same note: id r3" in said
    assert "1 hallucinated row whose note and factual summary do not fit --max_length: id r5" in said
    assert not any(row.model_summary.strip() in said for row in rows)


def test_a_summary_with_both_labels_is_on_neither_side(capfd):
    rows = rows_of_labels(
        ("Fever.", "Febrile.", "factual"),
        ("Fever.", "Has fever.", "factual"),
        ("Fever.", "Febrile.", "hallucinated"),
        ("Fever.", "No fever.", "hallucinated"),
    )
    pairs = find_pairs("x.csv", rows, encoder_for("chatml"), 256)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("Has fever.", "No fever.")]
    assert "whose summary another row of the same note calls factual: id r2" in capfd.readouterr().err
    with pytest.raises(InputError, match="no pair"):
        find_pairs("x.csv", rows[:1] + rows[2:3], encoder_for("chatml"), 256)


# ------------------------------------------------------------------------------- the script


def run_script(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["sft_dataset.py", *map(str, arguments)])
    sft_dataset.main()


def test_the_prompt_is_the_adapters_own(adapters, csv_files, tmp_path, monkeypatch, capfd):
    adapter = adapters(chat="llama3")
    target = tmp_path / "pairs.jsonl"
    arguments = ["--train_csv", csv_files[0], "--val_csv", csv_files[1], "--model_path", adapter]
    run_script(monkeypatch, *arguments, "--export_preferences", target)
    said = capfd.readouterr().err
    assert 'tokenizer.eos_token = "<|eot|>"' in said and "other tokens" not in said
    (pair,) = [json.loads(line) for line in target.read_text().splitlines()]
    prompt = json.loads((adapter / "sft_config.json").read_text())["prompt"]
    assert "<s>" + pair["prompt"] == prompt["prefix"] + NOTES[0][0] + prompt["suffix"]
    assert pair["chosen_ids"][-1] == prompt["end_token_id"]

    for wrong in ("--sentence_numbering=on", "--max_length=512", "--instruction=Sum up.", "--model_name=x"):
        with pytest.raises(InputError, match=rf"{wrong.partition('=')[0]} cannot be combined"):
            run_script(monkeypatch, *arguments, wrong)
    run_script(monkeypatch, *arguments)
    (adapter / "sft_config.json").rename(tmp_path / "sft_config.json")
    try:
        with pytest.raises(
            InputError, match=r"--model_path .*no sft_config\.json[\s\S]*\nname the final_model"
        ):
            run_script(monkeypatch, *arguments)
    finally:
        (tmp_path / "sft_config.json").rename(adapter / "sft_config.json")


def test_rows_with_citations_are_not_for_an_adapter_without(adapters, tmp_path, monkeypatch):
    rows = [
        (f"r{i}", note, f"{summary} [Evidence: S1; Conf: 0.95]", "factual", "")
        for i, (note, summary) in enumerate(NOTES)
    ]
    path = write_csv(tmp_path / "cited.csv", rows)
    with pytest.raises(InputError, match="most summaries cite sentences, unlike the adapter's"):
        run_script(
            monkeypatch, "--train_csv", path, "--val_csv", path, "--model_path", adapters(chat="llama3")
        )


def test_no_pair_is_an_error(csv_files, model_folder, tmp_path, monkeypatch, capfd):
    target = tmp_path / "pairs.jsonl"
    arguments = ["--train_csv", csv_files[1], "--val_csv", csv_files[1], "--model_name", model_folder()]
    with pytest.raises(InputError, match=r"no pair.*0 hallucinated rows"):
        run_script(monkeypatch, *arguments, "--export_preferences", target)
    assert capfd.readouterr().out.strip() == ""
    assert not target.exists()
