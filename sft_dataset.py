"""CSV -> checked rows -> prompt -> tokens -> batches. Knows no model and no device.

    python sft_dataset.py                       # check the bundled data and report on it
    python sft_dataset.py --train_csv my.csv    # check your own

The prompt and its tokens are sft_prompt.py's.
"""

import csv
import functools
import io
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft_common import ROOT, InputError, check_new_file, log, number, option, parse_options, run_script, safe_id, sha256, some, write_whole
from sft_grounding import cited_sentence_numbers, has_citation, parse_citations
from sft_prompt import PromptEncoder, PromptTemplate, build_template, pad_token_id

if TYPE_CHECKING:
    import torch

REQUIRED_COLUMNS = ("id", "clinical_note", "model_summary", "label")
COLUMNS = (*REQUIRED_COLUMNS, "hallucination_type")
LABELS = ("factual", "hallucinated")
IGNORE_INDEX = -100  # the label of a token that carries no loss, as in torch's cross_entropy
MIN_NOTE_TOKENS = 8  # a row that leaves its note less room than this is refused
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")  # half characters, which JSON can hold and UTF-8 cannot


# ------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class Row:
    number: int  # as a spreadsheet counts: the header is row 1
    id: str
    clinical_note: str
    model_summary: str
    label: str  # one of LABELS
    hallucination_type: str = ""


def clean_text(text: str) -> str:
    """Text as the model reads it: line ends are \\n, no control characters, no white space at the ends."""
    text = _SURROGATES.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROL_CHARACTERS.sub("", text).strip()


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, zero-width and control characters alone."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def decode_text(path: Path) -> str:
    """A file's text, UTF-8 with or without BOM. Raises InputError where there is no such file or it is not UTF-8."""
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}", "check the path")
    return decode_bytes(path.read_bytes(), str(path))


def decode_bytes(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name}: not UTF-8: byte 0x{data[error.start]:02x} on line {line:,}", "save it as UTF-8 (in Excel: 'CSV UTF-8')"
        ) from None


def read_table(path: str | Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str], bool]]:
    """Yields (row number, fields by column, whether there are more fields than columns) of a CSV's rows. Values are text
    as they stand: "NA" is sodium, not a missing value.

    Raises InputError where the file cannot be read as a CSV with the `required` columns.
    """
    text = decode_text(Path(path))
    csv.field_size_limit(1 << 30)  # a note may be longer than the csv module's 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        missing = [name for name in required if name not in header]
        if missing:
            raise InputError(
                f"{path}: no column {some(missing)} in the header", f"name the columns {','.join(COLUMNS)}, separated by commas"
            )
        repeated = [name for name in required if header.count(name) > 1]
        if repeated:
            raise InputError(f"{path}: column {some(repeated)} stands twice in the header", "keep one of each")
        for row, fields in enumerate(reader, 2):
            if any(field.strip() for field in fields):  # a blank row is no row
                yield row, dict(zip(header, fields)), any(field.strip() for field in fields[len(header) :])
    except csv.Error as error:
        raise InputError(
            f"{path}: near line {reader.line_num:,}: {error}", "check the quotes: a quote inside a cell is doubled, the cell itself quoted"
        ) from None


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a CSV in the toolkit's form, checked. Raises InputError naming every bad row (by number and id, never text)."""
    rows, problems = [], []
    for row_number, fields, too_many in read_table(path, REQUIRED_COLUMNS):
        row = Row(
            row_number,
            fields.get("id", "").strip(),
            clean_text(fields.get("clinical_note", "")),
            clean_text(fields.get("model_summary", "")),
            fields.get("label", "").strip().lower(),
            fields.get("hallucination_type", "").strip(),
        )
        rows.append(row)
        for problem in _problems(row, too_many):
            problems.append(f"row {row.number} (id {safe_id(row.id) if row.id else 'empty'}): {problem}")
    if problems:
        what = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
        raise InputError(
            f"{path}: {what}: " + "; ".join(problems[:5]) + (f"; and {len(problems) - 5:,} more" if problems[5:] else ""),
            "mend or delete these rows",
        )
    if not rows:
        raise InputError(f"{path}: no rows below the header", "add rows, at least one of them labelled factual")
    return rows


def _problems(row: Row, too_many_fields: bool) -> Iterator[str]:
    if too_many_fields:
        yield "more fields than the header has columns (a comma outside quotes?)"
    if not row.id:
        yield "id is empty"
    if is_blank(row.clinical_note):
        yield "clinical_note is empty"
    if is_blank(row.model_summary):
        yield "model_summary is empty"
    if row.label not in LABELS:
        yield f"label is neither {' nor '.join(LABELS)} (or a comma outside quotes shifts the columns)"


def factual_rows(rows: Sequence[Row], path: str | Path) -> list[Row]:
    """The rows Stage A trains on. Raises InputError if there are none."""
    factual = [row for row in rows if row.label == "factual"]
    if not factual:
        raise InputError(
            f"{path}: no row is labelled factual ({len(rows):,} rows)", "Stage A trains on factual rows only: label them 'factual'"
        )
    return factual


def same_note_key(note: str) -> str:
    """Equal for two notes that differ in case and white space alone."""
    return " ".join(note.casefold().split())


def leaked_rows(train: Sequence[Row], validation: Sequence[Row]) -> list[Row]:
    """The validation rows whose note stands in the training rows too."""
    known = {same_note_key(row.clinical_note) for row in train}
    return [row for row in validation if same_note_key(row.clinical_note) in known]


def repeated_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that repeat an earlier row's id, or its note together with its summary."""
    ids, texts, repeated = set(), set(), []
    for row in rows:
        text = (same_note_key(row.clinical_note), same_note_key(row.model_summary))
        if row.id in ids or text in texts:
            repeated.append(row)
        ids.add(row.id)
        texts.add(text)
    return repeated


# ------------------------------------------------------------------------------------------------ examples


def cites_evidence(rows: Sequence[Row]) -> bool:
    """Whether most summaries carry citations, so that the notes' sentences should be numbered."""
    return sum(has_citation(row.model_summary) for row in rows) > len(rows) / 2


@dataclass(frozen=True)
class Example:
    """One training example: prompt, summary and end token, of which the last two carry loss."""

    row_id: str
    input_ids: list[int]
    n_prompt: int  # the first n_prompt tokens carry no loss
    shortened: bool = False

    @property
    def n_target_tokens(self) -> int:
        return len(self.input_ids) - self.n_prompt

    @property
    def labels(self) -> list[int]:
        return [IGNORE_INDEX] * self.n_prompt + self.input_ids[self.n_prompt :]


def encode_example(row: Row, note_ids: list[int], summary_ids: list[int], encoder: PromptEncoder, max_length: int) -> Example | int:
    """One row as an Example of at most `max_length` tokens; or, where it is refused, the max_length that it needs.

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
    return Example(row.id, prompt + summary_ids + [encoder.template.end_token_id], len(prompt), shortened)


class SFTDataset:
    """Factual rows as tokenised examples. Works in torch's DataLoader and in Hugging Face's Trainer, with `SFTCollator`.

    `dataset[i]` is a dict of `input_ids` and `labels` (lists of equal length, -100 where no loss is carried).
    `examples` holds the same with row ids; `refused` the id of each row that does not fit, with the max_length it needs.
    """

    def __init__(self, rows: Sequence[Row], encoder: PromptEncoder, max_length: int = 512):
        self.encoder, self.max_length = encoder, max_length
        self.examples: list[Example] = []
        self.refused: list[tuple[str, int]] = []
        for start in range(0, len(rows), 1000):
            part = rows[start : start + 1000]
            notes = encoder.encode_texts([encoder.template.render_note(row.clinical_note) for row in part])
            summaries = encoder.encode_texts([row.model_summary for row in part])
            for row, note_ids, summary_ids in zip(part, notes, summaries):
                example = encode_example(row, note_ids, summary_ids, encoder, max_length)
                if isinstance(example, int):
                    self.refused.append((row.id, example))
                else:
                    self.examples.append(example)

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
) -> tuple[SFTDataset, SFTDataset]:
    """The training and the validation set, with one prompt template between them.

    `sentence_numbering`: "on", "off", or "auto" (on where the training summaries carry citations). `rows` are both
    files' rows where they have been read already. Raises InputError where a file cannot be used.
    """
    read = rows or (read_rows(train_csv), read_rows(val_csv))
    train, validation = (factual_rows(part, path) for part, path in zip(read, (train_csv, val_csv)))
    numbered = cites_evidence(train) if sentence_numbering == "auto" else sentence_numbering == "on"
    encoder = PromptEncoder(tokenizer, build_template(tokenizer, instruction=instruction, number_sentences=numbered))
    datasets = []
    for part, path in ((train, train_csv), (validation, val_csv)):
        datasets.append(SFTDataset(part, encoder, max_length))
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
    where: "torch.Tensor | None"  # BoolTensor (batch, longest): the logits that predict `targets`; None: all of them do

    def to(self, device) -> "Batch":
        def move(value):
            return value.to(device, non_blocking=True) if hasattr(value, "to") else value

        return Batch({name: move(value) for name, value in self.inputs.items()}, move(self.targets), move(self.where))


def packed_batch(examples: Sequence[Example]) -> Batch:
    """The examples end to end in one row without padding, positions anew for each, logits only where there is a target."""
    import torch

    lengths = [len(example.input_ids) for example in examples]
    input_ids = torch.tensor([token for example in examples for token in example.input_ids])
    positions = torch.cat([torch.arange(n) for n in lengths])
    carries_loss = torch.cat([torch.arange(len(e.input_ids)) >= e.n_prompt for e in examples]).nonzero()[:, 0]
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
    where = labels != IGNORE_INDEX
    return Batch(inputs, labels[where], where)


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
        wrong = [row.id for row in rows if any(citation["missing"] for citation in parse_citations(row.model_summary, row.clinical_note))]
        if wrong:
            log(f"warning: {path}: {len(wrong):,} summaries cite sentences that their notes do not have: ids {some(map(safe_id, wrong))}")
    texts = defaultdict(set)
    for row in rows:
        texts[same_note_key(row.clinical_note), same_note_key(row.model_summary)].add(row.label)
    contradictions = sum(len(labels) > 1 for labels in texts.values())
    if contradictions:
        log(f"warning: {path}: {contradictions:,} pairs of note and summary are labelled both factual and hallucinated")
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
    import pandas as pd

    labels = Counter(row.label for row in rows)
    lines = [
        str(path),
        f"  rows            {len(rows):>6,}",
        f"  factual         {labels['factual']:>6,}   used in Stage A",
    ]
    lines.append(f"  hallucinated    {labels['hallucinated']:>6,}   kept for Stage B, never trained on here")
    types = Counter(safe_id(row.hallucination_type or "unnamed") for row in rows if row.label == "hallucinated")
    lines += [f"    {name:<24} {count:>4,}" for name, count in types.most_common()]
    encoder, factual = dataset.encoder, [row for row in rows if row.label == "factual"]
    tokens = pd.DataFrame(
        {
            "note": [len(ids) for ids in encoder.encode_texts([encoder.template.render_note(row.clinical_note) for row in factual])],
            "summary": [len(ids) for ids in encoder.encode_texts([row.model_summary for row in factual])],
        }
    )
    tokens["all"] = tokens["note"] + tokens["summary"] + encoder.n_template_tokens + 1
    lines.append("  tokens                    median   95th percentile   longest")
    for column, name in (("note", "note"), ("summary", "summary"), ("all", "prompt and summary")):
        median, high, longest = tokens[column].quantile([0.5, 0.95, 1.0])
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
            factual.setdefault(same_note_key(row.clinical_note), row)
    for row in rows:
        chosen = factual.get(same_note_key(row.clinical_note))
        if row.label == "hallucinated" and chosen and same_note_key(row.model_summary) != same_note_key(chosen.model_summary):
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
