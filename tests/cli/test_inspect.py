"""What `inspect` says of the work to come. Bytes are compared, and times are not."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.api.score import ScoreArguments
from influence_cli.cli.inspect import request_of
from influence_cli.cli.opening import open_shared
from influence_cli.cli.options import Shared
from influence_cli.diagnostics import cost_estimate, score_estimate
from influence_cli.diagnostics.cost_estimate import Speed, count_gradients
from influence_cli.diagnostics.score_estimate import ScoreJob
from influence_cli.extraction.extractor import GradientExtractor
from influence_cli.methods import inner_products, query_passes, score_trial
from influence_cli.methods.inner_products import QueryGradients
from influence_cli.methods.pairwise import mean_query_row, query_rows
from influence_cli.methods.score_trial import ScoreTrial
from influence_cli.methods.table import METHODS

FEW_QUERIES = 700  # bytes of query gradients in memory: two of 172 bytes at two checkpoints


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch):
    monkeypatch.setattr(cost_estimate, "SECONDS", 0.01)
    monkeypatch.setattr("influence_cli.extraction.machine.TRIAL_BYTES", 4096)


def job_of(run: Path, method: str = "tracin", sum_queries: bool = False, **flags) -> ScoreJob:
    opened = open_shared(Shared(run=run, quiet=True, **flags), create=False)
    ids = {"train": range(20), "query": range(6)}
    chosen = METHODS[method]
    request = request_of(opened, chosen, chosen.options(), ids, ScoreArguments(sum_queries))
    source, columns = opened.gradients, list(opened.columns)
    counts = [
        count_gradients(source, split, [(c, ids[split]) for c in request.checkpoints], columns)
        for split in ("train", "query")
    ]
    assert chosen.open_trial is not None
    trial = chosen.open_trial(source, request, opened.folder is not None)
    return ScoreJob(source, request, trial, opened.folder, *counts)


def cells_of(text: str) -> dict[str, str]:
    """The settings at the end of the output."""
    lines = text.rstrip().rpartition("\n\n")[2].splitlines()
    pairs = [line.strip().partition("  ") for line in lines]
    return {name: value.strip() for name, _, value in pairs}


def test_it_says_how_score_gets_its_gradients_and_why(make_run, influence):
    run = make_run()
    path = cells_of(influence("inspect", run).out)["score"]
    assert path.startswith("one pass: it computes, stores and multiplies the 40 training gradients")
    path = cells_of(influence("inspect", run, "--cache", "none").out)["score"]
    assert path.startswith("--cache none: multiplies each layer's gradients in the backward pass")
    influence("score", run, "--train", "0:12")
    assert "multiplies the 16 training" in cells_of(influence("inspect", run).out)["score"]
    influence("score", run)
    path = cells_of(influence("inspect", run).out)["score"]
    assert path == "reads stored gradients: the cache has all of them"


@pytest.mark.parametrize("method", ["dve", "repsim"])
def test_it_says_no_path_of_other_methods(make_run, influence, method):
    result = influence("inspect", make_run(), "--method", method)
    assert result.code == 0, result.err
    cells = cells_of(result.out)
    assert "score" not in cells
    assert "time to compute" in cells


def test_a_method_of_one_checkpoint_counts_the_gradients_of_that(make_run, influence):
    lines = [
        line.split()
        for line in influence("inspect", make_run(), "--method", "grad-dot").out.splitlines()
    ]
    assert ["query", "6", "6", "0", "6"] in [line[:5] for line in lines]
    assert ["train", "20", "20", "0", "20"] in [line[:5] for line in lines]


def test_it_shows_the_passes_of_queries_that_exceed_memory(make_run, influence, monkeypatch):
    run = make_run()
    assert "queries" not in cells_of(influence("inspect", run).out)
    monkeypatch.setattr(query_passes, "QUERY_BYTES", FEW_QUERIES)
    cells = cells_of(influence("inspect", run, "--cache", "none").out)
    assert cells["queries"] == (
        "6 in 3 passes of 2; each training gradient is computed once; 2.1 KB of query gradients "
        "in a temporary folder"
    )
    assert "block by block" in cells["score"]
    cells = cells_of(influence("inspect", run).out)  # the cache does not exist yet
    assert cells["queries"] == (
        "6 in 3 passes of 2; each training gradient is computed once and read from the cache in "
        "later passes"
    )
    assert "queries" not in cells_of(influence("inspect", run, "--sum-queries").out)
    monkeypatch.setattr(query_passes, "ROUND_BYTES", 2 * 2 * 8 * 256)  # of two passes
    text = cells_of(influence("inspect", run, "--cache", "none").out)["queries"]
    assert "each training gradient is computed 2 times" in text


def test_the_predicted_disk_space_is_that_of_the_files(make_run, influence):
    run = make_run()
    predicted = job_of(run).disk_bytes
    influence("score", run)
    files = list((run / ".influence").rglob("*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert predicted == sum(os.path.getsize(file) for file in files) - headers
    assert job_of(run).disk_bytes == 0


@pytest.mark.parametrize("sum_queries", [False, True])
@pytest.mark.parametrize(
    "flags", [{}, {"cache": "none"}, {"store": "float16"}, {"project": 4}], ids=str
)
def test_queries_of_the_trial_take_the_memory_of_real_ones(
    make_run, influence, monkeypatch, flags, sum_queries
):
    monkeypatch.setattr(score_trial, "SAMPLE", 4)  # two of the six are repeated
    run = make_run()
    job = job_of(run, sum_queries=sum_queries, **flags)
    influence(
        "score", run, *(word for name, value in flags.items() for word in (f"--{name}", value))
    )
    opened = open_shared(Shared(run=run, quiet=True, **flags))
    rows_of = mean_query_row if sum_queries else query_rows
    for number, checkpoint in enumerate(job.request.checkpoints):
        rows = rows_of(opened.gradients, job.request, checkpoint, range(6))
        real = QueryGradients.of(job.request, number, rows, job.trial.stored, torch.device("cpu"))
        assert job.trial.queries.scaled.keys() == real.scaled.keys()
        size = sum(query.form.nbytes for query in real.scaled.values())
        assert job.trial.pass_bytes == size


def test_the_predicted_memory_holds_queries_units_and_scores(make_run, influence):
    run = make_run()
    job = job_of(run)
    budget, columns = job.source.budget, job.columns
    units = budget.needs("train", columns, 40)[1] - budget.needs("train", columns, 0)[1]
    assert units == 20 * (
        16 + 8 * len(columns) + budget.sizes("train", columns).example_bytes(columns)
    )
    scores = 8 * 20 * 6
    queries = job.trial.pass_bytes  # of the second checkpoint
    assert (
        score_estimate.estimate_peak_bytes(job, Speed(0.0, 1000)) == 1000 + queries + units + scores
    )
    live = job_of(run, cache="none")
    assert score_estimate.estimate_peak_bytes(live, Speed(0.0, 1000)) == 1000 + queries + scores


def test_the_predicted_memory_of_several_passes_holds_a_block_of_training_gradients(
    make_run, monkeypatch
):
    monkeypatch.setattr(query_passes, "QUERY_BYTES", FEW_QUERIES)
    job = job_of(make_run(), cache="none")
    assert job.trial.path == "blocks"
    block = 20 * job.source.budget.sizes("train", job.columns).example_bytes(job.columns)
    expected = job.trial.pass_bytes + block + 8 * 20 * 6
    assert score_estimate.estimate_peak_bytes(job, Speed(0.0, 0)) == expected


def test_inspect_measures_the_products_inside_the_backward_pass(make_run, monkeypatch):
    job = job_of(make_run(), cache="none")
    widths = []
    fused = inner_products.FusedProducts.scores
    monkeypatch.setattr(
        inner_products.FusedProducts,
        "scores",
        lambda self, columns, ids, *rest: (
            widths.append((self.shape[1], list(ids))) or fused(self, columns, ids, *rest)
        ),
    )
    splits = []
    rows_at = GradientExtractor.rows_at
    monkeypatch.setattr(
        GradientExtractor,
        "rows_at",
        lambda self, checkpoint, split, *rest: (
            splits.append(split) or rows_at(self, checkpoint, split, *rest)
        ),
    )
    speed = score_estimate.measure(job)
    assert {width for width, _ in widths} == {6}
    assert widths[0][1] == list(range(20))
    assert splits == ["query"]
    assert speed.gradient_seconds > 0
    assert speed.query_seconds > 0
    assert (speed.read_seconds, speed.disk_speed) == (0, 0)


@pytest.mark.parametrize("store", ["float32", "float16", "int8"])
def test_inspect_measures_products_of_gradients_as_they_are_stored(make_run, monkeypatch, store):
    job = job_of(make_run(), store=store)
    units = []
    monkeypatch.setattr(ScoreTrial, "multiply", lambda self, rows: units.append(rows))
    ids = np.arange(20)
    job.trial.compute(ids)
    [rows] = units
    expected = job.source.recompute("train", job.request.checkpoints[0], job.columns, ids)
    for name, form in expected.forms.items():
        decoded = rows.forms[name].to(form.device, torch.float32)
        assert torch.equal(decoded.dense().values, form.dense().values), name


def test_a_warm_run_measures_reading_and_computes_nothing(make_run, influence, monkeypatch):
    run = make_run()
    influence("score", run)
    job = job_of(run)
    monkeypatch.setattr(GradientExtractor, "rows_at", None)
    monkeypatch.setattr(ScoreTrial, "compute", None)
    speed = score_estimate.measure(job)
    assert speed.read_seconds > 0
    assert (speed.gradient_seconds, speed.query_seconds) == (0, 0)
    assert (job.computed, job.read) == (0, 40)
    assert score_estimate.estimate_seconds(job, speed) == 40 * speed.read_seconds


def test_later_passes_read_what_the_first_one_stores(make_run, monkeypatch):
    monkeypatch.setattr(query_passes, "QUERY_BYTES", FEW_QUERIES)
    job = job_of(make_run())
    assert (job.computed, job.read) == (40, 80)
    assert score_estimate.measure(job).read_seconds > 0


def test_the_disk_of_padded_texts_is_that_of_batches_padded_to_their_longest(make_run, influence):
    """collate() pads a batch to its longest text; the first two texts are short."""
    definition = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(64, 64, bias=False), nn.Linear(64, 3, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x))).sum(1)

def model():
    return Net()

def texts(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [2, 3] + [2 + i % 15 for i in range(62)]
    return [torch.randn(length, 64, generator=generator) for length in lengths]

def train_data(): return texts(0)
def query_data(): return texts(1)[:4]

def collate(items):
    longest = max(map(len, items))
    return torch.stack([F.pad(item, (0, 0, 0, longest - len(item))) for item in items])

def loss(model, batch):
    return F.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.int64), reduction="none")
"""
    run = make_run("padded", definition)
    text = influence("inspect", run).out
    predicted = re.search(r"cache .*?, ([\d.]+) (KB|MB) to store", text)
    assert predicted is not None, text
    bytes_predicted = float(predicted[1]) * {"KB": 1e3, "MB": 1e6}[predicted[2]]
    assert influence("score", run).code == 0
    stored = sum(path.stat().st_size for path in (run / ".influence").rglob("*.safetensors"))
    assert 0.75 < bytes_predicted / stored < 1.25
