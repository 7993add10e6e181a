"""Checks training data and reports on it: counts, token lengths, what will be shortened or left out.

    python sft_dataset.py                       # check the bundled data and report on it
    python sft_dataset.py --train_csv my.csv    # check your own; with --val_csv also leaks between the two

For a training loop of your own: `from sft_dataset import create_sft_dataloaders`. Everything but the report
is in sft/data."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.cli import InputError, log, plural, run_script, safe_id
from sft.data.dataset import (
    SFTCollator,
    SFTDataset,
    cites_sentences,
    create_sft_dataloaders,
    file_names,
    load_datasets,
    read_data,
)
from sft.data.preferences import export_pairs, find_pairs
from sft.data.prompt import PromptTemplate
from sft.data.report import log_data_warnings, log_unsupported_summaries
from sft.data.rows import Row, drop_stray_citations, factual_rows, shown_kinds
from sft.files import check_new_file, is_bundled, sha256
from sft.options import ReportConfig, given_names, parse_options

__all__ = ["SFTCollator", "SFTDataset", "create_sft_dataloaders"]


def describe_rows(path: str | Path, rows: Sequence[Row], dataset: SFTDataset) -> str:
    """The report on one file: counts and token lengths, never text."""
    labels = Counter(row.label for row in rows)
    types = [row.hallucination_type or "unnamed" for row in rows if row.label == "hallucinated"]
    # Names with spaces are shown if they are few and short
    types = Counter(types if shown_kinds(types) else map(safe_id, types))
    n_shortened = plural(len(dataset.shortened), "note")
    n_refused = plural(len(dataset.refused), "row")
    lines = [
        str(path),
        f"  rows            {len(rows):>6,}",
        f"  factual         {labels['factual']:>6,}   used in Stage A",
        f"  hallucinated    {labels['hallucinated']:>6,}   kept for Stage B, never trained on here",
        *(f"    {name:<24} {count:>4,}" for name, count in types.most_common()),
        "  tokens                    median   95th percentile   longest",
        *_length_lines(dataset),
        f"  {n_shortened} shortened, {n_refused} left out at --max_length {dataset.max_length}",
    ]
    return "\n".join(lines)


def _length_lines(dataset: SFTDataset) -> Iterator[str]:
    """Quantiles of the rows' lengths in tokens, before any note is shortened."""
    import numpy as np

    note, summary = dataset.lengths.T
    lengths = {"note": note, "summary": summary, "prompt and summary": dataset.whole_lengths}
    for name, n_tokens in lengths.items():
        median, high, longest = np.quantile(n_tokens, [0.5, 0.95, 1.0])
        yield f"    {name:<20} {median:>9,.0f} {high:>17,.0f} {longest:>9,.0f}"


def show_spans(dataset: SFTDataset) -> str:
    """The first example as the model sees it, and which part of it carries loss."""
    example = dataset.examples[0]
    prompt = example.input_ids[: example.n_prompt]
    target = example.input_ids[example.n_prompt :]
    lines = [f"One row as tokens (id {example.row_id}):"]
    for name, ids in (("prompt, no loss", prompt), ("summary and end token, loss", target)):
        text = dataset.encoder.tokenizer.decode(ids)
        lines += [f"  [{name}: {len(ids)} tokens]", *(f"    {line}" for line in text.split("\n"))]
    return "\n".join(lines)


def prompt_source(config: ReportConfig, rows: Sequence[Row]) -> tuple[object, PromptTemplate | None]:
    """(tokenizer, prompt) of the adapter at --model_path, whose --max_length `config` takes over; without
    one, the base model's tokenizer and None. Raises InputError for a given option, or citations in `rows`,
    that do not fit the adapter."""
    from sft.model.base import load_tokenizer

    if config.model_path is None:
        return load_tokenizer(config.model_name), None
    from sft.model.folder import read_named_folder

    decided = {"model_name", "max_length", "sentence_numbering", "instruction", "chat_template", "thinking"}
    for name in sorted(decided & given_names(config)):
        problem = f"--{name} cannot be combined with --model_path"
        raise InputError(problem, f"leave out --{name}: the adapter's own is used")
    folder, sft_config, _ = read_named_folder("--model_path", config.model_path)
    template = PromptTemplate.from_dict(sft_config["prompt"])
    config.max_length = sft_config["max_length"]
    are_cited = cites_sentences(factual_rows(rows))
    was_automatic = sft_config["training"].get("sentence_numbering", "auto") == "auto"
    if was_automatic and are_cited != template.number_sentences:
        problem = f"most summaries {'cite' if are_cited else 'do not cite'} sentences, unlike the adapter's"
        raise InputError(f"{file_names(config)[0]}: {problem}", "use the rows that it was trained on")
    return load_tokenizer(folder), template


def main() -> None:
    config = parse_options(ReportConfig, __doc__.partition("\n")[0])
    check_new_file("--export_preferences", config.export_preferences, (".jsonl",))
    if "seed" in given_names(config) and config.val_fraction is None:
        log("info: --seed has no effect without --val_fraction")
    rows = read_data(config, validate=False)
    from sft.model.base import own_settings

    with own_settings():
        report(config, rows, *prompt_source(config, rows[0]))


def report(
    config: ReportConfig, rows: tuple[list[Row], list[Row]], tokenizer, template: PromptTemplate | None
) -> None:
    """Prints the report on rows that have been read, and exports their pairs."""
    datasets = load_datasets(rows, tokenizer, config, template=template)
    encoder = datasets[0].encoder
    if config.export_preferences:
        # Neither side has citations that the prompt or the note does not support, as in training
        supported, _ = drop_stray_citations(rows[0], encoder.template.cited_version)
        pairs = find_pairs(file_names(config)[0], supported, encoder, config.max_length)
    for path, part, dataset in zip(file_names(config), rows, datasets):
        if part:
            print(describe_rows(path, part, dataset) + "\n")
    log_data_warnings(rows, datasets, config)
    log_unsupported_summaries(file_names(config)[0], rows[0])
    numbered = "numbered" if encoder.template.number_sentences else "not numbered"
    print(f"The note's sentences are {numbered} in the prompt.")
    if all(is_bundled(sha256(Path(file))) for file in config.train_files):
        print("\n" + show_spans(datasets[0]))
    if config.export_preferences:
        if template is None:
            log(
                f"info: the prompt is that of --model_name {config.model_name}; --model_path uses an adapter's own"
            )
        export_pairs(Path(config.export_preferences), pairs, encoder)


if __name__ == "__main__":
    run_script(main)
