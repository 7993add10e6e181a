"""Kills short training runs with SIGKILL at random moments, resumes them, and compares what they end with.

    python benchmarks/kill_training.py --kills 100

Half of the kills are aimed at a moment when a checkpoint is being written. A killed run is resumed until it
ends; a third of the resumed runs are killed again. Every final adapter and metrics.jsonl must equal the
uninterrupted run's to the byte. The model is a small random one with the bundled model's tokenizer; a run of
it takes seconds."""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pandas as pd
import torch

# torch and peft are imported once, before the forks
from sft.model.base import bundled_model, load_tokenizer
from sft.options import TrainConfig
from stage_a_sft_training import train

FILES = {"train_csv": "train.csv", "val_csv": "val.csv", "model_name": "model"}


def small_model(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    base = bundled_model()
    config = AutoConfig.from_pretrained(base)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    config.update({**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": None})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)


def rows_of(source: Path, target: Path, n: int) -> None:
    rows = pd.read_csv(source, dtype=str, keep_default_na=False)
    rows[rows["label"] == "factual"][:n].to_csv(target, index=False)


def start(config: TrainConfig) -> int:
    """A training run in a process of its own; returns its process id."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        train(config)
        os._exit(0)
    except BaseException as error:
        os.write(1, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_saving(output_dir: Path) -> bool:
    return any(output_dir.glob(".checkpoint_*")) or any(output_dir.glob(".final_model*"))


def kill_at_random(child: int, output_dir: Path, seconds: float, dice: random.Random) -> bool:
    """Kills `child` at a moment of up to `seconds` from now, or at its first save after it; False if it ended
    before."""
    moment, aimed = time.monotonic() + dice.uniform(0, seconds), dice.random() < 0.5
    while time.monotonic() < moment or (aimed and not is_saving(output_dir)):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.03) if aimed else 0)
    os.kill(child, signal.SIGKILL)
    return True


def result(output_dir: Path) -> str:
    digest = hashlib.sha256((output_dir / "metrics.jsonl").read_bytes())
    digest.update((output_dir / "final_model" / "adapter_model.safetensors").read_bytes())
    return digest.hexdigest()


def end_killed(config: TrainConfig, seconds: float, dice: random.Random, expected: str) -> tuple[int, int]:
    """Kills a run and resumes it until it ends as expected; (its kills, those while it was saving)."""
    output = Path(config.output_dir)
    n_kills = 0
    n_saving = 0
    while True:
        # One killed before it began to write starts from the beginning
        config.resume = (output / "metrics.jsonl").exists()
        child = start(config)
        if (not n_kills or dice.random() < 1 / 3) and kill_at_random(child, output, seconds, dice):
            n_kills += 1
            n_saving += is_saving(output)
            wait(child)
            continue
        status = wait(child)
        if status or result(output) != expected:
            sys.exit(
                f"{output.name}: exit status {status}, {'another result' if not status else 'no result'}"
            )
        shutil.rmtree(output)
        # It ended before its kill: once more
        if n_kills:
            return n_kills, n_saving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    torch.set_num_threads(1)  # a pool of threads would not survive the forks
    n_kills = 0
    n_saving = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {key: str(folder / file) for key, file in FILES.items()}
        small_model(folder / "model")
        rows_of(ROOT / "phase1_data" / "sft" / "train_set_processed.csv", folder / "train.csv", 40)
        rows_of(ROOT / "phase1_data" / "sft" / "validation_set_processed.csv", folder / "val.csv", 8)

        def config(output: str) -> TrainConfig:
            output_dir = str(folder / output)
            return TrainConfig(**paths, output_dir=output_dir, batch_size=4, save_steps=2, device="cpu")

        began = time.monotonic()
        assert wait(start(config("whole"))) == 0
        seconds = time.monotonic() - began
        expected = result(folder / "whole")
        print(f"uninterrupted: {seconds:.1f} s, 20 steps, a checkpoint every 2", flush=True)
        for number in range(1, arguments.kills + 1):
            counts = end_killed(config(f"run_{number}"), seconds, dice, expected)
            n_kills += counts[0]
            n_saving += counts[1]
            if number % 10 == 0:
                print(f"{number} runs killed and resumed, all with the same adapter and metrics", flush=True)
    print(
        f"{arguments.kills} runs killed, {n_kills} kills in all, {n_saving} of them while a checkpoint was being"
        " written: every final adapter and metrics.jsonl is that of the uninterrupted run, to the byte"
    )


if __name__ == "__main__":
    main()
