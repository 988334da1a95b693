"""A recorded training with dropout: its replay draws the same masks, and unroll is its derivative."""

import json
import warnings

import numpy as np
import pytest
import torch

from influence_cli import TrajectoryRecorder
from influence_cli.errors import TrajectoryError
from influence_cli.gradients.batches import to
from influence_cli.run.replay import DroppedExample, OmittedExamples, Replay
from influence_cli.run.run import open_run
from tests.masked_runs import DEFINITION, QUERIES, STEPS, train_with_dropout
from tests.training import definition_of

EVAL_PART = DEFINITION.replace(
    "return Net().to(torch.DTYPE)",
    "net = Net().to(torch.DTYPE); net.train = lambda mode=True: (torch.nn.Module.train(net, mode), "
    "net.attention.eval(), net)[-1]; return net",
)


BATCH_NORM = DEFINITION.replace(
    "self.drop, self.head = nn.Dropout(0.2)", "self.drop, self.head = nn.BatchNorm1d(6)"
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def opened(folder, precision=None):
    run = open_run(folder, precision=precision)
    replay = Replay(run, lambda ids: to(run.train.batch(ids), torch.device("cpu"), precision))
    replay.start_from(run.checkpoints[0])
    return run, replay


def read_lines(folder):
    return [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [{}, {"micro_batches": 1}], ids=["accumulated", "one"])
def test_a_replay_with_dropout_reproduces_each_checkpoint_bit_for_bit(options, tmp_path):
    trained = train_with_dropout(tmp_path, **options)
    run, replay = opened(tmp_path)
    for checkpoint in run.checkpoints[1:]:
        replay.advance(checkpoint.step)
        assert replay.relative_distance(checkpoint) == 0
    values = dict(zip(replay.names, replay.save_state().values, strict=False))
    assert all(torch.equal(values[name], p) for name, p in trained.named_parameters())


def test_recording_does_not_depend_on_the_generators_of_the_training(tmp_path):
    trained = train_with_dropout(tmp_path)
    again = train_with_dropout(tmp_path, record=False)
    assert all(map(torch.equal, trained.parameters(), again.parameters()))


def test_a_float64_replay_draws_the_masks_of_float32(tmp_path):
    train_with_dropout(tmp_path)
    run, replay = opened(tmp_path, precision=torch.float64)
    replay.advance(STEPS)
    assert 0 < replay.relative_distance(run.checkpoints[-1]) < 1e-5


def test_a_part_in_eval_mode_draws_no_masks_in_the_replay(tmp_path):
    train_with_dropout(tmp_path, text=EVAL_PART)
    assert all(line["eval"] == ["attention"] for line in read_lines(tmp_path)[1:])
    (tmp_path / "definition.py").write_text(DEFINITION.replace("DTYPE", "float32"))
    run, replay = opened(tmp_path)
    replay.advance(STEPS)
    assert replay.relative_distance(run.checkpoints[-1]) == 0


def test_the_model_is_in_eval_mode_after_a_step(tmp_path):
    train_with_dropout(tmp_path)
    run, replay = opened(tmp_path)
    before = torch.random.get_rng_state()
    replay.advance(2)
    assert not any(module.training for module in run.model.module.modules())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("drop", ["a step", "all steps"])
def test_a_removed_example_stays_in_the_forward_pass_with_weight_0(drop, tmp_path):
    train_with_dropout(tmp_path, "float64")
    lines = read_lines(tmp_path)[1:]
    example = lines[2]["examples"][1]
    steps = [2] if drop == "a step" else range(STEPS)
    trained = train_with_dropout(
        tmp_path, "float64", record=False, changes={(step, example): 0.0 for step in steps}
    )
    _, replay = opened(tmp_path)
    removed = (
        DroppedExample(2, example) if drop == "a step" else OmittedExamples(np.array([example]))
    )
    replay.advance(STEPS, removed, max_norm=0.5)
    values = dict(zip(replay.names, replay.save_state().values, strict=False))
    for name, parameter in trained.named_parameters():  # clip_grad_norm_ adds 1e-6 to the norm
        torch.testing.assert_close(values[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_a_batch_in_another_order_differs_by_rounding_alone(tmp_path):
    train_with_dropout(tmp_path)
    run, replay = opened(tmp_path)
    replay.advance(STEPS, reverse=True)
    assert 0 < replay.relative_distance(run.checkpoints[-1]) < 1e-4


def query_losses(folder, model):
    space = definition_of(folder)
    data = space["query_data"]()
    batch = [torch.stack([data[i][k] for i in range(QUERIES)]) for k in (0, 1)]
    with torch.no_grad():
        return space["loss"](model, batch)


@pytest.mark.parametrize("text", [DEFINITION, BATCH_NORM], ids=["dropout", "batch norm"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_unroll_is_the_derivative_of_training_in_train_mode(
    micro_batches, text, tmp_path, influence
):
    """Central differences of real trainings, with an example's weight in one step changed. The
    queries see BatchNorm's running statistics, which a change moves, too."""
    options = {"dtype": "float64", "micro_batches": micro_batches, "text": text}
    train_with_dropout(tmp_path, **options)
    lines = read_lines(tmp_path)[1:]
    done = influence(
        "score", tmp_path, "--method", "unroll", "--replay", "--by", "step", "--top", "all", "--format", "jsonl", "--cache", "none"
    )  # fmt: skip
    assert "reproduced 3 saved checkpoints bit for bit" in done.err
    scores = {}
    for line in done.out.splitlines():
        row = json.loads(line)
        if "query" in row:
            scores[row["query"], row["train"], int(row["step"])] = row["score"]
    h = 1e-4
    for step in (1, 6, STEPS - 1):
        example = lines[step]["examples"][2]
        above, below = (
            query_losses(
                tmp_path,
                train_with_dropout(
                    tmp_path, record=False, changes={(step, example): factor}, **options
                ),
            )
            for factor in (1 + h, 1 - h)
        )
        derivatives = (above - below) / (2 * h)
        own = torch.tensor([scores[q, example, step] for q in range(QUERIES)])
        torch.testing.assert_close(own.double(), -derivatives, rtol=1e-3, atol=1e-8)


def dropout_training(folder, steps):
    """Trains up to a step, from the newest checkpoint on."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    start = TrajectoryRecorder.restore(folder, model, optimizer)
    torch.manual_seed(start)  # the state of torch's own generator does not matter
    with TrajectoryRecorder(folder, model, optimizer, 2, start=start, seed=5) as recorder:
        for step in range(start, steps):
            optimizer.zero_grad()
            model(torch.ones(3, 2) * step).square().mean().backward()
            recorder.step([0, 1, 2])
            optimizer.step()
    return model


def test_a_resumed_training_draws_the_masks_of_the_uninterrupted_one(tmp_path):
    complete = dropout_training(tmp_path / "a", 7)
    dropout_training(tmp_path / "b", 4)
    resumed = dropout_training(tmp_path / "b", 7)
    assert all(map(torch.equal, complete.parameters(), resumed.parameters()))
    assert read_lines(tmp_path / "a") == read_lines(tmp_path / "b")


# ---------------------------------------------------------------- refusals
def recorder_of(folder, seed=0):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    return model, TrajectoryRecorder(
        folder, model, torch.optim.SGD(model.parameters(), 0.1), seed=seed
    )


def test_two_forward_passes_for_one_micro_batch_are_refused(tmp_path):
    model, recorder = recorder_of(tmp_path)
    with (
        pytest.raises(TrajectoryError, match="2 forward passes in train mode, and 1 micro-batches"),
        recorder,
    ):
        model(torch.ones(1, 2))
        model(torch.ones(1, 2))
        recorder.step([0])


def test_forward_passes_in_eval_mode_or_without_autograd_do_not_count(tmp_path):
    model, recorder = recorder_of(tmp_path)
    with recorder:
        with torch.no_grad():
            model(torch.ones(1, 2))
        model.eval()(torch.ones(1, 2))
        model.train()(torch.ones(1, 2))
        recorder.step([0])
    assert len(read_lines(tmp_path)[1]["seeds"]) == 1


def test_dropout_without_a_seed_is_a_warning_once(tmp_path):
    model, recorder = recorder_of(tmp_path, seed=None)
    with pytest.warns(UserWarning, match=r"TrajectoryRecorder\(..., seed=0\)") as seen, recorder:
        for _ in range(3):
            model(torch.ones(1, 2))
            recorder.step([0])
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[1].p = 0.0
        with TrajectoryRecorder(
            tmp_path / "b", model, torch.optim.SGD(model.parameters(), 0.1)
        ) as other:
            model(torch.ones(1, 2))
            other.step([0])


def test_the_hook_leaves_with_the_recorder(tmp_path):
    model, recorder = recorder_of(tmp_path)
    with recorder:
        pass
    state = torch.random.get_rng_state()
    model[0](torch.ones(1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not model._forward_pre_hooks


def edit(folder, change):
    path = folder / "trajectory.jsonl"
    lines = read_lines(folder)
    for line in lines:
        line.pop("crc32", None)
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1].update(seeds=[1]), r"line 2: micro_batches is \[3, 3\]"),
        (lambda lines: lines[1].update(seeds=[-1, 2]), "line 2: seeds is"),
        (lambda lines: lines[1].update(micro_batches=[3, 4]), "line 2: micro_batches is"),
        (lambda lines: lines[1].pop("seeds"), "line 2: has micro_batches or eval, but no seeds"),
        (lambda lines: lines[1].update(eval=[1]), "line 2: eval is"),
        (lambda lines: lines[0].update(device="cuda"), "cuda drew the random masks of training"),
        (lambda lines: lines[0].update(device=3), "line 1: device is 3"),
    ],
)
def test_a_line_that_does_not_fit_is_refused(change, message, tmp_path):
    train_with_dropout(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(TrajectoryError, match=message):
        opened(tmp_path)


def test_other_masks_than_those_of_training_are_refused(tmp_path, influence):
    train_with_dropout(tmp_path)
    edit(tmp_path, lambda lines: [line.update(seeds=[1, 2]) for line in lines[1:]])
    done = influence("score", tmp_path, "--method", "unroll", "--replay", "--cache", "none")
    assert done.code == 1
    assert "does not reproduce checkpoints/step-0000" in done.err
    assert "padded in another way" in done.err


# ---------------------------------------------------------------- methods
def test_dve_says_that_its_gradients_have_no_masks(tmp_path, influence):
    train_with_dropout(tmp_path)
    done = influence("score", tmp_path, "--method", "dve", "--replay", "--cache", "none")
    assert done.code == 0, done.err
    assert "training drew dropout masks; dve uses the gradients without masks" in done.err


def test_batch_norm_in_train_mode_is_replayed_with_its_buffers(tmp_path):
    trained = train_with_dropout(tmp_path, text=BATCH_NORM)
    run, replay = opened(tmp_path)
    replay.advance(STEPS)
    assert replay.relative_distance(run.checkpoints[-1]) == 0
    buffers = dict(run.model.module.named_buffers())
    for name, buffer in trained.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_batch_norm_in_train_mode_is_refused_by_dve(tmp_path, influence):
    train_with_dropout(tmp_path, text=BATCH_NORM)
    done = influence("score", tmp_path, "--method", "dve", "--replay", "--cache", "none")
    assert done.code == 1
    assert "an example had no gradient of its own" in done.err


def test_unroll_names_a_layer_whose_running_statistics_it_leaves_out(tmp_path, influence):
    text = BATCH_NORM.replace("BatchNorm1d(6)", "BatchNorm1d(6, affine=False)")
    train_with_dropout(tmp_path, text=text)
    done = influence("score", tmp_path, "--method", "unroll", "--replay", "--cache", "none")
    assert done.code == 0
    assert "BatchNorm layers drop have untrained weights" in done.err
