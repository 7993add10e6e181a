"""Command-line options. Each is declared once, as a dataclass field that is parser, help text and saved
configuration.

Options that several scripts share are declared in groups that the scripts' configurations inherit."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from sft.cli import InputError
from sft.option_fields import GROUPS, MAP, NAME, TEXT, number, option

# isort: split
from sft.option_fields import check_config, check_value, check_words, given_names, parse_options  # noqa: F401

BUNDLED_MODEL = "smollm2-135m-instruct"
BUNDLED_TRAIN_FILE = "phase1_data/sft/train_set_processed.csv"
BUNDLED_VALIDATION_FILE = "phase1_data/sft/validation_set_processed.csv"
DEFAULT_MAX_LENGTH = 512
OLDER_MAX_NEW_TOKENS = 150  # of adapters that do not say what their training summaries needed
DEFAULT_GENERATION_BATCH_SIZE = 32
CPU_TOKENS_PER_PASS = 800  # a CPU's matrix products gain little from more, and memory grows with them

# A field of each group of --help
data, notes, model, training, lora, generation, machine, run = (
    partial(option, group=group) for group in GROUPS
)

COUNT = number(int, 0)
AT_LEAST_1 = number(int, 1)
NOT_NEGATIVE = number(float, 0)
POSITIVE = number(float, 0, above_low=True)
SEED = number(int, 0, 2**32 - 1)
LENGTH = number(int, 32)


# ------------------------------------------------------------------------------- shared groups


@dataclass
class FileOptions:
    given: ClassVar[set[str]] = set()  # the names of what was typed, also with its default

    train_csv: str | list[str] = data(
        [BUNDLED_TRAIN_FILE],
        "training rows: .csv, .tsv, .json or .jsonl with the columns clinical_note, model_summary, label and "
        "optionally id; several files are read as one",
    )
    val_csv: str | None = data(
        None,
        f"validation rows, the same (default: {BUNDLED_VALIDATION_FILE}, if train_csv is the default too)",
    )
    val_fraction: float | None = data(
        None,
        "without val_csv: set this share of the training notes apart for validation, with all that are nearly "
        "the same, chosen by seed",
        type=number(float, 0, 0.5, above_low=True),
    )


@dataclass
class ColumnOptions:
    """What the columns and labels of a file with summaries are called."""

    id_column: str | None = data(None, "the column of ids, if not id", metavar=NAME)
    note_column: str | None = data(None, "the column of notes, if not clinical_note", metavar=NAME)
    summary_column: str | None = data(None, "the column of summaries, if not model_summary", metavar=NAME)
    label_column: str | None = data(None, "the column of labels, if not label", metavar=NAME)
    label: str | None = data(
        None, "the label of all rows, for files without one", choices=["factual", "hallucinated"]
    )
    label_map: str | None = data(None, "labels of other names: yes=factual,no=hallucinated", metavar=MAP)
    skip_empty: bool = data(False, "leave out rows with an empty note or summary")


@dataclass
class DataOptions(ColumnOptions, FileOptions):
    stray_citations: str = data(
        "drop",
        "citations of sentences that the prompt does not number, or the note does not have: drop them from the "
        "summary, or refuse the file",
        choices=["drop", "refuse"],
    )
    max_length: int = data(
        DEFAULT_MAX_LENGTH,
        "maximum tokens of prompt plus summary; longer notes are shortened",
        type=LENGTH,
    )
    sentence_numbering: str = data(
        "auto",
        "number the note's sentences in the prompt; auto = if most training summaries cite them; v1 = by the"
        " rules of earlier versions, for citations that were written with them",
        choices=["auto", "on", "off", "v1"],
    )
    instruction: str | None = data(None, "instruction in the prompt (default: built in)", metavar=TEXT)
    seed: int = training(42, "random seed (row order, dropout, LoRA initialization, val_fraction)", type=SEED)
    model_name: str = model(BUNDLED_MODEL, "base model: the bundled one, a local folder or a Hugging Face id")
    chat_template: str | None = model(
        None,
        "file with a chat template (jinja) to use instead of the tokenizer's, or the name of one of its own",
        metavar="FILE",
    )
    thinking: str = model(
        "off",
        "whether the chat template asks the model to think (templates that know no thinking ignore it)",
        choices=["on", "off"],
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
    device: str = machine("auto", "device to run on", choices=["auto", "cuda", "mps", "cpu"])
    dtype: str = machine(
        "auto", "dtype of the frozen base model", choices=["auto", "float32", "bfloat16", "float16"]
    )
    quantization: str = machine(
        "auto",
        "load the base model in fewer bits; 4bit = NF4 (bitsandbytes); 8bit = bitsandbytes, for inference on an "
        "x86 CPU oneDNN; auto = none, for inference as trained",
        choices=["auto", "none", "8bit", "4bit"],
    )
    use_8bit: bool = machine(False, "the same as --quantization 8bit")
    use_4bit: bool = machine(False, "the same as --quantization 4bit")


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

    export_preferences: str | None = run(
        None,
        "write factual/hallucinated pairs of the same note to this file, as JSON Lines for DPO (Stage B)",
        metavar="FILE.jsonl",
    )
    model_path: str | None = model(
        None,
        "adapter folder whose prompt and max_length to use (default: what --model_name would be trained with)",
        metavar="DIR",
    )


@dataclass
class TrainConfig(MachineOptions, DataOptions):
    """Options of stage_a_sft_training.py."""

    recorded: ClassVar[dict] = {}  # the SHA-256s of the run that is repeated

    preset: str = training(
        "documents",
        "a set of values for options that are not given (guide, section 3)",
        choices=["documents", "thorough", "quick"],
    )
    config: str | None = training(
        None,
        "repeat a run: its sft_config.json, or a .yaml of options; options given override it",
        metavar="FILE",
    )
    num_epochs: int = training(2, "passes over the training rows", type=AT_LEAST_1)
    learning_rate: float = training(2e-4, "peak learning rate, reached after warmup", type=POSITIVE)
    batch_size: int = training(8, "rows in one forward pass, at most", type=AT_LEAST_1)
    gradient_accumulation_steps: int = training(1, "batches accumulated per optimizer step", type=AT_LEAST_1)
    warmup_ratio: float = training(0.03, "fraction of the steps spent warming up", type=number(float, 0, 1))
    lr_scheduler: str = training(
        "cosine", "decay of the learning rate after warmup", choices=["cosine", "linear", "constant"]
    )
    weight_decay: float = training(0.0, "AdamW's weight decay", type=NOT_NEGATIVE)
    max_grad_norm: float = training(1.0, "clip the gradient norm to this; 0 = off", type=NOT_NEGATIVE)
    early_stopping_patience: int = training(
        0, "stop after this many epochs that are not better (see keep_best); 0 = never", type=COUNT
    )
    n_sample_notes: int = training(
        0, "after each epoch, write and score the summaries of this many validation notes", type=COUNT
    )
    keep_best: str = training(
        "loss",
        "what decides which epoch is best: validation loss, or a score of the sample notes' summaries",
        choices=["loss", "check_score", "rouge_l"],
    )
    part_rows: bool = training(
        False,
        "also train on single summary sentences, each with the part of its note that holds its words, for "
        "--writing verified",
    )
    lora_r: int = lora(16, "LoRA rank", type=AT_LEAST_1)
    lora_alpha: float = lora(32, "LoRA alpha: the update is scaled by alpha / r", type=POSITIVE)
    lora_dropout: float = lora(
        0.05, "dropout on the adapter's inputs during training", type=number(float, 0, 0.99)
    )
    target_modules: list[str] = lora(
        ["q_proj", "v_proj"], "layers that get an adapter, or all-linear", metavar=NAME
    )
    use_rslora: bool = lora(False, "scale the update by alpha / sqrt(r) instead (rank-stabilized LoRA)")
    init_adapter: str | None = lora(
        None, "adapter folder to train on from: its LoRA shape and prompt stay", metavar="DIR"
    )
    max_tokens_per_batch: int | None = machine(
        None,
        "split forward passes at about this many tokens: less memory, the optimizer step is unchanged "
        f"(default: {CPU_TOKENS_PER_PASS:,} on a CPU, else no limit)",
        type=AT_LEAST_1,
    )
    shard_base: bool = machine(
        False, "split the base model's weights over the processes (FSDP), for models larger than one GPU"
    )
    gradient_checkpointing: bool = machine(
        False, "recompute activations in the backward pass: less memory, about a third slower"
    )
    output_dir: str = run("models/sft_specialist", "folder for checkpoints, final_model and metrics")
    save_steps: int = run(
        0,
        "also checkpoint every N steps, keeping only the latest; 0 = at epoch ends only",
        type=COUNT,
        metavar="N",
    )
    keep_checkpoints: int = run(
        0, "keep the last N epoch checkpoints plus the best; 0 = all", type=COUNT, metavar="N"
    )
    resume: bool = run(False, "resume from the latest checkpoint in output_dir")
    overwrite: bool = run(False, "replace an earlier run in output_dir")
    dry_run: bool = run(False, "run the largest step, estimate time and memory, write nothing")
    report_to: str = run(
        "none", "also write metrics (no text) for a tracker", choices=["none", "tensorboard"]
    )


# What --resume accepts another value of: the steps already done do not depend on it, or something else in the
# fingerprint stands for it (the SHA-256 of data and base weights, the dtype used in the end, use_8bit and
# use_4bit, the checkpoint's prompt). An option that older runs did not have counts as having had its default
MAY_CHANGE = set(
    "preset config init_adapter train_csv val_csv model_name chat_template device dtype quantization num_epochs"
    " early_stopping_patience shard_base gradient_checkpointing output_dir save_steps keep_checkpoints resume"
    " overwrite dry_run report_to".split()
)


@dataclass
class PromptFromOption:
    base_model: str | None = model(
        None,
        "base model folder or Hub id (default: the one the adapter was trained on)",
        metavar="MODEL",
    )
    prompt_from: str | None = model(
        None,
        "adapter folder of this toolkit whose prompt to use, for an adapter that another tool trained further",
        metavar="DIR",
    )


@dataclass
class InferenceConfig(PromptFromOption, MachineOptions):
    """Options of sft_inference.py."""

    model_path: str = model("./models/sft_specialist/final_model", "adapter folder, or merged folder")
    merge_to: str | None = model(
        None, "write base model and adapter, merged, to this new folder and exit", metavar="DIR"
    )
    verify: bool = model(False, "read all weights again to check them, also those that look unchanged")
    clinical_note: str | None = notes(None, "one note; - reads it from standard input", metavar=TEXT)
    input_file: list[str] | None = notes(
        None,
        "notes: .txt (see one_note), a table with the column clinical_note and optionally id (.csv, .tsv, .json, .jsonl), or "
        "several .txt files or a folder of them, one note each",
        metavar="FILE",
    )
    one_note: str = notes(
        "auto",
        "what one note is in a .txt or in piped text; auto = a line (piped: a paragraph), unless it looks "
        "like a part of a note",
        choices=["auto", "file", "line", "paragraph"],
    )
    id_column: str | None = notes(None, "the column of ids, if not id", metavar=NAME, needs="input_file")
    note_column: str | None = notes(
        None, "the column of notes, if not clinical_note", metavar=NAME, needs="input_file"
    )
    keep_columns: list[str] | None = notes(
        None, "columns to carry over to the output", metavar=NAME, needs="input_file"
    )
    output_file: str | None = notes(
        None,
        "file for the summaries of input_file: .jsonl or .csv (default: standard output)",
        metavar="FILE",
        needs="input_file",
    )
    max_risk: float | None = notes(
        None,
        "put summaries whose check_risk is higher, or which could not be checked, in review_file instead",
        type=NOT_NEGATIVE,
        metavar="R",
    )
    review_file: str | None = notes(
        None, "file for the summaries that max_risk puts aside: .jsonl or .csv", metavar="FILE"
    )
    resume: bool = notes(False, "continue an interrupted run", needs="output_file")
    fail_on_error: bool = notes(
        False, "exit with status 1 if any note failed (without it, if all failed)", needs="input_file"
    )
    json: bool = notes(False, "print complete results as JSON, one per line (standard output only)")
    max_new_tokens: int | None = generation(
        None,
        "longest summary, in tokens (default: from the adapter, what its training summaries needed; "
        f"{OLDER_MAX_NEW_TOKENS} for older ones)",
        type=AT_LEAST_1,
    )
    writing: str | None = generation(
        None,
        "quote = sentences of the note, chosen; verified = the same, each in the model's words where these can be "
        "traced to it; free = a text of the model's own (default: the adapter's)",
        choices=["verified", "quote", "free"],
    )
    citations: bool = generation(
        False,
        "cite the note's sentences after each sentence (verified and quote; always for adapters that were "
        "trained on citations)",
    )
    temperature: float = generation(0.0, "0 = greedy; above 0 = sampling", type=NOT_NEGATIVE)
    seed: int = generation(0, "random seed for sampling", type=SEED, needs="temperature")
    max_length: int | None = generation(
        None,
        "maximum tokens of the prompt; longer notes are shortened, with a warning (default: what the "
        "model's context window leaves beside --max_new_tokens)",
        type=LENGTH,
    )
    batch_size: int = machine(
        DEFAULT_GENERATION_BATCH_SIZE,
        "summaries written at the same time",
        type=AT_LEAST_1,
        needs="input_file or --serve",
    )
    no_merge: bool = machine(False, "keep the adapter beside the base weights instead of merging it: slower")
    serve: int | None = run(
        None,
        "answer requests on this port of 127.0.0.1, of this machine alone; needs requirements_serve.txt",
        type=number(int, 1, 65535),
        metavar="PORT",
    )
    serve_token_file: str | None = run(
        None,
        "file with a word that requests must show: Authorization: Bearer WORD",
        metavar="FILE",
        needs="serve",
    )


SYSTEM_NAMES = "base base_examples free verified quote selected lead commonest reference".split()


@dataclass
class EvaluationConfig(PromptFromOption, ColumnOptions, MachineOptions):
    """Options of sft_evaluation.py."""

    model_path: list[str] = model(["./models/sft_specialist/final_model"], "adapter folders")
    test_csv: str | None = data(None, "rows not trained on (default: the bundled ones)")
    train_csv: list[str] | None = data(None, "the rows trained on (default: the bundled ones)")
    n_rows: int | None = data(None, "evaluate this many rows, at random", type=number(int, 2))
    by: str | None = data(None, "also by this column, or by note_length", metavar=NAME)
    systems: list[str] | None = run(None, "what to compare (default: all)", choices=SYSTEM_NAMES)
    output_dir: str = run("models/sft_evaluation", "folder for the report and the summaries")
    blind_sheet: bool = run(False, "also write a sheet to read without knowing the systems")
    ratings: list[str] | None = run(None, "count one or two filled-in sheets, and stop")
    export_preferences: str | None = run(
        None,
        "instead, write pairs for DPO (Stage B) to this file: training summaries, and the specialist's own of the "
        "same notes in which the check finds most",
        metavar="FILE.jsonl",
    )
    max_new_tokens: int | None = generation(
        None, "longest summary, in tokens (default: the adapter's)", type=AT_LEAST_1
    )
    batch_size: int = machine(DEFAULT_GENERATION_BATCH_SIZE, "summaries written together", type=AT_LEAST_1)
