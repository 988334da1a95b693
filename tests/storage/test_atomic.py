"""A file appears complete or not at all."""

import errno
import os

import pytest

from influence_cli.errors import CacheError
from influence_cli.storage.atomic import (
    LineLog,
    replace_file,
    replace_text_file,
    report_disk_errors,
    write_json,
    write_text,
)


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")
    for replace in (replace_file, replace_text_file):
        with pytest.raises(RuntimeError), replace(path):
            raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "x", {})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_text_file_is_utf_8_with_lf(tmp_path):
    with replace_text_file(tmp_path / "x") as file:
        file.write("é\n")
    assert (tmp_path / "x").read_bytes() == b"\xc3\xa9\n"


def test_a_line_log_appends(tmp_path):
    (tmp_path / "x").write_bytes(b"one\n")
    with LineLog(tmp_path / "x") as log:
        log.append(b"two\n")
        log.append(b"three\n")
        log.sync()
    assert (tmp_path / "x").read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_its_free_bytes_in_the_error(number, tmp_path):
    with (
        pytest.raises(
            CacheError, match=r"the disk is full \([\d,]+ bytes free\)\n  free some space"
        ),
        report_disk_errors(tmp_path / "not" / "there"),
    ):
        raise OSError(number, os.strerror(number))
