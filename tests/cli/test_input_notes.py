"""Notes on what a run costs, and that no command needs a network."""

import subprocess
import sys

import pytest

from influence_cli.extraction import fill
from tests.conftest import DEFINITION
from tests.refusals import replaced


def test_a_large_cache_is_announced_with_its_bytes_before_it_is_begun(
    make_run, influence, monkeypatch
):
    run = make_run()
    small = influence("cache", run, "--cache", run / "small")
    assert "--cache none writes none" not in small.err
    monkeypatch.setattr(fill, "ANNOUNCED_BYTES", 1)
    seen = []
    compute = fill.CacheFiller.compute
    monkeypatch.setattr(
        fill.CacheFiller,
        "compute",
        lambda *given: seen.append(list(run.rglob("*.safetensors"))) or compute(*given),
    )
    large = influence("cache", run)
    assert large.code == 0
    assert seen
    assert "note: the gradients of train examples take" in large.err
    assert f"in {run / '.influence'}; --project K" in large.err
    assert "take" not in influence("cache", run).err  # nothing is written


def test_activation_checkpointing_is_told_to_be_switched_off(make_run, influence):
    plain = make_run("plain")
    run = make_run("checkpointed")
    text = replaced(
        DEFINITION,
        ("import torch\n", "import torch\nfrom torch.utils.checkpoint import checkpoint\n"),
        ("model(batch[0])", "model[2](checkpoint(model[:2], batch[0], use_reentrant=False))"),
    )
    (run / "definition.py").write_text(text)
    result = influence("score", run)
    assert result.code == 0, result.err
    assert "activation checkpointing; switch that off in definition.py" in result.err
    without = influence("score", plain)
    assert "activation checkpointing" not in without.err
    columns = [[(row["query"], row["train"]) for row in one.rows] for one in (result, without)]
    assert columns[0] == columns[1]


NO_NETWORK = """
import socket, sys
def refuse(*given, **named):
    raise AssertionError(f"a connection: {given}")
socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = refuse
socket.getaddrinfo = socket.create_connection = refuse
from influence_cli.cli import main
sys.argv[1:] = %r
main()
"""


@pytest.mark.parametrize("command", ["score", "self", "cache", "check", "inspect"])
def test_a_command_makes_no_connection(command, make_run):
    code = NO_NETWORK % [command, str(make_run())]
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
