"""Token cache."""

import hashlib
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sft.cli import log
from sft.data.prompt import PromptEncoder
from sft.data.rows import Row
from sft.files import ROOT, make_private_dir, write_atomic

if TYPE_CHECKING:
    import numpy as np


def cache_key(rows: Sequence[Row], encoder: PromptEncoder, max_length: int) -> str | None:
    """SHA-256 of all that the tokens depend on: rows, tokenizer, prompt, max_length and this code. None for a tokenizer
    that cannot be written down (a slow one)."""
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.sha256()
    for name in (
        "sft/data/dataset.py",
        "sft/data/prompt.py",
        "sft/grounding/sentences.py",
        "sft/grounding/citations.py",
    ):
        digest.update((ROOT / name).read_bytes())
    settings = (
        asdict(encoder.template),
        encoder.prefix_ids,
        encoder.suffix_ids,
        sorted(encoder.control_ids),
        max_length,
        version("transformers"),
    )
    digest.update(f"{settings}{backend.to_str()}".encode())
    for row in rows:
        for text in (row.clinical_note, row.model_summary):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()


def write_cache(path: Path, key: str, arrays: dict[str, "np.ndarray"]) -> None:
    """The file: SHA-256 of what follows (32 bytes), a line of JSON padded with spaces, the arrays as int32 (little-endian).
    It holds the notes as tokens: the user alone may read it. A disk that takes no cache stops nothing."""
    header = json.dumps(
        {"key": key, "shapes": {name: values.shape for name, values in arrays.items()}}
    ).encode()
    header += b" " * (-(len(header) + 1) % 64) + b"\n"
    digest = hashlib.sha256(header)
    parts = [values.astype("<i4", copy=False).reshape(-1).data for values in arrays.values()]
    for part in parts:
        digest.update(part)
    try:
        for torn in make_private_dir(path.parent).glob(
            f".{path.name}.*"
        ):  # by a run that was killed while it wrote
            torn.unlink()
        write_atomic(path, b"".join([digest.digest(), header, *parts]))
    except OSError as error:
        log(f"warning: the tokens are not kept for the next start: {error.strerror}: {path}")


def read_cache(path: Path, key: str) -> dict[str, "np.ndarray"] | None:
    """The arrays, mapped into memory; None where there is no whole cache with this key."""
    import numpy as np

    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # no file; an empty one
        return None
    if mapped[:32] != hashlib.sha256(memoryview(mapped)[32:]).digest():
        return None
    end = mapped.find(b"\n", 32) + 1
    header = json.loads(mapped[32:end])
    if header["key"] != key:
        return None
    arrays = {}
    for name, shape in header["shapes"].items():
        arrays[name] = np.frombuffer(mapped, "<i4", math.prod(shape), end).reshape(shape)
        end += arrays[name].nbytes
    return arrays
