"""The kinds of failure that a user can meet. The command line prints an error once."""

import reprlib

LONGEST_PART = 2000  # characters of a headline, or of one detail


class InfluenceError(Exception):
    """A known mistake. The headline says what is wrong with what; the details say what was found
    and expected, and what to do.

    `exit_code` 1: a problem of the run or the cache; 2: of the command line.
    """

    exit_code = 1

    def __init__(self, headline: str, *details: str) -> None:
        headline, *shown_details = map(cut_part, (headline, *details))
        super().__init__(headline, *shown_details)
        self.headline, self.details = headline, tuple(shown_details)

    def __str__(self) -> str:
        return "\n  ".join((self.headline, *self.details))


class UsageProblem(InfluenceError):
    """A flag or argument that does not fit the run, the machine or another flag."""

    exit_code = 2


class DefinitionError(InfluenceError):
    """definition.py can't be loaded, lacks a function, or one of its functions fails or returns the
    wrong thing.
    """


class DataError(InfluenceError):
    """A dataset that can't be read as a fixed sequence of examples."""


class CheckpointError(InfluenceError):
    """Checkpoints that are missing, broken, ambiguous, or of another model."""


class TrajectoryError(InfluenceError):
    """A trajectory.jsonl that is broken, incomplete, or of another run."""


class GradientError(InfluenceError):
    """A loss without usable gradients: not per example, not differentiable, not finite, or too
    large for memory.
    """


class NonFiniteScore(InfluenceError):
    """A score that is NaN or infinite. `query`: its position in the request; `train`: the id of
    the training example, or the number of the group.
    """

    def __init__(self, query: int, train: int, score: float, where: str = "") -> None:
        self.query, self.train, self.score = query, train, score
        super().__init__(
            f"the score of training example {train} is {score} for query number {query + 1}"
            " of the request",
            where or "a product of its gradients is too large for float64, or not a number",
            "choose a smaller --lr, or --lr-weights none; look for a loss that is scaled up; "
            "`influence check` finds damaged cache files",
        )


class CacheError(InfluenceError):
    """A cache that can't be written, can't be read, or belongs to something else."""


class RankLost(InfluenceError):
    """Another rank exited: it failed (and reports its own error) or was killed."""


class OutputError(InfluenceError):
    """A table that can't be written."""


class TableError(InfluenceError):
    """A table that can't be read, or that does not fit the other tables."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's MemoryError, a device's error, or torch's plain RuntimeError
    on a CPU.
    """
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "allocate memory" in text
        or "not enough memory" in text
    )


def known_error(error: Exception) -> InfluenceError | None:
    """The error to show; None for a fault of this package. An OSError that no room expects is a
    file or folder that vanished, or that the system refuses.
    """
    if isinstance(error, InfluenceError):
        return error
    if is_out_of_memory(error):
        return InfluenceError(
            "out of memory",
            "select fewer --queries or --layers at once; finished units are kept",
            "see where it happened: --debug",
        )
    if isinstance(error, OSError) and error.filename is not None:
        return InfluenceError(
            f"{error.filename}: {error.strerror}",
            "a file or folder that this command uses was removed or changed, or is not accessible",
            "finished work is kept; see where it happened: --debug",
        )
    return None


def cut_part(text: str) -> str:
    """A part of a message that holds a value of 10 MB, in a readable length."""
    if len(text) <= LONGEST_PART:
        return text
    return f"{text[:LONGEST_PART]}... ({len(text):,} characters)"


def is_too_large(error: RuntimeError) -> bool:
    """Whether torch refused a number, such as a learning rate, that its tensors can't hold."""
    return "cannot be converted to type" in str(error)


def listed(names, most: int = 8, count: int | None = None) -> str:
    """`a, b, c and 12 more`: a list short enough for an error message. `count`: of all names, where
    `names` are the first ones.
    """
    names = [str(name) for name in names]
    more = (count or len(names)) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 file`, `2,000 files`; `plural`: where it is more than an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def shown(value: object) -> str:
    """A value of a user's file, short enough for an error message."""
    short = reprlib.Repr()
    short.maxlist = short.maxdict = short.maxtuple = 8
    short.maxstring = short.maxlong = short.maxother = 80
    return short.repr(value)
