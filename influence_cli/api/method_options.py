"""From given values to the options of methods and protocols. Problems name the option."""

from collections.abc import Mapping, Sequence
from typing import Any

from influence_cli.errors import UsageProblem
from influence_cli.methods.declaration import Method, NoOptions, flag_of, option_texts
from influence_cli.methods.table import METHODS

Given = dict[str, Any]  # option -> value as the user gave it; Any: of the option's own type


def owners(option: str) -> list[str]:
    """The methods that have an option."""
    return [name for name, method in METHODS.items() if option in option_texts(method.options)]


def method_options(method: Method, given: Given) -> object:
    """The method's options. Raises UsageProblem for one that it does not have."""
    return options_of_methods([method], given)[method.name]


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
