"""Files that appear whole or not at all, and what the system says when they can't."""

import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from influence_cli.errors import CacheError


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, found {type(content).__name__}")
        return content
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path} can't be read: {error}", "delete the cache folder to start afresh"
        ) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; synced and renamed over it on success, removed otherwise.

    The folder is not synced: a name that a power cut takes back is a file that is written again.
    """
    temporary = path.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the system says of a full disk or a read-only folder into a CacheError."""
    try:
        yield
    except OSError as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(
                next(path for path in (folder, *folder.parents) if path.exists())
            ).free
            raise CacheError(
                f"the disk of the cache {folder} is full ({free:,} bytes free)",
                "free some space and run the same command again: finished units are kept",
                "--cache DIR puts it elsewhere, --store float16 halves it, --cache none does without",
            ) from error
        raise CacheError(
            f"the cache {folder} can't be written: {getattr(error, 'strerror', None) or error}",
            "--cache DIR puts it elsewhere, --cache none does without",
        ) from error


def sweep(folder: Path, hours: float = 24) -> None:
    """Remove temporary files that a killed process left: of this machine where the process is gone, of others when a day old."""
    for path in folder.rglob(".tmp-*"):
        match = re.match(r"\.tmp-(.*)-(\d+)-", path.name)
        if match and match[1] == socket.gethostname():
            stale = not Path(f"/proc/{match[2]}").exists() if Path("/proc/self").exists() else False
        else:
            stale = False
        try:
            if stale or time.time() - path.stat().st_mtime > hours * 3600:
                path.unlink()
        except OSError:
            continue  # another process was faster
