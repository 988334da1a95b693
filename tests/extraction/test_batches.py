"""Batches that are sent to a device while it computes (on the CPU here, by the same thread)."""

import threading

import pytest

from influence_cli.extraction import batches
from tests.conftest import DEFINITION

COMMANDS = ("score --cache none", "score", "self", "score --by layer --batch-size 3")
WATCHED = """
import threading, time
reading = []

class Watched(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data
    def __len__(self):
        return len(self.data)
    def __getitem__(self, index):
        reading.append(index)
        time.sleep(0.001)
        assert reading == [index], "two threads read"
        reading.clear()
        return self.data[index]

plain_train_data = train_data
def train_data():
    return Watched(plain_train_data())
"""


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(batches, "sends_ahead", lambda device: True)


@pytest.mark.parametrize("command", COMMANDS)
def test_batches_that_are_sent_ahead_give_the_same_bytes(command, make_run, influence, monkeypatch):
    name, *flags = command.split()
    usual = influence(name, make_run("usual"), "--top", "all", *flags)
    monkeypatch.setattr(batches, "sends_ahead", lambda device: True)
    before = threading.active_count()
    sent = influence(name, make_run("sent"), "--top", "all", *flags)
    assert sent.code == 0, sent.err
    assert sent.out == usual.out
    assert threading.active_count() == before


def test_threads_read_a_dataset_one_after_the_other(make_run, influence, ahead):
    run = make_run(definition=DEFINITION + WATCHED)
    result = influence("score", run, "--batch-size", "2")
    assert result.code == 0, result.err


def test_an_error_of_the_next_batch_is_that_of_its_example(make_run, influence, ahead):
    text = DEFINITION + WATCHED.replace(
        "return self.data[index]", "return self.read(index)"
    ).replace(
        "    def __len__",
        "    def read(self, index):\n"
        "        if index == 7:\n            raise ValueError('no such file')\n"
        "        return self.data[index]\n    def __len__",
    )
    result = influence("score", make_run(definition=text), "--cache", "none", "--batch-size", "2")
    assert result.code == 1
    assert "train_data() raised ValueError at example 7: no such file" in result.err
