"""Messages between ranks hold JSON and arrays, keep every bit, and hold no code."""

import ast
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


FORBIDDEN = re.compile(
    r"pickle\.(load|loads|dump|dumps|Pickler)\b|(gather|send|recv|broadcast|scatter)_object|_object_list|shelve|marshal|joblib|cloudpickle"
)


def unsafe_reads(tree: ast.Module) -> list[str]:
    """Calls that may run code of a file, and unpicklers that import what a file names."""
    unsafe = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name.endswith("torch.load") and flags.get("weights_only") != "True":
                unsafe.append(ast.unparse(node))
            if flags.get("allow_pickle", "False") != "False" or FORBIDDEN.search(name):
                unsafe.append(ast.unparse(node))
        if isinstance(node, ast.ClassDef) and any(
            "Unpickler" in ast.unparse(base) for base in node.bases
        ):
            methods = [inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)]
            if "find_class" not in methods:
                unsafe.append(f"class {node.name}")
    return unsafe


@pytest.mark.parametrize("code", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "pickle.load(file)",
    "pickle.loads(text)", "dist.all_gather_object(out, value)", "class Reader(pickle.Unpickler): pass",
])  # fmt: skip
def test_an_unsafe_read_is_known(code):
    assert unsafe_reads(ast.parse(code))


def test_no_file_of_the_user_can_run_code():
    """Pickles are read by torch.load(weights_only=True), or by an unpickler with an allow-list (tests of convert)."""
    package = Path(__file__).parents[1] / "influence_cli"
    offending = {
        path.name: unsafe_reads(ast.parse(path.read_text())) for path in package.rglob("*.py")
    }
    assert {name: calls for name, calls in offending.items() if calls} == {}
