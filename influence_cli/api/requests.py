"""From checked arguments to what a method receives."""

from typing import TYPE_CHECKING

from influence_cli.api.opening import Opened
from influence_cli.api.score import PLAIN, ScoreArguments
from influence_cli.errors import UsageProblem
from influence_cli.methods.declaration import Method
from influence_cli.methods.request import ScoreRequest
from influence_cli.run.learning_rates import weigh_checkpoints

if TYPE_CHECKING:
    from influence_cli.cache.id_blocks import Ids


def score_request(
    opened: Opened,
    method: Method,
    own_options: object,
    train: "Ids",
    queries: "Ids",
    scored: ScoreArguments = PLAIN,
    last_checkpoint: bool = False,
) -> ScoreRequest:
    """The request to one method. Raises UsageProblem for arguments that do not fit the run.

    `last_checkpoint`: a method of one checkpoint reads the last of --steps; else that is refused.
    """
    checkpoints = opened.checkpoints
    if method.checkpoints == "one":
        if opened.steps is not None and len(checkpoints) > 1 and not last_checkpoint:
            raise UsageProblem(
                f"--method {method.name} reads one checkpoint, "
                f"--steps {opened.steps} selects {len(checkpoints)}",
                "name one step",
            )
        checkpoints = checkpoints[-1:]
    return ScoreRequest(
        checkpoints=checkpoints,
        weights=opened.weights(scored.lr, scored.lr_weights)
        if method.weighted
        else tuple(weigh_checkpoints(checkpoints, None, "none")),
        columns=method.select_columns(opened.run, own_options)
        if method.select_columns
        else opened.columns,
        train=train,
        queries=queries,
        sum_queries=scored.sum_queries,
        normalize=scored.normalize or method.normalized,
        by=scored.by,
        groups=opened.groups(scored.group_by, train) if scored.group_by else None,
        options=own_options,
        seed=opened.seed,
    )
