"""Mutations of valid inputs. A seed gives the same inputs again."""

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

# what a writer of files never writes, and a reader must survive
JSON_VALUES: tuple[str, ...] = (
    "null", "true", "-1", "0", "1", "2", "1e400", "-0.0", "0.5", "1e12", "1e308", "NaN", "Infinity",
    "9" * 400, "9" * 5000, '""', '"a"', "[]", "{}", "[[]]", '{"a":1}', '"\\ud800"', '"\\u0000"',
    "18446744073709551616", "-9223372036854775809", "1.0", '"1"', "[0]", "[0,0]", "[1,0]", '"F32"',
    "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, '"' + "x" * 3000 + '"',
)  # fmt: skip
LONG = 200  # characters from which a value is rare: it costs time
CHARACTERS = (
    "\x00", "\x07", "\x1b[31m", "\x1b]0;t\x07", "\r", "\n", "\r\n", "\t", '"', "'", ",", ";", "\\",
    "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\u202e", "\u2066", "\ufeff", "\u200b",
    "\ud800", "\udfff", "é", "日本", "🙂", "[bold]x[/bold]", "=1+1", "@x", "-", "+", "\x7f", "\x9b31m",
    "NULL", "nan", " ", "  ",
)  # fmt: skip
VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null')


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to three random edits: bits, bytes, cuts, repeats, swaps, and values of JSON."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = EDITS[int(rng.random() * len(EDITS))](content, rng)
    return content


def _flip_bit(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return b"\x00"
    at = int(rng.random() * len(content))
    return b"%b%c%b" % (content[:at], content[at] ^ (1 << int(rng.random() * 8)), content[at + 1 :])


def _set_byte(content: bytes, rng: random.Random) -> bytes:
    at = int(rng.random() * (len(content) + 1))
    return b"%b%c%b" % (content[:at], int(rng.random() * 256), content[at + 1 :])


def _delete(content: bytes, rng: random.Random) -> bytes:
    at = int(rng.random() * (len(content) + 1))
    return content[:at] + content[at + 1 + int(rng.random() * 8) :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: int(rng.random() * (len(content) + 1))]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    at = int(rng.random() * (len(content) + 1))
    part = content[at : at + 1 + int(rng.random() * 40)]
    return content[:at] + part * (1 + int(rng.random() * 3)) + content[at:]


def _insert_text(content: bytes, rng: random.Random) -> bytes:
    at = int(rng.random() * (len(content) + 1))
    return content[:at] + rng.choice(CHARACTERS).encode("utf-8", "surrogatepass") + content[at:]


def _replace_value(content: bytes, rng: random.Random) -> bytes:
    """Put a JSON value in the place of another."""
    spans = [match.span() for match in VALUE.finditer(content)]
    if not spans:
        return content
    start, stop = rng.choice(spans)
    value = rng.choice(JSON_VALUES)
    while len(value) > LONG and rng.random() < 0.95:
        value = rng.choice(JSON_VALUES)
    return content[:start] + value.encode() + content[stop:]


def _swap_values(content: bytes, rng: random.Random) -> bytes:
    spans = [match.span() for match in VALUE.finditer(content)]
    if len(spans) < 2:
        return content
    (a, b), (c, d) = sorted(rng.sample(spans, 2))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _repeat_member(content: bytes, rng: random.Random) -> bytes:
    """Repeat a key of an object, with another value."""
    keys = list(re.finditer(rb'("[^"]*")\s*:', content))
    if not keys:
        return content
    key = rng.choice(keys)
    value = rng.choice(JSON_VALUES[:12]).encode()
    return content[: key.start()] + key[1] + b":" + value + b"," + content[key.start() :]


EDITS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip_bit, _flip_bit, _set_byte, _delete, _cut, _repeat, _insert_text, _replace_value,
    _replace_value, _swap_values, _repeat_member,
)  # fmt: skip


# what each file must survive: one clean message within two seconds
EXTREME_VALUES = (
    b"[" * 5000 + b"]" * 5000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"9" * 5000, b"9" * 400,
    b"1e400", b"-1e400", b"NaN", b'"\\ud800"', b"1e12", b'"\\u0000"',
)  # fmt: skip
LONG_VALUES = (b'"' + b"x" * 10_000_000 + b'"', b"[" + b"1," * 1_000_000 + b"1]")
EXTREME_TEXTS = (
    b"", b"[" * 100_000, b"\xff\xfe", b"\x00" * 1000, b"9" * 5000, b"1e400", b" " * 10_000_000,
    b"x" * 10_000_000,
)  # fmt: skip


def extreme_values(content: bytes) -> Iterator[bytes]:
    """Extreme texts, then the text with its values, in turn, replaced by each extreme one."""
    spans = [match.span() for match in VALUE.finditer(content)]
    yield from EXTREME_TEXTS
    for values, places in (
        (LONG_VALUES, spans[:: max(1, len(spans) // 3)]),
        (EXTREME_VALUES, spans),
    ):
        for start, stop in places:
            for value in values:
                yield content[:start] + value + content[stop:]


def random_text(rng: random.Random) -> str:
    """A text of letters and of the characters that break writers."""
    return "".join(
        rng.choice(CHARACTERS) if rng.random() < 0.6 else chr(97 + int(rng.random() * 26))
        for _ in range(int(rng.random() * 6))
    )


class RepeatedKey(ValueError):
    """An object of JSON that names a key twice."""


def strict_json(text: bytes | str, finite: bool = True) -> Any:  # Any: a JSON value
    """Parse as RFC 8259 does: no repeated keys, and no NaN if `finite`. The reference for what is
    accepted.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(items)
        if len(content) != len(items):
            raise RepeatedKey(items)
        return content

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=refuse if finite else float)
    except RecursionError:
        raise ValueError("nested too deep") from None
