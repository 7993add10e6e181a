"""Summaries of validation notes while a run trains: scores, the private file, what decides which epoch is
kept."""

import json
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, assert_same_adapter, lines_of, stats_of

import stage_a_sft_training as training
from sft.cli import InputError
from sft.files import sha256
from sft.options import BUNDLED_MODEL
from sft.training import set_up
from sft.training.samples import is_sample_data, spread
from stage_a_sft_training import train

SCORES = {"rouge_l", "check_score", "coverage"}


def sample_files(config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.output_dir).glob("sample_notes_*")}


def test_samples_are_spread_over_the_notes():
    assert spread(30, 8) == [0, 3, 7, 11, 15, 18, 22, 26]
    assert spread(3, 8) == [0, 1, 2]


def test_sample_notes_are_written_scored_and_change_no_training(configured, finished, capfd, csv_files):
    """An interrupted run writes the same ones; nobody's notes come on screen."""
    options = {"n_sample_notes": 2}
    whole = finished(**options)
    assert_same_adapter(f"{whole.output_dir}/final_model", f"{finished().output_dir}/final_model")
    files = sample_files(whole)
    assert sorted(files) == ["sample_notes_epoch_1.jsonl", "sample_notes_epoch_2.jsonl"]
    samples = [json.loads(line) for line in files["sample_notes_epoch_2.jsonl"].splitlines()]
    assert [sample["id"] for sample in samples] == ["v0", "v1"]
    path = Path(whole.output_dir) / "sample_notes_epoch_1.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    epochs = stats_of(whole)["epochs"]
    assert all(0 <= epoch[name] <= 1 for epoch in epochs for name in SCORES)
    assert epochs[1]["rouge_l"] == pytest.approx(sum(sample["rouge_l"] for sample in samples) / 2)

    def kill(run, metrics):
        if metrics["step"] == 5:
            raise KeyboardInterrupt

    capfd.readouterr()
    with pytest.raises(KeyboardInterrupt):
        train(configured(**options), on_step=kill)
    train(configured(**options, resume=True))
    assert sample_files(configured()) == files
    assert lines_of(configured()) == lines_of(whole)
    said = capfd.readouterr().err
    assert "ROUGE-L: " in said
    assert not any(s["generated_summary"] and s["generated_summary"] in said for s in samples)
    train(configured(overwrite=True, num_epochs=1))
    assert not sample_files(configured())


@pytest.mark.parametrize(
    "keep_best, title, kept", [("check_score", "highest Check Score", 2), ("rouge_l", "highest ROUGE-L", 1)]
)
def test_a_score_decides_which_epoch_is_kept_and_when_to_stop(
    configured, monkeypatch, capfd, tmp_path, keep_best, title, kept
):
    values = {1: (0.5, 0.1), 2: (0.4, 0.3), 3: (0.3, 0.2), 4: (0.2, 0.2)}
    monkeypatch.setattr(
        training,
        "sample_notes",
        lambda run, epoch: dict(zip(("rouge_l", "check_score", "coverage"), (*values[epoch], 0.0))),
    )
    options = {"n_sample_notes": 1, "keep_best": keep_best, "early_stopping_patience": 2, "num_epochs": 4}
    stats = train(configured(**options))
    assert (stats["kept_epoch"], len(stats["epochs"])) == (kept, kept + 2)
    assert_same_adapter(tmp_path / "out" / "final_model", tmp_path / "out" / f"checkpoint_epoch_{kept}")
    said = capfd.readouterr().err
    assert f"(epoch {kept}, the {title}: " in said
    assert ("Stopped: " in said) == (kept + 2 < 4)


def test_a_score_needs_sample_notes(configured):
    with pytest.raises(InputError, match="--keep_best rouge_l needs the summaries of --n_sample_notes"):
        train(configured(keep_best="rouge_l"))


def test_samples_stay_within_the_models_positions(configured, monkeypatch, capfd):
    """GPT-2 has no more of them; the references fit, but summaries may be longer."""
    monkeypatch.setattr(set_up, "longest_summary", lambda *arguments: 5000)
    train(configured(architecture="gpt2", num_epochs=1, n_sample_notes=1))
    assert "no check whether summaries end" not in capfd.readouterr().err


def test_only_the_bundled_model_on_bundled_rows_is_shown(configured):
    files = {
        "train_csv": ROOT / "phase1_data/sft/train_set_processed.csv",
        "val_csv": ROOT / "phase1_data/sft/validation_set_processed.csv",
    }
    hashes = {name: sha256(file) for name, file in files.items()}

    def is_shown(model_name: str = BUNDLED_MODEL, **others: str) -> bool:
        config = replace(configured(), model_name=model_name)
        return is_sample_data(SimpleNamespace(config=config, sft_config={"sha256": hashes | others}))

    assert is_shown()
    assert not is_shown(train_csv="0")
    assert not is_shown(val_csv="0")
    assert not is_shown(parent="0")
    assert not is_shown("models/merged")
