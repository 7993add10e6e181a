"""What a run of the inference script checks before a model is loaded, and what identifies its results."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.cli import InputError, as_input_error, is_terminal, log, processes
from sft.data.table import separator_of
from sft.files import check_new_file
from sft.inference.notes import Note, notes_digest, read_notes
from sft.model.folder import quantization_for
from sft.options import InferenceConfig, quantization_of


def check_files(config: InferenceConfig) -> list[Note] | None:
    """The notes of input_file, once it is clear that they can be read and their summaries written. Raises
    InputError for options that contradict each other."""
    for is_wrong, problem, fix in _contradictions(config):
        if is_wrong:
            raise InputError(problem, fix)
    check_new_file("--merge_to", config.merge_to)
    if not config.input_file:
        return None
    notes = read_notes(config.input_file, config)
    if not notes:
        raise InputError(f"{config.input_file[0]}: no notes in it", "check the file")
    return notes


def _contradictions(config: InferenceConfig) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, problem, fix) of options that do not go together."""
    one = config.clinical_note is not None
    out, review = (name and os.path.realpath(name) for name in (config.output_file, config.review_file))
    yield one and config.input_file, "--clinical_note cannot be combined with --input_file", "choose one"
    has_one_note = config.one_note != "auto"
    of_notes = {
        "clinical_note": one,
        "input_file": config.input_file,
        "json": config.json,
        "one_note": has_one_note,
    }
    for name, is_given in of_notes.items():
        problem = f"--serve cannot be combined with --{name}"
        yield config.serve and is_given, problem, "leave it out: notes come with requests"
    of_writing = {"serve": config.serve, "writing": config.writing, "citations": config.citations}
    for name, is_given in {**of_notes, **of_writing}.items():
        problem = f"--merge_to cannot be combined with --{name}"
        yield config.merge_to and is_given, problem, "merge first, then summarize"
    problem = "--keep_columns needs --output_file"
    yield (
        config.keep_columns and not (out or config.json),
        problem,
        "name one, or add --json: text has no columns",
    )
    yield one and has_one_note, "--one_note has no effect with --clinical_note, which is one", "leave it out"
    problem = "--max_risk, --review_file and --output_file belong together"
    fix = "give all three: summaries with a higher risk go to --review_file, the others to --output_file"
    yield (config.max_risk is None) != (review is None) or (review and not out), problem, fix
    yield review and review == out, "--review_file is --output_file", "name another file"
    fix = "leave it out: a .jsonl file has complete results"
    yield config.json and out, "--json is for standard output", fix
    fix = "add --clinical_note or --input_file, or pipe notes"
    is_typed = is_conversation(config) and is_terminal(sys.stdin)
    yield config.json and is_typed, "--json is not for a conversation", fix
    problem = "--one_note has no effect in a conversation, where Enter ends a note"
    yield has_one_note and is_typed, problem, "leave it out"
    problem = "running several processes requires --input_file and --output_file"
    yield processes()[1] > 1 and not out, problem, "add both, or start one process"
    quantization = quantization_of(vars(config))
    problem = f"--merge_to cannot be combined with --quantization {quantization}"
    fix = "merge into the unquantized base model, then quantize"
    yield config.merge_to and quantization, problem, fix


def is_conversation(config: InferenceConfig) -> bool:
    return config.clinical_note is None and not (config.input_file or config.merge_to or config.serve)


def log_idle_options(config: InferenceConfig) -> None:
    """Names what has no effect, since no summary is written or no model loaded."""
    reason = "--merge_to writes no summary"
    names = "max_new_tokens temperature max_length no_merge".split()
    if not config.merge_to:
        reason = "--writing quote loads no model"
        names += "base_model dtype quantization use_8bit use_4bit seed".split()
    idle = [f"--{name}" for name in names if getattr(config, name) != getattr(InferenceConfig, name)]
    if idle and (config.merge_to or config.writing == "quote"):
        log(f"info: {reason}, so {', '.join(idle)} changes nothing")
    if config.prompt_from and config.writing == "quote":
        log(f"info: --writing quote loads no model: the weights in {config.model_path} are not used")


def import_libraries() -> None:
    """Raises InputError if they cannot be imported, as with a setting that they do not know."""
    fix = "unset what the environment sets for it, as ACCELERATE_LOG_LEVEL, or install requirements_training.txt again"
    with as_input_error("a library of the model cannot be imported", fix):
        import sft.model.adapter  # noqa: F401


def output_separator(config: InferenceConfig) -> str:
    """Of a .csv of summaries: that of the table of notes, so that the same spreadsheet opens both; else a
    comma."""
    path = Path(*(config.input_file or ())[:1])
    is_table = path.suffix.lower() in (".csv", ".tsv") and path.is_file()
    is_table &= any(str(name).lower().endswith(".csv") for name in (config.output_file, config.review_file))
    names = {"clinical_note": config.note_column, "id": config.id_column}
    return separator_of(path, names) if is_table else ","


def fingerprint(config: InferenceConfig, sft_config: dict, notes: Sequence[Note], toolkit: str) -> dict:
    """What two runs must share for their files of summaries to be the same: hashes, settings and the version
    of the toolkit, no text."""
    of_all = {
        "toolkit": toolkit,
        "input_file or columns": notes_digest(notes),
        "separator": output_separator(config),
        "adapter": sft_config["sha256"]["folder"],
        "writing": config.writing,
        "citations": config.citations,
        "max_risk": config.max_risk,
        "review_file": config.review_file,
    }
    if config.writing == "quote":
        return of_all
    from sft.model.base import pick_device

    names = "max_new_tokens temperature max_length no_merge".split()
    quantization = quantization_for(vars(config), sft_config)
    dtype = str(pick_device(config.device, config.dtype).dtype)
    # In fewer bits other batches now and then give other words; greedy summaries do not depend on a seed
    names += ["batch_size"] if dtype != "torch.float32" or quantization else []
    names += ["seed"] if config.temperature else []
    return {
        **of_all,
        "base model": sft_config["sha256"]["base_weights"],
        "typed base model": config.base_model if config.prompt_from else None,
        "dtype": dtype,
        "use_8bit": quantization == "8bit",
        "use_4bit": quantization == "4bit",
        **{name: getattr(config, name) for name in names},
    }
