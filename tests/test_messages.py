"""Messages between ranks hold JSON and arrays, keep every bit, and hold no code."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence_cli.parallel.messages import decode_message, encode_message

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
MESSAGES = st.recursive(
    SCALARS | st.builds(range, st.integers(0, 9), st.integers(0, 99), st.integers(1, 3)),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(), parts, max_size=4),
    max_leaves=20,
)


@given(MESSAGES)
def test_a_message_arrives_as_it_was_sent(message):
    arrived = decode_message(encode_message(message))
    assert arrived == message
    assert repr(arrived) == repr(message)  # 1 is not 1.0, and a range stays a range


@pytest.mark.parametrize("parts", [0, 3])
def test_arrays_keep_their_bits_their_shape_and_their_dtype(parts):
    row = np.dtype([("kind", "i1"), ("key", "f8"), ("id", "i8"), ("parts", "f8", (parts,))])
    arrays = [
        np.array([0.1, -0.0, np.inf, np.nan, 5e-324]),
        np.arange(12).reshape(3, 4)[:, ::2],
        np.empty((0, 3)),
        np.zeros((2, 5), row),
    ]
    arrived = decode_message(encode_message({"a": arrays, "empty": []}))
    for sent, other in zip(arrays, arrived["a"], strict=True):
        assert sent.dtype == other.dtype
        assert sent.shape == other.shape
        assert sent.tobytes() == other.tobytes()


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": b"bytes"}, np.array([object()])])
def test_a_value_that_would_need_pickle_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        encode_message(value)


def test_the_package_never_unpickles():
    """pickle itself, and the functions of torch and numpy that use it."""
    pattern = re.compile(
        r"\bpickle\b|(gather|send|recv|broadcast|scatter)_object|_object_list|torch\.load\(|allow_pickle=True|np\.load\(|shelve|marshal"
    )
    package = Path(__file__).parents[1] / "influence_cli"
    offending = [
        f"{path.name}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if pattern.search(line) and not line.strip().startswith(("#", '"""'))
    ]
    assert offending == []
