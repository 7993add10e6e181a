"""Going on after an interruption; checkpoints that are whole or do not count."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, arguments_of, assert_same_adapter, metrics_of, wait_for_updates

import stage_a_sft_training as training
from sft.cli import InputError
from sft.training.checkpoint import newest_checkpoint
from stage_a_sft_training import train

# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_a_resumed_run_is_the_uninterrupted_one(configured, monkeypatch, tmp_path, stop_after):
    """Killed after any update, resumed from the newest checkpoint: adapter, metrics and losses to the bit."""
    options = {"save_steps": 2, "lora_dropout": 0.3, "gradient_accumulation_steps": 2, "batch_size": 2}
    whole = configured("whole", **options)
    stats = train(whole)
    real_update = training.update

    def killed(run, step):
        if step == stop_after:
            raise KeyboardInterrupt
        return real_update(run, step)

    config = configured("part", **options)
    monkeypatch.setattr(training, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(training, "update", real_update)
    resumed = train(configured("part", **options, resume=True))
    assert_same_adapter(tmp_path / "whole" / "final_model", tmp_path / "part" / "final_model")
    assert metrics_of(config) == metrics_of(whole)
    assert [epoch["train_loss"] for epoch in resumed["epochs"]] == [
        epoch["train_loss"] for epoch in stats["epochs"]
    ]


def test_a_finished_run_goes_on_for_more_epochs(configured):
    train(configured(num_epochs=1, lr_scheduler="constant"))
    train(configured("whole", lr_scheduler="constant"))
    stats = train(configured(resume=True, lr_scheduler="constant"))
    assert [epoch["epoch"] for epoch in stats["epochs"]] == [1, 2]
    assert_same_adapter(
        f"{configured().output_dir}/checkpoint_epoch_2",
        f"{configured('whole').output_dir}/checkpoint_epoch_2",
    )


def test_changed_data_is_not_resumed_and_moved_data_is(configured, csv_files, tmp_path):
    train(configured(num_epochs=1))
    moved = tmp_path / "moved.csv"
    moved.write_bytes(csv_files[0].read_bytes())
    train(configured(num_epochs=2, resume=True, train_csv=str(moved)))
    moved.write_text(moved.read_text().replace("Fell from", "Slid from"))
    with pytest.raises(InputError, match="train_csv was"):
        train(configured(num_epochs=3, resume=True, train_csv=str(moved)))


def test_fewer_epochs_are_refused(configured):
    train(configured())
    with pytest.raises(InputError, match="in epoch 2 already"):
        train(configured(num_epochs=1, resume=True))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_torn_checkpoint_is_left_out(configured, tmp_path, capfd, damage):
    """Every file of the newest checkpoint in turn; the run goes on from the one before and ends as it would have."""
    config = configured()
    train(config)
    out, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(out, whole)
    newest = out / "checkpoint_epoch_2"
    files = sorted(path.name for path in newest.iterdir())
    assert {"adapter_model.safetensors", "training_state.pt", "sft_config.json", "SHA256SUMS"} <= set(files)
    for name in files:
        damage(newest / name)
        capfd.readouterr()
        assert newest_checkpoint(out) == out / "checkpoint_epoch_1"
        said = capfd.readouterr().err
        assert (
            said.count("\n") == 1
            and "checkpoint_epoch_2 is not whole" in said
            and (name in said or name == "SHA256SUMS")
        )
        shutil.copy(whole / "checkpoint_epoch_2" / name, newest / name)
    assert newest_checkpoint(out) == newest
    damage(newest / "adapter_model.safetensors")
    (out / ".checkpoint_step_9.123").mkdir()  # of a killed run
    train(configured(resume=True))
    assert_same_adapter(out / "final_model", whole / "final_model")
    assert metrics_of(config) == [
        json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()
    ]
    assert not list(out.glob(".checkpoint*"))
    for folder in ("checkpoint_epoch_1", "checkpoint_epoch_2"):
        damage(out / folder / "training_state.pt")
    with pytest.raises(InputError, match="no whole checkpoint"):
        train(configured(resume=True))


def test_a_checkpoint_that_was_being_replaced_is_put_back(configured, tmp_path):
    train(configured(num_epochs=1))
    folder = tmp_path / "out" / "checkpoint_epoch_1"
    folder.rename(tmp_path / "out" / ".checkpoint_epoch_1.old")
    assert newest_checkpoint(tmp_path / "out") == folder


def test_lost_metrics_lose_no_run(configured, tmp_path):
    train(configured(num_epochs=1, lr_scheduler="constant"))
    (tmp_path / "out" / "metrics.jsonl").write_bytes(b"\xff torn")
    train(configured(resume=True, lr_scheduler="constant"))
    assert [line["step"] for line in metrics_of(configured())] == [4, 5, 6]
    assert (tmp_path / "out" / "loss_curve.png").exists()


def test_the_sums_are_those_of_sha256sum(configured, tmp_path):
    train(configured(num_epochs=1))
    for folder in ("checkpoint_epoch_1", "final_model"):
        subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"],
            cwd=tmp_path / "out" / folder,
            check=True,
            capture_output=True,
        )


def test_a_damaged_best_epoch_is_replaced_by_the_next_best(configured, monkeypatch, tmp_path):
    losses = iter([3.0, 1.0, 2.5, 2.0])

    def evaluate(run, examples):
        if len(run.progress.epochs) == 2:
            flip_a_bit(tmp_path / "out" / "checkpoint_epoch_1" / "adapter_model.safetensors")
        return next(losses)

    monkeypatch.setattr(training, "evaluate", evaluate)
    stats = train(configured(num_epochs=3))
    assert stats["kept_epoch"] == 3
    assert_same_adapter(tmp_path / "out" / "final_model", tmp_path / "out" / "checkpoint_epoch_3")


def test_needless_checkpoints_go_once_the_new_one_is_safe(configured, monkeypatch, tmp_path):
    losses = iter([3.0, 2.0, 1.0, 2.5, 2.4, 2.3])
    monkeypatch.setattr(training, "evaluate", lambda run, examples: next(losses))
    stats = train(configured(num_epochs=5, keep_checkpoints=2, save_steps=2))
    left = {path.name for path in (tmp_path / "out").glob("checkpoint_*")}
    assert (
        left == {"checkpoint_epoch_2", "checkpoint_epoch_4", "checkpoint_epoch_5"}
        and stats["kept_epoch"] == 2
    )


@pytest.mark.parametrize("resume_at", [3, 9, 21])
def test_a_process_killed_at_any_moment_goes_on_to_the_same_end(configured, tmp_path, resume_at):
    """SIGKILL once so many updates are done; see benchmarks/kill_training.py for random moments."""
    options = {"num_epochs": 8, "save_steps": 2, "batch_size": 3}
    if not (tmp_path / "whole").exists():
        train(configured("whole", **options))
    config = configured("part", **options)
    process = subprocess.Popen(
        [sys.executable, "stage_a_sft_training.py", *arguments_of(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for_updates(tmp_path / "part", resume_at)
    process.kill()
    process.communicate()
    train(configured("part", **options, resume=True))
    assert metrics_of(config) == metrics_of(configured("whole"))
    assert_same_adapter(tmp_path / "whole" / "final_model", tmp_path / "part" / "final_model")


def test_other_mathematics_are_not_resumed_and_earlier_runs_not_overwritten(configured, tmp_path):
    train(configured(num_epochs=1))
    with pytest.raises(InputError, match=r"learning_rate was 0\.005, is 0\.1"):
        train(configured(resume=True, learning_rate=0.1))
    with pytest.raises(InputError, match="holds an earlier run"):
        train(configured())
    (tmp_path / "out" / "mine.txt").write_text("not of the toolkit")
    train(configured(overwrite=True, num_epochs=1))
    assert (tmp_path / "out" / "mine.txt").exists()
    (tmp_path / "out" / "sft_tracker").mkdir()
    train(configured(overwrite=True, num_epochs=1))
    assert not (tmp_path / "out" / "sft_tracker").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text(
        '{"mine": 1}\n'
    )  # not of the toolkit, though of the name
    with pytest.raises(InputError, match="is not empty"):
        train(configured("other"))
    assert (tmp_path / "other" / "metrics.jsonl").exists()
    (tmp_path / "other" / "mine.txt").write_text("not of the toolkit")
    with pytest.raises(InputError, match="is not empty"):
        train(configured("other"))
    with pytest.raises(InputError, match="no checkpoint"):
        train(configured("other", resume=True))
