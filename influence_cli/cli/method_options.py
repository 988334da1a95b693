"""From the options that methods and protocols declare to flags, and back to their dataclasses."""

import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from influence_cli.cli.options import option
from influence_cli.errors import UsageProblem
from influence_cli.methods.declaration import Method, NoOptions, flag_of, option_texts
from influence_cli.methods.table import METHODS

Given = dict[str, Any]  # option -> value as the user gave it; Any: of the option's own type


def owners(options: str) -> list[str]:
    """The methods that have an option."""
    return [name for name, method in METHODS.items() if options in option_texts(method.options)]


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


def method_options(method: Method, flags: object) -> object:
    """The method's options from its flags. Raises UsageProblem for flags it does not have."""
    return options_of_methods([method], given_flags(flags))[method.name]


def options_of_methods(
    methods: Sequence[Method], given: Given, protocol_options: type = NoOptions
) -> dict[str, object]:
    """The options of several methods from one set of flags: each gets those that it has.

    Raises UsageProblem for a flag that fits none of them, except `protocol_options`.
    """
    fitting: dict[str, Given] = {method.name: {} for method in methods}
    for name, value in given.items():
        fits = [method for method in methods if has_value(method, name, value)]
        if not fits and name not in option_texts(protocol_options):
            raise foreign_option(methods, name, value)
        for method in fits:
            fitting[method.name][name] = value
    return {method.name: build_options(method.options, fitting[method.name]) for method in methods}


def has_value(method: Method, name: str, value: object) -> bool:
    """Whether the method has this option, and the value is one of its choices."""
    text = option_texts(method.options).get(name)
    return text is not None and (not text.choices or value in text.choices)


def foreign_option(methods: Sequence[Method], name: str, value: object) -> UsageProblem:
    """An option, or a choice of it, that none of these methods has. It names those that have."""
    names = ", ".join(method.name for method in methods)
    texts = [option_texts(method.options).get(name) for method in methods]
    choices = list(dict.fromkeys(choice for text in texts if text for choice in text.choices))
    flag = f"{flag_of(name)} {value}" if choices else flag_of(name)
    others = [method.name for method in METHODS.values() if has_value(method, name, value)]
    if choices and not others:
        return UsageProblem(f"{flag}: unknown", f"expected: {', '.join(choices)}")
    return UsageProblem(
        f"{flag} does not apply to --method {names}",
        f"expected: {', '.join(choices)}" if choices else f"leave out {flag}",
        f"methods that have {flag}: {', '.join(others)}",
    )


def build_options(kind: type, given: Given) -> object:
    """Options from given values. Raises UsageProblem for a value that is not allowed."""
    texts = option_texts(kind)
    for name, value in given.items():
        text = texts[name]
        if text.choices and value not in text.choices:
            raise UsageProblem(
                f"{flag_of(name)} {value}: unknown", f"expected: {', '.join(text.choices)}"
            )
        if text.minimum is not None and value < text.minimum:
            raise UsageProblem(
                f"{flag_of(name)} {value}", f"expected: a number from {text.minimum}"
            )
    return kind(**given)


def refuse_flags(method: Method, given: Mapping[str, bool]) -> None:
    """Raises UsageProblem for a flag that the method does not have. `given`: flag -> is given."""
    for flag, is_given in given.items():
        reason = method.reason_against(flag)
        if is_given and reason is not None:
            raise UsageProblem(
                f"{flag} does not apply to --method {method.name}: {reason}", f"leave out {flag}"
            )
