"""Signals to ranks: the job ends, and the same command gives the bytes of one process.

Most jobs are forks: two ranks, and an agent that does what torchrun does. It holds their store, and
stops the other rank when one has failed. A few jobs are torchrun itself.
"""

import os
import random
import shutil
import signal
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from faults.forks import Ended, ForkedCommand, copy_folder, import_package
from faults.kills import COMMANDS, KillTrials, Moment, judge_end, judge_files
from faults.runs import write_small_pieces
from faults.tally import Clock, Tally
from faults.torchrun import JOBS, TorchrunTrials

RANKED = ("cache", "score tracin", "score by layer", "score tracin-we", "score dve", "self")
FAILED = {1, 128 + signal.SIGTERM, -signal.SIGTERM}  # exit codes when the other rank is gone
NOTICE_SECONDS = 0.1  # after which torchrun stops the other ranks
SECONDS = timedelta(seconds=60)


class ForkedAgent:
    """Holds the store of a job, in a fork, until the block ends."""

    def __enter__(self) -> dict[str, str]:
        """The environment variables that connect the ranks."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.id = os.fork()
        if not self.id:
            try:
                store = dist.TCPStore("127.0.0.1", port, None, True, SECONDS, False)
                signal.pause()
                del store
            finally:
                os._exit(1)
        return {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    def __exit__(self, *_: object) -> None:
        os.kill(self.id, signal.SIGKILL)
        os.waitpid(self.id, 0)


class RankTrials(KillTrials):
    """Trials of two forks that are ranks of one job."""

    def run_ranks(self, name: str, moments: dict[int, Moment]) -> list[Ended]:
        """The ends of both ranks. `moments`: when a rank gets a signal."""
        with ForkedAgent() as shared:
            processes = []
            for rank in range(2):
                prepare = write_small_pieces
                if rank in moments:
                    prepare = moments[rank].prepare_in(self.place)
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(
                    ForkedCommand(COMMANDS[name], self.place, str(rank), prepare, shared | own)
                )
            ends = self.watch_ranks(processes, moments, self.usual[name].patience)
            # a rank that hangs prints its stacks while it still has a store
            return [ends.get(rank) or process.wait(0.0) for rank, process in enumerate(processes)]

    def watch_ranks(
        self, processes: list[ForkedCommand], moments: dict[int, Moment], patience: float
    ) -> dict[int, Ended]:
        """Send the signals, and SIGTERM to the other rank when one has failed."""
        start, failed_at = time.monotonic(), 0.0
        timed = {rank: moment for rank, moment in moments.items() if moment.change is None}
        ends: dict[int, Ended] = {}
        stopped = False
        while len(ends) < len(processes) and time.monotonic() - start < patience:
            now = time.monotonic()
            for rank, process in enumerate(processes):
                if rank in ends:
                    continue
                if (ended := process.poll()) is not None:
                    ends[rank] = ended
                    failed_at = failed_at or (now if ended.code else 0.0)
                elif rank in timed and now - start >= timed[rank].seconds:
                    process.kill(timed.pop(rank).number)
            if failed_at and now - failed_at > NOTICE_SECONDS and not stopped:
                stopped = True
                for rank in set(range(len(processes))) - ends.keys():
                    processes[rank].kill(signal.SIGTERM)
            time.sleep(0.002)
        return ends

    def try_rank(self, name: str, rng: random.Random, tally: Tally) -> None:
        usual = self.usual[name]
        copy_folder(self.template, self.place)
        rank, moment = rng.randrange(2), Moment.draw(usual, rng)
        trial = f"{name}: rank {rank}, {moment}"
        tally.tried += 1
        for at, ended in enumerate(self.run_ranks(name, {rank: moment})):
            allowed = {0, *FAILED} | (moment.codes() if at == rank else set())
            judge_end(ended, allowed, tally, trial)
        for ended in self.run_ranks(name, {}):
            judge_end(ended, {0}, tally, f"{trial}; then again")
        judge_files(self.place, usual.files, tally, trial)


def run_ranks(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    """Nine of ten jobs are forks."""
    import_package()
    clock, folder = Clock(seconds), Path(tempfile.mkdtemp())
    forked = Tally("kills: one of two ranks", target=max(1, count * 9 // 10))
    started = Tally("kills: torchrun", target=max(1, count // 10))
    try:
        trials, rng = RankTrials(folder / "forks", list(RANKED)), random.Random(f"{seed} ranks")
        while forked.tried < forked.target and clock.seconds < seconds / 2:
            trials.try_rank(RANKED[forked.tried % len(RANKED)], rng, forked)
        jobs, names = TorchrunTrials(folder / "torchrun"), list(JOBS)
        while started.tried < started.target and not clock.is_over:
            jobs.try_signal(names[started.tried % len(names)], rng, started)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [forked, started]
