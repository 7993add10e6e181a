"""The training loop: losses and gradients against PyTorch's own, whole runs, refused options."""

import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from conftest import assert_input_error, assert_same_adapter, lines_of, metrics_of, run_python, stats_of
from hypothesis import given
from hypothesis import strategies as st
from tiny import NOTES, tiny_model, write_csv

import stage_a_sft_training as training
from sft.cli import InputError
from sft.data.dataset import load_datasets, packed_batch, read_data
from sft.model.base import load_base_model, load_tokenizer
from sft.training.checks import check_options
from sft.training.set_up import set_up
from stage_a_sft_training import TrainConfig, learning_rate_at, train, train_step

ARCHITECTURES = ["llama", "mistral", "qwen2", "gemma", "gemma2", "phi3", "gpt2", "bloom"]


# ------------------------------------------------------------------------------- learning rate


@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from(["cosine", "linear", "constant"]))
def test_learning_rate_schedule(total, warmup_ratio, scheduler):
    config = TrainConfig(warmup_ratio=warmup_ratio, lr_scheduler=scheduler)
    rates = [learning_rate_at(step, total, config) for step in range(total)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= config.learning_rate * (1 + 1e-9) for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(config.learning_rate)


def test_learning_rate_equals_that_of_transformers():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 50)
    config = TrainConfig(warmup_ratio=0)
    for step in range(50):
        assert learning_rate_at(step, 50, config) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


# ------------------------------------------------------------------------------- losses and steps


def test_losses_do_not_depend_on_the_split_of_a_batch(configured, finished):
    """(8, 1), (4, 2), (1, 8), and 8 in passes of about 150 tokens: the same losses and gradients, the short
    last group of 11 rows included."""

    def numbers(config) -> list[float]:
        # The gradient norm shows what AdamW hides: the scale
        of_steps = [(line["loss"], line["grad_norm"]) for line in metrics_of(config)]
        stats = stats_of(config)
        of_epochs = [epoch["val_loss"] for epoch in stats["epochs"]]
        return [stats["untrained_val_loss"], *(number for step in of_steps for number in step), *of_epochs]

    expected = numbers(finished(batch_size=8, lora_dropout=0.0))
    for batch_size, accumulation, max_tokens in ((4, 2, None), (1, 8, None), (8, 1, 150)):
        config = configured(
            f"out-{batch_size}",
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_tokens_per_batch=max_tokens,
            lora_dropout=0.0,
        )
        train(config)
        assert numbers(config) == pytest.approx(expected, rel=1e-3)


def test_first_losses_are_the_mean_cross_entropy_of_their_tokens(configured):
    """Against the model alone, before any step."""
    config = configured(lora_dropout=0.0, batch_size=11, num_epochs=1)
    stats = train(config)
    folder = Path(config.model_name)
    model = load_base_model(folder, torch.device("cpu"), torch.float32)
    train_set, val_set = load_datasets(read_data(config), load_tokenizer(folder), config)
    for dataset, loss in ((train_set, metrics_of(config)[0]["loss"]), (val_set, stats["untrained_val_loss"])):
        loss_sum = 0.0
        n_targets = 0
        for item in dataset:
            logits = model(torch.tensor([item["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(item["labels"][1:])
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
            n_targets += (labels != -100).sum().item()
        assert loss == pytest.approx(loss_sum / n_targets, rel=1e-5)


def test_only_the_adapter_is_trained(configured):
    config = configured()
    run = set_up(config, read_data(config))
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    for step in range(3):
        train_step(run, step)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) is ("lora_" not in name), name


def test_a_step_is_adamw_on_the_clipped_mean_gradient(configured):
    """The first step against torch's own, from the gradient of F.cross_entropy's mean."""
    config = configured(num_epochs=1, lora_dropout=0.0, weight_decay=0.1, max_grad_norm=0.5)
    run = set_up(config, read_data(config))
    batch = packed_batch([run.examples[i] for i in run.plan.rows(0)])
    F.cross_entropy(run.model(**batch.inputs).logits[0], batch.targets).backward()
    theirs = [parameter.detach().clone().requires_grad_() for parameter in run.parameters]
    for copy, parameter in zip(theirs, run.parameters):
        copy.grad = parameter.grad
        parameter.grad = None
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5).item()
    learning_rate = learning_rate_at(0, run.plan.total_steps, config)
    torch.optim.AdamW(theirs, lr=learning_rate, weight_decay=0.1).step()
    metrics = train_step(run, 0)
    for ours, other in zip(run.parameters, theirs):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 0.5


# ------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "architecture, chat", [*((name, "llama3") for name in ARCHITECTURES), ("llama", "none"), ("gpt2", "none")]
)
def test_every_architecture_trains_and_generates(configured, architecture, chat):
    from sft_inference import SFTInference

    config = configured(architecture=architecture, chat=chat, num_epochs=1, batch_size=6)
    stats = train(config)
    assert [line["step"] for line in metrics_of(config)] == [1, 2]
    assert stats["epochs"][0]["val_loss"] < stats["untrained_val_loss"]
    inference = SFTInference(f"{config.output_dir}/final_model", device="cpu")
    result = inference.generate_summary(NOTES[0][0], max_new_tokens=5)
    assert 1 <= result["n_new_tokens"] <= 5


def test_the_files_of_a_run(finished):
    config = finished()
    out = Path(config.output_dir)
    stats = stats_of(config)
    assert {path.name for path in out.iterdir()} == {
        "final_model",
        "checkpoint_epoch_1",
        "checkpoint_epoch_2",
        "training_stats.json",
        "metrics.jsonl",
        "loss_curve.png",
    }
    needed = {*"epoch train_loss val_loss learning_rate train_seconds n_tokens n_target_tokens".split()}
    needed |= {"tokens_per_second", "peak_memory_mb"}
    assert all(needed <= epoch.keys() for epoch in stats["epochs"])
    lines = metrics_of(config)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert sum(line["n_examples"] for line in lines[:3]) == len(NOTES)
    assert stats["epochs"][0]["n_target_tokens"] == sum(line["n_target_tokens"] for line in lines[:3])

    kept = stats["kept_epoch"]
    assert stats["epochs"][kept - 1]["val_loss"] == min(epoch["val_loss"] for epoch in stats["epochs"])
    assert_same_adapter(out / "final_model", out / f"checkpoint_epoch_{kept}")
    assert not (out / "final_model" / "training_state.pt").exists()


def test_what_a_run_records_of_itself(finished):
    """Counts, checksums, and no absolute path."""
    import json

    config = finished()
    out = Path(config.output_dir)
    recorded = json.loads((out / "final_model" / "sft_config.json").read_text())
    expected = {"factual": 11, "hallucinated": 1, "used": 11, "shortened": 0, "refused": 0}
    expected["stray_citations"] = 0
    assert recorded["language"] in ("en", None)
    assert recorded["rows"]["train"] == expected
    assert 5 < recorded["max_new_tokens"] < 100
    hashed = {"train_csv", "val_csv", "base_weights", "adapter"}
    assert recorded["sha256"].keys() == hashed
    texts = [path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".jsonl", ".md")]
    for path in (out, config.model_name):
        assert not any(f'"{path}' in text for text in texts)


def test_summaries_may_be_as_long_as_those_of_training():
    from sft.training.set_up import longest_summary

    def longest(*lengths, window=math.inf):
        return longest_summary(
            SimpleNamespace(examples=[SimpleNamespace(n_target_tokens=n) for n in lengths]), window
        )

    assert longest(*range(1, 201)) == 248  # 198.01, and a quarter more
    assert longest(*[40] * 999, 4000) == 50  # one that is not like the others
    assert longest(200, window=400) == 200
    assert longest(200, window=480) == 240
    assert longest(1) == 1


def test_a_fraction_set_apart_is_written_down_and_kept_on_resume(configured, capfd):
    import json

    options = {"val_csv": None, "val_fraction": 0.2}
    config = configured(num_epochs=1, **options)
    train(config)
    assert "2 validation rows (their numbers: training_stats.json)" in capfd.readouterr().err
    stats = json.loads((Path(config.output_dir) / "training_stats.json").read_text())
    chosen = read_data(config)[1]
    assert stats["validation_rows"] == {"train.csv": [row.number for row in chosen if row.label == "factual"]}
    recorded = json.loads((Path(config.output_dir) / "final_model" / "sft_config.json").read_text())
    assert recorded["training"]["val_fraction"] == 0.2
    assert [recorded["rows"][part]["used"] for part in ("train", "validation")] == [9, 2]
    assert "val_csv" not in recorded["sha256"]
    with pytest.raises(InputError, match="val_fraction was"):
        train(configured(num_epochs=2, resume=True, val_csv=None, val_fraction=0.3))
    assert len(train(configured(num_epochs=2, resume=True, **options))["epochs"]) == 2


def test_what_a_run_says(configured, capfd, tmp_path):
    """In this order, and no patient's text, nor in any file."""
    stats = train(configured())
    logged = capfd.readouterr().err
    assert stats == stats_of(configured())
    position = 0
    for words in (
        "Plan: 6 steps in 2 epochs",
        "Untrained Val Loss:",
        "Epoch 1/2\n====",
        "Train Loss:",
        "Val Loss:",
        "Learning Rate:",
        "Saved checkpoint to",
        "Epoch 2/2",
        "Training completed!",
        "Saved final model to",
    ):
        position = logged.index(words, position) + len(words)
    files = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".jsonl", ".md")]
    texts = [path.read_text() for path in files]
    phrases = {phrase for note, _ in NOTES for phrase in re.findall(r"\w+ \w+ \w+", note)}
    assert not any(phrase in text for phrase in phrases for text in [*texts, logged])


def test_one_batch_is_learned_by_heart_and_written_down(configured, capfd, tmp_path):
    from sft_inference import SFTInference

    rows = [(f"r{i}", note, summary, "factual", "") for i, (note, summary) in enumerate(NOTES[:4] * 10)]
    path = str(write_csv(tmp_path / "four.csv", rows))
    config = configured(
        train_csv=path,
        val_csv=path,
        num_epochs=12,
        lora_r=16,
        lora_dropout=0.0,
        learning_rate=1e-2,
        target_modules=["all-linear"],
    )
    stats = train(config)
    assert stats["epochs"][-1]["train_loss"] < 0.1
    assert "did not come to an end" not in capfd.readouterr().err
    inference = SFTInference(f"{config.output_dir}/final_model", device="cpu")
    results = inference.generate_batch([note for note, _ in NOTES[:4]], 60)
    assert [result["generated_summary"] for result in results] == [summary for _, summary in NOTES[:4]]
    assert all(result["finish_reason"] == "stop" for result in results)


def test_summaries_that_do_not_end_are_said_loudly(configured, monkeypatch, capfd):
    train(configured(num_epochs=1, batch_size=8))
    assert re.search(r"WARNING: [23] of 3 summaries", capfd.readouterr().err)
    monkeypatch.setattr(training, "count_endings", lambda run: (2, 4))
    train(configured("other", num_epochs=1, batch_size=8))
    assert "WARNING: " not in capfd.readouterr().err


def test_a_token_that_the_model_does_not_have(configured, model_folder, tmp_path):
    base = shutil.copytree(model_folder(), tmp_path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["fever", *(f"word{i}" for i in range(40))][::-1])
    tokenizer.save_pretrained(base)
    with pytest.raises(InputError, match=r"its tokenizer gives token 4\d\d, the model knows 420\n"):
        train(configured(model_name=str(base)))
    # Nor the token that ends a summary
    model = tiny_model()
    model.resize_token_embeddings(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    model.save_pretrained(base)
    with pytest.raises(InputError, match="its tokenizer gives token"):
        train(configured(model_name=str(base)))


def test_validation_losses_stand_in_the_metrics(finished):
    config = finished()
    stats = stats_of(config)
    losses = [stats["untrained_val_loss"], *(epoch["val_loss"] for epoch in stats["epochs"])]
    expected = [{"step": 3 * i, "epoch": i, "val_loss": loss} for i, loss in enumerate(losses)]
    assert [line for line in lines_of(config) if "val_loss" in line] == expected


@pytest.mark.parametrize("broken", ["draw_losses", "log", "init_trackers", "finish"])
def test_no_picture_and_no_tracker_ends_a_run(configured, monkeypatch, capfd, broken, tmp_path):
    def fail(*arguments, **options):
        raise ValueError("broken in the test")

    owner = {"draw_losses": training, "finish": TensorBoardTracker}.get(broken, Accelerator)
    monkeypatch.setattr(owner, broken, fail)
    train(configured(num_epochs=1, report_to="tensorboard"))
    assert (tmp_path / "out" / "final_model" / "SHA256SUMS").exists()
    said = capfd.readouterr().err
    assert re.search("warning: no .*: broken in the test", said) and "Training completed!" in said


# ------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [{"use_8bit": True}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}],
)
def test_memory_saving_options_train_and_infer(configured, options, capfd):
    from sft_inference import SFTInference

    config = configured(architecture="llama-wide", **options)
    stats = train(config)
    assert stats["epochs"][-1]["val_loss"] < stats["untrained_val_loss"]
    inference = SFTInference(f"{config.output_dir}/final_model", device="cpu")
    assert (inference.quantization is not None) == ("use_8bit" in options)
    result = inference.generate_summary(NOTES[0][0], 5)
    assert math.isfinite(result["confidence"])
    assert "MatMul8bitLt" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        ({"use_8bit": True, "use_4bit": True}, "choose one"),
        ({"use_4bit": True, "shard_base": True}, "choose one"),
        ({"n_sample_notes": 2, "shard_base": True}, "choose one"),
        ({"model_name": "mistralai/Mistral-7B"}, "mistralai/Mistral-7B-v0.3"),
        ({"model_name": "./nowhere"}, "no such folder"),
        ({"device": "cuda"}, "cuda"),
        ({"resume": True}, "no checkpoint"),
        ({"resume": True, "overwrite": True}, "choose one"),
        ({"target_modules": ["nowhere"]}, "q_proj"),
        ({"max_length": 4096}, "1024"),
        ({"max_length": 32}, "no row fits"),
    ],
)
def test_runs_that_cannot_work_are_refused_and_write_nothing(configured, tmp_path, options, words):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(InputError, match=words):
        train(configured(**options))
    assert not (tmp_path / "out").exists()


def test_a_refusal_takes_two_lines(csv_files, tmp_path, model_folder):
    arguments = ["--train_csv", csv_files[0], "--val_csv", csv_files[1], "--output_dir", tmp_path / "out"]
    wrong = ["--model_name", model_folder(), "--target_modules", "nowhere", "--device", "cpu"]
    result = run_python("stage_a_sft_training.py", *arguments, *wrong)
    result.stderr = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("Device:"))
    assert_input_error(result, "q_proj")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, value, harmless",
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "NO"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", "default"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "no"),
        ("ACCELERATE_FP8_BACKEND", "TE", None),
        ("ACCELERATE_USE_FSDP", "true", "false"),
        ("ACCELERATE_LOG_LEVEL", "nonsense", "Warning"),
        ("ACCELERATE_USE_CPU", "perhaps", "True"),
        ("ACCELERATE_SOMETHING_NEW", "x", "0"),
        ("FSDP_SHARDING_STRATEGY", "1", "no"),
        ("PARALLELISM_CONFIG_TP_SIZE", "2", "no"),
    ],
)
def test_what_accelerate_hands_down_and_the_loop_does_not_take(monkeypatch, name, value, harmless):
    if harmless:
        monkeypatch.setenv(name, harmless)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    check_options(TrainConfig())
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"does not fit this training loop \({name}={value}\)"):
        check_options(TrainConfig())


def test_what_accelerates_launcher_sets_by_itself_is_taken(monkeypatch):
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import launch

    for flags in ("--cpu", "--multi_gpu --num_processes 2"):
        others = "--num_machines 1 --mixed_precision no --num_cpu_threads_per_process 1 train.py"
        arguments = launch_command_parser().parse_args(f"{flags} {others}".split())
        arguments.dynamo_backend = "no"
        if "--cpu" in flags:
            _, environment = launch.prepare_simple_launcher_cmd_env(arguments)
        else:
            environment = launch.prepare_multi_gpu_env(arguments)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        check_options(TrainConfig())
        monkeypatch.undo()


def test_what_belongs_to_the_whole_program_stays_as_it_was(configured):
    """Settings of the libraries, random numbers, the environment: after training and after inference."""
    import csv
    import os
    import random
    import warnings

    import numpy
    from transformers.utils import logging

    from sft_inference import SFTInference

    def state() -> dict:
        return {
            "environment": dict(os.environ),
            "warnings": list(warnings.filters),
            "verbosity": (logging.get_verbosity(), logging.is_progress_bar_enabled()),
            "torch": (torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads()),
            "random": (random.getstate(), numpy.random.get_state()[1].tolist(), csv.field_size_limit()),
        }

    before = state()
    config = configured(num_epochs=1)
    train(config)
    assert state() == before
    inference = SFTInference(f"{config.output_dir}/final_model", device="cpu")
    inference.generate_summary("Fever.", 3, temperature=1.0)
    assert state() == before
