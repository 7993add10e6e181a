"""What looks wrong in the data: warnings by kind, with rows' ids or numbers, never their text."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from sft.cli import Progress, log, on_main_process, plural, preview_list
from sft.data.dataset import SFTDataset, file_names
from sft.data.formats import describe_problem, main_language
from sft.data.rows import Row, factual_rows, leaked_rows, name_rows, repeated_rows
from sft.grounding.check import TRAINING_THRESHOLD, PreparedNote
from sft.grounding.citations import strip_citations, unreadable_citations
from sft.options import DataOptions

_MAX_CHECKED = 2_000  # training summaries
_FEW_NOTES = 2  # may have the same summary by chance
_NUMBERS_AND_WORDS = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]{5,}")


def log_data_warnings(
    rows: tuple[list[Row], list[Row]], datasets: tuple[SFTDataset, SFTDataset], options: DataOptions
) -> None:
    """Logs what was shortened or refused and what looks wrong in each file, then leaks between the two, by
    row number or id. On the main process only."""
    if not on_main_process():
        return
    train, validation = (factual_rows(part) for part in rows)
    language = main_language([row.clinical_note for row in train])
    for path, part, dataset in zip(file_names(options), rows, datasets):
        for warning in (*_length_warnings(dataset), *_text_warnings(part, dataset, language)):
            log(f"warning: {path}: {warning}")
    # Hallucinated rows are not trained on, so their notes give nothing away
    leaks = [
        f"{row.name} ({share:.0%} like {twin.name})" for row, twin, share in leaked_rows(train, validation)
    ]
    if leaks:
        share = "shares its" if len(leaks) == 1 else "share their"
        log(
            f"warning: {plural(len(leaks), 'validation row')} {share} note, or nearly, with training rows, so"
            f" validation loss will look better than it is: {preview_list(leaks)}; remove them from one file"
        )


def log_unsupported_summaries(path: str, rows: Sequence[Row]) -> None:
    """Checks the factual summaries of a training file against their notes, of many a sample that is always
    the same. Logs which rows state what their notes do not support, the worst first."""
    rows = factual_rows(rows)
    n_rows = len(rows)
    rows = random.Random(0).sample(rows, min(n_rows, _MAX_CHECKED))
    progress = Progress(len(rows), "checked row")
    risks = {}
    kinds = Counter()
    n_other = 0
    for row in rows:
        check = PreparedNote(row.clinical_note).check(row.model_summary, TRAINING_THRESHOLD)
        n_other += check.language != "en"
        if any(sentence.flagged for sentence in check.sentences):
            risks[row.name] = check.risk
            kinds.update({finding.kind for finding in check.findings})
        progress.advance()
    progress.close()
    if len(rows) < n_rows:
        log(
            f"info: {path}: checked a sample of {len(rows):,} of {n_rows:,} training summaries against their notes"
        )
    if n_other:
        log(
            f"info: {path}: {plural(n_other, 'row')} not checked against the note: the check reads English only"
        )
    if risks:
        worst = sorted(risks, key=lambda name: -risks[name])
        found = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
        log(
            f"warning: {path}: {len(risks):,} of {plural(len(rows), 'training row')} have summaries that may state what the note does not"
            f" support, which teaches a model to invent; read them ({found}): {name_rows(worst, 20)}"
        )


def _length_warnings(dataset: SFTDataset) -> Iterator[str]:
    limit = f"--max_length {dataset.max_length}"
    takes = getattr(dataset.encoder.tokenizer, "model_max_length", None) or 0
    enough = f"--max_length {dataset.whole_length:,} would hold all rows whole".replace(",", "")
    if dataset.whole_length > takes > 0:
        enough += f", but the model takes {takes} tokens"
    n_tokens = dataset.lengths[:, 0].sum()
    if dataset.shortened:
        n_kept = sum(e.n_prompt - dataset.encoder.n_template_tokens for e in dataset.examples if e.shortened)
        n_whole = sum(
            dataset.lengths[i, 0] for i, e in zip(dataset.row_indices, dataset.examples) if e.shortened
        )
        share = (n_whole - n_kept) / n_tokens
        n_notes = plural(len(dataset.shortened), "note")
        yield (
            f"{n_notes} shortened to fit {limit}, which cuts {share:.1%} of the text of all notes; {enough}:"
            f" {name_rows(dataset.shortened)}"
        )
        resting = list(_resting_on_what_was_cut(dataset))
        if resting:
            yield (
                f"{len(resting):,} of their summaries have words or numbers that stand only in the part that is"
                f" cut, which teaches a model to invent: {name_rows(resting)}"
            )
    if dataset.refused:
        n_rows = plural(len(dataset.refused), "row")
        names = name_rows(name for name, _ in dataset.refused)
        share = 1 - dataset.lengths[dataset.row_indices, 0].sum() / n_tokens
        yield (
            f"{n_rows} left out, with {share:.1%} of the text of all notes: the summary and any sentences it"
            f" cites do not fit in {limit}; {enough}: {names}"
        )


def _resting_on_what_was_cut(dataset: SFTDataset) -> Iterator[str]:
    """The rows whose summary has a number, or two longer words, that only the cut part of the note has."""

    def words(text: str) -> set[str]:
        return set(_NUMBERS_AND_WORDS.findall(text.casefold()))

    encoder = dataset.encoder
    for i, example in zip(dataset.row_indices, dataset.examples):
        if example.shortened:
            note_ids = example.input_ids[len(encoder.prefix_ids) : example.n_prompt - len(encoder.suffix_ids)]
            row = dataset.rows[i]
            only_there = words(row.clinical_note) - words(encoder.tokenizer.decode(note_ids))
            found = words(strip_citations(row.model_summary)) & only_there
            if len(found) > 1 or any(word[0].isdigit() for word in found):
                yield row.name


def _text_warnings(rows: Sequence[Row], dataset: SFTDataset, language: str | None) -> Iterator[str]:
    kinds = defaultdict(list)
    for row in rows:
        problem = describe_problem(row.clinical_note, language)
        if problem:
            kinds[problem].append(row.name)
    for problem, names in kinds.items():
        yield f"{plural(len(names), 'row')} whose note {problem}: {name_rows(names)}"
    unreadable = [row.name for row in rows if unreadable_citations(row.model_summary)]
    if unreadable:
        yield f"{plural(len(unreadable), 'row')} with citations that cannot be read: {name_rows(unreadable)}"
    if dataset.stray:
        why = "cite sentences that their notes do not have"
        if not dataset.encoder.template.number_sentences:
            why = "cite sentences, which the prompt does not number (--sentence_numbering on does)"
        n_rows = plural(len(dataset.stray), "row")
        yield f"{n_rows} whose summaries {why}; their citations were dropped: {name_rows(dataset.stray)}"
    labels = defaultdict(set)
    for row in rows:
        labels[row.note_key, row.summary_key].add(row.label)
    contradicted = [row.name for row in rows if len(labels[row.note_key, row.summary_key]) > 1]
    if contradicted:
        n_pairs = plural(sum(len(given) > 1 for given in labels.values()), "pair")
        yield f"{n_pairs} of note and summary labeled both factual and hallucinated: {name_rows(contradicted)}"
    for what, repeated in repeated_rows(rows).items():
        n_rows = plural(len(repeated), "row")
        repeat, word = ("repeats", "row") if len(repeated) == 1 else ("repeat", "rows")
        numbers = preview_list(f"{row.source} {row.number}".strip() for row in repeated)
        yield f"{n_rows} {repeat} {what}: {word} {numbers}"
    yield from _same_summary(factual_rows(rows))


def _same_summary(rows: Sequence[Row]) -> Iterator[str]:
    notes = {(row.note_key, row.summary_key): row for row in rows}
    counts = Counter(summary for _, summary in notes)
    summary, count = max(counts.items(), key=lambda item: item[1], default=(b"", 0))
    if count > max(_FEW_NOTES, len(notes) / 5):
        names = [row.name for row in notes.values() if row.summary_key == summary]
        yield f"one summary stands under {count:,} of {len(notes):,} different notes: {name_rows(names)}"
