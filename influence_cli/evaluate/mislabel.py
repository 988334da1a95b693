"""mislabel: do scores find training examples whose labels are wrong? (Pruthi et al. 2020,
arXiv:2002.08484, section 4.1)

evaluate/label_errors.py measures it.
"""

from dataclasses import dataclass
from pathlib import Path

from influence_cli.evaluate.declaration import Protocol
from influence_cli.methods.declaration import deferred, option
from influence_cli.methods.table import METHODS


@dataclass(frozen=True)
class MislabelOptions:
    """`wrong`: a file of ids. `flip`: a share of the labels, which are changed and trained on."""

    wrong: Path | None = option(
        None,
        "File with the ids of the training examples whose labels are wrong, one a line.",
        "FILE",
    )
    flip: float | None = option(
        None,
        "Change this share of the labels with relabel(example, label) of definition.py, and replay "
        "the training with them.",
        "P",
    )


PROTOCOL = Protocol(
    name="mislabel",
    help="find wrong labels by self-influence, and by loss",
    evaluate=deferred("influence_cli.evaluate.label_errors:evaluate"),
    options=MislabelOptions,
    example="influence evaluate my_run mislabel --wrong wrong.txt",
    default_methods=("tracin",),
    methods=tuple(name for name, method in METHODS.items() if method.has_self),
    method_options=("curvature", "damping", "fisher"),
    parts=("layer",),
)
