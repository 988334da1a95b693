"""The ways in which a disk fails. A failure begins in the parent, acts in the fork (`prepare`), and
ends in the parent: then the disk is well again.
"""

import contextlib
import errno
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.file_changes import watch_changes

SPACE = ("open", "os.mkdir", "write", "fsync")  # changes that a full disk refuses
ALL = (*SPACE, "os.rename", "os.remove", "os.rmdir", "os.truncate")
NAMELESS = ("write", "fsync")  # their errors name no file
PAGE = 4096
LOGS = 4096  # bytes that stdout and stderr may need


@dataclass
class DiskTrial:
    """The folder of a trial. `gone`: takes what vanishes. `folders`: may vanish. `changes` of
    files, `largest` file in bytes, and `pages` that the command adds, all undisturbed.
    """

    place: Path
    gone: Path
    folders: list[str]
    changes: int
    largest: int
    pages: int
    rng: random.Random


class DiskFailure:
    """`text`: what happens in this trial."""

    text = ""
    keeps_files = False  # a temporary file can't be removed
    folders: tuple[str, ...] = ()  # that vanish, and may stay away

    def __init__(self, trial: DiskTrial) -> None:
        self.trial = trial

    def prepare(self) -> None:
        """In the fork, before the command."""

    def end(self) -> None:
        """In the parent, after the command."""


class PlantedErrors(DiskFailure):
    """Changes of files raise an error, from one change on, or at this change only."""

    codes: tuple[int, ...] = (errno.ENOSPC, errno.EDQUOT)
    kinds: tuple[str, ...] = SPACE
    from_start = False

    def __init__(self, trial: DiskTrial) -> None:
        super().__init__(trial)
        rng = trial.rng
        self.code = rng.choice(self.codes)
        self.first = 1 if self.from_start else rng.randint(1, max(1, trial.changes))
        self.once = not self.from_start and rng.random() < 0.3
        when = "once, at or after" if self.once else "from"
        self.text = f"{errno.errorcode[self.code]} {when} change {self.first}"
        self.raised = False

    def prepare(self) -> None:
        watch_changes(self.trial.place, self.raise_error)

    def raise_error(self, number: int, kind: str, path: str | None) -> None:
        if number < self.first or kind not in self.kinds or (self.once and self.raised):
            return
        self.raised = True
        text = os.strerror(self.code)
        raise OSError(self.code, text) if kind in NAMELESS else OSError(self.code, text, path)


class FailingSync(PlantedErrors):
    codes, kinds = (errno.EIO, errno.ENOSPC), ("fsync",)


class ReadOnly(PlantedErrors):
    codes, kinds, from_start = (errno.EROFS, errno.EACCES), ALL, True


class TurnsReadOnly(PlantedErrors):
    """The system does so after an error of a disk."""

    codes, kinds, keeps_files = (errno.EROFS, errno.EIO), ALL, True


class SizeLimit(DiskFailure):
    """No file may be larger (RLIMIT_FSIZE)."""

    def __init__(self, trial: DiskTrial) -> None:
        super().__init__(trial)
        self.limit = trial.rng.randrange(LOGS, max(LOGS, trial.largest) + 1)
        self.text = f"files of at most {self.limit} bytes"

    def prepare(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


class Vanishing(DiskFailure):
    """A folder moves away, or is deleted, right before a change of a file."""

    def __init__(self, trial: DiskTrial) -> None:
        super().__init__(trial)
        self.folder = trial.rng.choice(trial.folders)
        self.moves = trial.rng.random() < 0.5
        if self.folder == "out":
            self.moves = True  # so that a complete table can still be compared
        elif self.folder not in ("tmp", "parts"):
            self.folders = (f"{self.folder}/",)
        self.change = trial.rng.randint(1, max(1, trial.changes))
        verb = "moves away" if self.moves else "is deleted"
        self.text = f"{self.folder} {verb} before change {self.change}"

    def prepare(self) -> None:
        watch_changes(self.trial.place, self.remove)

    def remove(self, number: int, kind: str, path: str | None) -> None:
        if number != self.change:
            return
        folder = self.trial.place / self.folder
        if self.moves:
            with contextlib.suppress(OSError):  # it is not there yet
                os.rename(folder, self.trial.gone)
        else:
            shutil.rmtree(folder, ignore_errors=True)


class SmallDisk(DiskFailure):
    """A real disk with room for fewer pages, or for fewer files, than the command needs."""

    def __init__(self, trial: DiskTrial) -> None:
        super().__init__(trial)
        usage = os.statvfs(trial.place)
        free = trial.rng.randrange(max(1, trial.pages))
        if trial.rng.random() < 0.7:
            option = f"size={(usage.f_blocks - usage.f_bfree + free) * usage.f_bsize}"
        else:
            option = f"nr_inodes={usage.f_files - usage.f_ffree + free}"
        self.text = f"{option}, {free} more than before"
        remount(trial.place.parent, option)

    def end(self) -> None:
        remount(self.trial.place.parent, "size=64m,nr_inodes=10000")


class ReadOnlyDisk(DiskFailure):
    """A real disk that is mounted read-only."""

    text = "read-only"

    def __init__(self, trial: DiskTrial) -> None:
        super().__init__(trial)
        remount(trial.place.parent, "ro")

    def end(self) -> None:
        remount(self.trial.place.parent, "rw")


MakeFailure = Callable[[DiskTrial], DiskFailure]
PLANTED: dict[str, MakeFailure] = {
    "full": PlantedErrors,
    "read-only": ReadOnly,
    "turns read-only": TurnsReadOnly,
    "failing fsync": FailingSync,
    "size limit of files": SizeLimit,
    "vanishing folder": Vanishing,
}
MOUNTED: dict[str, MakeFailure] = {"full, mounted": SmallDisk, "read-only, mounted": ReadOnlyDisk}


def remount(folder: Path, options: str) -> None:
    """Raises CalledProcessError."""
    command = ["mount", "-o", f"remount,{options}", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Yields whether this user may mount a disk of its own at `folder`; unmounts it at the end."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=10000", "influence", str(folder)]
    try:
        mounted = not subprocess.run(command, capture_output=True).returncode
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
