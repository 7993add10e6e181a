"""Everything before the first step: processes, base model, LoRA, optimizer, data."""

import functools
import hashlib
import json
import math
import os
import platform
from dataclasses import asdict, fields
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from peft import PeftModel

from sft.cli import InputError, log
from sft.data.dataset import Example, SFTDataset, load_datasets
from sft.data.formats import main_language
from sft.data.prompt import PromptTemplate, build_template
from sft.data.report import log_data_warnings
from sft.data.rows import Row
from sft.files import FORMAT_VERSION, sha256
from sft.model.adapter import add_lora, set_gradient_checkpointing, shard_base
from sft.model.base import (
    Placement,
    base_config,
    base_weights_sha256,
    context_window,
    is_local,
    load_base_model,
    load_tokenizer,
    pick_device,
    portable_name,
    public_name,
    resolve_model,
)
from sft.model.kernels import use_frozen_kernels
from sft.model.probes import enable_packing, is_untrained, longest_shared
from sft.options import TrainConfig, quantization_of
from sft.training.parts import Learned, learn_writing
from sft.training.run import Plan, Run, TrainingProgress


def set_up(config: TrainConfig, rows: tuple[list[Row], list[Row]], checkpoint: Path | None = None) -> Run:
    """Everything before the first step, from checked options and rows: processes, base model, LoRA,
    optimizer, data. The prompt is that of `checkpoint`, if there is one.

    Raises InputError. Writes nothing.
    """
    placement = pick_device(config.device, config.dtype)
    accelerator = start_processes(config, placement)
    base_folder, base_weights = find_base(config, accelerator)
    tokenizer = load_tokenizer(base_folder)
    model, packed = build_model(config, placement, accelerator, base_folder)
    optimizer = make_optimizer(config, model)
    train_set, val_set = load_data(config, accelerator, model, tokenizer, rows, checkpoint)
    learned, part_examples = load_parts(config, train_set, checkpoint)
    examples = train_set.examples + part_examples

    is_sharded = config.shard_base and accelerator.num_processes > 1
    hashes = {"train_csv": sha256_of_files(config.train_files), "base_weights": base_weights}
    if config.val_file:
        hashes["val_csv"] = sha256(Path(config.val_file))
    may_change = {field.name for field in fields(config) if field.metadata["may_change"]}
    fingerprint = {name: value for name, value in asdict(config).items() if name not in may_change}
    fingerprint |= {
        "n_processes": accelerator.num_processes,
        "base_dtype": str(placement.dtype),
        "packed": packed,
        "parts": learned.digest,
        "base_config": hashlib.sha256(json.dumps(base_config(base_folder)).encode()).hexdigest(),
    }
    sft_config = describe_run(config, rows, (train_set, val_set), learned, placement.dtype_name, hashes)
    sft_config["base_config"] = base_config(base_folder)
    sft_config["base_public_name"] = public_name(base_folder)
    window = context_window(model.get_base_model()) or math.inf
    sft_config["max_new_tokens"] = longest_summary(train_set, window)
    layout = (config.batch_size, config.gradient_accumulation_steps, accelerator.num_processes)
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        wrapped=model if is_sharded else accelerator.prepare_model(model),
        tokenizer=tokenizer,
        train_set=train_set,
        val_set=val_set,
        examples=examples,
        packed=packed,
        longest_shared=longest_shared(model, config.max_length),
        plan=Plan(len(examples), *layout, config.num_epochs, config.seed),
        parameters=optimizer.param_groups[0]["params"],
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=placement.dtype == torch.float16),
        base_name=portable_name(config.model_name, base_folder),
        sft_config=sft_config,
        fingerprint=fingerprint | hashes,
        progress=TrainingProgress(micro_batch_size=config.batch_size),
    )


def start_processes(config: TrainConfig, placement: Placement) -> Accelerator:
    """accelerate's process group, on CPU or GPU, alone or under torchrun; what it would add to the loop is
    off."""
    if (
        os.environ.get("ACCELERATE_USE_CPU") == "True"
        and "MASTER_PORT" in os.environ
        and "WORLD_SIZE" not in os.environ
    ):
        log(
            "warning: accelerate launch --cpu starts a single process; for more, use torchrun --nproc_per_node"
        )
    # One process may be downloading a model while the others wait
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        cpu=placement.device.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[patience],
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=Path(config.output_dir),
    )
    # Accumulation is the loop's; accelerate would divide the loss by what its environment says
    accelerator.gradient_accumulation_steps = 1
    if accelerator.is_main_process:
        log(f"Device: {accelerator.device}, {placement.dtype_name} ({placement.why})")
        if config.shard_base and accelerator.num_processes == 1:
            log("info: --shard_base has no effect with a single process")
    return accelerator


def find_base(config: TrainConfig, accelerator: Accelerator) -> tuple[Path, str]:
    """(folder, SHA-256) of the base model; one process converts or downloads it while the others wait."""
    with accelerator.main_process_first():
        folder = resolve_model(config.model_name)
        return folder, base_weights_sha256(folder)


def build_model(
    config: TrainConfig, placement: Placement, accelerator: Accelerator, base_folder: Path
) -> tuple[PeftModel, bool]:
    """(base model with LoRA, ready to train; whether it takes packed rows)."""
    is_sharded = config.shard_base and accelerator.num_processes > 1
    device = torch.device("cpu") if is_sharded else accelerator.device
    quantization = quantization_of(vars(config))
    base = load_base_model(base_folder, device, placement.dtype, quantization)
    longest = context_window(base) or math.inf
    if config.max_length > longest:
        problem = f"--max_length {config.max_length}: {config.model_name} takes {longest} tokens at most"
        raise InputError(problem, f"use --max_length {longest}")
    model = add_lora(
        base,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        seed=config.seed,
    )
    if is_sharded:
        shard_base(model, accelerator.device, accelerator.num_processes)
    else:
        use_frozen_kernels(model)
    packed, reason = enable_packing(model, config.max_length)
    if not packed and accelerator.is_main_process:
        log(f"info: this model does not support packed rows, so batches are padded: {reason}")
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model)
    return model.train(), packed


def make_optimizer(config: TrainConfig, model: PeftModel) -> torch.optim.Optimizer:
    """AdamW over the trainable weights, which are float32 whatever the base's dtype."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def load_data(
    config: TrainConfig,
    accelerator: Accelerator,
    model: PeftModel,
    tokenizer,
    rows: tuple[list[Row], list[Row]],
    checkpoint: Path | None,
) -> tuple[SFTDataset, SFTDataset]:
    """Both sets as tokens. Raises InputError for tokens that the model does not have."""
    # Never rendered a second time: templates write the day's date, and may be edited
    template = PromptTemplate.of_folder(checkpoint) if checkpoint else None
    # A sharded table has no rows to look at
    is_sharded = config.shard_base and accelerator.num_processes > 1
    never_learned = (lambda token: False) if is_sharded else functools.partial(is_untrained, model)
    datasets = load_datasets(rows, tokenizer, config, template, never_learned)
    n_embeddings = model.get_input_embeddings().weight.shape[0]
    highest = max(int(example.tokens.max()) for dataset in datasets for example in dataset.examples)
    if highest >= n_embeddings:
        problem = (
            f"{config.model_name}: its tokenizer gives token {highest}, the model knows {n_embeddings:,}"
        )
        raise InputError(problem, "put the tokenizer that belongs to the weights into the model folder")
    log_data_warnings(rows, datasets, config)
    if template and accelerator.is_main_process:
        rendered = build_template(
            tokenizer,
            thinking=config.thinking == "on",
            is_untrained=never_learned,
            instruction=config.instruction,
            number_sentences=template.number_sentences,
            sentence_version=template.sentence_version,
        )
        if rendered != template:
            log(
                "info: the base model's chat template makes another prompt now; the run keeps its checkpoint's"
            )
    return datasets


def load_parts(
    config: TrainConfig, train_set: SFTDataset, checkpoint: Path | None
) -> tuple[Learned, list[Example]]:
    """What the run learns of writing by sentences; the rows of parts as tokens, in the training rows' prompt,
    without those that do not fit."""
    is_numbered = train_set.encoder.template.number_sentences
    learned = learn_writing(train_set.rows, config, is_numbered, checkpoint)
    return learned, SFTDataset(learned.rows, train_set.encoder, config.max_length).examples


def sha256_of_files(files: list) -> str:
    """The SHA-256 of one file; of several, that of theirs."""
    first, *more = [sha256(Path(file)) for file in files]
    return hashlib.sha256("".join([first, *more]).encode()).hexdigest() if more else first


def longest_summary(dataset: SFTDataset, window: float) -> int:
    """How many tokens inference lets a summary have: what 99 % of the training summaries need, with the end
    token, and a quarter more, unless that leaves a note less than half of the model's `window`."""
    needed = math.ceil(np.percentile([example.n_target_tokens for example in dataset.examples], 99))
    return max(needed, int(min(1.25 * needed, window / 2)))


def describe_run(
    config: TrainConfig,
    rows: tuple[list[Row], list[Row]],
    datasets: tuple[SFTDataset, SFTDataset],
    learned: Learned,
    dtype: str,
    hashes: dict[str, str],
) -> dict:
    """sft_config.json: what inference needs to rebuild the prompt, and where the adapter comes from. No text,
    no absolute path."""
    counts = {
        name: {
            "factual": sum(row.label == "factual" for row in part),
            "hallucinated": sum(row.label == "hallucinated" for row in part),
            "used": len(dataset),
            "shortened": len(dataset.shortened),
            "refused": len(dataset.refused),
            "stray_citations": len(dataset.stray),
        }
        for name, part, dataset in zip(("train", "validation"), rows, datasets)
    }

    def portable(name):
        return Path(name).name if name and Path(name).is_absolute() else name

    training = asdict(config) | {"train_csv": list(config.train_files), "val_csv": config.val_file}
    training["train_csv"] = [portable(name) for name in training["train_csv"]]
    for name in ("val_csv", "model_name", "output_dir"):
        training[name] = portable(training[name])
    notes = [row.clinical_note for row in datasets[0].rows]
    packages = [
        name for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes") if find_spec(name)
    ]
    return {
        "format_version": FORMAT_VERSION,
        "prompt": asdict(datasets[0].encoder.template),
        "max_length": config.max_length,
        "training": training | {"dtype": dtype},
        "rows": counts | {"parts": learned.counts},
        **learned.settings,
        "language": main_language(notes),  # of the training notes; inference warns about another one
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "sha256": hashes,
        "base_model_is_local": is_local(config.model_name),
    }
