"""Text."""

import codecs
import os
import re
from collections import Counter
from pathlib import Path

from sft.cli import InputError, log

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c]")  # a form feed parts words too


_SURROGATES = re.compile(r"[\ud800-\udfff]")  # half characters, which JSON can hold and UTF-8 cannot


_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


_OTHER_FORMATS = (
    (b"PK\x03\x04", "an Excel workbook (or another zip file)", "save it as 'CSV UTF-8'"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save it as 'CSV UTF-8'"),
    (b"\x1f\x8b", "a gzip file", "unpack it"),
)


# Letters of DOS and Macintosh code pages lie where Windows-1252 keeps punctuation; a long run of letters beyond ASCII is another script
_NOT_WINDOWS_1252 = re.compile(
    rb"[A-Za-z][\x80-\x8b\x8d-\x91\x93-\x95\x98-\x9b\x9d-\x9f][A-Za-z]|[\xc0-\xff]{3}"
)


def clean_text(text: str) -> str:
    """Text as the model reads it: line ends are \\n, no control characters, no white space at the ends."""
    if not text.isascii():
        text = _SURROGATES.sub("\ufffd", text)
    return _CONTROL_CHARACTERS.sub("", _LINE_ENDS.sub("\n", text)).strip()


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, zero-width and control characters alone."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def read_bytes(path: Path) -> bytes:
    """Raises InputError where there is no such file."""
    if not path.is_file():
        raise InputError(
            f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}", "check the path"
        )
    return path.read_bytes()


def decode_text(path: Path) -> str:
    """A file's text. Raises InputError where there is no such file or it is not text."""
    return decode_bytes(read_bytes(path), str(path))


def decode_bytes(data: bytes, name: str) -> str:
    repairs = Counter()
    text = data.decode(find_encoding(data, name, repairs))
    log_repairs(name, repairs)
    return text


def find_encoding(data: bytes, name: str, repairs: Counter) -> str:
    """The codec that decodes `data` whole: UTF-8, UTF-16 or UTF-32, or Windows-1252 where nothing speaks against it.

    Raises InputError where the bytes are not text.
    """
    for start, what, fix in _OTHER_FORMATS:
        if data.startswith(start):
            raise InputError(f"{name}: {what}, not a text file", fix)
    encoding = next(
        (encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), None
    ) or _utf_16_without_mark(data)
    try:
        pieces = (
            data[i : i + (1 << 20)] for i in range(0, len(data), 1 << 20)
        )  # never the whole text in memory
        for _ in codecs.iterdecode(pieces, encoding or "utf-8"):
            pass
    except UnicodeDecodeError:
        if encoding is None and (n := _windows_1252_characters(data)):
            repairs["read as Windows-1252 ({} characters that are not UTF-8)"] += n
            return "windows-1252"
        _refuse_encoding(data, encoding or "utf-8", name)
    if encoding not in (None, "utf-8-sig"):
        repairs[f"read as {encoding[:6].upper()} ({{}} bytes)"] += len(data)
    return encoding or "utf-8"


def _utf_16_without_mark(data: bytes) -> str | None:
    """The codec of a file that begins with 8 or more ASCII characters in UTF-16: every other byte is NUL."""
    even, odd = data[:64:2], data[1:64:2]
    if len(odd) < 8:
        return None
    if not any(odd) and all(even):
        return "utf-16-le"
    return "utf-16-be" if not any(even) and all(odd) else None


def _windows_1252_characters(data: bytes) -> int:
    """How many characters beyond ASCII there are; 0 where it may be another encoding, or UTF-8 with a damaged spot."""
    beyond = len(data) - len(data.translate(None, bytes(range(128, 256))))
    controls = re.search(rb"[\x00-\x08\x0e-\x1f\x7f\x81\x8d\x8f\x90\x9d]", data)
    partly_utf_8 = re.search("[^\x00-\x7f\udc80-\udcff]", data.decode("utf-8", "surrogateescape"))
    return (
        0 if controls or partly_utf_8 or _NOT_WINDOWS_1252.search(data) or beyond * 5 > len(data) else beyond
    )


def _refuse_encoding(data: bytes, encoding: str, name: str) -> None:
    if b"\0" in data and encoding == "utf-8":
        raise InputError(f"{name}: a binary file, not text", "save it as 'CSV UTF-8', or as a text file")
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name}: not {encoding.upper().removesuffix('-SIG')}: byte 0x{data[error.start]:02x} on line {line:,}",
            "save it as UTF-8 (in Excel: 'CSV UTF-8')",
        ) from None


def log_repairs(name: str | Path, repairs: Counter) -> None:
    """One warning a kind, with its count in the place of {}; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        for kind, count in repairs.items():
            log(f"warning: {name}: {kind.format(f'{count:,}')}")
