"""torchrun's ranks, real processes each: the bytes of one process, whatever their number; failed and killed ranks."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from influence_cli.api import devices, opening
from influence_cli.errors import UsageProblem
from influence_cli.extraction import fill
from influence_cli.parallel.ranks import Place, Ranks
from influence_cli.preconditioners import training_curvature
from tests.cli.test_merge import DEFINITION as TEXTS
from tests.conftest import DEFINITION as SMALL_MODEL
from tests.conftest import build_run
from tests.forked import Job, run_ranks
from tests.refusals import refused, replaced
from tests.training import train

# many small units and blocks, so that several ranks have work
SMALL = (
    "import torch\n",
    "import os\nimport time\nimport torch\nfrom influence_cli.extraction import memory_budget\nmemory_budget.UNIT_EXAMPLES = 64\n",
)
LOSS = "def loss(model, batch):\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    definition = replaced(TEXTS, ("texts(0, 300, 140)", "texts(0, 1500, 1100)"))
    return build_run(tmp_path_factory.mktemp("ranks") / "run", definition.replace(*SMALL, 1))


def torchrun(
    count: int, *arguments: object, python: tuple[str, ...] = (), **options
) -> subprocess.CompletedProcess:
    launch = [
        sys.executable,
        *python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        "-m",
        "influence_cli",
    ]
    environ = {
        name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"
    } | {"OMP_NUM_THREADS": "1"}
    environ |= (
        {"PYTHONOPTIMIZE": "1"} if "-O" in python else {}
    )  # torchrun starts the ranks without its own flags
    return subprocess.run(
        [*launch, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environ,
        **options,
    )


ALIKE = {
    "score by checkpoint": (2, ["--queries", "0:3", "--by", "checkpoint"]),
    "score all by layer": (4, ["--top", "all", "--by", "layer"]),
    "score groups": (2, ["--group-by", "label", "--cache", "none", "--by", "layer"]),
    "score by word, scattered": (
        2,
        ["--method", "tracin-we", "--by", "word", "--cache", "none", "--train", "@ids.txt"],
    ),
    "self": (4, ["--top", "20"]),
    "score by the rank of layers": (2, ["--aggregate", "rank", "--by", "layer", "--top", "all"]),
    "self by the votes of layers": (2, ["--aggregate", "vote:100"]),
    "score by Gram matrices": (2, ["--method", "trak", "--project", "16", "--by", "layer"]),
}


def compare_ranks(ranks, alone):
    assert (ranks.code, ranks.out) == (0, alone.out), ranks.err


@pytest.mark.parametrize("asked", ALIKE)
def test_ranks_give_the_bytes_of_one_process(asked, run, tmp_path, influence, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ids.txt").write_text(" ".join(str(i) for i in range(0, 1500, 2) if i % 7))
    (count, flags), command = ALIKE[asked], asked.split()[0]
    alone = influence(command, run, *flags, *([] if "none" in flags else ["--cache", "one"]))
    assert alone.code == 0, alone.err
    assert len(alone.rows) >= 8
    cache = [] if "none" in flags else ["--cache", "many"]
    compare_ranks(run_ranks(count, command, run, *flags, *cache, place=tmp_path), alone)
    if "none" not in flags:
        names = [
            sorted(
                (path.relative_to(folder), path.read_bytes())
                for path in Path(folder).rglob("*.safetensors")
            )
            for folder in ("one", "many")
        ]
        assert len(names[0]) > 4
        assert names[0] == names[1]


def test_ranks_divide_the_blocks_of_exact_curvature(tmp_path, influence, monkeypatch):
    monkeypatch.setattr(training_curvature, "MOST_ROWS", 2)
    run = build_run(tmp_path / "run", SMALL_MODEL)
    flags = ("--method", "influence", "--curvature", "hessian", "--cache")
    alone = influence("score", run, *flags, tmp_path / "one")
    compare_ranks(run_ranks(2, "score", run, *flags, tmp_path / "two", place=tmp_path), alone)
    assert len(list((tmp_path / "two").rglob("solved-*.safetensors"))) == 3


def test_ranks_of_torchrun_do_their_share_under_python_O(run, tmp_path, influence):
    """The other tests of bytes connect forks as torchrun connects its ranks."""
    alone = influence("score", run, "--queries", "0:3", "--cache", "none")
    ranks = torchrun(2, "score", run, "--queries", "0:3", "--cache", "none", python=("-O",))
    assert ranks.returncode == 0, ranks.stderr
    assert ranks.stdout == alone.out


def test_ranks_divide_the_retrainings(tmp_path, influence):
    run = train(tmp_path / "run", every=12)
    flags = ("lds", "--subsets", "6", "--method", "random", "--by", "query")
    alone = influence("evaluate", run, *flags, "--cache", tmp_path / "one")
    assert alone.code == 0, alone.err
    ranks = run_ranks(2, "evaluate", run, *flags, "--cache", tmp_path / "many", place=tmp_path)
    assert ranks.code == 0, ranks.err
    rows = [line.rpartition(',"')[0] for line in ranks.out.splitlines()]
    assert rows == [line.rpartition(',"')[0] for line in alone.out.splitlines()]
    assert len(rows) > 10
    (log,) = (tmp_path / "many" / "evaluate").glob("*.jsonl")
    assert len(log.read_text().splitlines()) == 1 + 6


def test_ranks_without_a_cache_can_not_divide_retrainings(run, influence, second_of_two):
    result = influence("evaluate", run, "lds", "--cache", "none")
    assert (result.code, result.out) == (2, "")
    assert "[rank 1] error: --cache none stores no retrainings" in result.err


# ---------------------------------------------------------------- failures
def units(folder: Path) -> dict[Path, int]:
    """The units that are there, and when they were written."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.safetensors")
        if not path.name.startswith(".tmp")
    }


def test_a_killed_rank_costs_its_unit_and_a_rerun_computes_the_rest(tmp_path):
    slow = replaced(
        TEXTS,
        ("texts(0, 300, 140)", "texts(0, 1500, 1100)"),
        (LOSS, LOSS + "    time.sleep(0.03)\n"),
    ).replace(*SMALL, 1)
    run = build_run(
        tmp_path / "run",
        slow.replace(
            "def model", "print(os.environ.get('RANK'), os.getpid(), flush=True)\n\ndef model"
        ),
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "influence_cli",
        "cache",
        str(run),
    ]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(
            launch, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        until = time.monotonic() + 60
        while len(units(run / ".influence")) < 8 and time.monotonic() < until:
            time.sleep(0.01)
        pids = dict(
            line.split()
            for line in (tmp_path / "log").read_text().splitlines()
            if line[:2] in ("0 ", "1 ")
        )
        os.kill(int(pids["1"]), signal.SIGKILL)
        assert started.wait(60) != 0
    finally:
        started.kill()
    before = units(run / ".influence")
    assert 8 <= len(before) < 50
    again = run_ranks(2, "cache", run, place=tmp_path)
    assert again.code == 0, again.err
    after = units(run / ".influence")
    assert {path: after[path] for path in before} == before
    assert (
        len(after) == 2 + 2 * 24
    )  # two checkpoints: queries in one unit, 1,500 training examples in units of 64
    there = sum(1 for path in before if path.parent.parent.name == "train") * 64
    assert f"train: {3000 - there:,} gradients computed" in again.err


def test_an_error_of_another_rank_names_it(tmp_path):
    broken = replaced(
        TEXTS,
        (" * (batch[1] < 3)", " * (float('nan') if os.environ['RANK'] == '1' else 1.0)"),
        ("texts(0, 300", "texts(0, 9000"),
    )
    run = build_run(tmp_path / "run", broken.replace(*SMALL, 1))
    result = run_ranks(2, "cache", run, place=tmp_path)
    assert result.code != 0
    assert "[rank 1] error: the loss is not finite at checkpoints/" in result.err
    assert "\nerror: " not in f"\n{result.err}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_rank_that_waits_for_another_one_ends_at_a_signal(number, run, tmp_path):
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    environ = {
        **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)},
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    job = Job("cache", run, place=tmp_path, environment=environ)
    keys, until = store.num_keys(), time.monotonic() + 60
    while store.num_keys() < keys + 2 and time.monotonic() < until:  # its address in gloo
        time.sleep(0.02)
    time.sleep(0.3)
    job.kill(number)
    ended = job.wait(10)
    assert ended.code == 128 + number
    assert "Traceback" not in ended.err


class Other(Ranks):
    """The first of two ranks, where the other takes every job; its units, those of `source`, are seen some seconds `after`, or never."""

    def __init__(self, source: Path | None, cache: Path, after: float) -> None:
        super().__init__(Place(0, 2, 0, 2))
        self.source, self.cache, self.after = source, cache, after

    def deal(self, number):
        return iter(())

    def wait(self):
        if self.source is not None:
            threading.Timer(
                self.after, shutil.copytree, (self.source, self.cache), {"dirs_exist_ok": True}
            ).start()


def test_units_that_are_seen_late_are_waited_for(run, tmp_path, influence, monkeypatch):
    assert influence("cache", run, "--cache", tmp_path / "one").code == 0
    monkeypatch.setattr(
        opening, "open_ranks", lambda place: Other(tmp_path / "one", tmp_path / "many", 0.3)
    )
    result = influence("cache", run, "--cache", tmp_path / "many")
    assert result.code == 0, result.err
    assert "query: 6 gradients computed, 0 were stored already" in result.err
    assert len(units(tmp_path / "many")) == len(
        units(tmp_path / "one")
    )  # they are there when it returns


def test_units_that_are_never_seen_are_reported(run, tmp_path, influence, monkeypatch):
    monkeypatch.setattr(opening, "open_ranks", lambda place: Other(None, tmp_path / "many", 0))
    monkeypatch.setattr(fill, "VISIBLE_WITHIN", 0.2)
    result = influence("cache", run, "--cache", tmp_path / "many")
    refused(
        result,
        1,
        "(rank 0) does not see 2 units that other ranks wrote 0.2 s ago",
        "the first: ",
        "all machines share",
    )


@pytest.mark.parametrize(
    ("name", "there", "local", "expected"),
    [("auto", 4, 2, 2), ("cuda", 4, 3, 3), ("cuda", 1, 3, 0), ("cuda:1", 4, 3, 1)],
)
def test_each_rank_has_a_device_of_its_own(name, there, local, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert devices.find_device(name, Place(local, 4, local, 4)) == torch.device("cuda", expected)


def test_more_ranks_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageProblem, match="4 ranks on this machine, which has 2 CUDA devices"):
        devices.find_device("auto", Place(2, 4, 2, 4))


# ---------------------------------------------------------------- what one rank does alone
def test_the_way_back_is_gone_by_one_rank_and_gradients_are_shared(tmp_path, influence):
    run = train(tmp_path / "run")
    alone = influence("score", run, "--method", "dve", "--cache", tmp_path / "one")
    assert alone.code == 0, alone.err
    flags = ("--method", "dve", "--cache", tmp_path / "many")
    ranks = run_ranks(2, "score", run, *flags, place=tmp_path)
    compare_ranks(ranks, alone)
    assert "note: all 2 ranks compute gradients for dve; rank 0 computes scores" in ranks.err
    assert "error" not in ranks.err


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "command",
    [["trace"], ["inspect"], ["check"], ["merge", "a.csv"]],
    ids=lambda c: c[0],
)
def test_what_is_not_shared_is_refused(command, run, influence, second_of_two):
    arguments = [run if word == "RUN" else word for word in command]
    result = influence(*arguments, *([run] if len(command) == 1 else []))
    assert result.code == 2
    assert result.err.startswith(
        f"[rank 1] error: influence {command[0]} runs as one process, WORLD_SIZE is 2\n"
    )


def test_shards_and_ranks_are_not_both_given(run, influence, monkeypatch, second_of_two):
    monkeypatch.setenv("RANK", "0")
    refused(influence("score", run, "--shard", "1/2"), 2, "--shard 1/2 in one of 2 ranks")


def test_ranks_that_can_not_meet_are_told_of_torchrun(run, influence, monkeypatch, second_of_two):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused(influence("score", run), 2, "the ranks can't meet", "MASTER_ADDR", "torchrun")


def test_ranks_that_were_started_again_are_refused(run, influence, monkeypatch, second_of_two):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    refused(influence("score", run), 2, "torchrun restarted the ranks", "leave out --max-restarts")


def test_one_rank_is_a_process_like_any_other(run, influence, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert influence("self", run, "--shard", "1/2").code == 0
    assert not torch.distributed.is_initialized()
