"""Makes flags of the options that methods and protocols declare."""

import dataclasses
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from influence_cli.api.method_options import Given, owners
from influence_cli.cli.options import option
from influence_cli.methods.declaration import flag_of, option_texts
from influence_cli.methods.table import METHODS


def heading_of(name: str) -> str:
    """The heading of an option in --help, which names the methods that have it."""
    return f"Options of {' and '.join(owners(name))}"


HEADINGS = tuple(
    dict.fromkeys(
        heading_of(name) for method in METHODS.values() for name in option_texts(method.options)
    )
)


def flags_group(title: str, classes: Mapping[str, type], only: Iterable[str] | None = None) -> type:
    """A dataclass of flags, one for each option of these classes; None or False: not given.

    `classes`: who has the options, by name. Where two have an option of one name and different
    texts, its help shows both. `only`: the names of options to take.
    """
    names = dict.fromkeys(name for kind in classes.values() for name in option_texts(kind))
    parts = []
    for name in names if only is None else [name for name in names if name in set(only)]:
        texts = {
            owner: f"{option_texts(kind)[name].help}{default_text(kind, name)}"
            for owner, kind in classes.items()
            if name in option_texts(kind)
        }
        kind = next(kind for kind in classes.values() if name in option_texts(kind))
        help_text = next(iter(texts.values()))
        if len(set(texts.values())) > 1:
            help_text = " ".join(f"{owner}: {text}" for owner, text in texts.items())
        value_type = get_type_hints(kind)[name]
        panel = heading_of(name) if owners(name) else title
        flag = option(
            flag_of(name), help=help_text, panel=panel, metavar=option_texts(kind)[name].metavar
        )
        switch = value_type is bool
        annotation: Any = Annotated[bool if switch else optional(value_type), flag]  # a type
        parts.append((name, annotation, dataclasses.field(default=False if switch else None)))
    return dataclasses.make_dataclass("Flags", parts, frozen=True)


def optional(kind: Any) -> Any:  # types as values
    """`int` -> `int | None`; a type that allows None stays."""
    allows_none = get_origin(kind) is types.UnionType and type(None) in get_args(kind)
    return kind if allows_none else kind | None


def default_text(options: type, name: str) -> str:
    """` [default: keep]`, where a value is the default."""
    default = next(entry.default for entry in dataclasses.fields(options) if entry.name == name)
    return "" if default is None or default in (False, 0) else f" [default: {default}]"


MethodFlags = flags_group("Options", {name: method.options for name, method in METHODS.items()})


def given_flags(flags: object) -> Given:
    """The flags of a group that the user gave."""
    values = {
        entry.name: getattr(flags, entry.name)
        for entry in dataclasses.fields(flags)  # type: ignore[arg-type]  # made by make_dataclass
    }
    return {
        name: value for name, value in values.items() if value is not None and value is not False
    }
