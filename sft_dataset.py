"""Checked rows -> prompt -> tokens -> batches, and the report on them. Knows no model and no device.

    python sft_dataset.py                       # check the bundled data and report on it
    python sft_dataset.py --train_csv my.csv    # check your own

Reading the CSV is sft_rows.py's, the prompt and its tokens are sft_prompt.py's.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.cli import log, run_script, safe_id
from sft.data.dataset import SFTDataset, load_datasets, warn_about_leaks, warn_about_rows
from sft.data.prompt import PromptTemplate
from sft.data.rows import Row, factual_rows, leaked_rows, read_rows, repeated_rows
from sft.files import ROOT, check_new_file, sha256, write_atomic
from sft.options import ReportConfig, parse_options

if TYPE_CHECKING:
    pass


# ------------------------------------------------------------------------------------------------ examples


# ------------------------------------------------------------------------------------------------ token cache


# ------------------------------------------------------------------------------------------------ both sets


# ------------------------------------------------------------------------------------------------ batches


# ------------------------------------------------------------------------------------------------ report


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
    types = Counter(
        safe_id(row.hallucination_type or "unnamed") for row in rows if row.label == "hallucinated"
    )
    lines += [f"    {name:<24} {count:>4,}" for name, count in types.most_common()]
    note, summary = dataset.lengths.T
    spans = (
        ("note", note),
        ("summary", summary),
        ("prompt and summary", note + summary + dataset.encoder.n_template_tokens + 1),
    )
    lines.append("  tokens                    median   95th percentile   longest")
    for name, n_tokens in spans:
        median, high, longest = np.quantile(n_tokens, [0.5, 0.95, 1.0])
        lines.append(f"    {name:<20} {median:>9,.0f} {high:>17,.0f} {longest:>9,.0f}")
    fit = f"shortened, {len(dataset.refused):,} rows refused at --max_length {dataset.max_length}"
    return "\n".join(
        [*lines, f"  {len(dataset.shortened):,} notes {fit}; {len(repeated_rows(rows)):,} repeated rows"]
    )


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
        ReportConfig,
        "Checks training data and reports on it: counts, token lengths, what will be shortened or refused.",
    )
    check_new_file("--export_preferences", config.export_preferences)
    rows = read_rows(config.train_csv), read_rows(config.val_csv)
    for part, path in zip(rows, (config.train_csv, config.val_csv)):
        factual_rows(part, path)

    from sft.model.base import load_tokenizer

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
        write_atomic(
            Path(config.export_preferences),
            "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs),
        )
        log(f"Wrote {len(pairs):,} preference pairs to {config.export_preferences}")


if __name__ == "__main__":
    run_script(main)
