"""Scores of other libraries on the same run, each in its own environment (make peers)."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / ".venv-peers"
# name in the tables -> library, job of peer_job.py, word in the run's name (gpt: many labels)
JOBS = {
    "kronfluence ekfac": ("kronfluence", "ekfac", ("gpt", "fashion", "words", "digits")),
    "kronfluence ekfac, true Fisher": ("kronfluence", "ekfac-true", ("gpt", "fashion")),
    "traker trak": ("traker", "trak", ("fashion", "words", "digits")),
}


def score_with_peers(run: Path, folder: Path, queries: int) -> dict[str, Path]:
    """The score files of the libraries that are installed. A file has the seconds beside it."""
    files = {}
    for name, (library, job, kinds) in JOBS.items():
        python = ENVIRONMENTS / library / "bin" / "python"
        if not run.parent.name.startswith(kinds):
            continue
        if not python.exists():
            print(f"{name}: not installed (make peers)", file=sys.stderr)
            continue
        files[name] = folder / f"{name.replace(' ', '-').replace(',', '')}.csv"
        if not files[name].exists():
            run_job(python, job, run, queries, files[name])
    return files


def run_job(python: Path, job: str, run: Path, queries: int, file: Path) -> None:
    """Runs the job in its environment, and writes its scores as a table of `score`."""
    weights, scores = file.with_suffix(".npz"), file.with_suffix(".npy")
    last = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    np.savez(weights, **{name: value.numpy() for name, value in load_file(last).items()})
    command = [
        str(python),
        str(HERE / "peer_job.py"),
        job,
        str(run),
        str(weights),
        str(queries),
        str(scores),
    ]
    print(f"{run.parent.name}: {job}", file=sys.stderr)
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
    file.with_suffix(".seconds").write_text(f"{time.perf_counter() - started:.2f}")
    lines = ["query,train,score\n"]
    for query, row in enumerate(np.load(scores)):
        lines += [f"{query},{train},{value!r}\n" for train, value in enumerate(row.tolist())]
    file.write_text("".join(lines))
