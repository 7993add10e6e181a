"""What an option is: a dataclass field with help text and bounds; the parser of such fields, and the check
of values from Python."""

import argparse
import dataclasses
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

from sft.cli import InputError, check_processes, log, on_main_process, plural, preview_list, safe_id

# The groups of --help, in this order
GROUPS = ("data", "notes", "model", "training", "LoRA", "generation", "machine", "run")
DATA, NOTES, MODEL, TRAINING, LORA, GENERATION, MACHINE, RUN = GROUPS

# The metavar of an option says what it takes: NAME a column, TEXT and MAP any text, else a path or a model
NAME = "NAME"
TEXT = "TEXT"
MAP = "A=B,..."


def option(default, help: str, *, group: str, needs: str = "", **argparse_arguments):
    """A dataclass field that is also a command-line option. `needs`: another option, without which this one
    has no effect, as "a", or one of several, as "a or --b"."""
    metadata = {"help": help, "group": group, "needs": needs, "argparse": argparse_arguments}
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
        # NaN is in no range
        is_right = low <= value <= high and abs(value) != float("inf") and not (above_low and value == low)
        if not is_right:
            bounds = f"{'above' if above_low else 'at least'} {low}"
            if high != float("inf"):
                bounds = f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


def _kinds_of(hint) -> list:
    """The types of a field but None: [str] for `str | None`; the parser takes the last."""
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [kind for kind in hints if kind is not types.NoneType]


def default_of(field: dataclasses.Field):
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def given_names(config) -> set[str]:
    """The options that were typed, or that have another value than their default."""
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != default_of(f)}
    return changed | config.given


# ------------------------------------------------------------------------------- checks


def check_config(config) -> None:
    """Raises InputError unless every value of a configuration made in Python is one that its option takes."""
    hints = typing.get_type_hints(type(config))
    fields = {field.name: field for field in dataclasses.fields(config)}
    # Beside the options: what was typed, and what a repeated run recorded
    unknown = sorted(set(vars(config)) - set(fields) - {"given", "recorded"})
    if unknown:
        raise InputError(f"unknown options: {preview_list(map(safe_id, unknown))}", "check the spelling")
    for name, field in fields.items():
        check_value(name, getattr(config, name), hints[name], field.metadata["argparse"])


def check_value(name: str, value, hint, arguments: dict) -> None:
    """Raises InputError unless `value` is of the type `hint` and what `arguments` allow."""
    if value is None and type(None) in typing.get_args(hint):
        return
    kinds = tuple(typing.get_origin(kind) or kind for kind in _kinds_of(hint))
    # True is an int for Python; 1 is a float for everybody; a Path is a str here
    accepted = kinds + (int,) * (float in kinds) + (Path,) * (str in kinds)
    is_right = isinstance(value, accepted) and (bool in kinds or not isinstance(value, bool))
    is_list = isinstance(value, list)
    if not is_right or (is_list and not all(isinstance(v, str) for v in value)):
        expected = " or ".join("list of str" if kind is list else kind.__name__ for kind in kinds)
        found = "list of other things" if is_list else type(value).__name__
        raise InputError(f"{name} is of type {found}", f"pass a value of type {expected}")
    choices = arguments.get("choices", ())
    if choices and not set(value if is_list else [value]) <= set(choices):
        raise InputError(f"{name} is none of its choices", f"choose one of: {', '.join(choices)}")
    if "type" in arguments:
        try:
            arguments["type"](str(value))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{name}: {error}", "choose another value") from None
    if str in kinds or is_list:
        check_words(name, value, arguments)


def check_words(name: str, value: str | Path | list[str], arguments: dict) -> None:
    """Raises InputError for an empty value, for several names in one word, and for what looks like a text
    where a path or a model is expected: it may be a note, so it is in no message."""
    words = [str(word) for word in value] if isinstance(value, list) else [str(value)]
    # An empty note has a message of its own, and may be in any encoding
    is_note = name.endswith("clinical_note")
    if not all(word.strip() for word in words or [""]) and not is_note:
        raise InputError(f"{name} is empty", "pass a value, or leave it out")
    if isinstance(value, list) and any("," in word and not os.path.exists(word) for word in words):
        problem = f"{name}: names are separated by spaces, not by commas"
        raise InputError(problem, 'write: a b (in Python: ["a", "b"])')
    takes_any_text = arguments.get("metavar") in (NAME, TEXT, MAP) or "choices" in arguments
    # Only files have such names
    if takes_any_text and not is_note and re.search(r"[\ud800-\udfff]", "".join(words)):
        raise InputError(f"{name} is not UTF-8", "type it in a UTF-8 terminal")
    if not takes_any_text and not all(map(_is_plain, words)):
        problem = f"{name}: no such file, folder or model (the words are not shown: they may be a note)"
        fix = "check the option; a new name with spaces needs its folder before it: ./NAME"
        raise InputError(problem, fix)


def _is_plain(path: str) -> bool:
    """Whether a path or a model's name may be shown: it is there, a folder that it begins with is, or it is
    no text."""
    if re.fullmatch(r"[\w.:/\\#~+=@%-]{1,255}", path) or path.startswith("./") or os.path.exists(path):
        return True
    # No path is longer
    folders = map(str, Path(path[:4096]).parents)
    return any(os.path.isdir(folder) for folder in folders if folder not in (".", "/"))


def _check_needs(config) -> None:
    """Raises InputError for an option without the one it needs. A setting of the model or the machine may
    stay in a command that has no use for it: that is said."""
    for field in dataclasses.fields(config):
        needed = field.metadata["needs"]
        is_met = not needed or any(getattr(config, name) for name in needed.split(" or --"))
        if is_met or getattr(config, field.name) == default_of(field):
            continue
        problem = f"--{field.name} has no effect without --{needed}"
        if field.metadata["group"] not in (GENERATION, MACHINE):
            raise InputError(problem, f"add --{needed}, or leave out --{field.name}")
        if on_main_process():
            log(f"info: {problem}")


# ------------------------------------------------------------------------------- the parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fix = f"run python {self.prog} --help"
        # What was typed may be a note; argparse shows it as Python writes a string
        quoted = re.compile(r"""(['"])(.*)\1(?= \(choose|$)""", re.DOTALL)
        message = quoted.sub(lambda typed: safe_id(typed[2]), message, count=1)
        if message.endswith("expected one argument"):
            name = message.split()[1].rstrip(":")
            fix = f'pass a value; one that starts with "-" needs "=": {name}=-VALUE'
        raise InputError(message, fix)


def _help_of(field: dataclasses.Field) -> str:
    """The help text with its default, lists as they are typed."""
    help = field.metadata["help"]
    if "(default: " not in help:
        default = default_of(field)
        shown = " ".join(default) if isinstance(default, list) else default
        help += f" (default: {'none' if shown is None else 'off' if shown is False else shown})"
    return help.replace("%", "%%")


def _make_parser(config_class, description: str) -> argparse.ArgumentParser:
    formatter = functools.partial(argparse.HelpFormatter, max_help_position=32, width=110)
    parser = _Parser(description=description, formatter_class=formatter, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    groups = {}
    for field in sorted(dataclasses.fields(config_class), key=lambda f: GROUPS.index(f.metadata["group"])):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = _kinds_of(hints[field.name])[-1]
        arguments = {"default": default_of(field), "help": _help_of(field), **field.metadata["argparse"]}
        if kind is bool:
            arguments["action"] = "store_true"
        elif typing.get_origin(kind) is list:
            arguments.setdefault("nargs", "+")
        else:
            arguments.setdefault("type", kind)
        groups[title].add_argument(f"--{field.name}", **arguments)
    return parser


def parse_options(config_class, description: str, argv: list[str] | None = None):
    """The command line as a `config_class` (a dataclass of `option` fields), `given`: what was typed. Raises
    InputError for a bad option."""
    check_processes()
    parser = _make_parser(config_class, description)
    values, unknown = parser.parse_known_args(argv)
    names = [word.partition("=")[0] for word in unknown if re.fullmatch(r"--\w+(=.*)?", word, re.DOTALL)]
    if names:
        raise InputError(f"unrecognized arguments: {preview_list(names)}", f"run python {parser.prog} --help")
    if unknown:  # may be patients' text: not shown
        problem = f"unexpected arguments: {plural(len(unknown), 'word')} outside any option"
        raise InputError(problem, "put quotes around a text with spaces")
    config = config_class(**vars(values))
    words = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
    config.given = {word.removeprefix("--") for word in words if word.startswith("--")}
    for field in dataclasses.fields(config):
        arguments = field.metadata["argparse"]
        value = getattr(config, field.name)
        if not isinstance(value, str | list):
            continue
        # argparse would forget the first files
        if isinstance(value, list) and words.count(f"--{field.name}") > 1:
            problem = f"--{field.name} is given {words.count(f'--{field.name}')} times"
            raise InputError(problem, f"give it once, with all values: --{field.name} A B")
        # Shells leave ~ alone in --name=~/folder and within quotes
        if arguments.get("metavar") != TEXT:
            expand = os.path.expanduser
            value = expand(value) if isinstance(value, str) else list(map(expand, value))
            setattr(config, field.name, value)
        check_words(f"--{field.name}", value, arguments)
    _check_needs(config)
    return config
