"""Checked rows -> examples in tokens -> batches, and the warnings about the data. Knows no model.

torch and numpy are imported inside functions, so that input errors are instant.
"""

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sft.cli import InputError, log, on_main_process, plural, preview_list, safe_id
from sft.data.prompt import PromptEncoder, PromptTemplate, build_template, pad_token_id
from sft.data.rows import Row, factual_rows, leaked_rows, read_rows, repeated_rows
from sft.data.token_cache import cache_key, read_cache, write_cache
from sft.grounding.citations import cited_sentence_numbers, has_citation, parse_citations
from sft.options import DEFAULT_MAX_LENGTH, DataOptions

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100  # the label of a token that carries no loss, as in torch's cross_entropy
MIN_NOTE_TOKENS = 8  # a row that leaves its note less room than this is refused
_ROWS_PER_CALL = 1000  # of the tokenizer


# ------------------------------------------------------------------------------- examples


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: prompt, summary and end token, of which the last two carry loss."""

    row_id: str
    tokens: "np.ndarray"  # int32 (n_tokens,), a view into the dataset's
    n_prompt: int  # the first n_prompt tokens carry no loss
    shortened: bool = False

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


class Encoded(NamedTuple):
    """A row as tokens."""

    ids: list[int]  # prompt, summary and end token
    n_prompt: int
    shortened: bool  # whether the note lost sentences


class Refused(NamedTuple):
    """A row that does not fit."""

    needed: int  # the max_length that would hold it


def encode_example(
    row: Row, note_ids: list[int], summary_ids: list[int], encoder: PromptEncoder, max_length: int
) -> Encoded | Refused:
    """One row as at most `max_length` tokens. `note_ids`, `summary_ids`: its whole note and its summary.

    The note alone is shortened, at a sentence boundary; the template, the summary and its end token never
    are. A row is refused if its summary leaves no room for a note, or cites a sentence that would be cut off.
    """
    room = max_length - encoder.n_template_tokens - len(summary_ids) - 1
    n_without_note = max_length - room
    shortened = len(note_ids) > room
    if shortened:
        if room < MIN_NOTE_TOKENS:
            return Refused(n_without_note + min(len(note_ids), MIN_NOTE_TOKENS))
        kept_ids, n_kept = encoder.shorten(row.clinical_note, room)
        if encoder.template.number_sentences:
            last_cited = max(cited_sentence_numbers(row.model_summary), default=0)
            if last_cited > n_kept:
                return Refused(n_without_note + len(note_ids))
        note_ids = kept_ids
    prompt = encoder.prompt(note_ids)
    return Encoded(prompt + summary_ids + [encoder.template.end_token_id], len(prompt), shortened)


def tokenize(rows: Sequence[Row], encoder: PromptEncoder, max_length: int) -> dict[str, "np.ndarray"]:
    """All rows as int32 arrays, 4 bytes per token where a Python list takes 36.

    `tokens`: the examples end to end; `examples` (n_examples, 4): row, n_tokens, n_prompt, shortened;
    `refused` (n_refused, 2): row, the max_length it needs; `lengths` (n_rows, 2): tokens of the whole note
    and of the summary.
    """
    import numpy as np

    tokens, examples, refused, lengths = (array("i") for _ in range(4))
    for start in range(0, len(rows), _ROWS_PER_CALL):
        part = rows[start : start + _ROWS_PER_CALL]
        notes = encoder.encode_texts([encoder.template.render_note(row.clinical_note) for row in part])
        summaries = encoder.encode_texts([row.model_summary for row in part])
        for i, (row, note_ids, summary_ids) in enumerate(zip(part, notes, summaries), start):
            lengths.extend((len(note_ids), len(summary_ids)))
            result = encode_example(row, note_ids, summary_ids, encoder, max_length)
            if isinstance(result, Refused):
                refused.extend((i, result.needed))
            else:
                tokens.extend(result.ids)
                examples.extend((i, len(result.ids), result.n_prompt, result.shortened))
    return {
        "tokens": np.asarray(tokens),
        "examples": np.asarray(examples).reshape(-1, 4),
        "refused": np.asarray(refused).reshape(-1, 2),
        "lengths": np.asarray(lengths).reshape(-1, 2),
    }


class SFTDataset:
    """Factual rows as tokenized examples.

    Works in torch's DataLoader and in Hugging Face's Trainer, with `SFTCollator`. `dataset[i]` is a dict of
    `input_ids` and `labels` (lists of equal length, -100 for a token without loss).

    examples     the same, with row ids
    refused      (row id, the max_length it needs) of each row that does not fit
    shortened    the ids of the rows whose notes were shortened
    lengths      int32 (n_rows, 2): tokens of each row's whole note and of its summary

    With `cache`, a file, the tokens are kept there, and read from there if rows, tokenizer, prompt and
    max_length are the same.
    """

    def __init__(
        self, rows: Sequence[Row], encoder: PromptEncoder, max_length: int, cache: Path | None = None
    ):
        self.encoder = encoder
        self.max_length = max_length
        key = cache_key(rows, encoder, max_length) if cache else None
        arrays = read_cache(cache, key) if key else None
        if arrays is None:
            arrays = tokenize(rows, encoder, max_length)
            if key and len(arrays["examples"]):
                write_cache(cache, key, arrays)
        self.lengths = arrays["lengths"]
        self.refused: list[tuple[str, int]] = [
            (rows[i].id, needed) for i, needed in arrays["refused"].tolist()
        ]
        self.examples: list[Example] = []
        start = 0
        for i, n_tokens, n_prompt, shortened in arrays["examples"].tolist():
            tokens = arrays["tokens"][start : start + n_tokens]
            self.examples.append(Example(rows[i].id, tokens, n_prompt, bool(shortened)))
            start += n_tokens

    @property
    def shortened(self) -> list[str]:
        return [example.row_id for example in self.examples if example.shortened]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        return {"input_ids": example.input_ids, "labels": example.labels}


# ------------------------------------------------------------------------------- both files


def read_data(options: DataOptions) -> tuple[list[Row], list[Row]]:
    """All rows of the training file and of the validation file.

    Raises InputError if a file cannot be used, or has no factual rows to train on.
    """
    train = read_rows(options.train_csv)
    validation = read_rows(options.val_csv)
    for path, rows in ((options.train_csv, train), (options.val_csv, validation)):
        if not factual_rows(rows):
            problem = f"{path}: no row is labeled factual ({plural(len(rows), 'row')})"
            raise InputError(problem, "Stage A trains on factual rows only: label them 'factual'")
    return train, validation


def load_datasets(
    rows: tuple[list[Row], list[Row]],
    tokenizer,
    options: DataOptions,
    cache_dir: Path | None = None,
    template: PromptTemplate | None = None,
) -> tuple[SFTDataset, SFTDataset]:
    """The training and the validation set of what `read_data` read, with one prompt template for both:
    `template`, or the tokenizer's.

    `cache_dir` keeps the tokens for the next start. Raises InputError if no row of a file fits.
    """
    train, validation = (factual_rows(part) for part in rows)
    if options.sentence_numbering == "auto":
        is_numbered = _cites_evidence(train)
    else:
        is_numbered = options.sentence_numbering == "on"
    template = template or build_template(
        tokenizer, instruction=options.instruction, number_sentences=is_numbered
    )
    encoder = PromptEncoder(tokenizer, template)

    def load(name: str, path: str, part: list[Row]) -> SFTDataset:
        cache = cache_dir / f"{name}.tokens" if cache_dir else None
        dataset = SFTDataset(part, encoder, options.max_length, cache)
        if not dataset.examples:
            fix = f"--max_length {_needed_length(dataset)} would hold them all"
            raise InputError(f"{path}: no row fits --max_length {options.max_length}", fix)
        return dataset

    return load("train", options.train_csv, train), load("validation", options.val_csv, validation)


def _cites_evidence(rows: Sequence[Row]) -> bool:
    """Whether most summaries carry citations, so that the notes' sentences should be numbered."""
    return sum(has_citation(row.model_summary) for row in rows) > len(rows) / 2


def _needed_length(dataset: SFTDataset) -> int:
    """The max_length that would hold every refused row."""
    return max(needed for _, needed in dataset.refused)


# ------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes, and the tokens it is to predict.

    inputs              the model's arguments
    targets             LongTensor (n_target_tokens,)
    target_positions    LongTensor (n_target_tokens,): which of the batch * longest logits predict `targets`;
                        None if the model returns no others
    """

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
    import torch

    rows = [torch.tensor(example.tokens, dtype=torch.long) for example in examples]
    input_ids, attention_mask = _pad(rows, pad_token_id)
    longest = input_ids.shape[1]
    targets = []
    positions = []
    for i, (example, row) in enumerate(zip(examples, rows)):
        targets.append(row[example.n_prompt :])
        # The token before predicts a token
        positions.append(i * longest + torch.arange(example.n_prompt, example.n_tokens) - 1)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return Batch(inputs, torch.cat(targets), torch.cat(positions))


class SFTCollator:
    """Pads on the right.

    The mask follows the lengths, never the token ids: the pad token may be the end token. Takes a list of
    `SFTDataset` items; returns `input_ids`, `attention_mask`, `labels`, each a LongTensor (batch, longest).
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict:
        import torch

        input_ids, attention_mask = _pad(
            [torch.tensor(item["input_ids"]) for item in items], self.pad_token_id
        )
        labels, _ = _pad([torch.tensor(item["labels"]) for item in items], IGNORE_INDEX)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _pad(rows: "list[torch.Tensor]", value: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """(rows padded on the right, mask of what is not padding): LongTensors (n_rows, longest)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True, padding_value=value), mask


def create_sft_dataloaders(
    train_csv: str | Path,
    val_csv: str | Path,
    tokenizer,
    *,
    batch_size: int = 8,
    max_length: int = DEFAULT_MAX_LENGTH,
    seed: int = 42,
    instruction: str | None = None,
    sentence_numbering: str = "auto",
):
    """(training, validation) DataLoaders of padded batches for a loop of your own.

    Their `.dataset` and `.collate_fn` suit Hugging Face's Trainer. The training loader shuffles again each
    epoch, reproducibly from `seed`. `sentence_numbering`: "on", "off", or "auto" (on if most training
    summaries carry citations). Raises InputError if a file cannot be used.
    """
    import torch
    from torch.utils.data import DataLoader

    options = DataOptions(
        train_csv=str(train_csv),
        val_csv=str(val_csv),
        max_length=max_length,
        instruction=instruction,
        sentence_numbering=sentence_numbering,
    )
    train, validation = load_datasets(read_data(options), tokenizer, options)
    collator = SFTCollator(pad_token_id(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True, generator=generator, collate_fn=collator),
        DataLoader(validation, batch_size=batch_size, collate_fn=collator),
    )


# ------------------------------------------------------------------------------- warnings


def log_data_warnings(
    rows: tuple[list[Row], list[Row]], datasets: tuple[SFTDataset, SFTDataset], options: DataOptions
) -> None:
    """Logs what was shortened or refused and what looks wrong in each file, then leaks between the two, by
    row number or id. On the main process only."""
    if not on_main_process():
        return
    for path, part, dataset in zip((options.train_csv, options.val_csv), rows, datasets):
        for warning in _file_warnings(part, dataset):
            log(f"warning: {path}: {warning}")
    leaked = leaked_rows(*rows)
    if leaked:
        share = "shares its" if len(leaked) == 1 else "share their"
        log(
            f"warning: {plural(len(leaked), 'validation row')} {share} note with training rows, so validation"
            f" loss will look better than it is: {_ids(row.id for row in leaked)}; remove them from one file"
        )


def _file_warnings(rows: Sequence[Row], dataset: SFTDataset) -> Iterator[str]:
    limit = f"--max_length {dataset.max_length}"
    if dataset.shortened:
        n_notes = plural(len(dataset.shortened), "note")
        yield f"{n_notes} shortened to fit {limit}: {_ids(dataset.shortened)}"
    if dataset.refused:
        n_rows = plural(len(dataset.refused), "row")
        ids = _ids(row_id for row_id, _ in dataset.refused)
        yield (
            f"{n_rows} left out: the summary and any sentences it cites do not fit in {limit};"
            f" --max_length {_needed_length(dataset)} would hold them all: {ids}"
        )
    if dataset.encoder.template.number_sentences:
        wrong = [row.id for row in rows if _cites_missing_sentence(row)]
        if wrong:
            n_rows = plural(len(wrong), "row")
            yield f"{n_rows} with a summary that cites sentences its note does not have: {_ids(wrong)}"
    n_contradictions = _count_contradictions(rows)
    if n_contradictions:
        yield f"{plural(n_contradictions, 'pair')} of note and summary labeled both factual and hallucinated"
    repeated = [str(row.number) for row in repeated_rows(rows)]
    if repeated:
        n_rows = plural(len(repeated), "row")
        repeat, word = ("repeats", "row") if len(repeated) == 1 else ("repeat", "rows")
        what = "the id, or the note and summary, of an earlier row"
        yield f"{n_rows} {repeat} {what}: {word} {preview_list(repeated)}"


def _ids(row_ids: Iterable[str]) -> str:
    """ "id a", "ids a, b"."""
    row_ids = [safe_id(row_id) for row_id in row_ids]
    return f"{'id' if len(row_ids) == 1 else 'ids'} {preview_list(row_ids)}"


def _cites_missing_sentence(row: Row) -> bool:
    return any(citation["missing"] for citation in parse_citations(row.model_summary, row.clinical_note))


def _count_contradictions(rows: Sequence[Row]) -> int:
    """The number of pairs of note and summary that have both labels."""
    labels = {}
    contradictions = set()
    for row in rows:
        texts = (row.note_key, row.summary_key)
        if labels.setdefault(texts, row.label) != row.label:
            contradictions.add(texts)
    return len(contradictions)
