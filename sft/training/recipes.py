"""Where a run's values come from if none were given: a preset, the configuration of an earlier run, the
adapter that it starts from. Needs no torch."""

import contextlib
import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path

from sft.cli import InputError, log, on_main_process, safe_id
from sft.files import sha256
from sft.model.folder import read_adapter_folder
from sft.option_fields import check_config, default_of, given_names, parse_options
from sft.options import BUNDLED_VALIDATION_FILE, DEFAULT_MAX_LENGTH, TrainConfig

FROM_DATA = 0  # as max_length: what 95 % of the training rows need, see set_up.typical_length
PRESETS = {
    "documents": {
        "num_epochs": 2,
        "learning_rate": 2e-4,
        "target_modules": ["q_proj", "v_proj"],
        "max_length": DEFAULT_MAX_LENGTH,
    },
    "thorough": {
        "num_epochs": 2,
        "learning_rate": 5e-4,
        "target_modules": ["all-linear"],
        "max_length": FROM_DATA,
        "part_rows": True,
    },
    "quick": {
        "num_epochs": 1,
        "learning_rate": 1e-3,
        "target_modules": ["q_proj", "v_proj"],
        "max_length": DEFAULT_MAX_LENGTH,
    },
}
# Never taken from an earlier run
_OF_THIS_RUN = {"output_dir", "resume", "overwrite", "dry_run", "config"}
# One that is given leaves no room for an earlier run's others
_EXCLUSIVE = ({"val_csv", "val_fraction"}, {"quantization", "use_8bit", "use_4bit"})
# What an adapter to start from has decided
_OF_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "instruction",
    "sentence_numbering",
    "thinking",
)


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with the values of --preset, --config and --init_adapter where none were given.
    Raises InputError."""
    # From Python a path may be a Path, which JSON does not know
    paths = {name: str(value) for name, value in vars(config).items() if isinstance(value, Path)}
    config = replace(config, **paths)
    given = given_names(config)
    # Read once: it may be a pipe
    options, recorded = _read(config.config) if config.config else ({}, {})
    earlier = check_options(config.config, options) if options else {}
    values = PRESETS[earlier.get("preset", config.preset)] | earlier
    if "preset" in given:
        values = earlier | PRESETS[config.preset]
    for names in _EXCLUSIVE:
        given |= names if names & given else set()
    # The bundled validation notes say nothing about training rows that are given
    if "train_csv" in given and values.get("val_csv") == BUNDLED_VALIDATION_FILE:
        del values["val_csv"]
    config = replace(config, **{name: value for name, value in values.items() if name not in given})
    if config.config:
        log_other_files(config, recorded)
    return take_from_adapter(config, given) if config.init_adapter else config


def _read(file: str) -> tuple[dict, dict]:
    """(options, SHA-256s) of a YAML file of options, or of sft_config.json. Raises InputError."""
    from yaml import YAMLError

    content = {"training": None}
    with contextlib.suppress(OSError, ValueError, YAMLError, RecursionError):
        text = Path(file).read_text(encoding="utf-8")
        content = json.loads(text) if file.endswith(".json") else _load_yaml(text)
    parts = (
        [content.get("training", content), content.get("sha256", {})] if isinstance(content, dict) else [None]
    )
    if not all(isinstance(part, dict) for part in parts):
        fix = "write lines such as num_epochs: 3 (.yaml), each option once, or pass an adapter's sft_config.json"
        raise InputError(f"--config {file}: not a readable file of options", fix)
    return tuple(parts)


def _load_yaml(text: str):
    """Numbers and dates stay as they are written: for YAML 010 is 8, and 1:30 is 90. Raises ValueError for a
    name that is there twice, of which PyYAML would forget the first."""
    import yaml

    loader = yaml.SafeLoader(text)
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in kinds if tag.endswith(("bool", "null"))]
        for first, kinds in loader.yaml_implicit_resolvers.items()
    }
    node = loader.get_single_node()
    names = [str(name.value) for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    if node is None or len(set(names)) < len(names):
        raise ValueError
    return loader.construct_document(node)


def check_options(file: str | None, options: dict) -> dict:
    """The options of a file, checked as if they had been typed. Raises InputError."""
    typed = []
    kinds = {field.name: field.type for field in fields(TrainConfig)}
    named = {name: value for name, value in options.items() if name not in _OF_THIS_RUN}
    for name, value in named.items():
        values = value if isinstance(value, list) and "list" in str(kinds.get(name)) else [value]
        if any(isinstance(one, list | dict) for one in values) and name in kinds:
            fix = "write one word or number; for several files or layers: [a, b]"
            raise InputError(f"--config {file}: {name}: not a value that this option takes", fix)
        # YAML reads on and off as truth values
        if isinstance(value, bool) and kinds.get(name) is not bool:
            value = "on" if value else "off"
        if isinstance(value, list):
            typed += [f"--{name}", *map(str, value)]
        elif value is True:
            typed.append(f"--{name}")
        elif value is not None and value is not False:
            typed.append(f"--{name}={value}")
    try:
        parsed = parse_options(TrainConfig, "", typed)
    except InputError as error:
        raise InputError(f"--config {file}: {error.problem}", error.fix) from None
    return {name: getattr(parsed, name) for name in named}


def log_other_files(config: TrainConfig, recorded: dict) -> None:
    """Says which of the files are not those of which the earlier run `recorded` the SHA-256."""
    for name, files in (("train_csv", config.train_files), ("val_csv", [config.val_file])):
        with contextlib.suppress(OSError, TypeError):  # missing ones are refused where they are read
            if recorded.get(name) not in (None, sha256_of_files(files)) and on_main_process():
                log(
                    f"warning: {name} is not the file of {config.config} (SHA-256 differs): this is another run"
                )


def sha256_of_files(files: list) -> str:
    """The SHA-256 of one file; of several, that of theirs."""
    first, *more = [sha256(Path(file)) for file in files]
    return hashlib.sha256("".join([first, *more]).encode()).hexdigest() if more else first


def take_from_adapter(config: TrainConfig, given: set[str]) -> TrainConfig:
    """The configuration with the LoRA shape and the prompt of the adapter to start from, whose folder is
    verified. Raises InputError if another value was given."""
    folder, parent, _ = read_adapter_folder(config.init_adapter)
    if "merged" in parent:
        raise InputError(f"--init_adapter {folder}: a merged model", "pass the adapter it was merged from")
    defaults = {field.name: default_of(field) for field in fields(config)}
    own = {name: parent["training"].get(name, defaults[name]) for name in _OF_ADAPTER}
    for name, value in own.items():
        if name in given and getattr(config, name) != value:
            problem = f"--{name}: the adapter in {folder} was trained with {safe_id(str(value))}"
            raise InputError(problem, f"leave out --{name}, or --init_adapter")
    check_config(TrainConfig(**own))
    return replace(config, **own)
