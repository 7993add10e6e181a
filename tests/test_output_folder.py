"""Whose an output folder is: two runs at once, what --overwrite and --resume may replace, and what stays."""

import shutil

import pytest
from conftest import assert_same_run, communicate_or_kill, start_python, state_of

import stage_a_sft_training as training
from sft.cli import InputError
from sft.files import remove
from sft.training.checkpoint import newest_checkpoint, output_lock
from stage_a_sft_training import train


def test_two_runs_do_not_share_a_folder(configured, finished, tmp_path):
    """Whatever the second wants; what it was refused leaves the first as it is."""
    config = configured(num_epochs=1)

    def second(run, metrics):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match="another training run is at work"):
                train(configured(**options))
        train(configured(dry_run=True))

    train(config, on_step=second)
    assert_same_run(config, finished(num_epochs=1))
    assert not (tmp_path / "out" / ".lock").exists()
    train(configured(resume=True))


def test_a_lock_ends_with_its_process(configured, tmp_path):
    code = "import sys, time; from sft.options import TrainConfig; from sft.training.checkpoint import output_lock\n"
    code += (
        "with output_lock(TrainConfig(output_dir=sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    process = start_python("-c", code, tmp_path / "out")
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match="another training run"), output_lock(configured()):
        pass
    process.kill()
    communicate_or_kill(process, 10)
    assert (tmp_path / "out" / ".lock").exists()
    with output_lock(configured()):
        pass
    assert not (tmp_path / "out" / ".lock").exists()


def test_overwrite_removes_what_a_run_wrote_by_full_name(configured, copied, tmp_path):
    """No backup, no target of a link; links themselves go."""
    out = copied()
    elsewhere = tmp_path / "elsewhere"
    (out / "checkpoint_epoch_2").rename(elsewhere)
    (out / "checkpoint_epoch_2").symlink_to(elsewhere)
    for name in ("checkpoint_backup", "checkpoint_epoch_1_good", "checkpoint_step_x", ".checkpoint_mine"):
        shutil.copytree(out / "checkpoint_epoch_1", out / name)
    kept = {path: path.read_bytes() for path in elsewhere.iterdir()}
    assert newest_checkpoint(configured()) == out / "checkpoint_epoch_2"
    train(configured(overwrite=True, num_epochs=1, save_steps=1))
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == kept
    assert not (out / "checkpoint_epoch_2").is_symlink()
    for name in ("checkpoint_backup", "checkpoint_epoch_1_good", "checkpoint_step_x", ".checkpoint_mine"):
        assert (out / name / "SHA256SUMS").exists()


@pytest.mark.parametrize("option", ["overwrite", "resume"])
@pytest.mark.parametrize("folder", ["final_model", "checkpoint_epoch_1"])
def test_a_users_own_file_in_a_folder_of_the_run_stops_it(configured, copied, option, folder):
    file = copied(num_epochs=1) / folder / "results" / "my notes.xlsx"
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(InputError, match=r"my notes\.xlsx was not written by a training run"):
        train(configured(**{option: True}))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("option", ["overwrite", "resume"])
@pytest.mark.parametrize("name", ["final_model", "checkpoint_step_7", "metrics.jsonl"])
def test_what_another_program_wrote_under_a_name_of_the_run_stops_it(configured, tmp_path, option, name):
    file = tmp_path / "out" / name / "model.safetensors"
    file = file.parent if name == "metrics.jsonl" else file
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    with pytest.raises(InputError, match=f"{name} was not written by a training run"):
        train(configured(**{option: True}))
    assert file.read_text() == "theirs"


def test_a_kill_while_a_checkpoint_is_removed_stops_no_later_run(configured, copied, monkeypatch):
    out = copied()
    monkeypatch.setattr("shutil.rmtree", lambda folder, **_: (folder / "sft_config.json").unlink())
    remove([out / "checkpoint_epoch_1"])
    monkeypatch.undo()
    assert newest_checkpoint(configured()) == out / "checkpoint_epoch_2"
    train(configured(resume=True))
    train(configured(overwrite=True, num_epochs=1))
    assert not list(out.glob(".checkpoint*"))


def test_a_finished_model_without_checkpoints_is_not_trained_over(configured, copied):
    out = copied()
    for folder in out.glob("checkpoint_*"):
        shutil.rmtree(folder)
    before = state_of(out)
    with pytest.raises(InputError, match=r"holds a finished model and no checkpoint\n.*--init_adapter"):
        train(configured(resume=True, num_epochs=3))
    assert state_of(out) == before


def test_the_best_epoch_stays_final_model_when_its_checkpoint_is_gone(configured, monkeypatch, tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(training, "evaluate", lambda run, examples: next(losses))
    assert train(configured(num_epochs=2))["kept_epoch"] == 1
    shutil.rmtree(tmp_path / "out" / "checkpoint_epoch_1")
    before = state_of(tmp_path / "out" / "final_model")
    assert train(configured(num_epochs=3, resume=True))["kept_epoch"] == 1
    assert state_of(tmp_path / "out" / "final_model") == before


def test_what_windows_leaves_in_a_checkpoint_is_no_damage(configured, copied):
    (copied() / "checkpoint_epoch_2" / "Thumbs.db").write_bytes(b"icons")
    assert newest_checkpoint(configured()).name == "checkpoint_epoch_2"


def test_a_link_in_place_of_final_model_is_replaced_not_followed(configured, copied, tmp_path):
    out = copied(num_epochs=1)
    elsewhere = tmp_path / "elsewhere"
    (out / "final_model").rename(elsewhere)
    (out / "final_model").symlink_to(elsewhere)
    kept = {path: path.read_bytes() for path in elsewhere.iterdir()}
    train(configured(resume=True))
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == kept
    assert not (out / "final_model").is_symlink()
