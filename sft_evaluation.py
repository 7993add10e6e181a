"""Is the specialist better? Base, specialist and simple baselines on the same held-out notes, and a page that
shows it.

    python sft_evaluation.py                             # the bundled specialist and test notes
    python sft_evaluation.py --model_path FOLDER --test_csv test.csv --train_csv train.csv
    python sft_evaluation.py --blind_sheet               # also a sheet to read without bias
    python sft_evaluation.py --ratings ratings.csv    # count what was read

Writes report.html, evaluation.json and .csv (figures, no text), and each system's summaries, to --output_dir;
nothing into the adapter's folder. An interrupted run continues where it was.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft import __version__
from sft.cli import InputError, log, plural, preview_list, run_script
from sft.data.prompt import PromptTemplate
from sft.data.rows import Row, drop_stray_citations, factual_rows, leaked_rows, read_rows, shown_kinds
from sft.data.table import OPTION_OF_COLUMN, column_name, read_table
from sft.evaluation.systems import SYSTEMS, System, SystemFile, digest, digest_rows, sample_rows
from sft.files import ROOT, make_private_dir, sha256, write_json
from sft.model.folder import read_adapter_folder
from sft.options import EvaluationConfig, parse_options, quantization_of
from sft_inference import SFTInference

# Adapters trained on these files are tested on those unless told otherwise
_BUNDLED = {
    f"phase1_data/sft/train_set_{kind}.csv": f"phase1_data/sft/test_set_{kind}.csv"
    for kind in ("processed", "evidence")
}
# Ways of writing: SFTInference.summarize's, if it has more than one
_HAS_WRITINGS = "writing" in inspect.signature(SFTInference.summarize).parameters
_LEAST_NOTES = 5  # of a group that is reported on its own


@dataclass(frozen=True)
class Adapter:
    name: str  # "" if there is only one
    folder: Path
    sft_config: dict
    is_merged: bool

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate.from_dict(self.sft_config["prompt"])


@dataclass(frozen=True)
class Column:
    """A system with the adapter that it needs."""

    name: str
    system: System
    adapter: Adapter


@dataclass(frozen=True)
class Data:
    test_file: Path
    rows: dict[int, Row]  # the factual test rows that are summarized, by their place
    all_rows: list[Row]  # of the test file
    training: list[Row]  # factual; empty if unknown
    n_leaked: int


# ------------------------------------------------------------------------------- what is read


def read_adapters(paths: Sequence[str]) -> list[Adapter]:
    """The adapters, named after their folders if there are several. Raises InputError."""
    found = []
    for path in paths:
        folder, sft_config, adapter_config = read_adapter_folder(path)
        real = folder.resolve()
        name = real.parent.name if real.name == "final_model" else real.name
        found.append(Adapter("" if len(paths) == 1 else name, folder, sft_config, not adapter_config))
    if len({adapter.name for adapter in found}) < len(found):
        found = [dataclasses.replace(adapter, name=str(i)) for i, adapter in enumerate(found, 1)]
        log("info: the adapters are numbered in their order, since folders have the same name")
    if len({adapter.sft_config["sha256"].get("base_weights") for adapter in found}) > 1:
        log(f"info: the adapters have different base models: the base is that of {found[0].name}")
    if len({adapter.sft_config["sha256"].get("train_csv") for adapter in found}) > 1:
        log(f"info: the adapters have different training rows: those of {found[0].name} count")
    return found


def find_files(config: EvaluationConfig, adapters: Sequence[Adapter]) -> tuple[Path, list[Path]]:
    """(test file, training files): those named, or the bundled ones for adapters trained on them. Raises
    InputError if there is no test file, or the training files are not those that were trained on."""
    recorded = {adapter.sft_config["sha256"].get("train_csv") for adapter in adapters}
    bundled = next(
        (train for train in _BUNDLED if (ROOT / train).is_file() and recorded == {sha256(ROOT / train)}), None
    )
    if config.test_csv is None and bundled is None:
        problem = "no test rows: the bundled test file says nothing about an adapter trained on other rows"
        raise InputError(problem, "pass --test_csv FILE with rows that were not trained on")
    test_file = Path(config.test_csv or ROOT / _BUNDLED[bundled])
    if config.train_csv is None:
        return test_file, [ROOT / bundled] if bundled else []
    files = [Path(file) for file in config.train_csv]
    hashes = [sha256(file) for file in files if file.is_file()]
    found = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    if len(hashes) == len(files) and found != adapters[0].sft_config["sha256"].get("train_csv"):
        problem = f"--train_csv {preview_list(map(str, files))}: not what the adapter was trained on (SHA-256 differs)"
        raise InputError(problem, "pass the same files, unchanged, in the same order; or leave it out")
    return test_file, files


def read_data(config: EvaluationConfig, adapters: Sequence[Adapter]) -> Data:
    test_file, train_files = find_files(config, adapters)
    template = adapters[0].template
    version = template.sentence_version if template.number_sentences else None
    all_rows = read_rows(test_file, config)
    rows, _ = drop_stray_citations(factual_rows(all_rows), version)
    if len(rows) < 2:
        problem = f"{test_file}: {plural(len(rows), 'row')} labeled factual: too few to evaluate"
        raise InputError(problem, "add rows: 40 or more give useful intervals")
    training = [row for file in train_files for row in factual_rows(read_rows(file, config))]
    training, _ = drop_stray_citations(training, version)
    chosen = sample_rows(rows, config.n_rows)
    n_leaked = len(leaked_rows(training, list(chosen.values())))
    if n_leaked:
        log(
            f"warning: {plural(n_leaked, 'test note')} of {len(chosen):,} are training notes, or nearly: the figures flatter"
        )
    return Data(test_file, chosen, all_rows, training, n_leaked)


def choose_columns(names: Sequence[str] | None, adapters: Sequence[Adapter], data: Data) -> list[Column]:
    """The systems to compare, those of a specialist once for each adapter. Says which are left out, and why.
    Raises InputError for an unknown name."""
    known = {system.name: system for system in SYSTEMS if system.writing == "free" or _HAS_WRITINGS}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise InputError(f"--systems: unknown: {preview_list(unknown)}", f"choose of: {' '.join(known)}")
    columns = []
    for name, system in known.items():
        if names and name not in names:
            continue
        if system.needs_training_rows and not data.training:
            log(f"info: {name} is left out: it needs --train_csv")
        elif system.model == "base" and adapters[0].is_merged:
            log(f"info: {name} is left out: a merged model has no base apart")
        elif system.model == "specialist":
            columns += [Column(f"{name}_{a.name}" if a.name else name, system, a) for a in adapters]
        else:
            columns.append(Column(name, system, adapters[0]))
    if not columns:
        raise InputError("--systems: none of them can be evaluated here", "pass --train_csv, or other names")
    return columns


def check_output_dir(folder: Path, adapters: Sequence[Adapter]) -> None:
    """Raises InputError if the report would lie in an adapter's folder, whose files are hashed."""
    for adapter in adapters:
        if folder.resolve().is_relative_to(adapter.folder.resolve()):
            raise InputError(
                f"--output_dir {folder} lies in the adapter's folder", "choose another --output_dir"
            )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is not a folder", "choose another --output_dir")


def group_rows(config: EvaluationConfig, data: Data) -> dict[str, list[int]]:
    """{value of --by: numbers of its rows}; by note length in thirds. Raises InputError if the column is
    missing or its values are no kinds."""
    if config.by is None:
        return {}
    groups: dict[str, list[int]] = {}
    if column_name(config.by) == "note_length":
        by_length = sorted(data.rows, key=lambda number: len(data.rows[number].clinical_note.split()))
        third = -(-len(by_length) // 3)
        for start in range(0, len(by_length), third):
            part = by_length[start : start + third]
            lengths = [len(data.rows[number].clinical_note.split()) for number in part]
            groups[f"{lengths[0]} to {lengths[-1]} words"] = part
        return groups
    names = {ours: getattr(config, option.removeprefix("--")) for ours, option in OPTION_OF_COLUMN.items()}
    table = read_table(data.test_file, [], Counter(), names)
    values = {number: cells.get(column_name(config.by)) for number, cells, _ in table}
    if None in values.values():
        raise InputError(
            f"--by {config.by}: {data.test_file} has no such column in each row", "check its name"
        )
    chosen = {number: values[row.number].strip() for number, row in data.rows.items()}
    if shown_kinds(chosen.values()) is None:
        problem = f"--by {config.by}: too many different values, or too long ones, to be groups"
        raise InputError(problem, "choose a column such as specialty or source")
    for number, value in chosen.items():
        groups.setdefault(value or "(empty)", []).append(number)
    return {value: numbers for value, numbers in groups.items() if len(numbers) >= _LEAST_NOTES}


# ------------------------------------------------------------------------------- summaries


def fingerprint(column: Column, data: Data, config: EvaluationConfig) -> dict:
    """All that decides a column's summaries: hashes and settings."""
    system = column.system
    values = {"system": system.name, "rows": digest_rows(factual_rows(data.all_rows)), "toolkit": __version__}
    if system.needs_training_rows:
        values["training rows"] = digest_rows(data.training)
    if system.model:
        from sft.model.base import pick_device

        hashes = column.adapter.sft_config["sha256"]
        values |= {
            "base model": hashes["base_weights"],
            "adapter": hashes["folder"] if system.model == "specialist" else None,
            "prompt": digest(column.adapter.sft_config["prompt"]),
            "max_new_tokens": config.max_new_tokens,
            "dtype": str(pick_device(config.device, config.dtype).dtype),
            "quantization": quantization_of(config.use_8bit, config.use_4bit),
        }
    return values


def load(adapter: Adapter, model: str, config: EvaluationConfig) -> SFTInference:
    from sft.evaluation.systems import remove_adapter

    inference = SFTInference(
        adapter.folder,
        config.device,
        config.dtype,
        use_8bit=config.use_8bit,
        use_4bit=config.use_4bit,
        merge=model == "specialist",
    )
    if model == "base":
        remove_adapter(inference)
    return inference


def write_summaries(
    columns: Sequence[Column], data: Data, config: EvaluationConfig
) -> dict[str, dict[int, dict]]:
    """{column: {number: result}}, of which files hold what earlier runs wrote. One model is in memory at a
    time."""
    from sft.evaluation.systems import summaries_without_model, summarize_with, with_examples

    folder = make_private_dir(Path(config.output_dir))
    numbers = list(data.rows)
    files = {c.name: SystemFile(folder, c.name, fingerprint(c, data, config)) for c in columns}
    options = {"max_new_tokens": config.max_new_tokens, "temperature": 0.0, "batch_size": config.batch_size}
    with_model = [c for c in columns if c.system.model and files[c.name].missing(numbers)]
    n_missing = sum(len(files[c.name].missing(numbers)) for c in with_model)

    def estimate(seconds: float) -> None:
        log(f"{n_missing:,} summaries will take about {seconds * n_missing / 60:,.1f} min")

    loaded, inference = None, None
    for column in columns:
        system, file = column.system, files[column.name]
        if not system.model:
            summaries = summaries_without_model(system.name, data.rows, data.training)
            file.write(numbers, lambda part, _, s=summaries: ((n, {"generated_summary": s[n]}) for n in part))
        elif column in with_model:
            if loaded != (system.model, column.adapter.folder):
                inference = None  # frees the memory before the next is loaded
                inference = load(column.adapter, system.model, config)
                loaded = (system.model, column.adapter.folder)
            log(f"{column.name}: {system.says}")
            plain = inference.encoder
            if system.needs_training_rows:
                room = int(min(inference.window, 2**20)) // 5
                inference.encoder = with_examples(plain, data.training, room)
            how = options | ({"writing": system.writing} if _HAS_WRITINGS else {})
            write = summarize_with(inference, system, data.rows, how)
            file.write(numbers, write, estimate if column is with_model[0] else None)
            inference.encoder = plain
    return {column.name: files[column.name].results for column in columns}


# ------------------------------------------------------------------------------- the report


def measure_all(columns: Sequence[Column], results: Mapping, data: Data) -> dict:
    """{column: {number: Measured}}."""
    from sft.evaluation.measures import add_memorized, make_scorer, measure, usual_marks
    from sft.grounding import PreparedNote

    rouge = make_scorer()
    version = columns[0].adapter.template.sentence_version
    rows = data.rows
    expected = usual_marks(row.model_summary for row in data.training or rows.values())
    measured: dict[str, dict] = {column.name: {} for column in columns}
    for number, row in rows.items():
        note = PreparedNote(row.clinical_note)
        for name in measured:
            measured[name][number] = measure(row, note, results[name][number], rouge, expected, version)
    add_memorized(measured, rows, data.training)
    return measured


def evaluate(
    config: EvaluationConfig, columns: Sequence[Column], groups: Mapping, measured: Mapping, data: Data
) -> dict:
    """What evaluation.json holds: figures and hashes, no text."""
    from sft.evaluation.figures import answer_questions, changes, figures, sums_table, twins, verdict

    names = list(measured)
    found = figures(sums_table(measured, list(data.rows)), names)
    specialists = [column.name for column in columns if column.system.model == "specialist"]
    answers = {name: answer_questions(found, name) for name in specialists}
    adapters = {column.adapter.name or "specialist": column.adapter for column in columns}
    kinds = [row.hallucination_type for row in data.all_rows if row.label == "hallucinated"]
    ranked = twins(data.all_rows)
    return {
        "toolkit": __version__,
        "test_csv_sha256": sha256(data.test_file),
        "adapters": {name: adapter.sft_config["sha256"]["folder"] for name, adapter in adapters.items()},
        "n_notes": len(data.rows),
        "n_leaked": data.n_leaked,
        "max_new_tokens": config.max_new_tokens,
        "figures": found,
        "changes": {name: dict(zip(("better", "worse"), changes(found, name))) for name in specialists},
        "answers": {name: [answer._asdict() for answer in given] for name, given in answers.items()},
        "verdicts": {name: verdict(given) for name, given in answers.items()},
        "twins": ranked if shown_kinds(kinds) else {kind: ranked[kind] for kind in ranked if kind == "all"},
        "by": config.by,
        "groups": {
            name: {"n_notes": len(numbers), "figures": figures(sums_table(measured, numbers), names)}
            for name, numbers in groups.items()
        },
    }  # fmt: skip


def print_table(evaluation: Mapping) -> None:
    """The headline figures and the four answers, to standard output."""
    from sft.evaluation.measures import HEADLINE
    from sft.evaluation.page import ANSWERS, figure_rows

    found = evaluation["figures"]
    widths = [max(12, len(name) + 2) for name in found]
    print(" " * 46 + "".join(name.rjust(width) for name, width in zip(found, widths)))
    for row in figure_rows(found, HEADLINE):
        print(
            row["title"].ljust(46) + "".join(cell["value"].rjust(w) for cell, w in zip(row["cells"], widths))
        )
    for name, answers in evaluation["answers"].items():
        print(f"\n{name}")
        for answer in answers:
            asked = f"{ANSWERS[answer['passed']]}: {answer['figure']} (asked for: {answer['threshold']})"
            print(f"  {answer['question']} {asked}")
        print(f"  {evaluation['verdicts'][name]}")


def main() -> None:
    description = "Compares a specialist with its base model and simple baselines on held-out notes."
    config = parse_options(EvaluationConfig, description)
    folder = Path(config.output_dir)
    if config.ratings:
        from sft.evaluation.sheet import report_ratings

        print(report_ratings(folder, config.ratings))
        return
    if importlib.util.find_spec("rouge_score") is None:
        raise InputError("rouge-score is not installed", "run pip install -r requirements_training.txt")
    adapters = read_adapters(config.model_path)
    check_output_dir(folder, adapters)
    data = read_data(config, adapters)
    groups = group_rows(config, data)
    columns = choose_columns(config.systems, adapters, data)
    results = write_summaries(columns, data, config)
    measured = measure_all(columns, results, data)
    evaluation = evaluate(config, columns, groups, measured, data)

    from sft.evaluation.page import write_csv, write_report

    write_json(folder / "evaluation.json", evaluation)
    write_csv(folder / "evaluation.csv", data.rows, measured)
    says = {column.name: column.system.says for column in columns}
    write_report(folder / "report.html", data.rows, measured, evaluation, says)
    if config.blind_sheet:
        from sft.evaluation.sheet import make_items, write_sheet

        texts = {name: {n: one.summary for n, one in ones.items()} for name, ones in measured.items()}
        write_sheet(folder, make_items(data.rows, texts))
        log(f"The blind sheet is {folder / 'blind_sheet.html'}; its CSV and its key are beside it")
    print_table(evaluation)
    sys.stdout.flush()
    log(f"The report is {folder / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
