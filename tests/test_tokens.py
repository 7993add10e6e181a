"""Tokens at scale: the compact store, its cache on disk, and work that grows with the rows alone."""

import copy
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset import any_text, encoder_for, rows_of
from tiny import NOTES, tiny_tokenizer

import sft.data.dataset as dataset_module
from sft.data.dataset import SFTDataset, encode_example, load_datasets, warn_about_leaks, warn_about_rows
from sft.data.prompt import INSTRUCTION, PromptEncoder, build_template
from sft.data.rows import read_rows
from sft.data.text import clean_text
from sft_dataset import describe_rows


def many_rows(n: int):
    dice = random.Random(n)
    return rows_of(
        (
            f"Seen {i}. " + " ".join(dice.choice(NOTES)[0] for _ in range(dice.randint(1, 9))),
            dice.choice(NOTES)[1],
        )
        for i in range(n)
    )


def same(one: SFTDataset, other: SFTDataset) -> bool:
    examples = [
        [(e.row_id, e.input_ids, e.labels, e.n_prompt, e.shortened) for e in dataset.examples]
        for dataset in (one, other)
    ]
    return (
        examples[0] == examples[1]
        and one.refused == other.refused
        and np.array_equal(one.lengths, other.lengths)
    )


@pytest.mark.parametrize("max_length", [64, 160, 512])
def test_the_store_holds_what_each_row_gives_alone(max_length):
    rows, encoder = many_rows(1203), encoder_for("chatml")
    dataset, left = SFTDataset(rows, encoder, max_length), []
    for row, lengths in zip(rows, dataset.lengths.tolist()):
        note, summary = (
            encoder.encode_texts([row.clinical_note])[0],
            encoder.encode_texts([row.model_summary])[0],
        )
        assert lengths == [len(note), len(summary)]
        result = encode_example(row, note, summary, encoder, max_length)
        left.append((row.id, result) if isinstance(result, int) else (row.id, *result))
    assert dataset.refused == [one for one in left if len(one) == 2]
    assert [(e.row_id, e.input_ids, e.n_prompt, e.shortened) for e in dataset.examples] == [
        one for one in left if len(one) == 4
    ]
    assert all(
        e.tokens.dtype == np.int32 and e.n_tokens == len(e.labels) <= max_length for e in dataset.examples
    )


class Counting:
    """A tokenizer that counts its calls and the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls, self.characters = tokenizer, 0, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        self.calls, self.characters = (
            self.calls + 1,
            self.characters + sum(map(len, [texts] if isinstance(texts, str) else texts)),
        )
        return self.tokenizer(texts, **options)


def work(n: int, max_length: int, numbered: bool = False) -> tuple[int, int, int]:
    """(calls, characters encoded, characters of the texts) of tokenising n rows and reporting on them."""
    rows, encoder = many_rows(n), encoder_for("none", number_sentences=numbered)
    encoder.tokenizer = Counting(encoder.tokenizer)
    describe_rows("x", rows, SFTDataset(rows, encoder, max_length))
    size = sum(len(encoder.template.render_note(row.clinical_note)) + len(row.model_summary) for row in rows)
    return encoder.tokenizer.calls, encoder.tokenizer.characters, size


def test_every_text_is_encoded_once_and_in_batches():
    for n in (500, 1000, 5000):
        calls, characters, size = work(n, 2048)
        assert calls == 2 * -(-n // 1000) and characters == size


@pytest.mark.parametrize("numbered", [False, True])
def test_shortening_costs_a_few_encodings(numbered):
    for n in (100, 400, 1600):
        calls, characters, size = work(n, 160, numbered)
        assert calls < 4 * n and characters < 4 * size


@settings(max_examples=60, deadline=None)
@given(
    st.lists(any_text, min_size=1, max_size=12),
    st.integers(8, 80),
    st.sampled_from(["chatml", "llama3", "mistral"]),
    st.booleans(),
)
def test_shortening_with_offsets_is_shortening_without(texts, room, chat, numbered):
    encoder, note = encoder_for(chat, number_sentences=numbered), clean_text(". ".join(texts))
    with_offsets = encoder.shorten(note, room)
    encoder._estimate = lambda text, ends, room: 0  # as for a slow tokenizer
    assert encoder.shorten(note, room) == with_offsets


# ------------------------------------------------------------------------------------------------ cache


def test_a_second_start_reads_the_same_tokens_and_encodes_nothing(csv_files, tmp_path, monkeypatch, capfd):
    def start(cache_dir, max_length=100):
        rows = tuple(map(read_rows, csv_files))
        datasets = load_datasets(
            *csv_files, tiny_tokenizer(), rows=rows, cache_dir=cache_dir, max_length=max_length
        )
        for path, part, dataset in zip(csv_files, rows, datasets):
            warn_about_rows(path, part, dataset)
        warn_about_leaks(*rows)
        return datasets, capfd.readouterr().err

    cache = tmp_path / "out" / "token_cache"
    without, said = start(None)
    assert "shortened" in said
    assert all(map(same, without, start(cache)[0]))
    assert {path.name for path in cache.iterdir()} == {"train.tokens", "validation.tokens"}
    assert all(os.stat(path).st_mode & 0o077 == 0 for path in (cache, *cache.iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "tokenize", lambda *_: pytest.fail("tokenised again"))
        datasets, said_again = start(cache)
        assert all(map(same, without, datasets)) and said_again == said
    assert not same(start(cache, max_length=200)[0][0], without[0])  # another max_length is another key
    assert same(start(cache)[0][0], without[0])


def test_rows_tokenizer_and_prompt_are_part_of_the_key(tmp_path):
    rows, cache = many_rows(20), tmp_path / "a.tokens"
    other_tokenizer = copy.deepcopy(tiny_tokenizer("none"))
    other_tokenizer.backend_tokenizer.add_tokens(["fever"])
    others = [
        (rows, PromptEncoder(other_tokenizer, build_template(other_tokenizer))),
        (rows, encoder_for("none", number_sentences=True, instruction=INSTRUCTION)),
        (many_rows(21)[:20], encoder_for("none")),
        (rows, encoder_for("none", number_sentences=True)),
        (rows, encoder_for("none", instruction="Be brief.")),
        (rows, encoder_for("llama3")),
    ]
    for other_rows, encoder in others:
        SFTDataset(rows, encoder_for("none"), cache=cache)
        expected = SFTDataset(other_rows, encoder)
        assert same(SFTDataset(other_rows, encoder, cache=cache), expected) and not same(
            SFTDataset(rows, encoder_for("none")), expected
        )


def test_a_damaged_cache_is_built_again(tmp_path):
    rows, encoder, cache = many_rows(30), encoder_for("none"), tmp_path / "a.tokens"
    expected = SFTDataset(rows, encoder, 200, cache)
    whole, dice = cache.read_bytes(), random.Random(0)
    damages = [b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0", b"\0" * len(whole), whole[:40]]
    for at in [0, 33, *(dice.randrange(len(whole)) for _ in range(30))]:
        damages.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for damage in damages:
        cache.write_bytes(damage)
        (tmp_path / f".{cache.name}.half").write_bytes(damage)
        assert same(SFTDataset(rows, encoder, 200, cache), expected) and cache.read_bytes() == whole
        assert list(tmp_path.iterdir()) == [cache]


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert len(SFTDataset(many_rows(3), encoder_for("none"), cache=tmp_path / "file" / "a.tokens")) == 3
    assert "not kept" in capfd.readouterr().err


def test_an_empty_set_and_one_that_is_refused_whole(tmp_path):
    for _ in range(2):
        dataset = SFTDataset(many_rows(3), encoder_for("none"), 40, tmp_path / "a.tokens")
        assert len(dataset) == 0 and len(dataset.refused) == 3
