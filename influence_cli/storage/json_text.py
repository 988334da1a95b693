"""Reads JSON that may be broken or hostile. Every fault is a ValueError, after little time.

A JSON object that influence writes ends with the key `crc32`: a checksum of the text before it.
"""

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

MAX_BYTES = 256 << 20
LONGEST_INTEGER = 20  # digits; 2^64 - 1 has as many
LONGEST_SEAL = 60  # bytes
SEAL = re.compile(rb',\s*"crc32":\s*(\d{1,10})\s*\}\s*$')
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


class ChangedText(ValueError):
    """A JSON text that differs from its checksum."""


def seal_json(text: bytes) -> bytes:
    """The text of an object, on one line or more, with its checksum as the last key."""
    body = text.rstrip()[:-1].rstrip()
    key = b',\n "crc32": %d\n}\n' if b"\n" in body else b',"crc32":%d}\n'
    return body + key % zlib.crc32(body)


def parse_sealed_json(text: bytes, finite: bool = True) -> Any:  # Any: JSON values
    """Like parse_json, without the checksum. A text without one is not compared.

    Raises ChangedText where the text differs from it.
    """
    seal = SEAL.search(text, max(0, len(text) - LONGEST_SEAL))
    if seal and zlib.crc32(memoryview(text)[: seal.start()]) != int(seal[1]):
        raise ChangedText("it differs from its checksum, crc32")
    value = parse_json(text, finite)
    if seal and isinstance(value, dict):
        value.pop("crc32", None)
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
    return parse_json(read_at_most(path), finite)


def read_at_most(path: Path) -> bytes:
    """The content of a file; of one that is too large the first bytes, one more than the limit."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)
