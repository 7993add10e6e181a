"""What an option is: a dataclass field with help text and bounds; the parser of such fields, and the check
of values from Python."""

import argparse
import dataclasses
import os
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path

from sft.cli import InputError, plural, preview_list, safe_id

# The groups of --help, in this order
DATA = "data"
NOTES = "notes"
MODEL = "model"
TRAINING = "training"
LORA = "LoRA"
GENERATION = "generation"
MACHINE = "machine"
RUN = "run"
_GROUPS = (DATA, NOTES, MODEL, TRAINING, LORA, GENERATION, MACHINE, RUN)


def option(default, help: str, *, group: str, may_change: bool = False, **argparse_arguments):
    """A dataclass field that is also a command-line option.

    `may_change`: --resume accepts another value. Either the steps already done do not depend on it, or
    something else in the fingerprint stands for it: the SHA-256 of data and base weights, the dtype that is
    used in the end. An option that older runs did not have counts as having had its default."""
    metadata = {"help": help, "group": group, "may_change": may_change, "argparse": argparse_arguments}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def number(kind: type, low: float, high: float = float("inf"), *, above_low: bool = False) -> Callable:
    """An argparse type: a number of `kind` from `low` to `high`; `above_low` excludes `low` itself."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            name = "an integer" if kind is int else "a number"
            # It may be a note in the wrong place
            raise argparse.ArgumentTypeError(f"{safe_id(text)} is not {name}") from None
        too_low = value <= low if above_low else value < low
        # "not value <= high" is true for NaN too
        if abs(value) == float("inf") or too_low or not value <= high:
            bounds = f"{'above' if above_low else 'at least'} {low}"
            if high != float("inf"):
                bounds = f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


def kinds_of(hint) -> list:
    """The types of a field but None: [str] for `str | None`; the parser takes the last."""
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [kind for kind in hints if kind is not types.NoneType]


def check_config(config) -> None:
    """Raises InputError unless every value of a configuration made in Python is one that its option takes."""
    hints = typing.get_type_hints(type(config))
    fields = {field.name: field for field in dataclasses.fields(config)}
    unknown = sorted(set(vars(config)) - set(fields))
    if unknown:
        raise InputError(f"unknown options: {preview_list(unknown)}", "check the spelling")
    for name, field in fields.items():
        value = getattr(config, name)
        kinds = tuple(typing.get_origin(kind) or kind for kind in kinds_of(hints[name]))
        # True is an int for Python; 1 is a float for everybody
        is_path = str in kinds and isinstance(value, Path)
        numeric = float in kinds and isinstance(value, int) and not isinstance(value, bool)
        is_right = (
            is_path
            or numeric
            or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)))
        )
        if value is None and type(None) in typing.get_args(hints[name]):
            continue
        if isinstance(value, list) and not (value and all(isinstance(item, str) for item in value)):
            is_right = False
        if not is_right:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{name} is of type {type(value).__name__}", f"pass a value of type {expected}")
        arguments = field.metadata["argparse"]
        if value not in arguments.get("choices", [value]):
            choices = ", ".join(arguments["choices"])
            raise InputError(f"{name} is none of its choices", f"choose one of: {choices}")
        if "type" in arguments:
            try:
                arguments["type"](str(value))
            except argparse.ArgumentTypeError as error:
                raise InputError(f"{name}: {error}", "choose another value") from None


# The groups of --help, in this order


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fix = f"run python {self.prog} --help"
        choice = re.search(r"invalid choice: '(.*)' \(choose", message, re.DOTALL)
        if choice:
            message = message.replace(f"'{choice[1]}'", safe_id(choice[1]), 1)
        if message.endswith("expected one argument"):
            name = message.split()[1].rstrip(":")
            fix = f'pass a value; one that starts with "-" needs "=": {name}=-VALUE'
        raise InputError(message, fix)


class _Help(argparse.HelpFormatter):
    """Shows every default, lists as they are typed."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action):
        default = action.default
        if default is argparse.SUPPRESS or "(default: " in action.help:
            return action.help
        if default is None:
            shown = "none"
        elif default is False:
            shown = "off"
        elif isinstance(default, list):
            shown = " ".join(default)
        else:
            shown = "%(default)s"
        return f"{action.help} (default: {shown})"


def _make_parser(config_class, description: str) -> argparse.ArgumentParser:
    parser = _Parser(description=description, formatter_class=_Help, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    groups = {}
    for field in sorted(
        dataclasses.fields(config_class), key=lambda field: _GROUPS.index(field.metadata["group"])
    ):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = kinds_of(hints[field.name])[-1]
        arguments = dict(field.metadata["argparse"])
        if kind is bool:
            arguments["action"] = "store_true"
        elif typing.get_origin(kind) is list:
            arguments.setdefault("nargs", "+")
        else:
            arguments.setdefault("type", kind)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        help = field.metadata["help"].replace("%", "%%")
        groups[title].add_argument(f"--{field.name}", default=default, help=help, **arguments)
    return parser


def parse_options(config_class, description: str, argv: list[str] | None = None):
    """The command line as a `config_class` (a dataclass of `option` fields). Raises InputError for a bad
    option."""
    parser = _make_parser(config_class, description)
    values, unknown = parser.parse_known_args(argv)
    names = [word.partition("=")[0] for word in unknown if re.fullmatch(r"--\w+(=.*)?", word, re.DOTALL)]
    if names:
        raise InputError(f"unrecognized arguments: {preview_list(names)}", f"run python {parser.prog} --help")
    if unknown:  # may be patients' text: not shown
        problem = f"unexpected arguments: {plural(len(unknown), 'word')} outside any option"
        raise InputError(problem, "put quotes around a text with spaces")
    for name, value in list(vars(values).items()):
        # Names are separated by spaces, and often by commas
        if name == "target_modules":
            value = [word for text in value for word in text.split(",") if word] or ""
            setattr(values, name, value)
        # An empty note has a message of its own
        words = value if isinstance(value, list) else [value]
        if "" in [word.strip() for word in words if isinstance(word, str)] and name != "clinical_note":
            raise InputError(f"--{name} is empty", "pass a value, or leave it out")
        # Shells leave ~ alone in --name=~/folder and within quotes
        if name not in ("clinical_note", "instruction"):
            expanded = [os.path.expanduser(word) if isinstance(word, str) else word for word in words]
            setattr(values, name, expanded if isinstance(value, list) else expanded[0])
    return config_class(**vars(values))
