"""Signals, out of memory, losses that are not finite, full disks, several processes."""

import errno
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    adapter_of,
    arguments_of,
    assert_same_run,
    communicate_or_kill,
    metrics_of,
    run_python,
    short_run,
    start_python,
    stats_of,
    wait_for_steps,
    write_csv_files,
)
from tiny import NOTES

import stage_a_sft_training as training
from sft.cli import InputError, RunError, Stopped
from sft.training.checkpoint import newest_checkpoint
from stage_a_sft_training import train

# ------------------------------------------------------------------------------- faults


def test_a_loss_that_is_not_finite_stops_the_run(configured, monkeypatch, tmp_path):
    real_loss, calls = training.summed_loss, []

    def loss(model, batch):
        if model.training:
            calls.append(1)
        return real_loss(model, batch) * (float("nan") if len(calls) == 4 and model.training else 1)

    monkeypatch.setattr(training, "summed_loss", loss)
    with pytest.raises(
        RunError, match=r"step 4: .*not finite \(loss nan.*ids: t[\s\S]*learning_rate"
    ) as error:
        train(configured())
    assert "checkpoint_epoch_1" in str(error.value)
    assert all(
        weight.isfinite().all() for weight in adapter_of(tmp_path / "out" / "checkpoint_epoch_1").values()
    )


def test_float16_overflow_skips_the_update_and_is_counted(configured, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda *arguments, **options: real(*arguments, **options, init_scale=2.0**40, growth_interval=1000),
    )
    stats = train(configured(dtype="float16", num_epochs=12))
    assert 0 < stats["skipped_steps"] < 36
    assert stats["epochs"][-1]["val_loss"] < stats["untrained_val_loss"]


def test_gradients_that_are_never_finite_stop_a_float16_run(configured, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: torch.tensor(math.inf))
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: 1.0)  # halved as often as it can be
    with pytest.raises(RunError, match="gradient norm inf"):
        train(configured(dtype="float16"))


def test_a_validation_loss_that_is_not_finite_stops_the_run(configured, monkeypatch):
    real_loss = training.summed_loss
    monkeypatch.setattr(
        training,
        "summed_loss",
        lambda model, batch: real_loss(model, batch) * (1 if model.training else math.nan),
    )
    with pytest.raises(RunError, match="validation loss is nan"):
        train(configured())


# ------------------------------------------------------------------------------- signals


def started(config, n_steps: int) -> subprocess.Popen:
    """The script in a process of its own, once it has done that many steps."""
    process = start_python("stage_a_sft_training.py", *arguments_of(config))
    wait_for_steps(Path(config.output_dir), n_steps)
    return process


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_resumes(configured, finished, number, status):
    options = {"num_epochs": 8, "batch_size": 3}
    process = started(configured("part", **options), n_steps=5)
    process.send_signal(number)
    out, said = communicate_or_kill(process, 60)
    assert process.returncode == status
    assert out == ""
    assert "Traceback" not in said
    assert re.search(r"stopped after step \d+ of 32; saved to .*checkpoint_step_\d+\n.*--resume", said)
    train(configured("part", **options, resume=True))
    assert_same_run(configured("part"), finished(**options))


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_saving(configured):
    """As with `... 2>&1 | tee log` and Ctrl-C: the reader of the messages dies of the same signal."""
    config = configured("part", num_epochs=8, batch_size=3)
    process = started(config, n_steps=3)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert newest_checkpoint(config).name.startswith("checkpoint_")


def test_a_second_interrupt_stops_at_once_and_harms_nothing(configured, finished):
    options = {"num_epochs": 8, "batch_size": 3, "save_steps": 2}
    process = started(configured("part", **options), n_steps=9)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    _, said = communicate_or_kill(process, 60)
    assert process.returncode == 130 and "Traceback" not in said
    train(configured("part", **options, resume=True))
    assert_same_run(configured("part"), finished(**options))


def test_a_signal_during_validation_saves_too(configured, finished, monkeypatch):
    """The validation is done again, and the epoch counted once."""
    real_loss = training.summed_loss

    def loss(model, batch):
        if not model.training and len(metrics_of(configured())) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_loss(model, batch)

    monkeypatch.setattr(training, "summed_loss", loss)
    with pytest.raises(Stopped, match="after step 3 of 6; saved"):
        train(configured())
    monkeypatch.setattr(training, "summed_loss", real_loss)
    train(configured(resume=True))
    assert_same_run(configured(), finished())


# ------------------------------------------------------------------------------- memory and disk


@pytest.mark.parametrize("fits, batch_size", [(1, 4), (2, 7)])
def test_out_of_memory_halves_the_forward_pass_and_keeps_the_losses(
    configured, finished, monkeypatch, capfd, fits, batch_size
):
    options = {"lora_dropout": 0.0, "batch_size": batch_size}
    reference = metrics_of(finished(**options))
    real_loss = training.summed_loss

    def loss(model, batch):
        if len(batch.inputs["example_lengths"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real_loss(model, batch)

    monkeypatch.setattr(training, "summed_loss", loss)
    train(configured("out", **options))
    assert capfd.readouterr().err.count("out of memory with") == 2  # 4 -> 2 -> 1, 7 -> 4 -> 2
    for key in ("loss", "grad_norm", "n_examples"):
        assert [line[key] for line in metrics_of(configured("out"))] == pytest.approx(
            [line[key] for line in reference], rel=1e-3
        )
    train(configured("out", **{**options, "num_epochs": 3}, resume=True))
    assert "out of memory" not in capfd.readouterr().err  # a resumed run knows


def test_memory_too_small_for_one_row_is_said_in_two_lines(configured, monkeypatch):
    def loss(model, batch):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."
        )

    monkeypatch.setattr(training, "summed_loss", loss)
    with pytest.raises(RunError, match=r"out of memory with 1 row [\s\S]*--gradient_checkpointing"):
        train(configured())


def test_a_full_disk_leaves_the_earlier_checkpoint(configured, finished, tmp_path):
    """On a disk of 1.5 MB: the second checkpoint does not fit. Once there is space the run goes on to the
    same end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        options = {"lora_r": 64, "num_epochs": 6}
        result = run_python("stage_a_sft_training.py", *arguments_of(configured("disk/out", **options)))
        assert result.returncode == 2 and "Traceback" not in result.stderr
        error, fix = result.stderr.strip().split("\n")[-2:]
        assert "the disk is full" in error and "free some space" in fix
        assert newest_checkpoint(configured("disk/out"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        train(configured("disk/out", **options, resume=True))
        assert_same_run(configured("disk/out"), finished(**options))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "n, file",
    [(n, "training_stats.json") for n in range(1, 12, 2)] + [(n, "metrics.jsonl") for n in (1, 3, 6)],
)
def test_a_write_that_fails_half_way_leaves_the_earlier_checkpoint(
    configured, finished, monkeypatch, tmp_path, n, file
):
    """The n-th fsync after the first epoch is saved, or after the start, finds the disk full."""
    real = os.fsync
    calls = []

    def fsync(descriptor):
        if (tmp_path / "out" / file).exists():
            calls.append(1)
            if len(calls) >= n:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises((InputError, OSError), match=r"full|No space"):
        train(configured())
    monkeypatch.setattr(os, "fsync", real)
    train(configured(resume=True))
    assert_same_run(configured(), finished())


# ------------------------------------------------------------------------------- trying out


def test_a_dry_run_measures_and_writes_nothing(configured, capfd, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    measured = train(configured(dry_run=True))
    assert sorted(tmp_path.rglob("*")) == before
    assert (
        measured["total_steps"] == 6 and measured["peak_memory_mb"] > 50 and measured["estimated_seconds"] > 0
    )
    said = capfd.readouterr().err
    assert "nothing was written" in said and " parameters (" in said and "Plan: 6 steps" in said


def test_a_tracker_gets_numbers_alone(configured, tmp_path):
    train(configured(report_to="tensorboard"))
    events = b"".join(path.read_bytes() for path in (tmp_path / "out" / "sft_tracker").rglob("*events*"))
    assert b"grad_norm" in events and str(tmp_path).encode() not in events
    assert not any(note[:20].encode() in events for note, _ in NOTES)


# ------------------------------------------------------------------------------- several processes


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ],
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize(
    "launcher, accumulation, options",
    [("torchrun", 1, {"shard_base": True, "gradient_checkpointing": True}), ("accelerate", 2, {})],
)
def test_two_processes_equal_one(configured, finished, launcher, accumulation, options):
    """Over gloo, with DDP or with the base split by FSDP: two processes have the losses of one with the same
    rows in a step, the short last group of 11 rows included."""
    one = finished(batch_size=8, lora_dropout=0.0)
    two = configured(
        batch_size=4 // accumulation, gradient_accumulation_steps=accumulation, lora_dropout=0.0, **options
    )
    result = run_python(*LAUNCHERS[launcher], "stage_a_sft_training.py", *arguments_of(two), **ONE_THREAD)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Training completed!") == 1
    for key in ("loss", "grad_norm", "n_examples", "n_target_tokens"):
        expected = [line[key] for line in metrics_of(one)]
        assert [line[key] for line in metrics_of(two)] == pytest.approx(expected, rel=1e-3)
    expected = [epoch["val_loss"] for epoch in stats_of(one)["epochs"]]
    assert [epoch["val_loss"] for epoch in stats_of(two)["epochs"]] == pytest.approx(expected, rel=1e-4)


TWO_PROCESSES = {"num_epochs": 12, "save_steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def finished_by_two(model_folder, tmp_path_factory):
    """An uninterrupted run of two processes (dropout depends on the process, so one process ends
    elsewhere)."""
    folder = tmp_path_factory.mktemp("two")
    config = short_run(model_folder(), write_csv_files(folder), folder / "out", **TWO_PROCESSES)
    result = run_python(
        *LAUNCHERS["torchrun"], "stage_a_sft_training.py", *arguments_of(config), **ONE_THREAD
    )
    assert result.returncode == 0, result.stderr
    return config


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_one_process_ends_all_and_the_run_resumes(configured, finished_by_two, number):
    """One of two processes is killed, or told to stop; what is saved is complete, and resuming leads to the
    same end."""
    config = configured(**TWO_PROCESSES)
    script = [*LAUNCHERS["torchrun"], "stage_a_sft_training.py"]
    process = start_python(*script, *arguments_of(config), **ONE_THREAD)
    wait_for_steps(Path(config.output_dir), 5)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]), number)
    _, logged = communicate_or_kill(process, 120)
    assert process.returncode != 0
    assert not Path(f"/proc/{workers[0]}").exists()
    if number == signal.SIGTERM:
        assert "saved to" in logged
    resumed = configured(**TWO_PROCESSES, resume=True)
    result = run_python(*script, *arguments_of(resumed), **ONE_THREAD)
    assert result.returncode == 0, result.stderr
    assert_same_run(config, finished_by_two)
