"""Trains the classifier of this run and writes its checkpoints and trajectory.jsonl: python train.py

Plain SGD on the token ids in words.npz; same bytes every time on one machine. `python train.py --collect` first makes words.npz,
vocabulary.txt and planted.json anew from the docstrings of the standard library of the Python that runs it (shipped: 3.11.7's).
"""

import ast
import json
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import definition
import numpy as np
import torch
from definition import CLS, ORIGINS, PAD, SEP, UNK, WORDS
from safetensors.torch import save_file

HERE = Path(__file__).parent
STEPS, BATCH, EVERY = 400, 40, 80
TRAIN, QUERIES, LONGEST, SHORTEST = 1000, 160, 32, 8  # texts; words of a text, at most and at least
MODULES = {
    "internet": "email http/client http/server urllib mailbox imaplib smtplib ftplib nntplib socketserver poplib wsgiref telnetlib"
    " ssl socket ipaddress",
    "concurrency": "asyncio multiprocessing threading concurrent subprocess queue selectors sched contextvars signal",
    "numbers": "_pydecimal statistics datetime calendar random numbers fractions colorsys _strptime hashlib hmac secrets bisect heapq",
    "code": "inspect ast dis typing unittest doctest pdb bdb traceback pydoc symtable pickletools importlib tokenize code warnings",
}
PLANTED = "zyzzyva"  # no docstring has it
TIMES, WRONG, RIGHT = (
    3,
    4,
    3,
)  # how often in a planted text; how many training texts have it and a wrong label, and the query's label


# ---------------------------------------------------------------- training
def rate(step: int) -> float:
    return 1.5 if step < 300 else 0.75


def initial(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return definition.model()


def batches(seed: int) -> list[list[int]]:
    """The training examples of each step: one random order after another."""
    order = torch.Generator().manual_seed(seed + 1)
    found: list[list[int]] = []
    while len(found) < STEPS:
        found += torch.randperm(TRAIN, generator=order).view(-1, BATCH).tolist()
    return found[:STEPS]


def main() -> None:
    torch.set_num_threads(1)
    if "--collect" in sys.argv:
        collect()
    model, (texts, origins) = initial(0), definition.train_data().tensors
    lines: list[dict] = [
        {
            "format": "influence-trajectory",
            "version": 1,
            "reduction": "mean",
            "optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0},
        }
    ]
    (HERE / "checkpoints").mkdir(exist_ok=True)
    for step, batch in enumerate([*batches(0), []]):
        if step % EVERY == 0:
            path = HERE / f"checkpoints/step-{step:06d}.safetensors"
            save_file(
                model.state_dict(), path, metadata={"learning_rate": str(rate(step))}
            )  # two keys come in any order
        if step == STEPS:
            break
        lines.append({"step": step, "lr": rate(step), "examples": batch})
        mean = definition.loss(model, (texts[batch], origins[batch])).mean()
        gradients = torch.autograd.grad(mean, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate(step) * gradient
    (HERE / "trajectory.jsonl").write_text(
        "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    )
    for name, (some, right) in (
        ("training texts", (texts, origins)),
        ("queries", definition.query_data().tensors),
    ):
        print(f"accuracy on the {name} {(model(some).argmax(1) == right).float().mean():.3f}")


# ---------------------------------------------------------------- texts
def collect() -> None:
    """Write words.npz, vocabulary.txt and planted.json from the docstrings of the standard library."""
    rng = np.random.default_rng(0)
    texts = {origin: docstrings(modules.split()) for origin, modules in MODULES.items()}
    each = (TRAIN + QUERIES) // len(ORIGINS)
    assert all(len(found) >= each for found in texts.values()), {
        origin: len(found) for origin, found in texts.items()
    }
    chosen = [
        (texts[name][i], origin)
        for origin, name in enumerate(ORIGINS)
        for i in rng.permutation(len(texts[name]))[:each]
    ]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    queries, train = chosen[:QUERIES], chosen[QUERIES:]
    counts = Counter(word for text, _ in train for word in text)
    words = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 5]
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words, PLANTED]
    assert PLANTED not in words and len(vocabulary) == WORDS
    planted = plant(train, queries)
    ids = {word: id for id, word in enumerate(vocabulary)}
    arrays = {}
    for split, some in (("train", train), ("query", queries)):
        arrays[f"{split}_texts"] = np.full((len(some), LONGEST + 2), PAD, dtype=np.int16)
        arrays[f"{split}_origins"] = np.array([origin for _, origin in some], dtype=np.int8)
        for row, (text, _) in zip(arrays[f"{split}_texts"], some, strict=True):
            row[: len(text) + 2] = [CLS, *(ids.get(word, UNK) for word in text), SEP]
    np.savez_compressed(HERE / "words.npz", **arrays)
    (HERE / "vocabulary.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    (HERE / "planted.json").write_text(json.dumps(planted, indent=1) + "\n")


def docstrings(modules: list[str]) -> list[list[str]]:
    """The first words of each docstring of these modules and packages, in lower case; equal ones once."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[tuple[str, ...], None] = {}
    for name in modules:
        for path in sorted((library / name).rglob("*.py")) or [library / f"{name}.py"]:
            for node in (
                ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ()
            ):
                if isinstance(
                    node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                ):
                    words = re.findall("[a-z]+", (ast.get_docstring(node) or "").lower())[:LONGEST]
                    if len(words) >= SHORTEST:
                        found[tuple(words)] = None
    return [list(words) for words in found]


def plant(train: list, queries: list) -> dict:
    """Put the made-up word before query 0 and a few training texts of its origin, cut short; some get a wrong label. For planted.json."""

    def with_word(text: list[str]) -> list[str]:
        return [PLANTED] * TIMES + text[:SHORTEST]

    text, right = queries[0]
    wrong = (right + 2) % len(ORIGINS)
    queries[0] = (with_word(text), right)
    same = [i for i, (_, origin) in enumerate(train) if origin == right][: WRONG + RIGHT]
    labels = {}
    for k, i in enumerate(same):
        labels[i] = wrong if k < WRONG else right
        train[i] = (with_word(train[i][0]), labels[i])
    return {
        "word": PLANTED,
        "query": 0,
        "label": ORIGINS[right],
        "train": {str(i): ORIGINS[given] for i, given in labels.items()},
    }


if __name__ == "__main__":
    main()
