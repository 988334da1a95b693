"""Flipped bits in every kind of stored file: detected, harmless (equal output), or silent."""

import random
import tempfile
from pathlib import Path

from faults.forks import build_run, copy_folder, import_package, run_command
from faults.tally import Clock, Tally

KINDS: dict[str, tuple[str, ...]] = {  # flags that decide how gradients are stored
    "float32": (),
    "int8": ("--store", "int8"),
    "projected": ("--project", "4"),
    "projected int8": ("--project", "4", "--store", "int8"),
}


def list_stored_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix != "")


def try_flip(
    path: Path, at: int, bit: int, score: tuple[str, ...], place: Path, wanted: bytes, tally: Tally
) -> None:
    """Flip a bit of a file, score, and compare the table."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)
    trial = f"{' '.join(score)}: bit {bit} of byte {at} of {path.relative_to(place)}"
    table = place / "table.csv"
    table.unlink(missing_ok=True)
    ended = run_command(score, place)
    tally.tried += 1
    if ended.code is None:
        tally.fault("hang", path.suffix, f"{trial}\n{ended.err}")
    elif "Traceback" in ended.err:
        tally.fault("traceback", ended.err.strip().splitlines()[-1][:80], trial)
    elif ended.code:
        tally.refused += 1
    elif table.read_bytes() != wanted:
        tally.fault("silent", f"another table ({path.suffix[1:]})", trial)


def run_flips(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    """`count` flips of each kind, a third of them in headers."""
    import_package()
    tallies = []
    with tempfile.TemporaryDirectory() as folder:
        place, template = Path(folder) / "place", Path(folder) / "template"
        for kind, flags in KINDS.items():
            tally, rng = Tally(f"flips: {kind}", target=count), random.Random(f"{seed} {kind}")
            clock = Clock(seconds / len(KINDS))
            copy_folder(build_run(Path(folder) / kind), template / "run")
            score = ("score", "run", *flags, "--top", "all", "-o", "table.csv")
            undisturbed = run_command(score, template)
            if undisturbed.code:
                raise RuntimeError(f"score fails undisturbed: {undisturbed.err}")
            if run_command((*score, "--verify"), template).code == 0:
                score = (*score, "--verify")
            wanted = (template / "table.csv").read_bytes()
            names = [
                path.relative_to(template)
                for path in list_stored_files(template / "run/.influence")
            ]
            while tally.tried < count and not clock.is_over:
                copy_folder(template, place)
                path = place / rng.choice(names)
                size = path.stat().st_size
                header = min(size, 8 + int.from_bytes(path.read_bytes()[:8], "little"))
                stop = header if rng.random() < 1 / 3 else size
                try_flip(path, rng.randrange(stop), rng.randrange(8), score, place, wanted, tally)
            tally.seconds = clock.seconds
            tallies.append(tally)
    return tallies
