"""influence export: inner products of its vectors are the scores; what it writes, and what it refuses."""

import csv
import errno
import io
import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from influence_cli.methods import gradient_vectors, query_passes
from influence_cli.methods.table import METHODS
from influence_cli.output import vector_files
from influence_cli.storage import array_files
from tests.conftest import DEFINITION
from tests.forked import run_fork
from tests.refusals import refused, replaced
from tests.training import train

EPS = float(np.finfo(np.float32).eps)

CLASSIFIER = (
    DEFINITION
    + """
def outputs(model, batch):
    return model(batch[0])

def loss_from_outputs(outputs, batch):
    return F.cross_entropy(outputs, batch[1], reduction="none")
"""
)
# an embedding, a convolution, a layer over positions, and the embedding again as the head
TEXTS = """
import torch
from torch import nn
from torch.nn import functional as F


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(12, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.middle, self.head, self.places = nn.Linear(4, 4), nn.Linear(4, 12, bias=False), nn.Embedding(6, 4)
        self.head.weight = self.words.weight

    def forward(self, ids):
        hidden = self.words(ids) + self.places(torch.arange(6))
        return self.head(torch.tanh(self.middle(self.mix(hidden.transpose(1, 2)).transpose(1, 2))))


def model():
    return Reader()

def texts(seed, count):
    return list(torch.randint(0, 12, (count, 6), generator=torch.Generator().manual_seed(seed)))

def train_data():
    return texts(0, 20)

def query_data():
    return texts(1, 6)

def loss(model, batch):
    return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(len(batch), -1).mean(1)
"""


def read_vectors(folder) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.load(folder / f"{name}.npy").astype(float) for name in ("train", "queries"))


def score_matrix(influence, run, flags, folder) -> np.ndarray:
    """(N, Q) from `score --top all`, in the order of the folder's ids."""
    result = influence("score", run, *flags, "--top", "all", "--quiet")
    assert result.code == 0, result.err
    train_ids = np.load(folder / "train_ids.npy").tolist()
    query_ids = list(map(str, np.load(folder / "query_ids.npy")))
    scores = np.full((len(train_ids), len(query_ids)), np.nan)
    for row in csv.DictReader(io.StringIO(result.out)):
        place = train_ids.index(int(row["train"])), query_ids.index(row["query"])
        scores[place] = float(row["score"])
    return scores


def check_products(influence, run, flags, folder, allowed=4) -> None:
    """Rounding is relative to the norms of both vectors: that bounds the sum of |t q|."""
    result = influence("export", run, *flags, "-o", folder)
    assert result.code == 0, result.err
    assert result.out == ""
    train_NK, queries_QK = read_vectors(folder)
    norms = np.linalg.norm(train_NK, axis=1)[:, None] * np.linalg.norm(queries_QK, axis=1)
    errors = np.abs(train_NK @ queries_QK.T - score_matrix(influence, run, flags, folder))
    assert (errors <= allowed * EPS * norms).all(), (errors / norms).max() / EPS
    assert norms.any()


FLAGS = [
    "",
    "--lr-weights none",
    "--lr 0.3 --steps 20",
    "--normalize",
    "--sum-queries",
    "--sum-queries --normalize --project 4",
    "--train 3,5:9 --queries 1,4",
    "--cache none --batch-size 3",
    "--project 8",
    "--project 16 --projection kronecker --seed 1",
    "--project 8 --projection sparse",
    "--project 8 --projection khatri-rao",
    "--store int8",
    "--method grad-dot --steps 10",
    "--method grad-cos",
    "--method grad-cos --project 8",
    "--method influence",
    "--method influence --project 8 --curvature fisher",
    "--method influence --curvature shampoo --normalize",
    "--method influence --curvature hessian --damping 10",
]
NEEDS_OUTPUTS = [
    "--method influence --curvature kfac --fisher true --seed 3",
    "--method influence --curvature gauss-newton --sum-queries",
]
MODELS = {"classifier": CLASSIFIER, "texts": TEXTS}
CASES = [(name, flags) for name in MODELS for flags in FLAGS] + [
    ("classifier", flags) for flags in NEEDS_OUTPUTS
]


@pytest.mark.parametrize(("model", "flags"), CASES)
def test_products_of_float64_vectors_are_the_scores(model, flags, make_run, tmp_path, influence):
    """The vectors are rounded to float32 once: 2 x half an eps of each product."""
    run = make_run("run", MODELS[model])
    flags = [*flags.split(), "--precision", "float64"]
    check_products(influence, run, flags, tmp_path / "vectors", allowed=1.2)


@pytest.mark.parametrize("flags", [flags for flags in FLAGS if "hessian" not in flags])
def test_products_of_float32_vectors_are_the_scores(flags, make_run, tmp_path, influence):
    """The scores themselves are products in float32."""
    check_products(influence, make_run("run", TEXTS), flags.split(), tmp_path / "vectors")


def test_weights_of_parameter_groups_and_segments_are_in_the_queries(tmp_path, influence):
    run = train(tmp_path / "run", every=6, rate=0.5)
    check_products(influence, run, ["--lr-weights", "segment"], tmp_path / "vectors")
    layout = json.loads((tmp_path / "vectors" / "meta.json").read_text())["layout"]
    (other := tmp_path / "other").mkdir()
    check_products(influence, run, ["--lr-weights", "none"], other)
    one, two = read_vectors(tmp_path / "vectors"), read_vectors(other)
    assert (one[0] == two[0]).all()
    for stretch in layout:
        columns = slice(stretch["start"], stretch["stop"])
        expected = two[1][:, columns] * stretch["weight"]
        assert one[1][:, columns] == pytest.approx(expected, rel=2 * EPS)


@pytest.mark.parametrize("model", MODELS)
def test_parts_and_passes_do_not_change_the_vectors(
    model, make_run, tmp_path, influence, monkeypatch
):
    run = make_run("run", MODELS[model])
    assert influence("export", run, "-o", tmp_path / "one").code == 0
    monkeypatch.setattr(gradient_vectors, "PART_BYTES", 3000)
    monkeypatch.setattr(query_passes, "QUERY_BYTES", 3000)
    assert influence("export", run, "-o", tmp_path / "two", "--cache", "none").code == 0
    for one, two in zip(*map(read_vectors, (tmp_path / "one", tmp_path / "two")), strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-7 * np.abs(one).max())


def test_the_layout_names_the_numbers_of_a_vector(make_run, tmp_path, influence):
    run, folder = make_run(), tmp_path / "vectors"
    assert influence("export", run, "-o", folder, "--queries", "0").code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json", "queries.npy", "query_ids.npy", "train.npy", "train_ids.npy",
    ]  # fmt: skip
    record = json.loads((folder / "meta.json").read_text())
    assert record["request"]["method"] == "tracin"
    steps = [(part["step"], part["parameter"], part["weight"]) for part in record["layout"]]
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert steps == [(s, name, w) for s, w in ((10, 0.1), (20, 0.05)) for name in names]
    ends = [part["stop"] for part in record["layout"]]
    assert [part["start"] for part in record["layout"]] == [0, *ends[:-1]]
    vectors = np.load(folder / "train.npy")
    assert vectors.shape == (20, ends[-1])
    assert vectors.dtype == np.float32
    assert np.load(folder / "train_ids.npy").tolist() == list(range(20))


OWN_IDS = DEFINITION + (
    "\ndef describe(example):\n    return 'text \\ud800'\n"
    "\ndef id(example):\n    return f'own {float(example[0][0]):.3f}'\n"
)


def test_parquet_holds_the_same_vectors(make_run, tmp_path, influence, monkeypatch):
    run = make_run("run", OWN_IDS)
    monkeypatch.setattr(vector_files, "GROUP_ROWS", 8)
    assert influence("export", run, "-o", tmp_path / "npy").code == 0
    result = influence("export", run, "--to", "parquet", "-o", tmp_path / "parquet")
    assert result.code == 0, result.err
    assert not list(tmp_path.glob(".tmp-*"))
    for name, ids in (("train", "train_ids"), ("queries", "query_ids")):
        file = pq.ParquetFile(tmp_path / "parquet" / f"{name}.parquet")
        table = file.read()
        assert table.column_names == ["id", "label", "text", "vector", "own_id"]
        assert table["id"].to_pylist() == np.load(tmp_path / "npy" / f"{ids}.npy").tolist()
        vectors = np.array(table["vector"].to_pylist(), np.float32)
        assert (vectors == np.load(tmp_path / "npy" / f"{name}.npy")).all()
        assert set(table["label"].to_pylist()) <= set("abc")
        assert table["text"][0].as_py() == "text \\ud800"
        assert table["own_id"][0].as_py().startswith("own ")
    assert file.metadata.num_row_groups == 1  # 6 queries
    assert pq.ParquetFile(tmp_path / "parquet" / "train.parquet").metadata.num_row_groups == 3


def test_the_mean_of_the_queries_is_called_all(make_run, tmp_path, influence):
    folder = tmp_path / "vectors"
    assert (
        influence("export", make_run(), "--to", "parquet", "--sum-queries", "-o", folder).code == 0
    )
    (row,) = pq.read_table(folder / "queries.parquet").drop_columns(["vector"]).to_pylist()
    assert row == {"id": "all", "label": "", "text": ""}


def test_other_queries_and_candidates_are_exported(make_run, tmp_path, influence):
    run = make_run("run", DEFINITION + (
        "\ndef example(row):\n    return torch.tensor([float(row['a'])] * 4), torch.tensor(int(row['a']))\n"
    ))  # fmt: skip
    (tmp_path / "rows.csv").write_text("a\n1\n2\n")
    flags = ["--query", '{"a": 2}', "--candidates", tmp_path / "rows.csv"]
    check_products(influence, run, flags, tmp_path / "vectors")
    assert np.load(tmp_path / "vectors" / "train.npy").shape[0] == 2


def test_an_empty_folder_is_filled(make_run, tmp_path, influence):
    (folder := tmp_path / "vectors").mkdir()
    assert influence("export", make_run(), "-o", folder).code == 0
    assert (folder / "train.npy").exists()
    assert folder.stat().st_mode & 0o777 == 0o777 & ~os.umask(0o22)


def test_sizes_are_noted(make_run, tmp_path, influence):
    result = influence("export", make_run(), "--project", "4", "-o", tmp_path / "vectors")
    assert "note: queries 6 x 30, train 20 x 30: float32, 3.1 KB" in result.err


def test_vectors_that_float32_holds_badly_are_noted_or_refused(make_run, tmp_path, influence):
    run = make_run()
    result = influence("export", run, "--lr", "1e-36", "-o", tmp_path / "small")
    assert "note: 12 vectors have no number above 1e-30 at a checkpoint" in result.err
    result = influence("export", run, "--lr", "1e40", "-o", tmp_path / "large")
    refused(result, 1, "which float32 can't hold", "--lr-weights none")
    assert not (tmp_path / "large").exists()


# ---------------------------------------------------------------- whole or not at all
KILLED = replaced(DEFINITION, (
    "def train_data():\n    return examples(0, 20)",
    """class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        import os, pathlib, signal
        if index == 15 and list(pathlib.Path(os.environ["PARENT"]).glob(".tmp-*/vectors/query_ids.npy")):
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        return examples(0, 20)[index]

def train_data():
    return Killed()""",
))  # fmt: skip


@pytest.mark.parametrize(("signal", "code"), [("SIGKILL", -9), ("SIGTERM", 143)])
def test_a_killed_export_leaves_no_folder(signal, code, make_run, tmp_path, influence, monkeypatch):
    run, parent = make_run("run", KILLED), tmp_path / "out"
    parent.mkdir()
    environment = {"PARENT": str(parent), "SIGNAL": signal}
    command = ("export", run, "-o", parent / "vectors")
    ended = run_fork(*command, place=tmp_path, environment=environment)
    assert ended.code == code, ended.err
    assert not (parent / "vectors").exists()
    assert len(list(parent.glob(".tmp-*"))) == (1 if signal == "SIGKILL" else 0)
    monkeypatch.setenv("PARENT", "nowhere")
    assert influence("export", run, "-o", parent / "vectors").code == 0
    assert [path.name for path in parent.iterdir()] == ["vectors"]


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_a_full_disk_is_an_error(format, make_run, tmp_path, influence, monkeypatch):
    def fail(descriptor, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(array_files, "reserve_room", fail)
    result = influence("export", make_run(), "--to", format, "-o", tmp_path / "vectors")
    refused(result, 1, f"{tmp_path / 'vectors'} can't be written: the disk is full", "-o DIR")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_vectors_above_the_free_disk_are_refused(make_run, tmp_path, influence, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    command = ("export", make_run(), "--cache", "none", "-o", tmp_path / "vectors")
    refused(
        influence(*command), 1, "the vectors do not fit on the disk", "free: 5,000", "--project"
    )


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].open_vectors])
def test_methods_without_inner_products_are_refused(method, make_run, tmp_path, influence):
    result = influence("export", make_run(), "--method", method, "-o", tmp_path / "vectors")
    refused(result, 2, f"export does not apply to --method {method}", "tracin, grad-dot, grad-cos")


def test_methods_that_are_refused_are_those_of_the_docs():
    names = {name for name, method in METHODS.items() if method.open_vectors}
    assert names == {"tracin", "grad-dot", "grad-cos", "influence"}


BAD = {
    "": ("export writes a folder, and -o is missing", "-o DIR"),
    "--to csv -o v": ("--to csv: unknown", "npy, parquet"),
    "--method nonsense -o v": ("--method nonsense: unknown", "tracin, grad-dot"),
    "--method grad-dot --lr 1 -o v": ("--lr does not apply to --method grad-dot",),
    "--curvature ekfac -o v": ("--curvature does not apply to --method tracin",),
    "--method influence --candidates x -o v": ("--candidates does not apply to",),
    "-o none/v": ("-o none/v: the folder that would hold it does not exist", "mkdir -p none"),
    "--queries - --train - -o v": ("--queries - and --train - both read",),
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_refused(flags, make_run, tmp_path, influence, monkeypatch):
    run = make_run()
    monkeypatch.chdir(tmp_path)
    refused(influence("export", run, *flags.split()), 2, *BAD[flags])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_with_files_and_a_file_are_refused(make_run, tmp_path, influence):
    run = make_run()
    refused(influence("export", run, "-o", run), 2, f"-o {run} exists", "a new folder")
    (file := tmp_path / "file").write_text("")
    refused(influence("export", run, "-o", file), 2, f"-o {file} exists")
