"""Texts of definition.py whose functions return what no definition should, or odd texts."""

import random
from dataclasses import dataclass

from faults.forks import DEFINITION
from faults.inputs.target import expect
from faults.mutate import random_text

LOSS = 'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")'
LABEL = 'return "abc"[int(example[1])]'
# the value of a loss -> whether a table may come of it
LOSSES = {
    "value": True, "value.double()": True, "value * 1e-3": True, "value.abs()": True,
    "value.half().float()": True, "value + 7": True, "value * 0": False, "value * float('nan')": False,
    "value + float('inf')": False, "value - float('inf')": False, "value.sum()": False,
    "value.mean()": False, "value[:1]": False, "value.unsqueeze(1)": False, "value.unsqueeze(0)": False,
    "value.long()": False, "value.bool()": False, "value.detach()": False, "value.tolist()": False,
    "value.to(torch.complex64)": False, "[value]": False, "None": False, "(value, value)": False,
    "value.item()": False, "torch.zeros(len(value))": False, "value.flip(0)": False,
    "torch.cat([value, value])": False, "value.detach().requires_grad_()": False, "float(value.sum())": False,
    "torch.where(batch[0][:, 0] > 1, float('nan'), value)": False, "value.to_sparse()": False,
    "value / (batch[0][:, 0] * 0)": False, "torch.log(value - value)": False, "value.to('meta')": False,
    "1 / 0": False, "exec('raise SystemExit(0)')": False, "exec('raise KeyError(chr(27))')": False,
    "exec('raise RecursionError')": False, "value.numpy()": False, "'x' * 10_000_000": False,
}  # fmt: skip
# the value of a label -> the text in the table; None: any
LABELS = {
    LABEL.removeprefix("return "): None, "None": "", "7": "7", "1.5": "1.5", "torch.tensor(3)": "3",
    "float('nan')": "nan", "b'x'": "b'x'", "torch.zeros(2, 2)": None, "10**5000": None, "object": None,
    "1 / 0": None, "exec('raise SystemExit(3)')": None, "[]": "[]", "'x' * 100_000": "x" * 100_000,
}  # fmt: skip
DATA = {  # another training set -> whether a table may come of it
    "examples(0, 40)": True, "examples(0, 1)": True, "list(examples(0, 40))": True, "[]": False,
    "None": False, "7": False, "iter([1])": False, "'text'": False, "{}": False,
    "examples(0, 0)": False, "[(torch.zeros(4), 0), (torch.zeros(5), 1)]": False,
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A definition. `is_valid`: whether a table may come of it; `label`: its cell, None: any."""

    text: str
    is_valid: bool
    label: str | None


def make_definition(rng: random.Random) -> Written:
    loss, is_valid = rng.choice(list(LOSSES.items())) if rng.random() < 0.6 else ("value", True)
    label, cell = rng.choice(list(LABELS.items()))
    if rng.random() < 0.4:
        cell = random_text(rng)
        label = ascii(cell)
        cell = cell.encode("utf-8", "backslashreplace").decode()
    data, has_data = (
        rng.choice(list(DATA.items())) if rng.random() < 0.2 else ("examples(0, 40)", True)
    )
    text = DEFINITION.replace(LOSS, f"value = {LOSS.removeprefix('return ')}\n    return {loss}")
    text = text.replace(LABEL, f"return {label}").replace("examples(0, 40)", data)
    return Written(text, is_valid and has_data, cell)


def judge_definition(written: Written, rows: list[dict[str, str]]) -> None:
    """A table came of the definition: it must be a valid one."""
    expect(written.is_valid, "a table of an invalid definition")
    expect(bool(rows), "no rows")
    if written.label is not None:
        cells = {row["train_label"] for row in rows}
        expect(cells == {written.label}, "another label")
