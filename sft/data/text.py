"""The text of a file, whatever encoding it was exported in, and its cleaning.

What can be repaired safely is repaired, and counted in a Counter (see `log_repairs`)."""

import re
import unicodedata
from collections import Counter
from pathlib import Path

from sft.cli import InputError, is_out_of_memory, log, on_main_process, plural

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
# A form feed separates words too; NEL and Unicode's line and paragraph separators are read by no other rule
_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
SURROGATES = re.compile(r"[\ud800-\udfff]")  # unpaired ones, which JSON can hold and UTF-8 cannot

# How a file begins; UTF-16 without a mark has a NUL beside each ASCII character
_ENCODINGS = (
    (rb"\xef\xbb\xbf", "utf-8-sig"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "utf-32"),
    (rb"\xff\xfe|\xfe\xff", "utf-16"),
    (rb"([^\0]\0){8}", "utf-16-le"),
    (rb"(\0[^\0]){8}", "utf-16-be"),
    (rb"", "utf-8"),
)
_SAVE_AS_CSV = "save it as 'CSV UTF-8', or as a text file"
_OTHER_FORMATS = (
    (b"PK\x03\x04", "an Excel workbook (or another zip file)", _SAVE_AS_CSV),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", _SAVE_AS_CSV),
    (b"\x1f\x8b", "a gzip file", "unpack it"),
    (b"PAR1", "a Parquet file", "save it as .csv or .jsonl"),
    (b"%PDF-", "a PDF", "save its text"),
)
# Bytes that are unused in Windows-1252; letters of DOS and Macintosh code pages where it has punctuation; a
# run of letters beyond ASCII, which is another script
_NOT_WINDOWS_1252 = re.compile(
    rb"[\x00-\x08\x0e-\x1f\x7f\x81\x8d\x8f\x90\x9d]"
    rb"|[A-Za-z][\x80-\x8b\x8d-\x91\x93-\x95\x98-\x9b\x9d-\x9f][A-Za-z]|[\xc0-\xff]{3}"
)


def log_repairs(name: str | Path, repairs: Counter) -> None:
    """Logs what was repaired, on the main process only: 2 of ("blank row", "skipped") as "2 blank rows
    skipped"."""
    if on_main_process():
        for (noun, action), count in repairs.items():
            log(f"warning: {name}: {plural(count, noun)} {action}")


# ------------------------------------------------------------------------------- cleaning


def clean_text(text: str) -> str:
    """Text as the model reads it: line ends are \\n, no control characters, no white space at the ends.

    In Unicode's NFC: other spellings of the same letters, as macOS and some PDFs write them, become the
    tokens that the base model knows."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", SURROGATES.sub("\ufffd", text))
    return CONTROL_CHARACTERS.sub("", _LINE_ENDS.sub("\n", text)).strip()


def is_blank(text: str) -> bool:
    """Whether nothing of a text is visible: it has only white space, zero-width and control characters."""
    return not any(character.isprintable() and not character.isspace() for character in text)


# ------------------------------------------------------------------------------- reading


def read_bytes(path: Path) -> bytes:
    """Raises InputError if there is no such file, or it cannot be read."""
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a file", "check the path")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: a pipe or a device, not a file", "write its text to a file first")
    if not path.is_file():
        raise InputError(f"{path}: no such file", "check the path")
    try:
        return path.read_bytes()
    except OSError as error:
        if is_out_of_memory(error):
            raise
        problem = f"{path}: the file cannot be read ({error.strerror})"
        raise InputError(problem, "check its permissions, and the disk that it is on") from None


def decode_text(path: Path) -> str:
    """A file's text. Raises InputError if there is no such file or it is not text."""
    return decode_bytes(read_bytes(path), str(path))


def decode_bytes(data: bytes, name: str) -> str:
    """The text in `data`; `name` is what messages call it. Raises InputError if it is not text."""
    repairs = Counter()
    text = data.decode(find_encoding(data, name, repairs))
    log_repairs(name, repairs)
    return text


def find_encoding(data: bytes, name: str, repairs: Counter) -> str:
    """The codec of `data`: UTF-8, UTF-16, UTF-32, or Windows-1252 unless something rules it out.

    Any but UTF-8 is counted in `repairs`. Raises InputError if the bytes are not text."""
    for start, what, fix in _OTHER_FORMATS:
        if data.startswith(start):
            raise InputError(f"{name}: {what}, not a text file", fix)
    encoding = next(encoding for start, encoding in _ENCODINGS if re.match(start, data))
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        n_windows_1252 = _count_windows_1252(data) if encoding == "utf-8" else 0
        if n_windows_1252:
            repairs["non-UTF-8 character", "read as Windows-1252"] += n_windows_1252
            return "windows-1252"
        if b"\0" in data and encoding == "utf-8":
            raise InputError(f"{name}: a binary file, not text", _SAVE_AS_CSV) from None
        line = error.object.count(b"\n", 0, error.start) + 1
        encoding_name = encoding.upper().removesuffix("-SIG")
        problem = f"{name}: not {encoding_name}: byte 0x{error.object[error.start]:02x} on line {line:,}"
        raise InputError(problem, "save it as UTF-8 (in Excel: 'CSV UTF-8')") from None
    if not encoding.startswith("utf-8"):
        repairs["byte", f"read as {encoding[:6].upper()}"] += len(data)
    return encoding


def _count_windows_1252(data: bytes) -> int:
    """The number of characters beyond ASCII; 0 if it may be another encoding, or damaged UTF-8."""
    n_beyond_ascii = len(data) - len(data.translate(None, bytes(range(128, 256))))
    is_partly_utf_8 = re.search("[^\x00-\x7f\udc80-\udcff]", data.decode("utf-8", "surrogateescape"))
    is_ruled_out = _NOT_WINDOWS_1252.search(data) or is_partly_utf_8 or n_beyond_ascii * 5 > len(data)
    return 0 if is_ruled_out else n_beyond_ascii
