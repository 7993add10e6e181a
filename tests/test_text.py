"""Encodings that files arrive in, and the cleaning of their text."""

import errno
import os

import pytest

from sft.cli import InputError
from sft.data.text import clean_text, decode_bytes, decode_text, is_blank

TEXT = "id,note\r\n1,Température 38,5 °C; toux 😀\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_encodings(encoding, capfd):
    assert decode_bytes(TEXT.encode(encoding), "a.txt") == TEXT
    logged = capfd.readouterr().err
    if encoding.startswith("utf-8"):
        assert logged == ""
    else:
        n_bytes = len(TEXT.encode(encoding))
        assert logged == f"warning: a.txt: {n_bytes} bytes read as {encoding[:6].upper()}\n"


def test_windows_1252_is_read_and_counted(capfd):
    assert decode_bytes("38.5 °C".encode("latin-1"), "a.txt") == "38.5 °C"
    assert capfd.readouterr().err == "warning: a.txt: 1 non-UTF-8 character read as Windows-1252\n"


@pytest.mark.parametrize(
    "note, encoding",
    [
        ("Præoperativ Ödem präoperativ", "cp850"),
        ("Sténose opérée", "mac_roman"),
        ("Пациент", "cp1251"),
        ("т а б л е т к и " * 9, "cp1251"),
        ("患者発熱あり", "shift_jis"),
        ("发烧三天", "gbk"),
    ],
)
def test_other_code_pages_are_refused(note, encoding):
    data = f"id,clinical_note\n1,{note}\n".encode(encoding)
    with pytest.raises(InputError, match=r"a.csv: not UTF-8: byte 0x.. on line 2"):
        decode_bytes(data, "a.csv")


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_the_byte_that_is_not_text_is_found(start):
    line_ends = b"\n" * 3
    data = start + b"a" * 10 + line_ends + "é".encode() + b"a\xff\x00"
    with pytest.raises(InputError, match=r"byte 0xff on line 4" if start else "a binary file"):
        decode_bytes(data, "a.txt")
    with pytest.raises(InputError, match=r"byte 0xff on line 4"):
        decode_bytes(data[:-1], "a.txt")


def test_a_message_never_names_the_text():
    with pytest.raises(InputError) as error:
        decode_bytes("SECRET é ".encode() + b"\xff", "a.txt")
    assert "SECRET" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="a folder, not a file"):
        decode_text(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        decode_text(tmp_path / "nothing.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="a pipe or a device, not a file"):
        decode_text(tmp_path / "pipe.txt")


def test_a_failed_read_names_the_file(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a.csv").write_text("id,note")
    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(InputError, match=r"a\.csv: the file cannot be read \(Input/output error\)"):
        decode_text(tmp_path / "a.csv")


def test_cleaning():
    assert clean_text(" a\r\nb\rc\x0cd\0\x07 \n") == "a\nb\nc\nd"
    assert clean_text("a\x85b\u2028c\u2029d") == "a\nb\nc\nd"
    assert clean_text("fever \ud83d today") == "fever \ufffd today"


@pytest.mark.parametrize("text", ["", " \n", "\u200b\t", "\0", "\u200f"])
def test_blank_texts(text):
    assert is_blank(text)


@pytest.mark.parametrize("text", ["-", "NA", " é", "\u200fימין"])
def test_texts_that_are_not_blank(text):
    assert not is_blank(text)
