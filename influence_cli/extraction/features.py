"""Feature vectors of examples: the definition's `features`, or the input of the last Linear layer.

Letters: B batch, F features, S positions.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.cache.id_blocks import Ids
from influence_cli.errors import DefinitionError
from influence_cli.extraction.source import GradientSource
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure

DEFAULT_BATCH_SIZE = 64


class FeatureExtractor:
    """Runs the model forward over examples and returns their features. It stores nothing."""

    def __init__(self, source: GradientSource) -> None:
        self.source, self.run = source, source.run
        self.batch_size = source.budget.requested_batch_size or DEFAULT_BATCH_SIZE

    def features(self, split: str, checkpoint: Checkpoint, ids: Ids) -> Tensor:
        """(N, F) float64 on the CPU, with the weights of a checkpoint.

        Raises DefinitionError: `features` fails or has another shape; the model has no Linear
        layer and the definition no `features`.
        """
        model = self.run.model.at(checkpoint)
        parts = []
        for first in range(0, len(ids), self.batch_size):
            some = np.asarray(ids[first : first + self.batch_size])
            batch, _ = self.source.extractor.batches.of(split, some)
            with torch.no_grad():
                features_BF = self._features(model, batch, len(some))
            parts.append(features_BF.to("cpu", torch.float64))
        return torch.cat(parts)

    def _features(self, model: nn.Module, batch: Any, count: int) -> Tensor:  # the user's batch
        definition = self.run.definition
        if not definition.has("features"):
            return pool_positions(self._last_linear_input(model, batch), count)
        try:
            features = definition.raw("features")(model, batch)
        except (Exception, SystemExit) as error:
            raise describe_failure(definition, "features", error) from error
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != count:
            returned = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise DefinitionError(
                f"features() in {definition.path.name} returned {returned} for {count} examples",
                f"expected: a tensor ({count}, F)",
            )
        return features

    def _last_linear_input(self, model: nn.Module, batch: Any) -> Tensor:  # the user's batch
        """The input of the Linear module that ran last while the loss was computed."""
        inputs: list[Tensor] = []

        def remember(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[:] = [arguments[0]]

        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_pre_hook(remember) for module in linears]
        definition = self.run.definition
        try:
            definition.raw("loss")(model, batch)
        except (Exception, SystemExit) as error:
            raise describe_failure(definition, "loss", error) from error
        finally:
            for handle in handles:
                handle.remove()
        if not inputs:
            raise DefinitionError(
                f"{definition.path.name} lacks features(), and the model runs no nn.Linear",
                "expected: features(model, batch) returns a tensor (B, F)",
            )
        return inputs[0]


def pool_positions(values: Tensor, count: int) -> Tensor:
    """(B, F) from (B, F) or (B, ..., F), by the mean over positions.

    Raises DefinitionError where the first axis does not count the examples.
    """
    if values.dim() < 2 or len(values) != count:
        raise DefinitionError(
            f"the input of the last Linear layer is {tuple(values.shape)} for {count} examples",
            "expected: (B, F) or (B, ..., F)",
            "define features(model, batch) to choose others",
        )
    return values.flatten(1, -2).mean(1) if values.dim() > 2 else values
