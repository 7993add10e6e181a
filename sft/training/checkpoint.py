"""The output folder of a run: what it holds, atomic checkpoints, resuming.

A checkpoint is an adapter folder with training_state.pt. It counts only while every file in its SHA256SUMS is
there and unchanged. torch is imported in functions: the folder is checked before the slow imports."""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sft.cli import InputError, as_input_error, log, on_main_process, safe_id
from sft.files import (
    check_outside_models,
    checksum_problem,
    lock,
    make_private_dir,
    new_folder,
    remove,
    try_saving,
    write_atomic,
    write_checksums,
)
from sft.model.folder import read_sft_config
from sft.options import TrainConfig
from sft.training.report import best_first, load_figure, model_card, optional

if TYPE_CHECKING:
    from sft.training.run import Run


# ------------------------------------------------------------------------------- what is there


# The names that a run gives, whole: checkpoint_backup is somebody's own
_CHECKPOINT = re.compile(r"checkpoint_(epoch|step)_\d+")
_FILES = re.compile(
    r"training_stats\.json|metrics\.jsonl|loss_curve\.png|sample_notes_epoch_\d+\.jsonl|sft_tracker"
    r"|token_cache"  # of earlier versions
)
_LEFTOVER = re.compile(
    rf"\.({_CHECKPOINT.pattern}|final_model)\.(\d+|old|\w{{8}})|\.({_FILES.pattern})\.\w{{8}}"
)
# Files of its folders where no SHA256SUMS lists them, and what file managers leave behind
_WRITTEN = re.compile(
    r"SHA256SUMS|README\.md|training_state\.pt|adapter_model\.safetensors|chat_template\.jinja|merges\.txt"
    r"|(sft_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|tokenizer\.model|events\.out\.tfevents\..*|hparams\.yml|\w+\.tokens|\.DS_Store|Thumbs\.db|desktop\.ini"
)


@contextlib.contextmanager
def output_lock(config: TrainConfig) -> Iterator[None]:
    """Inside, no other run can write to the output folder; at the end it is removed if it is new and empty.
    Raises InputError if another run is at work there."""
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file", "specify a folder with --output_dir")
    if config.dry_run or not on_main_process():
        yield
        return
    new = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    make_private_dir(output_dir)
    path = output_dir / ".lock"
    # A link planted there is not followed
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link", "remove it, or choose another --output_dir")
    with open(path, "a") as file:
        in_use = InputError(
            f"another training run is at work in {output_dir}", "wait for it, or choose another --output_dir"
        )
        lock(file, in_use.problem, in_use.fix)
        # Opened just before the other run ended and removed it
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise in_use
        try:
            try_saving(output_dir)
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                for folder in new:
                    folder.rmdir()


def _named(output_dir: Path, names: re.Pattern) -> list[Path]:
    """What is there under these names; of checkpoints, the folders."""
    return sorted(path for path in output_dir.glob("*") if names.fullmatch(path.name))


def run_files(output_dir: Path) -> list[Path]:
    """What an earlier run left in `output_dir`, complete or not; what others put there is not listed."""
    files = _named(output_dir, _FILES)
    folders = [output_dir / "final_model", *_named(output_dir, _CHECKPOINT)]
    folders = [folder for folder in folders if (folder / "sft_config.json").is_file()]
    # Files of those names, but not from a run of ours
    if not folders and not _is_our_metrics(output_dir / "metrics.jsonl"):
        files = []
    return [*files, *folders, *_named(output_dir, _LEFTOVER)]


def _is_our_metrics(file: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, TypeError), open(file, encoding="utf-8") as lines:
        first_line = lines.readline()
        return not first_line or not {"n_target_tokens", "val_loss"}.isdisjoint(json.loads(first_line))
    return False


def check_output_dir(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, if any. Raises InputError if the run may not write there."""
    output_dir = Path(config.output_dir)
    if config.resume and config.overwrite:
        raise InputError("--resume cannot be combined with --overwrite", "choose one")
    check_outside_models("--output_dir", output_dir)
    if config.resume or config.overwrite:
        check_others_files(output_dir)
        check_inputs_elsewhere(config, run_files(output_dir))
        return newest_checkpoint(config) if config.resume else None
    if run_files(output_dir):
        fix = "use --resume to continue it, --overwrite to replace it, or choose another --output_dir"
        raise InputError(f"{output_dir} holds an earlier run", fix)
    if any(path.name[0] != "." for path in output_dir.glob("*")):
        fix = "choose another --output_dir, or use --overwrite (files not written by a run are kept)"
        raise InputError(f"--output_dir {output_dir} is not empty", fix)
    return None


def check_others_files(output_dir: Path) -> None:
    """Raises InputError if what the run may replace or remove by its name holds what no run wrote."""
    ours = run_files(output_dir)
    for path in [output_dir / "final_model", *_named(output_dir, _CHECKPOINT), *_named(output_dir, _FILES)]:
        if path.exists() and not path.is_symlink() and path not in ours:
            fix = "move it elsewhere, or choose another --output_dir: the run writes one of this name"
            raise InputError(f"{path} was not written by a training run", fix)
    for folder in ours:
        if folder.is_symlink() or not folder.is_dir() or folder.name.startswith("."):
            continue
        names = set()
        with contextlib.suppress(OSError):
            lines = (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace").splitlines()
            names = {line.partition("  ")[2] for line in lines}
        for path in sorted(folder.rglob("*")):
            is_folder = path.is_dir() and not path.is_symlink()
            is_ours = path.relative_to(folder).as_posix() in names or _WRITTEN.fullmatch(path.name)
            if not (is_folder or is_ours):
                fix = "move it elsewhere: the run may replace its folder"
                raise InputError(f"{path} was not written by a training run", fix)


def check_inputs_elsewhere(config: TrainConfig, replaced: list[Path]) -> None:
    """Raises InputError if the run would remove what it starts from."""
    inputs = {"init_adapter": config.init_adapter, "val_csv": config.val_csv, "model_name": config.model_name}
    named = [*inputs.items(), *(("train_csv", file) for file in config.train_files)]
    for name, file in named:
        places = {Path(file).resolve(), *Path(file).resolve().parents} if file else set()
        if not places.isdisjoint(path.resolve() for path in replaced):
            problem = f"--{name} {file} belongs to the run in {config.output_dir}, which would be replaced"
            raise InputError(problem, "choose another --output_dir")


def newest_checkpoint(config: TrainConfig) -> Path | None:
    """The complete checkpoint that is furthest along (the end of an epoch, after its validation, is later
    than its last step); None if the run was interrupted before its first. Raises InputError if there was no
    run, or none is complete."""
    output_dir = Path(config.output_dir)
    # One that a killed run had moved away and not yet replaced; several processes may do it at once
    for old in output_dir.glob(".checkpoint_*.old"):
        folder = output_dir / old.name.removeprefix(".").removesuffix(".old")
        if not folder.exists():
            with contextlib.suppress(OSError):
                old.rename(folder)
    found = {folder: checksum_problem(folder) for folder in _named(output_dir, _CHECKPOINT)}
    for folder, problem in found.items():
        if problem and on_main_process():
            log(f"warning: {folder} is incomplete and skipped: {problem}")
    complete = [folder for folder, problem in found.items() if problem is None]
    if complete:
        return max(complete, key=lambda folder: (read_sft_config(folder)["step"], "_epoch_" in folder.name))
    if found:
        fix = "restore one, or replace --resume with --overwrite to start over"
        raise InputError(f"--resume: {output_dir} holds no complete checkpoint", fix)
    if not _is_our_metrics(output_dir / "metrics.jsonl"):
        fix = "leave out --resume to start a new run, or pass the run's folder with --output_dir"
        raise InputError(f"--resume: {output_dir} holds no checkpoint", fix)
    if (output_dir / "final_model").exists():
        fix = "train on from it (--init_adapter, another --output_dir), or replace --resume with --overwrite"
        raise InputError(f"--resume: {output_dir} holds a finished model and no checkpoint", fix)
    return None


# ------------------------------------------------------------------------------- saving


def save_checkpoint(run: "Run", name: str) -> Path:
    """Saves adapter and training state to output_dir/name, then removes needless checkpoints: those inside
    epochs, and all epochs' but the best and the last --keep_checkpoints. Raises InputError if the disk is
    full; what was there stays."""
    folder = run.output_dir / name
    # A signal right after --save_steps has saved this step asks for it again
    is_saved = name.startswith("checkpoint_step_") and folder.is_dir() and checksum_problem(folder) is None
    if run.accelerator.is_main_process and not is_saved:
        # Metrics reach the disk before the checkpoint that includes their steps
        metrics = run.output_dir / "metrics.jsonl"
        if metrics.is_file():
            with open(metrics, "rb+") as file:
                os.fsync(file.fileno())
        _write_checkpoint(run, folder)
        remove(_needless_checkpoints(run, folder))
    run.accelerator.wait_for_everyone()
    return folder


def _write_checkpoint(run: "Run", folder: Path) -> None:
    from sft.model.adapter import save_adapter

    progress = run.progress
    state = {
        "fingerprint": run.fingerprint,
        "progress": asdict(progress),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
    }
    sft_config = run.sft_config | {"step": progress.step, "epoch": len(progress.epochs)}
    targets = sorted(run.model.peft_config["default"].target_modules)
    card = model_card(sft_config, run.base_name, targets, progress.untrained_val_loss, progress.epochs)
    save_adapter(folder, run.model, run.tokenizer, run.base_name, sft_config, card, state)


def _needless_checkpoints(run: "Run", newest: Path) -> list[Path]:
    needless = [path for path in run.output_dir.glob("checkpoint_step_*") if _CHECKPOINT.fullmatch(path.name)]
    n_kept = run.config.keep_checkpoints
    epochs = run.progress.epochs
    if n_kept:
        kept = [*best_first(epochs, run.config.keep_best)[:1], *epochs[-n_kept:]]
        needless += [
            run.output_dir / f"checkpoint_epoch_{epoch['epoch']}" for epoch in epochs if epoch not in kept
        ]
    return [path for path in needless if path != newest]


def promote_best_epoch(run: "Run") -> int:
    """Copies the best epoch with a complete checkpoint to final_model; returns its number."""
    for epoch in best_first(run.progress.epochs, run.config.keep_best):
        source = run.output_dir / f"checkpoint_epoch_{epoch['epoch']}"
        if source.is_dir() and checksum_problem(source) is None:
            with new_folder(run.output_dir / "final_model") as temporary:
                # Contents alone: not every file system takes permissions and times
                for path in source.iterdir():
                    if path.suffix != ".pt" and path.name != "SHA256SUMS" and path.is_file():
                        shutil.copyfile(path, temporary / path.name)
                write_checksums(temporary)
            return epoch["epoch"]
        # Its checkpoint was removed after an earlier end of the run
        if _is_in_final_model(run, epoch["epoch"]):
            return epoch["epoch"]
        log(f"warning: {source} is incomplete and cannot become final_model")
    raise InputError(
        f"{run.output_dir}: no epoch has a complete checkpoint", "use --overwrite to train again"
    )


# ------------------------------------------------------------------------------- starting and resuming


def begin(run: "Run", checkpoint: Path | None) -> None:
    """Restores `checkpoint`, or empties the output folder of an earlier run; then the trackers. Writes
    nothing if nothing is left to do. Raises InputError if the checkpoint is another run's."""
    metrics = run.output_dir / "metrics.jsonl"
    if checkpoint:
        restore(run, checkpoint)
        if is_finished(run):
            return
    if run.accelerator.is_main_process and checkpoint:
        remove(_named(run.output_dir, _LEFTOVER))
        truncate_metrics(metrics, run.progress.step, len(run.progress.epochs))
    elif run.accelerator.is_main_process:
        if run.config.resume:
            log("The earlier run was interrupted before its first checkpoint: starting again")
        remove(run_files(run.output_dir))
        make_private_dir(run.output_dir)
        write_atomic(metrics, "")
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        with optional("loss_curve.png at the end"):
            load_figure()
    if run.config.report_to != "none":
        # No text, no paths
        options = asdict(run.config).items()
        numbers = {name: value for name, value in options if isinstance(value, int | float)}
        with optional("tracker"):
            run.accelerator.init_trackers("sft_tracker", numbers)


def is_finished(run: "Run") -> bool:
    """Whether a restored run has nothing left to do, and final_model is the epoch it should be."""
    progress = run.progress
    is_last = len(progress.epochs) >= run.config.num_epochs or progress.out_of_patience(run.config)
    return is_last and _is_in_final_model(run, progress.kept_epoch)


def _is_in_final_model(run: "Run", epoch: int) -> bool:
    folder = run.output_dir / "final_model"
    return checksum_problem(folder) is None and read_sft_config(folder)["epoch"] == epoch


def restore(run: "Run", folder: Path) -> None:
    """Continues the run from checkpoint `folder`. Raises InputError if that is another run's."""
    from sft.model.adapter import load_adapter_weights, read_state

    fix = "use the version that wrote it, or replace --resume with --overwrite to start over"
    with as_input_error(f"--resume: {folder} cannot be continued by this version", fix):
        state = read_state(folder)
        # Format 1 called it "identity"
        fingerprint = state.get("fingerprint") or state["identity"]
        check_same_run(run, folder, fingerprint)
        load_adapter_weights(run.model, folder, may_be_zero=True)
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.progress.load_state(state["progress"])
    progress = run.progress
    # Only one that is smaller than the batch shows what memory holds
    if progress.micro_batch_size == fingerprint["batch_size"]:
        progress.micro_batch_size = run.config.batch_size
    progress.micro_batch_size = min(progress.micro_batch_size, run.config.batch_size)
    n_epochs = len(progress.epochs)
    if n_epochs > run.config.num_epochs or progress.step > run.plan.total_steps:
        needed = max(n_epochs, -(-progress.step // run.plan.steps_per_epoch))
        problem = f"--resume: the run is in epoch {needed} already, --num_epochs is {run.config.num_epochs}"
        raise InputError(problem, f"use --num_epochs {needed} or more")
    run.log(f"Resuming from {folder}: {progress.step:,} of {run.plan.total_steps:,} steps are done")


# Their product is the rows of a step, which is what matters
LAYOUT = ("batch_size", "gradient_accumulation_steps", "n_processes")


def check_same_run(run: "Run", folder: Path, saved: dict) -> None:
    """Raises InputError unless the checkpoint's fingerprint is the run's, but for how a step's rows are
    divided. An option that the saved run did not have counts as its default, what else it lacks as the
    same."""
    now = run.fingerprint
    lacking = now | asdict(TrainConfig()) | {"parent": None}
    was = {name: saved.get(name, lacking[name]) for name in now}
    changed = [name for name in now if was[name] != now[name]]
    n_rows, n_rows_now = (math.prod(values[name] for name in LAYOUT) for values in (was, now))
    if changed and set(changed) <= set(LAYOUT) and n_rows == n_rows_now:
        if run.config.lora_dropout:
            run.log(f"info: the {n_rows} rows of a step are divided in another way: dropout will differ")
    elif changed:
        # An instruction or a column's name may hold words from a note
        shown = [f"{name} was {safe_id(str(was[name]))}, is {safe_id(str(now[name]))}" for name in changed]
        problem = f"--resume: {folder} was written with different options or data: {', '.join(shown)}"
        fix = "use the same options, data and base model, or replace --resume with --overwrite to start over"
        raise InputError(problem, fix)


def truncate_metrics(file: Path, step: int, n_epochs: int) -> None:
    """Drops the steps and validations that will be done again, and a last line that a kill cut short."""
    kept = []
    for line in file.read_text(errors="replace").splitlines(keepends=True) if file.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            is_done = values["epoch"] <= n_epochs if "val_loss" in values else values["step"] <= step
            if line.endswith("\n") and is_done:
                kept.append(line)
    write_atomic(file, "".join(kept))
