"""An opened run in a long-lived process: what it keeps, what it reads again, and what it leaves alone."""

import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from influence_cli import InfluenceError, open_run
from influence_cli.errors import DefinitionError
from influence_cli.run import definition as definitions
from tests.conftest import DEFINITION
from tests.refusals import replaced
from tests.training import train

SCALED = replaced(DEFINITION, ("    return F.cross", "    return scale() * F.cross"))
# the module is imported by a function, after the definition was loaded
FLOAT32 = (
    ("nn.Linear(5, 3))\n", "nn.Linear(5, 3)).float()\n"),
    (
        "torch.randn(number, 4, generator=generator)",
        "torch.randn(number, 4, generator=generator).float()",
    ),
)
LATE = SCALED + "\ndef scale():\n    import helper\n    return helper.SCALE\n"
AT_ONCE = SCALED + "\nimport helper\ndef scale():\n    return helper.SCALE\n"


@pytest.fixture
def write_run(make_run):
    """write_run(text, name) -> a run folder whose definition.py nobody has run yet."""

    def write(text: str, name: str = "run", **options) -> Path:
        path = make_run(name, **options)
        (path / "definition.py").write_text(text)
        return path

    return write


def first_score(run) -> float:
    return run.score(queries=0, top=1).rows()[0].score


def test_the_package_and_open_run_import_no_torch():
    code = (
        "import sys; from influence_cli import open_run; print({'torch', 'numpy'} & {*sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


def state_of_process() -> dict:
    return {
        "modules": {name for name, module in sys.modules.items() if "helper" in name or "influence_definition" in name},
        "path": list(sys.path),
        "finders": list(sys.meta_path),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "warnings": (list(warnings.filters), warnings.showwarning),
        "unraisable": sys.unraisablehook,
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()),
        "ranks": torch.distributed.is_initialized(),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "bytecode": sys.dont_write_bytecode,
    }  # fmt: skip


@pytest.fixture
def tf32_of_a_notebook():
    """TF32 as a training script sets it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_nothing_of_a_call_stays_in_the_process(write_run, capfd, tf32_of_a_notebook):
    disturbance = """
import os
os.chdir(os.path.dirname(os.path.abspath(__file__)))
torch.manual_seed(5)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(2)
torch.backends.cuda.matmul.allow_tf32 = False
"""
    path = write_run(replaced(AT_ONCE, *FLOAT32) + disturbance)
    (path / "helper.py").write_text("SCALE = 1.0\n")
    before = state_of_process()
    run = open_run(path)
    assert state_of_process() == before
    scores = run.score()
    scores.rows(), scores.write(path / "table.csv"), run.self_influence(), run.cache()
    with pytest.raises(InfluenceError):
        run.score(queries=99)
    assert state_of_process() == before
    assert capfd.readouterr() == ("", "")


def test_a_definition_keeps_the_settings_that_it_chose(write_run):
    text = replaced(DEFINITION, ("    return F.cross", "    assert torch.get_default_dtype() == torch.float64\n    return F.cross"))  # fmt: skip
    text = replaced(text, *FLOAT32)
    run = open_run(write_run(text + "\ntorch.set_default_dtype(torch.float64)\n"))
    assert torch.get_default_dtype() == torch.float32
    assert run.score().rows()


@pytest.mark.parametrize("text", [AT_ONCE, LATE], ids=["at once", "late"])
def test_two_runs_have_modules_of_one_name(write_run, text):
    runs = []
    for scale in (1.0, 3.0):
        path = write_run(text, f"run{scale}")
        (path / "helper.py").write_text(f"SCALE = {scale}\n")
        runs.append(open_run(path, cache="none"))
    small, large = runs
    for _ in range(2):  # one after the other, and again
        # the gradients of both sides are three times as large
        assert first_score(large) == pytest.approx(9 * first_score(small), rel=1e-5)


@pytest.mark.parametrize("text", [AT_ONCE, LATE], ids=["at once", "late"])
def test_the_modules_of_a_notebook_are_not_those_of_a_definition(
    make_run, write_run, text, monkeypatch, tmp_path
):
    path, notebook = write_run(text), tmp_path / "notebook"
    notebook.mkdir()
    (notebook / "helper.py").write_text("SCALE = 7.0\n")
    (path / "helper.py").write_text("SCALE = 1.0\n")
    monkeypatch.syspath_prepend(notebook)
    import helper  # type: ignore[import-not-found]  # of this test

    run = open_run(path, cache="none")
    plain = open_run(make_run("plain"), cache="none")
    assert first_score(run) == first_score(plain)
    assert sys.modules.pop("helper") is helper


@pytest.mark.parametrize("place", ["beside", "elsewhere"])
@pytest.mark.parametrize("text", [AT_ONCE, LATE], ids=["at once", "late"])
def test_a_run_that_is_opened_again_has_the_edited_module(
    write_run, place, text, monkeypatch, tmp_path
):
    path = write_run(text)
    folder = path if place == "beside" else tmp_path / "library"
    folder.mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(folder)
    (folder / "helper.py").write_text("SCALE = 1.0\n")
    import helper  # type: ignore[import-not-found]  # as a notebook does

    first = open_run(path, cache="none")
    before = first_score(first)
    (folder / "helper.py").write_text("SCALE = 2.0\n")  # of the same size
    again = open_run(path, cache="none")
    assert first_score(again) == pytest.approx(4 * before, rel=1e-5)
    if text is AT_ONCE:
        assert first_score(first) == before
    assert sys.modules.pop("helper") is helper
    assert helper.SCALE == 1.0


def test_a_run_that_is_opened_again_has_the_edited_definition(make_run):
    path = make_run()
    first = open_run(path)
    before = first_score(first)
    (path / "definition.py").write_text(replaced(DEFINITION, ("    return F.cross", "    return 2 * F.cross")))  # fmt: skip
    assert first_score(first) == before
    again = open_run(path)
    with pytest.raises(InfluenceError, match="belongs to another run"):
        again.score()
    assert first_score(open_run(path, cache="none")) == pytest.approx(4 * before, rel=1e-5)


def test_a_run_is_loaded_once_and_scored_often(make_run, monkeypatch):
    calls = []
    load = definitions.load_definition
    monkeypatch.setattr("influence_cli.run.run.load_definition", lambda path: calls.append("definition") or load(path))  # fmt: skip
    path = make_run("run", DEFINITION + "\nCALLS = []\n_data = train_data\ndef train_data():\n    CALLS.append(1)\n    return _data()\n")  # fmt: skip
    run = open_run(path)
    tables = [run.score(top=3).rows() for _ in range(3)]
    run.self_influence().rows()
    assert tables[0] == tables[1] == tables[2]
    assert calls == ["definition"]
    assert len(run._folder.run.definition.module.CALLS) == 1


def test_a_checkpoint_that_was_replaced_is_read_again(make_run):
    path = make_run(steps=(10,))
    run = open_run(path)
    before = first_score(run)
    file = path / "checkpoints" / "step-000010.safetensors"
    metadata = {"step": "10", "learning_rate": "0.1"}
    weights = {name: 2 * values for name, values in load_file(file).items()}
    save_file(weights, file, metadata=metadata)
    after = first_score(run)
    assert after != before
    assert after == first_score(open_run(path, cache="none"))


def test_calls_do_not_depend_on_earlier_calls(make_run):
    path = make_run()
    plain = {name: getattr(open_run(path, cache="none"), name)().rows() for name in ("score", "self_influence")}  # fmt: skip
    run = open_run(path, cache="none")
    run.score(method="grad-dot", steps=20, by="layer", queries=[3])
    assert run.self_influence().rows() == plain["self_influence"]
    assert run.score().rows() == plain["score"]


def test_a_relative_path_survives_a_change_of_the_folder(make_run, tmp_path, monkeypatch):
    path = make_run()
    monkeypatch.chdir(path.parent)
    run = open_run("run", cache="stored")
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    run.score().write("table.csv")
    assert (other / "table.csv").is_file()
    assert (path.parent / "stored").is_dir()
    assert not (other / "stored").exists()


def test_progress_writes_notes_and_progress_to_stderr(make_run, capfd):
    path = make_run("run", steps=(10,))
    checkpoint = path / "checkpoints" / "step-000010.safetensors"
    save_file(load_file(checkpoint), checkpoint, metadata={"step": "10", "learning_rate": "0"})
    quiet, loud = open_run(path), open_run(path, progress=True)
    tables = [run.score(method="tracin", top="all") for run in (quiet, quiet, loud)]
    out, err = capfd.readouterr()
    assert out == ""
    assert all("the learning rate is 0 at step 10" in table.notes[0] for table in tables)
    assert err == "".join(f"note: {note}\n" for note in tables[2].notes)


def test_torchruns_variables_do_not_make_a_program_a_rank(make_run, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    run = open_run(make_run())
    tables = [run.score(top="all", queries=0, shard=f"{i}/2").rows() for i in (1, 2)]
    assert len(tables[0] + tables[1]) == 20


@pytest.mark.parametrize("text", ["def model(:", "raise ValueError('no')", "x = 1"])
def test_a_definition_that_fails_leaves_nothing_behind(make_run, text):
    path = make_run()
    (path / "definition.py").write_text(text)
    before = state_of_process()
    with pytest.raises(DefinitionError) as error:
        open_run(path)
    assert "--" not in str(error.value)
    assert state_of_process() == before


STOPS = """

LEFT = [5]  # calls of loss() that succeed
_loss_of_all = loss

def loss(model, batch):
    LEFT[0] -= 1
    if not LEFT[0]:
        raise KeyboardInterrupt
    return _loss_of_all(model, batch)
"""


@pytest.mark.parametrize("calls", [5, 12])
@pytest.mark.parametrize("arguments", [{}, {"method": "unroll", "replay": True}], ids=str)
def test_an_interrupted_call_changes_no_later_call(arguments, calls, tmp_path):
    path = train(tmp_path / "run", every=4)
    expected = open_run(path, cache="none").score(**arguments).rows()
    text = (path / "definition.py").read_text() + replaced(STOPS, ("[5]", f"[{calls}]"))
    (path / "definition.py").write_text(text)
    run = open_run(path, cache="none")
    with pytest.raises(KeyboardInterrupt):
        run.score(**arguments)
    rows = run.score(**arguments).rows()
    assert [row[:4] for row in rows] == [row[:4] for row in expected]
    scores = [row.score for row in rows]
    np.testing.assert_allclose(scores, [row.score for row in expected], rtol=1e-9)


def test_an_own_setting_of_a_definition_holds_inside_its_calls_only(write_run):
    text = replaced(DEFINITION, ("    return F.cross", "    THREADS.append(torch.get_num_threads())\n    return F.cross"))  # fmt: skip
    threads = torch.get_num_threads()
    run = open_run(write_run(text + f"\nTHREADS = []\ntorch.set_num_threads({threads + 1})\n"))
    other = open_run(write_run(text + "\nTHREADS = []\n", "other"))
    run.score(), other.score()
    seen = [set(opened._folder.run.definition.module.THREADS) for opened in (run, other)]
    assert seen == [{threads + 1}, {threads}]
    assert torch.get_num_threads() == threads
