"""Interrupted reverse passes, and several jobs that share their files: nothing is added twice.

STRESS_ROUNDS=100 pytest tests/methods/test_progress.py -k two_jobs    runs the stress test longer
"""

import json
import os
import random
import shutil
import signal
import socket
import time

import pytest
import torch

from influence_cli.methods.reverse import embedding_build, resume, reverse_pass, steps
from tests.forked import Job
from tests.refusals import refused
from tests.training import change_state, train

ROUNDS = int(os.environ.get("STRESS_ROUNDS", "1"))
PASSES = {
    "unroll": ("--method", "unroll"),
    "unroll --by layer": ("--method", "unroll", "--by", "layer"),
    "dve --replay": ("--method", "dve", "--replay"),
}
EMBEDDINGS = ("--method", "dve", "--embeddings")


def score(influence, run, flags):
    return influence("score", run, "--top", "all", *flags)


def make_slow(pause, save):
    """Seconds that a step takes, and seconds between saves."""
    resume.SAVE_SECONDS, embedding_build.ROWS_BYTES = save, 1

    def propagate(*arguments, **options):
        for effects in steps.propagate(*arguments, **options):
            time.sleep(pause)
            yield effects

    embedding_build.propagate = reverse_pass.propagate = propagate


def start_job(run, flags, name, pause=0.02, save=0.0):
    """In a fork: a job takes a tenth of the time that importing torch takes."""
    command = ("score", run, "--top", "all", *flags)
    return Job(*command, place=run.parent, name=name, prepare=lambda: make_slow(pause, save))


def saved_files(run, name):
    return sorted((run / ".influence" / "back").rglob(f"{name}-*.safetensors"))


def interrupt_at(step, monkeypatch, every=1):
    """A job that saves after each `every` steps, and is interrupted at `step`."""
    add, save = resume.PassProgress.add, resume.PassProgress._save

    def add_or_stop(self, adjoint, effects):
        if effects.step == step:
            raise KeyboardInterrupt
        add(self, adjoint, effects)

    def save_seldom(self, adjoint, folder):
        if len(self._unsaved) >= every:
            save(self, adjoint, folder)

    monkeypatch.setattr(resume, "SAVE_SECONDS", 0)
    monkeypatch.setattr(resume.PassProgress, "add", add_or_stop)
    monkeypatch.setattr(resume.PassProgress, "_save", save_seldom)


def interrupted(influence, run, flags, monkeypatch, step, every=1):
    with monkeypatch.context() as patch:
        interrupt_at(step, patch, every)
        assert score(influence, run, flags).code == 130


@pytest.fixture(params=PASSES)
def flags(request):
    return PASSES[request.param]


# ---------------------------------------------------------------- which files fit together
def test_a_chain_of_saved_steps_has_no_gap_and_no_overlap():
    steps = range(0, 100)
    one_job = {(90, 100), (80, 90), (70, 80)}
    other_job = {(85, 100), (72, 85), (60, 72)}
    find = resume.find_chain
    assert find(one_job, {70}, 100, steps) == [(90, 100), (80, 90), (70, 80)]
    assert find(one_job | other_job, {70, 60}, 100, steps) == [(85, 100), (72, 85), (60, 72)]
    assert find(one_job | other_job, {70}, 100, steps) == [(90, 100), (80, 90), (70, 80)]
    assert find(one_job - {(80, 90)}, {70, 90}, 100, steps) == [(90, 100)]
    assert find(one_job, {75, 99}, 100, steps) is None
    assert find({(-10, 100), (100, 100), (90, 80)}, {-10, 90}, 100, steps) is None


def test_overlapping_sums_of_two_killed_jobs_are_not_added_twice(
    flags, tmp_path, influence, monkeypatch
):
    run = train(tmp_path / "run", every=4)
    undisturbed = score(influence, run, (*flags, "--cache", "none")).out
    interrupted(influence, run, flags, monkeypatch, step=3, every=2)
    shutil.copytree(run / ".influence" / "back", tmp_path / "first")
    shutil.rmtree(run / ".influence" / "back")
    interrupted(influence, run, flags, monkeypatch, step=4, every=3)
    shutil.copytree(tmp_path / "first", run / ".influence" / "back", dirs_exist_ok=True)
    assert len(saved_files(run, "scores")) == 6
    result = score(influence, run, flags)
    assert "resuming below step 4" in result.err
    assert result.out == undisturbed
    assert not list((run / ".influence" / "back").iterdir())


# ---------------------------------------------------------------- damaged and foreign files
def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(8)),
    "a byte of the header": lambda path: flip_byte(path, 40),
    "the first number": lambda path: flip_byte(path, 4096 + 6),
    "the last number": lambda path: flip_byte(path, -2),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["scores", "carried"])
@pytest.mark.parametrize("which", [0, -1], ids=["lowest", "highest"])
def test_damaged_progress_is_computed_again(damage, kind, which, tmp_path, influence, monkeypatch):
    run, flags = train(tmp_path / "run", every=4), PASSES["unroll"]
    undisturbed = score(influence, run, (*flags, "--cache", "none")).out
    interrupted(influence, run, flags, monkeypatch, step=4)
    path = saved_files(run, kind)[which]
    DAMAGES[damage](path)
    result = score(influence, run, flags)
    assert result.out == undisturbed
    # a gap in the saved steps is seen before any file is read
    assert (f"{path.name} is damaged" in result.err) == (damage != "missing")
    assert not list((run / ".influence" / "back").iterdir())


@pytest.mark.parametrize("kind", ["scores", "carried"])
def test_progress_of_another_question_or_of_other_steps_is_not_used(
    kind, tmp_path, influence, monkeypatch
):
    run, flags = train(tmp_path / "run", every=4), PASSES["unroll"]
    undisturbed = score(influence, run, (*flags, "--cache", "none")).out
    interrupted(influence, run, (*flags, "--renormalize"), monkeypatch, step=4)
    renormalized = saved_files(run, kind)
    interrupted(influence, run, flags, monkeypatch, step=4)
    other = {path.name: path for path in renormalized}
    own = [path for path in saved_files(run, kind) if path not in renormalized]
    own[0].write_bytes(other[own[0].name].read_bytes())
    result = score(influence, run, flags)
    assert "it belongs elsewhere: identity differs" in result.err
    assert result.out == undisturbed
    interrupted(influence, run, flags, monkeypatch, step=4)
    own = [path for path in saved_files(run, kind) if path.parent == own[0].parent]
    shutil.copy(own[-1], own[0].with_name(own[0].name.replace("05", "03")))
    own[0].write_bytes(own[-1].read_bytes())
    assert score(influence, run, flags).out == undisturbed


def test_progress_from_another_optimizer_state_is_not_used(tmp_path, influence, monkeypatch):
    run = train(tmp_path / "run", every=4, kind=torch.optim.Adam, rate=0.05, states=True)
    flags = ("--method", "unroll", "--replay")
    before = score(influence, run, (*flags, "--cache", "none")).out
    interrupted(influence, run, flags, monkeypatch, step=5)
    change_state(run, 8)
    changed = score(influence, run, (*flags, "--cache", "none")).out
    assert changed != before
    result = score(influence, run, flags)
    assert "resuming" not in result.err
    assert result.out == changed


def test_a_folder_that_another_job_deletes_meanwhile_changes_nothing(
    flags, tmp_path, influence, monkeypatch
):
    run = train(tmp_path / "run", every=4)
    undisturbed = score(influence, run, (*flags, "--cache", "none")).out
    interrupted(influence, run, flags, monkeypatch, step=4)
    write, read = resume.write_tensors, resume.read_saved

    def delete_first(function):
        def deleted(path, *args):
            if counts[function] % 3 == 1:
                shutil.rmtree(path.parent, ignore_errors=True)
            counts[function] += 1
            return function(path, *args)

        return deleted

    counts = {write: 0, read: 0}
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0)
    monkeypatch.setattr(resume, "read_saved", delete_first(read))
    monkeypatch.setattr(resume, "write_tensors", delete_first(write))
    result = score(influence, run, flags)
    assert result.code == 0, result.err
    assert counts[read] > 1 and counts[write] > 1
    assert result.out == undisturbed


def test_finished_progress_is_deleted_without_following_links(tmp_path, influence, monkeypatch):
    run, flags = train(tmp_path / "run", every=4), PASSES["unroll"]
    interrupted(influence, run, flags, monkeypatch, step=4)
    [folder] = (run / ".influence" / "back").iterdir()
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "scores-000000-000004.safetensors").write_text("mine")
    (folder / "scores-000900-000904.safetensors").symlink_to(
        kept / "scores-000000-000004.safetensors"
    )
    (folder / "scores-000000-000001.safetensors").symlink_to(kept)
    assert score(influence, run, flags).code == 0
    assert [path.name for path in kept.iterdir()] == ["scores-000000-000004.safetensors"]
    assert not folder.exists()


# ---------------------------------------------------------------- embeddings
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "missing"])
@pytest.mark.parametrize("pattern", ["rows", "map"])
def test_a_damaged_file_of_embeddings_is_refused(damage, pattern, tmp_path, influence):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    assert score(influence, run, (*EMBEDDINGS, tmp_path / "kept")).code == 0
    path = min((tmp_path / "kept").glob(f"part-*/{pattern}*"))
    DAMAGES[damage](path)
    result = score(influence, run, (*EMBEDDINGS, tmp_path / "kept"))
    refused(result, 1, path.name, "is damaged", "delete it")


def test_files_of_embeddings_of_another_place_are_refused(tmp_path, influence, monkeypatch):
    monkeypatch.setattr(embedding_build, "ROWS_BYTES", 1)
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    assert score(influence, run, (*EMBEDDINGS, tmp_path / "other", "--renormalize")).code == 0
    undisturbed = score(influence, run, (*EMBEDDINGS, tmp_path / "kept"))
    for pattern in ("part-*/rows*", "part-*/map*"):
        path = min((tmp_path / "kept").glob(pattern))
        original = path.read_bytes()
        path.write_bytes((tmp_path / "other" / path.relative_to(tmp_path / "kept")).read_bytes())
        result = score(influence, run, (*EMBEDDINGS, tmp_path / "kept"))
        refused(result, 1, path.name, "it belongs elsewhere: identity differs")
        path.write_bytes(max(path.parent.glob(path.name[:3] + "*")).read_bytes())
        if pattern == "part-*/rows*":
            result = score(influence, run, (*EMBEDDINGS, tmp_path / "kept"))
            refused(result, 1, path.name, "it belongs elsewhere: steps differs")
        path.write_bytes(original)
    # files that no map lists are not read; listed ones that are gone are computed again
    part = min((tmp_path / "kept").glob("part-*"))
    shutil.copy(min(part.glob("rows-*")), part / "rows-000000-000020.safetensors")
    min(part.glob("rows-*-000001*")).unlink()
    assert score(influence, run, (*EMBEDDINGS, tmp_path / "kept")).out == undisturbed.out


def test_a_folder_of_embeddings_left_by_a_kill_at_its_start_is_used(tmp_path, influence):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    undisturbed = score(influence, run, (*EMBEDDINGS, tmp_path / "kept"))
    half_made = tmp_path / "half"
    half_made.mkdir()
    shutil.copy(tmp_path / "kept" / "sample.safetensors", half_made)
    left = half_made / f".tmp-{socket.gethostname()}-{'0' * 16}-sample.safetensors"
    left.touch()
    assert score(influence, run, (*EMBEDDINGS, half_made)).out == undisturbed.out
    assert not left.exists()
    (half_made / "embeddings.json").unlink()
    refused(score(influence, run, (*EMBEDDINGS, half_made)), 1, "holds other files")


def test_an_incomplete_part_behind_a_link_is_refused_and_kept(tmp_path, influence):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    assert score(influence, run, (*EMBEDDINGS, tmp_path / "kept")).code == 0
    part = min((tmp_path / "kept").glob("part-*"))
    shutil.rmtree(part)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("mine")
    part.symlink_to(mine)
    result = score(influence, run, (*EMBEDDINGS, tmp_path / "kept"))
    refused(result, 1, part.name, "is a symbolic link", "delete the link")
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]


def test_a_folder_of_embeddings_removed_during_the_work_is_an_error(
    tmp_path, influence, monkeypatch
):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    build_part = embedding_build.build_part

    def remove_and_build(store, *args):
        store.make_part = lambda part: shutil.rmtree(store.folder, ignore_errors=True)
        build_part(store, *args)

    monkeypatch.setattr(embedding_build, "build_part", remove_and_build)
    result = score(influence, run, (*EMBEDDINGS, tmp_path / "kept"))
    refused(result, 1, "kept can't be written: No such file or directory")


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "unroll"),
        ("--method", "dve", "--form", "query"),
        ("--method", "dve", "--form", "embedding"),
    ],
    ids=["unroll", "dve", "dve --form embedding"],
)
def test_an_effect_that_is_not_finite_names_step_and_checkpoint(flags, tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    path = run / "trajectory.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rates = lines[6]["lr"]
    lines[6]["lr"] = [1e308] * len(rates) if isinstance(rates, list) else 1e308
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    result = score(influence, run, flags)
    refused(result, 1, "not finite at step 5 (after the checkpoint of step 4)", "influence check")


# ---------------------------------------------------------------- two jobs, at random moments
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


@pytest.mark.parametrize("name", ["unroll", "dve --replay", "embeddings"])
def test_two_jobs_that_are_killed_at_random_moments_give_the_undisturbed_bytes(
    name, tmp_path, influence
):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    flags = PASSES.get(name) or (*EMBEDDINGS, tmp_path / "kept")
    alone = PASSES.get(name) or ("--method", "dve", "--form", "embedding")
    undisturbed = score(influence, run, (*alone, "--cache", tmp_path / "alone")).out
    chance = random.Random(name)
    for _ in range(ROUNDS):
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        for ending in (chance.choice(list(CODES)), None):
            jobs = [
                start_job(run, flags, name, save=chance.choice([0, 0.05])) for name in ("a", "b")
            ]
            if ending is not None:
                wait_for_files(run, tmp_path / "kept", jobs)
                for job in jobs:
                    time.sleep(chance.uniform(0, 0.3))
                    job.kill(ending)
            for job in jobs:
                ended = job.wait()
                codes = (0,) if ending is None else (0, CODES[ending])
                assert ended.code in codes, ended.err
                assert "Traceback" not in ended.err
                if ended.code == 0:
                    assert ended.out == undisturbed


def wait_for_files(run, kept, jobs):
    """Wait until the jobs have written something of this round, or ended."""
    started = time.time()
    while all(job.poll() is None for job in jobs) and time.time() - started < 60:
        files = [*(run / ".influence").rglob("back/*/*"), *kept.rglob("part-*/*")]
        if any(path.stat().st_mtime >= started for path in files if path.exists()):
            return
        time.sleep(0.02)
