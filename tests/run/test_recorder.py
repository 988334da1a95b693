"""A recorded training: read back as it went, killed and gone on with as if it had not been, and refused where it can't be told truly."""

import errno
import json
import os
import signal
import socket

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from faults.forks import ForkedCommand
from influence_cli import TrajectoryRecorder
from influence_cli.errors import CheckpointError, TrajectoryError
from influence_cli.run import checkpoints
from influence_cli.run.trajectory import Trajectory
from influence_cli.run.trajectory_reader import read_trajectory
from influence_cli.storage.atomic import LineLog
from tests.cases import TiedForm

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(
        parameters, lr=0.01, amsgrad=True, weight_decay=0.1
    ),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def examples() -> torch.Tensor:
    return torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batch(step: int) -> torch.Tensor:
    return torch.randperm(20, generator=torch.Generator().manual_seed(step))[:4]


def train(
    folder,
    steps: int,
    make=OPTIMIZERS["sgd"],
    every: int = 3,
    until: int | None = None,
    model: nn.Module | None = None,
    **options,
):
    """A training of `steps` steps that goes on from what is in the folder; `until`: an exception in place of that step."""
    model = model or net()
    optimizer = make(model.parameters())
    start = TrajectoryRecorder.restore(folder, model, optimizer)
    with TrajectoryRecorder(folder, model, optimizer, every, start=start, **options) as recorder:
        for step in range(start, steps):
            optimizer.zero_grad()
            model(examples()[batch(step)]).square().mean().backward()
            recorder.step(batch(step))
            if step == until:
                raise InterruptedError
            optimizer.step()
    return model


def one_step(folder, **step):
    model = net()
    with TrajectoryRecorder(folder, model, torch.optim.SGD(model.parameters(), lr=0.1)) as recorder:
        recorder.step(**{"indices": [0, 1]} | step)


def recording(
    folder, make=OPTIMIZERS["sgd"], model: nn.Module | None = None, **options
) -> TrajectoryRecorder:
    model = model or net()
    return TrajectoryRecorder(folder, model, make(model.parameters()), **options)


def read(folder) -> Trajectory:
    return read_trajectory(folder / "trajectory.jsonl", 20)


def header(folder) -> dict:
    return json.loads((folder / "trajectory.jsonl").read_text().splitlines()[0])


def contents(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------- what is written
def test_every_step_is_read_back(tmp_path):
    train(tmp_path, 5)
    found = read(tmp_path)
    assert [line.examples.tolist() for line in found.lines] == [
        batch(step).tolist() for step in range(5)
    ]
    assert (found.steps, found.reduction, found.optimizer, found.rates(4)) == (
        5,
        "mean",
        "sgd",
        (0.1,),
    )
    assert found.weights(0).tolist() == [1 / 4] * 4
    assert found.lines[0].clip == 1 and "clip" not in (tmp_path / "trajectory.jsonl").read_text()


def test_checkpoints_hold_the_parameters_after_their_step(tmp_path):
    model = train(tmp_path, 5, every=2)
    found = checkpoints.find_checkpoints(tmp_path)
    assert [checkpoint.step for checkpoint in found] == [0, 2, 4, 5]
    for checkpoint, steps in zip(found, (0, 2, 4, 5), strict=True):
        expected = train(tmp_path / str(steps), steps) if steps < 5 else model
        assert all(
            torch.equal(value, expected.state_dict()[name])
            for name, value in load_file(checkpoint.path).items()
        )


def test_checkpoints_say_their_step_and_learning_rate(tmp_path):
    train(tmp_path, 2)
    with safe_open(tmp_path / "checkpoints/step-000002.safetensors", "pt") as file:
        own = {name: text for name, text in file.metadata().items() if "influence-" not in name}
        assert own == {"step": "2", "learning_rate": "0.1"}


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        torch.tensor,
        np.array,
        lambda ids: [np.int32(i) for i in ids],
        lambda ids: list(torch.tensor(ids)),
    ],
)
def test_indices_come_in_any_container(kind, tmp_path):
    one_step(tmp_path, indices=kind([3, 1, 3]))
    assert read(tmp_path).lines[0].examples.tolist() == [3, 1, 3]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_weights_are_read_back(kind, tmp_path):
    one_step(tmp_path, weights=kind([0.25, 0.75]))
    assert read(tmp_path).weights(0).tolist() == [0.25, 0.75]


@pytest.mark.parametrize("clip", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_clip_and_seed_are_read_back(clip, tmp_path):
    one_step(tmp_path, clip=clip, seed=7)
    assert (read(tmp_path).lines[0].clip, read(tmp_path).lines[0].seed) == (0.3, 7)


def test_a_schedule_is_read_from_the_optimizer_at_each_step(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(1.0, dtype=torch.float64))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with TrajectoryRecorder(tmp_path, model, optimizer) as recorder:
        for _ in range(3):
            recorder.step([0])
            optimizer.step()
            schedule.step()
    assert [read(tmp_path).rates(step) for step in range(3)] == [(1.0,), (0.5,), (0.25,)]


def test_the_header_has_torchs_names_and_the_kernel_that_was_chosen(tmp_path):
    train(
        tmp_path,
        1,
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), foreach=True),
        save_optimizer=True,
    )
    options = header(tmp_path)["optimizer"]
    assert (
        options.items()
        >= {
            "name": "adamw",
            "betas": [0.8, 0.9],
            "weight_decay": 0.01,
            "eps": 1e-8,
            "amsgrad": False,
        }.items()
    )
    assert options["foreach"] is True
    assert not options.keys() & {"lr", "params", "fused", "capturable", "differentiable"}
    assert "groups" not in header(tmp_path)


def test_a_resumed_training_may_use_another_kernel(tmp_path):
    train(tmp_path, 3, lambda p: torch.optim.AdamW(p, lr=0.1), save_optimizer=True)
    train(tmp_path, 5, lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True), save_optimizer=True)
    assert read_trajectory(tmp_path / "trajectory.jsonl", None).steps == 5


def test_groups_have_names_rates_and_what_differs(tmp_path):
    model = net()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "lr": 0.5, "weight_decay": 0.1},
    ]
    with TrajectoryRecorder(tmp_path, model, torch.optim.SGD(groups, lr=0.1)) as recorder:
        recorder.step([0])
    assert header(tmp_path)["groups"] == [
        {"params": ["0.weight", "0.bias"]},
        {"params": ["2.weight", "2.bias"], "weight_decay": 0.1},
    ]
    assert read(tmp_path).rates(0) == (0.1, 0.5)
    assert read(tmp_path).groups[1].options["weight_decay"] == 0.1


def test_an_optimizer_of_a_part_names_its_part(tmp_path):
    model = net()
    with TrajectoryRecorder(
        tmp_path, model, torch.optim.SGD(model[2].parameters(), lr=0.1)
    ) as recorder:
        recorder.step([0])
    assert read(tmp_path).group_of(("2.bias",)) == 0
    assert read(tmp_path).group_of(("0.bias",)) is None
    assert read(tmp_path).rates(0) == (0.1,)


def test_frozen_parameters_are_in_checkpoints_and_need_no_group(tmp_path):
    model = net()
    model[0].requires_grad_(False)
    with TrajectoryRecorder(
        tmp_path, model, torch.optim.SGD(model[2].parameters(), lr=0.1)
    ) as recorder:
        recorder.step([0])
    assert "groups" not in header(tmp_path)
    assert (
        load_file(tmp_path / "checkpoints/step-000001.safetensors").keys()
        == model.state_dict().keys()
    )


class Compiled(nn.Module):
    """As torch.compile wraps a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, Compiled, torch.compile, lambda model: Compiled(nn.DataParallel(model))],
)
def test_wrappers_leave_no_trace_in_names(wrap, tmp_path):
    model = net()
    inner = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(
        [{"params": [parameter]} for parameter in wrapped.parameters()], lr=0.1
    )
    with TrajectoryRecorder(tmp_path, wrapped, optimizer) as recorder:
        recorder.step([0])
    assert [group["params"] for group in header(tmp_path)["groups"]] == [[name] for name in inner]
    assert load_file(tmp_path / "checkpoints/step-000001.safetensors").keys() == inner.keys()
    nn.init.zeros_(model[0].weight)
    assert TrajectoryRecorder.restore(tmp_path, wrapped, optimizer) == 1
    assert torch.equal(model[0].weight, inner["0.weight"])


def test_tied_parameters_are_saved_once_and_restored_tied(tmp_path):
    model, other = TiedForm(), TiedForm()
    with recording(tmp_path, model=model) as recorder:
        recorder.step([0])
    assert "head.weight" not in load_file(tmp_path / "checkpoints/step-000001.safetensors")
    TrajectoryRecorder.restore(tmp_path, other, OPTIMIZERS["sgd"](other.parameters()))
    assert (
        torch.equal(other.head.weight, model.head.weight)
        and other.head.weight is other.embedding.weight
    )


MIXED = {
    "buffers": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)),
    "channels last": lambda: nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last),
    "bfloat16": lambda: nn.Linear(3, 2).bfloat16(),
    "empty": lambda: nn.Linear(0, 2),
}


@pytest.mark.parametrize("kind", MIXED)
def test_any_layout_of_tensors_is_saved_as_it_is(kind, tmp_path):
    model = MIXED[kind]()
    with recording(tmp_path, model=model):
        pass
    saved = load_file(tmp_path / "checkpoints/step-000000.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(
        torch.equal(saved[name], value) and saved[name].dtype == value.dtype
        for name, value in model.state_dict().items()
    )


def test_a_distributed_model_leaves_no_trace_in_names(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        train(tmp_path / "run", 2, model=nn.parallel.DistributedDataParallel(net()))
    finally:
        torch.distributed.destroy_process_group()
    assert (
        load_file(tmp_path / "run/checkpoints/step-000002.safetensors").keys()
        == net().state_dict().keys()
    )


def test_the_lines_retell_the_training(tmp_path):
    """Plain SGD in two groups, clipped, accumulated over uneven micro-batches, with a schedule; then again from the lines alone."""
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}], lr=0.1
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with TrajectoryRecorder(tmp_path, model, optimizer) as now:
        for step in range(5):
            optimizer.zero_grad()
            for ids in batch(step).split(3):
                (model(examples()[ids]).square().sum() / 4).backward()
                now.add(ids, [1 / 4] * len(ids))
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            now.step(clip=(0.5 / (norm + 1e-6)).clamp(max=1))
            optimizer.step()
            schedule.step()
    found, again = read(tmp_path), at(tmp_path, 0)
    assert any(line.clip < 1 for line in found.lines)
    for step, line in enumerate(found.lines):
        losses = again(examples()[line.examples]).square().sum(1)
        gradients = torch.autograd.grad(
            losses @ torch.tensor(found.weights(step)) * line.clip, list(again.parameters())
        )
        with torch.no_grad():
            for (name, parameter), gradient in zip(
                again.named_parameters(), gradients, strict=True
            ):
                parameter -= found.rates(step)[found.group_of((name,))] * gradient
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- accumulation
def test_micro_batches_are_one_step(tmp_path):
    with recording(tmp_path) as recorder:
        for ids in ([1, 2], [3, 4], [5, 6], [7, 8]):
            recorder.add(ids)
            if ids[0] in (3, 7):
                recorder.step()
    assert [line.examples.tolist() for line in read(tmp_path).lines] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert read(tmp_path).weights(0).tolist() == [1 / 4] * 4


def test_micro_batches_of_different_sizes_have_their_weights(tmp_path):
    with recording(tmp_path) as recorder:
        recorder.add([1, 2], [1 / 4] * 2)
        recorder.add(torch.tensor([3]), torch.tensor([1 / 2]))
        recorder.step(clip=0.5)
    assert read(tmp_path).weights(0).tolist() == [1 / 4, 1 / 4, 1 / 2]


def test_a_sum_takes_micro_batches_of_any_size(tmp_path):
    with recording(tmp_path, reduction="sum") as recorder:
        recorder.add([1, 2])
        recorder.add([3])
        recorder.step()
    assert read(tmp_path).weights(0).tolist() == [1, 1, 1]


ENTRIES = {
    "sizes": ([lambda r: r.add([1, 2]), lambda r: r.add([3])], "micro-batches of 2 and 1 examples"),
    "some weights": (
        [lambda r: r.add([1], [1.0]), lambda r: r.add([3])],
        "with weights and without",
    ),
    "both": (
        [lambda r: r.add([1]), lambda r: r.step([2])],
        "step() got its own indices, add() before it 1",
    ),
    "neither": ([lambda r: r.step()], "step() got no indices, add() before it none"),
    "weights alone": (
        [lambda r: r.add([1]), lambda r: r.step(weights=[1.0])],
        "expected: step(indices, weights)",
    ),
    "negative id": ([lambda r: r.step([3, -1])], "-1 is no example id"),
    "floats": ([lambda r: r.step(torch.tensor([1.0, 2.0]))], "indices: not whole numbers"),
    "booleans": ([lambda r: r.step([True, False])], "indices: not whole numbers"),
    "a mask": ([lambda r: r.step(torch.tensor([True, False]))], "indices: not whole numbers"),
    "two axes": ([lambda r: r.step(torch.tensor([[1, 2]]))], "indices: not whole numbers"),
    "one number": ([lambda r: r.step(3)], "indices: not whole numbers"),
    "0-dim": ([lambda r: r.step(torch.tensor(3))], "indices: not whole numbers"),
    "short weights": ([lambda r: r.step([1, 2], [1.0])], "expected: 2 finite numbers from 0"),
    "negative weight": ([lambda r: r.step([1, 2], [1.0, -1.0])], "weights do not fit"),
    "nan weight": (
        [lambda r: r.step([1, 2], torch.tensor([float("nan"), 1.0]))],
        "weights do not fit",
    ),
    "a weight of 400 digits": ([lambda r: r.step([1], [10**400])], "weights do not fit"),
    "a clip of 400 digits": ([lambda r: r.step([1], clip=10**400)], "clip is 1000"),
    "nan clip": ([lambda r: r.step([1], clip=float("nan"))], "clip is nan"),
    "negative clip": ([lambda r: r.step([1], clip=torch.tensor(-0.5))], "clip is tensor(-0.5000)"),
    "clip of two": ([lambda r: r.step([1], clip=torch.ones(2))], "clip is tensor([1., 1.])"),
    "seed": ([lambda r: r.step([1], seed=1.5)], "seed: not whole numbers"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries_that_say_nothing_true_are_refused(case, tmp_path):
    calls, says = ENTRIES[case]
    with recording(tmp_path) as recorder:
        for call in calls[:-1]:
            call(recorder)
        with pytest.raises(TrajectoryError) as raised:
            calls[-1](recorder)
    assert says in str(raised.value)
    assert len((tmp_path / "trajectory.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"checkpoint_every": 0}, {"start": -1}])
def test_options_that_mean_nothing_are_refused(options, tmp_path):
    with pytest.raises(TrajectoryError, match=next(iter(options))):
        recording(tmp_path, **options)


def test_a_step_outside_the_block_is_refused(tmp_path):
    with pytest.raises(TrajectoryError, match="not recording"):
        recording(tmp_path).step([1])


def test_a_learning_rate_that_is_no_number_is_refused(tmp_path):
    with recording(tmp_path) as recorder:
        recorder.optimizer.param_groups[0]["lr"] = float("nan")
        with pytest.raises(TrajectoryError, match="the learning rate is nan"):
            recorder.step([1])
        recorder.optimizer.param_groups[0]["lr"] = 0.1


def test_parameters_that_are_not_the_models_are_refused(tmp_path):
    foreign = TrajectoryRecorder(tmp_path, net(), torch.optim.SGD(net().parameters(), lr=0.1))
    with (
        pytest.raises(TrajectoryError, match="holds 4 parameters that are not the model's"),
        foreign,
    ):
        pass


def test_a_group_that_is_added_in_training_is_refused(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with (
        pytest.raises(TrajectoryError, match="has 2 parameter groups, and had 1"),
        TrajectoryRecorder(tmp_path, model, optimizer) as recorder,
    ):
        optimizer.add_param_group({"params": list(model[2].parameters())})
        recorder.step([1])


def test_a_momentum_that_is_scheduled_is_refused(tmp_path):
    with (
        pytest.raises(TrajectoryError, match=r"group 0\.momentum: 0\.9 before, 0\.8 now"),
        recording(tmp_path, OPTIMIZERS["momentum"]) as recorder,
    ):
        recorder.step([1])
        recorder.optimizer.param_groups[0]["momentum"] = 0.8
    assert checkpoints.find_checkpoints(tmp_path)[-1].step == 1


def test_a_rank_other_than_0_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    with pytest.raises(TrajectoryError, match="rank 3 records too"):
        recording(tmp_path)


# ---------------------------------------------------------------- left, killed, gone on with
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_training_is_the_uninterrupted_one(name, tmp_path):
    whole = train(tmp_path / "whole", 10, OPTIMIZERS[name], save_optimizer=name != "sgd")
    with pytest.raises(InterruptedError):
        train(tmp_path / "parts", 10, OPTIMIZERS[name], until=8, save_optimizer=name != "sgd")
    parts = train(tmp_path / "parts", 10, OPTIMIZERS[name], save_optimizer=name != "sgd")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True)
    )
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


class Counting(torch.optim.Optimizer):
    """Keeps a whole number and a float of Python."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure=None):
        for parameter in (
            parameter for group in self.param_groups for parameter in group["params"]
        ):
            state = self.state[parameter]
            state["count"], state["sum"], state["none"] = (
                state.get("count", 0) + 1,
                state.get("sum", 0.0) + 0.1,
                None,
            )


def test_pythons_numbers_in_an_optimizers_state_come_back_as_they_were(tmp_path):
    model = train(tmp_path, 3, Counting, save_optimizer=True)
    optimizer = Counting(model.parameters())
    assert TrajectoryRecorder.restore(tmp_path, model, optimizer) == 3
    state = optimizer.state[model[0].weight]
    assert state == {"count": 3, "sum": 0.1 + 0.1 + 0.1} and type(state["count"]) is int


def test_every_changed_byte_of_a_recorded_line_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "trajectory.jsonl"
    with recording(tmp_path) as recorder:
        recorder.step([1, 2], weights=[0.5, 0.25], clip=0.5, seed=3)
        recorder.step([3])
    content, steps = path.read_bytes(), read_trajectory(path, None).lines
    refusals = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            changed = read_trajectory(path, None)
        except TrajectoryError:
            refusals += 1
            continue
        assert changed.notes or repr(changed.lines) == repr(steps), at
    assert refusals > 0.9 * len(content)


def test_an_edited_line_says_how_to_keep_it(tmp_path):
    path = tmp_path / "trajectory.jsonl"
    with recording(tmp_path) as recorder:
        recorder.step([1, 2])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["lr"] = 7.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TrajectoryError, match="line 1: it differs") as raised:
        read_trajectory(path, None)
    assert "remove its key crc32" in str(raised.value)
    del lines[0]["crc32"], lines[1]["crc32"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_trajectory(path, None).lines[0].lr == 7.0


def test_an_exception_saves_nothing_and_keeps_the_lines(tmp_path):
    with pytest.raises(InterruptedError):
        train(tmp_path, 10, until=4)
    assert [checkpoint.step for checkpoint in checkpoints.find_checkpoints(tmp_path)] == [0, 3]
    assert read(tmp_path).steps == 5


@pytest.mark.parametrize("at", [1, 7])
def test_a_killed_training_goes_on_to_the_same_bytes(at, tmp_path):
    """Killed by SIGKILL before its second checkpoint and after; the rest of a line is left in the file."""
    step = TrajectoryRecorder.step

    def record_or_die(self, indices):
        step(self, indices)
        if self.steps > at:
            self._log.append(b'{"step":')
            os.kill(os.getpid(), signal.SIGKILL)

    def train_parts():
        TrajectoryRecorder.step = record_or_die  # type: ignore[method-assign]
        train(tmp_path / "parts", 10, OPTIMIZERS["adam"], save_optimizer=True)

    assert ForkedCommand([], tmp_path, main=train_parts).wait().code == -signal.SIGKILL
    assert read(tmp_path / "parts").steps == at + 1
    train(tmp_path / "parts", 10, OPTIMIZERS["adam"], save_optimizer=True)
    train(tmp_path / "whole", 10, OPTIMIZERS["adam"], save_optimizer=True)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_the_temporary_file_of_a_training_killed_at_its_start_is_removed(tmp_path):
    name = f".tmp-{socket.gethostname()}-{'0' * 16}-trajectory.jsonl"
    (tmp_path / name).write_text("{")
    train(tmp_path, 2)
    assert not (tmp_path / name).exists()


def test_going_on_after_the_last_step_changes_nothing(tmp_path):
    train(tmp_path, 4)
    before = contents(tmp_path)
    train(tmp_path, 4)
    assert contents(tmp_path) == before


def test_a_resume_without_its_checkpoint_saves_it_where_one_is_due(tmp_path):
    model = train(tmp_path, 6)
    (tmp_path / "checkpoints/step-000006.safetensors").unlink()
    with recording(tmp_path, model=model, checkpoint_every=3, start=6) as recorder:
        recorder.step([1])
    assert [checkpoint.step for checkpoint in checkpoints.find_checkpoints(tmp_path)] == [
        0,
        3,
        6,
        7,
    ]


def test_restoring_an_empty_folder_is_a_beginning(tmp_path):
    model = net()
    assert (
        TrajectoryRecorder.restore(tmp_path / "new", model, torch.optim.Adam(model.parameters()))
        == 0
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_an_optimizer_whose_state_was_not_saved_is_refused(name, tmp_path):
    model = train(tmp_path, 4, OPTIMIZERS[name])
    with pytest.raises(
        TrajectoryError, match=r"no optimizer state beside it.*\n.*\n.*save_optimizer=True"
    ):
        TrajectoryRecorder.restore(tmp_path, model, OPTIMIZERS[name](model.parameters()))


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    model = train(tmp_path, 4, OPTIMIZERS["adam"], save_optimizer=True)
    with pytest.raises(TrajectoryError, match="is of another optimizer: adam"):
        TrajectoryRecorder.restore(tmp_path, model, OPTIMIZERS["adamw"](model.parameters()))


def test_state_of_a_training_that_was_given_up_goes_with_its_checkpoint(tmp_path):
    train(tmp_path, 3, save_optimizer=True)
    (tmp_path / "checkpoints/step-000003.safetensors").unlink()
    train(tmp_path, 3)
    assert not (tmp_path / "optimizer/step-000003.safetensors").exists()


def test_another_model_is_not_restored(tmp_path):
    train(tmp_path, 2)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        TrajectoryRecorder.restore(
            tmp_path, nn.Linear(3, 2), torch.optim.SGD(net().parameters(), lr=0.1)
        )


# ---------------------------------------------------------------- another training in the folder
def trained(folder, steps: int = 7):
    """After step 7, with checkpoints of the steps 0, 3, 6, 7."""
    return train(folder, steps)


def at(folder, step: int) -> nn.Module:
    model = net()
    model.load_state_dict(load_file(folder / f"checkpoints/step-{step:06d}.safetensors"))
    return model


def without(folder, *steps: int) -> None:
    for step in steps:
        (folder / f"checkpoints/step-{step:06d}.safetensors").unlink()


def test_a_second_training_in_the_folder_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(TrajectoryError) as raised, recording(tmp_path):
        pass
    for says in (
        "records a training already, 7 steps",
        "step-000007",
        "TrajectoryRecorder.restore(",
        "start=start",
        "delete",
    ):
        assert says in str(raised.value)


def test_a_second_training_from_other_parameters_is_refused_before_its_second_checkpoint_too(
    tmp_path,
):
    train(tmp_path, 2)
    without(tmp_path, 2)
    other = net()
    nn.init.ones_(other[0].weight)
    with (
        pytest.raises(TrajectoryError, match="records a training already"),
        recording(tmp_path, model=other),
    ):
        pass


def test_checkpoints_of_later_steps_are_refused_by_name(tmp_path):
    trained(tmp_path)
    with (
        pytest.raises(
            TrajectoryError, match=r"after step 3, .*step-000006.*step-000007.*\n  delete them"
        ),
        recording(tmp_path, model=at(tmp_path, 3), start=3),
    ):
        pass


def test_lines_from_the_start_on_are_dropped(tmp_path):
    trained(tmp_path)
    without(tmp_path, 6, 7)
    with recording(tmp_path, model=at(tmp_path, 3), start=3) as recorder:
        recorder.step([19])
    assert [line.examples.tolist() for line in read(tmp_path).lines] == [
        *(batch(step).tolist() for step in range(3)),
        [19],
    ]


def test_lines_that_lack_before_the_start_are_refused(tmp_path):
    model = trained(tmp_path)
    with (
        pytest.raises(TrajectoryError, match="lacks the steps 7 to 8, and start is 9"),
        recording(tmp_path, model=model, start=9),
    ):
        pass
    with (
        pytest.raises(TrajectoryError, match="lacks the steps 0 to 8"),
        recording(tmp_path / "new", model=model, start=9),
    ):
        pass


def test_another_header_is_refused_by_its_difference(tmp_path):
    model = trained(tmp_path)
    with (
        pytest.raises(
            TrajectoryError,
            match=r"reduction: mean before, sum now\n  optimizer.momentum: 0 before, 0.9 now",
        ),
        recording(tmp_path, OPTIMIZERS["momentum"], model, start=7, reduction="sum"),
    ):
        pass


def test_a_start_whose_checkpoint_holds_another_model_is_refused(tmp_path):
    trained(tmp_path)
    with (
        pytest.raises(TrajectoryError, match=r"the model is not that of checkpoints/step-000007"),
        recording(tmp_path, start=7),
    ):
        pass


# ---------------------------------------------------------------- the disk
@pytest.mark.parametrize(
    ("owner", "function", "names"),
    [(LineLog, "append", "trajectory.jsonl"), (os, "replace", "step-000001.safetensors")],
)
def test_a_full_disk_is_reported_with_the_file(owner, function, names, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(TrajectoryError, match=rf"{names} can't be written: the disk is full"),
        recording(tmp_path, checkpoint_every=1) as now,
    ):
        now.step([1])
        monkeypatch.setattr(owner, function, full)
        now.step([2])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name] == []


def test_a_line_that_goes_out_in_pieces_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, text: write(file, text[:5]))
    one_step(tmp_path)
    assert read(tmp_path).steps == 1


def test_a_folder_that_can_not_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrajectoryError, match=r"file/run/trajectory.jsonl can't be written"),
        recording(tmp_path / "file" / "run"),
    ):
        pass
