"""Command-line options. Each is declared once, as a dataclass field that is parser, help text and saved
configuration.

Options that several scripts share are declared in groups that the scripts' configurations inherit.
"""

from dataclasses import dataclass
from pathlib import Path

from sft.cli import InputError
from sft.option_fields import (
    DATA,
    GENERATION,
    LORA,
    MACHINE,
    MAP,
    MODEL,
    NAME,
    NOTES,
    RUN,
    TEXT,
    TRAINING,
    check_config,
    check_value,
    check_words,
    number,
    option,
    parse_options,
    typed_names,
)

# For those who read configurations
__all__ = ["check_config", "check_value", "check_words", "number", "parse_options", "typed_names"]

BUNDLED_MODEL = "smollm2-135m-instruct"
BUNDLED_TRAIN_FILE = "phase1_data/sft/train_set_processed.csv"
BUNDLED_VALIDATION_FILE = "phase1_data/sft/validation_set_processed.csv"
DEFAULT_MAX_LENGTH = 512
OLDER_MAX_NEW_TOKENS = 150  # of adapters that do not say what their training summaries needed
DEFAULT_GENERATION_BATCH_SIZE = 32
CPU_TOKENS_PER_PASS = 800  # a CPU's matrix products gain little from more, and memory grows with them


# ------------------------------------------------------------------------------- shared groups


@dataclass
class FileOptions:
    train_csv: str | list[str] = option(
        [BUNDLED_TRAIN_FILE],
        "training rows: .csv, .tsv, .json or .jsonl with the columns clinical_note, model_summary, label and "
        "optionally id; several files are read as one",
        group=DATA,
        may_change=True,
    )
    val_csv: str | None = option(
        None,
        f"validation rows, the same (default: {BUNDLED_VALIDATION_FILE}, if train_csv is the default too)",
        group=DATA,
        may_change=True,
    )
    val_fraction: float | None = option(
        None,
        "without val_csv: set this share of the training notes apart for validation, with all that are nearly "
        "the same, chosen by seed",
        type=number(float, 0, 0.5, above_low=True),
        group=DATA,
    )


@dataclass
class ColumnOptions:
    """What the columns and labels of a file with summaries are called."""

    id_column: str | None = option(None, "the column of ids, if not id", group=DATA, metavar=NAME)
    note_column: str | None = option(
        None, "the column of notes, if not clinical_note", group=DATA, metavar=NAME
    )
    summary_column: str | None = option(
        None, "the column of summaries, if not model_summary", group=DATA, metavar=NAME
    )
    label_column: str | None = option(None, "the column of labels, if not label", group=DATA, metavar=NAME)
    label: str | None = option(
        None, "the label of all rows, for files without one", choices=["factual", "hallucinated"], group=DATA
    )
    label_map: str | None = option(
        None, "labels of other names: yes=factual,no=hallucinated", group=DATA, metavar=MAP
    )
    skip_empty: bool = option(False, "leave out rows with an empty note or summary", group=DATA)


@dataclass
class DataOptions(ColumnOptions, FileOptions):
    stray_citations: str = option(
        "drop",
        "citations of sentences that the prompt does not number, or the note does not have: drop them from the "
        "summary, or refuse the file",
        choices=["drop", "refuse"],
        group=DATA,
    )
    max_length: int = option(
        DEFAULT_MAX_LENGTH,
        "maximum tokens of prompt plus summary; longer notes are shortened",
        type=number(int, 32),
        group=DATA,
    )
    sentence_numbering: str = option(
        "auto",
        "number the note's sentences in the prompt; auto = if most training summaries cite them; v1 = by the"
        " rules of earlier versions, for citations that were written with them",
        choices=["auto", "on", "off", "v1"],
        group=DATA,
    )
    instruction: str | None = option(
        None, "instruction in the prompt (default: built in)", group=DATA, metavar=TEXT
    )
    seed: int = option(
        42,
        "random seed (row order, dropout, LoRA initialization, val_fraction)",
        type=number(int, 0, 2**32 - 1),
        group=TRAINING,
    )
    model_name: str = option(
        BUNDLED_MODEL,
        "base model: the bundled one, a local folder or a Hugging Face id",
        group=MODEL,
        may_change=True,
    )
    chat_template: str | None = option(
        None,
        "file with a chat template (jinja) to use instead of the tokenizer's, or the name of one of its own",
        group=MODEL,
        metavar="FILE",
        may_change=True,  # a resumed run has its checkpoint's prompt
    )
    thinking: str = option(
        "off",
        "whether the chat template asks the model to think (templates that know no thinking ignore it)",
        choices=["on", "off"],
        group=MODEL,
        may_change=True,
    )

    @property
    def train_files(self) -> list:
        return self.train_csv if isinstance(self.train_csv, list) else [self.train_csv]

    @property
    def val_file(self) -> str | None:
        """None if no file was named: the bundled notes say nothing about other training notes."""
        if self.val_csv is not None or self.val_fraction is not None:
            return self.val_csv
        first, *more = self.train_files
        is_bundled = isinstance(first, str) and first == BUNDLED_TRAIN_FILE and not more
        return BUNDLED_VALIDATION_FILE if is_bundled else None


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
    quantization: str = option(
        "auto",
        "load the base model in fewer bits; 4bit = NF4 (bitsandbytes); 8bit = bitsandbytes, for inference on an "
        "x86 CPU oneDNN; auto = none, for inference as trained",
        choices=["auto", "none", "8bit", "4bit"],
        group=MACHINE,
        may_change=True,  # use_8bit and use_4bit stand for it
    )
    use_8bit: bool = option(False, "the same as --quantization 8bit", group=MACHINE)
    use_4bit: bool = option(False, "the same as --quantization 4bit", group=MACHINE)


def quantization_of(options: dict) -> str | None:
    """ "8bit", "4bit" or None, by --quantization, --use_8bit and --use_4bit, as far as they are in `options`.
    Raises InputError if they contradict each other."""
    flags = {"8bit": options.get("use_8bit"), "4bit": options.get("use_4bit")}
    chosen = {kind for kind, is_on in flags.items() if is_on} | {options.get("quantization", "auto")}
    chosen -= {"auto"}
    if len(chosen) > 1:
        raise InputError("--quantization, --use_8bit and --use_4bit contradict each other", "choose one")
    return None if chosen <= {"none"} else chosen.pop()


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
    model_path: str | None = option(
        None,
        "adapter folder whose prompt and max_length to use (default: what --model_name would be trained with)",
        group=MODEL,
        metavar="DIR",
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
    part_rows: bool = option(
        False,
        "also train on single summary sentences, each with the part of its note that holds its words, for "
        "--writing verified",
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
        ["q_proj", "v_proj"], "layers that get an adapter, or all-linear", group=LORA, metavar=NAME
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
class PromptFromOption:
    base_model: str | None = option(
        None,
        "base model folder or Hub id (default: the one the adapter was trained on)",
        group=MODEL,
        metavar="MODEL",
    )
    prompt_from: str | None = option(
        None,
        "adapter folder of this toolkit whose prompt to use, for an adapter that another tool trained further",
        group=MODEL,
        metavar="DIR",
    )


@dataclass
class InferenceConfig(PromptFromOption, MachineOptions):
    """Options of sft_inference.py."""

    model_path: str = option(
        "./models/sft_specialist/final_model", "adapter folder, or merged folder", group=MODEL
    )
    merge_to: str | None = option(
        None, "write base model and adapter, merged, to this new folder and exit", group=MODEL, metavar="DIR"
    )
    verify: bool = option(
        False, "read all weights again to check them, also those that look unchanged", group=MODEL
    )
    clinical_note: str | None = option(
        None, "one note; - reads it from standard input", group=NOTES, metavar=TEXT
    )
    input_file: list[str] | None = option(
        None,
        "notes: .txt (see one_note), a table with the column clinical_note and optionally id (.csv, .tsv, .json, .jsonl), or "
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
    id_column: str | None = option(
        None, "the column of ids, if not id", group=NOTES, metavar=NAME, needs="input_file"
    )
    note_column: str | None = option(
        None, "the column of notes, if not clinical_note", group=NOTES, metavar=NAME, needs="input_file"
    )
    keep_columns: list[str] | None = option(
        None, "columns to carry over to the output", group=NOTES, metavar=NAME, needs="input_file"
    )
    output_file: str | None = option(
        None,
        "file for the summaries of input_file: .jsonl or .csv (default: standard output)",
        group=NOTES,
        metavar="FILE",
    )
    max_risk: float | None = option(
        None,
        "put summaries whose check_risk is higher, or which could not be checked, in review_file instead",
        type=number(float, 0),
        group=NOTES,
        metavar="R",
    )
    review_file: str | None = option(
        None, "file for the summaries that max_risk puts aside: .jsonl or .csv", group=NOTES, metavar="FILE"
    )
    resume: bool = option(False, "continue an interrupted run (same --output_file)", group=NOTES)
    fail_on_error: bool = option(
        False,
        "exit with status 1 if any note failed (without it, if all failed)",
        group=NOTES,
        needs="input_file",
    )
    json: bool = option(
        False, "print complete results as JSON, one per line (standard output only)", group=NOTES
    )
    max_new_tokens: int | None = option(
        None,
        "longest summary, in tokens (default: from the adapter, what its training summaries needed; "
        f"{OLDER_MAX_NEW_TOKENS} for older ones)",
        type=number(int, 1),
        group=GENERATION,
    )
    writing: str | None = option(
        None,
        "quote = sentences of the note, chosen; verified = the same, each in the model's words where these can be "
        "traced to it; free = a text of the model's own (default: the adapter's)",
        choices=["verified", "quote", "free"],
        group=GENERATION,
    )
    citations: bool = option(
        False,
        "cite the note's sentences after each sentence (verified and quote; always for adapters that were "
        "trained on citations)",
        group=GENERATION,
    )
    temperature: float = option(
        0.0, "0 = greedy; above 0 = sampling", type=number(float, 0), group=GENERATION
    )
    seed: int = option(
        0, "random seed for sampling", type=number(int, 0, 2**32 - 1), group=GENERATION, needs="temperature"
    )
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
        needs="input_file",
    )
    no_merge: bool = option(
        False, "keep the adapter beside the base weights instead of merging it: slower", group=MACHINE
    )
