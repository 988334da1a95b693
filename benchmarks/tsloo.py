"""Scores of single occurrences against really training again without them: `influence evaluate RUN tsloo` on runs trained here.

python benchmarks/tsloo.py [digits faster fast relu momentum momentum-fast adamw gpt gpt-adamw] [--removals 150] [--queries 100]
    [--text FILE] [--dattri PYTHON] [--rates] [--only "replay from 5"]

digits: scikit-learn's digits (of sample_runs/digits, true labels), 64-32-10 GELU network, 60 steps of plain SGD on 32 images, rate 0.1,
float64; faster and fast: at 0.2 and 0.5; relu: with ReLU, whose kinks no first-order method sees; momentum: 0.9, at 0.01 and at 0.05;
adamw: its rate is that of the best final accuracy (--rates prints them). gpt: a character model of two blocks (--text: a text file, .gz
too), 200 steps on 16 windows, SGD with momentum or AdamW. Checkpoints: as saved, or fewer of them (`--steps`); `replay`: from five. tracin:
its part of the step's checkpoint. K: `dve --project K`. late: over the removals after the 10th step. --dattri: the python of an environment with dattri, whose
DVE then runs inside its own training loop on the same batches. In brackets: the mean loss of the queries at the end.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import machine
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
DIGITS = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Linear(64, 32), nn.{activation}(), nn.Linear(32, 10)).double()

def part(which):
    with np.load({data!r}) as arrays:
        images, labels = torch.from_numpy(arrays["images"]).double() / 16, torch.from_numpy(arrays["labels"]).long()
    return torch.utils.data.TensorDataset(images[which], labels[which])

def train_data():
    return part(slice(0, 1400))

def query_data():
    return part(slice(1400, None))

def outputs(model, batch):
    return model(batch[0])

def loss_from_outputs(outputs, batch):
    return F.cross_entropy(outputs, batch[1], reduction="none")

def loss(model, batch):
    return loss_from_outputs(outputs(model, batch), batch)
"""
GPT = """
import gzip
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

LENGTH, WIDTH, HEADS = 32, 48, 4
path = Path({data!r})
TEXT = (gzip.open(path, "rt") if path.suffix == ".gz" else path.open()).read()[:200_000]
LETTERS = sorted(set(TEXT))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(LETTERS))

    def forward(self, ids):
        x = self.letters(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))

def model():
    return Model().double()

def windows(which):
    number = {{letter: k for k, letter in enumerate(LETTERS)}}
    ids = torch.tensor([number[letter] for letter in TEXT[: len(TEXT) // (LENGTH + 1) * (LENGTH + 1)]]).view(-1, LENGTH + 1)
    return torch.utils.data.TensorDataset(ids[which])

def train_data():
    return windows(slice(0, 2000))

def query_data():
    return windows(slice(2000, 2200))

def outputs(model, batch):
    return model(batch[0][:, :-1])

def loss_from_outputs(outputs, batch):
    return F.cross_entropy(outputs.transpose(1, 2), batch[0][:, 1:], reduction="none").mean(1)

def loss(model, batch):
    return loss_from_outputs(outputs(model, batch), batch)
"""
RUNS = {  # definition, steps, batch, optimizer, rate, torch's options
    "digits": (DIGITS, 60, 32, "SGD", 0.1, {}),
    "faster": (DIGITS, 60, 32, "SGD", 0.2, {}),
    "fast": (DIGITS, 60, 32, "SGD", 0.5, {}),
    "relu": (DIGITS, 60, 32, "SGD", 0.1, {}),
    "momentum": (DIGITS, 60, 32, "SGD", 0.01, {"momentum": 0.9}),
    "momentum-fast": (DIGITS, 60, 32, "SGD", 0.05, {"momentum": 0.9}),
    "adamw": (DIGITS, 60, 32, "AdamW", 0.03, {}),
    "gpt": (GPT, 200, 16, "SGD", 0.1, {"momentum": 0.9}),
    "gpt-adamw": (GPT, 200, 16, "AdamW", 0.01, {}),
}
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)


def trained(name: str, folder: Path, data: str, rate: float | None = None) -> tuple[float, float]:
    """Writes a run folder: every step's parameters and the trajectory. Returns the queries' mean loss and accuracy at its end."""
    text, steps, batch, kind, usual, options = RUNS[name]
    rate = rate or usual
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "definition.py").write_text(
        text.format(data=data, activation="ReLU" if name == "relu" else "GELU")
    )
    space: dict = {}
    exec((folder / "definition.py").read_text(), space)
    torch.manual_seed(0)
    model, examples = space["model"](), space["train_data"]()
    optimizer = getattr(torch.optim, kind)(model.parameters(), rate, **options)
    order = torch.Generator().manual_seed(1)
    head = {
        "format": "influence-trajectory",
        "version": 1,
        "reduction": "mean",
        "optimizer": {"name": kind.lower(), **options},
    }
    lines = [head]
    for step in range(steps + 1):
        save_file(dict(model.state_dict()), folder / "checkpoints" / f"step-{step:06d}.safetensors")
        if step < steps:
            ids = torch.randperm(len(examples), generator=order)[:batch].tolist()
            lines.append({"step": step, "lr": rate, "examples": ids})
            optimizer.zero_grad()
            space["loss"](model, [tensor[ids] for tensor in examples.tensors]).mean().backward()
            optimizer.step()
    (folder / "trajectory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    queries = space["query_data"]().tensors
    with torch.no_grad():
        outputs, answers = (
            space["outputs"](model, queries),
            queries[1] if len(queries) > 1 else queries[0][:, 1:],
        )
        return float(space["loss_from_outputs"](outputs, queries).mean()), float(
            (outputs.argmax(-1) == answers).double().mean()
        )


def settings(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """What of a run's checkpoints is used, and by which methods."""
    steps, adam = RUNS[name][1], RUNS[name][3] != "SGD"

    def every(n: int) -> str:
        return ",".join(map(str, [*range(0, steps, n), steps]))

    five = ("--steps", every(steps // 4), "--replay")
    unroll, newton = ("--method", "unroll"), ("--method", "unroll", "--curvature", "gauss-newton")
    again = [
        ("replay from 5", (*unroll, *five)),
        ("replay from 5, gauss-newton", (*newton, *five)),
        ("replay from 5", ("--method", "dve", *five)),
    ]
    if adam:
        return [("every step", ("--method", "tracin", "--lr", "1")), *again]
    both = ("--method", "dve", "--method", "tracin", "--lr", "1")
    frozen = [(f"every {n}", (*unroll, "--steps", every(n))) for n in (1, 3, 6, 10)]
    projected = [
        (f"every 1, K = {k}", ("--method", "dve", "--project", str(k))) for k in (1024, 256, 64)
    ]
    return [
        *((f"every {n}", (*both, "--steps", every(n))) for n in (1, 3, 10)),
        *projected,
        *frozen,
        ("every 1, gauss-newton", newton),
        *again,
    ]


def late(run: Path, queries: int, flags: tuple[str, ...]) -> float:
    """Mean Spearman over the removals after the 10th step, of scores by step."""
    from influence_cli.evaluate.correlation import spearman

    file = next((run / ".influence" / "evaluate").glob("*.jsonl"))
    removed = [
        record
        for record in map(json.loads, file.read_text().splitlines())
        if "truth" in record and record["step"] >= 10
    ]
    ids = ",".join(sorted({str(record["example"]) for record in removed}))
    command = [
        sys.executable,
        "-m",
        "influence_cli",
        "score",
        str(run),
        "--top",
        "all",
        "--by",
        "step",
        "--quiet",
        "--format",
        "csv",
    ]
    done = subprocess.run(
        [*command, "--train", ids, "--queries", f"0:{queries}", *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    scores: dict[tuple[int, int], dict[int, float]] = {}
    for row in csv.DictReader(io.StringIO(done.stdout)):
        scores.setdefault((int(row["step"]), int(row["train"])), {})[int(row["query"])] = float(
            row["score"]
        )
    found = np.array(
        [
            [scores[record["step"], record["example"]][query] for query in range(queries)]
            for record in removed
        ]
    )
    truth = np.array([record["truth"] for record in removed])
    return float(np.mean([spearman(a, b) for a, b in zip(found.T, truth.T, strict=True)]))


def evaluated(run: Path, removals: int, queries: int, *flags: str) -> dict[str, dict[str, str]]:
    """method -> figure -> value, of the real command. The method "": what an error says."""
    command = [
        sys.executable,
        "-m",
        "influence_cli",
        "evaluate",
        str(run),
        "tsloo",
        "--removals",
        str(removals),
    ]
    done = subprocess.run(
        [*command, "--queries", f"0:{queries}", *flags, "--format", "csv"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.splitlines()
        return {"": {"error": lines[-3 if len(lines) > 2 else -1]}}
    rows_by_method: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(done.stdout)):
        rows_by_method.setdefault(row["method"], {})[row["figure"]] = row["value"]
    return rows_by_method


def of_dattri(
    python: str, run: Path, queries: int, removals: list[tuple[int, int]], truth: np.ndarray
) -> tuple[np.ndarray, float]:
    """(Q, 2) Spearman and Pearson of its scores, and its seconds."""
    from influence_cli.evaluate.correlation import pearson, spearman

    out = run / "dattri.npz"
    subprocess.run(
        [
            python,
            str(HERE / "peers" / "dattri_dve.py"),
            str(run),
            str(out),
            "--queries",
            str(queries),
        ],
        check=True,
    )
    found = np.load(out)
    place = {
        pair: k
        for k, pair in enumerate(
            zip(found["step"].tolist(), found["example"].tolist(), strict=True)
        )
    }
    scores = found["scores"][[place[removal] for removal in removals]]
    return np.array(
        [[spearman(a, b), pearson(a, b)] for a, b in zip(scores.T, truth.T, strict=True)]
    ), float(found["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", default=["digits", "faster", "fast", "relu", "momentum", "adamw"]
    )
    parser.add_argument("--removals", type=int, default=150)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--text")
    parser.add_argument("--dattri")
    parser.add_argument("--only", help="one row of the checkpoints: 'every 6', 'replay from 5'")
    parser.add_argument(
        "--rates", action="store_true", help="what each rate ends with, and no more"
    )
    flags = parser.parse_args()
    print(machine())
    print(f"{flags.removals} removals, {flags.queries} queries\n")
    columns = "run, checkpoints, method, mean Spearman, mean Pearson, pooled Spearman, pooled Pearson, late Spearman, seconds, effect / noise"
    print(f"| {' | '.join(columns.split(', '))} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in flags.runs:
        data = (
            flags.text
            if name.startswith("gpt")
            else str(HERE.parent / "sample_runs" / "digits" / "digits.npz")
        )
        if data is None:
            parser.error("gpt needs --text FILE")
        for rate in RATES if flags.rates else ():
            with tempfile.TemporaryDirectory(prefix="influence-rates-") as place:
                loss, accuracy = trained(name, Path(place) / "run", data, rate)
            print(f"{name}: rate {rate}: loss {loss:.3f}, accuracy {accuracy:.3f}", flush=True)
        if flags.rates:
            continue
        with tempfile.TemporaryDirectory(prefix=f"influence-tsloo-{name}-") as place:
            run = Path(place) / "run"
            loss, _ = trained(name, run, data)
            for label, given in settings(name):
                if flags.only and flags.only != label:
                    continue
                started = time.perf_counter()
                found = evaluated(run, flags.removals, flags.queries, *given)
                seconds = time.perf_counter() - started
                sizes = found.pop("retraining", {})
                for method, figures in found.items():
                    if not method:  # an error
                        print(
                            f"| {name} ({loss:.2f}) | {label} | {given[1]} | {figures['error']} |",
                            flush=True,
                        )
                        continue
                    names = ("spearman", "pearson", "pooled-spearman", "pooled-pearson")
                    numbers = " | ".join(
                        f"{float(figures[name]):.4f}" if figures.get(name) else "-"
                        for name in names
                    )
                    if "unroll" in given:
                        numbers += f" | {late(run, flags.queries, given):.4f} | {seconds:.0f} s"
                    else:
                        numbers += " | | "
                    noise = max(1e-300, float(sizes["noise"]))
                    ratio = f"{float(sizes['effect']) / noise:.1e}"
                    print(
                        f"| {name} ({loss:.2f}) | {label} | {method} | {numbers} | {ratio} |",
                        flush=True,
                    )
            if flags.dattri and name != "gpt":
                file = next((run / ".influence" / "evaluate").glob("*.jsonl"))
                records = [json.loads(line) for line in file.read_text().splitlines()]
                removed = [record for record in records if "truth" in record]
                truth = np.array([record["truth"] for record in removed])
                pairs = [(record["step"], record["example"]) for record in removed]
                command = [
                    sys.executable,
                    "-m",
                    "influence_cli",
                    "score",
                    str(run),
                    "--method",
                    "dve",
                    "--queries",
                    f"0:{flags.queries}",
                ]
                started = time.perf_counter()
                subprocess.run(
                    [*command, "--cache", "none", "--quiet"], stdout=subprocess.DEVNULL, check=True
                )
                ours = time.perf_counter() - started
                means, seconds = of_dattri(flags.dattri, run, flags.queries, pairs, truth)
                pair = f"{means[:, 0].mean():.3f} | {means[:, 1].mean():.3f}"
                print(
                    f"| {name} | its own loop | dattri DVE | {pair} | | | {seconds:.1f} s; ours, whole process, {ours:.1f} s |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
