"""What an option is: a dataclass field with help text and bounds, which checks values from Python too."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path

from sft.cli import InputError, preview_list


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
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
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
