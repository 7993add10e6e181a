"""Is the specialist better? Base, specialist and simple baselines on the same held-out notes, and a page that
shows it.

    python sft_evaluation.py                                    # the bundled specialist and test notes
    python sft_evaluation.py --model_path FOLDER --test_csv test.csv --train_csv train.csv
    python sft_evaluation.py --blind_sheet                      # also a sheet to read without bias
    python sft_evaluation.py --ratings ratings.csv              # count what was read

Writes report.html, evaluation.json and .csv (figures, no text), and each system's summaries, to --output_dir;
nothing into the adapter's folder. An interrupted run continues where it was."""

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sft import __version__
from sft.cli import InputError, Progress, Stopped, log, noted_signals, plural, run_script, safe_id
from sft.data.prompt import PromptTemplate
from sft.data.rows import Row, drop_stray_citations, factual_rows, leaked_rows, read_rows, shown_kinds
from sft.data.table import OPTION_OF_COLUMN, column_name, read_table
from sft.evaluation import figures, measures, page, sheet, systems
from sft.evaluation.systems import Adapter, System
from sft.files import (
    ROOT,
    check_new_file,
    check_outside_models,
    make_private_dir,
    sha256,
    sha256_of_files,
    write_json,
)
from sft.inference.writing import read_selector
from sft.model.folder import quantization_for, read_adapter_folder
from sft.options import EvaluationConfig, parse_options
from sft_inference import SFTInference

_LEAST_NOTES = 5  # of a group that is reported on its own


class Data(NamedTuple):
    test_file: str
    rows: dict[int, Row]  # the factual test rows that are summarized, by their place
    all_rows: list[Row]  # of the test file
    training: list[Row]  # factual; empty if unknown
    n_leaked: int
    version: int  # of the notes' sentence numbers


def read_adapters(paths: Sequence[str], prompt_from: str | None = None) -> list[Adapter]:
    """Raises InputError for a folder that cannot be used."""
    found = []
    for number, path in enumerate(paths, 1):
        folder, sft_config, _ = read_adapter_folder(path, prompt_from)
        has_selector = False
        with contextlib.suppress(InputError):
            has_selector = bool(read_selector(sft_config))
        end = f"_{number}" if len(paths) > 1 else ""
        found.append(Adapter(end, folder, sft_config, has_selector))
        if end:
            log(f"Adapter {number}: {folder}")
    for key, what in (("base_weights", "base models"), ("train_csv", "training rows")):
        if len({adapter.sft_config["sha256"].get(key) for adapter in found}) > 1:
            log(f"info: the adapters have different {what}: those of the first count")
    return found


def find_files(config: EvaluationConfig, recorded: str | None) -> tuple[list[str], list[str]]:
    """(test files, training files): those named, or the bundled ones for an adapter trained on them. Raises
    InputError if the training files are not those with the `recorded` SHA-256."""
    test_files, train_files = [config.test_csv] if config.test_csv else [], config.train_csv or []
    # A file that is not there is refused where it is read
    are_there = bool(train_files) and all(Path(file).is_file() for file in train_files)
    if are_there and sha256_of_files(train_files) != recorded:
        problem = f"--train_csv {' '.join(train_files)}: not what the adapter was trained on (by SHA-256)"
        raise InputError(problem, "pass the same files, unchanged, in the same order; or leave it out")
    for kind in ("processed", "evidence"):
        bundled = ROOT / f"phase1_data/sft/train_set_{kind}.csv"
        if bundled.is_file() and sha256(bundled) == recorded:
            train_files = train_files or [str(bundled)]
            test_files = test_files or [str(bundled.with_name(f"test_set_{kind}.csv"))]
    return test_files, train_files


def read_data(config: EvaluationConfig, sft_config: dict) -> Data:
    """Raises InputError if there are too few rows. Preferences are about the training rows."""
    test_files, train_files = find_files(config, sft_config["sha256"].get("train_csv"))
    what, files = ("train", train_files) if config.export_preferences else ("test", test_files)
    if not files:
        problem = f"no {what} rows: the bundled ones are for adapters trained on the bundled files"
        raise InputError(problem, f"pass --{what}_csv FILE")
    template = PromptTemplate.from_dict(sft_config["prompt"])
    version = template.sentence_version if template.number_sentences else None
    # Names of columns and labels are those of the files that were named, not of the bundled ones
    train_options = config if config.train_csv else None
    test_options = config if config.test_csv else None
    training = [row for file in train_files for row in factual_rows(read_rows(file, train_options))]
    training, _ = drop_stray_citations(training, version)
    all_rows = training if config.export_preferences else read_rows(files[0], test_options)
    rows, _ = drop_stray_citations(factual_rows(all_rows), version)
    if len(rows) < 2:
        problem = f"{files[0]}: {plural(len(rows), 'row')} labeled factual: too few to evaluate"
        raise InputError(problem, "add rows: 40 or more give useful intervals")
    n_rows = min(len(rows), config.n_rows or len(rows))
    chosen = {number: rows[number] for number in sorted(random.Random(0).sample(range(len(rows)), n_rows))}
    n_leaked = 0 if config.export_preferences else len(leaked_rows(training, list(chosen.values())))
    if n_leaked:
        leaked = f"{plural(n_leaked, 'test note')} of {n_rows:,}"
        log(f"warning: {leaked} are training notes, or nearly: the figures flatter")
    return Data(files[0], chosen, all_rows, training, n_leaked, template.sentence_version)


def choose_columns(names: Sequence[str] | None, adapters: Sequence[Adapter], data: Data) -> list[System]:
    """The systems to compare, those of a specialist once for each adapter. Says which are left out, and why.
    Raises InputError if all are."""
    names = names or [system.name for system in systems.SYSTEMS]
    # Adapters with a selector fitted it on the same rows
    if "quote" in names and all(adapter.has_selector for adapter in adapters):
        names = [name for name in names if name != "selected"]
    columns = []
    for system in (system for system in systems.SYSTEMS if system.name in names):
        is_own = system.model == "specialist"
        for adapter in adapters if is_own else adapters[:1]:
            name = system.name + adapter.number * is_own
            reasons = {
                "it needs --train_csv": system.needs_training_rows and not data.training,
                "a merged model has no base apart": system.model == "base" and "merged" in adapter.sft_config,
                "the adapter has no selector of note sentences": system.writing != "free" and not adapter.has_selector,
            }  # fmt: skip
            if any(reasons.values()):
                log(f"info: {name} is left out: {next(filter(reasons.get, reasons))}")
            else:
                columns.append(system._replace(name=name, adapter=adapter))
    if not columns:
        raise InputError("--systems: none of them can be evaluated here", "pass --train_csv, or other names")
    return columns


def group_by_length(rows: Mapping[int, Row]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    lengths = {number: len(row.clinical_note.split()) for number, row in rows.items()}
    # Thirds of notes of one length have one name
    for part in np.array_split(sorted(lengths, key=lengths.get), min(3, len(lengths))):
        name = f"{lengths[part[0]]} to {lengths[part[-1]]} words"
        groups.setdefault(name, []).extend(part.tolist())
    return groups


def group_by_column(config: EvaluationConfig, data: Data) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    names = {ours: getattr(config, option.removeprefix("--")) for ours, option in OPTION_OF_COLUMN.items()}
    table = read_table(data.test_file, [], Counter(), names)
    values = {number: cells.get(column_name(config.by)) for number, cells, _ in table}
    where = f"--by {safe_id(config.by)}"
    if None in values.values():
        raise InputError(f"{where}: {data.test_file} has no such column in each row", "check its name")
    for number, row in data.rows.items():
        groups.setdefault(values[row.number].strip() or "(empty)", []).append(number)
    if shown_kinds(value for value, numbers in groups.items() for _ in numbers) is None:
        problem = f"{where}: too many different values, or too long ones, to be groups"
        raise InputError(problem, "choose a column such as specialty or source")
    return groups


def group_rows(config: EvaluationConfig, data: Data) -> dict[str, list[int]]:
    """{value of --by: numbers of its rows}; by note length in thirds; without small groups. Raises InputError
    if the column is missing or its values are no kinds."""
    if config.by is None:
        return {}
    is_length = column_name(config.by) == "note_length"
    groups = group_by_length(data.rows) if is_length else group_by_column(config, data)
    return {value: numbers for value, numbers in groups.items() if len(numbers) >= _LEAST_NOTES}


def fingerprint(system: System, data: Data, config: EvaluationConfig) -> dict:
    """All that decides a system's summaries: hashes and settings."""
    sft_config = system.adapter.sft_config
    rows = [factual_rows(data.all_rows), data.training if system.needs_training_rows else []]
    keys = [[(row.note_key.hex(), row.summary_key.hex()) for row in part] for part in rows]
    values = {"system": [system.says, system.seed], "rows": systems.digest(keys), "toolkit": __version__}
    if system.model == "specialist":
        values["adapter"] = sft_config["sha256"]["folder"]
    if system.loads_model:
        from sft.model.base import pick_device

        values |= {
            "base model": [sft_config["sha256"]["base_weights"], config.base_model],
            "prompt": systems.digest(sft_config["prompt"]),
            "max_new_tokens": config.max_new_tokens or sft_config["max_new_tokens"],
            "dtype": str(pick_device(config.device, config.dtype).dtype),
            "quantization": quantization_for(vars(config), sft_config),
        }
    return values


def load(model: str, adapter: Adapter, config: EvaluationConfig) -> SFTInference:
    """A specialist, whose model is loaded once it is needed, or its base model: the adapter's layers go, and
    the base's are packed for speed as the specialist's are."""
    names = "base_model prompt_from device dtype quantization use_8bit use_4bit".split()
    options = {name: getattr(config, name) for name in names}
    if model == "specialist":
        return SFTInference(adapter.folder, writing="quote" if adapter.has_selector else "free", **options)
    from sft.model.kernels import pack_for_inference

    inference = SFTInference(adapter.folder, writing="free", merge=False, **options)
    inference.model = inference.model.unload()
    pack_for_inference(inference.model)
    return inference


def write_summaries(columns: Sequence[System], data: Data, config: EvaluationConfig) -> dict[str, dict]:
    """{column: {number: result}}, of which files hold what earlier runs wrote. Raises Stopped after a
    signal."""
    folder = make_private_dir(make_private_dir(Path(config.output_dir)) / "summaries")
    records = {system.name: fingerprint(system, data, config) for system in columns}
    files = {name: folder / f"{name}-{systems.digest(record)[:12]}.jsonl" for name, record in records.items()}
    done = {name: systems.read_summaries(file) for name, file in files.items()}
    missing = {name: {n: row for n, row in data.rows.items() if n not in done[name]} for name in files}
    settings = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    progress = Progress(sum(len(missing[s.name]) for s in columns if s.loads_model), "text", interval=20)
    loaded = None
    with contextlib.closing(progress), noted_signals("finished summaries are kept") as noted:
        settings["should_stop"] = lambda: bool(noted)
        # Each model is loaded once, one at a time; what needs none, and no time, comes last
        in_turn = sorted(columns, key=lambda system: (not system.model, system.model, system.adapter.number))
        for system in (system for system in in_turn if missing[system.name]):
            log(f"{system.name}: {system.says}")
            todo = missing[system.name]
            examples = data.training if system.needs_training_rows else []
            if not system.model:
                results = systems.write_without_model(system.name, todo, examples, data.version)
            else:
                if loaded != (system.model, system.adapter.number):
                    inference = None
                    inference = load(system.model, system.adapter, config)
                    loaded = (system.model, system.adapter.number)
                results = systems.write_with_model(inference, system, todo, examples, settings)
            on_each = progress.advance if system.loads_model else None
            systems.keep_summaries(files[system.name], records[system.name], results, on_each)
            if noted:
                raise Stopped(noted[0], f"stopped: the same command continues {system.name}")
    return {name: systems.read_summaries(file) for name, file in files.items()}


def measure_all(columns: Sequence[System], results: Mapping, data: Data, rouge) -> dict:
    """{column: {number: Measured}}. The loss of an adapter stands with each of its ways of writing."""
    expected = measures.usual_marks(row.model_summary for row in data.training or data.rows.values())
    measured: dict[str, dict[int, measures.Measured]] = {}
    for system in columns:
        measured[system.name] = {}
        free = measured.get("free" + system.adapter.number) if system.model == "specialist" else None
        for number, row in data.rows.items():
            one = measures.measure(row, results[system.name][number], rouge, expected, data.version)
            measured[system.name][number] = one
            if free:
                one.sums["loss"] = free[number].sums["loss"]
    measures.add_memorized(measured, data.rows, data.training)
    return measured


def evaluate(columns: Sequence[System], groups: Mapping, measured: Mapping, data: Data) -> dict:
    """What evaluation.json holds: figures and hashes, no text."""
    found = figures.figures(measured, list(data.rows))
    trained = [system.name for system in columns if system.model == "specialist"]
    answers = {name: figures.answer_questions(found, name) for name in trained}
    kinds = [row.hallucination_type for row in data.all_rows if row.label == "hallucinated"]
    twins = figures.twins(data.all_rows)
    return {
        "toolkit": __version__,
        "test_csv_sha256": sha256(Path(data.test_file)),
        "systems": {system.name: system.says for system in columns},
        "adapters": {c.adapter.number.strip("_") or "1": c.adapter.sft_config["sha256"]["folder"] for c in columns},
        "n_notes": len(data.rows),
        "n_leaked": data.n_leaked,
        "figures": found,
        "changes": {name: figures.changes(found, name) for name in trained},
        "answers": answers,
        "verdicts": {name: figures.verdict(given, found[name], len(data.rows)) for name, given in answers.items()},
        "twins": {kind: twin for kind, twin in twins.items() if kind == "all" or shown_kinds(kinds)},
        "groups": {name: {"n_notes": len(of), "figures": figures.figures(measured, of)} for name, of in groups.items()},
    }  # fmt: skip


def print_table(evaluation: Mapping) -> None:
    """The headline figures and the four answers, to standard output."""
    rows = page.figure_rows(evaluation["figures"], measures.HEADLINE)
    widths = [max(10, len(name) + 2) for name in evaluation["figures"]]
    lines = [["", *evaluation["figures"]]]
    lines += [[row["title"], *(cell["value"] for cell in row["cells"])] for row in rows]
    for title, *values in lines:
        print(title.ljust(46) + "".join(map(str.rjust, values, widths)))
    for name, answers in evaluation["answers"].items():
        print(f"\n{name}: {evaluation['verdicts'][name]}")
        for answer in answers:
            print(f"  {answer['question']} {page.ANSWERS[answer['passed']]}")
            print(f"      {answer['figure']}\n      asked for: {answer['threshold']}")


def export_preferences(config: EvaluationConfig, adapter: Adapter, data: Data) -> None:
    """Pairs for Stage B: each training summary, and of the specialist's own that are drawn for its note the
    one with the highest risk; the heaviest finding's kind says why. Raises InputError if there is none."""
    from sft.data.preferences import export_pairs, find_pairs
    from sft.data.prompt import PromptEncoder
    from sft.model.base import load_tokenizer

    columns = [system._replace(adapter=adapter) for system in systems.SAMPLES]
    # One pair a note
    first = {row.note_key: number for number, row in reversed(data.rows.items())}
    data = data._replace(rows={number: data.rows[number] for number in sorted(first.values())})
    drawn = write_summaries(columns, data, config)
    rejected = []
    for number, row in data.rows.items():
        flagged = [results[number] for results in drawn.values() if results[number]["findings"]]
        if flagged:
            worst = max(flagged, key=lambda result: result["check_risk"])
            kind = max(worst["findings"], key=lambda finding: finding["weight"])["kind"]
            own = {"id": f"{row.name}-own", "model_summary": worst["generated_summary"]}
            rejected.append(replace(row, **own, label="hallucinated", hallucination_type=kind))
    if not rejected:
        problem = f"the check finds nothing in the specialist's samples of {plural(len(data.rows), 'note')}"
        raise InputError(problem, "export the file's own pairs: sft_dataset.py --export_preferences")
    template = PromptTemplate.from_dict(adapter.sft_config["prompt"])
    encoder = PromptEncoder(load_tokenizer(Path(config.prompt_from or adapter.folder)), template)
    rows = [*data.rows.values(), *rejected]
    pairs = find_pairs("--train_csv", rows, encoder, adapter.sft_config["max_length"])
    export_pairs(Path(config.export_preferences), pairs, encoder)


def check_options(config: EvaluationConfig) -> None:
    """Raises InputError for two things to do at once, of which one would be left out."""
    others = "export_preferences blind_sheet systems by".split()
    for one in ("ratings", "export_preferences"):
        for other in others if getattr(config, one) else ():
            if other != one and getattr(config, other):
                raise InputError(
                    f"--{one} cannot be combined with --{other}", "run the command once for each"
                )


def main() -> None:
    description = "Compares a specialist with its base model and simple baselines on held-out notes."
    config = parse_options(EvaluationConfig, description)
    check_options(config)
    folder = Path(config.output_dir)
    if config.ratings:
        print(sheet.report_ratings(folder, config.ratings))
        return
    check_new_file("--export_preferences", config.export_preferences, (".jsonl",))
    check_outside_models("--output_dir", folder)
    if config.blind_sheet and (folder / "blind_sheet.csv").exists():
        fix = "it may be filled in: rename or move it with its key, or choose another --output_dir"
        raise InputError(f"--blind_sheet: {folder / 'blind_sheet.csv'} exists", fix)
    adapters = read_adapters(config.model_path, config.prompt_from)
    data = read_data(config, adapters[0].sft_config)
    if config.export_preferences:
        export_preferences(config, adapters[0], data)
        return
    groups = group_rows(config, data)
    columns = choose_columns(config.systems, adapters, data)
    # What is missing is said before hours of writing
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)  # Lin 2004
    measured = measure_all(columns, write_summaries(columns, data, config), data, rouge)
    evaluation = evaluate(columns, groups, measured, data)
    write_json(folder / "evaluation.json", evaluation)
    page.write_csv(folder / "evaluation.csv", data.rows, measured)
    page.write_report(folder / "report.html", data.rows, measured, evaluation, data.version)
    if config.blind_sheet:
        sheet.write_sheet(folder, data.rows, measured)
        log(f"The blind sheet is {folder / 'blind_sheet.html'}; its CSV and its key are beside it")
    print_table(evaluation)
    sys.stdout.flush()
    log(f"The report is {folder / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
