"""How much memory is available, by what the system tells."""

import os
from pathlib import Path

import pytest

from influence_cli.errors import CacheError
from influence_cli.extraction import machine
from influence_cli.extraction.machine import available_memory
from tests.refusals import refused

MEMINFO = "MemTotal: 9 kB\nMemFree: 5 kB\nMemAvailable:    7000 kB\nBuffers: 1 kB\n"
GROUP = "/sys/fs/cgroup/memory."


@pytest.fixture
def tell(monkeypatch):
    """tell({path: text}): these files, and no others below /proc and /sys."""
    read = Path.read_text

    def set_files(files):
        def read_text(self, *args, **options):
            if str(self) in files:
                return files[str(self)]
            if str(self).startswith(("/proc/", "/sys/")):
                raise FileNotFoundError(self)
            return read(self, *args, **options)

        monkeypatch.setattr(Path, "read_text", read_text)

    return set_files


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({"/proc/meminfo": MEMINFO}, 7000 * 1024),
        ({"/proc/meminfo": MEMINFO, f"{GROUP}max": "900\n", f"{GROUP}current": "300\n"}, 600),
        ({"/proc/meminfo": MEMINFO, f"{GROUP}max": "max\n", f"{GROUP}current": "300\n"}, 7168000),
        ({"/proc/meminfo": MEMINFO, f"{GROUP}max": "10" * 9, f"{GROUP}current": "0"}, 7168000),
        ({f"{GROUP}max": "900", f"{GROUP}current": "300"}, 600),
        ({"/proc/meminfo": "nothing\n"}, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
    ],
    ids=["machine", "group", "group without limit", "large group", "group alone", "pages"],
)
def test_the_smallest_limit_counts(files, available, tell):
    tell(files)
    assert available_memory() == available


def test_a_system_that_tells_nothing_has_no_limit(tell, monkeypatch):
    tell({})
    monkeypatch.delattr(os, "sysconf")
    assert available_memory() is None


def test_gradients_that_do_not_fit_into_memory_are_refused(tell, make_run, influence):
    run = make_run()
    tell({"/proc/meminfo": MEMINFO.replace("7000", "1")})
    refused(influence("score", run), 1, "does not fit into memory", "--batch-size")


@pytest.fixture
def ten_free_bytes(monkeypatch):
    class Usage:
        free = 10

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage)


def test_all_free_bytes_of_disk_and_memory_may_be_used(tmp_path, tell, ten_free_bytes):
    tell({"/proc/meminfo": MEMINFO})
    machine.check_fits(tmp_path, 10, 7000 * 1024)
    with pytest.raises(CacheError, match="do not fit on the disk"):
        machine.check_fits(tmp_path, 11, 0)
    with pytest.raises(CacheError, match="does not fit into memory"):
        machine.check_fits(tmp_path, 10, 7000 * 1024 + 1)


def test_a_disk_that_is_too_small_is_named(tmp_path, ten_free_bytes, make_run, influence):
    result = influence("score", make_run(), "--cache", tmp_path / "new" / "cache")
    refused(result, 1, "do not fit on the disk of the cache", "free: 10 bytes")
