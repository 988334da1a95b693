"""`influence` in forks of the test's process: processes of their own that need not import torch.

An import of torch takes 2 seconds. A fork shares patches of the test, too. What a process does at
its start (arguments, signals, streams) is tested with real processes, in tests/cli.
"""

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from faults.forks import PATIENCE, Ended, ForkedCommand
from faults.ranks import ForkedAgent
from influence_cli import cli


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

        cli.register()
        self.ended: Ended | None = None
        super().__init__([str(word) for word in arguments], place, name, start, environment)

    def poll(self) -> Ended | None:
        self.ended = self.ended or super().poll()
        return self.ended

    def kill(self, number: int) -> None:
        if self.poll() is None:
            super().kill(number)


def run_fork(*arguments: object, place: Path, **options: object) -> Ended:
    return Job(*arguments, place=place, **options).wait()  # type: ignore[arg-type]  # Job's own


def run_ranks(count: int, *arguments: object, place: Path) -> Ended:
    """Ranks of one job, connected as torchrun connects them. One fails: the first failure's end."""
    with ForkedAgent() as connection:
        size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        jobs = [
            Job(
                *arguments, place=place, name=f"rank-{rank}",
                environment={**connection, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]  # fmt: skip
        start = time.monotonic()
        while any(job.poll() is None for job in jobs) and time.monotonic() - start < PATIENCE:
            time.sleep(0.005)
        ends = [job.wait() for job in jobs]
    codes = [ended.code for ended in ends if ended.code != 0]
    texts = ["".join(getattr(ended, name) for ended in ends) for name in ("err", "out")]
    return Ended(codes[0] if codes else 0, *texts)
