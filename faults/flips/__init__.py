"""Flipped bits in every kind of stored file: detected, harmless (an equal table), or silent.

Each flip asks two commands: the one that uses the file, with --verify where it has that, and
`check`. A flip is detected where one of them fails or prints a note that it did not print before.
"""

import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from faults.flips.kinds import KINDS, Kind, kept_progress
from faults.forks import import_package
from faults.session import Outcome, Snapshot, run_inside
from faults.tally import Clock, Tally
from influence_cli.cache.identity import describe_state
from influence_cli.storage.atomic import read_json, write_json
from influence_cli.storage.safetensors_io import TensorFile

WORKERS = 2
ALL_HEADERS = 18_000  # divided by the count of body flips: every nth header byte is flipped
EDGE = 2048  # bytes at each end of a table that count as its header
Flip = tuple[Path, int]  # a file and the position of a byte


class FlipTrials:
    """One kind of file in a folder of its own: the table without flips, and trials."""

    def __init__(self, kind: Kind, folder: Path, rng: random.Random) -> None:
        self.kind, self.rng, self.place = kind, rng, folder / "place"
        kind.build(self.place)
        with kept_progress(kind):
            for arguments in kind.make:
                self._run_undisturbed(arguments)
        self.files = sorted(path for path in self.place.glob(kind.pattern) if path.is_file())
        if not self.files:
            raise RuntimeError(f"{kind.name}: no file is {kind.pattern}")
        self.snapshot = Snapshot(self.place, folder / "copy")
        self.plain = [self._run_undisturbed(kind.use)]
        self.wanted = (self.place / "table.csv").read_bytes()
        self.plain.append(self._run_undisturbed(kind.check))
        self.snapshot.restore()
        if self._ask() != (False, self.wanted):
            raise RuntimeError(f"{kind.name}: a second run without a flip differs")
        self.snapshot.restore()

    def _run_undisturbed(self, arguments: tuple[str, ...]) -> Outcome:
        outcome = run_inside(arguments, self.place)
        if outcome.code:
            raise RuntimeError(f"{' '.join(arguments)} fails undisturbed: {outcome.err}")
        return outcome

    def headers(self, stride: int) -> Iterator[Flip]:
        """Every byte of the header of one file of each sort; of a table or text both ends."""
        if self.kind.suffix:
            return
        for path in one_of_each_sort(self.files):
            size = path.stat().st_size
            positions = [*range(min(size, EDGE)), *range(max(size - EDGE, EDGE), size)]
            if path.suffix == ".safetensors":
                positions = list(range(8 + int.from_bytes(path.read_bytes()[:8], "little")))
            yield from ((path, at) for at in positions[self.rng.randrange(stride) :: stride])

    def body(self) -> Flip:
        """A random byte of a random tensor, or of a file that holds no tensors."""
        path = self.rng.choice(self.files)
        if path.suffix != ".safetensors":
            return path, self.rng.randrange(path.stat().st_size)
        with TensorFile(path) as file:
            spans = [
                entry
                for name, entry in file.entries.items()
                if name.endswith(self.kind.suffix) and entry.stop > entry.start
            ]
        span = self.rng.choice(spans)
        return path, self.rng.randrange(span.start, span.stop)

    def flip(self, flip: Flip, tally: Tally) -> None:
        path, at = flip
        bit = self.rng.randrange(8)
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << bit
        path.write_bytes(content)
        if self.kind.keeps_times:
            keep_time_stamps(self.place / "run/.influence/checkpoints.json", path)
        trial = f"{self.kind.name}: bit {bit} of byte {at} of {path.relative_to(self.place)}"
        detected, table = self._ask(tally, trial)
        tally.tried += 1
        if detected:
            tally.refused += 1
        elif table != self.wanted:
            tally.fault("silent", f"another table ({path.name})", trial)
        self.snapshot.restore()

    def _ask(self, tally: Tally | None = None, trial: str = "") -> tuple[bool, bytes]:
        """Whether one of the two commands detects something, and the table."""
        table, detected = self.place / "table.csv", False
        table.unlink(missing_ok=True)
        for arguments, plain in zip((self.kind.use, self.kind.check), self.plain, strict=True):
            outcome = run_inside(arguments, self.place)
            if tally is not None and outcome.has_fault:
                last = (outcome.err.strip().splitlines() or ["nothing"])[-1][:80]
                kind = "hang" if outcome.code is None else "traceback"
                tally.fault(kind, last, f"{trial}\n{outcome.err[-2000:]}")
            detected |= outcome.code != 0 or bool(outcome.notes - plain.notes)
        return detected, table.read_bytes() if table.is_file() else b""


def keep_time_stamps(memory: Path, path: Path) -> None:
    """Enter the digests of a file under its present state, as if it had never changed."""
    known = read_json(memory)
    (old,) = (key for key in known if key.startswith(f"{path.resolve()}:"))
    digests = known.pop(old)
    write_json(memory, known | {describe_state(path): digests})


def one_of_each_sort(files: list[Path]) -> list[Path]:
    """One file of each sort: names that differ in digits only are of one sort."""
    sorts = {"".join("0" if c.isdigit() else c for c in path.name): path for path in files}
    return list(sorts.values())


def run_kind(name: str, count: int, stride: int, seconds: float, seed: int) -> Tally:
    """`count` body flips, and every `stride`th byte of headers."""
    kind = next(kind for kind in KINDS if kind.name == name)
    rng, clock = random.Random(f"{seed} {name}"), Clock(seconds)
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
    tally = Tally(f"flips: {name}")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        trials = FlipTrials(kind, Path(folder), rng)
        flips: list[Flip | None] = [*trials.headers(stride), *([None] * count)]
        rng.shuffle(flips)  # in turns, should time be short
        tally.target = len(flips)
        for flip in flips:
            if clock.is_over:
                break
            trials.flip(flip or trials.body(), tally)
    tally.seconds = clock.seconds
    return tally


def run_flips(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    """About `count` body flips over all kinds, and header bytes, in two processes.

    A kind that begins gets its part, by its effort, of the time that is left.
    """
    import_package()
    stride = max(1, ALL_HEADERS // count)
    each = -(-count // len(KINDS))
    deadline = time.monotonic() + seconds
    waiting, running, tallies = list(KINDS), dict[Future[Tally], Kind](), dict[str, Tally]()
    while waiting or running:
        while waiting and len(running) < WORKERS:
            effort = sum(kind.effort for kind in waiting)
            kind = waiting.pop(0)
            left = max(0.0, deadline - time.monotonic())
            share = min(left, WORKERS * left * kind.effort / effort)
            # a process of its own, which may crash
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
            running[pool.submit(run_kind, kind.name, each, stride, share, seed)] = kind
            pool.shutdown(wait=False)
        for run in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(run).name
            try:
                tallies[name] = run.result()
            except BrokenProcessPool as error:
                tallies[name] = Tally(f"flips: {name}")
                tallies[name].crash(error, name)
    return [tallies[kind.name] for kind in KINDS]
