"""Unroll's scores of single occurrences against the derivative by their weight of really training again, and against leaving them out.

python benchmarks/derivative.py gpt-adamw --text FILE [--steps 20 100 190]

A run of tsloo.py, float64, replayed from five checkpoints. Per occurrence: the largest difference over four queries, relative to the
largest, to central differences with w +- 1e-7; and scores beside what leaving the whole example out does.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import tsloo


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", choices=list(tsloo.RUNS))
    parser.add_argument("--text")
    parser.add_argument("--steps", type=int, nargs="*", default=[20, 100, 190])
    flags = parser.parse_args()
    _, steps, batch, kind, rate, options = tsloo.RUNS[flags.run]
    data = (
        flags.text
        if flags.run.startswith("gpt")
        else str(tsloo.HERE.parent / "sample_runs" / "digits" / "digits.npz")
    )
    with tempfile.TemporaryDirectory(prefix="influence-derivative-") as place:
        run = Path(place) / "run"
        tsloo.trained(flags.run, run, data)
        space: dict = {}
        exec((run / "definition.py").read_text(), space)
        examples, queries = (
            space["train_data"]().tensors,
            [tensor[:4] for tensor in space["query_data"]().tensors],
        )
        lines = [
            json.loads(text) for text in (run / "trajectory.jsonl").read_text().splitlines()[1:]
        ]

        def end(step: int = -1, position: int = 0, by: float = 0.0) -> torch.Tensor:
            """(4,) the queries' losses after training with one entry's weight larger."""
            torch.manual_seed(0)
            model = space["model"]()
            optimizer = getattr(torch.optim, kind)(model.parameters(), rate, **options)
            for line in lines:
                weights = torch.full((batch,), 1 / batch, dtype=torch.float64)
                weights[position] += by * (line["step"] == step)
                optimizer.zero_grad()
                (
                    weights
                    * space["loss"](model, [tensor[line["examples"]] for tensor in examples])
                ).sum().backward()
                optimizer.step()
            return space["loss"](model, queries).detach()

        picks = [(step, lines[step]["examples"][3]) for step in flags.steps]
        spec = ",".join(map(str, range(0, steps + 1, steps // 4)))
        command = [
            sys.executable,
            "-m",
            "influence_cli",
            "score",
            str(run),
            "--method",
            "unroll",
            "--replay",
            "--steps",
            spec,
        ]
        command += [
            "--by",
            "step",
            "--top",
            "all",
            "--train",
            ",".join(str(example) for _, example in picks),
            "--queries",
            "0:4",
        ]
        done = subprocess.run(
            [*command, "--quiet", "--format", "csv"], capture_output=True, text=True, check=True
        )
        found = {
            (int(r["step"]), int(r["train"]), int(r["query"])): float(r["score"])
            for r in csv.DictReader(io.StringIO(done.stdout))
        }
        base = end()
        print(
            "| step | difference to the derivative | scores | without the example |\n|---|---|---|---|"
        )
        for step, example in picks:
            scores = torch.tensor(
                [found[step, example, query] for query in range(4)], dtype=torch.float64
            )
            slope = -(end(step, 3, 1e-7) - end(step, 3, -1e-7)) / 2e-7 / batch
            apart = float((scores - slope).abs().max() / slope.abs().max())
            columns = (
                ", ".join(f"{value:.4f}" for value in values)
                for values in (scores.tolist(), (end(step, 3, -1 / batch) - base).tolist())
            )
            print(f"| {step} | {apart:.1e} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
