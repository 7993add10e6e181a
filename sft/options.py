"""Command-line options. Each is declared once, as a dataclass field that is parser, help text and saved
configuration.

Options that several scripts share are declared in groups that the scripts' configurations inherit.
"""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft.cli import InputError, plural, preview_list, safe_id

BUNDLED_MODEL = "smollm2-135m-instruct"
DEFAULT_MAX_LENGTH = 512
DEFAULT_MAX_NEW_TOKENS = 150
DEFAULT_GENERATION_BATCH_SIZE = 32
CPU_TOKENS_PER_PASS = 800  # a CPU's matrix products gain little from more, and memory grows with them

# The groups of --help, in this order
DATA = "data"
NOTES = "notes"
MODEL = "model"
TRAINING = "training"
LORA = "LoRA"
GENERATION = "generation"
MACHINE = "machine"
RUN = "run"
_GROUPS = (DATA, NOTES, MODEL, TRAINING, LORA, GENERATION, MACHINE, RUN)


def option(default, help: str, *, group: str, may_change: bool = False, **argparse_arguments):
    """A dataclass field that is also a command-line option.

    `may_change`: --resume accepts another value. Either the steps already done do not depend on it, or
    something else in the fingerprint stands for it: the SHA-256 of data and base weights, the dtype that is
    used in the end. An option that older runs did not have counts as having had its default."""
    metadata = {"help": help, "group": group, "may_change": may_change, "argparse": argparse_arguments}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def number(kind: type, low: float, high: float = float("inf"), *, above_low: bool = False) -> Callable:
    """An argparse type: a number of `kind` from `low` to `high`; `above_low` excludes `low` itself."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            name = "an integer" if kind is int else "a number"
            # It may be a note in the wrong place
            raise argparse.ArgumentTypeError(f"{safe_id(text)} is not {name}") from None
        too_low = value <= low if above_low else value < low
        # "not value <= high" is true for NaN too
        if abs(value) == float("inf") or too_low or not value <= high:
            bounds = f"{'above' if above_low else 'at least'} {low}"
            if high != float("inf"):
                bounds = f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


# ------------------------------------------------------------------------------- shared groups


@dataclass
class DataOptions:
    train_csv: str = option(
        "phase1_data/sft/train_set_processed.csv",
        "CSV of training rows (columns id, clinical_note, model_summary, label)",
        group=DATA,
        may_change=True,
    )
    val_csv: str = option(
        "phase1_data/sft/validation_set_processed.csv",
        "CSV of validation rows (the same columns)",
        group=DATA,
        may_change=True,
    )
    max_length: int = option(
        DEFAULT_MAX_LENGTH,
        "maximum tokens of prompt plus summary; longer notes are shortened",
        type=number(int, 32),
        group=DATA,
    )
    sentence_numbering: str = option(
        "auto",
        "number the note's sentences in the prompt; auto = if most training summaries cite them",
        choices=["auto", "on", "off"],
        group=DATA,
    )
    instruction: str | None = option(None, "instruction in the prompt (default: built in)", group=DATA)
    model_name: str = option(
        BUNDLED_MODEL,
        "base model: the bundled one, a local folder or a Hugging Face id",
        group=MODEL,
        may_change=True,
    )


@dataclass
class MachineOptions:
    device: str = option(
        "auto", "device to run on", choices=["auto", "cuda", "mps", "cpu"], group=MACHINE, may_change=True
    )
    dtype: str = option(
        "auto",
        "dtype of the frozen base model",
        choices=["auto", "float32", "bfloat16", "float16"],
        group=MACHINE,
        may_change=True,
    )
    use_8bit: bool = option(
        False,
        "load the base model in 8-bit (bitsandbytes; for inference on an x86 CPU, oneDNN)",
        group=MACHINE,
    )
    use_4bit: bool = option(False, "load the base model in 4-bit (bitsandbytes, NF4)", group=MACHINE)


def quantization_of(use_8bit: bool, use_4bit: bool) -> str | None:
    """ "8bit", "4bit" or None. Raises InputError for both."""
    if use_8bit and use_4bit:
        raise InputError("--use_8bit cannot be combined with --use_4bit", "choose one")
    return "8bit" if use_8bit else "4bit" if use_4bit else None


# ------------------------------------------------------------------------------- the scripts' options


@dataclass
class ReportConfig(DataOptions):
    """Options of sft_dataset.py."""

    export_preferences: str | None = option(
        None,
        "write factual/hallucinated pairs of the same note to this file, as JSON Lines for DPO (Stage B)",
        group=RUN,
        metavar="FILE.jsonl",
    )


@dataclass
class TrainConfig(MachineOptions, DataOptions):
    """Options of stage_a_sft_training.py."""

    num_epochs: int = option(
        2, "passes over the training rows", type=number(int, 1), group=TRAINING, may_change=True
    )
    learning_rate: float = option(
        2e-4,
        "peak learning rate, reached after warmup",
        type=number(float, 0, above_low=True),
        group=TRAINING,
    )
    batch_size: int = option(8, "rows in one forward pass, at most", type=number(int, 1), group=TRAINING)
    gradient_accumulation_steps: int = option(
        1, "batches accumulated per optimizer step", type=number(int, 1), group=TRAINING
    )
    warmup_ratio: float = option(
        0.03, "fraction of the steps spent warming up", type=number(float, 0, 1), group=TRAINING
    )
    lr_scheduler: str = option(
        "cosine",
        "decay of the learning rate after warmup",
        choices=["cosine", "linear", "constant"],
        group=TRAINING,
    )
    weight_decay: float = option(0.0, "AdamW's weight decay", type=number(float, 0), group=TRAINING)
    max_grad_norm: float = option(
        1.0, "clip the gradient norm to this; 0 = off", type=number(float, 0), group=TRAINING
    )
    early_stopping_patience: int = option(
        0,
        "stop after this many epochs without a lower validation loss; 0 = never",
        type=number(int, 0),
        group=TRAINING,
        may_change=True,
    )
    seed: int = option(
        42,
        "random seed (row order, dropout, LoRA initialization)",
        type=number(int, 0, 2**32 - 1),
        group=TRAINING,
    )

    lora_r: int = option(16, "LoRA rank", type=number(int, 1), group=LORA)
    lora_alpha: float = option(
        32, "LoRA alpha: the update is scaled by alpha / r", type=number(float, 0, above_low=True), group=LORA
    )
    lora_dropout: float = option(
        0.05, "dropout on the adapter's inputs during training", type=number(float, 0, 0.99), group=LORA
    )
    target_modules: list[str] = option(
        ["q_proj", "v_proj"], "layers that get an adapter, or all-linear", group=LORA
    )

    max_tokens_per_batch: int | None = option(
        None,
        "split forward passes at about this many tokens: less memory, the optimizer step is unchanged "
        f"(default: {CPU_TOKENS_PER_PASS:,} on a CPU, else no limit)",
        type=number(int, 1),
        group=MACHINE,
    )
    shard_base: bool = option(
        False,
        "split the base model's weights over the processes (FSDP), for models larger than one GPU",
        group=MACHINE,
        may_change=True,
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: less memory, about a third slower",
        group=MACHINE,
        may_change=True,
    )

    output_dir: str = option(
        "models/sft_specialist", "folder for checkpoints, final_model and metrics", group=RUN, may_change=True
    )
    save_steps: int = option(
        0,
        "also checkpoint every N steps, keeping only the latest; 0 = at epoch ends only",
        type=number(int, 0),
        group=RUN,
        may_change=True,
        metavar="N",
    )
    keep_checkpoints: int = option(
        0,
        "keep the last N epoch checkpoints plus the best; 0 = all",
        type=number(int, 0),
        group=RUN,
        may_change=True,
        metavar="N",
    )
    resume: bool = option(
        False, "resume from the latest checkpoint in output_dir", group=RUN, may_change=True
    )
    overwrite: bool = option(False, "replace an earlier run in output_dir", group=RUN, may_change=True)
    dry_run: bool = option(
        False, "run the largest step, estimate time and memory, write nothing", group=RUN, may_change=True
    )
    report_to: str = option(
        "none",
        "also write metrics (no text) for a tracker",
        choices=["none", "tensorboard"],
        group=RUN,
        may_change=True,
    )

    @property
    def token_cache(self) -> Path:
        """The folder that keeps the rows as tokens for the next start."""
        return Path(self.output_dir) / "token_cache"


@dataclass
class InferenceConfig(MachineOptions):
    """Options of sft_inference.py."""

    model_path: str = option("./models/sft_specialist/final_model", "adapter folder", group=MODEL)
    base_model: str | None = option(
        None,
        "base model folder or Hub id (default: the one the adapter was trained on)",
        group=MODEL,
        metavar="MODEL",
    )
    merge_to: str | None = option(
        None, "write base model and adapter, merged, to this new folder and exit", group=MODEL, metavar="DIR"
    )

    clinical_note: str | None = option(
        None, "one note; - reads it from standard input", group=NOTES, metavar="TEXT"
    )
    input_file: list[str] | None = option(
        None,
        "notes: .txt (see one_note), .csv (column clinical_note, optionally id), .jsonl (the same keys), or "
        "several .txt files or a folder of them, one note each",
        group=NOTES,
        metavar="FILE",
    )
    one_note: str = option(
        "auto",
        "what one note is in a .txt or in piped text; auto = a line (piped: a paragraph), unless it looks "
        "like a part of a note",
        choices=["auto", "file", "line", "paragraph"],
        group=NOTES,
    )
    id_column: str | None = option(None, "the column of ids, if not id", group=NOTES, metavar="NAME")
    note_column: str | None = option(
        None, "the column of notes, if not clinical_note", group=NOTES, metavar="NAME"
    )
    keep_columns: list[str] | None = option(
        None, "columns to carry over to the output", group=NOTES, metavar="NAME"
    )
    output_file: str | None = option(
        None,
        "file for the summaries of input_file: .jsonl or .csv (default: standard output)",
        group=NOTES,
        metavar="FILE",
    )
    resume: bool = option(False, "continue an interrupted run (same --output_file)", group=NOTES)
    fail_on_error: bool = option(
        False, "exit with status 1 if any note failed (without it, if all failed)", group=NOTES
    )
    json: bool = option(
        False, "print complete results as JSON, one per line (standard output only)", group=NOTES
    )

    max_new_tokens: int = option(
        DEFAULT_MAX_NEW_TOKENS, "longest summary, in tokens", type=number(int, 1), group=GENERATION
    )
    temperature: float = option(
        0.0, "0 = greedy; above 0 = sampling", type=number(float, 0), group=GENERATION
    )
    seed: int = option(0, "random seed for sampling", type=number(int, 0, 2**32 - 1), group=GENERATION)
    max_length: int | None = option(
        None,
        "maximum tokens of the prompt; longer notes are shortened, with a warning (default: what the "
        "model's context window leaves beside --max_new_tokens)",
        type=number(int, 32),
        group=GENERATION,
    )

    batch_size: int = option(
        DEFAULT_GENERATION_BATCH_SIZE,
        "summaries written at the same time",
        type=number(int, 1),
        group=MACHINE,
    )
    no_merge: bool = option(
        False, "keep the adapter beside the base weights instead of merging it: slower", group=MACHINE
    )


# ------------------------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fix = f"run python {self.prog} --help"
        choice = re.search(r"invalid choice: '(.*)' \(choose", message, re.DOTALL)
        if choice:
            message = message.replace(f"'{choice[1]}'", safe_id(choice[1]), 1)
        if message.endswith("expected one argument"):
            name = message.split()[1].rstrip(":")
            fix = f'pass a value; one that starts with "-" needs "=": {name}=-VALUE'
        raise InputError(message, fix)


class _Help(argparse.HelpFormatter):
    """Shows every default, lists as they are typed."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action):
        default = action.default
        if default is argparse.SUPPRESS or "(default: " in action.help:
            return action.help
        if default is None:
            shown = "none"
        elif default is False:
            shown = "off"
        elif isinstance(default, list):
            shown = " ".join(default)
        else:
            shown = "%(default)s"
        return f"{action.help} (default: {shown})"


def _make_parser(config_class, description: str) -> argparse.ArgumentParser:
    parser = _Parser(description=description, formatter_class=_Help, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    groups = {}
    for field in sorted(
        dataclasses.fields(config_class), key=lambda field: _GROUPS.index(field.metadata["group"])
    ):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # `str | None`
            kind = typing.get_args(kind)[0]
        arguments = dict(field.metadata["argparse"])
        if kind is bool:
            arguments["action"] = "store_true"
        elif typing.get_origin(kind) is list:
            arguments.setdefault("nargs", "+")
        else:
            arguments.setdefault("type", kind)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        help = field.metadata["help"].replace("%", "%%")
        groups[title].add_argument(f"--{field.name}", default=default, help=help, **arguments)
    return parser


def parse_options(config_class, description: str, argv: list[str] | None = None):
    """The command line as a `config_class` (a dataclass of `option` fields). Raises InputError for a bad
    option."""
    parser = _make_parser(config_class, description)
    values, unknown = parser.parse_known_args(argv)
    names = [word.partition("=")[0] for word in unknown if re.fullmatch(r"--\w+(=.*)?", word, re.DOTALL)]
    if names:
        raise InputError(f"unrecognized arguments: {preview_list(names)}", f"run python {parser.prog} --help")
    if unknown:  # may be patients' text: not shown
        problem = f"unexpected arguments: {plural(len(unknown), 'word')} outside any option"
        raise InputError(problem, "put quotes around a text with spaces")
    for name, value in vars(values).items():
        # An empty note has a message of its own
        words = value if isinstance(value, list) else [value]
        if "" in [word.strip() for word in words if isinstance(word, str)] and name != "clinical_note":
            raise InputError(f"--{name} is empty", "pass a value, or leave it out")
    return config_class(**vars(values))
