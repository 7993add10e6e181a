"""Checked rows -> examples in tokens -> batches. Knows no model.

torch and numpy are imported inside functions, so that input errors are instant."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.cli import InputError, plural
from sft.data.prompt import PromptEncoder, PromptTemplate, build_template, pad_token_id, set_chat_template
from sft.data.rows import Row, drop_stray_citations, factual_rows, name_rows, read_rows, split_rows
from sft.data.table import source_name
from sft.grounding.citations import cited_sentence_numbers, has_citation
from sft.grounding.sentences import SENTENCE_VERSION
from sft.options import (
    BUNDLED_TRAIN_FILE,
    BUNDLED_VALIDATION_FILE,
    DataOptions,
    TrainConfig,
    check_config,
    given_names,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

IGNORE_INDEX = -100  # the label of a token that carries no loss, as in torch's cross_entropy
MIN_NOTE_TOKENS = 8  # a row that leaves its note less room than this is refused
_ROWS_PER_CALL = 1000  # of the tokenizer


# ------------------------------------------------------------------------------- examples


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: prompt, summary and end token, of which the last two carry loss."""

    row_id: str  # the row's name in messages
    tokens: "np.ndarray"  # int32 (n_tokens,): a list takes nine times as much memory
    n_prompt: int  # the first n_prompt tokens carry no loss
    shortened: bool = False  # whether the note lost sentences

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_target_tokens(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def input_ids(self) -> list[int]:
        return self.tokens.tolist()

    @property
    def labels(self) -> list[int]:
        return [IGNORE_INDEX] * self.n_prompt + self.input_ids[self.n_prompt :]


def encode_example(
    row: Row, note_ids: list[int], summary_ids: list[int], encoder: PromptEncoder, max_length: int
) -> Example | int:
    """One row as at most `max_length` tokens, or the max_length that would hold it. `note_ids`,
    `summary_ids`: its whole note and its summary.

    The note alone is shortened, at a sentence boundary; the template, the summary and its end token never
    are. A row is refused if its summary leaves no room for a note, or cites a sentence that would be cut off.
    """
    import numpy as np

    n_without_note = encoder.n_template_tokens + len(summary_ids) + 1
    room = max_length - n_without_note
    shortened = len(note_ids) > room
    if shortened:
        if room < MIN_NOTE_TOKENS:
            return n_without_note + min(len(note_ids), MIN_NOTE_TOKENS)
        kept_ids, n_kept = encoder.shorten(row.clinical_note, room)
        if encoder.template.number_sentences and n_kept < max(
            cited_sentence_numbers(row.model_summary), default=0
        ):
            return n_without_note + len(note_ids)
        note_ids = kept_ids
    prompt = encoder.prompt(note_ids)
    tokens = np.array(prompt + summary_ids + [encoder.template.end_token_id], np.int32)
    return Example(row.name, tokens, len(prompt), shortened)


class SFTDataset:
    """Factual rows as tokenized examples.

    Works in torch's DataLoader and in Hugging Face's Trainer, with `SFTCollator`. `dataset[i]` is a dict of
    `input_ids` and `labels` (lists of equal length, -100 for a token without loss).

    rows         what it was made of, without citations that the prompt or the note does not support
    stray        the names of the rows whose citations were dropped
    examples     the rows that fit, as tokens
    row_indices  of each example's row in `rows`
    refused      (the row's name, the max_length it needs) of each row that does not fit
    lengths      int32 (n_rows, 2): tokens of each row's whole note and of its summary"""

    def __init__(self, rows: Sequence[Row], encoder: PromptEncoder, max_length: int):
        import numpy as np

        self.rows, self.stray = drop_stray_citations(rows, encoder.template.cited_version)
        self.encoder = encoder
        self.max_length = max_length
        self.examples: list[Example] = []
        self.row_indices: list[int] = []
        self.refused: list[tuple[str, int]] = []
        self.lengths = np.empty((len(self.rows), 2), np.int32)
        for start in range(0, len(self.rows), _ROWS_PER_CALL):
            part = self.rows[start : start + _ROWS_PER_CALL]
            notes = encoder.encode_texts([encoder.template.render_note(row.clinical_note) for row in part])
            summaries = encoder.encode_texts([row.model_summary for row in part])
            for i, (row, note_ids, summary_ids) in enumerate(zip(part, notes, summaries), start):
                self.lengths[i] = len(note_ids), len(summary_ids)
                example = encode_example(row, note_ids, summary_ids, encoder, max_length)
                if isinstance(example, int):
                    self.refused.append((row.name, example))
                else:
                    self.examples.append(example)
                    self.row_indices.append(i)

    @property
    def whole_lengths(self) -> "np.ndarray":
        """The max_length that each row needs with its whole note: (n_rows,)."""
        n_end_token = 1
        return self.lengths.sum(1) + self.encoder.n_template_tokens + n_end_token

    @property
    def enough(self) -> str:
        """What would hold all rows whole: --max_length, or another model."""
        longest = self.whole_lengths.max(initial=0)
        takes = getattr(self.encoder.tokenizer, "model_max_length", None) or longest
        if longest > takes:
            return f"all rows whole need a model that takes {longest} tokens (this one: {takes})"
        return f"--max_length {longest} would hold all rows whole"

    @property
    def shortened(self) -> list[str]:
        return [example.row_id for example in self.examples if example.shortened]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        return {"input_ids": example.input_ids, "labels": example.labels}


# ------------------------------------------------------------------------------- both files


def read_data(options: DataOptions, *, validate: bool = True) -> tuple[list[Row], list[Row]]:
    """All training rows and all validation rows: of a second file, or set apart by `val_fraction`.

    Raises InputError if a file cannot be used, has no factual rows to train on, or nothing says what to
    validate on; without `validate` there are then no validation rows."""
    if options.val_csv is not None and options.val_fraction is not None:
        raise InputError("--val_csv cannot be combined with --val_fraction", "choose one")
    # What was typed may be the default on purpose
    is_default = isinstance(options.train_csv, list) and options.train_csv == [BUNDLED_TRAIN_FILE]
    is_default = is_default and "train_csv" not in given_names(options)
    if is_default and options.val_csv is not None and str(options.val_csv) != BUNDLED_VALIDATION_FILE:
        problem = "--val_csv without --train_csv: other notes would validate training on the bundled notes"
        raise InputError(problem, f"pass --train_csv FILE (the bundled notes: {BUNDLED_TRAIN_FILE})")
    train = []
    files = options.train_files
    for file, source in zip(files, _short_names(files) if len(files) > 1 else [""]):
        train += [dataclasses.replace(row, source=source) for row in _read_factual(file, options)]
    if options.val_fraction is not None:
        return split_rows(train, options.val_fraction, options.seed)
    if options.val_file is not None:
        return train, _read_factual(options.val_file, options)
    if validate:
        problem = "--train_csv without --val_csv: the bundled validation notes say nothing about other notes"
        fix = "pass --val_csv FILE, or --val_fraction 0.1 to set a tenth of the notes apart"
        raise InputError(problem, fix)
    return train, []


def _short_names(files: Sequence[str]) -> list[str]:
    """Each file's name, with as many of its folders as tell it from the others."""
    parts = [Path(file).parts for file in files]
    deepest = max(map(len, parts))
    n_parts = (n for n in range(1, deepest) if len({path[-n:] for path in parts}) == len(parts))
    n = next(n_parts, deepest)
    return [str(Path(*path[-n:])) for path in parts]


def _read_factual(source: "str | Path | pd.DataFrame", options: DataOptions) -> list[Row]:
    rows = read_rows(source, options)
    if not factual_rows(rows):
        problem = f"{source_name(source)}: no row is labeled factual ({plural(len(rows), 'row')})"
        raise InputError(problem, "Stage A trains on factual rows only: label them 'factual'")
    return rows


def load_datasets(
    rows: tuple[list[Row], list[Row]],
    tokenizer,
    options: DataOptions,
    template: PromptTemplate | None = None,
    is_untrained: Callable[[int], bool] = lambda token: False,
) -> tuple[SFTDataset, SFTDataset]:
    """The training and the validation set of what `read_data` read, with one prompt template for both:
    `template`, or the tokenizer's (see `build_template` for `is_untrained`).

    Raises InputError if no row of a file fits."""
    train, validation = (factual_rows(part) for part in rows)
    numbering = options.sentence_numbering
    if template is None:
        set_chat_template(tokenizer, options.chat_template)
        template = build_template(
            tokenizer,
            thinking=options.thinking == "on",
            is_untrained=is_untrained,
            instruction=options.instruction,
            number_sentences=cites_sentences(train) if numbering == "auto" else numbering != "off",
            sentence_version=1 if numbering == "v1" else SENTENCE_VERSION,
        )
    encoder = PromptEncoder(tokenizer, template)
    datasets = tuple(SFTDataset(part, encoder, options.max_length) for part in (train, validation))
    for path, dataset in zip(file_names(options), datasets):
        if dataset.stray and options.stray_citations == "refuse":
            where = f"citations that the prompt or the note does not support: {name_rows(dataset.stray)}"
            fix = "correct them, number all summaries with --sentence_numbering on, or use --stray_citations drop"
            raise InputError(f"{path}: {where}", fix)
        if dataset.stray and not dataset.rows:
            fix = "write summaries, or number the sentences with --sentence_numbering on"
            raise InputError(f"{path}: every summary is a citation that was dropped, and nothing else", fix)
        if dataset.rows and not dataset.examples:
            n_lost = f"{dataset.lengths[:, 0].sum():,} tokens in {plural(len(dataset.rows), 'row')}"
            problem = f"{path}: no row fits --max_length {options.max_length}"
            raise InputError(f"{problem}, so all of the notes' text ({n_lost}) is lost", dataset.enough)
    return datasets


def file_names(options: DataOptions) -> tuple[str, str]:
    """What messages call the training and the validation rows."""
    train = ", ".join(map(source_name, options.train_files))
    is_split = options.val_fraction is not None
    return train, f"{train} (validation)" if is_split else source_name(options.val_file)


def cites_sentences(rows: Sequence[Row]) -> bool:
    """Whether most summaries carry citations, so that the notes' sentences should be numbered."""
    return sum(has_citation(row.model_summary) for row in rows) > len(rows) / 2


# ------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes, and the tokens it is to predict.

    inputs              the model's arguments
    targets             LongTensor (n_target_tokens,)
    target_positions    LongTensor (n_target_tokens,): which of the batch * longest logits predict `targets`;
                        None if the model returns no others"""

    inputs: dict
    targets: "torch.Tensor"
    target_positions: "torch.Tensor | None"

    def to(self, device) -> "Batch":
        def move(value):
            return value.to(device, non_blocking=True) if hasattr(value, "to") else value

        inputs = {name: move(value) for name, value in self.inputs.items()}
        return Batch(inputs, move(self.targets), move(self.target_positions))


def packed_batch(examples: Sequence[Example]) -> Batch:
    """The examples end to end in one row without padding; positions start at 0 in each, and there are logits
    only where a target is predicted."""
    import numpy as np
    import torch

    lengths = [example.n_tokens for example in examples]
    input_ids = torch.from_numpy(np.concatenate([example.tokens for example in examples]).astype(np.int64))
    positions = torch.cat([torch.arange(n) for n in lengths])
    carries_loss = torch.cat([torch.arange(e.n_tokens) >= e.n_prompt for e in examples]).nonzero()[:, 0]
    inputs = {
        "input_ids": input_ids[None],
        "position_ids": positions[None],
        "logits_to_keep": carries_loss - 1,  # the token before predicts a token
        "example_lengths": lengths,
        "example_starts": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
    }
    return Batch(inputs, input_ids[carries_loss], None)


def padded_batch(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """The same for models that cannot take packed rows: one example per row, padded on the right."""
    items = [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]
    inputs = SFTCollator(pad_token_id)(items)
    labels = inputs.pop("labels").flatten()
    positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
    # The token before predicts a token
    return Batch(inputs, labels[positions], positions - 1)


class SFTCollator:
    """Pads on the right.

    The mask follows the lengths, never the token ids: the pad token may be the end token. Takes a list of
    `SFTDataset` items; returns `input_ids`, `attention_mask`, `labels`, each a LongTensor (batch, longest).
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        def pad(rows: list[list[int]], value: int) -> torch.Tensor:
            return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

        return {
            "input_ids": pad([item["input_ids"] for item in items], self.pad_token_id),
            "attention_mask": pad([[1] * len(item["input_ids"]) for item in items], 0),
            "labels": pad([item["labels"] for item in items], IGNORE_INDEX),
        }


def create_sft_dataloaders(
    train_csv: "str | Path | pd.DataFrame",
    val_csv: "str | Path | pd.DataFrame | None",
    tokenizer,
    *,
    batch_size: int = 8,
    **options,
):
    """(training, validation) DataLoaders of padded batches for a loop of your own.

    Their `.dataset` and `.collate_fn` suit Hugging Face's Trainer. The training loader shuffles again each
    epoch, reproducibly from `seed`. Both may be DataFrames; with `val_fraction`, `val_csv` is None. `options`
    are those of sft_dataset.py: max_length, seed, instruction, sentence_numbering, note_column and so on.
    Raises InputError if a file cannot be used."""
    import torch
    from torch.utils.data import DataLoader

    tables = {"train_csv": train_csv, "val_csv": val_csv}
    frames = {name: table for name, table in tables.items() if hasattr(table, "columns")}
    config = DataOptions()
    vars(config).update(options | {name: tables[name] for name in tables.keys() - frames.keys()})
    check_config(config)
    check_config(TrainConfig(batch_size=batch_size))
    vars(config).update(frames)
    train, validation = load_datasets(read_data(config), tokenizer, config)
    collator = SFTCollator(pad_token_id(tokenizer))
    generator = torch.Generator().manual_seed(config.seed)
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True, generator=generator, collate_fn=collator),
        DataLoader(validation, batch_size=batch_size, collate_fn=collator),
    )
