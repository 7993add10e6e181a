"""Everything before the first step: processes, base model, LoRA, optimizer, data."""

import copy
import hashlib
import json
import math
import os
import platform
from dataclasses import asdict, replace
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from peft import PeftModel

from sft.cli import InputError, log, on_main_process
from sft.data.dataset import SFTDataset, load_datasets
from sft.data.formats import main_language
from sft.data.prompt import PromptTemplate, set_chat_template
from sft.data.report import log_data_warnings
from sft.data.rows import Row
from sft.files import FORMAT_VERSION, sha256, sha256_of_files
from sft.model import base
from sft.model.adapter import add_lora, load_adapter_weights, set_gradient_checkpointing, shard_base
from sft.model.folder import read_sft_config
from sft.model.kernels import use_frozen_kernels
from sft.model.probes import enable_packing, is_untrained, longest_shared
from sft.options import DEFAULT_MAX_LENGTH, MAY_CHANGE, TrainConfig, quantization_of
from sft.training.parts import Learned, learn_writing
from sft.training.recipes import FROM_DATA
from sft.training.run import Plan, Run, TrainingProgress


def set_up(config: TrainConfig, rows: tuple[list[Row], list[Row]], checkpoint: Path | None = None) -> Run:
    """Everything before the first step, from checked options and rows. The prompt is that of `checkpoint` or
    of --init_adapter, if there is one. Raises InputError. Writes nothing."""
    placement = base.pick_device(config.device, config.dtype)
    accelerator = start_processes(config, placement)
    # One process converts or downloads the base model while the others wait
    with accelerator.main_process_first():
        # The Hub is never asked for what a file names
        to_type = "" if "model_name" in config.given else "--model_name"
        base_folder = base.resolve_model(config.model_name, to_type=to_type)
        hashes = hash_inputs(config, base_folder)
    source = checkpoint or config.init_adapter
    tokenizer, template = load_prompt(config, base_folder, Path(source) if source else None)
    is_sharded = config.shard_base and accelerator.num_processes > 1
    device = torch.device("cpu") if is_sharded else accelerator.device
    model = base.load_base_model(base_folder, device, placement.dtype, quantization_of(vars(config)))
    window = base.context_window(model.config) or math.inf
    if config.max_length == FROM_DATA:
        config.max_length = typical_length(config, rows, tokenizer, template, window)
    model, packed = build_model(config, accelerator, model, window)
    datasets = load_data(config, accelerator, model, tokenizer, rows, template)
    train_set = datasets[0]
    learned = learn_writing(train_set.rows, config, train_set.encoder.template.number_sentences)
    part_examples = SFTDataset(learned.rows, train_set.encoder, config.max_length).examples
    examples = train_set.examples + part_examples
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sft_config = describe_run(config, rows, datasets, learned, hashes, base_folder)
    sft_config["training"]["dtype"] = placement.dtype_name
    sft_config["max_new_tokens"] = longest_summary(datasets[0], window)
    layout = (config.batch_size, config.gradient_accumulation_steps, accelerator.num_processes)
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        wrapped=model if is_sharded else accelerator.prepare_model(model),
        tokenizer=tokenizer,
        train_set=datasets[0],
        val_set=datasets[1],
        examples=examples,
        packed=packed,
        longest_shared=longest_shared(model, config.max_length),
        plan=Plan(len(examples), *layout, config.num_epochs, config.seed),
        parameters=parameters,
        # Over float32 weights, whatever the base's dtype
        optimizer=torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay),
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=placement.dtype == torch.float16),
        base_name=base.portable_name(config.model_name, base_folder),
        sft_config=sft_config,
        fingerprint=make_fingerprint(
            config,
            hashes,
            sft_config["base_config"],
            n_processes=accelerator.num_processes,
            base_dtype=str(placement.dtype),
            packed=packed,
            parts=learned.digest,
        ),
        progress=TrainingProgress(micro_batch_size=config.batch_size),
    )


def start_processes(config: TrainConfig, placement: base.Placement) -> Accelerator:
    """accelerate's processes, alone or under torchrun; what it would add to the loop is off."""
    is_cpu_launch = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    if is_cpu_launch and "WORLD_SIZE" not in os.environ:
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


def hash_inputs(config: TrainConfig, base_folder: Path) -> dict[str, str]:
    """The SHA-256 of data, base weights and parent adapter; says which the run that --config repeats had
    others of. Raises InputError if the adapter to start from was trained on another base model."""
    hashes = {
        "train_csv": sha256_of_files(config.train_files),
        "base_weights": base.base_weights_sha256(base_folder),
    }
    if config.val_file:
        hashes["val_csv"] = sha256(Path(config.val_file))
    if config.init_adapter:
        parent = Path(config.init_adapter)
        if read_sft_config(parent)["sha256"]["base_weights"] != hashes["base_weights"]:
            problem = f"--init_adapter {config.init_adapter}: trained on another base model"
            raise InputError(problem, "pass --model_name with the model it was trained on")
        hashes["parent"] = sha256(parent / "adapter_model.safetensors")
    names = ("train_csv", "val_csv", "base_weights", "parent")
    others = [name for name in names if config.recorded.get(name) not in (None, hashes.get(name))]
    if others and on_main_process():
        log(f"warning: another run than that of {config.config} (SHA-256 differs: {', '.join(others)})")
    return hashes


def load_prompt(config: TrainConfig, base_folder: Path, source: Path | None) -> tuple:
    """(tokenizer, prompt) of the adapter folder `source`, never rendered a second time: chat templates write
    the day's date, and may be edited. Without one, (the base model's tokenizer, None).

    Raises InputError if --chat_template is not the one that `source` was trained with."""
    if source is None:
        return base.load_tokenizer(base_folder), None
    tokenizer = base.load_tokenizer(source)
    if config.chat_template:
        asked = base.load_tokenizer(base_folder)
        set_chat_template(asked, config.chat_template)
        if asked.chat_template != tokenizer.chat_template:
            problem = f"--chat_template {config.chat_template}: {source} was trained with another"
            raise InputError(problem, "leave it out: the prompt stays as it was")
    return tokenizer, PromptTemplate.from_dict(read_sft_config(source)["prompt"])


def typical_length(config: TrainConfig, rows, tokenizer, template, window: float) -> int:
    """The --max_length that holds 95 % of the training rows whole, the default at least, within the model's
    window."""
    whole = replace(config, max_length=int(min(window, 2**20)))
    # A copy, since the choice of one of several chat templates is for once
    train_set, _ = load_datasets(rows, copy.copy(tokenizer), whole, template=template)
    needed = train_set.whole_lengths
    length = int(min(window, max(DEFAULT_MAX_LENGTH, np.ceil(np.percentile(needed, 95)))))
    if on_main_process():
        share = math.floor(100 * (needed <= length).mean())
        most = ", the most that the model takes" if length == window else ""
        log(f"Longest row: {length} tokens{most}; {share} % of the training rows fit whole")
    return length


def build_model(
    config: TrainConfig, accelerator: Accelerator, model: torch.nn.Module, window: float
) -> tuple[PeftModel, bool]:
    """(base model with LoRA, ready to train; whether it takes packed rows)."""
    if config.max_length > window:
        problem = f"--max_length {config.max_length}: {config.model_name} takes {window} tokens at most"
        raise InputError(problem, f"use --max_length {window}")
    model = add_lora(
        model,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
        seed=config.seed,
    )
    if config.init_adapter:
        load_adapter_weights(model, Path(config.init_adapter))
    if config.shard_base and accelerator.num_processes > 1:
        shard_base(model, accelerator.device, accelerator.num_processes)
    else:
        use_frozen_kernels(model)
    packed, reason = enable_packing(model, config.max_length)
    if not packed and accelerator.is_main_process:
        log(f"info: this model does not support packed rows, so batches are padded: {reason}")
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model)
    return model.train(), packed


def load_data(
    config: TrainConfig,
    accelerator: Accelerator,
    model: PeftModel,
    tokenizer,
    rows: tuple[list[Row], list[Row]],
    template: PromptTemplate | None,
) -> tuple[SFTDataset, SFTDataset]:
    """Both sets as tokens. Raises InputError for tokens that the model does not have."""
    n_known = model.get_input_embeddings().weight.shape[0]
    # A sharded table has no rows to look at
    is_sharded = config.shard_base and accelerator.num_processes > 1

    def check_known(token: int) -> None:
        if token >= n_known:
            problem = f"{config.model_name}: its tokenizer gives token {token}, the model knows {n_known:,}"
            raise InputError(problem, "put the tokenizer that belongs to the weights into the model folder")

    def never_learned(token: int) -> bool:
        check_known(token)
        return not is_sharded and is_untrained(model, token)

    datasets = load_datasets(rows, tokenizer, config, template, never_learned)
    check_known(max(int(example.tokens.max()) for dataset in datasets for example in dataset.examples))
    log_data_warnings(rows, datasets, config)
    return datasets


def make_fingerprint(config: TrainConfig, hashes: dict[str, str], base_config: dict, **found) -> dict:
    """What a resumed run must share with the one before; `found`: what the options led to."""
    options = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    digest = hashlib.sha256(json.dumps(base_config).encode()).hexdigest()
    return options | {"parent": None} | hashes | found | {"base_config": digest}


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
    hashes: dict[str, str],
    base_folder: Path,
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

    def portable(value):
        if isinstance(value, list):
            return [portable(one) for one in value]
        is_absolute = isinstance(value, str | Path) and Path(value).is_absolute()
        return Path(value).name if is_absolute else value

    training = asdict(config) | {"train_csv": list(config.train_files), "val_csv": config.val_file}
    packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    versions = {name: version(name) for name in packages if find_spec(name)}
    return {
        "format_version": FORMAT_VERSION,
        "prompt": asdict(datasets[0].encoder.template),
        "max_length": config.max_length,
        "training": {name: portable(value) for name, value in training.items()},
        "rows": counts | {"parts": learned.counts},
        **learned.settings,
        # Of the training notes; inference warns about another one
        "language": main_language([row.clinical_note for row in datasets[0].rows]),
        "versions": {"python": platform.python_version()} | versions,
        "sha256": hashes,
        "base_model_is_local": base.is_local(config.model_name),
        "base_config": base.base_config(base_folder),
        "base_public_name": base.public_name(base_folder),
    }
