"""The flags, each written once: the same word means the same in every command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from influence_cli.methods.table import METHODS, describe_methods, describe_parts

DEFAULT_METHOD = next(iter(METHODS))

RUN, RANKED, NUMBERS, OUT = "The run", "What is scored", "Numbers", "Output"


def option(*names: str, help: str, panel: str, metavar: str | None = None):
    """A flag. `[default: x]` in its help is text, not rich's markup. `metavar`: what a value is
    called; a switch has none, and "" keeps typer from showing `<bool>`.
    """
    text = help.replace("[default", r"\[default")
    return Option(*names, help=text, rich_help_panel=panel, metavar=metavar or "")


Run = Annotated[
    Path,
    Argument(
        metavar="RUN",
        help="Folder of the run. influence runs the Python code of its definition.py.",
        show_default=".",
    ),
]
Definition = Annotated[
    Path | None,
    option(
        "--definition",
        metavar="FILE",
        panel=RUN,
        help="Definition to use instead of RUN/definition.py.",
    ),
]
Checkpoints = Annotated[
    Path | None,
    option(
        "--checkpoints",
        metavar="DIR",
        panel=RUN,
        help="Checkpoint folder to use instead of RUN/checkpoints.",
    ),
]
Trajectory = Annotated[
    Path | None,
    option(
        "--trajectory",
        metavar="FILE",
        panel=RUN,
        help="Trajectory to use instead of RUN/trajectory.jsonl.",
    ),
]
Cache = Annotated[
    str | None,
    option(
        "--cache",
        metavar="DIR|none",
        panel=RUN,
        help="Cache folder to use instead of RUN/.influence. none: store nothing.",
    ),
]
Shard = Annotated[
    str | None,
    option(
        "--shard",
        metavar="i/n|auto",
        panel=RUN,
        help="Score only shard i of n of the training examples. auto, auto/n: take i "
        "and n from the job array.",
    ),
]
Steps = Annotated[
    str | None,
    option(
        "--steps",
        metavar="SPEC",
        panel=RANKED,
        help="Checkpoints to use, by step: 100,200 or 100:300 (without 300). [default: all]",
    ),
]
Layers = Annotated[
    list[str] | None,
    option(
        "--layers",
        metavar="GLOB",
        panel=RANKED,
        help="Parameters or modules to use; '!GLOB' leaves some out. Repeatable. [default: all]",
    ),
]
Train = Annotated[
    str | None,
    option(
        "--train",
        metavar="SPEC",
        panel=RANKED,
        help="Training examples to rank: 0,5,10:20, @ids.txt or - (stdin). [default: all]",
    ),
]
Queries = Annotated[
    str | None,
    option(
        "--queries",
        metavar="SPEC",
        panel=RANKED,
        help="Queries to explain: 0,5,10:20, @ids.txt or - (stdin). [default: all]",
    ),
]
Method = Annotated[
    str,
    option(
        "--method",
        metavar="NAME",
        panel=RANKED,
        help=describe_methods(METHODS),
    ),
]
SumQueries = Annotated[
    bool, option("--sum-queries", panel=RANKED, help="Score the mean of all queries, as one query.")
]
GroupBy = Annotated[
    str | None,
    option(
        "--group-by",
        metavar="label|FILE",
        panel=RANKED,
        help="Sum scores per group: by label, or by a file with one group name per line.",
    ),
]
By = Annotated[
    str | None,
    option(
        "--by",
        metavar="PART",
        panel=RANKED,
        help=f"One row per part of each score; parts sum to it. {describe_parts()}.",
    ),
]
Aggregate = Annotated[
    str | None,
    option(
        "--aggregate",
        metavar="HOW",
        panel=RANKED,
        help="How a score is made from its layers. sum; rank: their mean rank; vote:K: layers with "
        "it in their top K minus those with it in their bottom K. [default: sum; vote is vote:10]",
    ),
]
Normalize = Annotated[
    bool,
    option(
        "--normalize",
        panel=NUMBERS,
        help="Use the cosine instead of the inner product at each checkpoint.",
    ),
]
Lr = Annotated[
    float | None,
    option("--lr", metavar="X", panel=NUMBERS, help="Learning rate of all checkpoints."),
]
LrWeights = Annotated[
    str | None,
    option(
        "--lr-weights", metavar="HOW", panel=NUMBERS,
        help="Weight of a checkpoint. point: its learning rate; segment: the sum of "
"rates since the previous checkpoint; none: 1. [default: point]",
    ),
]  # fmt: skip
Device = Annotated[
    str,
    option(
        "--device", panel=NUMBERS, metavar="NAME", help="Device: auto, cpu, cuda, cuda:N or mps."
    ),
]
BatchSize = Annotated[
    str,
    option(
        "--batch-size",
        panel=NUMBERS,
        metavar="N",
        help="Examples per batch: a number, or auto.",
    ),
]
Precision = Annotated[
    str | None,
    option(
        "--precision",
        panel=NUMBERS,
        metavar="DTYPE",
        help="Cast model and batches to float32, float64 or bfloat16; tf32: float32, multiplied "
        "in TF32 on an NVIDIA GPU. [default: the model's]",
    ),
]
StoreAs = Annotated[
    str | None,
    option(
        "--store",
        panel=NUMBERS,
        metavar="DTYPE",
        help="Number format on disk: float64, float32, float16, bfloat16 or int8. "
        "[default: the precision]",
    ),
]
Project = Annotated[
    int | None,
    option(
        "--project",
        panel=NUMBERS,
        metavar="K",
        help="Store K numbers per parameter instead of exact gradients.",
    ),
]
ProjectionKind = Annotated[
    str | None,
    option(
        "--projection",
        panel=NUMBERS,
        metavar="KIND",
        help="Projection for --project: tensor-sketch, sparse, khatri-rao or "
        "kronecker. [default: tensor-sketch]",
    ),
]
TargetCorrelation = Annotated[
    float | None,
    option(
        "--target-correlation",
        metavar="R",
        panel=NUMBERS,
        help="Find the smallest --project K whose scores reach this correlation with "
        "exact scores (Spearman and Pearson). K is doubled until it does.",
    ),
]
ProjectionSeed = Annotated[
    int | None,
    option(
        "--seed",
        panel=NUMBERS,
        metavar="N",
        help="Random seed for projections, labels of --fisher true, and what evaluate draws. "
        "[default: 0]",
    ),
]
Top = Annotated[
    str,
    option(
        "--top",
        panel=OUT,
        metavar="N|all",
        help="Number of proponents and of opponents per query, or all.",
    ),
]
Sort = Annotated[
    str | None,
    option(
        "--sort",
        panel=OUT,
        metavar="score|loss",
        help="Column that ranks the rows of self. loss: at the last checkpoint of --steps. "
        "[default: score]",
    ),
]
Format = Annotated[
    str | None,
    option(
        "--format",
        panel=OUT,
        metavar="NAME",
        help="Output format: table, csv, tsv, jsonl or parquet. [default: table in a "
        "terminal, csv in a pipe]",
    ),
]
Output = Annotated[
    Path | None,
    option(
        "-o",
        "--output",
        panel=OUT,
        metavar="FILE",
        help="Write to FILE instead of stdout. FILE appears only when it is complete.",
    ),
]
Verify = Annotated[
    bool,
    option(
        "--verify",
        panel=RUN,
        help="Compare all that is read from the cache, and checkpoints, with their checksums.",
    ),
]
SafeCells = Annotated[
    bool,
    option(
        "--safe-cells",
        panel=OUT,
        help="Write ' before each csv or tsv text that a spreadsheet would run as a formula.",
    ),
]
Quiet = Annotated[bool, option("--quiet", panel=OUT, help="Print no progress and no notes.")]
Debug = Annotated[bool, option("--debug", panel=OUT, help="Show the stack trace of an error.")]


@dataclass(frozen=True)
class Shared:
    """The flags of every command that opens a run, as the user gave them."""

    run: Run = Path(".")
    steps: Steps = None
    layers: Layers = None
    precision: Precision = None
    store: StoreAs = None
    project: Project = None
    projection: ProjectionKind = None
    seed: ProjectionSeed = None
    device: Device = "auto"
    batch_size: BatchSize = "auto"
    definition: Definition = None
    checkpoints: Checkpoints = None
    cache: Cache = None
    quiet: Quiet = False


@dataclass(frozen=True)
class Scored:
    """The flags that say how scores are made, split and summed."""

    sum_queries: SumQueries = False
    group_by: GroupBy = None
    by: By = None
    lr: Lr = None
    lr_weights: LrWeights = None
    normalize: Normalize = False
    aggregate: Aggregate = None


@dataclass(frozen=True)
class Shown:
    """The flags of every command that prints a ranked table."""

    top: Top = "10"
    format: Format = None
    output: Output = None
    safe_cells: SafeCells = False
