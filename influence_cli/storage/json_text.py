"""Reads JSON that may be broken or hostile. Every fault is a ValueError, after little time."""

import json
import math
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 256 << 20
LONGEST_INTEGER = 20  # digits; 2^64 - 1 has as many
# what only careful parsing refuses: long integers, large exponents, \uD800 to \uDFFF
UNUSUAL = re.compile(rb"\d{20}|[eE]\+?0*[1-9]\d\d|\\u[dD][89a-fA-F]")


def parse_json(text: bytes, finite: bool = True) -> Any:  # Any: JSON values
    """The value of a JSON text in UTF-8.

    Raises ValueError for what Python's parser accepts and no writer means: a key twice in an
    object, integers beyond 64 bits, half a surrogate pair; for a text that is too large or
    nested too deep. `finite`: also for NaN, Infinity and floats beyond their range.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, and the limit is {MAX_BYTES:,}")
    options: dict[str, Any] = {"object_pairs_hook": build_object}  # Any: hooks
    if finite:
        options["parse_constant"] = refuse_constant
    unusual = UNUSUAL.search(text) is not None
    if unusual:
        options["parse_int"] = parse_integer
        if finite:
            options["parse_float"] = parse_float
    try:
        value = json.loads(text.decode(), **options)
        if unusual:
            json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"it is no valid UTF-8 text: {error.reason}") from None
    return value


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON values
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"an object has the key {repeated[:80]!r} twice")
    return value


def parse_integer(digits: str) -> int:
    if len(digits.lstrip("-")) <= LONGEST_INTEGER and abs(number := int(digits)) < 1 << 64:
        return number
    raise ValueError(f"the number {digits[:20]}... of {len(digits)} digits is too large")


def parse_float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def read_json_file(path: Path, finite: bool = True) -> Any:  # Any: JSON values
    """Like parse_json, of a file. Raises OSError where it can't be read."""
    with path.open("rb") as file:
        return parse_json(file.read(MAX_BYTES + 1), finite)
