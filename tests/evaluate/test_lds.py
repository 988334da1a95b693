"""influence evaluate RUN lds against training on subsets written out, and its sign on scores with known answers."""

import json

import numpy as np
import pytest

from influence_cli.evaluate import subset_effects, subset_training
from influence_cli.evaluate.effect_correlations import FigureMaker
from influence_cli.progress import Reporter
from influence_cli.run.replay import Replay
from tests.evaluate.by_hand import train_by_hand
from tests.refusals import refused
from tests.training import DEFINITION, definition_of, train

TRAIN_FUNCTION = """
def train(indices, seed):
    x, y = (tensor[indices] for tensor in train_data().tensors)
    torch.manual_seed(seed)
    trained = model()
    for _ in range(3):
        gradients = torch.autograd.grad(loss(trained, (x, y)).mean(), list(trained.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(trained.parameters(), gradients):
                parameter -= 0.3 * gradient
    return trained
"""


def lds(influence, run, *flags):
    return influence("evaluate", run, "lds", *flags)


def figures_of(result):
    assert result.code == 0, result.err
    return {(row["method"], row["figure"]): row for row in result.rows}


def stored(run):
    file = next((run / ".influence" / "evaluate").glob("subsets-*.jsonl"))
    baseline, *records = map(json.loads, file.read_text().splitlines())
    return baseline, records


@pytest.mark.parametrize("flags", [(), ("--renormalize",)], ids=str)
def test_the_truth_is_that_of_training_on_the_subset_written_out(flags, tmp_path, influence):
    # one step has no kept example: it still steps the optimizer, whose momentum moves the weights
    members = subset_effects.draw_subsets(24, 4, 0.25, 3)
    lost = np.flatnonzero(~members[0])[:4].tolist()
    run = train(
        tmp_path / "run",
        every=12,
        options={"momentum": 0.5},
        batches=lambda step: lost if step == 5 else [(5 * step + i) % 24 for i in range(4)],
    )
    flags += ("--subsets", "4", "--fraction", "0.25", "--seed", "3", "--method", "random")
    figures_of(lds(influence, run, *flags))
    _, records = stored(run)
    for members_N, record in zip(members, records, strict=True):
        by_hand = train_by_hand(run, members_N, "--renormalize" in flags, momentum=0.5)
        assert np.abs(by_hand - np.array(record["m"])).max() < 1e-13


def test_exact_unrolling_predicts_subsets_that_keep_nearly_all(tmp_path, influence):
    run = train(tmp_path / "run", every=12, rate=0.05)
    flags = ("--subsets", "20", "--fraction", "0.92", "--method", "random")
    figures = figures_of(lds(influence, run, *flags, "--method", "unroll", "--replay"))
    unroll = figures["unroll", "spearman"]
    assert float(unroll["value"]) > 0.98 > 0.6 > abs(float(figures["random", "spearman"]["value"]))
    assert float(figures["unroll", "pearson"]["value"]) > 0.995
    assert unroll["n"] == "5"
    assert unroll["cost"].startswith("22 trainings, ")
    effect, noise = (float(figures["retraining", name]["value"]) for name in ("effect", "noise"))
    assert noise < 1e-12 < effect


def scored(scores_QN, members):
    ranking = subset_effects.SubsetSums(len(scores_QN), 0, members)
    for ids in (np.arange(10), np.arange(10, 30)):
        ranking.add(ids, scores_QN[:, ids])
    return -ranking.sums_RQ


def test_scores_with_known_answers():
    random = np.random.default_rng(0)
    members, true_QN = subset_effects.draw_subsets(30, 40, 0.5, 0), random.normal(size=(3, 30))
    measured = 5.0 - members @ true_QN.T  # each kept proponent lowers the loss
    noise = random.normal(size=(3, 30))
    cases = {"perfect": true_QN, "reversed": -true_QN, "random": noise, "constant": noise * 0 + 2}
    cases["rising"] = 3 * true_QN + 1  # subsets have equal sizes: a constant changes nothing
    cases["ties"] = np.sign(true_QN)
    values = {}
    for name, scores in cases.items():
        maker = FigureMaker(range(3), "", 0)
        predicted = scored(scores, members)
        values[name] = list(maker.correlations(name, predicted, measured, Reporter()))
    mean = {name: figures[3].value for name, figures in values.items()}
    assert mean["perfect"] == mean["rising"] == pytest.approx(1)
    assert mean["reversed"] == pytest.approx(-1)
    assert abs(mean["random"]) < 0.3
    assert mean["constant"] is None
    assert 0.5 < mean["ties"] < 1


def test_more_subsets_keep_the_first_ones_and_each_has_the_same_size():
    few, more = (subset_effects.draw_subsets(30, number, 0.4, 0) for number in (3, 9))
    assert (more[:3] == few).all()
    assert (more.sum(axis=1) == 12).all()
    assert len({row.tobytes() for row in more}) == 9


def test_a_stopped_evaluation_resumes_and_other_methods_train_nothing(
    tmp_path, influence, monkeypatch
):
    run = train(tmp_path / "run", every=12)
    calls: list[int] = []
    original = Replay.advance

    def counted(self, stop, drop=None, *args, **options):
        calls.append(drop is not None)
        if sum(calls) == 3:
            raise KeyboardInterrupt
        return original(self, stop, drop, *args, **options)

    monkeypatch.setattr(Replay, "advance", counted)
    assert lds(influence, run, "--subsets", "5", "--lr", "1").code == 130
    assert len(stored(run)[1]) == 2
    calls[:] = [0, 0, 0, 1, 1, 1]
    result = lds(influence, run, "--subsets", "5", "--lr", "1")
    assert result.code == 0
    assert len(calls) == 6 + 3
    assert lds(influence, run, "--subsets", "5", "--lr", "1").out == result.out
    assert lds(influence, run, "--subsets", "4", "--method", "random").code == 0
    assert len(calls) == 9


def test_two_processes_divide_the_trainings(tmp_path, influence, monkeypatch):
    run = train(tmp_path / "run", every=12)
    flags = ("--subsets", "9", "--method", "random")
    assert lds(influence, run, *flags, "--cache", tmp_path / "alone").code == 0
    (stored_alone,) = (tmp_path / "alone" / "evaluate").glob("*.jsonl")
    others = stored_alone.read_text().splitlines(keepends=True)[1:]
    calls = []
    original = subset_training.ReplayTrainer.train

    def beside_another_process(self, *arguments):
        calls.append(1)
        values = original(self, *arguments)
        with next((run / ".influence" / "evaluate").glob("*.jsonl")).open("a") as log:
            log.write(others.pop(0))  # it has trained another subset meanwhile, or the same
        return values

    monkeypatch.setattr(subset_training.ReplayTrainer, "train", beside_another_process)
    assert lds(influence, run, *flags).code == 0
    assert 4 < len(calls) < 9
    assert len({record["without"] for record in stored(run)[1]}) == 9


def test_changed_training_data_are_trained_on_anew(tmp_path, influence):
    data = DEFINITION.replace("examples(0, 24)", "examples(int(open(DATA).read()), 24)")
    (tmp_path / "data.txt").write_text("0")
    run = train(tmp_path / "run", every=12, definition=f"DATA = '{tmp_path}/data.txt'\n{data}")
    flags = ("--subsets", "3", "--method", "random")
    assert lds(influence, run, *flags).code == 0
    (tmp_path / "data.txt").write_text("7")
    assert lds(influence, run, *flags).code == 0
    assert len(list((run / ".influence" / "evaluate").glob("*.jsonl"))) == 2


def test_the_definitions_own_training_with_several_seeds(tmp_path, influence):
    run = train(tmp_path / "run", every=12, definition=DEFINITION + TRAIN_FUNCTION)
    flags = ("--subsets", "6", "--retrainings", "2", "--seed", "4", "--method", "random")
    figures = figures_of(lds(influence, run, *flags))
    baseline, records = stored(run)
    space = definition_of(run)
    members = subset_effects.draw_subsets(24, 6, 0.5, 4)
    queries = space["query_data"]().tensors
    values = np.array(
        [
            [
                space["loss"](space["train"](np.flatnonzero(kept).tolist(), seed), queries)
                .detach()
                .tolist()
                for seed in (4, 5)
            ]
            for kept in members
        ]
    )
    assert [record["seed"] for record in records] == [4, 5] * 6
    assert subset_training.values_of(records, 2) == pytest.approx(values, abs=1e-13)
    assert figures["retraining", "seeds-spearman"]["value"]
    assert figures["random", "spearman"]["cost"].startswith("14 trainings, ")
    noise = float(figures["retraining", "noise"]["value"])  # two seeds differ by far more
    assert noise == pytest.approx(
        np.mean(np.abs(np.subtract(baseline["values"], baseline["again"])))
    )
    assert noise > 1e-3
    effect = float(figures["retraining", "effect"]["value"])
    assert effect == pytest.approx(values.mean(axis=1).std(axis=0).mean())


BAD_TRAIN = {
    "return 3": ("train() in definition.py returned a int", "expected: the trained model"),
    "raise ValueError('no disk')": ("train() in definition.py raised ValueError: no disk",),
}


@pytest.mark.parametrize("body", BAD_TRAIN)
def test_a_training_function_that_fails_is_named(body, tmp_path, influence):
    definition = f"{DEFINITION}\ndef train(indices, seed):\n    {body}\n"
    run = train(tmp_path / "run", every=12, definition=definition)
    refused(lds(influence, run, "--method", "random"), 1, *BAD_TRAIN[body])


BAD = {
    "--subsets 1": ("--subsets 1", "from 2"),
    "--fraction 0": ("--fraction 0 keeps no", "24 training examples"),
    "--fraction 0.01": ("--fraction 0.01 keeps no",),
    "--fraction 1": ("--fraction 1 keeps each",),
    "--fraction nan": ("--fraction nan",),
    "--retrainings 2": ("--retrainings 2: a replay has the recorded order", "def"),
    "--removals 3": ("--removals",),
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_refused(flags, tmp_path, influence):
    run = train(tmp_path / "run", every=12)
    refused(lds(influence, run, "--method", "random", *flags.split()), 2, *BAD[flags])


def test_options_of_a_method_reach_it(tmp_path, influence):
    run = train(tmp_path / "run", every=12)
    flags = ("--subsets", "4", "--method", "influence", "--curvature", "fisher")
    rows = [lds(influence, run, *flags, "--damping", damping).rows for damping in ("1e-3", "1e3")]
    assert rows[0][1]["figure"] == "pearson"
    assert rows[0][1]["value"] != rows[1][1]["value"]
