"""What a command imports, and how often it reads: its start-up, without a clock."""

import gc
import subprocess
import sys
from types import SimpleNamespace

import pytest

from influence_cli.cli import torch_import
from influence_cli.run.datasets import Examples
from influence_cli.run.trajectory_reader import are_indices, is_index

# Each of these costs 10 milliseconds or more, and no warm command needs it
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "rich",
    "markdown_it",
    "numpy.ma",
    "influence_cli.cli.evaluate",
    "influence_cli.cli.trace",
)
# one process: what no command imports, none of them imports
COMMANDS = """
import gc, sys
from influence_cli.__main__ import main
for arguments in %r:
    sys.argv = ["influence", *arguments]
    try: main()
    except SystemExit as ended: assert not ended.code
print("STATE", gc.isenabled(), gc.get_freeze_count() > 100_000, *sys.modules, file=sys.stderr)
"""


def state_after(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("STATE"))
    return line.split()[1:]


@pytest.fixture(scope="module")
def torchs_modules():
    return set(state_after("import sys, torch; print('STATE', *sys.modules, file=sys.stderr)"))


def test_warm_commands_import_nothing_heavy_and_freeze_what_they_import(
    make_run, influence, torchs_modules
):
    run = str(make_run())
    assert influence("cache", run).code == 0
    commands = [
        ["score", run],
        ["score", run, "--queries", "0,2,5"],
        ["self", run],
        ["inspect", run],
    ]
    enabled, frozen, *modules = state_after(COMMANDS % (commands,))
    assert "torch" in modules
    heavy = [name for name in HEAVY if name in modules and name not in torchs_modules]
    assert not heavy
    assert (enabled, frozen) == ("True", "True")


def test_garbage_collection_continues_after_a_failed_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # no torch
    monkeypatch.setattr(torch_import, "sys", SimpleNamespace(modules={}))
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError):
            torch_import.import_torch()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_a_second_command_of_a_process_freezes_no_more_objects():
    frozen = gc.get_freeze_count()
    torch_import.import_torch()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_queries_of_a_plain_tensor_dataset_are_compared_in_batches(
    make_run, influence, monkeypatch
):
    run = make_run()
    first = influence("score", run)
    calls = []
    digests = Examples.digests
    monkeypatch.setattr(
        Examples,
        "digests",
        lambda self, ids: calls.append((self.split, list(ids))) or digests(self, ids),
    )
    monkeypatch.setattr(Examples, "digest", None)  # one example
    again = influence("score", run)
    assert again.out == first.out
    assert [ids for split, ids in calls if split == "query"] == [list(range(6))]


@pytest.mark.parametrize(
    "values", [[], [3, 0], [True], [-1], [1.0], ["1"], [None], [2**63 - 1], [2**63], [[1]]], ids=str
)
def test_a_list_of_ids_is_checked_as_its_members(values):
    assert are_indices(values) is all(map(is_index, values))
