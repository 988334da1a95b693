"""A file appears complete or not at all."""

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from influence_cli.errors import CacheError
from influence_cli.storage import atomic
from influence_cli.storage.atomic import (
    DAY_SECONDS,
    LEASE_SECONDS,
    LineLog,
    remove_stale_files,
    remove_stale_siblings,
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


# ---------------------------------------------------------------- temporary files
WRITER = """
import socket, sys
from pathlib import Path
from influence_cli.storage.atomic import replace_file
socket.gethostname = lambda: {host!r}
with replace_file(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """Starts a process that writes tmp_path/x, on a host of this name, and does not end."""
    started = []

    def start(host: str) -> subprocess.Popen:
        code = [sys.executable, "-c", WRITER.format(host=host), str(tmp_path / "x")]
        process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def set_age(path, seconds: float) -> None:
    now = atomic.time.time()
    os.utime(path, (now - seconds, now - seconds))


@pytest.mark.parametrize("sweep", [remove_stale_files, lambda at: remove_stale_siblings(at / "x")])
@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_a_sweep_keeps_the_file_of_a_live_process_and_removes_a_killed_ones(
    sweep, host, writer, tmp_path
):
    """Whatever the process id, which another container may have too."""
    process = writer(host)
    (temporary,) = tmp_path.glob(".tmp-*")
    set_age(temporary, 2 * DAY_SECONDS)
    sweep(tmp_path)
    assert temporary.read_text() == "half"
    process.send_signal(signal.SIGKILL)
    process.wait()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_host_is_kept_until_its_lease_ends(writer, tmp_path):
    """A file system may not show this host the lock of that one."""
    process = writer("elsewhere")
    process.kill()
    process.wait()
    (temporary,) = tmp_path.glob(".tmp-*")
    set_age(temporary, LEASE_SECONDS - 60)
    remove_stale_files(tmp_path)
    assert temporary.exists()
    set_age(temporary, LEASE_SECONDS + 60)
    remove_stale_files(tmp_path)
    assert not temporary.exists()


def test_without_locks_a_temporary_file_is_kept_for_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "lock_file", lambda descriptor: None)
    with replace_file(tmp_path / "x") as temporary:
        set_age(temporary, DAY_SECONDS - 60)
        remove_stale_files(tmp_path)
        assert temporary.exists()
        set_age(temporary, DAY_SECONDS + 60)
        remove_stale_files(tmp_path)
        assert not temporary.exists()
        temporary.touch()


def test_temporary_names_are_random_and_follow_no_link(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("safe")
    names = set()
    for _ in range(8):
        with replace_file(tmp_path / "x") as temporary:
            names.add(temporary.name)
    assert len(names) == 8
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: "0" * 16)
    with replace_file(tmp_path / "x") as temporary:
        planted = temporary
    planted.symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError), replace_file(tmp_path / "x"):
        pass
    remove_stale_files(tmp_path)
    assert (tmp_path / "victim").read_text() == "safe"


def test_a_sweep_that_comes_first_costs_the_writer_a_name_and_no_file(tmp_path, monkeypatch):
    """Between the creation of a temporary file and its lock, a sweep may remove it."""
    locks, lock_file = [], atomic.lock_file

    def sweep_before_the_first_lock(descriptor: int) -> bool | None:
        locks.append(descriptor)
        if len(locks) == 1:
            remove_stale_files(tmp_path)
        return lock_file(descriptor)

    monkeypatch.setattr(atomic, "lock_file", sweep_before_the_first_lock)
    write_text(tmp_path / "x", "whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]
    assert len(locks) == 3  # the writer's first, the sweep's, the writer's second


def test_a_long_name_can_be_written_and_no_descriptor_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        write_text(tmp_path / ("é" * 127), "long")
        remove_stale_files(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(list(tmp_path.iterdir())) == 1
