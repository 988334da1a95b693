"""Batches whose labels are drawn from the model: their gradients make the true Fisher matrix.

E[g g^T] over labels drawn from the model is the curvature J^T S J of a loss that is minus a
log-likelihood (Martens 2020, arXiv:1412.1193). Each example has one label, which depends on the
random seed and on its id alone: batches, resumed passes and processes do not change it.

Letters: B examples.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.id_blocks import Ids, spread_evenly
from influence_cli.errors import DefinitionError, InfluenceError
from influence_cli.extraction.batches import Batches
from influence_cli.extraction.label_losses import (
    LabelLoss,
    recognize_loss,
    replace_leaf,
    rounding_of,
)
from influence_cli.gradients.batches import leaves, map_tensors, to
from influence_cli.gradients.quantity import plain_attention
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure

SAMPLE = 16  # examples whose losses are compared with outputs()
OUTPUTS_LINE = "def outputs(model, batch): return model(batch[0])"
SAMPLE_LINE = (
    "def sample(outputs, batch, generator): return the batch with labels drawn from outputs"
)
OTHER = "--fisher empirical uses the labels of the data"


class DrawnBatches(Batches):
    """Batches of training examples with drawn labels, at the weights that the model holds."""

    def __init__(self, batches: Batches, seed: int, checkpoint: Checkpoint, eps: float) -> None:
        """`eps`: of the precision of losses.

        Raises DefinitionError where the definition lacks a function, or has another loss.
        """
        super().__init__(batches.run, batches.device, batches.cast)
        self.seed, self.eps, self.name = seed, eps, batches.run.definition.path.name
        if not self.run.definition.has("outputs"):
            raise DefinitionError(
                f"--fisher true draws labels from the model: {self.name} lacks "
                "outputs(model, batch)",
                f"expected: {OUTPUTS_LINE}",
                OTHER,
            )
        self._expected: dict[int, tuple[float, float]] = {}  # by example: a loss, its rounding
        self.loss: LabelLoss | None = None  # None: sample() draws
        self.describes = f"sample() of {self.name}"
        if not self.run.definition.has("sample"):
            self.loss, self.describes = self._recognize(checkpoint)

    def _recognize(self, checkpoint: Checkpoint) -> tuple[LabelLoss, str]:
        """What the loss is, and where labels come from, by a sample of examples."""
        ids = np.array(spread_evenly(len(self.run.train), SAMPLE))
        batch, _ = super().of("train", ids)
        model = self.run.model.at(checkpoint)
        outputs = self._call("outputs", model, batch)
        losses = self._call("loss", model, batch)
        loss = recognize_loss(
            lambda other: self._call("loss", model, other), batch, outputs, losses, self.eps
        )
        self.run.model.at(self.run.checkpoints[0])  # where a probe expects the model
        if loss is None:
            raise DefinitionError(
                f"--fisher true: loss() in {self.name} is no cross-entropy of one label by "
                "outputs(), and no squared distance between outputs() and a label",
                f"expected for other losses: {SAMPLE_LINE}",
                OTHER,
            )
        return loss, loss.describe(outputs)

    def _call(self, name: str, *arguments: Any) -> Any:  # of the user's function, and its result
        definition = self.run.definition
        try:
            with torch.no_grad(), plain_attention():
                return definition.raw(name)(*arguments)
        except InfluenceError:
            raise
        except (Exception, SystemExit) as error:
            raise describe_failure(definition, name, error) from error

    def of(
        self, split: str, ids: np.ndarray, cast: torch.dtype | None = None
    ) -> tuple[Any, Callable[[int], Any]]:
        """A batch with drawn labels, and a function that gives its examples as batches of one."""
        batch, single = super().of(split, ids, cast)
        if self.loss is None:
            singles = [self._sample(int(id), single(i)) for i, id in enumerate(ids)]
            if len(ids) == 1:
                return singles[0], lambda i: singles[i]
            originals = [leaves(single(i)) for i in range(len(ids))]
            return self._join(batch, originals, singles), lambda i: singles[i]
        leaf, outputs = self.loss.leaf, self._call("outputs", self.run.model.module, batch)
        labels = leaves(batch)[leaf]
        if self.loss.expected(outputs, labels) is None:
            raise DefinitionError(
                f"--fisher true: labels among the training examples {ids[0]} to {ids[-1]} are no "
                "class of outputs()",
                f"found: {labels.min():g} to {labels.max():g}",
                f"{SAMPLE_LINE}, or {OTHER}",
            )
        drawn = self.loss.draw(outputs, labels, [self.generator(int(id)) for id in ids])
        expected_B = self.loss.expected(outputs, drawn)
        assert expected_B is not None
        rounding_B = rounding_of(self.loss, outputs, drawn, expected_B, self.eps)
        pairs = zip(expected_B.tolist(), rounding_B.tolist(), strict=True)
        self._expected.update(zip(ids.tolist(), pairs, strict=True))
        return (
            replace_leaf(batch, leaf, drawn),
            lambda i: replace_leaf(single(i), leaf, drawn[i : i + 1]),
        )

    def in_turn(
        self, split: str, parts: Iterable[np.ndarray]
    ) -> Iterator[tuple[Any, Callable[[int], Any]]]:
        """`of` each of these parts, in this thread: it runs the model."""
        yield from (self.of(split, ids) for ids in parts)

    def generator(self, id: int) -> torch.Generator:
        """The source of an example's draws, on the CPU."""
        digest = hashlib.sha256(f"{self.seed} {id}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def check(self, ids: Ids, losses: Tensor) -> None:
        """Compare losses of drawn labels with those of their likelihood.

        Raises DefinitionError where loss() has another form for some examples than for a sample.
        """
        for id, loss in zip(ids, losses.tolist(), strict=True):
            expected, rounding = self._expected.pop(int(id), (loss, 0.0))
            if not abs(loss - expected) <= rounding:
                raise DefinitionError(
                    f"--fisher true: loss() in {self.name} has another form for example {id} of "
                    f"{self.run.train.source} than for others",
                    f"found: {loss:g} for the label that was drawn, expected: {expected:g}",
                    f"{SAMPLE_LINE}",
                    OTHER,
                )

    # ------------------------------------------------------------ sample() of the definition
    def _sample(self, id: int, single: Any) -> Any:  # batches of one
        """What sample() makes of one example, on the device. It sees tensors on the CPU."""
        cpu = torch.device("cpu")
        outputs = self._call("outputs", self.run.model.module, single)
        outputs = map_tensors(lambda tensor: tensor.detach().cpu(), outputs)
        drawn = self._call("sample", outputs, to(single, cpu, None), self.generator(id))
        shapes = [
            [(tuple(tensor.shape), tensor.dtype) for tensor in leaves(value)]
            for value in (single, drawn)
        ]
        if shapes[0] != shapes[1]:
            raise DefinitionError(
                f"sample() in {self.name} returned another batch than it got",
                f"found:    {shapes[1]}",
                f"expected: {shapes[0]}, with other labels",
            )
        return to(drawn, self.device, None)

    def _join(self, batch: Any, originals: list[list[Tensor]], singles: list[Any]) -> Any:
        """The batch with the labels of its examples."""
        drawn = [leaves(single) for single in singles]
        joined = []
        for number, tensor in enumerate(leaves(batch)):
            before = [parts[number] if number < len(parts) else None for parts in originals]
            after = [parts[number] if number < len(parts) else None for parts in drawn]
            value = join_leaf(tensor, before, after)
            if value is None:
                raise DefinitionError(
                    f"--fisher true: the labels that sample() in {self.name} drew for single "
                    "examples do not fit into a batch of several",
                    "found: collate() changes the examples of a batch by more than padding",
                    "--batch-size 1 computes one example at a time",
                )
            joined.append(value)
        values = iter(joined)
        return map_tensors(lambda tensor: next(values), batch)


def join_leaf(
    tensor: Tensor, before: list[Tensor | None], after: list[Tensor | None]
) -> Tensor | None:
    """A tensor of a batch with the parts that drawing changed. `before`, `after`: the tensor of
    each example alone. None: the place of an example in it is not clear.
    """
    pairs = zip(before, after, strict=True)
    parts = [(old, new) for old, new in pairs if old is not None and new is not None]
    if len(parts) < len(before):
        return None
    if all(torch.equal(old, new) for old, new in parts):
        return tensor
    if len(tensor) != len(parts) or any(len(old) != 1 for old, _ in parts):
        return None
    sides = []
    for from_end in (False, True):
        places = [place_of(tensor[i], old[0], from_end) for i, (old, _) in enumerate(parts)]
        if all(place is not None for place in places):
            sides.append(places)
    if not sides or any(side != sides[0] for side in sides):
        return None
    joined = tensor.clone()
    for i, (place, (_, new)) in enumerate(zip(sides[0], parts, strict=True)):
        joined[i][place] = new[0]
    return joined


def place_of(padded: Tensor, values: Tensor, from_end: bool) -> tuple[slice, ...] | None:
    """Where these values are in their padded copy; None where they are not there."""
    if padded.ndim != values.ndim:
        return None
    sides = zip(padded.shape, values.shape, strict=True)
    place = tuple(slice(n - m, n) if from_end else slice(0, m) for n, m in sides)
    fits = all(n >= m for n, m in zip(padded.shape, values.shape, strict=True))
    return place if fits and torch.equal(padded[place], values) else None
