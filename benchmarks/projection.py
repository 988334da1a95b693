"""What projections and narrow stores do to scores: against exact ones, of models that were really trained.

python benchmarks/projection.py --text FILE --images FILE [--steps 1500] [--words]

FILE: a text (.gz too), an .npz with x_train, y_train, x_test, y_test. GPT: two blocks of d = 96, 64 letters, AdamW; the weights of its
eight inner Linear layers. Classifier: an MLP 784-256-128-10 with GELU, trained until its training loss is below 0.002; the weights of its
layers. Scores: inner products of gradients at the last checkpoint, 20 queries x 200 training examples; correlations are means over the
queries. Projections: means over 3 seeds; dense Gaussian maps are made here. Stores: *of gradients of 1e-12*: error where what is stored was
that much smaller; *without a scale*: the same, simply cast. Bytes are those of a unit's gradients and scales.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tsloo
from common import machine, opened
from safetensors.torch import save_model

from influence_cli.cache.id_blocks import spread_evenly
from influence_cli.cache.quantize import as_stored, pack
from influence_cli.diagnostics.fidelity import (
    Fidelity,
    KeepForm,
    Sample,
    keep_exact,
    projected_by,
)
from influence_cli.gradients.form_ops import from_tensors
from influence_cli.gradients.forms import Form, Projected
from influence_cli.gradients.projection import Projection

SIZES, SEEDS = (64, 256, 1024), 3
KINDS = ("kronecker", "khatri-rao", "tensor-sketch", "sparse", "dense Gaussian")
STORES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
TINY = 2.0**-40  # 1e-12; a power of two, so that it rounds nothing itself

CHANGES = (  # tsloo's GPT, larger, in float32, on all of the text
    ("LENGTH, WIDTH, HEADS = 32, 48, 4", "LENGTH, WIDTH, HEADS = 64, 96, 4"),
    (".read()[:200_000]", ".read()"),
    ("return Model().double()", "return Model()"),
    ("slice(0, 2000)", "slice(0, 16000)"),
    ("slice(2000, 2200)", "slice(16000, 16500)"),
)
WORDS = (  # the same text in words, those that stand there five times or more
    (
        "LETTERS = sorted(set(TEXT))",
        """import collections, re
TEXT = re.findall(r"\\w+|[^\\w ]", TEXT)
counts = collections.Counter(TEXT)
TEXT = [word if counts[word] > 4 else "?" for word in TEXT]
LETTERS = sorted(set(TEXT))""",
    ),
    ("slice(0, 16000)", "slice(0, 4000)"),
    ("slice(16000, 16500)", "slice(4000, 4400)"),
)
CLASSIFIER = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 10))

def part(which):
    with np.load({data!r}) as arrays:
        images, labels = (torch.from_numpy(arrays[f"{{name}}_{{which}}"]) for name in "xy")
    return torch.utils.data.TensorDataset(images.flatten(1).float() / 255 - 0.286, labels.long())

def train_data():
    return part("train")

def query_data():
    return part("test")

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True)
    parser.add_argument("--images", help="without: the GPT alone")
    parser.add_argument("--steps", type=int, default=1500, help="of the GPT's training")
    parser.add_argument("--words", action="store_true", help="the GPT reads words")
    flags = parser.parse_args()
    print(machine())
    gpt = tsloo.GPT
    for old, new in CHANGES + (WORDS if flags.words else ()):
        assert old in gpt, old
        gpt = gpt.replace(old, new)
    with tempfile.TemporaryDirectory(prefix="influence-projection-") as place:
        run = trained(
            Path(place) / "gpt", gpt.format(data=flags.text), batch=32, rate=2e-3, steps=flags.steps
        )
        sample = sampled(run, [f"blocks.*.{name}.weight" for name in ("qkv", "out", "up", "down")])
        found = projections("GPT", sample)
        ours, theirs = found["tensor-sketch", 64].spearman, found["kronecker", 1024].spearman
        verdict = "beats" if ours > theirs else "does not beat"
        print(
            f"\nA tensor sketch of 64 numbers ({ours:.3f}) {verdict} the kronecker map of 1,024 ({theirs:.3f})."
        )
        stores("GPT", sample)
        if flags.images is None:
            return
        run = trained(
            Path(place) / "classifier",
            CLASSIFIER.format(data=flags.images),
            batch=128,
            rate=1e-3,
            steps=12000,
            until=0.002,
        )
        sample = sampled(run, ["*.weight"])
        projections("classifier", sample)
        stores("classifier", sample)


def trained(
    folder: Path, definition: str, batch: int, rate: float, steps: int, until: float = 0.0
) -> Path:
    """A run folder with the last checkpoint of a training by AdamW, at most so many steps, until the loss of the training set is low."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "definition.py").write_text(definition)
    space: dict = {}
    exec(definition, space)
    torch.manual_seed(0)
    model, data, queries = (
        space["model"](),
        space["train_data"]().tensors,
        space["query_data"]().tensors,
    )
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 10)

    def mean_loss(tensors: tuple[torch.Tensor, ...], most: int = 2000) -> float:
        some = spread_evenly(len(tensors[0]), most)
        with torch.no_grad():
            return float(space["loss"](model, [tensor[some] for tensor in tensors]).mean())

    started, first, ids, done = (
        time.perf_counter(),
        mean_loss(data),
        torch.empty(0, dtype=torch.int64),
        0,
    )
    while done < steps:
        ids = ids if len(ids) >= batch else torch.randperm(len(data[0]))
        chosen, ids = ids[:batch], ids[batch:]
        optimizer.zero_grad()
        space["loss"](model, [tensor[chosen] for tensor in data]).mean().backward()
        optimizer.step()
        schedule.step()
        done += 1
        if done % 500 == 0 and mean_loss(data) < until:
            break
    seconds = time.perf_counter() - started
    save_model(
        model, str(folder / "checkpoints" / f"step-{done:06d}.safetensors"), {"learning_rate": "1"}
    )
    print(
        f"\n{folder.name}: {done:,} steps, {seconds:.0f} s, training loss {first:.3f} -> {mean_loss(data):.4f}, "
        f"of held-out examples {mean_loss(queries):.4f}",
        flush=True,
    )
    return folder


def sampled(run: Path, layers: list[str]) -> Sample:
    """Exact gradients of 20 queries and 200 training examples, evenly spread."""
    found = opened(run, "none", layers=layers)
    ids = {"train": range(len(found.run.train)), "query": range(len(found.run.query))}
    return Sample.draw(found.gradients, found.checkpoints, list(found.columns), ids)


# ---------------------------------------------------------------- projections
def projections(name: str, sample: Sample) -> dict[tuple[str, int], Fidelity]:
    """Prints what each kind does; of each the first seed's, with the means over the seeds."""
    drawn: dict[tuple[str, int], list[Fidelity]] = {
        (kind, numbers): [] for kind in KINDS for numbers in SIZES
    }
    for seed in range(SEEDS):
        gaussian = Gaussian(sample, max(SIZES), seed)
        maps = {
            (kind, numbers): Projection(kind, numbers, seed)
            for kind in KINDS[:-1]
            for numbers in SIZES
        }
        ways: dict[tuple[str, int], KeepForm] = {
            key: projected_by(projection) for key, projection in maps.items()
        }
        ways |= {(KINDS[-1], numbers): gaussian.way(numbers) for numbers in SIZES}
        scores, _ = sample.compute_scores(
            {"exact": keep_exact} | {str(key): way for key, way in ways.items()}
        )
        for key in ways:
            drawn[key].append(
                sample.compare(str(key), scores[str(key)], scores["exact"], 0.0, maps.get(key))
            )
    found = {key: averaged(many) for key, many in drawn.items()}
    for title, of in FIGURES.items():
        print(f"\n{name}, {title}:\n\n| K | {' | '.join(KINDS)} |\n|{'---|' * (len(KINDS) + 1)}")
        for numbers in SIZES:
            print(
                f"| {numbers:,} | {' | '.join(f'{of(found[kind, numbers]):.3f}' for kind in KINDS)} |",
                flush=True,
            )
    return found


FIGURES: dict[str, Callable[[Fidelity], float]] = {
    "mean Spearman correlation": lambda found: found.spearman,
    "mean Pearson correlation": lambda found: found.pearson,
    "mean overlap of the ten highest": lambda found: found.overlap,
    "relative error of all scores": lambda found: found.error,
}


class Gaussian:
    """A dense Gaussian map of each column; of fewer numbers, its first rows."""

    def __init__(self, sample: Sample, numbers: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        shapes = {name: sample.gradients.run.columns[name].numel for name in sample.columns}
        self.maps = {
            name: torch.randn(numbers, size, generator=random) for name, size in shapes.items()
        }

    def way(self, numbers: int) -> KeepForm:
        def keep(name: str, form: Form) -> Form:
            values = torch.cat([part @ self.maps[name][:numbers].T for _, part in form.parts()])
            return Projected(form.shape, values / numbers**0.5)

        return keep


def averaged(many: list[Fidelity]) -> Fidelity:
    first = many[0]
    error, pearson, spearman, overlap = (
        float(np.mean([getattr(found, figure) for found in many]))
        for figure in ("error", "pearson", "spearman", "overlap")
    )
    return Fidelity(first.kept, error, 0.0, pearson, spearman, overlap, first.pairs, first.numbers)


# ---------------------------------------------------------------- stores
def stores(name: str, sample: Sample) -> None:
    """Prints what each store does to exact gradients, and to tensor sketches of 256: against the same in the precision of the run."""
    heads = (
        "gradients",
        "store",
        "bytes per example",
        "relative error",
        "of gradients of 1e-12",
        "without a scale",
    )
    heads += ("Pearson", "Spearman", "top-10 overlap")
    print(f"\n{name}, stored:\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for kind, before in {
        "exact": keep_exact,
        "tensor-sketch 256": projected_by(Projection("tensor-sketch", 256)),
    }.items():
        ways: dict[str, KeepForm] = {"as they are": before}
        for store in STORES:
            ways[f"{store}"] = stored(before, store)
            ways[f"{store}, tiny"] = stored(before, store, TINY)
            ways[f"{store}, bare"] = bare(before, store)
        scores, _ = sample.compute_scores(ways)
        exact = scores["as they are"]
        for store in STORES:
            found, tiny, plain = (
                sample.compare(kind, scores[f"{store}{of}"], exact, 0.0, None)
                for of in ("", ", tiny", ", bare")
            )
            figures = f"{found.error:.1e} | {tiny.error:.1e} | {plain.error:.1e} | {found.pearson:.6f} | {found.spearman:.6f}"
            size = bytes_of(sample, before, store)
            print(
                f"| {kind} | {str(store)[6:]} | {size:,.0f} | {figures} | {found.overlap:.3f} |",
                flush=True,
            )


def times(form: Form, factor: float) -> Form:
    """Of factors the left ones are multiplied."""
    scaled = {
        part: value * factor if part in ("values", "left") else value
        for part, value in form.tensors().items()
    }
    return from_tensors(form.kind, form.shape, scaled)


def stored(before: KeepForm, store: torch.dtype, scale: float = 1.0) -> KeepForm:
    """As read after it was written; `scale`: the gradients are written that much smaller."""
    return lambda name, form: times(as_stored(times(before(name, form), scale), store), 1 / scale)


def bare(before: KeepForm, store: torch.dtype) -> KeepForm:
    """Gradients of 1e-12 cast to what is stored, as they would be without a scale."""

    def keep(name: str, form: Form) -> Form:
        small = times(before(name, form), TINY)
        cast = {part: value.to(store).to(value.dtype) for part, value in small.tensors().items()}
        return times(from_tensors(small.kind, small.shape, cast), 1 / TINY)

    return keep


def bytes_of(sample: Sample, before: KeepForm, store: torch.dtype) -> float:
    """Of one training example's gradients, in the form in which the cache keeps them."""
    rows = next(iter(sample.read("train", sample.checkpoints[0], sample.train[:16])))
    packed = [
        tensor
        for name in sample.columns
        for part, value in before(name, rows.forms[name]).tensors().items()
        for tensor in pack(part, value, store).values()
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in packed) / len(rows.ids)


if __name__ == "__main__":
    main()
