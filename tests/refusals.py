"""What every refusal looks like to whoever called: an exit code, nothing on stdout, `error: ` and the words that help, no stack trace."""


def refused(result, code: int, *says: str) -> None:
    """`code` 1: the run or the cache has a problem; 2: the command line has. `says`: what the message must name."""
    assert result.code == code, result.err
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if not line.startswith("note: ")]
    assert lines, "nothing on stderr"
    assert lines[0].startswith("error: "), result.err
    assert "Traceback" not in result.err
    for text in says:
        assert text in result.err, f"{text!r} is not in:\n{result.err}"


def replaced(text: str, *changes: tuple[str, str]) -> str:
    """`text` with each old piece, which must be there, replaced by the new one."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text
