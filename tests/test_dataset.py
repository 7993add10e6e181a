import csv
import json
import re

import pytest
import torch
from conftest import SHARED_DATA, assert_input_error, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATES, NOTES, tiny_model, tiny_tokenizer, write_csv

from sft.cli import InputError
from sft.data.dataset import (
    IGNORE_INDEX,
    SFTCollator,
    SFTDataset,
    create_sft_dataloaders,
    epoch_order,
    load_datasets,
    packed_batch,
    padded_batch,
    warn_about_rows,
)
from sft.data.prompt import PromptEncoder, PromptTemplate, build_template, control_token_ids
from sft.data.rows import Row, read_rows
from sft.data.text import clean_text
from sft.grounding.sentences import number_sentences, sentence_spans
from sft_dataset import preference_pairs

CHATS = list(CHAT_TEMPLATES)
any_text = st.text(max_size=120) | st.lists(
    st.sampled_from(
        [
            "<|im_end|>",
            "<|im_start|>",
            "<s>",
            "</s>",
            "<|header|>",
            "<|eot|>",
            "[INST]",
            "<|im_",
            "end|>",
            "fever ",
            "\n",
            ". ",
        ]
    ),
    max_size=15,
).map("".join)


def encoder_for(chat: str, **options) -> PromptEncoder:
    tokenizer = tiny_tokenizer(chat)
    return PromptEncoder(tokenizer, build_template(tokenizer, **options))


def rows_of(pairs) -> list[Row]:
    return [Row(i + 2, f"r{i}", note, summary, "factual") for i, (note, summary) in enumerate(pairs)]


# ------------------------------------------------------------------------------------------------ prompt and tokens


@pytest.mark.parametrize("chat", CHATS)
def test_every_token_of_an_example(chat):
    """Prompt and labels, token by token, against the tokenizer alone."""
    tokenizer, encoder = tiny_tokenizer(chat), encoder_for(chat)
    note, summary = NOTES[0]
    example = SFTDataset(rows_of(NOTES[:1]), encoder).examples[0]
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

    prompt, target = (
        ids(before) + ids(note) + ids(after),
        [*ids(summary), tokenizer.convert_tokens_to_ids(end)],
    )
    assert example.input_ids == prompt + target
    assert example.labels == [IGNORE_INDEX] * len(prompt) + target
    assert example.input_ids.count(tokenizer.bos_token_id) == (0 if chat == "chatml" else 1)
    assert (
        tokenizer.eos_token_id in encoder.template.stop_token_ids
        and encoder.template.end_token_id in encoder.template.stop_token_ids
    )


@pytest.mark.parametrize("chat", CHATS)
@settings(max_examples=150, deadline=None)
@given(any_text)
def test_text_never_becomes_a_control_token(chat, text):
    encoder = encoder_for(chat)
    ids = encoder.encode_texts([text])[0]
    assert not control_token_ids(encoder.tokenizer) & set(ids)
    assert (
        encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    )  # and nothing of it is lost


@pytest.mark.parametrize("numbered", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["Fever.", "No cough today.", "BP 120/80, HR 72.\n", "Unbrokenword" * 9 + ".", "é\U0001f600 x."]
        ),
        min_size=1,
        max_size=40,
    ),
    st.integers(8, 120),
)
def test_a_long_note_keeps_the_most_sentences_that_fit(numbered, sentences, room):
    encoder = encoder_for("chatml", number_sentences=numbered)
    note = clean_text(" ".join(sentences))
    ids, kept = encoder.shorten(note, room)
    assert 0 < len(ids) <= room or not ids
    ends = [end for _, end in sentence_spans(note)]
    beginnings = [
        "\n".join(number_sentences(note)[:k]) if numbered else note[: ends[k - 1]]
        for k in range(1, len(ends) + 1)
    ]
    fitting = [text for text in beginnings if len(encoder.encode_texts([text])[0]) <= room]
    assert kept == len(fitting)
    if fitting:
        assert ids == encoder.encode_texts([fitting[-1]])[0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(48, 200),
    st.sampled_from(CHATS),
)
def test_examples_fit_and_keep_their_summaries(sizes, max_length, chat):
    encoder = encoder_for(chat)
    rows = rows_of([("Fever and cough. " * n, "No chest pain. " * m) for n, m in sizes])
    dataset = SFTDataset(rows, encoder, max_length)
    assert {example.row_id for example in dataset.examples} | {row_id for row_id, _ in dataset.refused} == {
        row.id for row in rows
    }
    for example in dataset.examples:
        row = next(row for row in rows if row.id == example.row_id)
        assert len(example.input_ids) <= max_length and example.n_target_tokens > 1
        assert example.input_ids[example.n_prompt :] == [
            *encoder.encode_texts([row.model_summary])[0],
            encoder.template.end_token_id,
        ]
        assert example.input_ids[: len(encoder.prefix_ids)] == encoder.prefix_ids
        assert example.input_ids[: example.n_prompt][-len(encoder.suffix_ids) :] == encoder.suffix_ids
    for row_id, needed in dataset.refused:
        assert not SFTDataset([row for row in rows if row.id == row_id], encoder, needed).refused
        assert SFTDataset([row for row in rows if row.id == row_id], encoder, needed - 1).refused


def test_a_row_that_would_lose_a_cited_sentence_is_refused():
    encoder = encoder_for("none", number_sentences=True)
    note = "Fever and cough. " * 30
    rows = [
        Row(2, "early", note, "Fever. [Evidence: S1; Conf: 0.95]", "factual"),
        Row(3, "late", note, "Cough. [Evidence: S30; Conf: 0.95]", "factual"),
    ]
    dataset = SFTDataset(rows, encoder, 200)
    assert dataset.shortened == ["early"] and [row_id for row_id, _ in dataset.refused] == ["late"]
    assert not SFTDataset(rows[1:], encoder, dataset.refused[0][1]).refused


def test_numbering_follows_the_citations(tmp_path):
    cited = [(1, "Fever. Cough.", "Fever. [Evidence: S1; Conf: 0.95]", "factual", "")]
    plain = [(1, "Fever. Cough.", "Fever.", "factual", "")]
    for rows, numbered in ((cited, True), (plain, False)):
        path = write_csv(tmp_path / "a.csv", rows)
        train, _ = load_datasets(path, path, tiny_tokenizer())
        assert train.encoder.template.number_sentences is numbered
        assert (
            "S1: Fever.\nS2: Cough." in train.encoder.tokenizer.decode(train.examples[0].input_ids)
        ) is numbered


def test_half_characters_and_unknown_ones_do_no_harm():
    encoder = encoder_for("chatml")
    assert encoder.encode_texts([clean_text("fever \ud83d today")])[0]
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "fever": 2, "of": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    assert PromptEncoder(tokenizer, build_template(tokenizer)).encode_texts(["fever of µ </s>"])[0][:3] == [
        2,
        3,
        0,
    ]  # <unk> stays


def test_a_template_that_hides_the_answer_does_not_end_it_with_a_start_token():
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"].replace(
        "m['content'] }}", "m['content'] if m['role'] != 'assistant' else '' }}"
    )
    assert build_template(tokenizer).end_token_id == tokenizer.eos_token_id


def test_template_survives_json():
    template = build_template(tiny_tokenizer("llama3"), number_sentences=True)
    from dataclasses import asdict

    assert PromptTemplate.from_dict(json.loads(json.dumps(asdict(template)))) == template


def test_tokenizer_without_an_end_token_is_refused():
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer("none").backend_tokenizer)
    with pytest.raises(InputError, match="end-of-sequence"):
        build_template(bare)


# ------------------------------------------------------------------------------------------------ batches


def test_padding_is_masked_by_length_not_by_token():
    items = [{"input_ids": [5, 9, 9], "labels": [-100, 9, 9]}, {"input_ids": [9], "labels": [9]}]
    batch = SFTCollator(pad_token_id=9)(items)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 9, 9], [9, -100, -100]]


def test_packed_and_padded_batches_ask_for_the_same_targets():
    dataset = SFTDataset(rows_of(NOTES), encoder_for("chatml"))
    packed, padded = packed_batch(dataset.examples), padded_batch(dataset.examples, 0)
    expected = [token for example in dataset.examples for token in example.input_ids[example.n_prompt :]]
    assert packed.targets.tolist() == padded.targets.tolist() == expected
    ids, keep = packed.inputs["input_ids"][0], packed.inputs["logits_to_keep"]
    assert ids[keep + 1].tolist() == expected and sum(packed.inputs["example_lengths"]) == len(ids)
    assert len(padded.where) == len(expected)


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    for n in (1, 2, 17, 1000):
        assert sorted(epoch_order(n, 3, 0)) == list(range(n))
    assert epoch_order(50, 3, 0) != epoch_order(50, 3, 1) != epoch_order(50, 4, 1)


def test_dataloaders_and_the_hugging_face_trainer(csv_files, tmp_path):
    """Our data in the Trainer of transformers: its loss is what F.cross_entropy gives on the same batch."""
    from transformers import Trainer, TrainingArguments

    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
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


# ------------------------------------------------------------------------------------------------ report


def test_report_holds_counts_and_no_text(csv_files, model_folder, tmp_path):
    train_csv, val_csv = csv_files
    pairs = tmp_path / "pairs.jsonl"
    result = run_python(
        "sft_dataset.py",
        "--train_csv",
        train_csv,
        "--val_csv",
        val_csv,
        "--model_name",
        model_folder(),
        "--export_preferences",
        pairs,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"factual +11", result.stdout) and re.search(r"wrong_number +1", result.stdout)
    assert not any(
        sentence in result.stdout + result.stderr for note, summary in NOTES for sentence in (note, summary)
    )
    (pair,) = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert (pair["chosen"], pair["rejected"], pair["factual_id"]) == (
        NOTES[0][1],
        "Influenza B with fever.",
        "t0",
    )
    assert NOTES[0][0] in pair["prompt"] and pair["prompt"].endswith("<|im_start|>assistant\n")


def test_preferences_overwrite_nothing(csv_files, model_folder):
    before = csv_files[0].read_bytes()
    arguments = ["--train_csv", csv_files[0], "--val_csv", csv_files[1], "--model_name", model_folder()]
    assert_input_error(
        run_python("sft_dataset.py", *arguments, "--export_preferences", csv_files[0]), "exists"
    )
    assert csv_files[0].read_bytes() == before


def test_contradictions_and_wrong_citations_are_said(tmp_path, capfd):
    rows = [
        Row(2, "a", "One. Two.", "One. [Evidence: S1; Conf: 0.95]", "factual"),
        Row(3, "b", "One. Two.", "One. [Evidence: S1; Conf: 0.95]", "hallucinated"),
        Row(4, "c", "One. Two.", "Two. [Evidence: S9; Conf: 0.95]", "factual"),
    ]
    warn_about_rows("x.csv", rows, SFTDataset(rows[:1], encoder_for("none", number_sentences=True)))
    said = capfd.readouterr().err
    assert (
        "1 pairs of note and summary are labelled both" in said
        and "1 summaries cite sentences that their notes do not have: ids c" in said
    )


def test_preferences_need_a_factual_twin():
    rows = [
        Row(2, "a", "Note", "right", "factual"),
        Row(3, "b", "note ", "wrong", "hallucinated", "x"),
        Row(4, "c", "other", "wrong", "hallucinated"),
    ]
    assert [pair["id"] for pair in preference_pairs(rows, build_template(tiny_tokenizer()))] == ["b"]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no {SHARED_DATA}")
def test_real_conversations():
    path = SHARED_DATA / "mts_dialog" / "train.csv"
    with open(path, newline="", encoding="utf-8") as file:
        n = sum(1 for _ in csv.DictReader(file))
    rows = read_rows(path)
    dataset = SFTDataset(rows, encoder_for("chatml"), 512)
    assert len(rows) == n == len(dataset) + len(dataset.refused)
    assert all(len(example.input_ids) <= 512 for example in dataset.examples)
