"""DVE in query form against what bounds it: reading the gradients once, and 4 Q p operations an occurrence.

python benchmarks/dve.py [--queries 10 100] [--steps 60] [--batch 64]

W1 (MLP, p = 0.54 M), its checkpoints and a made-up order of training. cached: gradients are there; `read` is what reading each segment's
examples takes, `products` the two matrix products of every step on dense random numbers of that size. Peak memory of the whole process.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from common import fresh, machine, opened, peak_mb, workload

from influence_cli.methods.dve import DveOptions
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.reverse.plan import build_plan
from influence_cli.methods.table import METHODS
from influence_cli.output.ranking import TopRanking
from influence_cli.run.learning_rates import weigh_checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    flags = parser.parse_args()
    print(machine())
    print(
        "| queries | occurrences | read | products | dve | dve / max(read, products) | peak MB |\n|---|---|---|---|---|---|---|"
    )
    with workload("w1") as (work, run):
        trajectory(run, len(work.xtr), flags.steps, flags.batch)
        live = opened(run, str(run / ".influence"))
        for queries in flags.queries:
            question = ScoreRequest(
                live.checkpoints, tuple(weigh_checkpoints(live.checkpoints, None, "none")), live.columns, range(len(work.xtr)), range(queries),
                options=DveOptions(form="query"),
            )  # fmt: skip
            score(live, question)
            best = [
                min(job() for _ in range(3))
                for job in (
                    lambda q=question: read(live, q),
                    lambda q=queries: products(work, flags, q),
                )
            ]
            seconds = min(score(live, question) for _ in range(3))
            command = [
                str(Path(torch.__file__).parents[4] / "bin" / "influence"),
                "score",
                str(run),
                "--method",
                "dve",
                "--quiet",
            ]
            _, peak = peak_mb([*command, "--queries", f"0:{queries}"])
            print(
                f"| {queries} | {flags.steps * flags.batch:,} | {best[0]:.2f} s | {best[1]:.2f} s | {seconds:.2f} s "
                f"| {seconds / max(best):.2f} | {peak:,.0f} |",
                flush=True,
            )


def trajectory(run: Path, examples: int, steps: int, batch: int) -> None:
    """Checkpoints at 0, 1/2 and the end of a training that never was: time does not depend on it."""
    head = {
        "format": "influence-trajectory",
        "version": 1,
        "reduction": "mean",
        "optimizer": {"name": "sgd"},
    }
    order = torch.Generator().manual_seed(0)
    lines = [
        head,
        *(
            {
                "step": t,
                "lr": 1e-3,
                "examples": torch.randperm(examples, generator=order)[:batch].tolist(),
            }
            for t in range(steps)
        ),
    ]
    (run / "trajectory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    from safetensors.torch import load_file, save_file

    for k, path in enumerate(sorted((run / "checkpoints").iterdir())):
        content = load_file(str(path))
        path.unlink()
        save_file(content, str(run / "checkpoints" / f"step-{k * steps // 2:06d}.safetensors"))


def score(live, question: ScoreRequest) -> float:
    started = time.perf_counter()
    for answer in METHODS["dve"].score(
        fresh(live, "kept"), question, lambda width, parts: TopRanking(width, parts, 10)
    ):
        for query in range(answer.ranking.queries):
            list(answer.ranking.entries(query))
    return time.perf_counter() - started


def read(live, question: ScoreRequest) -> float:
    gradients, started = fresh(live, "kept"), time.perf_counter()
    plan = build_plan(live.run, question.checkpoints, question.columns)
    for segment in plan.segments:
        for _ in gradients.read(
            "train", segment.checkpoint, list(question.columns), plan.examples(segment)
        ):
            pass
    return time.perf_counter() - started


def products(work, flags: argparse.Namespace, queries: int) -> float:
    """G V^T and W^T G of every step, layer by layer."""
    sizes = [parameter.numel() for parameter in work.model.parameters()]
    pairs = [(torch.randn(flags.batch, size), torch.randn(queries, size)) for size in sizes]
    weights = torch.randn(queries, flags.batch)
    started = time.perf_counter()
    for _ in range(flags.steps):
        for gradients, directions in pairs:
            gradients @ directions.T
            directions.addmm_(weights, gradients, alpha=1e-9)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
