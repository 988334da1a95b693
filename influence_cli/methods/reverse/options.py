"""The options of methods that backpropagate through the recorded training."""

from dataclasses import dataclass

from influence_cli.methods.declaration import option

AT_HELP = "Explain the checkpoint of this step. [default: the last]"
REPLAY_HELP = "Re-run the recorded steps, to use the exact parameters of each step. Adam needs it."
RENORMALIZE_HELP = (
    "Give the weight of a removed example to the rest of its batch. Without this flag, the weights "
    "of the others stay the same."
)


@dataclass(frozen=True)
class ReverseOptions:
    """`curvature`: one of the method's. `at`: step of the checkpoint to explain, None: the last.

    `replay`: re-run the recorded steps, and use the gradients of each step's own parameters.
    `renormalize`: the rest of a batch takes over the weight of the example that is left out.
    """

    at: int | None = option(None, AT_HELP, "STEP", minimum=0)
    curvature: str = option("none", "Approximation to curvature.", "NAME", choices=("none",))
    replay: bool = option(False, REPLAY_HELP)
    renormalize: bool = option(False, RENORMALIZE_HELP)
