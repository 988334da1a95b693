"""The commands and recipes of docs/export.md run as they are written, and find the top 10 of score."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import build_run
from tests.forked import run_fork

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
COMMANDS = re.findall(
    r"^influence (.*)$", "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.S)), re.M
)
RECIPES = re.findall(r"```python\n(.*?)```", PAGE, re.S)
# more queries and examples, so that a top 10 is a choice
RUN = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.TensorDataset(torch.randn(number, 8, generator=generator), torch.randint(0, 3, (number,), generator=generator))

def train_data():
    return examples(0, 300)

def query_data():
    return examples(1, 12)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def label(example):
    return "abc"[int(example[1])]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all commands of the page ran."""
    place = tmp_path_factory.mktemp("page")
    build_run(place / "my_run", RUN)
    for line in COMMANDS:
        ended = run_fork(*line.split(), place=place)
        assert ended.code == 0, ended.err
    return place


def run_recipe(number: int, folder: Path, show: str) -> str:
    """In a process of its own: faiss and torch may each bring an OpenMP."""
    code = f"{RECIPES[number]}\n{show}\n"
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def proponents(folder, influence, monkeypatch) -> list[list[int]]:
    """The 10 training ids with the highest scores of each query, by `score`."""
    monkeypatch.chdir(folder)
    table = influence("score", "my_run", "--project", "512", "--top", "10")
    top: dict[str, list[int]] = {}
    for row in table.rows:
        if row["kind"] == "proponent":
            top.setdefault(row["query"], []).append(int(row["train"]))
    assert all(len(ids) == 10 for ids in top.values())
    return list(top.values())


def test_the_page_has_three_recipes():
    assert len(RECIPES) == 3
    assert len(COMMANDS) == 6


def test_numpy_finds_the_top_of_score(folder, proponents):
    assert run_recipe(0, folder, "print(top.tolist())") == f"{proponents}\n"


def test_a_vector_index_finds_the_top_of_score(folder, proponents):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    assert run_recipe(1, folder, "print(top.tolist())") == f"{proponents}\n"


def test_duckdb_finds_the_top_of_score(folder, proponents):
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    assert run_recipe(2, folder, "print([row[0] for row in top])") == f"{proponents[3]}\n"
