"""`influence` in forks of the test's process: processes of their own that need not import torch.

An import of torch takes 2 seconds. A fork shares patches of the test, too. What a process does at
its start (arguments, signals, streams) is tested with real processes, in tests/cli.
"""

import gc
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from faults.forks import PATIENCE, Ended, ForkedCommand
from faults.ranks import NOTICE_SECONDS, ForkedAgent
from tests.conftest import build_command


class Job(ForkedCommand):
    """A running command. Its output goes to files of `place`, its working folder."""

    def __init__(
        self,
        *arguments: object,
        place: Path,
        name: str = "0",
        prepare: Callable[[], object] = lambda: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        def start() -> None:
            gc.freeze()  # the objects of the test's process: their collection takes a second
            prepare()

        command = build_command()
        self.ended: Ended | None = None
        words = [str(word) for word in arguments]
        super().__init__(words, place, name, start, environment, main=command)

    def poll(self) -> Ended | None:
        self.ended = self.ended or super().poll()
        return self.ended

    def kill(self, number: int) -> None:
        if self.poll() is None:
            super().kill(number)


def run_fork(*arguments: object, place: Path, **options: object) -> Ended:
    return Job(*arguments, place=place, **options).wait()  # type: ignore[arg-type]  # Job's own


def run_ranks(count: int, *arguments: object, place: Path) -> Ended:
    """Ranks of one job, connected and stopped as torchrun does it. `code`: the first failure's."""
    with ForkedAgent() as connection:
        size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        jobs = [
            Job(
                *arguments, place=place, name=f"rank-{rank}",
                environment={**connection, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]  # fmt: skip
        start, ends = time.monotonic(), [job.poll() for job in jobs]
        while None in ends and time.monotonic() - start < PATIENCE:
            time.sleep(0.005)
            ends = [job.poll() for job in jobs]
            if any(ended and ended.code for ended in ends):
                time.sleep(NOTICE_SECONDS)
                for job in jobs:
                    job.kill(signal.SIGTERM)
        results = [job.wait() for job in jobs]
    codes = [ended.code for ended in results if ended.code != 0]
    texts = ["".join(getattr(ended, name) for ended in results) for name in ("err", "out")]
    return Ended(codes[0] if codes else 0, *texts)
