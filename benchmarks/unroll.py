"""Unroll against its floor: one forward and backward pass over the step's batch.

python benchmarks/unroll.py [w1 w2 w3 w4] [--queries 1 8] [--curvature hessian] [--replay]

The workloads' models, a made-up order of training of a few steps; the queries' gradients are cached before. Seconds of the whole job by
steps and queries, over the floor of the same batches, both in turns; peak memory of the whole process.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from common import fresh, interleaved, machine, opened, peak_mb, workload

from influence_cli.extraction.batch_curvature import BatchCurvature
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.table import METHODS
from influence_cli.output.ranking import TopRanking
from influence_cli.run.learning_rates import weigh_checkpoints

JOBS = {"w1": (256, 16), "w2": (32, 4), "w3": (32, 4), "w4": (8, 3)}  # batch, steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=list(JOBS))
    parser.add_argument("--queries", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--curvature", default="hessian")
    parser.add_argument("--replay", action="store_true")
    flags = parser.parse_args()
    print(machine())
    print(f"curvature {flags.curvature}{', replay' * flags.replay}\n")
    print(
        "| workload | batch | queries | a step's floor | a step back | x floor, per query | peak MB |\n|---|---|---|---|---|---|---|"
    )
    for name in flags.workloads:
        batch, steps = JOBS[name]
        with workload(name) as (work, run):
            batches = trajectory(run, len(work.xtr), steps, batch)
            if flags.curvature == "gauss-newton":
                with (run / "definition.py").open("a") as file:
                    file.write("\ndef outputs(model, batch): return model(batch[0])\n")
                    file.write(
                        "def loss_from_outputs(outputs, batch): return W.loss_each(outputs, batch[1])\n"
                    )
            live = opened(run, str(run / ".influence"))
            values = METHODS["unroll"].options(curvature=flags.curvature, replay=flags.replay)
            weights = tuple(weigh_checkpoints(live.checkpoints, None, "none"))

            def floor(work=work, batches=batches) -> float:
                started = time.perf_counter()
                for ids in batches:
                    loss = work.loss_each(work.model(work.xtr[ids]), work.ytr[ids]).mean()
                    torch.autograd.grad(loss, list(work.model.parameters()))
                return time.perf_counter() - started

            BatchCurvature.check = lambda self: None  # once a job, of four examples
            for queries in flags.queries:
                question = ScoreRequest(
                    live.checkpoints,
                    weights,
                    live.columns,
                    range(len(work.xtr)),
                    range(queries),
                    options=values,
                )

                def job(live=live, question=question) -> float:
                    gradients = fresh(live, "kept")
                    started = time.perf_counter()
                    for answer in METHODS["unroll"].score(
                        gradients, question, lambda width, parts: TopRanking(width, parts, 10)
                    ):
                        list(answer.ranking.entries(0))
                    return time.perf_counter() - started

                job()
                best = interleaved({"floor": floor, "unroll": job}, 3)
                command = [
                    str(Path(torch.__file__).parents[4] / "bin" / "influence"),
                    "score",
                    str(run),
                    "--method",
                    "unroll",
                    "--quiet",
                ]
                more = ["--replay"] if flags.replay else []
                _, peak = peak_mb(
                    [*command, "--queries", f"0:{queries}", "--curvature", flags.curvature, *more]
                )
                print(
                    f"| {name} | {batch} | {queries} | {best['floor'] / steps * 1e3:.1f} ms | {best['unroll'] / steps * 1e3:.1f} ms "
                    f"| {best['unroll'] / best['floor'] / queries:.2f} | {peak:,.0f} |",
                    flush=True,
                )


def trajectory(run: Path, examples: int, steps: int, batch: int) -> list[list[int]]:
    """A first checkpoint at 0 and the same at the end; the batches of a training that never was."""
    order = torch.Generator().manual_seed(0)
    batches = [torch.randperm(examples, generator=order)[:batch].tolist() for _ in range(steps)]
    head = {
        "format": "influence-trajectory",
        "version": 1,
        "reduction": "mean",
        "optimizer": {"name": "sgd"},
    }
    lines = [head, *({"step": t, "lr": 1e-7, "examples": ids} for t, ids in enumerate(batches))]
    (run / "trajectory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    from safetensors.torch import load_file, save_file

    paths = sorted((run / "checkpoints").iterdir())
    content = load_file(str(paths[0]))
    for path in paths:
        path.unlink()
    for step in (0, steps):
        save_file(content, str(run / "checkpoints" / f"step-{step:06d}.safetensors"))
    shutil.rmtree(run / ".influence", ignore_errors=True)
    return batches


if __name__ == "__main__":
    main()
