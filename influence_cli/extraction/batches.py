"""Batches of a run's examples on the device, and the errors of the user's functions on them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from influence_cli.errors import (
    DefinitionError,
    GradientError,
    InfluenceError,
    is_out_of_memory,
    listed,
)
from influence_cli.gradients.batches import leaves, to
from influence_cli.run.definition import describe_failure
from influence_cli.run.run import Run


class Batches:
    """Batches of both splits. `cast`: dtype of floating batch tensors, None leaves them."""

    def __init__(self, run: Run, device: torch.device, cast: torch.dtype | None) -> None:
        self.run, self.device, self.cast = run, device, cast

    def of(
        self, split: str, ids: np.ndarray, cast: torch.dtype | None = None
    ) -> tuple[Any, Callable[[int], Any]]:
        """A batch on the device, and a function that gives its examples as batches of one.

        `cast`: dtype of floating tensors, None for the run's. The batch is what the user collates.
        """
        examples = self.run.examples(split)

        def single(i: int) -> Any:  # a batch of any type
            return to(examples.batch(ids[i : i + 1]), self.device, cast or self.cast)

        try:
            return to(examples.batch(ids), self.device, cast or self.cast), single
        except InfluenceError:
            raise
        except (Exception, SystemExit) as error:
            raise self.explained(split, error, len(ids)) from error

    def in_turn(
        self, split: str, parts: Iterable[np.ndarray]
    ) -> Iterator[tuple[Any, Callable[[int], Any]]]:
        """`of` each of these parts. For a CUDA device, a thread collates and sends the next batch
        while the device computes.
        """
        if not sends_ahead(self.device):
            yield from (self.of(split, ids) for ids in parts)
            return
        with ThreadPoolExecutor(1) as thread:
            pending: deque[Future[tuple[Any, Callable[[int], Any]]]] = deque()
            for ids in parts:
                pending.append(thread.submit(self.of, split, ids))
                if len(pending) > 1:
                    yield pending.popleft().result()
            yield from (last.result() for last in pending)

    def quantity_name(self, split: str) -> str:
        """The user's function whose gradients are computed: `loss()`, of queries `measure()`."""
        measured = split == "query" and self.run.definition.has("measure")
        return "measure()" if measured else "loss()"

    def explained(self, split: str, error: Exception | SystemExit, size: int) -> InfluenceError:
        """The error to raise for an exception in the user's functions, in a batch of `size`."""
        text = str(error)
        if is_out_of_memory(error):
            return GradientError(
                f"out of memory: gradients of a batch of {size}",
                text.splitlines()[0] if text else type(error).__name__,
                "--batch-size N computes fewer examples at once; "
                "--layers GLOB selects fewer parameters; finished units are kept",
            )
        name = self.quantity_name(split).removesuffix("()")
        return describe_failure(self.run.definition, name, error)

    def refuse_dropped(self, split: str, ids: np.ndarray) -> None:
        """Raise DefinitionError where collate() returns fewer examples than it got."""
        if not self.run.definition.has("collate"):
            return

        def lacks_some(some: np.ndarray) -> bool:
            sizes = [len(tensor) for tensor in leaves(self.of(split, some)[0]) if tensor.ndim]
            return bool(sizes) and max(sizes) < len(some)

        examples = self.run.examples(split)
        dropped = [int(index) for index in ids if lacks_some(np.array([index]))]
        if dropped or lacks_some(ids):
            which = f"; it drops item {listed(dropped)}" if dropped else ""
            raise DefinitionError(
                f"collate() returned fewer examples than it got items of {examples.source}{which}",
                "expected: each item, in the same order",
                "leave examples out in train_data() and query_data(), or with --train, --queries",
            )


def sends_ahead(device: torch.device) -> bool:
    """Whether a device computes beside Python, so that the next batch can be sent to it."""
    return device.type == "cuda"
