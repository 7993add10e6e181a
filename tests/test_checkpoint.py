"""Resuming after an interruption; checkpoints that are complete or do not count; folders of older
versions."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    arguments_of,
    assert_same_adapter,
    assert_same_run,
    communicate_or_kill,
    metrics_of,
    start_python,
    state_of,
    stats_of,
    wait_for_steps,
)

import stage_a_sft_training as training
from sft.cli import InputError
from sft.files import FORMAT_VERSION, write_checksums
from sft.model.adapter import read_state
from sft.training.checkpoint import newest_checkpoint
from stage_a_sft_training import TrainConfig, train

# ------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_a_resumed_run_is_the_uninterrupted_one(configured, finished, stop_after):
    """Killed after any step, resumed from the newest checkpoint: adapter, metrics and losses to the bit."""
    options = {"save_steps": 2, "lora_dropout": 0.3, "gradient_accumulation_steps": 2, "batch_size": 2}

    def kill(run, metrics):
        if metrics["step"] == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(configured(**options), on_step=kill)
    train(configured(**options, resume=True))
    assert_same_run(configured(), finished(**options))


@pytest.mark.parametrize("steps_done", [3, 21])
def test_a_process_killed_at_any_moment_resumes_to_the_same_end(configured, finished, steps_done):
    """SIGKILL once that many steps are done; benchmarks/kill_training.py kills at random moments."""
    options = {"num_epochs": 8, "save_steps": 2, "batch_size": 3}
    config = configured(**options)
    process = start_python("stage_a_sft_training.py", *arguments_of(config))
    wait_for_steps(Path(config.output_dir), steps_done)
    process.kill()
    communicate_or_kill(process, 60)
    train(configured(**options, resume=True))
    assert_same_run(config, finished(**options))


def test_a_finished_run_continues_for_more_epochs(configured, copied, finished):
    copied(num_epochs=1, lr_scheduler="constant")
    stats = train(configured(resume=True, lr_scheduler="constant"))
    assert [epoch["epoch"] for epoch in stats["epochs"]] == [1, 2]
    assert_same_run(configured(), finished(lr_scheduler="constant"))


def test_changed_data_is_not_resumed_and_moved_data_is(configured, copied, csv_files, tmp_path):
    copied(num_epochs=1)
    moved = tmp_path / "moved.csv"
    moved.write_bytes(csv_files[0].read_bytes())
    train(configured(num_epochs=2, resume=True, train_csv=str(moved)))
    moved.write_text(moved.read_text().replace("Fell from", "Slid from"))
    with pytest.raises(InputError, match="train_csv was"):
        train(configured(num_epochs=3, resume=True, train_csv=str(moved)))


def test_fewer_epochs_are_refused(configured, copied):
    copied()
    with pytest.raises(InputError, match="in epoch 2 already"):
        train(configured(num_epochs=1, resume=True))


def test_lost_metrics_lose_no_run(configured, copied, tmp_path):
    (copied(num_epochs=1, lr_scheduler="constant") / "metrics.jsonl").write_bytes(b"\xff cut")
    train(configured(resume=True, lr_scheduler="constant"))
    assert [line["step"] for line in metrics_of(configured())] == [4, 5, 6]
    assert (tmp_path / "out" / "loss_curve.png").exists()


# ------------------------------------------------------------------------------- damage


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_an_incomplete_checkpoint_is_skipped(configured, finished, copied, capfd, damage):
    """Every file of the newest checkpoint in turn; the run continues from the one before and ends as it would
    have."""
    config = configured()
    out = copied()
    intact = Path(finished().output_dir) / "checkpoint_epoch_2"
    newest = out / "checkpoint_epoch_2"
    names = sorted(path.name for path in newest.iterdir())
    assert {"adapter_model.safetensors", "training_state.pt", "sft_config.json", "SHA256SUMS"} <= set(names)
    for name in names:
        damage(newest / name)
        capfd.readouterr()
        assert newest_checkpoint(config) == out / "checkpoint_epoch_1"
        logged = capfd.readouterr().err
        assert logged.count("\n") == 1
        assert "checkpoint_epoch_2 is incomplete and skipped" in logged
        assert name in logged
        shutil.copy(intact / name, newest / name)
    assert newest_checkpoint(config) == newest

    # Resuming does the lost epoch again, and clears what a killed run left
    damage(newest / "adapter_model.safetensors")
    (out / ".checkpoint_step_9.123").mkdir()
    train(configured(resume=True))
    assert_same_run(config, finished())
    assert not list(out.glob(".checkpoint*"))

    for folder in ("checkpoint_epoch_1", "checkpoint_epoch_2"):
        damage(out / folder / "training_state.pt")
    with pytest.raises(InputError, match="no complete checkpoint"):
        train(configured(resume=True))


def test_a_checkpoint_that_was_being_replaced_is_put_back(configured, copied):
    out = copied()
    folder = out / "checkpoint_epoch_2"
    folder.rename(out / ".checkpoint_epoch_2.old")
    assert newest_checkpoint(configured()) == folder


def test_checksums_are_those_of_sha256sum(finished):
    out = Path(finished().output_dir)
    for folder in ("checkpoint_epoch_1", "final_model"):
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        subprocess.run(command, cwd=out / folder, check=True, capture_output=True)


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
    assert left == {"checkpoint_epoch_2", "checkpoint_epoch_4", "checkpoint_epoch_5"}
    assert stats["kept_epoch"] == 2


# ------------------------------------------------------------------------------- other runs, other versions


def test_other_mathematics_are_not_resumed_and_earlier_runs_not_overwritten(configured, copied, tmp_path):
    out = copied()
    with pytest.raises(InputError, match=r"learning_rate was 0\.005, is 0\.1"):
        train(configured(resume=True, learning_rate=0.1))
    with pytest.raises(InputError, match="holds an earlier run"):
        train(configured())

    # --overwrite removes what a run wrote, and nothing else
    (out / "mine.txt").write_text("not from the toolkit")
    # The second is of earlier versions, and holds patients' text
    for name, file in (("sft_tracker", "hparams.yml"), ("token_cache", "train.tokens")):
        (out / name).mkdir()
        (out / name / file).write_bytes(b"")
    train(configured(overwrite=True, num_epochs=1))
    assert (out / "mine.txt").exists()
    assert not any((out / name).exists() for name in ("sft_tracker", "token_cache", "checkpoint_epoch_2"))

    # A file of that name, but not from the toolkit
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match="is not empty"):
        train(configured("other"))
    assert (tmp_path / "other" / "metrics.jsonl").exists()
    (tmp_path / "other" / "mine.txt").write_text("not from the toolkit")
    with pytest.raises(InputError, match="is not empty"):
        train(configured("other"))
    with pytest.raises(InputError, match="was not written by a training run"):
        train(configured("other", resume=True))


def test_an_option_of_a_later_version_counts_as_its_default(configured, copied):
    """A checkpoint that a version without --warmup_ratio wrote resumes with its default, and with no other
    value."""
    out = copied(num_epochs=1)
    folder = out / "checkpoint_epoch_1"
    state = torch.load(folder / "training_state.pt", weights_only=True)
    del state["fingerprint"]["warmup_ratio"]
    torch.save(state, folder / "training_state.pt")
    write_checksums(folder)
    with pytest.raises(InputError, match=r"warmup_ratio was 0\.03, is 0\.1"):
        train(configured(resume=True, warmup_ratio=0.1))
    assert len(train(configured(resume=True))["epochs"]) == 2


def test_a_state_of_an_unknown_version_is_two_lines(configured, copied):
    out = copied(num_epochs=1)
    folder = out / "checkpoint_epoch_1"
    state = torch.load(folder / "training_state.pt", weights_only=True)
    for damaged in ({}, [], state | {"optimizer": {}}, state | {"progress": {}}):
        torch.save(damaged, folder / "training_state.pt")
        write_checksums(folder)
        with pytest.raises(InputError, match="cannot be continued by this version") as error:
            train(configured(resume=True))
        assert str(error.value).count("\n") == 1
    assert (out / "final_model").is_dir()


def test_a_newer_version_is_refused(configured, copied):
    from sft_inference import read_adapter_folder

    out = copied(num_epochs=1)
    for folder in (out / "checkpoint_epoch_1", out / "final_model"):
        sft_config = json.loads((folder / "sft_config.json").read_text())
        assert sft_config["format_version"] == FORMAT_VERSION
        sft_config["format_version"] = FORMAT_VERSION + 1
        (folder / "sft_config.json").write_text(json.dumps(sft_config))
        write_checksums(folder)
    newer = f"format {FORMAT_VERSION + 1}, known up to {FORMAT_VERSION}"
    with pytest.raises(InputError, match=newer):
        train(configured(resume=True))
    with pytest.raises(InputError, match=newer):
        read_adapter_folder(out / "final_model")


FORMAT_1 = (
    Path("tests") / "fixtures" / "format_1"
)  # a model of 9,184 weights, trained for an epoch by 18a780b


def test_a_run_of_format_1_resumes_as_it_would_have_then(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = shutil.copytree(FORMAT_1 / "run", tmp_path / "out")
    config = TrainConfig(
        train_csv=str(FORMAT_1 / "train.csv"),
        val_csv=str(FORMAT_1 / "val.csv"),
        model_name=str(FORMAT_1 / "base"),
        output_dir=str(out),
        num_epochs=2,
        batch_size=4,
        lora_r=2,
        lora_alpha=4,
        learning_rate=5e-2,
        lr_scheduler="constant",
        max_length=192,
        device="cpu",
        lora_dropout=0.1,
        resume=True,
    )
    train(config)
    expected = json.loads((FORMAT_1 / "expected.json").read_text())
    for line, expected_line in zip(metrics_of(config), expected["resumed_metrics"], strict=True):
        assert line == pytest.approx(expected_line, rel=1e-4)
    losses = [epoch["val_loss"] for epoch in stats_of(config)["epochs"]]
    assert losses == pytest.approx(expected["resumed_val_losses"], rel=1e-5)
    # It keeps the sentences it began with
    sft_config = json.loads((out / "final_model" / "sft_config.json").read_text())
    assert sft_config["prompt"]["sentence_version"] == 1


def test_an_adapter_of_format_1_writes_what_it_wrote_then(monkeypatch):
    from tiny import NOTES

    from sft_inference import SFTInference

    monkeypatch.chdir(ROOT)
    inference = SFTInference(FORMAT_1 / "run" / "final_model", device="cpu")
    assert inference.sft_config["max_new_tokens"] == 150
    results = inference.generate_batch([note for note, _ in NOTES[:3]], 12)
    expected = json.loads((FORMAT_1 / "expected.json").read_text())["summaries"]
    assert [result["generated_summary"] for result in results] == expected


# ------------------------------------------------------------------------------- nothing left, more epochs


def test_a_finished_run_resumed_changes_nothing_and_says_so(configured, copied, capfd):
    out = copied()
    before = state_of(out)
    assert train(configured(resume=True)) == stats_of(configured())
    assert "Nothing is left to train: 2 epochs of 2 done" in capfd.readouterr().err
    assert state_of(out) == before

    # Ended before it could write final_model
    shutil.rmtree(out / "final_model")
    train(configured(resume=True))
    assert (out / "final_model" / "SHA256SUMS").exists()


def test_early_stopping_says_why_also_when_resumed(configured, monkeypatch, capfd, tmp_path):
    losses = iter([3.0, 2.0, 2.5, 2.4])
    monkeypatch.setattr(training, "evaluate", lambda run, examples: next(losses))
    options = {"num_epochs": 5, "early_stopping_patience": 2}
    train(configured(**options))
    why = "Val Loss was not below that of epoch 1 (2.0000) for 2 epochs (--early_stopping_patience 2)"
    assert f"Stopped: {why}" in capfd.readouterr().err
    before = state_of(tmp_path / "out")
    train(configured(**options, resume=True))
    assert f"Nothing is left to train: {why}" in capfd.readouterr().err
    assert state_of(tmp_path / "out") == before


def test_more_epochs_say_that_the_learning_rate_jumps(configured, copied, capfd):
    copied()
    train(configured(resume=True, num_epochs=4))
    last, first = (metrics_of(configured())[i]["learning_rate"] for i in (5, 6))
    assert f"the learning rate goes from {last:.2e} to {first:.2e}" in capfd.readouterr().err


def test_the_prompt_is_the_checkpoints(configured, copied, finished, capfd, tmp_path):
    """A chat template that writes the date, or was edited, makes no other run."""
    shutil.rmtree(copied() / "checkpoint_epoch_2")
    base = shutil.copytree(configured().model_name, tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|>2031-01-01 "))
    train(configured(resume=True, model_name=str(base)))
    # Nothing is said of a learning rate that goes on as planned
    assert "learning rate goes" not in capfd.readouterr().err
    assert_same_run(configured(), finished())


def test_the_rows_of_a_step_may_be_divided_in_another_way(configured, copied, finished, capfd):
    options = {"batch_size": 4, "gradient_accumulation_steps": 2, "lora_dropout": 0.0}
    shutil.rmtree(copied(**options) / "checkpoint_epoch_2")
    other = {"batch_size": 8, "lora_dropout": 0.0, "resume": True}
    train(configured(**other))
    for line, expected in zip(metrics_of(configured()), metrics_of(finished(**options)), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)
    # The smaller batch was no sign of too little memory
    state = read_state(Path(configured().output_dir) / "checkpoint_epoch_2")
    assert state["progress"]["micro_batch_size"] == 8
    with pytest.raises(InputError, match="batch_size was 8, is 4"):
        train(configured(**{**other, "batch_size": 4}))
