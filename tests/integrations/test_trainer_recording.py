"""huggingface.record(trainer): one line records what a replay needs, with the factors that Trainer used."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from influence_cli import huggingface
from influence_cli.errors import TrajectoryError
from influence_cli.run.replay import Replay
from influence_cli.run.run import open_run
from tests.integrations.hf_runs import word_tokenizer
from tests.integrations.recorded_runs import (
    ROWS,
    bert_rows,
    bert_trainer,
    gpt2_trainer,
    lora_trainer,
)

# Attention does not depend on the key's bias: its gradient is rounding error, which Adam enlarges.
NO_GRADIENT = ("attention.self.key.bias", "attn.c_attn.bias")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def record(trainer, **options):
    huggingface.record(trainer, **options)
    trainer.train()


def read_lines(out):
    return [json.loads(line) for line in (out / "trajectory.jsonl").read_text().splitlines()]


def distances(out):
    """Of each checkpoint, relative: between a replay and the recorded parameters."""
    run = open_run(out)
    replay = Replay(run, run.train.batch)
    replay.start_from(run.checkpoints[0])
    before = {name: p.detach().clone() for name, p in run.model.module.named_parameters()}
    result = []
    for checkpoint in run.checkpoints[1:]:
        replay.advance(checkpoint.step)
        replayed = dict(zip(replay.names, replay.save_state().values, strict=False))
        run.model.at(checkpoint)
        saved = {
            name: parameter.detach().clone()
            for name, parameter in run.model.module.named_parameters()
            if name in replayed and not name.endswith(NO_GRADIENT)
        }
        error = sum(float((saved[name] - replayed[name]).norm() ** 2) for name in saved)
        trained = sum(float((saved[name] - before[name]).norm() ** 2) for name in saved)
        result.append((error / trained) ** 0.5)
        replay.start_from(checkpoint)
        before = saved
    return result


def eval_rows():
    return bert_rows(word_tokenizer(pair=True))[:8]


def init(influence, folder):
    done = influence(
        "init",
        folder / "out",
        "--data",
        folder / "train.csv",
        "--query-data",
        folder / "test.jsonl",
    )
    assert done.code == 0, done.err


RUNS = {
    "bert": (bert_trainer, {}),
    "bert without accumulation": (bert_trainer, {"gradient_accumulation_steps": 1}),
    "lora": (lora_trainer, {}),
    "gpt2": (gpt2_trainer, {}),
    "gpt2, sgd": (gpt2_trainer, {"optim": "sgd", "learning_rate": 0.1}),
    "texts of one length together": (
        bert_trainer,
        {"train_sampling_strategy": "group_by_length"},
    ),
    "workers": (gpt2_trainer, {"dataloader_num_workers": 1, "save_strategy": "no"}),
}


@pytest.mark.parametrize(("make", "arguments"), RUNS.values(), ids=RUNS)
def test_a_recorded_training_is_replayed(make, arguments, tmp_path, influence):
    record(make(tmp_path, **arguments))
    init(influence, tmp_path)
    assert max(distances(tmp_path / "out")) < 1e-5
    examples = [index for line in read_lines(tmp_path / "out")[1:] for index in line["examples"]]
    assert sorted(examples) == sorted([*range(ROWS)] * 2)


def test_default_fine_tuning_with_dropout_is_scored_by_unroll(tmp_path, influence):
    record(bert_trainer(tmp_path, save_strategy="no"))
    init(influence, tmp_path)
    done = influence("score", tmp_path / "out", "--method", "unroll", "--replay", "--top", 2)
    assert done.code == 0, done.err
    assert "replay: it reproduced 1 saved checkpoint" in done.err
    assert len(done.rows) == 4 * 4


def test_weights_are_the_factors_that_trainer_used(tmp_path):
    """A classifier of transformers ignores the items of the step: Trainer's sum is over micro-batches
    (../cases/c63). A language model divides by the tokens of all of them."""
    record(bert_trainer(tmp_path / "bert"))
    line = read_lines(tmp_path / "bert/out")[1]
    assert line["weights"] == [1 / 4] * 8
    assert line["micro_batches"] == [4, 4]
    record(gpt2_trainer(tmp_path / "gpt2"))
    last = read_lines(tmp_path / "gpt2/out")[4]
    assert len(set(last["weights"])) == 1
    assert 1 / last["weights"][0] == round(1 / last["weights"][0]) > len(last["examples"])


def test_the_checkpoints_of_a_peft_model_are_its_adapter(tmp_path):
    record(lora_trainer(tmp_path))
    saved = sorted((tmp_path / "out/checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-000000", "step-000004", "step-000008"]
    assert {path.name for path in saved[0].iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_a_resumed_training_has_the_lines_of_the_uninterrupted_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    record(bert_trainer(tmp_path / "a", **options))

    class Stop(Exception):
        pass

    trainer = bert_trainer(tmp_path / "b", **options)
    huggingface.record(trainer)
    step = trainer.training_step

    def interrupt(*arguments):
        if trainer.state.global_step == 5:
            raise Stop
        return step(*arguments)

    trainer.training_step = interrupt
    with pytest.raises(Stop):
        trainer.train()
    trainer = bert_trainer(tmp_path / "b", **options)
    huggingface.record(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert read_lines(tmp_path / "a/out") == read_lines(tmp_path / "b/out")


def test_the_last_checkpoint_is_of_the_last_step_and_not_the_best_one(tmp_path):
    trainer = bert_trainer(
        tmp_path, eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=0.5, eval_rows=eval_rows()
    )  # fmt: skip
    record(trainer)
    out = tmp_path / "out"
    assert trainer.state.best_model_checkpoint == str(out / "checkpoint-4")
    from safetensors.torch import load_file

    own = load_file(out / "checkpoints/step-000008.safetensors")
    saved = load_file(out / "checkpoint-8/model.safetensors")
    assert all(torch.equal(own[name], value) for name, value in saved.items())


def test_evaluation_during_training_records_nothing(tmp_path, influence):
    trainer = bert_trainer(tmp_path, eval_strategy="steps", eval_steps=2, eval_rows=eval_rows())
    record(trainer)
    init(influence, tmp_path)
    assert max(distances(tmp_path / "out")) < 1e-5


def test_items_that_are_no_mapping_and_a_collator_of_ones_own(tmp_path, influence):
    from transformers import DataCollatorWithPadding

    trainer = bert_trainer(tmp_path)
    collate = DataCollatorWithPadding(trainer.processing_class)
    pairs = [(row["label"], row) for row in bert_rows(trainer.processing_class)]
    record(
        bert_trainer(
            tmp_path, rows=pairs, collator=lambda items: collate([row for _, row in items])
        )
    )
    init(influence, tmp_path)
    assert max(distances(tmp_path / "out")) < 1e-5


# ---------------------------------------------------------------- other losses
def weighted_trainer():
    from transformers import Trainer

    class WeightedTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"]
            outputs = model(**inputs)
            weights = torch.tensor([1.0, 5.0])
            return torch.nn.functional.cross_entropy(
                outputs.logits, labels, weights, reduction="sum"
            )

    return WeightedTrainer


def test_a_loss_that_is_no_sum_of_equal_weights_is_refused(tmp_path):
    with pytest.raises(TrajectoryError) as caught:
        record(bert_trainer(tmp_path, kind=weighted_trainer()))
    assert "does not train on a sum of the examples' losses with equal weights" in str(caught.value)
    assert "record(trainer, loss=FUNCTION)" in str(caught.value)


def test_a_loss_of_ones_own_has_the_factor_of_its_sum(tmp_path):
    def losses(outputs, labels):
        weights = torch.tensor([1.0, 5.0])
        return torch.nn.functional.cross_entropy(outputs.logits, labels, weights, reduction="none")

    record(bert_trainer(tmp_path, kind=weighted_trainer()), loss=losses)
    assert read_lines(tmp_path / "out")[1]["weights"] == pytest.approx([1.0] * 8)


def test_a_token_classifier_weighs_an_example_by_its_tokens(tmp_path):
    from influence_cli.integrations.example_weights import ExampleWeights, MicroBatch

    class BertForTokenClassification:
        pass

    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3)
    labels = torch.tensor([[0, 1, 2, -100, -100], [1, -100, -100, -100, -100]])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    outputs = type("Outputs", (), {"logits": logits})
    batch = MicroBatch(outputs, labels, float(loss), None, 1)
    model = BertForTokenClassification()
    assert ExampleWeights(model, None, None).measure(batch, 2) == pytest.approx([3 / 4, 1 / 4])
    assert ExampleWeights(model, None, "token").measure(batch, 2) == pytest.approx([1 / 4] * 2)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"neftune_noise_alpha": 5.0}, "NEFTune's noise"),
    ],
)
def test_a_training_that_cannot_be_recorded_is_refused(arguments, message, tmp_path):
    with pytest.raises(TrajectoryError, match=message):
        huggingface.record(bert_trainer(tmp_path, **arguments))


def test_a_stream_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(TrajectoryError, match="is Stream, which has no indices"):
        huggingface.record(bert_trainer(tmp_path, rows=Stream(), max_steps=3))


def test_a_second_training_into_the_folder_is_refused(tmp_path):
    record(bert_trainer(tmp_path))
    with pytest.raises(TrajectoryError, match="records a training already"):
        record(bert_trainer(tmp_path, seed=1))
