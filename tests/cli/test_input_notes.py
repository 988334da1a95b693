"""Notes on what a run costs, and that no command needs a network."""

import socket

import pytest

from influence_cli.extraction import fill
from tests.conftest import DEFINITION
from tests.forked import run_fork
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


def refuse_connections():
    def refuse(*given, **named):
        raise AssertionError(f"a connection: {given}")

    for name in ("connect", "connect_ex", "bind"):
        setattr(socket.socket, name, refuse)
    socket.getaddrinfo = socket.create_connection = refuse


@pytest.mark.parametrize("command", ["score", "self", "cache", "check", "inspect"])
def test_a_command_makes_no_connection(command, make_run, tmp_path):
    ended = run_fork(command, make_run(), place=tmp_path, prepare=refuse_connections)
    assert ended.code == 0, ended.err


def test_a_connection_would_be_noticed(make_run, tmp_path):
    run = make_run()
    connect = "\n\nimport socket\n\nsocket.create_connection(('::1', 9))\n"
    (run / "definition.py").write_text(DEFINITION + connect)
    ended = run_fork("score", run, place=tmp_path, prepare=refuse_connections)
    assert ended.code == 1
    assert "a connection: " in ended.err
