"""How long does one step of the decoding loop take in float32, bfloat16 and 8 bit, for a model larger than
the bundled one?

    python benchmarks/decode_step.py [--hidden_size 2048 --layers 8 --rounds 2]

A Llama with random weights (the shape of TinyLlama-1.1B, whose 22 layers would only take longer), prompts of
150 random tokens. The precisions take turns in one process; prints the best of the rounds, and each one's
fraction of float32's time."""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROMPT_TOKENS = 150
STEPS = 20
VOCABULARY = 32_000
STOP_TOKEN = VOCABULARY - 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--intermediate_size", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from sft.inference import decoding
    from sft.model.kernels import Int8Linear, PackedLinear, replace_linear_layers

    decoding.DRAFT_TOKENS = 0  # each step writes one token per sequence
    config = LlamaConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    models = {}
    for name, dtype, kind in (
        ("float32", torch.float32, PackedLinear),
        ("bfloat16", torch.bfloat16, None),
        ("8 bit", torch.float32, Int8Linear),
    ):
        torch.manual_seed(0)
        models[name] = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if kind:
            replace_linear_layers(models[name], kind)
        fits, reason = decoding.enable_kv_cache(models[name])
        assert fits, reason

    def seconds(model, batch_size: int, n_new: int) -> float:
        source = random.Random(0)
        prompts = {i: [source.randrange(STOP_TOKEN) for _ in range(PROMPT_TOKENS)] for i in range(batch_size)}
        options = {"temperature": 0.0, "batch_size": batch_size, "seed": 0}
        started = time.perf_counter()
        list(decoding.decode(model, prompts, n_new, [STOP_TOKEN], **options))
        return time.perf_counter() - started

    print("| sequences | " + " | ".join(f"{name}: prompts, s | one step, ms" for name in models) + " |")
    print("|--:|" + "--:|" * 2 * len(models))
    for batch_size in arguments.batch_sizes:
        times = {name: [] for name in models}
        for _ in range(arguments.rounds):
            for name, model in models.items():
                times[name].append([seconds(model, batch_size, n_new) for n_new in (1, 1 + STEPS)])
        best = {name: [min(column) for column in zip(*rows)] for name, rows in times.items()}
        steps = {name: (whole - first) / STEPS for name, (first, whole) in best.items()}
        cells = []
        for name, step in steps.items():
            fraction = "" if name == "float32" else f" ({step / steps['float32']:.2f})"
            cells.append(f"{best[name][0]:.2f} | {step * 1000:.0f}{fraction}")
        print(f"| {batch_size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
