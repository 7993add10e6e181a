"""The options of sft_evaluation.py."""

from dataclasses import dataclass

from sft.option_fields import DATA, GENERATION, MACHINE, MODEL, NAME, RUN, number, option
from sft.options import DEFAULT_GENERATION_BATCH_SIZE, ColumnOptions, MachineOptions, PromptFromOption

_SYSTEMS = "base base_examples free verified quote selected lead commonest reference".split()


@dataclass
class EvaluationConfig(PromptFromOption, ColumnOptions, MachineOptions):
    """Options of sft_evaluation.py."""

    model_path: list[str] = option(["./models/sft_specialist/final_model"], "adapter folders", group=MODEL)
    test_csv: str | None = option(None, "rows not trained on (default: the bundled ones)", group=DATA)
    train_csv: list[str] | None = option(None, "the rows trained on (default: the bundled ones)", group=DATA)
    n_rows: int | None = option(None, "evaluate this many rows, at random", type=number(int, 2), group=DATA)
    by: str | None = option(None, "also by this column, or by note_length", group=DATA, metavar=NAME)
    systems: list[str] | None = option(None, "what to compare (default: all)", group=RUN, choices=_SYSTEMS)
    output_dir: str = option("models/sft_evaluation", "folder for the report and the summaries", group=RUN)
    blind_sheet: bool = option(False, "also write a sheet to read without knowing the systems", group=RUN)
    ratings: list[str] | None = option(None, "count one or two filled-in sheets, and stop", group=RUN)
    export_preferences: str | None = option(
        None,
        "instead, write pairs for DPO (Stage B) to this file: training summaries, and the specialist's own of the "
        "same notes in which the check finds most",
        group=RUN,
        metavar="FILE.jsonl",
    )
    max_new_tokens: int | None = option(
        None, "longest summary, in tokens (default: the adapter's)", type=number(int, 1), group=GENERATION
    )
    batch_size: int = option(
        DEFAULT_GENERATION_BATCH_SIZE, "summaries written together", type=number(int, 1), group=MACHINE
    )
