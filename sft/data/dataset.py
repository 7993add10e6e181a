"""Dataset."""

import functools
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.cli import InputError, log, preview_list, safe_id
from sft.data.prompt import PromptEncoder, build_template, pad_token_id
from sft.data.rows import Row, factual_rows, leaked_rows, read_rows, repeated_rows
from sft.data.token_cache import cache_key, read_cache, write_cache
from sft.grounding.citations import cited_sentence_numbers, has_citation, parse_citations

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100  # the label of a token that carries no loss, as in torch's cross_entropy


MIN_NOTE_TOKENS = 8  # a row that leaves its note less room than this is refused


def cites_evidence(rows: Sequence[Row]) -> bool:
    """Whether most summaries carry citations, so that the notes' sentences should be numbered."""
    return sum(has_citation(row.model_summary) for row in rows) > len(rows) / 2


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


def encode_example(
    row: Row, note_ids: list[int], summary_ids: list[int], encoder: PromptEncoder, max_length: int
) -> tuple[list[int], int, bool] | int:
    """One row as (at most `max_length` token ids, number of prompt tokens, whether its note was shortened); or, where it is
    refused, the max_length that it needs.

    The note alone is shortened, at a sentence boundary; the template, the summary and its end never are. A row whose
    summary leaves no room for a note, or cites a sentence that would be cut off, is refused.
    """
    room = max_length - encoder.n_template_tokens - len(summary_ids) - 1
    shortened = len(note_ids) > room
    if shortened:
        if room < MIN_NOTE_TOKENS:
            return max_length - room + min(len(note_ids), MIN_NOTE_TOKENS)
        whole = len(note_ids)
        note_ids, kept = encoder.shorten(row.clinical_note, room)
        if (
            encoder.template.number_sentences
            and max(cited_sentence_numbers(row.model_summary), default=0) > kept
        ):
            return max_length - room + whole
    prompt = encoder.prompt(note_ids)
    return prompt + summary_ids + [encoder.template.end_token_id], len(prompt), shortened


def tokenize(rows: Sequence[Row], encoder: PromptEncoder, max_length: int) -> dict[str, "np.ndarray"]:
    """All rows as int32 arrays, 4 bytes a token where a list of Python's takes 36.

    `tokens`: the examples end to end; `examples` (n_examples, 4): row, n_tokens, n_prompt, shortened; `refused`
    (n_refused, 2): row, the max_length it needs; `lengths` (n_rows, 2): tokens of the whole note and of the summary.
    """
    import numpy as np

    tokens, examples, refused, lengths = (array("i") for _ in range(4))
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        notes = encoder.encode_texts([encoder.template.render_note(row.clinical_note) for row in part])
        summaries = encoder.encode_texts([row.model_summary for row in part])
        for i, (row, note_ids, summary_ids) in enumerate(zip(part, notes, summaries), start):
            lengths.extend((len(note_ids), len(summary_ids)))
            example = encode_example(row, note_ids, summary_ids, encoder, max_length)
            if isinstance(example, int):
                refused.extend((i, example))
            else:
                ids, n_prompt, shortened = example
                tokens.extend(ids)
                examples.extend((i, len(ids), n_prompt, shortened))
    return {
        "tokens": np.asarray(tokens),
        "examples": np.asarray(examples).reshape(-1, 4),
        "refused": np.asarray(refused).reshape(-1, 2),
        "lengths": np.asarray(lengths).reshape(-1, 2),
    }


class SFTDataset:
    """Factual rows as tokenised examples. Works in torch's DataLoader and in Hugging Face's Trainer, with `SFTCollator`.

    `dataset[i]` is a dict of `input_ids` and `labels` (lists of equal length, -100 where no loss is carried).
    `examples` holds the same with row ids; `refused` the id of each row that does not fit, with the max_length it needs.
    With `cache`, a file, the tokens are kept there and read from there when rows, tokenizer, prompt and max_length are the same.
    """

    def __init__(
        self, rows: Sequence[Row], encoder: PromptEncoder, max_length: int = 512, cache: Path | None = None
    ):
        self.encoder, self.max_length = encoder, max_length
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
        end = 0
        for i, n_tokens, n_prompt, shortened in arrays["examples"].tolist():
            start, end = end, end + n_tokens
            self.examples.append(Example(rows[i].id, arrays["tokens"][start:end], n_prompt, bool(shortened)))

    @property
    def shortened(self) -> list[str]:
        return [example.row_id for example in self.examples if example.shortened]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        return {"input_ids": example.input_ids, "labels": example.labels}


def load_datasets(
    train_csv: str | Path,
    val_csv: str | Path,
    tokenizer,
    *,
    max_length: int = 512,
    instruction: str | None = None,
    sentence_numbering: str = "auto",
    rows: tuple[list[Row], list[Row]] | None = None,
    cache_dir: Path | None = None,
) -> tuple[SFTDataset, SFTDataset]:
    """The training and the validation set, with one prompt template between them.

    `sentence_numbering`: "on", "off", or "auto" (on where the training summaries carry citations). `rows` are both
    files' rows where they have been read already. `cache_dir` keeps the tokens for the next start. Raises InputError where a
    file cannot be used.
    """
    read = rows or (read_rows(train_csv), read_rows(val_csv))
    train, validation = (factual_rows(part, path) for part, path in zip(read, (train_csv, val_csv)))
    numbered = cites_evidence(train) if sentence_numbering == "auto" else sentence_numbering == "on"
    encoder = PromptEncoder(
        tokenizer, build_template(tokenizer, instruction=instruction, number_sentences=numbered)
    )
    datasets = []
    for name, part, path in (("train", train, train_csv), ("validation", validation, val_csv)):
        datasets.append(SFTDataset(part, encoder, max_length, cache_dir and cache_dir / f"{name}.tokens"))
        if not datasets[-1].examples:
            needed = max(needed for _, needed in datasets[-1].refused)
            raise InputError(
                f"{path}: no row fits --max_length {max_length}", f"--max_length {needed} would hold them all"
            )
    return datasets[0], datasets[1]


@functools.lru_cache(maxsize=2)
def epoch_order(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the examples in `epoch` (0-based): a permutation that depends on `seed` and `epoch` alone."""
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(n_examples, generator=generator).tolist())


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes, and the tokens it is to predict."""

    inputs: dict  # the model's arguments
    targets: "torch.Tensor"  # LongTensor (n_target_tokens,)
    where: "torch.Tensor | None"  # LongTensor: of the batch * longest logits those that predict `targets`; None: all do

    def to(self, device) -> "Batch":
        def move(value):
            return value.to(device, non_blocking=True) if hasattr(value, "to") else value

        return Batch(
            {name: move(value) for name, value in self.inputs.items()}, move(self.targets), move(self.where)
        )


def packed_batch(examples: Sequence[Example]) -> Batch:
    """The examples end to end in one row without padding, positions anew for each, logits only where there is a target."""
    import numpy as np
    import torch

    lengths = [example.n_tokens for example in examples]
    input_ids = torch.from_numpy(np.concatenate([example.tokens for example in examples]).astype(np.int64))
    positions = torch.cat([torch.arange(n) for n in lengths])
    carries_loss = torch.cat([torch.arange(e.n_tokens) >= e.n_prompt for e in examples]).nonzero()[:, 0]
    inputs = {
        "input_ids": input_ids[None],
        "position_ids": positions[None],
        "logits_to_keep": carries_loss - 1,  # a token is predicted at the place before it
        "example_lengths": lengths,
        "example_starts": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
    }
    return Batch(inputs, input_ids[carries_loss], None)


def padded_batch(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """The same for models that cannot take packed rows: one example a row, padded on the right."""
    import torch

    items = [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]
    inputs = SFTCollator(pad_token_id)(items)
    labels = torch.nn.functional.pad(
        inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX
    )  # a token is predicted at the place before it
    where = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    return Batch(inputs, labels.flatten()[where], where)


class SFTCollator:
    """Pads on the right. The mask follows the lengths, never the token ids: the pad token may be the end token.

    Takes a list of `SFTDataset` items; returns `input_ids`, `attention_mask`, `labels`, each a LongTensor (batch, longest).
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict:
        import torch

        longest = max(len(item["input_ids"]) for item in items)
        shape = (len(items), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        for i, item in enumerate(items):
            n = len(item["input_ids"])
            batch["input_ids"][i, :n] = torch.tensor(item["input_ids"])
            batch["attention_mask"][i, :n] = 1
            batch["labels"][i, :n] = torch.tensor(item["labels"])
        return batch


def create_sft_dataloaders(
    train_csv: str | Path,
    val_csv: str | Path,
    tokenizer,
    *,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 42,
    instruction: str | None = None,
    sentence_numbering: str = "auto",
):
    """(training, validation) DataLoaders of padded batches for a loop of your own; their `.dataset` and `.collate_fn` suit
    Hugging Face's Trainer. The training loader shuffles anew each epoch, reproducibly from `seed`.

    Raises InputError where a file cannot be used.
    """
    import torch
    from torch.utils.data import DataLoader

    train, validation = load_datasets(
        train_csv,
        val_csv,
        tokenizer,
        max_length=max_length,
        instruction=instruction,
        sentence_numbering=sentence_numbering,
    )
    collator = SFTCollator(pad_token_id(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True, generator=generator, collate_fn=collator),
        DataLoader(validation, batch_size=batch_size, collate_fn=collator),
    )


def warn_about_rows(path: str | Path, rows: Sequence[Row], dataset: SFTDataset) -> None:
    """Says what was shortened, refused or repeated, by row id."""
    if dataset.shortened:
        ids = preview_list(map(safe_id, dataset.shortened))
        log(
            f"warning: {path}: {len(dataset.shortened):,} notes shortened to fit --max_length {dataset.max_length}: ids {ids}"
        )
    if dataset.refused:
        ids, needed = (
            preview_list(safe_id(row_id) for row_id, _ in dataset.refused),
            max(needed for _, needed in dataset.refused),
        )
        log(
            f"warning: {path}: {len(dataset.refused):,} rows refused, since their summaries (and the sentences these cite) do not fit"
            f" --max_length {dataset.max_length}; --max_length {needed} would hold them all: ids {ids}"
        )
    if dataset.encoder.template.number_sentences:
        cited = [row for row in rows if has_citation(row.model_summary)]
        wrong = [
            row.id
            for row in cited
            if any(citation["missing"] for citation in parse_citations(row.model_summary, row.clinical_note))
        ]
        if wrong:
            log(
                f"warning: {path}: {len(wrong):,} summaries cite sentences that their notes do not have: ids {preview_list(map(safe_id, wrong))}"
            )
    labels, contradictions = {}, set()
    for row in rows:
        texts = (row.note_key, row.summary_key)
        if labels.setdefault(texts, row.label) != row.label:
            contradictions.add(texts)
    if contradictions:
        log(
            f"warning: {path}: {len(contradictions):,} pairs of note and summary are labelled both factual and hallucinated"
        )
    repeated = repeated_rows(rows)
    if repeated:
        log(
            f"warning: {path}: {len(repeated):,} rows repeat an earlier row's id or texts: rows {preview_list(str(row.number) for row in repeated)}"
        )


def warn_about_leaks(train: Sequence[Row], validation: Sequence[Row]) -> None:
    leaked = leaked_rows(train, validation)
    if leaked:
        ids = preview_list(safe_id(row.id) for row in leaked)
        log(
            f"warning: leak: {len(leaked):,} validation rows have a note that is in the training rows too; the validation loss will flatter: ids {ids}"
        )
