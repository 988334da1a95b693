"""Text from labels, names and errors as a terminal may show it: without characters that act on it.

A control character moves the cursor, an escape sequence changes colours or the title, a bidi
override reorders what a reader sees.
"""

import contextlib
import re
import sys

LINE_CHARACTERS = "\n\t"  # of a message of several lines
ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def escape_controls(text: str, allowed: str = "") -> str:
    """The text with each acting character written as `\\x1b` or `\\u202e`.

    Acting: a control, format or bidi character, or a lone surrogate. `allowed`: stay as they are.
    """
    return ACTING.sub(
        lambda match: match[0] if match[0] in allowed else escape_character(match[0]), text
    )


def write_message(text: str) -> None:
    """Write lines to stderr. A full disk behind stderr does not stop the work."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{escape_controls(text, LINE_CHARACTERS)}\n")
        sys.stderr.flush()


def escape_character(character: str) -> str:
    code = ord(character)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )
