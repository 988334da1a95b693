"""What is computed, what is reused, and that no order of work, interruption or neighbour changes a
byte.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.cache import id_blocks
from influence_cli.extraction import memory_budget
from influence_cli.gradients import capture
from influence_cli.storage import atomic
from tests.conftest import DEFINITION, build_run
from tests.forked import Job


def files(run: Path) -> dict[str, bytes]:
    """The units of a run's cache: name -> bytes."""
    cache = run / ".influence"
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("0*.safetensors"))
    }


@pytest.fixture
def captured(monkeypatch) -> list[int]:
    """How many examples each call captured; probes don't count."""
    sizes: list[int] = []
    original = capture.Capture.visit

    def counting(self, batch, singles, size, keep):
        sizes.append(size)
        return original(self, batch, singles, size, keep)

    monkeypatch.setattr(capture.Capture, "visit", counting)
    return sizes


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(memory_budget, "UNIT_EXAMPLES", 8)


@pytest.mark.parametrize(
    "again",
    [
        ["--lr", "3"],
        ["--lr-weights", "none"],
        ["--layers", "2"],
        ["--layers", "!0"],
        ["--steps", "20"],
        ["--queries", "3"],
        ["--train", "3,7,11:13"],
        ["--method", "grad-cos"],
        ["--by", "layer"],
        ["--sum-queries"],
        ["--top", "all"],
        [],
    ],
    ids=" ".join,
)
def test_what_is_cached_serves_other_questions(again, make_run, influence, captured):
    run = make_run()
    assert influence("cache", run).code == 0
    assert sum(captured) == 2 * (20 + 6)
    captured.clear()
    assert influence("score", run, *again).code == 0
    assert influence("self", run).code == 0
    assert captured == []


def test_new_queries_touch_no_training_gradient(make_run, influence, captured):
    run = make_run()
    influence("score", run, "--queries", "0")
    captured.clear()
    influence("score", run, "--queries", "1:3")
    assert sum(captured) == 2 * 2


def test_new_layers_and_examples_compute_only_what_is_missing(make_run, influence, captured):
    run = make_run()
    influence("cache", run, "--layers", "2", "--train", "0:10", "--queries", "0")
    captured.clear()
    result = influence("cache", run, "--layers", "2", "--queries", "0")
    assert sum(captured) == 2 * 10
    assert "train: 20 gradients computed, 20 were stored already" in result.err
    captured.clear()
    influence("cache", run, "--queries", "0")
    columns = {path.parent.name for path in (run / ".influence").glob("*/*/train/*/*.safetensors")}
    assert sum(captured) == 2 * 21
    assert len(columns) == 2, "the head is not captured again"
    pieced, fresh = influence("score", run).rows, influence("score", make_run("fresh")).rows
    assert [row["train"] for row in pieced] == [row["train"] for row in fresh]
    assert [float(row["score"]) for row in pieced] == pytest.approx(
        [float(row["score"]) for row in fresh], rel=1e-4
    )  # other batches


def test_no_cache_keeps_nothing_and_scores_the_same(make_run, influence):
    run = make_run()
    live = influence("score", run, "--cache", "none")
    assert live.code == 0
    assert not (run / ".influence").exists()
    kept = influence("score", run)
    assert [row["train"] for row in live.rows] == [row["train"] for row in kept.rows]
    assert [float(row["score"]) for row in live.rows] == pytest.approx(
        [float(row["score"]) for row in kept.rows], rel=1e-5
    )  # another order of sums
    assert influence("self", run, "--cache", "none").out == influence("self", run).out


@pytest.mark.parametrize(
    "flags", [["--batch-size", "1"], ["--batch-size", "7"], ["--batch-size", "64"]], ids=" ".join
)
def test_the_batch_size_does_not_change_scores(flags, make_run, influence):
    expected, actual = (
        influence("score", make_run(name), "--precision", "float64", *more).rows
        for name, more in (("a", []), ("b", flags))
    )
    assert [row["train"] for row in actual] == [row["train"] for row in expected]
    assert [float(row["score"]) for row in actual] == pytest.approx(
        [float(row["score"]) for row in expected], rel=1e-12
    )


def test_the_unit_size_does_not_change_scores(make_run, influence, monkeypatch):
    expected = influence("score", make_run("a"), "--precision", "float64")
    monkeypatch.setattr(memory_budget, "UNIT_EXAMPLES", 8)
    actual = influence("score", make_run("b"), "--precision", "float64")
    assert [row["train"] for row in actual.rows] == [row["train"] for row in expected.rows]
    assert [float(r["score"]) for r in actual.rows] == pytest.approx(
        [float(r["score"]) for r in expected.rows], rel=1e-12
    )


def test_any_finished_units_plus_the_rest_are_the_same_bytes(make_run, influence, small_units):
    """Every unit in turn is taken away; computing it again gives the same files and the same
    table.
    """
    run = make_run()
    table = influence("score", run).out
    unit_files = files(run)
    assert len(unit_files) == 2 * 3 + 2
    for name in unit_files:
        (run / ".influence" / name).unlink()
        assert influence("score", run).out == table
        assert files(run) == unit_files


def test_the_order_of_work_does_not_change_bytes(make_run, influence, small_units):
    run, other = make_run("a"), make_run("b")
    influence("cache", run)
    for step in ("20", "10"):
        influence("cache", other, "--steps", step)
    assert files(run) == files(other)


SLOW = DEFINITION.replace(
    "def loss(model, batch):", "import time\ndef loss(model, batch):\n    time.sleep(0.005)"
).replace("examples(0, 20)", "examples(0, 40)")


def make_units_small() -> None:
    memory_budget.UNIT_EXAMPLES = 4


def start(run: Path, name: str = "0") -> Job:
    command = ("score", run, "--batch-size", "1")
    return Job(*command, place=run.parent, name=name, prepare=make_units_small)


def wait_for_units(run: Path, count: int, job: Job) -> None:
    limit = time.monotonic() + 60
    while (
        len(list(run.rglob("0*.safetensors"))) < count
        and job.poll() is None
        and time.monotonic() < limit
    ):
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    """The table and the cache files of the slow run, left alone."""
    run = build_run(tmp_path_factory.mktemp("undisturbed") / "run", SLOW)
    table = start(run).wait().out
    assert table
    return table, files(run)


@pytest.mark.parametrize(
    ("stop", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(stop, code, make_run, undisturbed):
    """kill -9, SIGTERM and Ctrl-C in the middle: finished units stay, the same command finishes,
    nothing differs.
    """
    table, unit_files = undisturbed
    run = make_run("stopped", SLOW)
    job = start(run)
    wait_for_units(run, 9, job)
    job.kill(stop)
    ended = job.wait()
    assert (ended.code, ended.out) == (code, "")
    assert "Traceback" not in ended.err
    if code > 0:
        assert ended.err.endswith(
            "interrupted: finished work is kept. Run the same command to resume.\n"
        )
        assert not list(run.rglob(".tmp-*"))
    kept = files(run)
    assert 9 <= len(kept) < len(unit_files), (
        "work was lost, or the process was too fast to be stopped"
    )
    assert start(run).wait().out == table
    assert files(run) == unit_files
    assert kept.items() <= files(run).items()
    assert not list(run.rglob(".tmp-*"))


def test_two_processes_on_one_cache_do_no_harm(make_run, undisturbed):
    table, unit_files = undisturbed
    run = make_run("both", SLOW)
    both = [start(run, "one"), start(run, "two")]
    assert [job.wait().out for job in both] == [table, table]
    assert files(run) == unit_files


def test_a_comment_in_the_definition_reuses_the_cache_and_says_so(make_run, influence, captured):
    run = make_run()
    influence("cache", run)
    (run / "definition.py").write_text(DEFINITION + "\n# a comment\n")
    captured.clear()
    result = influence("score", run)
    assert result.code == 0, result.err
    assert "influence computed 8 of them again at each of 2 checkpoints: they agree" in result.err
    assert sum(captured) == 2 * (8 + 6)
    captured.clear()
    assert "changed" not in influence("score", run).err
    assert captured == []


def test_a_changed_loss_is_refused_by_layer_and_example(make_run, influence):
    run = make_run()
    influence("cache", run)
    (run / "definition.py").write_text(
        DEFINITION.replace('reduction="none")', 'reduction="none", label_smoothing=0.1)')
    )
    result = influence("score", run)
    assert result.code == 1
    assert result.out == ""
    assert "recomputed losses differ" in result.err
    assert "first at example 0 of train_data(), checkpoints/step-000010.safetensors" in result.err


def test_a_changed_model_is_refused_by_layer_and_example(make_run, influence):
    """The loss is the same at the saved weights, the gradient is not."""
    run = make_run()
    influence("cache", run)
    (run / "definition.py").write_text(
        DEFINITION.replace("model(batch[0])", "(2 * model(batch[0]) - model(batch[0]).detach())")
    )
    result = influence("score", run)
    assert result.code == 1
    assert "recomputed gradients differ" in result.err
    assert "first at 0.weight, example 0 of train_data()" in result.err


@pytest.mark.parametrize(
    "extra", ["\ndef measure(model, batch):\n    return model(batch[0])[:, 0]\n", "seed"]
)
def test_other_queries_or_another_measure_touch_no_training_gradient(
    extra, make_run, influence, captured
):
    run = make_run()
    influence("score", run)
    edited = (
        DEFINITION.replace("examples(1, 6)", "examples(7, 6)")
        if extra == "seed"
        else DEFINITION + extra
    )
    (run / "definition.py").write_text(edited)
    captured.clear()
    result = influence("score", run)
    assert result.code == 0, result.err
    assert sum(captured) == 2 * 8 + 2 * 6, (
        "8 training examples a checkpoint are compared, the queries are taken anew"
    )
    assert result.out == influence("score", make_run("fresh", edited)).out
    captured.clear()
    (run / "definition.py").write_text(DEFINITION)
    assert influence("score", run).code == 0
    assert captured == [], "what was there for the first text still is"


def test_queries_that_change_under_the_same_definition_are_taken_anew(make_run, influence):
    text = DEFINITION.replace("examples(1, 6)", "examples(int(open(__file__ + '.seed').read()), 6)")

    def model():
        return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

    run = make_run(definition=text, model=model)
    tables = []
    for seed in "151":
        (run / "definition.py.seed").write_text(seed)
        tables.append(influence("score", run).out)
    assert tables[0] == tables[2] != tables[1]
    fresh = make_run("fresh", text, model=model)
    (fresh / "definition.py.seed").write_text("5")
    assert tables[1] == influence("score", fresh).out


def test_a_corrected_label_is_noticed_whatever_was_cached_before(make_run, influence):
    """Norms and gradients in overlapping units, and checkpoints cached under different texts of the
    definition.
    """
    first = DEFINITION.replace("examples(0, 20)", "examples(0, 3000)")
    fixed = first.replace(
        "return examples(0, 3000)",
        "data = examples(0, 3000)\n    data.tensors[1][501] = (data.tensors[1][501] + 1) % 3\n    return data",
    )
    run = make_run(definition=first)
    influence("self", run, "--steps", "10", "--layers", "2.bias")
    influence("cache", run, "--steps", "20", "--layers", "2.bias")
    (run / "definition.py").write_text(fixed)
    for steps in ("10", "20", "10:"):
        result = influence("score", run, "--steps", steps, "--layers", "2.bias", "--queries", "0")
        assert result.code == 1, steps
        assert "example 501 of train_data()" in result.err
    influence("score", run, "--steps", "10", "--layers", "2.bias", "--cache", run / "other")
    assert (
        influence(
            "score", run, "--steps", "10:", "--layers", "2.bias", "--cache", run / "other"
        ).code
        == 0
    )


def test_a_helper_imported_inside_the_loss_belongs_to_the_definition(make_run, influence):
    run = make_run(
        definition=DEFINITION.replace(
            "    return F.cross",
            "    from mylib_of_a_test import scale\n    return scale * F.cross",
        )
    )
    (run / "mylib_of_a_test.py").write_text("scale = 1.0\n")
    assert influence("score", run).code == 0
    (run / "mylib_of_a_test.py").write_text("scale = -5.0\n")
    sys.modules.pop("mylib_of_a_test")
    assert influence("score", run).code == 1


def test_changed_data_is_refused_even_when_the_definition_is_the_same(make_run, influence):
    text = DEFINITION.replace(
        "examples(0, 20)", "examples(int(open(__file__ + '.seed').read()), 20)"
    )
    run = make_run(
        definition=text,
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
        ),
    )
    seed = run / "definition.py.seed"
    seed.write_text("0")
    influence("cache", run)
    seed.write_text("5")
    for command in ("score", "self", "cache"):
        result = influence(command, run)
        assert result.code == 1, command
        assert "belongs to other data: example 0 of train_data() differs" in result.err


def test_one_corrected_label_is_noticed_when_the_definition_changed(make_run, influence):
    run = make_run(definition=DEFINITION.replace("examples(0, 20)", "examples(0, 3000)"))
    influence("cache", run, "--steps", "10", "--layers", "2.bias")
    text = (run / "definition.py").read_text()
    (run / "definition.py").write_text(
        text.replace(
            "return examples(0, 3000)",
            "data = examples(0, 3000)\n    data.tensors[1][1717] = (data.tensors[1][1717] + 1) % 3\n    return data",
        )
    )
    result = influence("score", run, "--steps", "10", "--layers", "2.bias", "--queries", "0")
    assert result.code == 1
    assert "example 1717 of train_data() differs" in result.err


def test_a_grown_training_set_keeps_what_it_has(make_run, influence, captured):
    run = make_run()
    influence("cache", run)
    (run / "definition.py").write_text(
        DEFINITION.replace(
            "return examples(0, 20)",
            "return torch.utils.data.ConcatDataset([examples(0, 20), examples(9, 5)])",
        )
    )
    captured.clear()
    result = influence("cache", run)
    assert "train: 10 gradients computed, 40 were stored already" in result.err
    fresh = make_run("fresh", (run / "definition.py").read_text())
    assert (
        influence("score", run, "--precision", "float64").out
        == influence("score", fresh, "--precision", "float64").out
    )


def test_a_new_checkpoint_under_an_old_name_is_computed_anew(make_run, influence):
    run, other = make_run(), make_run("other", steps=(30, 40))
    influence("score", run)
    for old, new in (("10", "30"), ("20", "40")):
        shutil.copy(
            other / f"checkpoints/step-0000{new}.safetensors",
            run / f"checkpoints/step-0000{old}.safetensors",
        )
    for name in (
        "step-000010",
        "step-000020",
    ):  # the names are those of the first run, so are the steps
        from safetensors.torch import load_file, save_file

        path = run / f"checkpoints/{name}.safetensors"
        save_file(
            load_file(path),
            path,
            metadata={"learning_rate": "0.1" if name.endswith("10") else "0.05"},
        )
    assert [row["score"] for row in influence("score", run).rows] == [
        row["score"] for row in influence("score", other).rows
    ]


def test_units_appear_whole_and_are_synced_before_they_are_named(make_run, influence, monkeypatch):
    order: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            atomic.os,
            name,
            lambda *args, name=name, original=original: (order.append(name), original(*args))[1],
        )
    run = make_run()
    influence("cache", run)
    assert order == ["fsync", "replace"] * (len(order) // 2)
    assert len(order) >= 2 * len(files(run))


def test_scattered_examples_share_units_and_batches(make_run, influence, captured, small_units):
    """Units of 8: 8 examples from 3 stretches of 8 are one unit and one batch, not three."""
    run = make_run()
    assert (
        influence(
            "cache", run, "--train", "0,3,7,9,12,15,16,19", "--queries", "0", "--steps", "10"
        ).code
        == 0
    )
    assert captured == [1, 8]
    assert [name.split("/")[-1].split("-")[:2] for name in files(run) if "/train/" in name] == [
        ["000000000000", "000000000020"]
    ]


@pytest.mark.parametrize(
    ("ids", "cuts"),
    [
        (range(3, 19), [[3, 4, 5, 6, 7], [*range(8, 16)], [16, 17, 18]]),
        (np.array([1, 2, 9, 17, 25]), [[1, 2, 9, 17, 25]]),
        (np.array([*range(8), 9, 17, 25]), [[*range(8)], [9, 17, 25]]),
        (np.array([5]), [[5]]),
        (np.array([7, 8]), [[7, 8]]),
        (np.array([], dtype=np.int64), []),
        (np.array([0, *range(8, 16), 17]), [[0], [*range(8, 16)], [17]]),
    ],
)
def test_ids_are_cut_by_the_grid_and_scattered_ones_by_count(ids, cuts):
    assert [part.tolist() for part in id_blocks.cut_ids(ids, 8)] == cuts
