"""The tokens kept on disk: read only if everything they depend on is the same, whole or not at all."""

import copy
import os
import random
import shutil
import subprocess
import sys

import numpy as np
from conftest import ROOT
from tiny import CountingTokenizer, encoder_for, many_rows, tiny_tokenizer

from sft.data.dataset import SFTDataset, load_datasets, read_data
from sft.data.prompt import INSTRUCTION, PromptEncoder, build_template
from sft.data.report import log_data_warnings
from sft.options import DataOptions


def contents(dataset: SFTDataset) -> list:
    return [(e.row_id, e.input_ids, e.labels, e.n_prompt, e.shortened) for e in dataset.examples]


def is_same(one: SFTDataset, other: SFTDataset) -> bool:
    same_examples = contents(one) == contents(other)
    same_lengths = np.array_equal(one.lengths, other.lengths)
    return same_examples and same_lengths and one.refused == other.refused


def test_a_second_start_reads_the_same_tokens_and_encodes_nothing(csv_files, tmp_path, capfd):
    def start(cache_dir, max_length=100):
        """Both datasets, what was logged, and how many characters the tokenizer was given."""
        options = DataOptions(train_csv=str(csv_files[0]), val_csv=str(csv_files[1]), max_length=max_length)
        rows = read_data(options)
        tokenizer = CountingTokenizer(tiny_tokenizer())
        datasets = load_datasets(rows, tokenizer, options, cache_dir)
        log_data_warnings(rows, datasets, options)
        return datasets, capfd.readouterr().err, tokenizer.characters

    cache = tmp_path / "out" / "token_cache"
    expected, logged, n_characters = start(None)
    assert "shortened" in logged
    assert all(map(is_same, expected, start(cache)[0]))
    assert {path.name for path in cache.iterdir()} == {"train.tokens", "validation.tokens"}
    assert all(os.stat(path).st_mode & 0o077 == 0 for path in (cache, *cache.iterdir()))

    datasets, logged_again, n_characters_again = start(cache)
    assert all(map(is_same, expected, datasets))
    assert logged_again == logged
    # Only the template around the notes is tokenized again
    template_alone = CountingTokenizer(tiny_tokenizer())
    PromptEncoder(template_alone, build_template(template_alone))
    assert n_characters_again == template_alone.characters < n_characters

    # Another max_length is another key
    assert not is_same(start(cache, max_length=200)[0][0], expected[0])
    assert is_same(start(cache)[0][0], expected[0])


def test_rows_tokenizer_and_prompt_are_part_of_the_key(tmp_path):
    rows = many_rows(20)
    cache = tmp_path / "a.tokens"
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
        first = SFTDataset(rows, encoder_for("none"), 512, cache)
        expected = SFTDataset(other_rows, encoder, 512)
        assert not is_same(first, expected)
        assert is_same(SFTDataset(other_rows, encoder, 512, cache), expected)


def test_the_code_that_makes_the_tokens_is_part_of_the_key(tmp_path):
    shutil.copytree(ROOT / "sft", tmp_path / "sft", ignore=shutil.ignore_patterns("__pycache__"))
    names = ["data/dataset.py", "data/prompt.py", "grounding/sentences.py", "grounding/citations.py"]
    program = f"""
from tiny import NOTES, encoder_for, rows_of
from sft.data.token_cache import cache_key

def print_key():
    print(cache_key(rows_of(NOTES), encoder_for("none"), 512))

print_key()
print_key()
for name in {names}:
    with open("sft/" + name, "a") as file:
        file.write("# changed")
    print_key()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")])}
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, *others = result.stdout.split()
    assert others[0] == first
    assert len({first, *others}) == 1 + len(names)


def test_a_damaged_cache_is_built_again(tmp_path):
    rows = many_rows(30)
    encoder = encoder_for("none")
    cache = tmp_path / "a.tokens"
    expected = SFTDataset(rows, encoder, 200, cache)
    intact = cache.read_bytes()
    dice = random.Random(0)
    damages = [b"", intact[:-1], intact[: len(intact) // 2], intact + b"\0", b"\0" * len(intact), intact[:40]]
    for position in [0, 33, *(dice.randrange(len(intact)) for _ in range(30))]:
        damages.append(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
    for damage in damages:
        cache.write_bytes(damage)
        (tmp_path / f".{cache.name}.half").write_bytes(damage)
        assert is_same(SFTDataset(rows, encoder, 200, cache), expected)
        assert cache.read_bytes() == intact
        assert list(tmp_path.iterdir()) == [cache]


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert len(SFTDataset(many_rows(3), encoder_for("none"), 512, tmp_path / "file" / "a.tokens")) == 3
    assert "could not write the token cache" in capfd.readouterr().err


def test_a_file_of_which_every_row_is_refused(tmp_path):
    for _ in range(2):
        dataset = SFTDataset(many_rows(3), encoder_for("none"), 40, tmp_path / "a.tokens")
        assert len(dataset) == 0
        assert len(dataset.refused) == 3
