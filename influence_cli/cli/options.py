"""The flags, each written once: the same word means the same in every command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from influence_cli.methods.table import METHODS

RUN, RANKED, WORDS, VALUES = (
    "The run",
    "What is scored",
    "Words (tracin-we)",
    "Order of training (dve, unroll)",
)
NUMBERS, OUT = "Numbers", "Output"
HEADINGS = (RUN, RANKED, WORDS, VALUES, NUMBERS, OUT)  # in the order of --help


def option(*names: str, help: str, panel: str, metavar: str | None = None):
    return Option(*names, help=help, rich_help_panel=panel, metavar=metavar)


Run = Annotated[
    Path,
    Argument(
        metavar="RUN", help="The run's folder. Loading its definition.py runs it.", show_default="."
    ),
]
Definition = Annotated[
    Path | None,
    option("--definition", metavar="FILE", panel=RUN, help="In place of RUN/definition.py."),
]
Checkpoints = Annotated[
    Path | None,
    option("--checkpoints", metavar="DIR", panel=RUN, help="In place of RUN/checkpoints."),
]
Trajectory = Annotated[
    Path | None,
    option("--trajectory", metavar="FILE", panel=RUN, help="In place of RUN/trajectory.jsonl."),
]
Cache = Annotated[
    str | None,
    option(
        "--cache",
        metavar="DIR|none",
        panel=RUN,
        help="In place of RUN/.influence; none: keep nothing.",
    ),
]
Shard = Annotated[
    str | None,
    option(
        "--shard",
        metavar="i/n|auto",
        panel=RUN,
        help="Only shard i of n of the training examples; auto or auto/n: as the job array says.",
    ),
]
Steps = Annotated[
    str | None,
    option(
        "--steps",
        metavar="SPEC",
        panel=RANKED,
        help="Checkpoints by step: 100,200 or 100: (default all).",
    ),
]
Layers = Annotated[
    list[str] | None,
    option(
        "--layers",
        metavar="GLOB",
        panel=RANKED,
        help="Parameters or modules, may be repeated; '!glob' leaves out (default all).",
    ),
]
Train = Annotated[
    str | None,
    option(
        "--train",
        metavar="SPEC",
        panel=RANKED,
        help="Training examples to rank: 0,5,10:20, @ids.txt or - (default all).",
    ),
]
Queries = Annotated[
    str | None,
    option(
        "--queries",
        metavar="SPEC",
        panel=RANKED,
        help="Queries: 0,5,10:20, @ids.txt or - (default all).",
    ),
]
Method = Annotated[
    str,
    option(
        "--method",
        metavar="NAME",
        panel=RANKED,
        help="; ".join(f"{n}: {m.about}" for n, m in METHODS.items()) + ".",
    ),
]
SumQueries = Annotated[
    bool, option("--sum-queries", panel=RANKED, help="All queries as one: their mean.")
]
GroupBy = Annotated[
    str | None,
    option(
        "--group-by",
        metavar="label|FILE",
        panel=RANKED,
        help="Sum the scores per group: by label, or by a file with a name per line.",
    ),
]
By = Annotated[
    str | None,
    option(
        "--by",
        metavar="PART",
        panel=RANKED,
        help="checkpoint, layer, (tracin-we) word or (dve, unroll) step: a row per part of each score; parts sum to it.",
    ),
]
Normalize = Annotated[
    bool,
    option("--normalize", panel=NUMBERS, help="Cosine instead of dot product at each checkpoint."),
]
Embedding = Annotated[
    str | None,
    option(
        "--embedding",
        metavar="NAME",
        panel=WORDS,
        help="The embedding module, where there are several.",
    ),
]
SpecialTokens = Annotated[
    str,
    option(
        "--special-tokens",
        metavar="HOW",
        panel=WORDS,
        help="keep, drop or only: tokens that token(id) writes like [CLS] or <s>.",
    ),
]
PadId = Annotated[
    int | None,
    option(
        "--pad-id",
        metavar="ID",
        panel=WORDS,
        help="A token that never counts (padding_idx never does).",
    ),
]
TopWords = Annotated[
    int | None,
    option(
        "--top-words",
        metavar="K",
        panel=WORDS,
        help="Only the K words of each text with the largest gradient.",
    ),
]
Synonyms = Annotated[
    int | None,
    option(
        "--synonyms",
        metavar="K",
        panel=WORDS,
        help="Also the K tokens nearest to each of the query's, in embedding space.",
    ),
]
At = Annotated[
    int | None,
    option(
        "--at",
        metavar="STEP",
        panel=VALUES,
        help="Explain the checkpoint of this step (default the last).",
    ),
]
Curvature = Annotated[
    str | None,
    option(
        "--curvature",
        metavar="HOW",
        panel=VALUES,
        help="dve: fisher (default), the batch's empirical Fisher, or none. unroll: hessian (default), exact, or gauss-newton.",
    ),
]
Replay = Annotated[
    bool,
    option(
        "--replay",
        panel=VALUES,
        help="Run the recorded steps again; gradients are taken where each step was. Adam needs it.",
    ),
]
Form = Annotated[
    str | None,
    option(
        "--form",
        metavar="HOW",
        panel=VALUES,
        help="dve: query or embedding, the same scores (default the one of fewer operations).",
    ),
]
EmbeddingsDir = Annotated[
    Path | None,
    option(
        "--embeddings",
        metavar="DIR",
        panel=VALUES,
        help="dve: keep data value embeddings there; later queries read nothing else.",
    ),
]
Renormalize = Annotated[
    bool,
    option(
        "--renormalize",
        panel=VALUES,
        help="The others of a batch take over the weight of the example left out.",
    ),
]
Lr = Annotated[
    float | None,
    option("--lr", metavar="X", panel=NUMBERS, help="One learning rate for all checkpoints."),
]
LrWeights = Annotated[
    str | None,
    option(
        "--lr-weights", metavar="HOW", panel=NUMBERS,
        help="point (default): the rate at the checkpoint; segment: the sum of rates since the checkpoint before; none: 1.",
    ),
]  # fmt: skip
Device = Annotated[
    str, option("--device", panel=NUMBERS, metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
]
BatchSize = Annotated[
    str,
    option(
        "--batch-size",
        panel=NUMBERS,
        metavar="N",
        help="Examples captured at once: auto or a number.",
    ),
]
Precision = Annotated[
    str | None,
    option(
        "--precision",
        panel=NUMBERS,
        metavar="DTYPE",
        help="float32, float64 or bfloat16: cast model and batches (default the model's).",
    ),
]
StoreAs = Annotated[
    str | None,
    option(
        "--store",
        panel=NUMBERS,
        metavar="DTYPE",
        help="float64, float32, float16, bfloat16 or int8 on disk (default the precision).",
    ),
]
Project = Annotated[
    int | None,
    option(
        "--project",
        panel=NUMBERS,
        metavar="K",
        help="Keep K numbers per parameter, in place of exact gradients.",
    ),
]
ProjectionKind = Annotated[
    str | None,
    option(
        "--projection",
        panel=NUMBERS,
        metavar="KIND",
        help="tensor-sketch (default), sparse, khatri-rao or kronecker; with --project.",
    ),
]
TargetCorrelation = Annotated[
    float | None,
    option(
        "--target-correlation",
        metavar="R",
        panel=NUMBERS,
        help="Find the smallest --project K whose scores correlate so with exact ones (Spearman and Pearson), by doubling.",
    ),
]
ProjectionSeed = Annotated[
    int | None,
    option(
        "--seed",
        panel=NUMBERS,
        metavar="N",
        help="Of what is drawn at random: projections, what evaluate leaves out (default 0).",
    ),
]
Top = Annotated[
    str, option("--top", panel=OUT, metavar="N|all", help="Rows of each kind and query.")
]
Traced = Annotated[
    str | None,
    option(
        "--train",
        metavar="SPEC",
        panel=RANKED,
        help="Training examples to trace beside the whole steps: 0,5,10:20, @ids.txt or -.",
    ),
]
PlotFormat = Annotated[
    str | None,
    option(
        "--format",
        panel=OUT,
        metavar="NAME",
        help="plot, table, csv, tsv, jsonl or parquet (default: plot in a terminal, csv in a pipe).",
    ),
]
Format = Annotated[
    str | None,
    option(
        "--format",
        panel=OUT,
        metavar="NAME",
        help="table, csv, tsv, jsonl or parquet (default: table in a terminal, csv in a pipe).",
    ),
]
Output = Annotated[
    Path | None,
    option(
        "-o",
        "--output",
        panel=OUT,
        metavar="FILE",
        help="Write to a file, whole or not at all, instead of stdout.",
    ),
]
Quiet = Annotated[bool, option("--quiet", panel=OUT, help="No progress and no notes on stderr.")]
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
class Words:
    """The flags of tracin-we."""

    embedding: Embedding = None
    special_tokens: SpecialTokens = "keep"
    pad_id: PadId = None
    top_words: TopWords = None
    synonyms: Synonyms = None


@dataclass(frozen=True)
class Values:
    """The flags of methods that go by the order of training."""

    at: At = None
    curvature: Curvature = None
    replay: Replay = False
    form: Form = None
    embeddings: EmbeddingsDir = None
    renormalize: Renormalize = False


@dataclass(frozen=True)
class Shown:
    """The flags of every command that prints a ranked table."""

    top: Top = "10"
    format: Format = None
    output: Output = None
