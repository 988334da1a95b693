"""TracIn-WE: W3 against the floor, products against gathering rows pair by pair, and 50,000 texts of 64 tokens at d = 768.

python benchmarks/words.py [--repeats 3] [--texts 50000]

W3: ratios to the floor (one forward+backward over the training examples) times the number of checkpoints, taken in turns in this process.
Gathered: the same products from padded rows, for each query every text's rows times the query's, where their tokens are the same. The large
run goes through the command line, cache on disk; seconds and peak memory are of whole processes.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from common import floor_of, fresh, interleaved, machine, opened, peak_mb, score, workload
from safetensors.torch import save_model

from influence_cli.cache.gradient_rows import concat_rows
from influence_cli.gradients.sparse_forms import Postings

DEFINITION = """
import torch
from torch import nn
from torch.nn import functional as F

TEXTS, QUERIES = {texts}, 100

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(30000, 768), nn.Linear(768, 2)

    def forward(self, ids):
        h = self.words(ids)
        return self.out(torch.tanh(h * h.mean(1, keepdim=True)).mean(1))

def model():
    return Reader()

def texts(seed, number):
    generator = torch.Generator().manual_seed(seed)
    ids = (30000 ** torch.rand(number, 64, generator=generator)).long().clamp_(max=29999)  # Zipf-like
    return torch.utils.data.TensorDataset(ids, torch.randint(0, 2, (number,), generator=generator))

def train_data():
    return texts(0, TEXTS)

def query_data():
    return texts(1, QUERIES)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def against_the_floor(repeats: int) -> None:
    with workload("w3") as (work, run):
        kept = run / ".influence"

        def disk() -> float:
            shutil.rmtree(kept, ignore_errors=True)
            run_ = opened(run, str(kept))
            return score(run_, run_.gradients, method="tracin-we", embedding="emb")

        def again() -> float:
            run_ = opened(run, str(kept))
            return score(run_, run_.gradients, method="tracin-we", embedding="emb")

        live = opened(run, "none")
        none = lambda: score(live, fresh(live, None), method="tracin-we", embedding="emb")  # noqa: E731
        best = interleaved(
            {"floor": floor_of(work), "none": none, "disk": disk, "again": again}, repeats
        )
        unit = best["floor"] * work.n_ckpt
        print(
            "W3, tracin-we, 1,000 x 50 x 2: x floor\n\n| floor | none | disk | again |\n|---|---|---|---|"
        )
        print(
            f"| {best['floor']:.3f} s | {' | '.join(f'{best[way] / unit:.3f}' for way in ('none', 'disk', 'again'))} |\n",
            flush=True,
        )

        run_ = opened(run, str(kept))
        name = "emb()"
        train, queries = (
            concat_rows(
                list(run_.gradients.read(split, run_.checkpoints[0], [name], range(count)))
            ).forms[name]
            for split, count in (("train", len(work.xtr)), ("query", len(work.xte)))
        )
        assert isinstance(train, Postings) and isinstance(queries, Postings)
        products_against_gathering(train, queries, repeats)


def products_against_gathering(train: Postings, queries: Postings, repeats: int) -> None:
    import time

    def timed(job) -> float:
        started = time.perf_counter()
        job()
        return time.perf_counter() - started

    ids, values = padded(train)
    asked, theirs = padded(queries)

    def gathered() -> torch.Tensor:
        columns = []
        for tokens, rows in zip(asked, theirs, strict=True):
            same = (ids[:, :, None] == tokens) & (tokens >= 0)  # (N, T, T')
            columns.append(torch.where(same, values @ rows.T, 0.0).sum((1, 2)))
        return torch.stack(columns, dim=1)

    assert torch.allclose(
        gathered(), train.dot(queries), atol=1e-6 * float(train.dot(queries).abs().max())
    )
    best = interleaved(
        {"index": lambda: timed(lambda: train.dot(queries)), "gathered": lambda: timed(gathered)},
        repeats,
    )
    print("Products alone, 1,000 x 50\n\n| inverted index | gathered | times |\n|---|---|---|")
    print(
        f"| {best['index'] * 1e3:.1f} ms | {best['gathered'] * 1e3:.1f} ms | {best['gathered'] / best['index']:.1f} |\n",
        flush=True,
    )


def padded(postings: Postings) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, T) token ids, -1 behind a text's own; (N, T, d) their rows."""
    rows = postings.rows()
    place = torch.arange(len(rows.ids)) - rows.offsets[:-1][rows.example]
    ids = torch.full((len(rows), int(rows.offsets.diff().max())), -1)
    values = rows.values.new_zeros(*ids.shape, rows.values.shape[1])
    ids[rows.example, place], values[rows.example, place] = rows.ids, rows.values
    return ids, values


def large(texts: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="influence-words-"))
    try:
        (folder / "checkpoints").mkdir()
        (folder / "definition.py").write_text(DEFINITION.format(texts=texts))
        space: dict = {}
        exec(DEFINITION.format(texts=texts), space)
        torch.manual_seed(0)
        save_model(
            space["model"](),
            str(folder / "checkpoints/step-1.safetensors"),
            metadata={"learning_rate": "0.1"},
        )
        influence = [
            str(Path(sys.executable).with_name("influence")),
            "score",
            str(folder),
            "--method",
            "tracin-we",
            "--quiet",
        ]
        print(
            f"{texts:,} texts of 64 tokens, d = 768, 100 queries, one checkpoint\n\n| | seconds | peak MB |\n|---|---|---|"
        )
        for what, flags in (
            ("captured, kept, scored", []),
            ("scored again", []),
            ("scored again, --by word", ["--by", "word"]),
        ):
            seconds, peak = peak_mb([*influence, *flags])
            print(f"| {what} | {seconds:.1f} | {peak:,.0f} |", flush=True)
        size = sum(path.stat().st_size for path in (folder / ".influence").rglob("*.safetensors"))
        print(
            f"\n{size / 1e9:.1f} GB kept; start, import and checks of the cache are in the seconds"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--texts", type=int, default=50_000)
    flags = parser.parse_args()
    print(machine() + "\n")
    against_the_floor(flags.repeats)
    large(flags.texts)


if __name__ == "__main__":
    main()
