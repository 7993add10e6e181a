"""The folders that inference takes, read and verified before torch is imported: an adapter's, a merged
model's, or an adapter that another tool (PEFT, TRL) saved, with the prompt of one of ours."""

import functools
import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

from sft.cli import InputError, log, on_main_process
from sft.files import ROOT, check_format_version, checksum_problem, remembered_sha256, sha256
from sft.options import OLDER_MAX_NEW_TOKENS, quantization_of

_FIX = "restore it from a backup, or train again"
# Files of these kinds decide nothing of what a summary says: model cards, the training state
_DECIDE_NOTHING = (".md", ".pt")
_KINDS = {
    **dict.fromkeys("training base_config shorthand merged".split(), dict | None),
    "prompt": dict,
    "max_length": int,
    "max_new_tokens": int | None,
    "language": str | None,
}
_RECORDED_BEFORE = {
    "adapter": "adapter_model.safetensors",
    "adapter_config": "adapter_config.json",
    "tokenizer": "tokenizer.json",
}


def read_json_object(file: Path) -> dict:
    """Raises InputError if the file is missing or holds something else."""
    problem = f"{file.parent}: {file.name} is not valid JSON"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        value = None
        problem = f"{file.parent}: no {file.name}"
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(problem, "restore the file from a backup")
    return value


def read_sft_config(folder: Path) -> dict:
    """sft_config.json of a folder that training or --merge_to wrote. Raises InputError if it is missing,
    damaged or of a newer version."""
    if not (folder / "sft_config.json").is_file():
        problem = f"{folder}: no sft_config.json: not written by this toolkit"
        fix = "train with stage_a_sft_training.py; an adapter that another tool trained further needs --prompt_from"
        raise InputError(problem, fix)
    sft_config = read_json_object(folder / "sft_config.json")
    check_format_version(folder, sft_config)
    sft_config.setdefault("max_new_tokens", OLDER_MAX_NEW_TOKENS)
    return sft_config


def read_adapter_folder(
    model_path: str | Path, prompt_from: str | Path | None = None, *, verify: bool = False
) -> tuple[Path, dict, dict]:
    """(folder, sft_config.json, adapter_config.json or, of a merged model, {}), verified against SHA256SUMS.

    With `prompt_from`, a folder of ours, `model_path` may be any LoRA adapter in PEFT's format; the
    sft_config.json is then that folder's. Its "sha256" gains "folder", one hash for all files that decide
    what a summary says. `verify` reads large files again that have not changed by size, time and inode.

    Raises InputError if the folder cannot be used, or a file in it is not the one that was written."""
    folder = Path(model_path)
    if not folder.is_dir():
        fix = "train first (python stage_a_sft_training.py), or pass an adapter folder with --model_path"
        raise InputError(f"{folder}: no such folder", fix)
    if prompt_from is not None:
        return _read_foreign_folder(folder, prompt_from, verify)
    is_merged = (folder / "config.json").is_file() and (folder / "sft_config.json").is_file()
    if not is_merged:
        _check_adapter_files(folder)
    sft_config = read_sft_config(folder)
    adapter_config = {} if is_merged else read_json_object(folder / "adapter_config.json")
    if not _is_complete(sft_config, adapter_config) or is_merged != ("merged" in sft_config):
        problem = f"{folder}: its configuration lacks the prompt, base model or checksums"
        raise InputError(problem, _FIX)
    problem = _changed_file(folder, sft_config, verify)
    if problem:
        fix = (
            f"{_FIX}; if you changed it on purpose, see section 7 of the guide; if another tool trained it"
            " further, name the folder as it was with --prompt_from"
        )
        raise InputError(f"{folder}: {problem}", fix)
    sft_config["sha256"]["folder"] = _folder_hash(folder)
    return folder, sft_config, adapter_config


def read_named_folder(option: str, path: str | Path, **options) -> tuple[Path, dict, dict]:
    """As read_adapter_folder, of an adapter folder of ours that `option` names; its refusals name it too."""
    try:
        return read_adapter_folder(path, **options)
    except InputError as error:
        # Advice on inference's options would lead in a circle, or to options that are not there
        is_elsewhere = "--prompt_from" in error.fix or "--model_path" in error.fix
        fix = "name the final_model folder of this toolkit, as it was written" if is_elsewhere else error.fix
        raise InputError(f"{option} {error.problem}", fix) from None


def _check_adapter_files(folder: Path) -> None:
    if not (folder / "adapter_config.json").is_file():
        inside = sorted(folder.glob("*/adapter_config.json"), reverse=True)
        fix = f"use {inside[0].parent if inside else 'a final_model folder'}"
        raise InputError(f"{folder}: no adapter here (no adapter_config.json)", fix)
    if not (folder / "adapter_model.safetensors").is_file():
        is_pickle = (folder / "adapter_model.bin").is_file()
        safe = "use a safetensors version of this adapter (pickle files are not loaded, for security)"
        raise InputError(f"{folder}: no adapter_model.safetensors", safe if is_pickle else _FIX)


def _is_complete(sft_config: dict, adapter_config: dict) -> bool:
    try:
        texts = [sft_config["sha256"][name] for name in ("base_weights", "adapter")]
        texts += [adapter_config["base_model_name_or_path"]] if adapter_config else []
        of_kinds = all(isinstance(sft_config.get(name), kind) for name, kind in _KINDS.items())
        quantization_of(sft_config.get("training") or {})
        return of_kinds and all(isinstance(text, str) for text in texts)
    except (KeyError, TypeError, AttributeError):
        return False


def _changed_file(folder: Path, sft_config: dict, verify: bool) -> str | None:
    """Which file is not as it was written, and how; None if all are."""
    # Not by the version that the unverified file states alone: it could be lowered, and the sums removed
    has_sums = os.path.lexists(folder / "SHA256SUMS") or "base_config" in sft_config
    if has_sums or sft_config.get("format_version", 1) >= 3:
        hash_file = functools.partial(remembered_sha256, again=verify)
        return checksum_problem(folder, _DECIDE_NOTHING, hash_file)
    # What older versions recorded
    for name, file in _RECORDED_BEFORE.items():
        recorded = sft_config["sha256"].get(name)
        if recorded and not ((folder / file).is_file() and sha256(folder / file) == recorded):
            return f"{file} is not the file that training wrote (missing, or SHA-256 differs)"
    return None


def _folder_hash(folder: Path, prompt_hash: str = "") -> str:
    """One hash for the files that decide a summary: of a verified folder by its SHA256SUMS, else by the files
    of which there is one in every adapter, and the hash of the folder that the prompt is from."""
    if (folder / "SHA256SUMS").is_file() and not prompt_hash:
        lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        hashes = [line for line in lines if not line.endswith(_DECIDE_NOTHING)]
    else:
        hashes = [sha256(folder / name) for name in ("adapter_model.safetensors", "adapter_config.json")]
    return hashlib.sha256("\n".join((*hashes, prompt_hash)).encode()).hexdigest()


def _trained_quantization(sft_config: dict) -> str | None:
    """How training loaded the base model; None for a merged folder, which holds full weights."""
    return None if "merged" in sft_config else quantization_of(sft_config.get("training") or {})


def quantization_for(options: dict, sft_config: dict) -> str | None:
    """How inference loads the base model: by `options` (see `quantization_of`), if they are "auto" as in
    training, where that can be."""
    typed = quantization_of(options)
    is_auto = typed is None and options.get("quantization", "auto") == "auto"
    return _trained_quantization(sft_config) if is_auto and find_spec("bitsandbytes") else typed


def log_quantization(chosen: str | None, sft_config: dict) -> None:
    as_trained = _trained_quantization(sft_config)
    if as_trained is None:
        return
    if chosen == as_trained:
        log(f"info: the base model is in {chosen}, as in training (--quantization none: its full weights)")
    else:
        log(
            f"warning: trained with the base model in {as_trained}, used with it in {chosen or 'full'}: its loss is "
            "not the one that training reported (--quantization auto takes the same, where bitsandbytes is)"
        )


# ------------------------------------------------------------------------------- other tools' adapters


def _read_foreign_folder(folder: Path, prompt_from: str | Path, verify: bool) -> tuple[Path, dict, dict]:
    """As read_adapter_folder, of an adapter that another tool saved, with the prompt of `prompt_from`."""
    ours, sft_config, our_config = read_named_folder("--prompt_from", prompt_from, verify=verify)
    _check_adapter_files(folder)
    adapter_config = read_json_object(folder / "adapter_config.json")
    if adapter_config.get("peft_type") != "LORA":
        raise InputError(f"{folder}: not a LoRA adapter", "merge it with the tool that wrote it")
    if "merged" in sft_config:
        problem = f"--prompt_from {ours}: a merged model"
        raise InputError(problem, "pass the adapter folder it was merged from")
    theirs = adapter_config.get("base_model_name_or_path")
    if _same_model(theirs, our_config["base_model_name_or_path"]):
        adapter_config = our_config
    else:
        adapter_config["other_base"] = str(theirs)
    prompt_hash = sft_config["sha256"]["folder"]
    sft_config["sha256"]["adapter"] = sha256(folder / "adapter_model.safetensors")
    sft_config["sha256"]["folder"] = _folder_hash(folder, prompt_hash)
    sft_config["prompt_from"] = f"{ours.name} {prompt_hash[:12]}"
    return folder, sft_config, adapter_config


def _same_model(one, other: str) -> bool:
    """Whether two names are of the same model: equal, or the same folder, as seen from here or from the
    repository."""
    if not isinstance(one, str) or not one:
        return False
    return one == other or (ROOT / other).resolve() in (Path(one).resolve(), (ROOT / one).resolve())


def log_origin(folder: Path, sft_config: dict, prompt_from: str | Path | None) -> None:
    """One line where a folder is not, or not wholly, what training wrote."""
    if not on_main_process():
        return
    if prompt_from is not None:
        log(
            f"info: {folder} with the prompt and tokenizer of {prompt_from}; another tool's files: not verified"
        )
    elif "base_config" not in sft_config or not (folder / "SHA256SUMS").is_file():
        log(f"info: {folder} was written by an older version: not all that decides its summaries is verified")
