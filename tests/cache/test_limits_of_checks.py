"""How much is compared without --verify, and what a new cache holds."""

from types import SimpleNamespace

import pytest
import torch

from influence_cli.cache import verification
from influence_cli.cache.identity import checkpoint_key
from influence_cli.cache.store import Store
from influence_cli.cache.verification import BYTES_PER_SECOND, Verification

SECOND = BYTES_PER_SECOND // 4  # numbers of float32 that take a second


@pytest.mark.parametrize(
    ("always", "spent", "seconds", "compared"),
    [
        (False, 0.0, 5, True),  # 5 % of 100 seconds
        (False, 0.0, 6, False),
        (False, 4.5, 1, False),  # 4.5 of the 5 seconds are spent
        (False, 3.5, 1, True),
        (True, 99.0, 99, True),
    ],
)
def test_comparing_takes_at_most_a_share_of_the_time(always, spent, seconds, compared, monkeypatch):
    clock = SimpleNamespace(perf_counter=lambda: 100.0)
    monkeypatch.setattr(verification, "time", clock)
    monkeypatch.setattr(verification, "START", 0.0)
    checks = []
    check = Verification(always, spent)
    value = torch.zeros(1).expand(seconds * SECOND)  # no memory
    check.verify(SimpleNamespace(verify=checks.append), {"a": value})
    assert bool(checks) == compared
    assert check.skipped == (0 if compared else seconds * BYTES_PER_SECOND)
    assert check.seconds == spent  # the clock stands still


def test_a_new_cache_is_ignored_by_git(tmp_path):
    Store(tmp_path / "c")
    assert (tmp_path / "c" / ".gitignore").read_text() == "*\n"


def test_the_digest_of_a_checkpoint_is_remembered(make_run, tmp_path):
    path = make_run() / "checkpoints" / "step-000010.safetensors"
    checkpoint, memory = SimpleNamespace(step=10, files=(path,), base=""), tmp_path / "memory.json"
    key = checkpoint_key(checkpoint, memory)
    assert str(path) in memory.read_text()
    assert checkpoint_key(checkpoint, memory) == key == checkpoint_key(checkpoint, None)
