import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_input_error, assert_same_adapter, metrics_of, run_python
from hypothesis import given
from hypothesis import strategies as st
from tiny import NOTES, write_csv

import stage_a_sft_training as training
from sft.model import base
from sft.options import TrainConfig
from sft.training.report import advise
from sft.training.run import Plan
from stage_a_sft_training import learning_rate_at, train

ARCHITECTURES = ["llama", "mistral", "qwen2", "gemma", "gemma2", "phi3", "gpt2", "bloom"]


# ------------------------------------------------------------------------------------------------ pure functions


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=120),
    *(st.integers(1, high) for high in (9, 5, 4)),
    st.none() | st.integers(1, 3000),
    st.booleans(),
)
def test_each_row_once_an_epoch(lengths, batch_size, accumulation, processes, max_tokens, padded):
    """However the rows are split over forward passes and processes; a pass keeps near its tokens."""
    examples = [SimpleNamespace(n_tokens=n, i=i) for i, n in enumerate(lengths)]
    plan = Plan(len(lengths), batch_size, accumulation, processes, 2, 7)
    for epoch in range(2):
        seen = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            rows = [examples[i] for i in plan.rows(step)]
            shares = [
                plan.micro_batches(rows, process, batch_size, max_tokens, padded)
                for process in range(processes)
            ]
            assert (
                len({len(share) for share in shares}) == 1
            )  # every process takes part in every forward pass
            batches = [batch for share in shares for batch in share if batch]
            assert all(len(batch) <= batch_size for batch in batches)
            for batch in batches:
                longest = max(example.n_tokens for example in batch)
                size = len(batch) * longest if padded else sum(example.n_tokens for example in batch)
                assert max_tokens is None or len(batch) == 1 or size <= 2 * max_tokens + 2 * longest
            seen += [example.i for batch in batches for example in batch]
        assert sorted(seen) == list(range(len(lengths)))


@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from(["cosine", "linear", "constant"]))
def test_learning_rate_schedule(total, warmup_ratio, scheduler):
    config = TrainConfig(warmup_ratio=warmup_ratio, lr_scheduler=scheduler)
    rates = [learning_rate_at(step, total, config) for step in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= config.learning_rate * (1 + 1e-9) for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(config.learning_rate)


def test_learning_rate_equals_that_of_transformers():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 50)
    for step in range(50):
        assert learning_rate_at(step, 50, TrainConfig(warmup_ratio=0)) == pytest.approx(
            optimizer.param_groups[0]["lr"]
        )
        optimizer.step()
        schedule.step()


def test_advice_follows_the_losses():
    def advice(untrained, *losses):
        epochs = [{"epoch": i + 1, "train_loss": t, "val_loss": v} for i, (t, v) in enumerate(losses)]
        return " ".join(advise(untrained, epochs))

    assert advice(3.0, (2.5, 2.4), (2.0, 2.1)) == ""
    assert "Overfitting after epoch 1" in advice(3.0, (2.5, 2.4), (2.0, 2.6))
    assert "barely moved" in advice(3.0, (3.0, 2.99))
    assert "lower --learning_rate" in advice(3.0, (4.0, 3.5))


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chat", ["llama3", "none"])
def test_every_architecture_trains_and_generates(configured, architecture, chat):
    from sft_inference import SFTInference

    config = configured(architecture=architecture, chat=chat, num_epochs=1, batch_size=6)
    stats = train(config)
    assert [line["step"] for line in metrics_of(config)] == [1, 2] and stats["epochs"][0]["val_loss"] < stats[
        "untrained_val_loss"
    ]
    result = SFTInference(f"{config.output_dir}/final_model", device="cpu").generate_summary(
        NOTES[0][0], max_new_tokens=5
    )
    assert 1 <= result["n_new_tokens"] <= 5


def test_what_a_run_writes_and_says(configured, capfd, tmp_path):
    config = configured()
    stats = train(config)
    out, said = tmp_path / "out", capfd.readouterr().err
    assert {path.name for path in out.iterdir()} == {
        "final_model",
        "checkpoint_epoch_1",
        "checkpoint_epoch_2",
        "training_stats.json",
        "metrics.jsonl",
        "loss_curve.png",
        "token_cache",
    }
    assert json.loads((out / "training_stats.json").read_text()) == stats
    needed = {
        "epoch",
        "train_loss",
        "val_loss",
        "learning_rate",
        "train_seconds",
        "n_tokens",
        "n_target_tokens",
        "tokens_per_second",
        "peak_memory_mb",
    }
    assert all(needed <= epoch.keys() for epoch in stats["epochs"])
    lines = metrics_of(config)
    assert [line["step"] for line in lines] == list(range(1, 7)) and sum(
        line["n_examples"] for line in lines[:3]
    ) == len(NOTES)
    assert stats["epochs"][0]["n_target_tokens"] == sum(line["n_target_tokens"] for line in lines[:3])
    kept = stats["kept_epoch"]
    assert stats["epochs"][kept - 1]["val_loss"] == min(epoch["val_loss"] for epoch in stats["epochs"])
    assert_same_adapter(out / "final_model", out / f"checkpoint_epoch_{kept}")
    assert not (out / "final_model" / "training_state.pt").exists()
    order = [
        "Untrained Val Loss:",
        "Epoch 1/2\n====",
        "Train Loss:",
        "Val Loss:",
        "Learning Rate:",
        "Saved checkpoint to",
        "Epoch 2/2",
        "Training completed!",
        "Saved final model to",
    ]
    place = 0
    for words in order:
        place = said.index(words, place) + len(words)
    saved = json.loads((out / "final_model" / "sft_config.json").read_text())
    assert saved["rows"]["train"] == {
        "factual": 11,
        "hallucinated": 1,
        "used": 11,
        "shortened": 0,
        "refused": 0,
    }
    assert saved["sha256"].keys() == {
        "train_csv",
        "val_csv",
        "base_weights",
        "adapter",
        "adapter_config",
        "tokenizer",
    }
    written = [
        path.read_text(errors="replace")
        for path in out.rglob("*")
        if path.suffix in (".json", ".jsonl", ".md")
    ]
    assert not any(
        path in text for path in (f'"{tmp_path}', f'"{config.model_name}') for text in written
    )  # no absolute path
    phrases = {phrase for note, _ in NOTES for phrase in re.findall(r"\w+ \w+ \w+", note)}
    assert not any(phrase in text for phrase in phrases for text in [*written, said])  # no patient


def test_losses_do_not_depend_on_the_split_of_a_batch(configured):
    """(8,1), (4,2), (1,8), and 8 in passes of about 150 tokens: the same losses and gradients, the short last group of 11
    rows included."""
    runs = []
    for batch_size, accumulation, max_tokens in ((8, 1, None), (4, 2, None), (1, 8, None), (8, 1, 150)):
        config = configured(
            f"out{len(runs)}",
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_tokens_per_batch=max_tokens,
            lora_dropout=0.0,
        )
        stats = train(config)
        lines = [
            (line["loss"], line["grad_norm"]) for line in metrics_of(config)
        ]  # the norm shows what AdamW hides: the scale
        runs.append(
            [
                stats["untrained_val_loss"],
                *(number for line in lines for number in line),
                *(e["val_loss"] for e in stats["epochs"]),
            ]
        )
    for numbers in runs[1:]:
        assert numbers == pytest.approx(runs[0], rel=1e-3)


def test_first_loss_is_the_mean_cross_entropy_of_its_tokens(configured):
    """Against the model alone, before any update."""
    from sft.data.dataset import load_datasets, read_data

    config = configured(lora_dropout=0.0, batch_size=11, num_epochs=1)
    train(config)
    folder = base.resolve_model(config.model_name)
    model = base.load_base_model(folder, torch.device("cpu"), torch.float32)
    train_set, val_set = load_datasets(read_data(config), base.load_tokenizer(folder), config)
    for dataset, loss in (
        (train_set, metrics_of(config)[0]["loss"]),
        (
            val_set,
            json.loads((ROOT / config.output_dir / "training_stats.json").read_text())["untrained_val_loss"],
        ),
    ):
        losses = []
        for item in dataset:
            logits = model(torch.tensor([item["input_ids"]])).logits[0, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(logits, torch.tensor(item["labels"][1:]), reduction="none")
            )
        losses = torch.cat(losses)
        assert loss == pytest.approx((losses.sum() / (losses != 0).sum()).item(), rel=1e-5)


def test_only_the_adapter_is_trained(configured, monkeypatch):
    seen = {}
    set_up = training.set_up

    def watched(config):
        seen["run"] = set_up(config)
        seen["before"] = {name: parameter.clone() for name, parameter in seen["run"].model.named_parameters()}
        return seen["run"]

    monkeypatch.setattr(training, "set_up", watched)
    train(configured())
    for name, parameter in seen["run"].model.named_parameters():
        assert torch.equal(parameter, seen["before"][name]) is ("lora_" not in name), name


def test_one_batch_is_learnt_by_heart_and_written_down(configured, tmp_path):
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
    results = SFTInference(f"{config.output_dir}/final_model", device="cpu").generate_batch(
        [note for note, _ in NOTES[:4]], 60
    )
    assert [result["generated_summary"] for result in results] == [summary for _, summary in NOTES[:4]]
    assert all(result["finish_reason"] == "stop" for result in results)


def test_the_update_is_adamw_on_the_clipped_mean_gradient(configured, monkeypatch):
    """The first update against torch's own, from the gradient of F.cross_entropy's mean."""
    from sft.data.dataset import packed_batch

    seen, real_update = {}, training.update

    def watched(run, step):
        if step:
            return real_update(run, step)
        batch = packed_batch([run.train_set.examples[i] for i in run.plan.rows(0)])
        torch.nn.functional.cross_entropy(run.model(**batch.inputs).logits[0], batch.targets).backward()
        theirs = [parameter.detach().clone().requires_grad_() for parameter in run.parameters]
        for copy, parameter in zip(theirs, run.parameters):
            copy.grad, parameter.grad = parameter.grad, None
        seen["norm"] = torch.nn.utils.clip_grad_norm_(theirs, 0.5).item()
        torch.optim.AdamW(
            theirs, lr=learning_rate_at(0, run.plan.total_steps, run.config), weight_decay=0.1
        ).step()
        seen["metrics"] = real_update(run, step)
        for ours, other in zip(run.parameters, theirs):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
        return seen["metrics"]

    monkeypatch.setattr(training, "update", watched)
    train(configured(num_epochs=1, lora_dropout=0.0, weight_decay=0.1, max_grad_norm=0.5))
    assert seen["metrics"]["grad_norm"] == pytest.approx(seen["norm"], rel=1e-4) and seen["norm"] > 0.5


def test_early_stopping_keeps_the_best_epoch(configured, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.4, 1.0])
    monkeypatch.setattr(training, "evaluate", lambda run, examples: next(losses))
    stats = train(configured(num_epochs=5, early_stopping_patience=2))
    assert [epoch["val_loss"] for epoch in stats["epochs"]] == [2.0, 2.5, 2.4] and stats["kept_epoch"] == 1


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "options",
    [{"use_8bit": True}, {"use_4bit": True}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}],
)
def test_memory_saving_options_train_and_infer(configured, options, capfd):
    from sft_inference import SFTInference

    config = configured(architecture="llama-wide", **options)  # bitsandbytes' 4-bit kernel wants blocks of 64
    stats = train(config)
    assert stats["epochs"][-1]["val_loss"] < stats["untrained_val_loss"]
    quantised = {name: value for name, value in options.items() if name.startswith("use_")}
    result = SFTInference(f"{config.output_dir}/final_model", device="cpu", **quantised).generate_summary(
        NOTES[0][0], 5
    )
    assert math.isfinite(result["confidence"]) and "MatMul8bitLt" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--no_such_option"], "no_such_option"),
        (["--batch_size", "0"], "batch_size"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--learning_rate", "inf"], "learning_rate"),
        (["--seed", "9" * 30], "seed"),
        (["--instruction", ""], "empty"),
        (["--use_8bit", "--use_4bit"], "choose one"),
        (["--model_name", "mistralai/Mistral-7B"], "mistralai/Mistral-7B-v0.3"),
        (["--model_name", "./nowhere"], "no such folder"),
        (["--device", "cuda"], "cuda"),
        (["--resume"], "no checkpoint"),
        (["--model_name", "TINY", "--target_modules", "nowhere"], "q_proj"),
        (["--model_name", "TINY", "--max_length", "4096"], "1024"),
        (["--model_name", "TINY", "--max_length", "32"], "no row fits"),
    ],
)
def test_bad_options_are_refused_in_two_lines(arguments, words, csv_files, tmp_path, model_folder):
    arguments = [str(model_folder()) if argument == "TINY" else argument for argument in arguments]
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    data = ["--train_csv", csv_files[0], "--val_csv", csv_files[1], "--output_dir", tmp_path / "out"]
    result = run_python("stage_a_sft_training.py", *data, *arguments)
    result.stderr = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("Device:"))
    assert_input_error(result, words)
    assert not (tmp_path / "out").exists()
