"""What every script here shares: options declared once, errors a user can mend, files that appear whole or not at all."""

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent  # the repository: bundled model and adapters' base paths are found from here


class InputError(ValueError):
    """Something the user can mend: a bad option, file, row or folder. Scripts print it in a line or two and exit with status 2.

    `problem` says what is wrong and where (file, row, id; never note text), `mend` what to do about it.
    """

    def __init__(self, problem: str, mend: str = ""):
        super().__init__(f"{problem}\n{mend}" if mend else problem)
        self.problem, self.mend = problem, mend


class RunError(RuntimeError):
    """A run that cannot go on though its input is right. Scripts print it in a line or two and exit with status 1."""

    def __init__(self, problem: str, mend: str = ""):
        super().__init__(f"{problem}\n{mend}" if mend else problem)
        self.problem, self.mend = problem, mend


class Stopped(Exception):
    """Work that a signal ended in good order. Scripts print `message` and exit with status 128 + `signal`, as shells do."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal, self.message = signal, message


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Inside, the first SIGTERM, SIGHUP or Ctrl-C is only noted in the yielded list, for the work to end in good order;
    the second stops at once."""
    noted, heard_at = [], 0.0

    def handler(number, frame):
        nonlocal heard_at
        now = time.monotonic()
        noted.append(number)
        if len(noted) == 1:
            log(f"\n{signal.Signals(number).name}: finishing the step under way, then saving; a second one stops at once")
        elif number == signal.SIGINT and ("WORLD_SIZE" not in os.environ or now - heard_at > 1):
            raise KeyboardInterrupt
        elif number == signal.SIGTERM and ("WORLD_SIZE" not in os.environ or now - heard_at > 1):
            sys.exit(128 + number)
        heard_at = now  # launchers hand on the signal that the terminal sent already; shell and kernel both send SIGHUP

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)
    try:
        yield noted
    finally:
        for number in numbers:
            signal.signal(number, before[number] or signal.SIG_DFL)


def log(message: str = "") -> None:
    """Progress and logs go to stderr; stdout is for results. A terminal that is gone stops nothing."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a signal's message in the midst of another
        print(message, file=sys.stderr, flush=True)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main function; exit status 0 done, 1 failed (with a traceback), 2 the user can mend it, 130 interrupted,
    143 terminated."""
    os.umask(0o077)  # what a script writes is for the user alone
    open_standard_streams()
    try:
        main()
        sys.stdout.flush()
    except (InputError, RunError) as error:
        log(f"error: {error.problem}" + (f"\nmend:  {error.mend}" if error.mend else ""))
        sys.exit(2 if isinstance(error, InputError) else 1)
    except Stopped as stopped:
        log(stopped.message)
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        log("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE
    except RuntimeError as error:
        words = "out of memory", "can't allocate memory"  # CUDA's and MPS's, and the CPU's; torch is not imported here
        if type(error).__name__ != "OutOfMemoryError" and not any(word in str(error) for word in words):
            raise
        log("error: the device has too little memory\nmend:  a smaller --batch_size, or --use_4bit")
        sys.exit(1)
    except OSError as error:
        mends = {
            errno.ENOSPC: "free some space, or name a folder on another disk",
            errno.EDQUOT: "free some of your quota, or name a folder on another disk",
            errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
            errno.EACCES: "check who may read and write there",
            errno.EROFS: "name a folder that can be written to",
            errno.EIO: "check the disk",
        }
        if error.errno is None or (error.filename is None and error.errno not in mends):
            raise
        log(f"error: {error.strerror}: {error.filename or 'the output folder'}\nmend:  {mends.get(error.errno, 'check the path')}")
        sys.exit(2)


def open_standard_streams() -> None:
    """Lets each of them be there (cron and daemons close some), and take any text."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # else the next file that is opened would be standard output
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    with contextlib.suppress(AttributeError):  # a test's own streams
        sys.stdin.reconfigure(errors="replace")
        sys.stdout.reconfigure(errors="backslashreplace")


# ------------------------------------------------------------------------------------------------ options


def option(default, help: str, *, group: str = "options", **argparse_arguments):
    """A dataclass field that is a command-line option too, so that each option is declared once."""
    metadata = {"help": help, "group": group, "argparse": argparse_arguments}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        mend = f"see python {self.prog} --help"
        if message.endswith("expected one argument"):
            mend = f"give it a value; one that begins with - goes behind =, as in {message.split()[1].rstrip(':')}=-TEXT"
        raise InputError(message, mend)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=120)

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, argparse.SUPPRESS) else super()._get_help_string(action)


def parse_options(config_class, description: str, argv: list[str] | None = None):
    """The command line as a `config_class` (a dataclass of `option` fields). Raises InputError for a bad option."""
    parser = _Parser(description=description, formatter_class=_Help, allow_abbrev=False)
    hints, groups = typing.get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        title = field.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title) if title not in groups else None)
        kind, arguments = hints[field.name], dict(field.metadata["argparse"])
        if isinstance(kind, types.UnionType):  # `str | None`
            kind = typing.get_args(kind)[0]
        if kind is bool:
            arguments["action"] = "store_true"
        elif typing.get_origin(kind) is list:
            arguments.setdefault("nargs", "+")
        else:
            arguments.setdefault("type", kind)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        group.add_argument(f"--{field.name}", default=default, help=field.metadata["help"].replace("%", "%%"), **arguments)
    values, unknown = parser.parse_known_args(argv)
    names = [word.partition("=")[0] for word in unknown if re.fullmatch(r"--\w+(=.*)?", word, re.DOTALL)]
    if names:
        raise InputError(f"unrecognized arguments: {some(names)}", f"see python {parser.prog} --help")
    if unknown:  # may be patients' text: not shown
        raise InputError(f"{plural(len(unknown), 'word')} on the command line belong to no option", "put quotes around a text with spaces")
    values = vars(values)
    empty = [name for name, value in values.items() if isinstance(value, str) and not value.strip() and name != "clinical_note"]
    if empty:
        raise InputError(f"--{empty[0]} is empty", "give it a value, or leave it out")
    return config_class(**values)


def number(kind: type, low: float, high: float = float("inf"), *, open_low: bool = False) -> Callable:
    """An argparse type: a number of `kind` from `low` (above it if `open_low`) to `high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n integer' if kind is int else ' number'}") from None
        if abs(value) == float("inf") or not (low < value if open_low else low <= value) or not value <= high:
            bounds = f"{'above' if open_low else 'at least'} {low}" + (f" and at most {high}" if high != float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


# ------------------------------------------------------------------------------------------------ files


def private_folder(path: Path) -> Path:
    """Creates `path`, readable by the user alone where it is new: adapters and summaries count as patient data."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        folder.chmod(0o700)
    return path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all: aside, fsync, rename. Readable by the user alone."""
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_new_file(option_name: str, path: str | Path | None, endings: tuple[str, ...] = ()) -> None:
    """Raises InputError unless a new file (or folder) can be made at `path`; nothing that exists is overwritten."""
    if path is None:
        return
    path = Path(path)
    if endings and path.suffix.lower() not in endings:
        raise InputError(f"{option_name} {path}: the ending says no format", f"use {' or '.join(endings)}")
    if not path.parent.is_dir():
        raise InputError(f"{option_name} {path}: no folder {path.parent}", "create it first")
    if path.exists():
        raise InputError(f"{option_name} {path} exists", "name another, or move it away")


def sync_folder(folder: Path, inside: bool = True) -> None:
    """fsync of `folder` and, with `inside`, of every file in it, before a rename makes it count."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    for path in (*(file for file in folder.rglob("*") if inside and file.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS over the files in `folder`, as `sha256sum --check` reads it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    write_whole(folder / "SHA256SUMS", "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files))


def sums_differ(folder: Path) -> str:
    """What in `folder` is not as its SHA256SUMS says; empty if all is."""
    try:
        text = (folder / "SHA256SUMS").read_text(encoding="utf-8")
        lines = text.splitlines() if text.endswith("\n") else [""]
    except (OSError, UnicodeDecodeError):
        return "SHA256SUMS cannot be read"
    listed = {line.partition("  ")[2] for line in lines}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (*listed, "SHA256SUMS") and not path.name.startswith("."):
            return f"{name} is not in SHA256SUMS"
    for line in lines or [""]:
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            return "SHA256SUMS is damaged"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} is damaged"
    return ""


# ------------------------------------------------------------------------------------------------ words


def safe_id(identifier: str) -> str:
    """An id fit for a log. One that looks like text (a shifted column, say) may be patients' text and is not shown."""
    return identifier if re.fullmatch(r"[\w.:/#-]{1,64}", identifier) else "(not shown)"


def some(items: Iterable[str], most: int = 5) -> str:
    """ "a, b, c and 4 more"."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"
