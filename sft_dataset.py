"""Checked rows -> prompt -> tokens -> batches, and the report on them. Knows no model and no device.

    python sft_dataset.py                       # check the bundled data and report on it
    python sft_dataset.py --train_csv my.csv    # check your own

Reading the CSV is sft_rows.py's, the prompt and its tokens are sft_prompt.py's.
"""

import functools
import hashlib
import itertools
import json
import math
import mmap
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sft_common import (
    ROOT,
    InputError,
    check_new_file,
    log,
    number,
    option,
    parse_options,
    private_folder,
    run_script,
    safe_id,
    sha256,
    some,
    write_whole,
)
from sft_grounding import cited_sentence_numbers, has_citation, parse_citations
from sft_prompt import PromptEncoder, PromptTemplate, build_template, pad_token_id
from sft_rows import Row, factual_rows, leaked_rows, read_rows, repeated_rows

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100  # the label of a token that carries no loss, as in torch's cross_entropy
MIN_NOTE_TOKENS = 8  # a row that leaves its note less room than this is refused


# ------------------------------------------------------------------------------------------------ examples


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
        if encoder.template.number_sentences and max(cited_sentence_numbers(row.model_summary), default=0) > kept:
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

    def __init__(self, rows: Sequence[Row], encoder: PromptEncoder, max_length: int = 512, cache: Path | None = None):
        self.encoder, self.max_length = encoder, max_length
        key = cache_key(rows, encoder, max_length) if cache else None
        arrays = read_cache(cache, key) if key else None
        if arrays is None:
            arrays = tokenize(rows, encoder, max_length)
            if key and len(arrays["examples"]):
                write_cache(cache, key, arrays)
        self.lengths = arrays["lengths"]
        self.refused: list[tuple[str, int]] = [(rows[i].id, needed) for i, needed in arrays["refused"].tolist()]
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


# ------------------------------------------------------------------------------------------------ token cache


def cache_key(rows: Sequence[Row], encoder: PromptEncoder, max_length: int) -> str | None:
    """SHA-256 of all that the tokens depend on: rows, tokenizer, prompt, max_length and this code. None for a tokenizer
    that cannot be written down (a slow one)."""
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.sha256()
    for name in ("sft_dataset.py", "sft_prompt.py", "sft_grounding.py"):
        digest.update((ROOT / name).read_bytes())
    settings = (
        asdict(encoder.template),
        encoder.prefix_ids,
        encoder.suffix_ids,
        sorted(encoder.control_ids),
        max_length,
        version("transformers"),
    )
    digest.update(f"{settings}{backend.to_str()}".encode())
    for row in rows:
        for text in (row.clinical_note, row.model_summary):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()


def write_cache(path: Path, key: str, arrays: dict[str, "np.ndarray"]) -> None:
    """The file: SHA-256 of what follows (32 bytes), a line of JSON padded with spaces, the arrays as int32 (little-endian).
    It holds the notes as tokens: the user alone may read it. A disk that takes no cache stops nothing."""
    header = json.dumps({"key": key, "shapes": {name: values.shape for name, values in arrays.items()}}).encode()
    header += b" " * (-(len(header) + 1) % 64) + b"\n"
    digest = hashlib.sha256(header)
    parts = [values.astype("<i4", copy=False).reshape(-1).data for values in arrays.values()]
    for part in parts:
        digest.update(part)
    try:
        for torn in private_folder(path.parent).glob(f".{path.name}.*"):  # by a run that was killed while it wrote
            torn.unlink()
        write_whole(path, b"".join([digest.digest(), header, *parts]))
    except OSError as error:
        log(f"warning: the tokens are not kept for the next start: {error.strerror}: {path}")


def read_cache(path: Path, key: str) -> dict[str, "np.ndarray"] | None:
    """The arrays, mapped into memory; None where there is no whole cache with this key."""
    import numpy as np

    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # no file; an empty one
        return None
    if mapped[:32] != hashlib.sha256(memoryview(mapped)[32:]).digest():
        return None
    end = mapped.find(b"\n", 32) + 1
    header = json.loads(mapped[32:end])
    if header["key"] != key:
        return None
    arrays = {}
    for name, shape in header["shapes"].items():
        arrays[name] = np.frombuffer(mapped, "<i4", math.prod(shape), end).reshape(shape)
        end += arrays[name].nbytes
    return arrays


# ------------------------------------------------------------------------------------------------ both sets


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
    encoder = PromptEncoder(tokenizer, build_template(tokenizer, instruction=instruction, number_sentences=numbered))
    datasets = []
    for name, part, path in (("train", train, train_csv), ("validation", validation, val_csv)):
        datasets.append(SFTDataset(part, encoder, max_length, cache_dir and cache_dir / f"{name}.tokens"))
        if not datasets[-1].examples:
            needed = max(needed for _, needed in datasets[-1].refused)
            raise InputError(f"{path}: no row fits --max_length {max_length}", f"--max_length {needed} would hold them all")
    return datasets[0], datasets[1]


# ------------------------------------------------------------------------------------------------ batches


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

        return Batch({name: move(value) for name, value in self.inputs.items()}, move(self.targets), move(self.where))


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
    labels = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)  # a token is predicted at the place before it
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
        train_csv, val_csv, tokenizer, max_length=max_length, instruction=instruction, sentence_numbering=sentence_numbering
    )
    collator = SFTCollator(pad_token_id(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True, generator=generator, collate_fn=collator),
        DataLoader(validation, batch_size=batch_size, collate_fn=collator),
    )


# ------------------------------------------------------------------------------------------------ report


@dataclass
class ReportConfig:
    train_csv: str = option("phase1_data/sft/train_set_processed.csv", "training rows")
    val_csv: str = option("phase1_data/sft/validation_set_processed.csv", "validation rows")
    model_name: str = option("smollm2-135m-instruct", "whose tokenizer counts: the bundled model, a local folder or a hub id")
    max_length: int = option(512, "tokens of prompt and summary together", type=number(int, 32))
    sentence_numbering: str = option(
        "auto", "number the note's sentences: auto = where summaries carry citations", choices=["auto", "on", "off"]
    )
    instruction: str | None = option(None, "what the prompt asks for (default: built in)")
    export_preferences: str | None = option(
        None, "also write factual/hallucinated pairs of one note here, as JSON Lines for DPO (Stage B)", metavar="FILE.jsonl"
    )


def warn_about_rows(path: str | Path, rows: Sequence[Row], dataset: SFTDataset) -> None:
    """Says what was shortened, refused or repeated, by row id."""
    if dataset.shortened:
        ids = some(map(safe_id, dataset.shortened))
        log(f"warning: {path}: {len(dataset.shortened):,} notes shortened to fit --max_length {dataset.max_length}: ids {ids}")
    if dataset.refused:
        ids, needed = some(safe_id(row_id) for row_id, _ in dataset.refused), max(needed for _, needed in dataset.refused)
        log(
            f"warning: {path}: {len(dataset.refused):,} rows refused, since their summaries (and the sentences these cite) do not fit"
            f" --max_length {dataset.max_length}; --max_length {needed} would hold them all: ids {ids}"
        )
    if dataset.encoder.template.number_sentences:
        cited = [row for row in rows if has_citation(row.model_summary)]
        wrong = [row.id for row in cited if any(citation["missing"] for citation in parse_citations(row.model_summary, row.clinical_note))]
        if wrong:
            log(f"warning: {path}: {len(wrong):,} summaries cite sentences that their notes do not have: ids {some(map(safe_id, wrong))}")
    labels, contradictions = {}, set()
    for row in rows:
        texts = (row.note_key, row.summary_key)
        if labels.setdefault(texts, row.label) != row.label:
            contradictions.add(texts)
    if contradictions:
        log(f"warning: {path}: {len(contradictions):,} pairs of note and summary are labelled both factual and hallucinated")
    repeated = repeated_rows(rows)
    if repeated:
        log(
            f"warning: {path}: {len(repeated):,} rows repeat an earlier row's id or texts: rows {some(str(row.number) for row in repeated)}"
        )


def warn_about_leaks(train: Sequence[Row], validation: Sequence[Row]) -> None:
    leaked = leaked_rows(train, validation)
    if leaked:
        ids = some(safe_id(row.id) for row in leaked)
        log(
            f"warning: leak: {len(leaked):,} validation rows have a note that is in the training rows too; the validation loss will flatter: ids {ids}"
        )


def describe_rows(path: str | Path, rows: Sequence[Row], dataset: SFTDataset) -> str:
    """The report on one file: counts and token lengths, never text."""
    import numpy as np

    labels = Counter(row.label for row in rows)
    lines = [
        str(path),
        f"  rows            {len(rows):>6,}",
        f"  factual         {labels['factual']:>6,}   used in Stage A",
    ]
    lines.append(f"  hallucinated    {labels['hallucinated']:>6,}   kept for Stage B, never trained on here")
    types = Counter(safe_id(row.hallucination_type or "unnamed") for row in rows if row.label == "hallucinated")
    lines += [f"    {name:<24} {count:>4,}" for name, count in types.most_common()]
    note, summary = dataset.lengths.T
    spans = (("note", note), ("summary", summary), ("prompt and summary", note + summary + dataset.encoder.n_template_tokens + 1))
    lines.append("  tokens                    median   95th percentile   longest")
    for name, n_tokens in spans:
        median, high, longest = np.quantile(n_tokens, [0.5, 0.95, 1.0])
        lines.append(f"    {name:<20} {median:>9,.0f} {high:>17,.0f} {longest:>9,.0f}")
    fit = f"shortened, {len(dataset.refused):,} rows refused at --max_length {dataset.max_length}"
    return "\n".join([*lines, f"  {len(dataset.shortened):,} notes {fit}; {len(repeated_rows(rows)):,} repeated rows"])


def show_spans(dataset: SFTDataset) -> str:
    """The first example as the model sees it, and which part of it carries loss."""
    example, decode = dataset.examples[0], dataset.encoder.tokenizer.decode
    prompt, target = example.input_ids[: example.n_prompt], example.input_ids[example.n_prompt :]
    spans = (("prompt, no loss", prompt), ("summary and end token, loss", target))
    lines = [f"One row as tokens (id {example.row_id}):"]
    for name, ids in spans:
        lines += [f"  [{name}: {len(ids)} tokens]", *(f"    {line}" for line in decode(ids).split("\n"))]
    return "\n".join(lines)


def is_bundled(path: str | Path) -> bool:
    """Whether the file is sample data of ours, to the byte: only then may its text be shown."""
    sums = ROOT / "phase1_data" / "sft" / "SHA256SUMS"
    return sums.is_file() and sha256(Path(path)) in sums.read_text().split()


def preference_pairs(rows: Sequence[Row], template: PromptTemplate) -> Iterator[dict]:
    """Each hallucinated row beside a factual summary of the same note, in TRL's DPO format
    (https://huggingface.co/docs/trl/dataset_formats): `prompt`, as trained on here, `chosen`, `rejected`, and the ids."""
    factual = {}
    for row in rows:
        if row.label == "factual":
            factual.setdefault(row.note_key, row)
    for row in rows:
        chosen = factual.get(row.note_key)
        if row.label == "hallucinated" and chosen and row.summary_key != chosen.summary_key:
            yield {
                "id": row.id,
                "factual_id": chosen.id,
                "hallucination_type": row.hallucination_type,
                "prompt": template.prefix + template.render_note(row.clinical_note) + template.suffix,
                "chosen": chosen.model_summary,
                "rejected": row.model_summary,
            }


def main() -> None:
    config = parse_options(
        ReportConfig, "Checks training data and reports on it: counts, token lengths, what will be shortened or refused."
    )
    check_new_file("--export_preferences", config.export_preferences)
    rows = read_rows(config.train_csv), read_rows(config.val_csv)
    for part, path in zip(rows, (config.train_csv, config.val_csv)):
        factual_rows(part, path)

    from sft_model import load_tokenizer  # after the files have been checked: it takes a second

    tokenizer = load_tokenizer(config.model_name)
    datasets = load_datasets(
        config.train_csv,
        config.val_csv,
        tokenizer,
        max_length=config.max_length,
        instruction=config.instruction,
        sentence_numbering=config.sentence_numbering,
        rows=rows,
    )
    for path, part, dataset in zip((config.train_csv, config.val_csv), rows, datasets):
        print(describe_rows(path, part, dataset) + "\n")
        warn_about_rows(path, part, dataset)
    warn_about_leaks(*rows)
    numbered = "numbered" if datasets[0].encoder.template.number_sentences else "not numbered"
    print(f"{len(leaked_rows(*rows)):,} validation rows have a note that is in the training rows too.")
    print(f"The note's sentences are {numbered} in the prompt.")
    if is_bundled(config.train_csv):
        print("\n" + show_spans(datasets[0]))
    if config.export_preferences:
        pairs = list(preference_pairs(rows[0], datasets[0].encoder.template))
        write_whole(Path(config.export_preferences), "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        log(f"Wrote {len(pairs):,} preference pairs to {config.export_preferences}")


if __name__ == "__main__":
    run_script(main)
