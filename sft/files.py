"""Files and folders that appear whole or not at all, readable by the user alone, and their checksums."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from sft.cli import InputError, is_disk_full, log

# The repository: the bundled model and adapters' base paths start here
ROOT = Path(__file__).resolve().parent.parent

# The version of adapter folders and checkpoints, in their sft_config.json. What a newer version adds has a
# stated default where an older folder is read:
#   1  as written by 18a780b
#   2  training_state.pt: "fingerprint", before "identity"; "skipped_steps", before "skipped_updates"
#   3  SHA256SUMS must be there; sft_config.json: "base_config" (before: not verified), the prompt's
#      "sentence_version" (before: 1), "language" (before: unknown), "writing" with "selector" and "shorthand"
#      (before: free, without these)
FORMAT_VERSION = 3


def check_format_version(folder: Path, sft_config: dict) -> None:
    """Raises InputError for a folder that a newer version of this toolkit wrote."""
    version = sft_config.get("format_version", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        versions = f"(format {version}, known up to {FORMAT_VERSION})"
        problem = f"{folder}: written by a newer version of this toolkit {versions}"
        raise InputError(problem, "update the toolkit, or train again with this version")


def make_private_dir(path: Path) -> Path:
    """Creates `path`, private where it is new: adapters and summaries count as patient data."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    # Some network file systems keep no permissions; training says so (`try_saving`)
    for folder in missing:
        with contextlib.suppress(OSError):
            folder.chmod(0o700)
    return path


def write_atomic(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    """Writes a file that appears whole or not at all, by default for the user alone."""
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode != 0o600:  # mkstemp's
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_new_file(option_name: str, path: str | Path | None, extensions: tuple[str, ...] = ()) -> None:
    """Raises InputError unless a new file (or folder) can be created at `path`."""
    if path is None:
        return
    path = Path(path)
    check_outside_models(option_name, path)
    name = f"{option_name} {path}"
    if extensions and path.suffix.lower() not in extensions:
        raise InputError(f"{name}: unknown file extension", f"use {' or '.join(extensions)}")
    if not path.parent.is_dir():
        raise InputError(f"{name}: there is no folder {path.parent}", "create it first")
    # Also a link that leads nowhere, which a rename would replace
    if os.path.lexists(path):
        raise InputError(f"{name} exists", f"rename or move it, or choose another {option_name}")


def check_outside_models(option_name: str, path: str | Path) -> None:
    """Raises InputError for a place in an adapter's or a merged model's folder: with a file more than its
    SHA256SUMS lists, it would be refused from then on."""
    path = Path(path)
    real = Path(os.path.realpath(path))  # Path.resolve would raise its own error for a link to itself
    for folder in (real, *real.parents):
        if (folder / "SHA256SUMS").is_file() and (folder / "sft_config.json").is_file():
            problem = (
                f"{option_name} {path} lies in the adapter's folder, which new files would make unusable"
            )
            raise InputError(problem, f"choose another {option_name}")


def remove(paths: list[Path]) -> None:
    """Removes files, folders and links, never what a link leads to; what is not there is no error."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            # What a kill halfway leaves has another name
            if path.name[0] != ".":
                with contextlib.suppress(OSError):
                    path = path.rename(path.with_name(f".{path.name}.{os.getpid()}"))
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def lock(file: IO, problem: str, fix: str) -> None:
    """Keeps `file`, open for writing, from other processes until it is closed. Raises InputError(problem,
    fix) if another has it. Without effect on Windows and on file systems without locks."""
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(problem, fix) from None
        except OSError:
            pass


# ------------------------------------------------------------------------------- folders


def sync_dir(folder: Path, *, with_files: bool = True) -> None:
    """fsync of `folder` and, `with_files`, of every file in it, before a rename makes it count."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    files = [path for path in folder.rglob("*") if path.is_file()] if with_files else []
    for path in (*files, folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Network file systems sync no folders: what is renamed there counts a little later
            if path != folder or is_disk_full(error) or error.errno == errno.EIO:
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a private folder to fill, which takes the place of `folder` on success. Raises InputError if the
    disk is full."""
    make_private_dir(folder.parent)
    # A new name that nobody can have put a link at
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    old = folder.with_name(f".{folder.name}.old")
    try:
        with disk_full_as_input_error(folder):
            yield temporary
            sync_dir(temporary)
            if os.path.lexists(folder):
                remove([old])
                folder.rename(old)
            temporary.rename(folder)
            remove([old])
            sync_dir(folder.parent, with_files=False)
    finally:
        remove([temporary])


def try_saving(folder: Path) -> None:
    """Saves a small folder in `folder`, twice, as a checkpoint. Raises InputError if the file system cannot;
    says so if it keeps no permissions."""
    trial = folder / ".trial"
    try:
        for _ in range(2):
            with new_folder(trial) as temporary:
                write_atomic(temporary / "trial", "trial")
        if os.name != "nt" and trial.stat().st_mode & 0o077:
            log(f"warning: {folder}: its file system keeps no permissions: other users may read the adapter")
    except OSError as error:
        problem = f"{folder}: a trial save failed: {error.strerror or error}"
        fix = "choose an --output_dir on a local disk, and copy it when the run is done"
        raise InputError(problem, fix) from None
    finally:
        remove([trial, trial.with_name("..trial.old")])


@contextlib.contextmanager
def disk_full_as_input_error(path: Path) -> Iterator[None]:
    """Turns what the libraries raise on a full disk into one InputError."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            fix = "free some space and run the same command again (training: with --resume, without --overwrite)"
            raise InputError(f"{path}: the disk is full; what was saved before is complete", fix) from None
        raise


# ------------------------------------------------------------------------------- checksums


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(files: list) -> str:
    """The SHA-256 of one file; of several, that of theirs."""
    first, *more = [sha256(Path(file)) for file in files]
    return hashlib.sha256("".join([first, *more]).encode()).hexdigest() if more else first


def is_bundled(digest: str) -> bool:
    """Whether a SHA-256 is that of an unchanged file of our sample data: only then may its text be shown."""
    checksums = ROOT / "phase1_data" / "sft" / "SHA256SUMS"
    return checksums.is_file() and digest in checksums.read_text().split()


# The SHA-256 of large files by that of their path, after what they looked like. Beside the models, for all
# users of an installation
REMEMBERED = ROOT / "models" / ".sha256.json"
LARGE = 2**26  # bytes
_computed: dict[str, str] = {}  # in this process


def remembered_sha256(path: Path, *, again: bool = False) -> str:
    """The SHA-256 of a file. A large one is not read a second time while its path, size, times and inode are
    the same, unless `again`."""
    stat = path.stat()
    if stat.st_size < LARGE:
        return sha256(path)
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    # ctime cannot be set back, as mtime can
    look = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
    remembered = _read_remembered() | _computed
    known, _, digest = str(remembered.get(name, "")).partition(" ")
    if again or known != look:
        digest = sha256(path)
        _computed[name] = f"{look} {digest}"
        # Where it cannot be written, it is computed in each process
        with contextlib.suppress(OSError):
            write_atomic(REMEMBERED, json.dumps(remembered | _computed, indent=2), 0o644)
    return digest


def _read_remembered() -> dict:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stat = REMEMBERED.stat()
        # What others could have written vouches for nothing; who owns this code could do anything
        owners = (0, getattr(os, "getuid", lambda: 0)(), Path(__file__).stat().st_uid)
        if os.name == "nt" or (not stat.st_mode & 0o022 and stat.st_uid in owners):
            known = json.loads(REMEMBERED.read_text(encoding="utf-8")).items()
            # Names of 64 digits: earlier versions wrote paths
            return {name: look for name, look in known if len(name) == 64}
    return {}


def _listed_files(folder: Path, ignored: tuple[str, ...] = ()) -> dict[str, Path]:
    """The files of a folder by name, without hidden ones, what Windows leaves in folders, SHA256SUMS itself
    and the `ignored` extensions. A link to a folder counts as a file, since it must not hide what is behind
    it."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {
        name: path
        for name, path in paths.items()
        if (path.is_file() or path.is_symlink()) and name != "SHA256SUMS" and "/." not in f"/{name}"
        if path.suffix not in ignored and path.name not in ("Thumbs.db", "desktop.ini")
    }


def write_checksums(folder: Path) -> None:
    """Writes SHA256SUMS over the files in `folder`, in the format of `sha256sum --check`."""
    lines = [f"{sha256(path)}  {name}\n" for name, path in _listed_files(folder).items()]
    write_atomic(folder / "SHA256SUMS", "".join(lines))


def checksum_problem(
    folder: Path, ignored: tuple[str, ...] = (), hash_file: Callable[[Path], str] = sha256
) -> str | None:
    """The first way in which `folder` differs from its SHA256SUMS, apart from files with `ignored`
    extensions; None if it does not."""
    try:
        text = (folder / "SHA256SUMS").read_text(encoding="utf-8")
    except FileNotFoundError:
        return "it has no SHA256SUMS"
    except (OSError, UnicodeDecodeError):
        return "SHA256SUMS cannot be read"
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    if not text.endswith("\n") or not all(name and len(digest) == 64 for name, digest in digests.items()):
        return "SHA256SUMS is damaged"
    files = _listed_files(folder, ignored)
    unlisted = [name for name in files if name not in digests]
    if unlisted:
        return f"{unlisted[0]} is not in SHA256SUMS"
    for name, digest in digests.items():
        if Path(name).suffix in ignored:
            continue
        if name not in files or not files[name].is_file():
            return f"{name} is missing"
        if hash_file(files[name]) != digest:
            return f"{name} is damaged or was changed"
    return None
