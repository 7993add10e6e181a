"""The output folder of a run: what stands in it, whole or not at all, and where a run goes on.

A checkpoint is an adapter folder with `training_state.pt` and, written last, SHA256SUMS over all its files (the format
of `sha256sum --check`). It counts only while every file in that list is there and unchanged.
"""

import contextlib
import errno
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from sft.cli import InputError, log
from sft.files import checksum_problem, make_private_dir, write_atomic, write_checksums
from sft.training.report import model_card

TOKEN_CACHE = "token_cache"


def run_files(output_dir: Path) -> list[Path]:
    """What an earlier run left in `output_dir`, whole or half done; what others put there stays."""
    files = [
        output_dir / name
        for name in ("training_stats.json", "metrics.jsonl", "loss_curve.png", "sft_tracker")
    ]
    folders = [
        folder
        for name in ("final_model", "checkpoint_*")
        for folder in output_dir.glob(name)
        if (folder / "sft_config.json").is_file()
    ]
    if not folders and not _is_ours(
        output_dir / "metrics.jsonl"
    ):  # files of those names that no run of ours wrote
        files = []
    return [path for path in (*files, *folders, *leftovers(output_dir)) if path.exists()]


def _is_ours(metrics: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, TypeError):
        with open(metrics, encoding="utf-8") as file:
            line = file.readline()
        return not line or "n_target_tokens" in json.loads(line)
    return False


def leftovers(output_dir: Path) -> list[Path]:
    """What a killed run was about to write."""
    names = (
        ".checkpoint_*",
        ".final_model*",
        ".training_stats.json.*",
        ".metrics.jsonl.*",
        ".loss_curve.png.*",
    )
    return [path for name in names for path in output_dir.glob(name)]


def remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def check_output_dir(output_dir: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if any. Raises InputError where a run may not write to `output_dir`."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file", "name a folder")
    if resume and overwrite:
        raise InputError("--resume and --overwrite together", "choose one")
    if resume:
        return newest_checkpoint(output_dir)
    if not overwrite and run_files(output_dir):
        raise InputError(
            f"{output_dir} holds an earlier run",
            "--resume goes on with it, --overwrite replaces it, --output_dir names another folder",
        )
    if not overwrite and any(
        not path.name.startswith(".") and path.name != TOKEN_CACHE for path in output_dir.glob("*")
    ):
        raise InputError(
            f"--output_dir {output_dir} is not empty",
            "name another, or --overwrite: what is not of a run stays",
        )
    return None


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The whole checkpoint that is furthest on; None if the run was interrupted before its first.

    Torn ones are skipped with a warning. Raises InputError if there was no run, or if all its checkpoints are torn.
    """
    for old in output_dir.glob(".checkpoint_*.old"):  # its successor was not yet in its place
        with contextlib.suppress(OSError):
            place = output_dir / old.name.removeprefix(".").removesuffix(".old")
            place.exists() or old.rename(place)
    whole, torn = [], False
    for folder in sorted(output_dir.glob("checkpoint_*")):
        wrong = "it has no SHA256SUMS" if not (folder / "SHA256SUMS").is_file() else checksum_problem(folder)
        if not wrong:
            whole.append(folder)
            continue
        torn = True
        if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
            log(f"warning: {folder} is not whole and is left out: {wrong}")
    if whole:
        return max(whole, key=_step)
    if torn:
        raise InputError(
            f"--resume: {output_dir} holds no whole checkpoint", "restore one, or --overwrite to start anew"
        )
    if not _is_ours(output_dir / "metrics.jsonl") and not (output_dir / TOKEN_CACHE).is_dir():
        raise InputError(
            f"--resume: {output_dir} holds no checkpoint",
            "leave out --resume to start anew, or name the run's --output_dir",
        )
    return None


def _step(folder: Path) -> tuple[int, bool]:
    """How far on a checkpoint is; the end of an epoch, after its validation, counts as later than its last update."""
    return json.loads((folder / "sft_config.json").read_text())["step"], folder.name.startswith(
        "checkpoint_epoch_"
    )


def save_checkpoint(run, name: str) -> Path:
    """Saves adapter and training state to output_dir/name, then removes the checkpoints that it makes needless.

    Of those inside an epoch the newest stays; of epoch ends, with --keep_checkpoints N, the newest N and the best one.
    Raises InputError where the disk is full: the checkpoints before this one stay as they were.
    """
    from sft.model.adapter import save_adapter

    folder = run.output_dir / name
    is_there = name.startswith("checkpoint_step_") and folder.is_dir() and not checksum_problem(folder)
    if run.accelerator.is_main_process and not is_there:
        progress = run.progress
        state = {
            "identity": run.identity,
            "progress": asdict(progress),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
        }
        sft_config = run.sft_config | {"step": progress.step, "epoch": len(progress.epochs)}
        targets = sorted(run.model.peft_config["default"].target_modules)
        card = model_card(sft_config, run.base_name, targets, progress.untrained_val_loss, progress.epochs)
        sync(run.output_dir / "metrics.jsonl")  # a checkpoint never knows of updates that the metrics do not
        with disk_full_as_input_error(run.output_dir):
            save_adapter(folder, run.model, run.tokenizer, run.base_name, sft_config, card, state)
        needless = [path for path in run.output_dir.glob("checkpoint_step_*") if path != folder]
        if run.config.keep_checkpoints:
            by_loss = sorted(progress.epochs, key=lambda epoch: epoch["val_loss"])
            kept = {
                epoch["epoch"] for epoch in (*by_loss[:1], *progress.epochs[-run.config.keep_checkpoints :])
            }
            needless += [
                run.output_dir / f"checkpoint_epoch_{e['epoch']}"
                for e in progress.epochs
                if e["epoch"] not in kept
            ]
        remove([path for path in needless if path.exists()])
    run.accelerator.wait_for_everyone()
    return folder


def sync(path: Path) -> None:
    if path.is_file():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def disk_full_as_input_error(folder: Path):
    """Turns what the libraries raise on a full disk (each another type) into one InputError."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "os error 28" in str(error) or "Disk quota" in str(error):
            raise InputError(
                f"{folder}: the disk is full; what was saved before is whole",
                "free some space, then run the same command with --resume",
            ) from None
        raise


def restore(run, folder: Path) -> None:
    """Takes up the run where checkpoint `folder` left it. Raises InputError if it was another run."""
    from sft.model.adapter import load_adapter_weights, read_state

    state = read_state(folder)
    saved, now = state["identity"], run.identity
    differences = [name for name in now if saved.get(name) != now[name]]
    if differences:
        was = ", ".join(f"{name} was {saved.get(name)}, is {now[name]}" for name in differences)
        raise InputError(
            f"--resume: {folder} belongs to a run with other options: {was}",
            "use the same options, or --overwrite to start anew",
        )
    load_adapter_weights(run.model, folder, may_be_zero=True)
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.progress = type(run.progress)(**state["progress"])
    done = len(run.progress.epochs)
    if done > run.config.num_epochs or run.progress.step > run.plan.total_steps:
        needed = max(done, -(-run.progress.step // run.plan.steps_per_epoch))
        raise InputError(
            f"--resume: the run is in epoch {needed} already, --num_epochs is {run.config.num_epochs}",
            f"--num_epochs {needed} or more",
        )
    if run.accelerator.is_main_process:
        remove(leftovers(run.output_dir))
        truncate_metrics(run.output_dir / "metrics.jsonl", run.progress.step)
    run.say(f"Going on from {folder}: {run.progress.step:,} of {run.plan.total_steps:,} updates are done")


def start_fresh(output_dir: Path) -> None:
    """A private, empty output folder, but for what others put there."""
    remove(run_files(output_dir))
    make_private_dir(output_dir)
    write_atomic(output_dir / "metrics.jsonl", "")


def truncate_metrics(file: Path, step: int) -> None:
    """Leaves out the updates after `step`, which will be done again, and a last line torn by a kill."""
    kept = []
    for line in file.read_text(errors="replace").splitlines(keepends=True) if file.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomic(file, "".join(kept))


def promote_best_epoch(output_dir: Path, epochs: list[dict]) -> int:
    """Copies the epoch with the lowest validation loss to final_model (the next best where its checkpoint is not whole),
    and returns its number."""
    from sft.files import _replace_folder as replace_folder

    for epoch in sorted(epochs, key=lambda epoch: epoch["val_loss"]):
        source = output_dir / f"checkpoint_epoch_{epoch['epoch']}"
        if source.is_dir() and not checksum_problem(source):
            aside = output_dir / ".final_model.new"
            remove([aside])
            with disk_full_as_input_error(output_dir):
                shutil.copytree(
                    source,
                    make_private_dir(aside),
                    ignore=shutil.ignore_patterns("*.pt", "SHA256SUMS"),
                    dirs_exist_ok=True,
                )
                write_checksums(aside)
                replace_folder(aside, output_dir / "final_model")
            return epoch["epoch"]
        log(f"warning: {source} is not whole and cannot become final_model")
    raise InputError(f"{output_dir}: no checkpoint of an epoch's end is whole", "--overwrite to train again")
