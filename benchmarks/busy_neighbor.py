"""How fast is training beside other busy programs, and what should a waiting thread do?

    python benchmarks/busy_neighbor.py [--neighbors 0 1 2 4 --rounds 2]

Beside so many processes that only count, one training step (forward and backward of 300 tokens through the
bundled model, LoRA on q_proj and v_proj, float32) is repeated for some seconds, each time in a process of its
own, with libgomp's own settings, with this toolkit's, with threads that never wait busily, and with one
thread; they take turns. Prints the best seconds a step of the rounds, and the ratio to this toolkit's."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Before torch, which reads what this package sets in the environment
from sft.cli import log

SETTINGS = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "this toolkit's": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
TOKENS = 300
LEAST_SECONDS = 8
LONGEST_SECONDS = 120  # what takes longer for two steps is given up


def measure() -> float:
    """Seconds a step, in this process."""
    import torch

    from sft.model.adapter import add_lora
    from sft.model.base import bundled_model, load_base_model
    from sft.model.kernels import use_frozen_kernels

    model = load_base_model(bundled_model(), torch.device("cpu"), torch.float32)
    model = add_lora(model, r=16, alpha=32, dropout=0.0, target_modules=["q_proj", "v_proj"], seed=0)
    use_frozen_kernels(model)
    token_ids = torch.arange(TOKENS)[None]

    def step() -> None:
        model(input_ids=token_ids, use_cache=False).logits.logsumexp(-1).sum().backward()

    step()
    n_steps = 0
    start = time.perf_counter()
    while time.perf_counter() < start + LEAST_SECONDS or n_steps < 2:
        step()
        n_steps += 1
    return (time.perf_counter() - start) / n_steps


def measured_beside(n_neighbors: int, setting: dict[str, str]) -> float:
    """Seconds a step, in a process of its own; infinite if two steps take too long."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: sum(range(10_000))"]) for _ in range(n_neighbors)
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    try:
        command = [sys.executable, __file__, "--measure"]
        run = subprocess.run(
            command, env=kept | setting, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=True
        )
        return float(run.stdout)
    except subprocess.TimeoutExpired:
        return float("inf")
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--neighbors", type=int, nargs="+", default=[0, 1, 2, 4], help="busy processes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure())
        return
    for n_neighbors in arguments.neighbors:
        seconds = dict.fromkeys(SETTINGS, float("inf"))
        for _ in range(arguments.rounds):
            for name, setting in SETTINGS.items():
                seconds[name] = min(seconds[name], measured_beside(n_neighbors, setting))
        for name, value in seconds.items():
            ratio = value / seconds["this toolkit's"]
            log(f"{n_neighbors} busy, {name}: {value:.2f} s/step, {ratio:.2f} x this toolkit's")


if __name__ == "__main__":
    main()
