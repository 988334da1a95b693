"""What the study runs. It was fixed before the study ran.

Each method scores the queries of a run once. Every protocol then evaluates these scores. `tsloo`
compares parts of scores by step, so it scores again.
"""

from dataclasses import dataclass, field

LINEAR = ("attention", "project", "hidden", "output")  # in each block of the GPT
LINEAR_LAYERS = [word for layer in LINEAR for word in ("--layers", f"blocks.*.{layer}")]
# name in the tables -> flags of `influence score`
METHODS = {
    "random": ("--method", "random"),
    "repsim": ("--method", "repsim"),
    "grad-dot": ("--method", "grad-dot"),
    "grad-cos": ("--method", "grad-cos"),
    "tracin": ("--method", "tracin"),
    "tracin-we": ("--method", "tracin-we"),
    "trak": ("--method", "trak"),
    "influence kfac": ("--method", "influence", "--curvature", "kfac"),
    "influence ekfac": ("--method", "influence", "--curvature", "ekfac"),
    "influence ekfac, linear layers": (
        "--method",
        "influence",
        *LINEAR_LAYERS,
        "--layers",
        "head",
    ),  # those that kronfluence covers
    "influence shampoo": ("--method", "influence", "--curvature", "shampoo"),
    "influence hessian": ("--method", "influence", "--curvature", "hessian"),
    "influence gauss-newton": ("--method", "influence", "--curvature", "gauss-newton"),
    "dve": ("--method", "dve"),
    "dve --replay": ("--method", "dve", "--replay"),
    "unroll --replay": ("--method", "unroll", "--replay"),
    "in-run": ("--method", "in-run"),
}
ALWAYS = ("random", "grad-dot", "grad-cos", "tracin", "influence kfac", "influence ekfac",
          "influence shampoo", "dve --replay", "unroll --replay", "in-run")  # fmt: skip
CLASSES = ("repsim", "trak")  # of an input with one label
TEXTS = ("repsim", "influence ekfac, linear layers")


@dataclass(frozen=True)
class Plan:
    """What is done with one run. `queries`: how many. `deletions`: how many of them `deletion`
    takes; 0: only in the full study. `removals`: of `tsloo`; 0: likewise. `mislabel`: its flags.
    `slow_...`: what the full study has beside or instead.
    """

    run: str
    methods: tuple[str, ...]
    queries: int = 20
    deletions: int = 5
    removals: int = 60
    mislabel: tuple[str, ...] = ()
    tsloo: tuple[tuple[str, ...], ...] = field(
        default=(("tracin",), ("dve", "--replay"), ("unroll", "--replay"))
    )
    slow_methods: tuple[str, ...] = ()
    slow_deletions: int = 5
    slow_removals: int = 60


SGD = ("dve",)  # without a replay it knows plain SGD alone
EXACT = ("influence hessian", "influence gauss-newton")
FLIPS = ("--flip", "0.1")
WRONG = ("--wrong", "wrong.txt")
PLANS = (
    # On the GPT, cg with the Hessian takes 18 minutes; with Gauss-Newton it did not end in 40.
    Plan("gpt-sgd", ALWAYS + TEXTS + SGD, 20, 0, 0, slow_methods=EXACT[:1], slow_deletions=3),
    Plan("gpt-adamw", ALWAYS + TEXTS, 20, 0, 0, slow_deletions=3),
    Plan("fashion-sgd", ALWAYS + CLASSES + SGD, 20, 3, mislabel=FLIPS, slow_methods=EXACT),
    Plan("fashion-adamw", ALWAYS + CLASSES, 20, 3, mislabel=FLIPS, slow_methods=EXACT),
    # Added after the first study: at the rate of fashion-sgd, training is chaotic.
    Plan("fashion-sgd-slow", ALWAYS + CLASSES + SGD, 20, 0, slow_methods=EXACT),
    Plan("words-sgd", ALWAYS + CLASSES + SGD + EXACT + ("tracin-we",)),
    Plan("digits-sgd", ALWAYS + CLASSES + SGD + EXACT, mislabel=WRONG),
    Plan("digits-adamw", ALWAYS + CLASSES + EXACT, mislabel=WRONG),
)
FRACTIONS = ("0.5", "0.95")  # of the training examples that a subset keeps
SUBSETS = 40
TOP_K = "1%,5%"
