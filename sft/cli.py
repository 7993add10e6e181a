"""What a command-line script needs: errors and exit codes, signals, logging, progress, several processes.

torch is not imported here, so that `--help` and input errors are instant."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

# ------------------------------------------------------------------------------- errors


class _Explained(Exception):
    """An error with its fix. `problem` says what is wrong and where (file, row, id; never note text), `fix`
    what to do."""

    def __init__(self, problem: str, fix: str = ""):
        super().__init__(f"{problem}\n{fix}" if fix else problem)
        self.problem = problem
        self.fix = fix


class InputError(_Explained, ValueError):
    """Something the user can fix: a bad option, file, row or folder. Scripts print it and exit with status
    2."""


class RunError(_Explained, RuntimeError):
    """A run that cannot continue although its input is right. Scripts print it and exit with status 1."""


class Stopped(Exception):
    """Work that a signal ended cleanly. Scripts print `message` and exit with status 128 + `signal`, as
    shells do."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal
        self.message = message


_NO_MEMORY = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # CPU on Linux and macOS
    "Cannot allocate memory",  # of a file that is mapped
    "failed to map segment",  # of a library
    "can't start new thread",
    "thread pool has not been initialized",  # the tokenizers library's
    "not enough memory",  # CPU on Windows
    "CUDNN_STATUS_NOT_SUPPORTED",  # cuDNN's answer to a workspace that does not fit
    "could not create a primitive",  # oneDNN's
)
# Libraries raise types of their own for a full disk: safetensors, torch, the tokenizer
_NO_SPACE = ("No space left", "os error 28", "Disk quota", "os error 122")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, Python or the operating system has no memory left, in the words of torch and its
    libraries."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    has_words = any(words in str(error) for words in _NO_MEMORY)
    # The tokenizers library's own failures are no Exception
    is_failure = isinstance(error, RuntimeError | ImportError) or type(error).__name__ == "PanicException"
    return is_named or (is_failure and has_words)


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk or quota is full."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error) for words in _NO_SPACE)


def missing_package(error: BaseException | None) -> str:
    """The package whose absence an import error comes from, which transformers wraps; "" for other errors."""
    while isinstance(error, ImportError):
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return str(error).strip().partition("\n")[0][:200]


@contextlib.contextmanager
def as_input_error(problem: str, fix: str) -> Iterator[None]:
    """Turns whatever a library raises on files that it cannot use into one InputError, unless it is explained
    already, a full disk or lack of memory. Only around calls that see no note: a message may quote its
    input."""
    try:
        yield
    except BaseException as error:
        # The tokenizers library's own failures are no Exception
        is_failure = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        is_explained = isinstance(error, _Explained | Stopped) or missing_package(error)
        if not is_failure or is_explained or is_out_of_memory(error) or is_disk_full(error):
            raise
        raise InputError(f"{problem}: {type(error).__name__}: {first_line(error)}", fix) from None


def _explain(error: BaseException) -> _Explained | None:
    """The error and its fix in words; None for one that is neither the user's nor the machine's."""
    if isinstance(error, _Explained):
        return error
    if missing := missing_package(error):
        kind = "serve" if missing in ("fastapi", "uvicorn") else "training"
        fix = f"run: pip install -r requirements_{kind}.txt (with the python that runs this script)"
        return InputError(f"the Python package {missing} is not installed", fix)
    if is_out_of_memory(error):
        return RunError("out of memory", "use a smaller batch size or model, or close other programs")
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if "temporary directory" in str(error):
        return InputError("no folder for temporary files can be written to", "set TMPDIR to one that can")
    if error.filename is None and error.errno not in _OF_FILES:
        return None
    return InputError(f"{error.strerror}: {error.filename or 'the output folder'}", _FIX_FILES)


_OF_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)
_FIX_FILES = (
    "check the path, its permissions, the free space and quota, and the limit on file sizes (ulimit -f)"
)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main function and exits.

    Exit status: 0 done, 1 failed (with a traceback where the error is not ours), 2 the user can fix it, 128 +
    N stopped by signal N (130 Ctrl-C, 143 SIGTERM), 141 the reader of our output closed it."""
    os.umask(0o077)  # what a script writes is for the user alone
    open_standard_streams()
    try:
        status = _status_of(main)
    except BaseException:  # the tokenizers library's own failures are no Exception
        traceback.print_exc()
        status = 1
    # One of several: no destructors, which may wait for each other's locks, or for a process that has died
    if os.environ.get("WORLD_SIZE", "1") != "1":
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _status_of(main: Callable[[], None]) -> int:
    """The exit status of `main()`, whose errors become messages."""
    try:
        main()
        sys.stdout.flush()
        return 0
    except SystemExit as leaving:
        return leaving.code or 0
    except Stopped as stopped:
        log(stopped.message)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        log("interrupted")
        return 130
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as error:
        explained = _explain(error)
        if explained is None:
            raise
        log(f"error: {explained.problem}")
        if explained.fix:
            log(f"fix:   {explained.fix}")
        return 2 if isinstance(explained, InputError) else 1


# ------------------------------------------------------------------------------- streams and signals


def open_standard_streams() -> None:
    """Opens standard streams that are closed, as cron and daemons leave them, and lets them take any text."""
    # Else the next file to be opened would become standard output
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    with contextlib.suppress(AttributeError):  # streams that a test put there
        sys.stdin.reconfigure(errors="surrogateescape")
        sys.stdout.reconfigure(errors="backslashreplace")


def log(message: str = "", is_colored: bool = False) -> None:
    """Prints to stderr; stdout is for results. A terminal that has gone stops nothing. `is_colored`: yellow,
    on a terminal that shows colors, unless NO_COLOR is set."""
    text = visible(message, sys.stderr)
    has_colors = os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    if is_colored and has_colors and is_terminal(sys.stderr):
        text = f"\x1b[33m{text}\x1b[0m"
    # RuntimeError: a signal handler's message in the middle of another print
    with contextlib.suppress(OSError, RuntimeError):
        print(text, file=sys.stderr, flush=True)


def is_terminal(stream) -> bool:
    return stream is not None and stream.isatty()


def visible(text: str, stream) -> str:
    """Text as it may be printed: on a terminal without the control characters, which can change its state,
    hide or fake text, and without those that turn the direction of writing."""
    if not is_terminal(stream):
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


@contextlib.contextmanager
def noted_signals(then: str = "stopping cleanly") -> Iterator[list[int]]:
    """Inside, the first SIGTERM, SIGHUP or Ctrl-C is only noted in the yielded list, so that the work can end
    in good order (`then` says how); a second one stops at once. Ignored signals (nohup) stay ignored."""
    noted = []
    last_heard = 0.0

    def handler(number, frame):
        nonlocal last_heard
        now = time.monotonic()
        # Launchers forward the signal that the terminal has sent already; shell and kernel both send SIGHUP
        is_echo = "WORLD_SIZE" in os.environ and now - last_heard <= 1
        last_heard = now
        noted.append(number)
        if len(noted) == 1:
            how = "press Ctrl-C again (or send SIGTERM) to stop immediately"
            log(f"\n{signal.Signals(number).name} received: {then}; {how}")
        elif number == signal.SIGINT and not is_echo:
            raise KeyboardInterrupt
        elif number == signal.SIGTERM and not is_echo:
            sys.exit(128 + number)

    # Python allows handlers in the main thread only; Windows has no SIGHUP
    in_main_thread = threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGINT", "SIGHUP") if in_main_thread else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, action in before.items():
        if action != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield noted
    finally:
        for number, action in before.items():
            signal.signal(number, action or signal.SIG_DFL)


# ------------------------------------------------------------------------------- processes


def processes() -> tuple[int, int]:
    """(rank of this process, number of processes), as torchrun and accelerate set them in the environment."""
    try:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        fix = "unset them, or start with torchrun"
        raise InputError("RANK or WORLD_SIZE in the environment is not a number", fix) from None


def check_processes() -> None:
    """Raises InputError if the environment makes this one of several processes that no launcher has started:
    it would do its share, say nothing, and wait for the others."""
    rank, n_processes = processes()
    is_launched = n_processes == 1 or "MASTER_ADDR" in os.environ
    if not (0 <= rank < n_processes and is_launched):
        problem = f"RANK={rank} and WORLD_SIZE={n_processes} in the environment, but no launcher started them"
        raise InputError(problem, "unset RANK and WORLD_SIZE, or start with torchrun")


def on_main_process() -> bool:
    """Whether this is the process that logs and saves, also before torch's process group exists."""
    return processes()[0] == 0


# ------------------------------------------------------------------------------- progress


class Progress:
    """How far a job is, its speed and the time left, on the main process: a bar on a terminal, else a line
    every `interval` seconds, which ends with `scope`, as in "1.0 min left in this epoch"."""

    def __init__(self, total: int, unit: str, *, done: int = 0, scope: str = "", interval: float = 30):
        from tqdm import tqdm

        self.total = total
        self.unit = unit
        self.done = done
        self.scope = scope
        self.interval = interval if on_main_process() else float("inf")
        self.n_before = done
        self.started = time.monotonic()
        self.last_line = self.started
        # None: only where stderr is a terminal
        disable = None if on_main_process() else True
        self.bar = tqdm(total=total, initial=done, unit=unit, file=sys.stderr, leave=False, disable=disable)

    def advance(self, status: str = "") -> None:
        """One more is done. `status` replaces the rate, as in "loss 2.162, 487 tokens/s"."""
        self.done += 1
        if status:
            self.bar.set_postfix_str(status, refresh=False)
        with contextlib.suppress(OSError):  # the terminal has gone; the work continues
            self.bar.update()
        now = time.monotonic()
        if self.bar.disable and now - self.last_line > self.interval:
            self.last_line = now
            rate = (self.done - self.n_before) / (now - self.started)
            minutes = (self.total - self.done) / rate / 60
            status = status or f"{rate:.2f} {self.unit}s/s"
            log(f"  {self.unit} {self.done:,}/{self.total:,}, {status}, {minutes:,.1f} min left{self.scope}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()


# ------------------------------------------------------------------------------- words


def safe_id(identifier: str) -> str:
    """An id fit for a log. One that looks like text (a shifted column, say) may be patients' text and is not
    shown."""
    return identifier if re.fullmatch(r"[\w.:/#-]{1,64}", identifier) else "(not shown)"


def preview_list(items: Iterable[str], limit: int = 5) -> str:
    """ "a, b, c and 4 more"."""
    items = list(items)
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def plural(n: int, word: str) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"
