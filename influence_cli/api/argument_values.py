"""From Python values to the values of flags. Problems name the flag."""

import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from influence_cli.api.method_options import Given, owners
from influence_cli.api.python_names import OF_OPEN_RUN
from influence_cli.errors import UsageProblem, shown
from influence_cli.methods.declaration import flag_of
from influence_cli.methods.table import METHODS

if TYPE_CHECKING:
    from influence_cli.api.opening import RunArguments
    from influence_cli.api.score import ScoreArguments
    from influence_cli.parallel.shards import Shard


def check_kind(flag: str, value: Any, kind: Any, expected: str) -> Any:  # Any: of `kind`
    """The value, which is None or of this kind; True and False are no numbers."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise UsageProblem(f"{flag}: found {shown(value)}", f"expected: {expected}")
    return value


def text(flag: str, value: str | None) -> str | None:
    return check_kind(flag, value, str, "a text")


def path(flag: str, value: str | os.PathLike[str] | None) -> Path | None:
    """An absolute path: a notebook may change its working directory later."""
    name = check_kind(flag, value, str | os.PathLike, "a path")
    return None if name is None else Path(name).absolute()


def whole_number(flag: str, value: int | None) -> int | None:
    number = check_kind(flag, value, numbers.Integral, "a whole number")
    return None if number is None else int(number)


def steps_spec(value: int | str | Sequence[int] | None) -> str | None:
    """`--steps`: a text, a step, or a list or range of steps."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, range) and value.step == 1:
        return f"{value.start}:{value.stop}"
    steps = as_list(value) or [value]
    return ",".join(str(whole_number("--steps", step)) for step in steps)


def as_list(value: Any) -> list[Any]:  # Any: a sequence, an array or one of its members
    """The members; none of what has no members."""
    try:
        return list(value)
    except TypeError:
        return []


def globs(value: str | Sequence[str] | None) -> list[str] | None:
    """`--layers`: one glob or several."""
    if value is None or isinstance(value, str):
        return None if value is None else [value]
    return [str(text("--layers", name)) for name in as_list(value) or [value]]


def top_spec(value: int | str) -> str:
    """`--top`: a number, or "all"."""
    return str(check_kind("--top", value, numbers.Integral | str, 'a number from 1, or "all"'))


def check_selection(flag: str, selection: object) -> None:
    """Raises UsageProblem for the text `-`."""
    if isinstance(selection, str) and selection == "-":
        raise UsageProblem(
            f"{flag}: '-' reads stdin on the command line only",
            "give a list, a range or an array of ids",
        )


def method_arguments(options: Mapping[str, Any]) -> Given:  # Any: of the option's own type
    """Keyword arguments as options of methods; None and False: not given.

    Raises UsageProblem for a name that no method has, or a value of another type.
    """
    given: Given = {}
    for name, value in options.items():
        if name in OF_OPEN_RUN:
            raise UsageProblem(f"{name} is an argument of open_run", f"open_run(..., {name}=...)")
        if not owners(name):
            raise UsageProblem(
                f"there is no argument {name}",
                "the arguments are the flags of the command, with _ instead of -",
            )
        if value is not None and value is not False:
            given[name] = convert_option(name, value)
    return given


def convert_option(name: str, value: Any) -> Any:  # Any: of the option's own type
    flag, kind = flag_of(name), get_type_hints(METHODS[owners(name)[0]].options)[name]
    if kind is bool:
        if value is not True:
            raise UsageProblem(f"{flag}: found {shown(value)}", "expected: True or False")
        return True
    if kind in (Path, Path | None):
        return path(flag, value)
    if kind in (int, int | None):
        return whole_number(flag, value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return repr(float(value))  # a number where the flag also takes a word
    return text(flag, value)


def describe_call(name: str, arguments: Mapping[str, object]) -> str:
    """The call as Python text, for records: `score(method='tracin', queries=[57])`."""
    given = [
        f"{key}={shown(str(value) if isinstance(value, os.PathLike) else value)}"
        for key, value in arguments.items()
        if value is not None and value is not False
    ]
    return f"{name}({', '.join(given)})"


def run_arguments(given: Mapping[str, Any]) -> "RunArguments":  # Any: the arguments of open_run
    from influence_cli.api.opening import RunArguments

    cache = given["cache"]
    return RunArguments(
        run=path("run", given["run"]) or Path.cwd(),
        definition=path("--definition", given["definition"]),
        checkpoints=path("--checkpoints", given["checkpoints"]),
        trajectory=path("--trajectory", given["trajectory"]),
        cache=cache if cache in (None, "none") else str(path("--cache", cache)),
        verify=bool(given["verify"]),
        device=str(given["device"]),
        batch_size=str(given["batch_size"]),
        precision=text("--precision", given["precision"]),
        store=text("--store", given["store"]),
        project=whole_number("--project", given["project"]),
        projection=text("--projection", given["projection"]),
        seed=whole_number("--seed", given["seed"]),
    )


def score_arguments(given: Mapping[str, Any]) -> "ScoreArguments":  # Any: arguments of score
    from influence_cli.api.score import ScoreArguments

    group_by = given.get("group_by")
    lr = check_kind("--lr", given.get("lr"), numbers.Real, "a number")
    return ScoreArguments(
        sum_queries=bool(given.get("sum_queries")),
        group_by=None if group_by is None else str(group_by),
        by=text("--by", given.get("by")),
        lr=None if lr is None else float(lr),
        lr_weights=text("--lr-weights", given.get("lr_weights")),
        normalize=bool(given.get("normalize")),
        aggregate=text("--aggregate", given.get("aggregate")),
    )


def shard(spec: str | None) -> "Shard | None":
    """`--shard`. A Python program is one process: it shares its work with no rank."""
    from influence_cli.parallel.shards import parse_shard

    part = text("--shard", spec)
    return None if part is None else parse_shard(part, os.environ)
