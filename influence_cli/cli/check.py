"""influence check: are the gradients correct, and is the cache complete?"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from influence_cli.cli import command, options
from influence_cli.cli.torch_import import import_torch

if TYPE_CHECKING:
    from influence_cli.api.opening import Opened
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.diagnostics.finding import Finding

SHOWN = 8  # names in a message


@command("check", example="influence check my_run --layers head")
def check(
    shared: options.Shared,
    train: options.Train = None,
    queries: options.Queries = None,
    target_correlation: options.TargetCorrelation = None,
    format: options.Format = None,
    output: options.Output = None,
) -> None:
    """Are the gradients correct on this model, and is the cache complete? Exit code 1 if not.

    check computes gradients of a few examples by the fast path and by plain autograd, in other
    batches, again, and summed. It reads every file of the cache. The table has one row per check
    and parameter: the worst relative error, and the rounding error that is allowed. With --project,
    or with a --store narrower than the precision, it compares the scores of a sample of pairs with
    exact ones. It compares gradients in bfloat16, float16 or tf32 with gradients in float32, and
    losses with the own loss of a Hugging Face model.
    """
    from influence_cli.api import specs
    from influence_cli.output.columns import CHECK_COLUMNS
    from influence_cli.output.tables import TableWriter

    sink = TableWriter.open(format, output)
    specs.check_stdin(queries, train)
    target = specs.target(target_correlation)

    import_torch()
    from influence_cli.cli.opening import open_shared

    opened = open_shared(shared, create=False, searched=target is not None)
    ids = {
        "train": opened.ids("--train", train, "train"),
        "query": opened.ids("--queries", queries, "query"),
    }
    findings = find_errors(opened, ids, shared.projection, target)
    rows = [
        (f.check, f.split, f.subject, "ok" if f.passed else "FAILED", f.error, f.allowed, f.note)
        for f in findings
    ]
    sink.write(rows, CHECK_COLUMNS)
    note_frozen_parameters(opened)
    raise_failures(findings)


def find_errors(
    opened: "Opened", ids: "Mapping[str, Ids]", projection: str | None, target: float | None
) -> "list[Finding]":
    """All checks. Ways to compute a number are compared without TF32."""
    from influence_cli.diagnostics.base_check import check_base
    from influence_cli.diagnostics.cache_check import check_cache
    from influence_cli.diagnostics.fidelity import check_fidelity
    from influence_cli.diagnostics.gradient_check import check_gradients, check_precision
    from influence_cli.diagnostics.own_loss_check import check_own_loss
    from influence_cli.gradients.tf32 import without_tf32

    request = opened.gradients, opened.checkpoints, list(opened.columns)
    precision = check_precision(*request)
    with without_tf32(opened.gradients.settings.tf32):
        return [
            *check_gradients(*request, ids),
            *check_own_loss(opened.gradients, opened.checkpoints, ids),
            *check_base(opened.gradients, opened.checkpoints),
            *precision,
            *check_cache(opened.gradients, opened.checkpoints),
            *check_fidelity(*request, ids, projection, target),
        ]


def note_frozen_parameters(opened: "Opened") -> None:
    from influence_cli.errors import listed

    parameters = opened.run.model.module.named_parameters()
    frozen = [name for name, parameter in parameters if not parameter.requires_grad]
    if frozen:
        names = listed(frozen, SHOWN)
        opened.reporter.note(f"{len(frozen)} frozen parameters have no gradients: {names}")


def raise_failures(findings: "Sequence[Finding]") -> None:
    """Raises InfluenceError if a check failed. It names the failed checks and says what to do."""
    from influence_cli.errors import InfluenceError

    failed = [finding for finding in findings if not finding.passed]
    if not failed:
        return
    details = [
        f"{f.check} of {f.split} examples: {f.subject}{f' ({f.note})' if f.note else ''}"
        for f in failed[:SHOWN]
    ]
    if len(failed) > SHOWN:
        details.append(f"and {len(failed) - SHOWN} more")
    checks = {finding.check for finding in failed}
    if "target" in checks:
        details.append("the target needs a larger --project K: see the last row of the table")
    if "cache" in checks:
        details.append("delete a damaged cache file; the next command computes it again")
    if "precision" in checks:
        details.append("these gradients are mostly rounding error: use --precision float32")
    if "loss" in checks:
        details.append("the scores are of another loss than the model's: correct definition.py")
    if "base" in checks:
        details.append("the scores are of a random base model: correct model() in definition.py")
    if checks - {"target", "cache", "zeros", "precision", "loss", "base"}:
        details.append(
            "do not trust scores of these parameters; leave a parameter out: --layers '!NAME'"
        )
    raise InfluenceError(f"{len(failed)} of {len(findings)} checks failed", *details)
