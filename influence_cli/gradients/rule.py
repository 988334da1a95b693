"""What a layer rule is.

Letters: B examples, m rows of the layer's batch per example (1, unless positions were folded into
the batch).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from influence_cli.gradients.forms import Form

Arguments = Mapping[str, Any]  # Any: of the call, by name; weights and biases detached
Gradients = dict[str, Form]  # "weight" and "bias", as far as they are wanted


@dataclass(frozen=True)
class Rule:
    """How the calls of one torch function give the gradients of its weight and bias.

    `gradients(arguments, x, g)`: x (B, m, ...) is the input, g (B, m, ...) the gradient at the
    output. `arguments`: the function's parameters in order. `keywords`: keywords of the function
    that the rule knows by another name. `applies`: whether the rule is right for these arguments.
    `rows_first`: the layer's batch must be its first axis; otherwise any axis in front of the
    features may be. `feature_axes`: how many axes at the end of the input are features.
    """

    arguments: tuple[str, ...]
    gradients: Callable[[Arguments, Tensor, Tensor], Gradients]
    applies: Callable[[Arguments], bool] = lambda arguments: True
    rows_first: bool = False
    feature_axes: Callable[[Arguments], int] = lambda arguments: 1
    keywords: Mapping[str, str] = field(default_factory=dict)

    # Any: whatever a call of a torch function holds
    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, by name."""
        return dict(zip(self.arguments, args, strict=False)) | {
            self.keywords.get(name, name): value for name, value in kwargs.items()
        }
