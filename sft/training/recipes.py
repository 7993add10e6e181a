"""Where a run's values come from if none were given: a preset, the configuration of an earlier run, the
adapter that it starts from. Needs no torch."""

import contextlib
import copy
import json
from dataclasses import fields
from pathlib import Path

from sft.cli import InputError, preview_list, safe_id
from sft.data.text import decode_text
from sft.model.folder import read_named_folder
from sft.option_fields import check_config, default_of, given_names, parse_options
from sft.options import BUNDLED_VALIDATION_FILE, DEFAULT_MAX_LENGTH, TrainConfig

FROM_DATA = 0  # as max_length: what 95 % of the training rows need, see set_up.typical_length
PRESETS = {
    "documents": {
        "num_epochs": 2,
        "learning_rate": 2e-4,
        "target_modules": ["q_proj", "v_proj"],
        "max_length": DEFAULT_MAX_LENGTH,
        "part_rows": False,
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
        "part_rows": False,
    },
}
# Never taken from an earlier run
_OF_THIS_RUN = {"output_dir", "resume", "overwrite", "dry_run", "config"}
# One that is given leaves no room for an earlier run's others
_EXCLUSIVE = ({"val_csv", "val_fraction"}, {"quantization", "use_8bit", "use_4bit"})
# What an adapter to start from has decided
_OF_ADAPTER = "lora_r lora_alpha use_rslora target_modules instruction sentence_numbering thinking".split()


def resolve(config: TrainConfig) -> TrainConfig:
    """A copy with the values of --preset, --config and --init_adapter where none were given. Raises
    InputError."""
    config = copy.copy(config)
    # From Python a path may be a Path, which JSON does not know
    vars(config).update({name: str(value) for name, value in vars(config).items() if isinstance(value, Path)})
    config.given = given = given_names(config)
    options, config.recorded = _read(config.config) if config.config else ({}, {})
    earlier = check_options(config.config, options) if options else {}
    values = PRESETS[earlier.get("preset", config.preset)] | earlier
    if "preset" in given:
        values = earlier | PRESETS[config.preset]
    for names in _EXCLUSIVE:
        given |= names if names & given else set()
    # A value beside the adapter's name is meant for it
    fixed = given if "init_adapter" in given else given | earlier.keys()
    # The bundled validation notes say nothing about training rows that are given
    if "train_csv" in given and values.get("val_csv") == BUNDLED_VALIDATION_FILE:
        del values["val_csv"]
    vars(config).update({name: value for name, value in values.items() if name not in given})
    if config.init_adapter:
        vars(config).update(shape_of_adapter(config, fixed))
    return config


def _read(file: str) -> tuple[dict, dict]:
    """(options, SHA-256s) of a YAML file of options, or of sft_config.json. Raises InputError."""
    from yaml import YAMLError

    content = {"training": None}
    try:
        text = decode_text(Path(file))
    except InputError as error:
        raise InputError(f"--config {error.problem}", error.fix) from None
    with contextlib.suppress(ValueError, YAMLError, RecursionError):
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
    unknown = [safe_id(f"--{name}") for name in options if name not in kinds]
    if unknown:
        problem = f"--config {file}: unrecognized arguments: {preview_list(unknown)}"
        raise InputError(problem, "run python stage_a_sft_training.py --help")
    # Without a value an option is not given
    named = {k: value for k, value in options.items() if k not in _OF_THIS_RUN and value is not None}
    for name, value in named.items():
        values = value if isinstance(value, list) and "list" in str(kinds[name]) else [value]
        if any(isinstance(one, list | dict) for one in values):
            fix = "write one word or number; for several files or layers: [a, b]"
            raise InputError(f"--config {file}: {name}: not a value that this option takes", fix)
        # YAML reads on and off as truth values
        if isinstance(value, bool) and kinds[name] is not bool:
            value = "on" if value else "off"
        if isinstance(value, list):
            typed += [f"--{name}", *map(str, value)]
        elif value is True:
            typed.append(f"--{name}")
        elif value is not False:
            typed.append(f"--{name}={value}")
    try:
        parsed = parse_options(TrainConfig, "", typed)
    except InputError as error:
        raise InputError(f"--config {file}: {error.problem}", error.fix) from None
    return {name: getattr(parsed, name) for name in named}


def shape_of_adapter(config: TrainConfig, given: set[str]) -> dict:
    """What the adapter to start from has decided, as options; its folder is verified. Raises InputError if
    another value was given."""
    folder, parent, adapter = read_named_folder("--init_adapter", config.init_adapter)
    if "merged" in parent:
        raise InputError(f"--init_adapter {folder}: a merged model", "pass the adapter it was merged from")
    odd = [name for name in ("use_dora", "rank_pattern", "alpha_pattern") if adapter.get(name)]
    if odd:
        problem = (
            f"--init_adapter {folder}: training does not know its {', '.join(odd)} (adapter_config.json)"
        )
        raise InputError(problem, "leave out --init_adapter")
    # The shape is what inference loads
    shape = {"lora_r": adapter.get("r"), "lora_alpha": adapter.get("lora_alpha")}
    shape["use_rslora"] = adapter.get("use_rslora", False)
    recorded = {"target_modules": adapter.get("target_modules")} | (parent.get("training") or {}) | shape
    defaults = {field.name: default_of(field) for field in fields(config)}
    own = {name: recorded.get(name, defaults[name]) for name in _OF_ADAPTER}
    check_config(TrainConfig(**own))
    for name, value in own.items():
        asked = getattr(config, name)
        is_list = isinstance(value, list)
        if name in given and (set(asked) != set(value) if is_list else asked != value):
            shown = preview_list(map(safe_id, value if is_list else [str(value)]), 20)
            problem = f"--{name}: the adapter in {folder} was trained with {shown}"
            raise InputError(problem, f"leave out --{name}, or --init_adapter")
    return own
