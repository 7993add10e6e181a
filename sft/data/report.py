"""What looks wrong in the data: warnings by kind, with rows' ids or numbers, never their text."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from sft.cli import Progress, log, on_main_process, plural, preview_list
from sft.data.dataset import Example, SFTDataset, file_names
from sft.data.formats import describe_problem, main_language
from sft.data.rows import Row, contradicted_texts, factual_rows, leaked_rows, name_rows, repeated_rows
from sft.data.table import plain
from sft.grounding.check import TRAINING_THRESHOLD, PreparedNote
from sft.grounding.citations import strip_citations, unreadable_citations
from sft.options import DataOptions

_MAX_CHECKED = 2_000  # training summaries
_FEW_NOTES = 2  # may have the same summary by chance
_NO_TYPE = frozenset(("", *"none no n/a na nan null factual false 0 -".split()))
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
        what = "with the note of a training row, or nearly, so validation loss will look better than it is"
        n_rows = plural(len(leaks), "validation row")
        log(f"warning: {n_rows} {what}: {preview_list(leaks)}; remove them from one file")


def log_unsupported_summaries(path: str, rows: Sequence[Row]) -> None:
    """Checks the factual summaries of a training file against their notes, of many a sample that is always
    the same. Logs which rows state what their notes do not support, the worst first."""
    rows = factual_rows(rows)
    n_rows = len(rows)
    rows = random.Random(0).sample(rows, min(n_rows, _MAX_CHECKED))
    progress = Progress(len(rows), "checked row")
    risks = []  # (risk, name): rows may share a name
    kinds = Counter()
    n_other = 0
    for row in rows:
        check = PreparedNote(row.clinical_note).check(row.model_summary, TRAINING_THRESHOLD)
        n_other += check.language != "en"
        if any(sentence.flagged for sentence in check.sentences):
            risks.append((check.risk, row.name))
            kinds.update({finding.kind for finding in check.findings})
        progress.advance()
    progress.close()
    if len(rows) < n_rows:
        sample = f"a sample of {len(rows):,} of {n_rows:,} training summaries"
        log(f"info: {path}: checked {sample} against their notes")
    if n_other:
        unchecked = f"{plural(n_other, 'row')} not checked against the note"
        log(f"info: {path}: {unchecked}: the check reads English only")
    if risks:
        worst = [name for _, name in sorted(risks, key=lambda found: found[0], reverse=True)]
        found = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
        what = "may state what the note does not support, which teaches a model to invent"
        n_found = f"{len(risks):,} of {plural(len(rows), 'training row')} have summaries that {what}"
        log(f"warning: {path}: {n_found}; read them ({found}): {name_rows(worst, 20)}")


def _length_warnings(dataset: SFTDataset) -> Iterator[str]:
    limit = f"--max_length {dataset.max_length}"
    enough = dataset.enough
    whole = dataset.lengths[:, 0]
    cut = [(i, example) for i, example in zip(dataset.row_indices, dataset.examples) if example.shortened]
    if cut:
        n_cut = sum(whole[i] - example.n_prompt + dataset.encoder.n_template_tokens for i, example in cut)
        share = f"which cuts {n_cut / whole.sum():.1%} of the text of all notes"
        names = name_rows(dataset.shortened)
        yield f"{plural(len(cut), 'note')} shortened to fit {limit}, {share}; {enough}: {names}"
        resting = [example.row_id for i, example in cut if _rests_on_what_was_cut(dataset, i, example)]
        if resting:
            where = "stand only in the part that is cut, which teaches a model to invent"
            n_rows = f"{len(resting):,} of their summaries"
            yield f"{n_rows} have words or numbers that {where}: {name_rows(resting)}"
    if dataset.refused:
        names = name_rows(name for name, _ in dataset.refused)
        share = f"{1 - whole[dataset.row_indices].sum() / whole.sum():.1%} of the text of all notes"
        why = f"the summary and any sentences it cites do not fit in {limit}"
        yield f"{plural(len(dataset.refused), 'row')} left out, with {share}: {why}; {enough}: {names}"


def _rests_on_what_was_cut(dataset: SFTDataset, index: int, example: Example) -> bool:
    """Whether a row's summary has a number, or two longer words, that only the cut part of the note has."""

    def words(text: str) -> set[str]:
        return set(_NUMBERS_AND_WORDS.findall(text.casefold()))

    row = dataset.rows[index]
    encoder = dataset.encoder
    kept = example.input_ids[len(encoder.prefix_ids) : example.n_prompt - len(encoder.suffix_ids)]
    only_in_cut = words(row.clinical_note) - words(encoder.tokenizer.decode(kept))
    found = words(strip_citations(row.model_summary)) & only_in_cut
    return len(found) > 1 or any(word[0].isdigit() for word in found)


def _text_warnings(rows: Sequence[Row], dataset: SFTDataset, language: str | None) -> Iterator[str]:
    found = defaultdict(list)
    contradicted = contradicted_texts(rows)
    for row in rows:
        problem = describe_problem(row.clinical_note, language)
        if problem:
            found[f"whose note {problem}"].append(row.name)
        if unreadable_citations(row.model_summary):
            found["with citations that cannot be read"].append(row.name)
        if row.texts_key in contradicted:
            found["whose note and summary are labeled both factual and hallucinated"].append(row.name)
        if row.label == "factual" and plain(row.hallucination_type) not in _NO_TYPE:
            found["labeled factual that name a hallucination_type"].append(row.name)
    why = "cite sentences that their notes do not have"
    if dataset.encoder.template.cited_version is None:
        why = "cite sentences, which the prompt does not number (--sentence_numbering on does)"
    found[f"whose summaries {why}; their citations were dropped"] = dataset.stray
    for what, repeated in repeated_rows(rows).items():
        # By number, since their ids may be those of other rows
        found[f"with {what}"] = [f"{row.source} row {row.number}".strip() for row in repeated]
    for what, names in found.items():
        if names:
            yield f"{plural(len(names), 'row')} {what}: {name_rows(names)}"
    notes = {row.texts_key: row for row in factual_rows(rows)}
    counts = Counter(row.summary_key for row in notes.values())
    for summary, count in counts.most_common(1):
        if count > max(_FEW_NOTES, len(notes) / 5):
            names = [row.name for row in notes.values() if row.summary_key == summary]
            yield f"one summary stands under {count:,} of {len(notes):,} different notes: {name_rows(names)}"
