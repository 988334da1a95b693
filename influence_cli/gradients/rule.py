"""What a layer rule is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from influence_cli.gradients.forms import Form

Arguments = Mapping[str, Any]  # Any: of the call, by name; weights and biases detached
Gradients = dict[str, Form]  # "weight" and "bias", as far as they are wanted


@dataclass(frozen=True)
class Rule:
    """`gradients(arguments, x, g)`: x (B, m, ...) the input and g (B, m, ...) the gradient at the
    output, examples first.

    `arguments`: the function's parameters in order; `keywords`: those of another name there.
    `applies`: whether the rule is right for these arguments. `rows_first`: the layer's batch must
    be its first axis (otherwise any axis may be).
    """

    arguments: tuple[str, ...]
    gradients: Callable[[Arguments, Tensor, Tensor], Gradients]
    applies: Callable[[Arguments], bool] = lambda arguments: True
    rows_first: bool = False
    keywords: Mapping[str, str] = field(default_factory=dict)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(self.arguments, args, strict=False)) | {
            self.keywords.get(name, name): value for name, value in kwargs.items()
        }
