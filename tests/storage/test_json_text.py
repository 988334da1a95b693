"""Checksums in JSON texts: every changed byte is noticed, and a text without one is read."""

import json

import pytest

from influence_cli.storage.json_text import ChangedText, parse_sealed_json, seal_json

CONTENT = {"step": 3, "lr": 0.1, "examples": [17, 4], "crc": "x"}
TEXTS = {
    "one line": json.dumps(CONTENT).encode() + b"\n",
    "several": json.dumps(CONTENT, indent=1).encode(),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_sealed_text_is_json_and_comes_back(name):
    sealed = seal_json(TEXTS[name])
    assert json.loads(sealed) == CONTENT | {"crc32": json.loads(sealed)["crc32"]}
    assert sealed.endswith(b"}\n")
    assert sealed.count(b"\n") == (1 if name == "one line" else 10)
    assert parse_sealed_json(sealed) == parse_sealed_json(TEXTS[name]) == CONTENT


@pytest.mark.parametrize("name", TEXTS)
def test_every_flipped_bit_is_an_error_or_changes_no_value(name):
    sealed = seal_json(TEXTS[name])
    for at in range(len(sealed)):
        for bit in range(8):
            changed = sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :]
            try:
                value = parse_sealed_json(changed)
            except ValueError:
                continue
            assert {key: value[key] for key in CONTENT} == CONTENT
            assert at >= sealed.index(b"crc32"), changed  # in the checksum's own key


def test_an_edited_text_is_named_as_changed():
    sealed = seal_json(TEXTS["one line"])
    for edited in (
        sealed.replace(b"17", b"18"),
        json.dumps(json.loads(sealed) | {"lr": 1}).encode(),
    ):
        with pytest.raises(ChangedText, match="crc32"):
            parse_sealed_json(edited)
