"""What a probe chose is remembered in the cache: the next command does not compare gradients again,
unless anything that the choice depends on is another.
"""

import json
import shutil

import pytest
import torch

from influence_cli.extraction import probe_record
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.embedding_capture import EmbeddingCapture
from influence_cli.storage.atomic import write_json
from tests.cases import CASES
from tests.conftest import DEFINITION
from tests.methods.test_tracin import OF_CASE
from tests.methods.test_tracin_we import DEFINITION as TEXTS
from tests.refusals import refused

ALL = ("--top", "all", "--precision", "float64")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The probes and the restored choices, in their order."""
    names: list[str] = []

    def watch(kind: type, name: str) -> None:
        function = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, *given: (names.append(name), function(self, *given))[1]
        )

    for kind in (Capture, EmbeddingCapture):
        watch(kind, "probe")
        watch(kind, "restore")
    return names


def forget_gradients(run):
    """Leave what was measured and remembered."""
    for folder in list((run / ".influence").glob("*/step-*")):
        shutil.rmtree(folder)


def records(run):
    return sorted((run / ".influence").rglob("probe-*.json"))


@pytest.mark.parametrize("name", CASES)
def test_a_remembered_choice_gives_the_same_bytes(name, make_run, influence, calls):
    run = make_run(definition=OF_CASE.format(name=name), model=CASES[name].model)
    first = influence("score", run, *ALL)
    assert first.code == 0, first.err
    assert "restore" not in calls
    calls.clear()
    forget_gradients(run)
    again = influence("score", run, *ALL)
    assert set(calls) == {"restore"}
    assert (again.code, again.out, again.err) == (0, first.out, first.err)


def test_splits_that_share_a_loss_are_restored_once(make_run, influence, calls):
    run = make_run()
    influence("score", run)
    assert calls == ["probe"]
    assert len(records(run)) == 2
    forget_gradients(run)
    influence("score", run)
    assert calls == ["probe", "restore"]


def test_embeddings_are_remembered_too(make_run, influence, calls):
    run = make_run(definition=TEXTS)
    first = influence("score", run, *ALL, "--method", "tracin-we", "--by", "word")
    calls.clear()
    forget_gradients(run)
    again = influence("score", run, *ALL, "--method", "tracin-we", "--by", "word")
    assert set(calls) == {"restore"}
    assert again.out == first.out


def test_notes_of_the_probe_are_given_again(make_run, influence, calls):
    text = DEFINITION.replace("model(batch[0])", "model(batch[0] - batch[0].mean(0) / 9)")
    run = make_run(definition=text)
    first = influence("score", run)
    assert "examples influence each other" in first.err
    calls.clear()
    forget_gradients(run)
    again = influence("score", run)
    assert set(calls) == {"restore"}
    assert (again.out, again.err) == (first.out, first.err)


SEED = """
def seed():
    import pathlib
    return int(pathlib.Path(__file__).with_name("seed").read_text())

"""


@pytest.mark.parametrize(
    "change", ["definition", "layers", "torch", "influence", "data", "batch size"]
)
def test_another_key_probes_again(change, make_run, influence, calls, monkeypatch):
    text = DEFINITION.replace("def train_data", SEED + "def train_data")
    text = text.replace("examples(0, 20)", "examples(seed(), 20)")
    text = text.replace("examples(1, 6)", "examples(seed() + 1, 6)")
    run = make_run(definition=text)
    (run / "seed").write_text("0")
    assert influence("score", run).code == 0
    forget_gradients(run)
    calls.clear()
    flags = ()
    if change == "definition":
        (run / "definition.py").write_text(text + "\n# another text\n")
    elif change == "layers":
        flags = ("--layers", "2")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    elif change == "influence":
        monkeypatch.setattr(probe_record, "__version__", "9.9.9")
    elif change == "batch size":
        flags = ("--batch-size", "4")
    else:
        (run / "seed").write_text("3")
    assert influence("score", run, *flags).code == 0
    assert "probe" in calls


@pytest.mark.parametrize("content", [b"", b"{}", b'{"choice": {}, "notes": []}'])
def test_a_damaged_record_names_its_file(content, make_run, influence):
    run = make_run()
    influence("score", run)
    forget_gradients(run)
    path = records(run)[0]
    path.write_bytes(content)
    refused(influence("score", run), 1, str(path), "delete that file")


@pytest.mark.parametrize(
    "content",
    [
        {"choice": {"at_once": True}, "notes": []},
        {"choice": {"at_once": True, "axis": 0}, "notes": [1]},
        {"choice": [], "notes": []},
    ],
)
def test_a_record_of_another_kind_is_broken(content, make_run, influence):
    run = make_run()
    influence("score", run)
    forget_gradients(run)
    for path in records(run):
        write_json(path, content)
    refused(influence("score", run), 1, "is broken", "delete that file")


def test_a_loss_that_became_random_is_refused(make_run, influence):
    text = DEFINITION.replace(
        'reduction="none")',
        'reduction="none") * (torch.rand(1) if __import__("pathlib").Path(__file__)'
        '.with_name("random").exists() else 1)',
    )
    run = make_run(definition=text)
    assert influence("score", run).code == 0
    forget_gradients(run)
    (run / "random").touch()
    refused(influence("score", run), 1, "is random")


def test_sizes_that_are_missing_are_measured_again(make_run, influence, calls):
    run = make_run()
    first = influence("score", run)
    for path in (run / ".influence").rglob("sizes-*.json"):
        path.unlink()
    forget_gradients(run)
    calls.clear()
    again = influence("score", run)
    assert "probe" in calls
    assert again.out == first.out
    assert "forms" in json.loads(next((run / ".influence").rglob("sizes-*.json")).read_text())


def test_without_a_cache_nothing_is_remembered(make_run, influence, calls):
    run = make_run()
    for _ in range(2):
        assert influence("score", run, "--cache", "none").code == 0
    assert calls == ["probe", "probe"]
    assert not (run / ".influence").exists()
