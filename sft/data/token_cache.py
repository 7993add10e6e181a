"""Keeps the tokens of a file of rows on disk, so that the next start need not tokenize it again.

The file: SHA-256 of what follows (32 bytes), a line of JSON (the key, and the arrays' names and shapes)
padded with spaces to a multiple of 64 bytes, the arrays as little-endian int32, end to end.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import sft.grounding
from sft.cli import log
from sft.data.prompt import PromptEncoder
from sft.data.rows import Row
from sft.files import make_private_dir, write_atomic

if TYPE_CHECKING:
    import numpy as np

_N_DIGEST = 32  # bytes of a SHA-256
_HEADER_MULTIPLE = 64  # bytes


def cache_key(rows: Sequence[Row], encoder: PromptEncoder, max_length: int) -> str | None:
    """SHA-256 of all that the tokens depend on: rows, tokenizer, prompt, max_length and this code.

    None for a tokenizer that cannot be written down (a slow one).
    """
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings = (
        asdict(encoder.template),
        encoder.prefix_ids,
        encoder.suffix_ids,
        sorted(encoder.control_ids),
        max_length,
        version("transformers"),
    )
    digest = hashlib.sha256()
    for path in _source_files():
        digest.update(path.read_bytes())
    digest.update(f"{settings}{backend.to_str()}".encode())
    for row in rows:
        for text in (row.clinical_note, row.model_summary):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()


def _source_files() -> list[Path]:
    """All modules of sft.data and sft.grounding, so that none that the tokens depend on is forgotten."""
    folders = (Path(__file__).parent, Path(sft.grounding.__file__).parent)
    return [path for folder in folders for path in sorted(folder.glob("*.py"))]


def write_cache(path: Path, key: str, arrays: dict[str, "np.ndarray"]) -> None:
    """Writes `arrays` as int32. A disk that takes no cache stops nothing.

    The file holds the notes as tokens, so only the user may read it.
    """
    shapes = {name: values.shape for name, values in arrays.items()}
    header = json.dumps({"key": key, "shapes": shapes}).encode()
    header += b" " * (-(len(header) + 1) % _HEADER_MULTIPLE) + b"\n"
    parts = [header, *(values.astype("<i4", copy=False).reshape(-1).data for values in arrays.values())]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    try:
        make_private_dir(path.parent)
        # Left by a run that was killed while it wrote
        for leftover in path.parent.glob(f".{path.name}.*"):
            leftover.unlink()
        write_atomic(path, b"".join([digest.digest(), *parts]))
    except OSError as error:
        what = "could not write the token cache, so the next run will tokenize again"
        log(f"warning: {what}: {error.strerror}: {path}")


def read_cache(path: Path, key: str) -> dict[str, "np.ndarray"] | None:
    """The arrays, mapped into memory; None if there is no complete cache with this key."""
    import numpy as np

    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # No file, or an empty one
    except (OSError, ValueError):
        return None
    if mapped[:_N_DIGEST] != hashlib.sha256(memoryview(mapped)[_N_DIGEST:]).digest():
        return None
    end = mapped.find(b"\n", _N_DIGEST) + 1
    header = json.loads(mapped[_N_DIGEST:end])
    if header["key"] != key:
        return None
    arrays = {}
    for name, shape in header["shapes"].items():
        arrays[name] = np.frombuffer(mapped, "<i4", math.prod(shape), end).reshape(shape)
        end += arrays[name].nbytes
    return arrays
