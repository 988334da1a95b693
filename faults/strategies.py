"""Strategies of hypothesis: JSON texts that are valid, or wrong in one place."""

import json
from typing import Any

from hypothesis import strategies as st

from faults.mutate import CHARACTERS, JSON_VALUES, LONG, strict_json

SHORT_VALUES = tuple(value for value in JSON_VALUES if len(value) <= LONG)
RAW = "@raw@"  # marks where the text of a value goes

texts = st.lists(st.one_of(st.sampled_from(CHARACTERS), st.characters()), max_size=6).map("".join)


def json_values() -> st.SearchStrategy[Any]:
    """Any JSON value of a few levels; also NaN and numbers beyond 64 bits, which a writer gives."""
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.sampled_from((2**63, -(2**63) - 1, 10**30, 1e308, 5e-324)),
    )  # fmt: skip
    return st.recursive(
        scalars,
        lambda children: st.one_of(
            st.lists(children, max_size=4),
            st.dictionaries(st.text(max_size=4), children, max_size=4),
        ),
        max_leaves=8,
    )


@st.composite
def broken_json(draw: st.DrawFn, value: Any) -> bytes:
    """The text of a value: most often valid, else with one part replaced."""
    if draw(st.integers(0, 2)):
        return json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    changed, replacement = replace_part(draw, value), draw(st.sampled_from(SHORT_VALUES))
    text = json.dumps(changed).replace(json.dumps(RAW), replacement)
    return text.encode("utf-8", "surrogatepass")


def replace_part(draw: st.DrawFn, value: Any) -> Any:
    """The value with one of its parts replaced by RAW or another JSON value."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: replace_part(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], replace_part(draw, value[at]), *value[at + 1 :]]
    return RAW if draw(st.booleans()) else draw(json_values())


def json_texts(text: bytes) -> st.SearchStrategy[bytes]:
    """Texts near a valid one."""
    return broken_json(strict_json(text, finite=False))
