"""Scratch folders: private, gone at the end, and swept after a kill."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from faults.disk_failures import remount, small_disk
from influence_cli.output.ranking import FullRanking
from influence_cli.storage import scratch
from influence_cli.storage.scratch import ScratchFolder, remove_stale_folders

HOLDER = """
import sys, time
from pathlib import Path
from influence_cli.storage.scratch import ScratchFolder
with ScratchFolder(Path(sys.argv[1])) as folder:
    (folder / "scores").write_text("1")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_the_folder_of_a_living_process_stays_and_that_of_a_killed_one_goes(holder, tmp_path):
    (folder,) = tmp_path.iterdir()
    os.utime(folder, (1, 1))  # age proves nothing while the owner lives
    with ScratchFolder(tmp_path) as other:
        assert other.stat().st_mode & 0o777 == 0o700
        assert folder.is_dir()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    ScratchFolder(tmp_path)  # sweeps, and goes with the object
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_host_goes_after_a_day(tmp_path, monkeypatch):
    folder = tmp_path / f".tmp-elsewhere-{'0' * 16}-influence-scratch"
    folder.mkdir()
    remove_stale_folders(tmp_path)
    assert folder.is_dir()
    monkeypatch.setattr(scratch, "DAY_SECONDS", -1)
    remove_stale_folders(tmp_path)
    assert not folder.exists()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "treasure").mkdir()
    (tmp_path / "treasure" / "kept").touch()
    link = tmp_path / f".tmp-elsewhere-{'0' * 16}-influence-scratch"
    link.symlink_to(tmp_path / "treasure")
    remove_stale_folders(tmp_path)
    assert (tmp_path / "treasure" / "kept").exists()


def test_a_folder_that_a_sweep_removes_at_its_birth_is_made_again(tmp_path, monkeypatch):
    """Another process sweeps between the creation of the folder and its lock."""
    swept, open_file = [], os.open

    def sweep_first(path, *args, **options):
        if not swept:
            swept.append(path)
            os.rmdir(path)
        return open_file(path, *args, **options)

    monkeypatch.setattr(scratch.os, "open", sweep_first)
    with ScratchFolder(tmp_path) as folder:
        assert folder.is_dir()
        assert folder != swept[0]


FILL = """
import sys
from pathlib import Path
from influence_cli.storage.scratch import map_zeros
try:
    map_zeros(Path(sys.argv[1]), (1 << 20,)).fill(1.0)
except OSError as error:
    print(error.strerror)
"""


def test_an_array_for_which_the_disk_has_no_room_is_an_error_and_no_bus_error(tmp_path):
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("this user may mount no disk")
        remount(tmp_path / "disk", "size=1m")
        ended = subprocess.run(
            [sys.executable, "-c", FILL, str(tmp_path / "disk" / "scores")],
            capture_output=True,
            text=True,
        )
    assert (ended.returncode, ended.stdout) == (0, "No space left on device\n"), ended.stderr


def test_a_mapped_array_is_zero_and_holds_what_is_written(tmp_path, monkeypatch):
    for number in (None, errno.EOPNOTSUPP):  # of a file system that can't reserve room
        if number:
            monkeypatch.setattr(scratch.os, "posix_fallocate", raising(number))
        array = scratch.map_zeros(tmp_path / "scores", (3, 5))
        assert array.sum() == 0
        array += 2.0
        assert (tmp_path / "scores").stat().st_size == 8 * 15


def raising(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_the_ranking_of_all_pairs_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ranking = FullRanking(1, 0)
    assert len(list(tmp_path.iterdir())) == 1
    del ranking
    assert list(tmp_path.iterdir()) == []
