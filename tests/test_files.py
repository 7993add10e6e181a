"""Files and folders that appear whole or not at all, and their checksums."""

import errno
import json
import os
import stat

import pytest

from sft import files
from sft.cli import InputError
from sft.files import (
    FORMAT_VERSION,
    check_format_version,
    check_new_file,
    checksum_problem,
    make_private_dir,
    new_folder,
    remembered_sha256,
    remove,
    try_saving,
    write_atomic,
    write_checksums,
    write_json,
)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_folder_changes_no_mode_of_what_was_there(tmp_path):
    tmp_path.chmod(0o755)
    folder = make_private_dir(tmp_path / "a" / "b")
    assert (mode(folder), mode(tmp_path / "a"), mode(tmp_path)) == (0o700, 0o700, 0o755)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    write_json(file, {"note": "é"})
    assert file.read_text(encoding="utf-8") == '{\n  "note": "é"\n}\n'
    assert mode(file) == 0o600

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomic(file, "other")
    assert "note" in file.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [file]


def test_numbers_that_json_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "file.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path):
    folder = tmp_path / "folder"
    for content in ("one", "two"):
        with new_folder(folder) as temporary:
            (temporary / content).write_text(content)
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [folder]
    assert mode(folder) == 0o700


@pytest.mark.parametrize(
    "raised, expected",
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (RuntimeError("I/O error: No space left on device (os error 28)"), InputError),
        (RuntimeError("something else"), RuntimeError),
    ],
)
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, raised, expected):
    folder = tmp_path / "folder"
    with new_folder(folder) as temporary:
        (temporary / "one").write_text("one")
    with pytest.raises(expected), new_folder(folder) as temporary:
        (temporary / "two").write_text("two")
        raise raised
    assert [path.name for path in folder.iterdir()] == ["one"]
    assert list(tmp_path.iterdir()) == [folder]


def test_checksums_find_every_kind_of_damage(tmp_path):
    assert checksum_problem(tmp_path) == "it has no SHA256SUMS"
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    assert checksum_problem(tmp_path) is None

    (tmp_path / ".a.tmp").write_text("a temporary file of a killed process")
    assert checksum_problem(tmp_path) is None
    (tmp_path / "extra").write_text("")
    assert checksum_problem(tmp_path) == "extra is not in SHA256SUMS"
    (tmp_path / "extra").unlink()
    (tmp_path / "inner" / "b").write_text("other")
    assert checksum_problem(tmp_path) == "inner/b is damaged or was changed"
    (tmp_path / "inner" / "b").unlink()
    assert checksum_problem(tmp_path) == "inner/b is missing"
    sums = (tmp_path / "SHA256SUMS").read_text()
    for damaged in (sums[:-1], "", "x  a\n", sums.replace("  ", " ")):
        (tmp_path / "SHA256SUMS").write_text(damaged)
        assert checksum_problem(tmp_path) == "SHA256SUMS is damaged"
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\n")
    assert checksum_problem(tmp_path) == "SHA256SUMS cannot be read"


def test_nothing_new_is_written_into_a_models_folder(tmp_path):
    """It would be refused from then on: by its sums, there is a file too many."""
    model = tmp_path / "final_model"
    (model / "inner").mkdir(parents=True)
    check_new_file("--output", model / "new.csv")
    write_json(model / "sft_config.json", {})
    write_checksums(model)
    (tmp_path / "link").symlink_to(model)
    for path in (model / "new.csv", model / "inner" / "new", tmp_path / "link" / "new"):
        with pytest.raises(InputError, match=r"--output .* lies in the adapter's folder"):
            check_new_file("--output", path)
    check_new_file("--output", tmp_path / "new.csv")


def test_new_files_are_checked_before_work_begins(tmp_path):
    check_new_file("--output", None)
    check_new_file("--output", tmp_path / "new.csv", (".csv",))
    (tmp_path / "old.csv").write_text("")
    (tmp_path / "link.csv").symlink_to("nowhere")
    for path, words in (
        ("old.csv", "exists"),
        ("link.csv", "exists"),
        ("new.doc", "unknown file extension"),
        ("no/new.csv", "no folder"),
    ):
        with pytest.raises(InputError, match=words):
            check_new_file("--output", tmp_path / path, (".csv",))


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_replaced_and_what_it_leads_to_is_kept(tmp_path, dangling):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").write_text("old")
    folder = tmp_path / "folder"
    folder.symlink_to(tmp_path / ("nowhere" if dangling else "elsewhere"))
    with new_folder(folder) as temporary:
        (temporary / "new").write_text("new")
    assert not folder.is_symlink()
    assert [path.name for path in folder.iterdir()] == ["new"]
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove([tmp_path / "link"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "folder"]
    assert (tmp_path / "elsewhere" / "old").read_text() == "old"


def test_a_large_file_is_read_again_when_it_changed_or_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REMEMBERED", tmp_path / "remembered.json")
    monkeypatch.setattr(files, "LARGE", 4)
    monkeypatch.setattr(files, "_computed", {})
    read = []
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or path.read_text())
    file = tmp_path / "weights"
    file.write_text("first")
    times = file.stat()
    assert [remembered_sha256(file) for _ in range(3)] == ["first"] * 3
    assert len(read) == 1
    # The same size and time
    file.write_text("other")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert remembered_sha256(file) == "other"
    assert remembered_sha256(file, again=True) == "other"
    assert len(read) == 3
    text = (tmp_path / "remembered.json").read_text()
    # For every user of a machine, and without the paths of one
    assert (tmp_path / "remembered.json").stat().st_mode & 0o777 == 0o644
    assert len(json.loads(text)) == 1 and "weights" not in text
    # What others could have written is not believed, and a damaged file is no error
    (tmp_path / "remembered.json").chmod(0o666)
    monkeypatch.setattr(files, "_computed", {})
    assert remembered_sha256(file) == "other"
    assert len(read) == 4
    for content in ("[]", "{", '{"a": 5}'):
        (tmp_path / "remembered.json").write_text(content)
        assert remembered_sha256(file) == "other"
    # An installation that cannot be written to
    monkeypatch.setattr(files, "REMEMBERED", tmp_path / "nowhere" / "remembered.json")
    assert remembered_sha256(file) == "other"


def refusing(function, number: int, when=lambda *arguments: True):
    """`function`, as on a file system without it."""

    def refuse(*arguments, **options):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return function(*arguments, **options)

    return refuse


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def test_a_file_system_without_permissions_and_without_fsync_of_folders(tmp_path, monkeypatch, capsys):
    """As CIFS, FUSE and some network mounts: nothing that is saved needs either."""
    open_chmod = os.chmod
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.EINVAL, is_folder))
    monkeypatch.setattr(os, "chmod", refusing(os.chmod, errno.EPERM))
    monkeypatch.setattr(files.Path, "chmod", refusing(files.Path.chmod, errno.EPERM))
    try_saving(make_private_dir(tmp_path / "out" / "run"))
    assert not list((tmp_path / "out" / "run").iterdir())
    assert capsys.readouterr().err == ""

    def readable_folder(prefix, dir):
        os.mkdir(f"{dir}/t")
        open_chmod(f"{dir}/t", 0o755)
        return f"{dir}/t"

    monkeypatch.setattr(files.tempfile, "mkdtemp", readable_folder)
    try_saving(tmp_path / "out" / "run")
    assert "keeps no permissions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, name, when",
    [
        (files.Path, "rename", lambda path, target: path.is_dir()),
        (os, "replace", lambda *paths: True),
        (os, "fsync", lambda descriptor: not is_folder(descriptor)),
    ],
)
def test_a_file_system_that_cannot_hold_a_run_is_refused(tmp_path, monkeypatch, module, name, when):
    monkeypatch.setattr(module, name, refusing(getattr(module, name), errno.ENOTSUP, when))
    with pytest.raises(InputError, match=r"a trial save failed: [\s\S]*local disk"):
        try_saving(tmp_path)
    assert not list(tmp_path.iterdir())


def test_remove_takes_files_folders_and_nothing(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    remove([tmp_path / name for name in ("folder", "file", "nowhere")])
    assert not list(tmp_path.iterdir())


def test_format_versions(tmp_path):
    for known in ({}, {"format_version": 1}, {"format_version": FORMAT_VERSION}):
        check_format_version(tmp_path, known)
    for unknown in (FORMAT_VERSION + 1, "2", None):
        with pytest.raises(InputError, match="newer version"):
            check_format_version(tmp_path, {"format_version": unknown})
