"""The runs of the study: each is trained here, from a definition and public data.

Data is not in this repository. DATA is a folder with fashion_mnist_15k.npz (arrays x_train, y_train,
x_test, y_test: the first 15,000 and 2,500 images of Fashion-MNIST) and tinyshakespeare.txt.gz.
"""

import gzip
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from influence_cli import TrajectoryRecorder

HERE = Path(__file__).parent
SAMPLES = HERE.parent.parent / "sample_runs"


@dataclass(frozen=True)
class StudyRun:
    """`source`: of its definition. `write_data`: writes the data into the run folder, from DATA.
    `optimizer`: (parameters) -> optimizer; None: a sample run, which is copied as it is.
    """

    name: str
    source: Path
    write_data: Callable[[Path, Path], None] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    steps: int = 300
    batch: int = 50
    every: int = 60
    pretrained: bool = False


def sgd(rate: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def adamw(rate: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)


def write_fashion(data: Path, run: Path) -> None:
    with np.load(data / "fashion_mnist_15k.npz") as arrays:
        sizes = {"train": 5000, "test": 500}
        parts = {
            f"{kind}_{split}": arrays[f"{kind}_{split}"][:size]
            for split, size in sizes.items()
            for kind in "xy"
        }
    np.savez(run / "fashion.npz", **parts)


def write_text(data: Path, run: Path) -> None:
    """Windows of 65 letters: 500 to train on, 100 queries, the rest to train on before the run."""
    text = gzip.decompress((data / "tinyshakespeare.txt.gz").read_bytes()).decode()
    letters = "".join(sorted(set(text)))
    numbers = np.array([letters.index(letter) for letter in text], dtype=np.uint8)
    windows = numbers[: len(numbers) // 65 * 65].reshape(-1, 65)
    order = np.random.default_rng(0).permutation(len(windows))
    train, query, earlier = np.split(windows[order], [500, 600])
    np.savez(run / "text.npz", train=train, query=query, earlier=earlier, letters=letters)


RUNS = {
    run.name: run
    for run in (
        StudyRun("digits-sgd", SAMPLES / "digits"),
        StudyRun("digits-adamw", SAMPLES / "digits", None, adamw(0.003)),
        StudyRun("words-sgd", SAMPLES / "words"),
        StudyRun(
            "fashion-sgd", HERE / "definitions/fashion.py", write_fashion, sgd(0.2), batch=100
        ),
        StudyRun(
            "fashion-sgd-slow", HERE / "definitions/fashion.py", write_fashion, sgd(0.05), batch=100
        ),
        StudyRun(
            "fashion-adamw", HERE / "definitions/fashion.py", write_fashion, adamw(0.002), batch=100
        ),
        StudyRun("gpt-sgd", HERE / "definitions/gpt.py", write_text, sgd(0.3), 160, 25, 40, True),
        StudyRun(
            "gpt-adamw", HERE / "definitions/gpt.py", write_text, adamw(0.001), 160, 25, 40, True
        ),
    )
}


def build_run(run: StudyRun, data: Path, folder: Path) -> None:
    """Writes the run folder: definition, data, checkpoints, trajectory."""
    if run.source.is_dir():
        shutil.copytree(run.source, folder, ignore=shutil.ignore_patterns(".influence"))
        if run.optimizer is None:
            return
        shutil.rmtree(folder / "checkpoints")
        (folder / "trajectory.jsonl").unlink()
    else:
        folder.mkdir(parents=True)
        shutil.copy(run.source, folder / "definition.py")
    if run.write_data is not None:
        run.write_data(data, folder)
    train(run, folder)


def load_definition(folder: Path):
    spec = importlib.util.spec_from_file_location(f"study_{folder.name}", folder / "definition.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train(run: StudyRun, folder: Path) -> None:
    """One thread, so that a replay has the same sums."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    definition = load_definition(folder)
    model = definition.model()
    if run.pretrained:
        pretrain(definition, model)
    train_data = definition.train_data()
    optimizer = run.optimizer(model.parameters())
    random = np.random.default_rng(1)
    order: list[int] = []
    with TrajectoryRecorder(folder, model, optimizer, run.every) as recorder:
        for _ in range(run.steps):
            if len(order) < run.batch:
                order = random.permutation(len(train_data)).tolist()
            batch, order = order[: run.batch], order[run.batch :]
            optimizer.zero_grad()
            loss = definition.loss(model, train_data[batch]).mean()
            loss.backward()
            recorder.step(batch)
            optimizer.step()
    queries = definition.query_data()
    with torch.no_grad():
        before, after = loss.item(), float(definition.loss(model, queries[:]).mean())
    print(
        f"{run.name}: last training loss {before:.3f}, loss of the queries {after:.3f}",
        file=sys.stderr,
    )


def pretrain(definition, model: torch.nn.Module, steps: int = 600, batch: int = 50) -> None:
    """Trains on other windows, so that the run is a fine-tuning."""
    (windows,) = definition.load("earlier").tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    random = torch.Generator().manual_seed(2)
    for _ in range(steps):
        numbers = torch.randint(len(windows), (batch,), generator=random)
        optimizer.zero_grad()
        loss = definition.loss(model, (windows[numbers],)).mean()
        loss.backward()
        optimizer.step()
    print(f"before the run: loss {loss.item():.3f}", file=sys.stderr)
