"""A Lightning module, its data and its loss, for the functions of a definition.py."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import default_collate

from influence_cli.errors import DataError, DefinitionError
from influence_cli.integrations.column_guess import is_number
from influence_cli.integrations.hf_encoding import Row, open_image, read_column

TOLERANCE = 1e-4  # of two ways to compute one loss


@dataclass(frozen=True)
class LightningTask:
    """What a definition.py asks of a Lightning run.

    `model_class`: package.module:Class. `path`: the folder in which Python finds that package.
    `hyperparameters`: arguments of the class. `inputs`: columns of what training_step() gets first;
    several columns of numbers become one vector. `label`: the column of what it gets second.
    `scale`: pixels are divided by it. `one_by_one`: call training_step() for each example alone,
    where its loss of a batch is not the mean of the losses of its examples.
    """

    model_class: str
    path: Path | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[str] = ()
    label: str | None = None
    id: str | None = None
    scale: float = 1.0
    one_by_one: bool = False

    # ------------------------------------------------------------ the model
    def model(self) -> Any:  # Any: the user's LightningModule
        """The module without the weights of a checkpoint. It logs nothing."""
        model = load_class(self.model_class, self.path)(**self.hyperparameters)
        if not callable(getattr(model, "training_step", None)):
            raise DefinitionError(
                f"{self.model_class} has no training_step()", "expected: a LightningModule"
            )
        model.log = model.log_dict = ignore  # there is no trainer that a value could go to
        return model

    def loss(self, model: Any, batch: Any) -> Tensor:
        """(B,) the loss of training_step() of each example alone."""
        if self.one_by_one:
            return torch.stack([step_loss(model, part) for part in split_batch(batch)])
        with UnreducedLosses():
            return step_loss(model, batch)

    # ------------------------------------------------------------ the data
    def dataset(self, split: str) -> Any:  # Any: the user's dataset
        """The dataset of the module's own train_dataloader() or val_dataloader()."""
        name = f"{split}_dataloader"
        loader = getattr(self.model(), name)()
        if not hasattr(loader, "dataset"):
            raise DefinitionError(
                f"{name}() of {self.model_class} returned a {type(loader).__name__}",
                "expected: a DataLoader, whose dataset influence reads by index",
            )
        return loader.dataset

    def examples(self, rows: Any) -> "LightningRows":  # Any: a sequence of rows
        """A dataset of pairs (input, label) of these rows."""
        return LightningRows(rows, self)

    def example(self, row: Row) -> tuple[Any, ...]:  # Any: tensors and numbers
        """(input, label) of a row; the input alone where the task has no label."""
        values = [read_input(read_column(row, name), self.scale) for name in self.inputs]
        value = values[0] if len(values) == 1 else torch.stack(values)
        if self.label is None:
            return (value,)
        return value, read_label(read_column(row, self.label))

    def label_text(self, example: Any) -> str:  # Any: the user's example
        """The label, where an example is a pair whose second part is one number."""
        pair = isinstance(example, tuple | list) and len(example) == 2
        label = torch.as_tensor(example[1]) if pair else torch.zeros(2)
        return str(label.item()) if label.numel() == 1 else ""


class LightningRows:
    """Rows as pairs (input, label), made when they are read."""

    def __init__(self, rows: Any, task: LightningTask) -> None:  # Any: a sequence of rows
        self.rows, self.task = rows, task

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.task.example(self.rows[index])


def ignore(*values: object, **options: object) -> None:
    """In place of LightningModule.log()."""


def load_class(name: str, path: Path | None) -> Callable[..., Any]:
    """The class package.module:Class. Raises DefinitionError where it can't be imported."""
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise DefinitionError(f"{name} names no class", "expected: package.module:Class")
    if path is not None and str(path) not in sys.path:
        sys.path.insert(0, str(path))
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise DefinitionError(
            f"{module_name} can't be imported: {error}",
            f"looked in: {path or 'the folders of sys.path'}",
            "Lightning itself is the extra: pip install 'influence-cli[lightning]'",
        ) from error
    except AttributeError:
        raise DefinitionError(
            f"{module_name} has no class {class_name}", "expected: package.module:Class"
        ) from None


# ---------------------------------------------------------------- losses
@cache
def reducing_functions() -> frozenset[Any]:  # Any: functions of torch
    """The losses of torch.nn.functional: those with an argument `reduction`."""
    return frozenset(
        function
        for name, function in vars(F).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and "reduction" in inspect.signature(function).parameters
    )


class UnreducedLosses(TorchFunctionMode):
    """torch's losses give one value per row of the batch, instead of their mean or sum."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: torch's
        if function not in reducing_functions():
            return function(*args, **(kwargs or {}))
        bound = inspect.signature(function).bind(*args, **(kwargs or {}))
        reduction = bound.arguments.get("reduction", "mean")
        if reduction == "none":
            return function(*args, **(kwargs or {}))
        bound.arguments["reduction"] = "none"
        values = function(*bound.args, **bound.kwargs)
        if values.dim() < 2:
            return values
        flat = values.flatten(1)
        return flat.mean(1) if reduction == "mean" else flat.sum(1)


def step_loss(model: Any, batch: Any) -> Tensor:  # Any: the user's
    """The loss that training_step() returns."""
    result = model.training_step(batch, 0)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise DefinitionError(
            f"training_step() returned a {type(loss).__name__}",
            "expected: the loss, or a dict with it as `loss`",
            "a module that optimises by itself has no loss that influence can read",
        )
    return loss


def split_batch(batch: Any) -> list[Any]:  # Any: tensors, and containers of them
    """The batches of one of a batch."""
    if isinstance(batch, Tensor):
        return list(batch.split(1))
    if isinstance(batch, Mapping):
        parts = [split_batch(value) for value in batch.values()]
        return [dict(zip(batch, values, strict=True)) for values in zip(*parts, strict=True)]
    if isinstance(batch, tuple | list):
        columns = [split_batch(value) for value in batch]
        return [type(batch)(values) for values in zip(*columns, strict=True)]
    raise DefinitionError(
        f"a batch holds a {type(batch).__name__}", "expected: tensors, and containers of them"
    )


def needs_one_by_one(task: LightningTask, dataset: Any, number: int = 4) -> bool:  # Any: a dataset
    """Whether losses of a batch without their mean differ from the losses of its examples alone.

    It looks at the first examples and at the weights with which the module starts.
    """
    model = task.model().eval()
    batch = default_collate([dataset[index] for index in range(min(number, len(dataset)))])
    with torch.no_grad():
        alone = torch.stack([step_loss(model, part).reshape(()) for part in split_batch(batch)])
        try:
            with UnreducedLosses():
                together = step_loss(model, batch)
        except (RuntimeError, ValueError, TypeError, IndexError):  # it needs one number
            return True
    if together.shape != alone.shape:
        return True
    return not torch.allclose(together, alone, rtol=TOLERANCE, atol=TOLERANCE * 1e-2)


# ---------------------------------------------------------------- rows
def read_input(value: Any, scale: float) -> Tensor:  # Any: a number, an array, or a picture
    """A float tensor. Pictures become (C, H, W)."""
    if (isinstance(value, str) and not is_number(value)) or isinstance(value, bytes | Mapping):
        value = np.array(open_image(value)).transpose(2, 0, 1)
    try:
        tensor = torch.as_tensor(float(value) if isinstance(value, str) else value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"an input of the type {type(value).__name__} can't be read: {error}",
            "expected: numbers, arrays or pictures; write train_data() by hand for others",
        ) from error
    if tensor.is_floating_point() or scale != 1 or tensor.dtype == torch.uint8 or not tensor.dim():
        tensor = tensor.float()
    return tensor / scale if scale != 1 else tensor


def read_label(value: Any) -> Tensor:  # Any: a number, its text, or an array
    if isinstance(value, str):
        if not is_number(value):
            raise DataError(f"the label {value!r} is no number", "expected: a class number")
        value = float(value) if "." in value or "e" in value.lower() else int(value)
    tensor = torch.as_tensor(value)
    return tensor.float() if tensor.is_floating_point() else tensor.long()
