"""Examples token by token, what is shortened or refused, batches, and the warnings about a data set."""

import csv
import random

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    CHAT_TEMPLATES,
    NOTES,
    CountingTokenizer,
    encoder_for,
    many_rows,
    rows_of,
    tiny_model,
    tiny_tokenizer,
    write_csv,
)

from sft.cli import InputError
from sft.data.dataset import (
    IGNORE_INDEX,
    SFTCollator,
    SFTDataset,
    create_sft_dataloaders,
    encode_example,
    load_datasets,
    packed_batch,
    padded_batch,
    read_data,
)
from sft.data.report import log_data_warnings
from sft.data.rows import Row, read_rows
from sft.grounding.sentences import SENTENCE_VERSION
from sft.options import DataOptions


def options_for(train_csv, val_csv=None, **options) -> DataOptions:
    return DataOptions(train_csv=str(train_csv), val_csv=str(val_csv or train_csv), **options)


# ------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("chat", CHAT_TEMPLATES)
def test_every_token_of_an_example(chat):
    """Prompt and labels, token by token, against the tokenizer alone."""
    tokenizer = tiny_tokenizer(chat)
    note, summary = NOTES[0]
    example = SFTDataset(rows_of(NOTES[:1]), encoder_for(chat), 512).examples[0]
    instruction = "Summarize the clinical note. State only what the note says."
    before = {
        "chatml": f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n",
        "llama3": f"<s><|header|>system\n\n{instruction}<|eot|><|header|>user\n\n",
        "mistral": f"<s>[INST] {instruction}\n\n",
        "none": f"<s>### Instruction:\n{instruction}\n\n### Clinical note:\n",
    }[chat]
    after = {
        "chatml": "<|im_end|>\n<|im_start|>assistant\n",
        "llama3": "<|eot|><|header|>assistant\n\n",
        "mistral": " [/INST]",
        "none": "\n\n### Summary:\n",
    }[chat]
    end = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "mistral": "</s>", "none": "</s>"}[chat]

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    prompt = ids(before) + ids(note) + ids(after)
    target = [*ids(summary), tokenizer.convert_tokens_to_ids(end)]
    assert example.input_ids == prompt + target
    assert example.labels == [IGNORE_INDEX] * len(prompt) + target
    assert example.input_ids.count(tokenizer.bos_token_id) == (0 if chat == "chatml" else 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(48, 200),
    st.sampled_from(list(CHAT_TEMPLATES)),
)
def test_examples_fit_and_keep_their_summaries(sizes, max_length, chat):
    encoder = encoder_for(chat)
    rows = rows_of([("Fever and cough. " * n, "No chest pain. " * m) for n, m in sizes])
    dataset = SFTDataset(rows, encoder, max_length)
    used = {example.row_id for example in dataset.examples}
    refused = {row_id for row_id, _ in dataset.refused}
    assert used | refused == {row.id for row in rows}
    assert not used & refused
    for example in dataset.examples:
        row = next(row for row in rows if row.id == example.row_id)
        assert len(example.input_ids) <= max_length
        assert example.n_target_tokens > 1
        assert example.input_ids[example.n_prompt :] == [
            *encoder.encode_texts([row.model_summary])[0],
            encoder.template.end_token_id,
        ]
        assert example.input_ids[: len(encoder.prefix_ids)] == encoder.prefix_ids
        assert example.input_ids[: example.n_prompt][-len(encoder.suffix_ids) :] == encoder.suffix_ids
    for row_id, needed in dataset.refused:
        alone = [row for row in rows if row.id == row_id]
        assert not SFTDataset(alone, encoder, needed).refused
        assert SFTDataset(alone, encoder, needed - 1).refused


def test_a_row_that_would_lose_a_cited_sentence_is_refused():
    encoder = encoder_for("none", number_sentences=True)
    note = "Fever and cough. " * 30
    rows = [
        Row(2, "early", note, "Fever. [Evidence: S1; Conf: 0.95]", "factual"),
        Row(3, "late", note, "Cough. [Evidence: S30; Conf: 0.95]", "factual"),
    ]
    dataset = SFTDataset(rows, encoder, 200)
    assert dataset.shortened == ["early"]
    assert [row_id for row_id, _ in dataset.refused] == ["late"]
    assert not SFTDataset(rows[1:], encoder, dataset.refused[0][1]).refused


def test_a_dataset_holds_what_each_row_gives_alone():
    rows = many_rows(1203)
    encoder = encoder_for("chatml")
    dataset = SFTDataset(rows, encoder, 160)
    examples = iter(dataset.examples)
    refused = dict(dataset.refused)
    for row, lengths in zip(rows, dataset.lengths.tolist()):
        note, summary = encoder.encode_texts([row.clinical_note, row.model_summary])
        assert lengths == [len(note), len(summary)]
        alone = encode_example(row, note, summary, encoder, 160)
        if isinstance(alone, int):
            assert refused[row.id] == alone
        else:
            example = next(examples)
            assert (example.row_id, example.input_ids, example.labels, example.shortened) == (
                *(row.id, alone.input_ids, alone.labels, alone.shortened),
            )
            assert example.tokens.dtype == np.int32


def work(n: int, max_length: int, numbered: bool = False) -> tuple[int, int, int]:
    """(calls, characters encoded, characters of the texts) of tokenizing n rows."""
    rows = many_rows(n)
    encoder = encoder_for("none", number_sentences=numbered)
    encoder.tokenizer = CountingTokenizer(encoder.tokenizer)
    SFTDataset(rows, encoder, max_length)
    size = sum(len(encoder.template.render_note(row.clinical_note)) + len(row.model_summary) for row in rows)
    return encoder.tokenizer.calls, encoder.tokenizer.characters, size


@pytest.mark.parametrize("n", [500, 1000, 5000])
def test_every_text_is_encoded_once_and_in_batches(n):
    calls, characters, size = work(n, 2048)
    n_batches = -(-n // 1000)
    assert calls == 2 * n_batches
    assert characters == size


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("n", [100, 400, 1600])
def test_shortening_costs_a_few_encodings(n, numbered):
    calls, characters, size = work(n, 160, numbered)
    assert calls < 4 * n
    assert characters < 4 * size


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no {SHARED_DATA}")
def test_real_conversations():
    path = SHARED_DATA / "mts_dialog" / "train.csv"
    with open(path, newline="", encoding="utf-8") as file:
        n = sum(1 for _ in csv.DictReader(file))
    rows = read_rows(path)
    dataset = SFTDataset(rows, encoder_for("chatml"), 512)
    assert len(rows) == n
    assert len(dataset) + len(dataset.refused) == n
    assert all(len(example.input_ids) <= 512 for example in dataset.examples)


# ------------------------------------------------------------------------------- both files


def test_numbering_follows_the_citations(tmp_path):
    cited = [(1, "Fever. Cough.", "Fever. [Evidence: S1; Conf: 0.95]", "factual", "")]
    plain = [(1, "Fever. Cough.", "Fever.", "factual", "")]
    for rows, numbering, numbered in (
        (cited, "auto", True),
        (plain, "auto", False),
        (plain, "on", True),
        (cited, "off", False),
        (cited, "v1", True),
    ):
        options = options_for(write_csv(tmp_path / "a.csv", rows), sentence_numbering=numbering)
        train, _ = load_datasets(read_data(options), tiny_tokenizer(), options)
        assert train.encoder.template.number_sentences is numbered
        prompt = train.encoder.tokenizer.decode(train.examples[0].input_ids)
        assert ("S1: Fever.\nS2: Cough." in prompt) is numbered
        assert train.encoder.template.sentence_version == (1 if numbering == "v1" else SENTENCE_VERSION)


def test_files_without_factual_rows_are_refused(csv_files, tmp_path):
    path = write_csv(tmp_path / "bad.csv", [(1, "Fever.", "Cough.", "hallucinated", "")])
    for files in ((path, csv_files[1]), (csv_files[0], path)):
        with pytest.raises(InputError, match=r"bad.csv: no row is labeled factual \(1 row\)"):
            read_data(options_for(*files))


def test_a_file_of_which_no_row_fits_is_refused(csv_files):
    options = options_for(*csv_files, max_length=32)
    with pytest.raises(InputError, match=r"no row fits --max_length 32") as error:
        load_datasets(read_data(options), tiny_tokenizer(), options)
    needed = int(error.value.fix.split()[1])
    options.max_length = needed
    train, _ = load_datasets(read_data(options), tiny_tokenizer(), options)
    assert not train.refused


# ------------------------------------------------------------------------------- batches


def test_padding_is_masked_by_length_not_by_token():
    items = [{"input_ids": [5, 9, 9], "labels": [-100, 9, 9]}, {"input_ids": [9], "labels": [9]}]
    batch = SFTCollator(pad_token_id=9)(items)
    assert batch["input_ids"].tolist() == [[5, 9, 9], [9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 9, 9], [9, -100, -100]]
    assert all(values.dtype == torch.long for values in batch.values())


def test_packed_and_padded_batches_ask_for_the_same_targets():
    dataset = SFTDataset(rows_of(NOTES), encoder_for("chatml"), 512)
    packed = packed_batch(dataset.examples)
    padded = padded_batch(dataset.examples, 0)
    expected = [token for example in dataset.examples for token in example.input_ids[example.n_prompt :]]
    assert packed.targets.tolist() == expected
    assert padded.targets.tolist() == expected

    ids = packed.inputs["input_ids"][0]
    assert ids[packed.inputs["logits_to_keep"] + 1].tolist() == expected
    assert sum(packed.inputs["example_lengths"]) == len(ids)
    assert packed.target_positions is None

    assert padded.inputs["input_ids"].flatten()[padded.target_positions + 1].tolist() == expected
    collated = SFTCollator(0)([dataset[i] for i in range(len(dataset))])
    for name, values in padded.inputs.items():
        assert torch.equal(values, collated[name])


def test_dataloaders_and_the_hugging_face_trainer(csv_files, tmp_path):
    """Our data in the Trainer of transformers: its loss is what F.cross_entropy gives on the same batch."""
    from transformers import Trainer, TrainingArguments

    tokenizer = tiny_tokenizer()
    model = tiny_model("llama")
    train_loader, val_loader = create_sft_dataloaders(*csv_files, tokenizer, batch_size=4)
    assert [len(batch["input_ids"]) for batch in train_loader] == [4, 4, 3]
    batch = next(iter(val_loader))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to="none", per_device_eval_batch_size=4, use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_loader.dataset,
        eval_dataset=val_loader.dataset,
        data_collator=val_loader.collate_fn,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    trainer.train()


# ------------------------------------------------------------------------------- warnings


def test_warnings_read_naturally_for_one_row(capfd):
    rows = [
        Row(2, "a", "One. Two.", "One. [Evidence: S1; Conf: 0.95]", "factual"),
        Row(3, "b", "One. Two.", "One. [Evidence: S1; Conf: 0.95]", "hallucinated"),
        Row(4, "c", "One. Two.", "Two. [Evidence: S9; Conf: 0.95]", "factual"),
    ]
    dataset = SFTDataset(rows[:1], encoder_for("none", number_sentences=True), 512)
    log_data_warnings((rows, rows[:1]), (dataset, dataset), options_for("x.csv", "y.csv"))
    assert capfd.readouterr().err.splitlines() == [
        "warning: x.csv: 2 rows whose note and summary are labeled both factual and hallucinated: ids a, b",
        "warning: x.csv: 1 row with the note and summary of an earlier row: row 3",
        "warning: 1 validation row with the note of a training row, or nearly, so validation loss will look"
        " better than it is: a (100% like a); remove them from one file",
    ]


def test_warnings_about_many_rows(capfd):
    dice = random.Random(0)
    notes = [(f"{i}: " + "Fever and cough. " * 40, "No chest pain. ") for i in range(7)]
    too_long = [(f"{i}. Fever.", "Feverish. " * dice.randint(200, 300)) for i in range(2)]
    rows = rows_of([*notes, *too_long, *notes[:2]])
    dataset = SFTDataset(rows, encoder_for("none"), 160)
    whole = f"--max_length {max(dataset.whole_lengths)} would hold all rows whole"
    log_data_warnings((rows, []), (dataset, SFTDataset([], dataset.encoder, 160)), options_for("x.csv"))
    assert capfd.readouterr().err.splitlines() == [
        "warning: x.csv: 9 notes shortened to fit --max_length 160, which cuts 69.4% of the text of all notes;"
        f" {whole}: ids r0, r1, r2, r3, r4 and 4 more",
        "warning: x.csv: 2 rows left out, with 0.4% of the text of all notes: the summary and any sentences"
        " it cites do not fit in"
        f" --max_length 160; {whole}: ids r7, r8",
        "warning: x.csv: 2 rows with the note and summary of an earlier row: rows 11, 12",
        "warning: x.csv: one summary stands under 7 of 9 different notes: ids r9, r10, r2, r3, r4 and 2 more",
    ]


def test_warnings_come_from_the_main_process_alone(capfd, monkeypatch):
    rows = rows_of([NOTES[0], NOTES[0]])
    dataset = SFTDataset(rows, encoder_for("none"), 512)
    monkeypatch.setenv("RANK", "1")
    log_data_warnings((rows, rows), (dataset, dataset), options_for("x.csv"))
    assert capfd.readouterr().err == ""
