"""Is the specialist better? Base, specialist and simple baselines on the same held-out notes, and a page that
shows it.

    python sft_evaluation.py                                    # the bundled specialist and test notes
    python sft_evaluation.py --model_path FOLDER --test_csv test.csv --train_csv train.csv
    python sft_evaluation.py --blind_sheet                      # also a sheet to read without bias
    python sft_evaluation.py --ratings ratings.csv              # count what was read

Writes report.html, evaluation.json and .csv (figures, no text), and each system's summaries, to --output_dir;
nothing into the adapter's folder. An interrupted run continues where it was.
"""

import hashlib
import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sft import __version__
from sft.cli import InputError, log, plural, preview_list, run_script, safe_id
from sft.data.prompt import PromptTemplate
from sft.data.rows import Row, drop_stray_citations, factual_rows, leaked_rows, read_rows, shown_kinds
from sft.data.table import OPTION_OF_COLUMN, column_name, read_table
from sft.evaluation import figures, measures, page, sheet, systems
from sft.evaluation.options import EvaluationConfig
from sft.files import ROOT, make_private_dir, sha256, write_json
from sft.grounding import PreparedNote
from sft.inference.writing import read_selector
from sft.model.folder import quantization_for, read_adapter_folder
from sft.options import parse_options
from sft_inference import SFTInference

# Adapters trained on these files are tested on those unless told otherwise
_BUNDLED = [
    (f"phase1_data/sft/train_set_{kind}.csv", f"phase1_data/sft/test_set_{kind}.csv")
    for kind in ("processed", "evidence")
]
_LEAST_NOTES = 5  # of a group that is reported on its own


class Adapter(NamedTuple):
    number: str  # "_1", "_2", ...: the end of its systems' names; "" if it is the only one
    folder: Path
    sft_config: dict
    is_merged: bool
    has_selector: bool


class Column(NamedTuple):
    """A system with the adapter that it needs."""

    name: str
    system: systems.System
    adapter: Adapter


class Data(NamedTuple):
    test_file: Path
    rows: dict[int, Row]  # the factual test rows that are summarized, by their place
    all_rows: list[Row]  # of the test file
    training: list[Row]  # factual; empty if unknown
    n_leaked: int
    version: int  # of the notes' sentence numbers


def read_adapters(paths: Sequence[str], prompt_from: str | None = None) -> list[Adapter]:
    """Raises InputError for a folder that cannot be used."""
    found = []
    for number, path in enumerate(paths, 1):
        folder, sft_config, adapter_config = read_adapter_folder(path, prompt_from)
        try:
            has_selector = bool(read_selector(sft_config))
        except InputError:
            has_selector = False
        end = f"_{number}" if len(paths) > 1 else ""
        found.append(Adapter(end, folder, sft_config, not adapter_config, has_selector))
        if end:
            log(f"Adapter {number}: {folder}")
    for key, what in (("base_weights", "base models"), ("train_csv", "training rows")):
        if len({adapter.sft_config["sha256"].get(key) for adapter in found}) > 1:
            log(f"info: the adapters have different {what}: those of the first count")
    return found


def find_files(config: EvaluationConfig, adapters: Sequence[Adapter]) -> tuple[Path, list[Path]]:
    """(test file, training files): those named, or the bundled ones for adapters trained on them. Raises
    InputError if there is no test file, or the training files are not those that were trained on."""
    recorded = {adapter.sft_config["sha256"].get("train_csv") for adapter in adapters}
    bundled = [(ROOT / train, ROOT / test) for train, test in _BUNDLED if (ROOT / train).is_file()]
    own = [(train, test) for train, test in bundled if recorded == {sha256(train)}]
    if config.test_csv is None and not own:
        problem = "no test rows: the bundled test file says nothing about an adapter trained on other rows"
        raise InputError(problem, "pass --test_csv FILE with rows that were not trained on")
    test_file = Path(config.test_csv or own[0][1])
    if config.train_csv is None:
        return test_file, [train for train, _ in own]
    files = [Path(file) for file in config.train_csv]
    hashes = [sha256(file) for file in files if file.is_file()]
    found = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    # A file that is not there is refused where it is read
    if len(hashes) == len(files) and found != adapters[0].sft_config["sha256"].get("train_csv"):
        problem = f"--train_csv {preview_list(map(str, files))}: not what the adapter was trained on (SHA-256 differs)"
        raise InputError(problem, "pass the same files, unchanged, in the same order; or leave it out")
    return test_file, files


def read_data(config: EvaluationConfig, adapters: Sequence[Adapter]) -> Data:
    test_file, train_files = find_files(config, adapters)
    template = PromptTemplate.from_dict(adapters[0].sft_config["prompt"])
    version = template.sentence_version if template.number_sentences else None
    all_rows = read_rows(test_file, config)
    rows, _ = drop_stray_citations(factual_rows(all_rows), version)
    if len(rows) < 2:
        problem = f"{test_file}: {plural(len(rows), 'row')} labeled factual: too few to evaluate"
        raise InputError(problem, "add rows: 40 or more give useful intervals")
    training = [row for file in train_files for row in factual_rows(read_rows(file, config))]
    training, _ = drop_stray_citations(training, version)
    n_rows = min(len(rows), config.n_rows or len(rows))
    chosen = {number: rows[number] for number in sorted(random.Random(0).sample(range(len(rows)), n_rows))}
    n_leaked = len(leaked_rows(training, list(chosen.values())))
    if n_leaked:
        leaked = f"{plural(n_leaked, 'test note')} of {n_rows:,}"
        log(f"warning: {leaked} are training notes, or nearly: the figures flatter")
    return Data(test_file, chosen, all_rows, training, n_leaked, template.sentence_version)


def why_left_out(system: systems.System, adapter: Adapter, data: Data) -> str:
    if system.needs_training_rows and not data.training:
        return "it needs --train_csv"
    if system.model == "base" and adapter.is_merged:
        return "a merged model has no base apart"
    lacks_selector = system.writing != "free" and not adapter.has_selector
    return "the adapter has no selector of note sentences" if lacks_selector else ""


def choose_columns(names: Sequence[str] | None, adapters: Sequence[Adapter], data: Data) -> list[Column]:
    """The systems to compare, those of a specialist once for each adapter. Says which are left out, and why.
    Raises InputError for an unknown name."""
    known = [system.name for system in systems.SYSTEMS]
    names = names or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        problem = f"--systems: unknown: {preview_list(map(safe_id, unknown))}"
        raise InputError(problem, f"choose of: {' '.join(known)}")
    # Adapters with a selector fitted it on the same rows
    if "quote" in names and all(adapter.has_selector for adapter in adapters):
        names = [name for name in names if name != "selected"]
    columns = []
    for system in (system for system in systems.SYSTEMS if system.name in names):
        is_own = system.model == "specialist"
        for adapter in adapters if is_own else adapters[:1]:
            column = Column(system.name + adapter.number * is_own, system, adapter)
            reason = why_left_out(system, adapter, data)
            columns += [] if reason else [column]
            if reason:
                log(f"info: {column.name} is left out: {reason}")
    if not columns:
        raise InputError("--systems: none of them can be evaluated here", "pass --train_csv, or other names")
    return columns


def check_output_dir(folder: Path, adapters: Sequence[Adapter]) -> None:
    """Raises InputError if the report would lie in an adapter's folder, whose files are hashed."""
    inside = any(folder.resolve().is_relative_to(adapter.folder.resolve()) for adapter in adapters)
    if inside or (folder.exists() and not folder.is_dir()):
        why = "lies in the adapter's folder" if inside else "is not a folder"
        raise InputError(f"--output_dir {folder} {why}", "choose another --output_dir")


def group_rows(config: EvaluationConfig, data: Data) -> dict[str, list[int]]:
    """{value of --by: numbers of its rows}; by note length in thirds. Raises InputError if the column is
    missing or its values are no kinds."""
    groups: dict[str, list[int]] = {}
    if config.by is None:
        return groups
    if column_name(config.by) == "note_length":
        lengths = {number: len(row.clinical_note.split()) for number, row in data.rows.items()}
        by_length = sorted(lengths, key=lengths.get)
        third = -(-len(by_length) // 3)
        parts = [by_length[start : start + third] for start in range(0, len(by_length), third)]
        return {f"{lengths[part[0]]} to {lengths[part[-1]]} words": part for part in parts}
    names = {ours: getattr(config, option.removeprefix("--")) for ours, option in OPTION_OF_COLUMN.items()}
    table = read_table(data.test_file, [], Counter(), names)
    values = {number: cells.get(column_name(config.by)) for number, cells, _ in table}
    where = f"--by {safe_id(config.by)}"
    if None in values.values():
        raise InputError(f"{where}: {data.test_file} has no such column in each row", "check its name")
    chosen = {number: values[row.number].strip() for number, row in data.rows.items()}
    if shown_kinds(chosen.values()) is None:
        problem = f"{where}: too many different values, or too long ones, to be groups"
        raise InputError(problem, "choose a column such as specialty or source")
    for number, value in chosen.items():
        groups.setdefault(value or "(empty)", []).append(number)
    return {value: numbers for value, numbers in groups.items() if len(numbers) >= _LEAST_NOTES}


def fingerprint(column: Column, data: Data, config: EvaluationConfig) -> dict:
    """All that decides a column's summaries: hashes and settings."""
    system, adapter = column.system, column.adapter

    def digest_rows(rows: Sequence[Row]) -> str:
        return systems.digest([(row.note_key.hex(), row.summary_key.hex()) for row in rows])

    values = {"system": system.name, "rows": digest_rows(factual_rows(data.all_rows)), "toolkit": __version__}
    if system.needs_training_rows:
        values["training rows"] = digest_rows(data.training)
    if system.model == "specialist":
        values["adapter"] = adapter.sft_config["sha256"]["folder"]
    if system.model and system.writing != "quote":
        from sft.model.base import pick_device

        values |= {
            "base model": adapter.sft_config["sha256"]["base_weights"],
            "prompt": systems.digest(adapter.sft_config["prompt"]),
            "max_new_tokens": config.max_new_tokens or adapter.sft_config["max_new_tokens"],
            "dtype": str(pick_device(config.device, config.dtype).dtype),
            "quantization": quantization_for(vars(config), adapter.sft_config),
        }
    return values


def load(model: str, adapter: Adapter, config: EvaluationConfig) -> SFTInference:
    """A specialist, whose model is loaded once it is needed, or its base model."""
    names = ("prompt_from", "device", "dtype", "quantization", "use_8bit", "use_4bit")
    options = {name: getattr(config, name) for name in names}
    if model == "specialist":
        return SFTInference(adapter.folder, writing="quote" if adapter.has_selector else "free", **options)
    inference = SFTInference(adapter.folder, writing="free", merge=False, **options)
    systems.remove_adapter(inference)
    return inference


def write_summaries(
    columns: Sequence[Column], data: Data, config: EvaluationConfig
) -> dict[str, dict[int, dict]]:
    """{column: {number: result}}, of which files hold what earlier runs wrote."""
    folder = make_private_dir(Path(config.output_dir))
    numbers = list(data.rows)
    # Each model is loaded once
    columns = sorted(columns, key=lambda column: (column.system.model, column.adapter.number))
    files = {c.name: systems.SystemFile(folder, c.name, fingerprint(c, data, config)) for c in columns}
    models = [c.name for c in columns if c.system.model and c.system.writing != "quote"]
    missing = {name: len(files[name].missing(numbers)) for name in models if files[name].missing(numbers)}
    n_missing = sum(missing.values())

    def estimate(seconds: float) -> None:
        log(f"{n_missing:,} summaries will take about {seconds * n_missing / 60:,.1f} min")

    inference, loaded = None, None
    for column in columns:
        system, file = column.system, files[column.name]
        if not file.missing(numbers):
            continue
        if not system.model:
            texts = systems.write_without_model(system.name, data.rows, data.training)
            file.write(numbers, lambda part, _, t=texts: ((n, {"generated_summary": t[n]}) for n in part))
            continue
        log(f"{column.name}: {system.says}")
        if loaded != (system.model, column.adapter.number):
            inference = None  # one model is in memory at a time
            inference = load(system.model, column.adapter, config)
            loaded = (system.model, column.adapter.number)
        examples = data.training if system.needs_training_rows else []
        settings = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
        write = systems.write_with_model(inference, system, data.rows, examples, settings)
        file.write(numbers, write, estimate if column.name in list(missing)[:1] else None)
    return {column.name: files[column.name].results for column in columns}


def measure_all(columns: Sequence[Column], results: Mapping, data: Data) -> dict:
    """{column: {number: Measured}}. The loss of an adapter stands with each of its ways of writing."""
    rouge = measures.make_scorer()
    expected = measures.usual_marks(row.model_summary for row in data.training or data.rows.values())
    free = {column.adapter.number: column.name for column in columns if column.system.name == "free"}
    measured: dict[str, dict] = {column.name: {} for column in columns}
    for number, row in data.rows.items():
        note = PreparedNote(row.clinical_note, data.version)
        for name, system, adapter in columns:
            result = results[name][number]
            if system.model == "specialist" and adapter.number in free:
                own = results[free[adapter.number]][number]
                result = {"reference_loss": own.get("reference_loss", (0, 0)), **result}
            measured[name][number] = measures.measure(row, note, result, rouge, expected, data.version)
    measures.add_memorized(measured, data.rows, data.training)
    return measured


def evaluate(columns: Sequence[Column], groups: Mapping, measured: Mapping, data: Data) -> dict:
    """What evaluation.json holds: figures and hashes, no text."""
    names = list(measured)
    found = figures.figures(figures.sums_table(measured, list(data.rows)), names)
    answers = {
        c.name: figures.answer_questions(found, c.name) for c in columns if c.system.model == "specialist"
    }
    kinds = [row.hallucination_type for row in data.all_rows if row.label == "hallucinated"]
    twins = figures.twins(data.all_rows)
    tables = {name: figures.sums_table(measured, numbers) for name, numbers in groups.items()}
    return {
        "toolkit": __version__,
        "test_csv_sha256": sha256(data.test_file),
        "systems": {c.name: c.system.says for c in columns},
        "adapters": {c.adapter.number.strip("_") or "1": c.adapter.sft_config["sha256"]["folder"] for c in columns},
        "n_notes": len(data.rows),
        "n_leaked": data.n_leaked,
        "figures": found,
        "changes": {name: dict(zip(("better", "worse"), figures.changes(found, name))) for name in answers},
        "answers": answers,
        "verdicts": {name: figures.verdict(given) for name, given in answers.items()},
        "twins": {kind: twin for kind, twin in twins.items() if kind == "all" or shown_kinds(kinds)},
        "groups": {
            name: {"n_notes": len(table), "figures": figures.figures(table, names)} for name, table in tables.items()
        },
    }  # fmt: skip


def print_table(evaluation: Mapping) -> None:
    """The headline figures and the four answers, to standard output."""
    widths = {name: max(10, len(name) + 2) for name in evaluation["figures"]}
    print(" " * 46 + "".join(name.rjust(width) for name, width in widths.items()))
    for row in page.figure_rows(evaluation["figures"], measures.HEADLINE):
        values = (cell["value"].rjust(widths[cell["system"]]) for cell in row["cells"])
        print(row["title"].ljust(46) + "".join(values))
    for name, answers in evaluation["answers"].items():
        print(f"\n{name}: {evaluation['verdicts'][name]}")
        for answer in answers:
            print(f"  {answer['question']} {page.ANSWERS[answer['passed']]}")
            print(f"      {answer['figure']}\n      asked for: {answer['threshold']}")


def main() -> None:
    description = "Compares a specialist with its base model and simple baselines on held-out notes."
    config = parse_options(EvaluationConfig, description)
    folder = Path(config.output_dir)
    if config.ratings:
        print(sheet.report_ratings(folder, config.ratings))
        return
    if importlib.util.find_spec("rouge_score") is None:
        raise InputError("rouge-score is not installed", "run pip install -r requirements_training.txt")
    adapters = read_adapters(config.model_path, config.prompt_from)
    check_output_dir(folder, adapters)
    data = read_data(config, adapters)
    groups = group_rows(config, data)
    columns = choose_columns(config.systems, adapters, data)
    measured = measure_all(columns, write_summaries(columns, data, config), data)
    evaluation = evaluate(columns, groups, measured, data)
    write_json(folder / "evaluation.json", evaluation)
    page.write_csv(folder / "evaluation.csv", data.rows, measured)
    page.write_report(folder / "report.html", data.rows, measured, evaluation, data.version)
    if config.blind_sheet:
        texts = {name: {n: one.summary for n, one in ones.items()} for name, ones in measured.items()}
        sheet.write_sheet(folder, data.rows, texts)
        log(f"The blind sheet is {folder / 'blind_sheet.html'}; its CSV and its key are beside it")
    print_table(evaluation)
    sys.stdout.flush()
    log(f"The report is {folder / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
