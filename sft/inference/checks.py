"""What a run of the inference script checks before a model is loaded, and what identifies its results."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sft.cli import InputError, is_terminal, log, preview_list, processes
from sft.files import check_new_file
from sft.inference.notes import Note, notes_digest, read_notes
from sft.model.folder import quantization_for
from sft.options import InferenceConfig, quantization_of


def check_files(config: InferenceConfig) -> list[Note] | None:
    """The notes of input_file, once it is clear that they can be read and their summaries written. Raises
    InputError for options that contradict each other."""
    if config.clinical_note is not None and config.input_file:
        raise InputError("--clinical_note cannot be combined with --input_file", "choose one")
    if config.output_file and not config.input_file:
        fix = "add --input_file with the notes; one note's summary goes to standard output"
        raise InputError("--output_file requires --input_file", fix)
    of_notes = [
        name for name in ("clinical_note", "input_file", "json") if getattr(config, name) not in (None, False)
    ]
    of_notes += ["one_note"] if config.one_note != "auto" else []
    if config.merge_to and of_notes:
        raise InputError(f"--merge_to cannot be combined with --{of_notes[0]}", "merge first, then summarize")
    of_summaries = ("max_new_tokens", "temperature", "max_length", "no_merge")
    idle = [f"--{name}" for name in of_summaries if getattr(config, name) != getattr(InferenceConfig, name)]
    if config.merge_to and idle:
        log(f"info: no effect with --merge_to: {', '.join(idle)}")
    if config.clinical_note is not None and config.one_note != "auto":
        raise InputError("--one_note has no effect with --clinical_note, which is one", "leave it out")
    if config.resume and not config.output_file:
        raise InputError("--resume requires --output_file", "specify the file to continue with --output_file")
    if (config.max_risk is None) != (config.review_file is None) or (
        config.review_file and not config.output_file
    ):
        fix = "give all three: summaries with a higher risk go to --review_file, the others to --output_file"
        raise InputError("--max_risk, --review_file and --output_file belong together", fix)
    if config.review_file and Path(config.review_file).resolve() == Path(config.output_file).resolve():
        raise InputError("--review_file is --output_file", "name another file")
    if config.json and config.output_file:
        raise InputError("--json is for standard output", "leave it out: a .jsonl file has complete results")
    if config.json and is_conversation(config) and is_terminal(sys.stdin):
        raise InputError(
            "--json is not for a conversation", "add --clinical_note or --input_file, or pipe notes"
        )
    if processes()[1] > 1 and not config.output_file:
        problem = "running several processes requires --input_file and --output_file"
        raise InputError(problem, "add both, or start one process")
    quantization = quantization_of(vars(config))
    if config.merge_to and quantization:
        problem = f"--merge_to cannot be combined with --quantization {quantization}"
        raise InputError(problem, "merge into the unquantized base model, then quantize")
    check_new_file("--merge_to", config.merge_to)
    if not config.input_file:
        return None
    notes = read_notes(config.input_file, config)
    if not notes:
        raise InputError(f"{config.input_file[0]}: no notes in it", "check the file")
    return notes


def is_conversation(config: InferenceConfig) -> bool:
    return config.clinical_note is None and not config.input_file and not config.merge_to


def log_idle_options(config: InferenceConfig) -> None:
    """Names what has no effect, since no model is loaded."""
    names = "base_model dtype quantization use_8bit use_4bit no_merge max_length max_new_tokens temperature seed".split()
    defaults = InferenceConfig()
    idle = [f"--{name}" for name in names if getattr(config, name) != getattr(defaults, name)]
    if config.writing == "quote" and idle:
        log(f"info: --writing quote loads no model, so {preview_list(idle, len(idle))} changes nothing")
    if config.writing == "quote" and config.prompt_from:
        log(f"info: --writing quote loads no model: the weights in {config.model_path} are not used")


def fingerprint(config: InferenceConfig, sft_config: dict, notes: Sequence[Note]) -> dict:
    """What two runs must share for their files of summaries to be the same: hashes and settings, no text."""
    of_all = {
        "input_file or columns": notes_digest(notes),
        "adapter": sft_config["sha256"]["folder"],
        # As older records lack them
        "writing": None if config.writing == "free" else config.writing,
        "citations": config.citations or None,
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
