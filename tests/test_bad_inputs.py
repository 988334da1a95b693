"""Every bad run, one thing broken at a time: its own message, exit code 1, nothing on stdout. And what looks bad but is handled."""

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from influence_cli import cli
from influence_cli.cache.store import VERSION
from influence_cli.extraction import batches
from influence_cli.gradients.capture import Capture
from influence_cli.storage import atomic, safetensors_io
from tests.conftest import DEFINITION, build_run
from tests.refusals import refused, replaced

LOSS = 'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")'
MODEL = "return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))"
TRAIN, QUERY = "return examples(0, 20)", "return examples(1, 6)"
FIRST, SECOND = "step-000010.safetensors", "step-000020.safetensors"


def resave(run: Path, name: str, change, metadata: dict[str, str] | None = None) -> None:
    """Save a checkpoint again with its tensors changed: change(tensors) -> tensors."""
    path = run / "checkpoints" / name
    save_file(
        change(load_file(path)),
        path,
        metadata or {"step": str(int(name[5:11])), "learning_rate": "0.1"},
    )


def trainer_folder(run: Path, name: str = "checkpoint-20", state: str | None = None) -> Path:
    """Turn the second checkpoint into an HF Trainer folder of a run."""
    folder = run / "checkpoints" / name
    folder.mkdir()
    save_file(load_file(run / "checkpoints" / SECOND), folder / "model.safetensors")
    (run / "checkpoints" / SECOND).unlink()
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def sharded(run: Path) -> Path:
    """Turn the second checkpoint into a folder of two shards with an index."""
    folder = trainer_folder(run)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights = {}
    for k, key in enumerate(tensors):
        weights[key] = f"model-{k % 2 + 1:05d}-of-00002.safetensors"
    for shard in set(weights.values()):
        save_file({key: tensors[key] for key in tensors if weights[key] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weights})
    )
    return folder


# ---------------------------------------------------------------- checkpoints that can't be used
def test_a_run_without_checkpoints_is_told_what_one_looks_like(make_run, influence):
    result = influence("score", make_run(steps=()))
    refused(result, 1, "no checkpoints in", "step-000100.safetensors", "save_model")


def test_pickled_checkpoints_are_named_and_never_opened(make_run, influence, tmp_path):
    run = make_run(steps=())

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    torch.save(Bomb(), run / "checkpoints" / "epoch_1.pt")
    refused(
        influence("score", run), 1, "no checkpoints in", "epoch_1.pt", "never opened", "safetensors"
    )
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("kept", [-10, 200, 5])
def test_a_truncated_checkpoint_is_named_with_its_size(kept, make_run, influence):
    run = make_run()
    path = run / "checkpoints" / SECOND
    path.write_bytes(path.read_bytes()[:kept])
    refused(
        influence("score", run),
        1,
        SECOND,
        "truncated",
        f"{path.stat().st_size} bytes",
        "save or copy it again",
    )


@pytest.mark.parametrize(
    "head",
    [
        '{"0.weight":' * 5000,
        '{"0.weight": {"dtype": "F32", "shape": [1' + "0" * 400 + '], "data_offsets": [0, 4]}}',
        '{"0.weight": {"dtype": "F32", "shape": [' + "9" * 18 + ", 9" * 99999 + '], "data_offsets": [0, 4]}}',
        '{"0.weight": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        '{"0.weight": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}',
        '{"\\udc00": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        ", ".join(['{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}', '"a": 1}']),
    ],
    ids=range(7),
)  # fmt: skip
def test_a_hostile_header_is_refused(head, make_run, influence):
    run = make_run()
    content = head.encode()
    (run / "checkpoints" / SECOND).write_bytes(
        len(content).to_bytes(8, "little") + content + b"1234"
    )
    result = influence("score", run)
    refused(result, 1, SECOND, "not a safetensors file", "header is invalid")
    assert len(result.err) < 2000


@pytest.mark.parametrize("step", ["1" + "0" * 400, "9" * 5000, "-1", "1e12"])
def test_an_enormous_step_in_metadata_is_refused(step, make_run, influence):
    run = make_run()
    resave(run, SECOND, dict, metadata={"step": step})
    result = influence("score", run)
    refused(result, 1, SECOND, "step")
    assert len(result.err) < 2000


def test_an_empty_checkpoint_is_named(make_run, influence):
    run = make_run()
    (run / "checkpoints" / SECOND).write_bytes(b"")
    refused(influence("score", run), 1, SECOND, "empty", "0 bytes", "save it again")


@pytest.mark.parametrize(
    "content",
    [b"this is a text, written to the wrong name", b'{"a": 1}' * 30, bytes(range(256)) * 4],
)
def test_a_file_that_is_no_safetensors_file_is_named(content, make_run, influence):
    run = make_run()
    (run / "checkpoints" / SECOND).write_bytes(content)
    refused(
        influence("score", run),
        1,
        SECOND,
        "not a safetensors file",
        f"{len(content):,} bytes",
        "again",
    )


def test_several_broken_checkpoints_are_reported_together(make_run, influence):
    run = make_run(steps=(10, 20, 30))
    (run / "checkpoints" / FIRST).write_bytes(b"")
    (run / "checkpoints" / SECOND).write_bytes(b"this is a text")
    refused(influence("score", run), 1, "2 checkpoints can't be used", FIRST, SECOND)


def test_two_checkpoints_of_one_step_are_named(make_run, influence):
    run = make_run()
    shutil.copy(run / "checkpoints" / SECOND, run / "checkpoints" / "step-20.safetensors")
    refused(
        influence("score", run),
        1,
        "two checkpoints have one step",
        "step 20",
        SECOND,
        "step-20.safetensors",
        "--checkpoints",
    )


def test_a_step_that_differs_between_name_and_metadata_is_refused(make_run, influence):
    run = make_run()
    resave(run, SECOND, lambda tensors: tensors, {"step": "21"})
    refused(
        influence("score", run), 1, SECOND, "step 20 in its name", "21 in its metadata", "rename"
    )


def test_a_checkpoint_without_a_step_is_told_how_to_name_it(make_run, influence):
    run = make_run()
    save_file(load_file(run / "checkpoints" / SECOND), run / "checkpoints" / "last.safetensors")
    refused(influence("score", run), 1, "last.safetensors", "no step", "step-000100.safetensors")


@pytest.mark.parametrize("metadata", [{"step": "twenty"}, {"step": "20", "learning_rate": "fast"}])
def test_metadata_that_is_no_number_is_quoted(metadata, make_run, influence):
    run = make_run()
    resave(run, SECOND, lambda tensors: tensors, metadata)
    refused(influence("score", run), 1, SECOND, *list(metadata.items())[-1], "expected: a number")


# ---------------------------------------------------------------- checkpoints of another model
def test_missing_and_unexpected_keys_are_listed_with_their_shapes(make_run, influence):
    run = make_run()
    resave(
        run,
        SECOND,
        lambda tensors: {
            key.replace("2.weight", "head.weight"): value for key, value in tensors.items()
        },
    )
    says = (
        f"checkpoints/{SECOND} does not fit the model in definition.py",
        "missing:    2.weight (3, 5)",
        "unexpected: head.weight (3, 5)",
    )
    refused(influence("score", run), 1, *says, "another version of the model")


def test_a_shape_mismatch_shows_both_shapes(make_run, influence):
    run = make_run()
    resave(run, SECOND, lambda tensors: {**tensors, "2.weight": torch.zeros(7, 5)})
    refused(
        influence("score", run),
        1,
        SECOND,
        "2.weight is (7, 5) in the file, (3, 5) in the model",
        "another size",
    )


def test_a_dtype_mismatch_shows_both_and_names_precision(make_run, influence):
    run = make_run()
    resave(run, SECOND, lambda tensors: {**tensors, "2.weight": tensors["2.weight"].half()})
    refused(
        influence("score", run),
        1,
        SECOND,
        "2.weight is float16 in the file, float32 in the model",
        "--precision",
    )


def test_precision_settles_a_dtype_mismatch(make_run, influence):
    run = make_run()
    resave(run, SECOND, lambda tensors: {**tensors, "2.weight": tensors["2.weight"].double()})
    assert influence("score", run, "--precision", "float32").code == 0


def test_all_checkpoints_that_do_not_fit_are_reported_together(make_run, influence):
    run = make_run(steps=(10, 20, 30, 40))
    for name in (FIRST, SECOND):
        resave(run, name, lambda tensors: {**tensors, "2.bias": torch.zeros(4)})
    resave(run, "step-000040.safetensors", lambda tensors: {"0.bias": tensors["0.bias"]})
    says = (
        f"checkpoints/{FIRST} does not fit",
        f"the same in: checkpoints/{SECOND}",
        "other misfits in: checkpoints/step-000040.safetensors",
    )
    refused(influence("score", run), 1, *says)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_counted_by_name(value, make_run, influence):
    run = make_run()

    def change(tensors):
        tensors["2.weight"][0, :2] = value
        return tensors

    resave(run, SECOND, change)
    refused(
        influence("score", run),
        1,
        f"checkpoints/{SECOND}",
        "not finite",
        "2.weight: 2 of 15 values",
        "--steps",
    )


def test_a_tied_tensor_with_two_values_is_refused_by_both_names(make_run, influence):
    run = make_run(
        "run",
        TIED,
        model=lambda: nn.ModuleDict(
            {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 3)}
        ),
    )
    refused(
        influence("score", run),
        1,
        FIRST,
        "two values of one tied tensor",
        "a.weight and b.weight",
        "definition.py",
    )


# ---------------------------------------------------------------- Trainer folders and index files
def test_an_index_that_names_a_missing_shard_is_refused_by_its_name(make_run, influence):
    folder = sharded(make_run())
    (folder / "model-00002-of-00002.safetensors").unlink()
    result = influence("score", folder.parents[1])
    refused(
        result,
        1,
        "checkpoint-20/model.safetensors.index.json",
        "model-00002-of-00002.safetensors",
        "copy the missing shards",
    )


def test_an_index_that_names_a_missing_tensor_is_refused_by_its_name(make_run, influence):
    folder = sharded(make_run())
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps({"weight_map": {**weights, "3.weight": "model-00001-of-00002.safetensors"}})
    )
    refused(
        influence("score", folder.parents[1]),
        1,
        "index.json",
        "tensors that its shards lack: 3.weight",
        "copy the shards again",
    )


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"0.weight": 1}}',
        '{"weight_map": {"0.weight": []}}',
        '{"weight_map": {"0.weight": "a", "0.weight": "b"}}',
        '{"weight_map": {"0.weight": "\\ud800"}}',
        '{"weight_map": 1' + "0" * 5000 + "}",
        '{"weight_map":' * 5000,
    ],
)
def test_an_index_that_can_not_be_read_is_refused(text, make_run, influence):
    folder = sharded(make_run())
    (folder / "model.safetensors.index.json").write_text(text)
    refused(
        influence("score", folder.parents[1]),
        1,
        "checkpoint-20/model.safetensors.index.json can't be read",
        "weight_map",
    )


@pytest.mark.parametrize(
    "state",
    [
        '{"log_history": [{"step": 10, "learning_rate"',
        '{"log_history": [{"step": 1e400, "learning_rate": 0.1}]}',
        '{"log_history": [{"step": 0.5, "learning_rate": 0.1}]}',
        '{"log_history": [{"step": 1' + "0" * 400 + ', "learning_rate": 0.1}]}',
        '{"log_history": ' + "[" * 5000,
        '{"log_history": [], "log_history": []}',
        "\ud800",
    ],
)
def test_a_broken_trainer_state_is_refused_and_names_lr(state, make_run, influence):
    folder = trainer_folder(make_run(), state="")
    (folder / "trainer_state.json").write_bytes(state.encode(errors="surrogatepass"))
    refused(
        influence("score", folder.parents[1]),
        1,
        "checkpoint-20/trainer_state.json can't be read",
        "--lr",
    )


def test_shards_score_like_one_file(make_run, influence):
    whole, cut = make_run("whole"), make_run("cut")
    sharded(cut)
    assert (
        influence("score", cut, "--lr", "0.1").out
        == influence("score", whole, "--lr", "0.1").out
        != ""
    )


# ---------------------------------------------------------------- handled: prefixes, tied weights, frozen parameters
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrapper_prefixes_in_a_checkpoint_are_stripped(prefix, make_run, influence):
    plain, wrapped = make_run("plain"), make_run("wrapped")
    resave(plain, SECOND, lambda tensors: tensors)
    resave(wrapped, SECOND, lambda tensors: {prefix + key: value for key, value in tensors.items()})
    assert influence("score", wrapped).out == influence("score", plain).out != ""


def test_a_wrapped_model_is_taken_out_of_its_wrapper(make_run, influence):
    plain = make_run("plain")
    wrapped = make_run(
        "wrapped",
        replaced(DEFINITION, (MODEL, f"return nn.DataParallel({MODEL.removeprefix('return ')})")),
        model=original,
    )
    assert influence("score", wrapped).out == influence("score", plain).out != ""


def original() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


UNTIED = (
    'return nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 3)})'
)
TIED = replaced(
    DEFINITION,
    (MODEL, UNTIED.replace("return ", "m = ") + "\n    m.b.weight = m.a.weight\n    return m"),
    ("model(batch[0])", "model.head(model.b(model.a(batch[0])))"),
)  # fmt: skip


def test_tied_weights_saved_once_load_under_either_name(make_run, influence):
    once, other, twice = make_run("once", TIED), make_run("other", TIED), make_run("twice", TIED)
    for name in (FIRST, SECOND):
        assert "b.weight" not in load_file(once / "checkpoints" / name)
        for run in (once, other, twice):
            resave(run, name, lambda tensors: tensors)
        resave(
            other,
            name,
            lambda tensors: {
                key.replace("a.weight", "b.weight"): value for key, value in tensors.items()
            },
        )
        resave(twice, name, lambda tensors: {**tensors, "b.weight": tensors["a.weight"].clone()})
    assert (
        influence("score", once).out
        == influence("score", other).out
        == influence("score", twice).out
        != ""
    )


def test_frozen_parameters_are_not_scored(make_run, influence):
    frozen = replaced(
        DEFINITION,
        (
            MODEL,
            MODEL.replace("return ", "m = ") + "\n    m[0].requires_grad_(False)\n    return m",
        ),
    )
    plain, partly = make_run("plain"), make_run("partly", frozen)
    assert influence("score", partly).out == influence("score", plain, "--layers", "2").out != ""
    assert {row["layer"] for row in influence("score", partly, "--by", "layer").rows} == {"2"}


# ---------------------------------------------------------------- definition.py
def test_a_run_without_a_definition_is_told_of_init(make_run, influence):
    run = make_run()
    (run / "definition.py").unlink()
    refused(influence("score", run), 1, "no definition at", "definition.py", "influence init")


def test_a_syntax_error_is_shown_with_its_line(make_run, influence):
    run = make_run()
    (run / "definition.py").write_text(DEFINITION + "def broken(:\n    pass\n")
    line = DEFINITION.count("\n") + 1
    refused(
        influence("score", run),
        1,
        "definition.py is not valid Python",
        f"line {line}",
        "> def broken(:",
    )


@pytest.mark.parametrize("content", [b"name = '\xff\xfe'\n", b"a = 1\0\n"])
def test_a_definition_that_is_no_text_is_refused(content, make_run, influence):
    run = make_run()
    (run / "definition.py").write_bytes(content)
    result = influence("score", run)
    refused(result, 1, "definition.py is not valid Python")
    assert "None" not in result.err


def test_missing_functions_are_named_together(make_run, influence):
    text = replaced(
        DEFINITION, ("def loss(", "def my_loss("), ("def query_data(", "def validation_data(")
    )
    refused(
        influence("score", make_run(definition=text)),
        1,
        "definition.py lacks query_data() and loss()",
        "expected:",
        "influence init",
    )


def test_an_exception_while_the_definition_loads_names_its_line(make_run, influence):
    run = make_run()
    (run / "definition.py").write_text(DEFINITION + "numbers = [1, 2]\nnumbers[5]\n")
    line = DEFINITION.count("\n") + 2
    result = influence("score", run)
    refused(
        result,
        1,
        "definition.py raised IndexError while it was loaded",
        f"definition.py line {line}: numbers[5]",
        "--debug",
    )


def test_a_definition_that_exits_is_refused(make_run, influence):
    run = make_run()
    (run / "definition.py").write_text(DEFINITION + "import sys\nsys.exit(0)\n")
    refused(
        influence("score", run),
        1,
        "definition.py raised SystemExit while it was loaded",
        "sys.exit(0)",
    )


@pytest.mark.parametrize(
    ("function", "body"),
    [("model", MODEL), ("train_data", TRAIN), ("query_data", QUERY), ("loss", LOSS)],
)
def test_an_exception_inside_a_function_names_function_and_line(
    function, body, make_run, influence
):
    run = make_run()
    (run / "definition.py").write_text(replaced(DEFINITION, (body, "return {}['nothing']")))
    result = influence("score", run)
    refused(
        result,
        1,
        f"{function}() in definition.py raised KeyError: 'nothing'",
        "definition.py line ",
        "{}['nothing']",
        "--debug",
    )


def test_a_model_that_is_no_module_is_refused(make_run, influence):
    run = make_run()
    (run / "definition.py").write_text(
        replaced(DEFINITION, (MODEL, "return nn.Linear(4, 3).state_dict()"))
    )
    refused(
        influence("score", run), 1, "model() returned a OrderedDict", "expected: a torch.nn.Module"
    )


def test_a_model_without_storage_is_refused(make_run, influence):
    run = make_run()
    (run / "definition.py").write_text(
        replaced(DEFINITION, ("nn.Linear(4, 5)", "nn.Linear(4, 5, device='meta')"))
    )
    refused(influence("score", run), 1, "meta device", "0.weight", "on the CPU")


@pytest.mark.parametrize("option", ["max_norm=1.0", "scale_grad_by_freq=True"])
@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_embedding_options_that_couple_examples_are_refused_by_name(
    kind, option, make_run, influence
):
    text = replaced(DEFINITION, ("nn.Linear(4, 5)", f"nn.{kind}(9, 5, {option})"))
    refused(
        influence("score", make_run(definition=text)),
        1,
        f"0 ({kind}): {option}",
        "build the model without it",
    )


def test_a_model_that_is_all_frozen_is_refused(make_run, influence):
    text = replaced(DEFINITION, (MODEL, f"{MODEL}.requires_grad_(False)"))
    refused(
        influence("score", make_run(definition=text)),
        1,
        "no trained parameter",
        "requires_grad=False",
    )


def test_debug_shows_the_trace_and_the_message(make_run, influence):
    run = make_run()
    (run / "definition.py").write_text(replaced(DEFINITION, (LOSS, "return {}['nothing']")))
    result = influence("score", run, "--debug")
    assert result.code == 1
    assert result.out == ""
    assert "Traceback (most recent call last)" in result.err
    assert "\nerror: loss() in definition.py raised KeyError" in result.err


# ---------------------------------------------------------------- the loss
WRONG_LOSSES = {
    "a scalar": ("return F.cross_entropy(model(batch[0]), batch[1])", ("returned a scalar", "reduction='none'")),
    "one per class": ("return model(batch[0]).flatten()", ("returned shape (6,) for a batch of 2", "expected: a tensor of shape (2,)")),
    "one axis too many": (f"{LOSS}[:, None]", ("returned shape (2, 1) for a batch of 2", "never over examples")),
    "one too few": (f"{LOSS}[1:]", ("returned shape (1,) for a batch of 2", "one unreduced loss per example")),
    "a number": (f"{LOSS}.sum().item()", ("returned a float", "expected: a tensor of shape (2,)")),
    "nothing": (LOSS.removeprefix("return "), ("returned a NoneType", "expected: a tensor")),
    "a detached tensor": (f"{LOSS}.detach()", ("not differentiable", "torch.no_grad()")),
    "whole numbers": ("return (model(batch[0]).argmax(1) != batch[1]).long()", ("returned torch.int64", "expected: a tensor")),
    "of another model": (
        "return F.cross_entropy(nn.Linear(4, 3).requires_grad_(False)(batch[0]), batch[1], reduction='none')",
        ("not differentiable", "another model"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
@pytest.mark.parametrize("function", ["loss", "measure"])
def test_a_wrong_loss_says_what_it_returned(function, wrong, make_run, influence):
    body, says = WRONG_LOSSES[wrong]
    run = make_run()
    changed = (
        replaced(DEFINITION, (LOSS, body))
        if function == "loss"
        else f"{DEFINITION}\ndef measure(model, batch):\n    {body}\n"
    )
    (run / "definition.py").write_text(changed)
    refused(influence("score", run), 1, f"{function}() returned", *says)


NOT_FINITE = {
    "the loss": "torch.where(odd, (x.abs().sum(1) + 1) * float('inf'), 0.0)",
    "the gradient of 0.weight": "torch.where(odd, (x - x.detach()).square().sum(1), 1.0).sqrt()",  # the slope of a root at 0
}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_a_value_that_is_not_finite_names_checkpoint_layer_and_example(what, make_run, influence):
    text = replaced(
        DEFINITION,
        (
            TRAIN,
            "data = examples(0, 20).tensors\n    data[0][7] = 99.0\n    return torch.utils.data.TensorDataset(*data)",
        ),
        (LOSS, f"x, odd = model(batch[0]), batch[0][:, 0] > 50\n    {LOSS} + {NOT_FINITE[what]}"),
    )
    result = influence("self", make_run(definition=text))
    refused(
        result,
        1,
        f"{what} is not finite",
        f"checkpoints/{FIRST}",
        "example 7 of train_data()",
        "--steps or --train",
    )


# ---------------------------------------------------------------- the data
DATA = {"train_data()": TRAIN, "query_data()": QUERY}
CLASSES = """
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): yield from examples(0, 9)

class SizedStream(Stream):
    def __len__(self): return 9

class Wrapped(torch.utils.data.Dataset):
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)

class Unsized(Wrapped):
    def __len__(self): raise RuntimeError("not yet indexed")
    def __getitem__(self, i): return self.data[i]

class Torn(Wrapped):
    def __getitem__(self, i):
        if i == 5: raise ValueError("page 5 is torn")
        return self.data[i]

class Random(Wrapped):
    def __getitem__(self, i): return self.data[i][0] + torch.randn(4), self.data[i][1]

class Ragged(Wrapped):
    def __getitem__(self, i): return self.data[i][0][:1 + i % 3], self.data[i][1]
"""


@pytest.fixture
def run_on(make_run):
    """run_on("train_data()", "Torn(examples(0, 6))") -> a run whose dataset is that."""

    def make(source: str, data: str) -> Path:
        return make_run(definition=replaced(DEFINITION, (DATA[source], f"return {data}")) + CLASSES)

    return make


@pytest.mark.parametrize("source", DATA)
def test_an_empty_dataset_is_refused(source, run_on, influence):
    refused(
        influence("score", run_on(source, "[]")), 1, f"{source} is empty", "at least one example"
    )


@pytest.mark.parametrize("source", DATA)
@pytest.mark.parametrize(
    "data",
    [
        "Stream()",
        "SizedStream()",
        "torch.utils.data.DataLoader(examples(0, 9))",
        "iter(examples(0, 9))",
        "None",
    ],
)
def test_a_dataset_without_an_index_is_refused(data, source, run_on, influence):
    kind = {"torch": "DataLoader", "iter": "iterator", "None": "NoneType"}.get(
        data.split("(")[0].split(".")[0], data[:-2]
    )
    refused(
        influence("score", run_on(source, data)),
        1,
        f"{source} returned a {kind}",
        "can't be read by index",
        "list(...)",
    )


def test_a_dataset_whose_length_fails_is_refused(run_on, influence):
    refused(
        influence("score", run_on("train_data()", "Unsized(examples(0, 9))")),
        1,
        "len() of train_data() raised RuntimeError: not yet indexed",
    )


@pytest.mark.parametrize("source", DATA)
def test_a_dataset_that_raises_names_the_example_and_the_line(source, run_on, influence):
    result = influence("score", run_on(source, "Torn(examples(0, 8))"))
    refused(
        result,
        1,
        f"{source} raised ValueError at example 5: page 5 is torn",
        "definition.py line ",
        "it has 8 examples",
    )


@pytest.mark.parametrize("source", DATA)
def test_a_dataset_that_changes_between_reads_is_refused(source, run_on, influence):
    result = influence("score", run_on(source, "Random(examples(0, 8))"))
    refused(result, 1, f"{source} changes between reads", "example 0", "random augmentation")


def test_examples_that_can_not_be_batched_name_collate(run_on, influence):
    refused(
        influence("score", run_on("train_data()", "Ragged(examples(0, 8))")),
        1,
        "examples of train_data() can't be batched",
        "collate(items)",
    )


@pytest.mark.parametrize("function", ["collate(items)", "label(example)", "describe(example)"])
def test_an_exception_in_an_optional_function_names_it(function, make_run, influence):
    run = make_run()
    (run / "definition.py").write_text(
        f"{DEFINITION}\ndef {function}:\n    return {{}}['nothing']\n"
    )
    refused(
        influence("score", run),
        1,
        f"{function.split('(')[0]}() in definition.py raised KeyError",
        "definition.py line ",
    )


# ---------------------------------------------------------------- the trajectory
HEADER = '{"format": "influence-trajectory", "version": 1, "reduction": "mean", "optimizer": {"name": "sgd"}}'


def lines(*changes: tuple[int, str | None], steps: int = 20) -> str:
    """A trajectory of `steps` steps after HEADER; (line number, text) replaces a line, None leaves it out."""
    text = [
        HEADER,
        *(
            json.dumps({"step": step, "lr": 0.1, "examples": [step % 20, 3]})
            for step in range(steps)
        ),
    ]
    changed = dict(changes)
    return "".join(
        f"{changed.get(number, line)}\n"
        for number, line in enumerate(text, start=1)
        if changed.get(number, line) is not None
    )


BAD_TRAJECTORIES = {
    "an empty file": ("", ("line 1", "expected:")),
    "a header that is no JSON": (lines((1, "format: influence-trajectory")), ("line 1 is not a JSON object", HEADER[:40])),
    "a header of another format": (lines((1, '{"format": "log"}')), ("line 1 is not a trajectory header", HEADER[:40])),
    "a header that is a list": (lines((1, "[]")), ("line 1 is not a trajectory header", HEADER[:40])),
    "no header": (lines((1, None)), ("line 1 is not a trajectory header", HEADER[:40])),
    "another version": (lines((1, HEADER.replace('"version": 1', '"version": 2'))), ("version 2", "reads version 1")),
    "groups that can't be read": (lines((1, HEADER[:-1] + ', "groups": [{"lr": 1}]}')), ("line 1: `groups` can't be read", "params")),
    "a header alone": (HEADER + "\n", ("a header and no step", "one line per optimizer step")),
    "a line that is no JSON": (lines((7, '{"step": 5, "lr": 0.1, "exa')), ("line 7: not JSON", 'found: {"step": 5, "lr": 0.1, "exa')),
    "a line of other bytes": (lines((7, "\x00\x01")), ("line 7: not JSON",)),
    "a blank line": (lines((7, "")), ("line 7: not JSON",)),
    "a line that is a list": (lines((7, "[5, 0.1]")), ("line 7: lacks step, lr or examples", "expected:")),
    "a line without lr": (lines((7, '{"step": 5, "examples": [1]}')), ("line 7: lacks step, lr or examples", "expected:")),
    "a step that is text": (lines((7, '{"step": "5", "lr": 0.1, "examples": [1]}')), ("line 7: step is '5'", "whole number")),
    "a rate that is text": (lines((7, '{"step": 5, "lr": "0.1", "examples": [1]}')), ("line 7: lr is '0.1'", "finite number")),
    "a rate of NaN": (lines((7, '{"step": 5, "lr": NaN, "examples": [1]}')), ("line 7: lr is nan", "finite number")),
    "rates without groups": (lines((7, '{"step": 5, "lr": [0.1, 0.2], "examples": [1]}')), ("line 7: lr has 2 numbers", "`groups` 0")),
    "examples that are text": (lines((7, '{"step": 5, "lr": 0.1, "examples": "1"}')), ("line 7: examples is not a list of example ids",)),
    "a negative example": (lines((7, '{"step": 5, "lr": 0.1, "examples": [-1]}')), ("line 7: examples is not a list of example ids",)),
    "unknown examples": (
        lines((7, '{"step": 5, "lr": 0.1, "examples": [1, 20, 99]}')),
        ("line 7: names unknown examples: 20, 99", "train_data() has 20 examples (0 to 19)", "another run"),
    ),
    "weights of another number": (
        lines((7, '{"step": 5, "lr": 0.1, "examples": [1, 2], "weights": [1]}')), ("line 7: weights do not fit examples", "list of 2"),
    ),
    "a weight of NaN": (lines((7, '{"step": 5, "lr": 0.1, "examples": [1], "weights": [NaN]}')), ("line 7: weights do not fit",)),
    "a clip that is text": (lines((7, '{"step": 5, "lr": 0.1, "examples": [1], "clip": "1"}')), ("line 7: clip is '1'",)),
    "a negative clip": (lines((7, '{"step": 5, "lr": 0.1, "examples": [1], "clip": -1}')), ("line 7: clip is -1",)),
    "a seed that is text": (lines((7, '{"step": 5, "lr": 0.1, "examples": [1], "seed": "x"}')), ("line 7: seed is 'x'", "whole number")),
    "an unknown reduction": (lines((1, HEADER.replace("mean", "median"))), ("line 1: reduction is 'median'", "mean, sum")),
    "an optimizer that is text": (lines((1, HEADER.replace('{"name": "sgd"}', '"sgd"'))), ("line 1: optimizer is 'sgd'", '"name": "sgd"')),
    "a parameter in two groups": (
        lines((1, HEADER[:-1] + ', "groups": [{"params": ["0.weight"]}, {"params": ["0.weight"]}]}')), ("0.weight in two groups",),
    ),
    "a group of nothing": (lines((1, HEADER[:-1] + ', "groups": [{"params": []}]}')), ("a group without params",)),
    "a key twice": (lines((7, '{"step": 5, "lr": 0.1, "step": 6, "examples": [1]}')), ("line 7: not JSON", "the key 'step' twice")),
    "an enormous step": (lines((7, '{"step": 1000000000000, "lr": 0.1, "examples": [1]}')), ("lacks steps: 5, 20, 21", "and 999,999,999,973 more")),
    "a step that is a float": (lines((7, '{"step": 1e12, "lr": 0.1, "examples": [1]}')), ("line 7: step is 1000000000000.0",)),
    "a step of 400 digits": (lines((7, '{"step": 1' + "0" * 400 + ', "lr": 0.1, "examples": [1]}')), ("line 7: not JSON", "of 401 digits is too large")),
    "a rate of 400 digits": (lines((7, '{"step": 5, "lr": 1' + "0" * 400 + ', "examples": [1]}')), ("line 7: not JSON", "401 digits")),
    "a rate beyond its range": (lines((7, '{"step": 5, "lr": 1e400, "examples": [1]}')), ("line 7: lr is inf",)),
    "an enormous example": (lines((7, '{"step": 5, "lr": 0.1, "examples": [9223372036854775808]}')), ("line 7: examples is not a list",)),
    "a line nested deep": (lines((7, "[" * 5000 + "]" * 5000)), ("line 7: ",)),
    "a line nested deeper": (lines((7, '{"a":' * 200_000)), ("line 7: ",)),
    "a long line": (lines((7, '{"step": 5, "lr": [' + "0.5," * 2_500_000 + '1], "examples": [1]}')), ("line 7: lr has 2500001 numbers",)),
    "a long text": (lines((7, '{"step": "' + "x" * 10_000_000 + '", "lr": 0.1, "examples": [1]}')), ("line 7: step is 'xxx",)),
    "half a surrogate pair": (lines((1, HEADER[:-1] + ', "groups": [{"params": ["\\ud800"]}]}')), ("line 1 is not a JSON object", "no valid UTF-8")),
    "an option of NaN": (lines((1, HEADER.replace('"sgd"', '"sgd", "momentum": NaN'))), ("line 1 is not a JSON object", "NaN")),
    "an option beyond its range": (lines((1, HEADER.replace('"sgd"', '"sgd", "momentum": 1e400'))), ("line 1 is not a JSON object", "1e400 is too large")),
    "missing steps": (lines((7, None), (9, None)), ("lacks steps: 5, 7", "18 of the steps 0 to 19", "every step needs its line")),
    "an early end": (lines(steps=15), ("ends before checkpoints/step-000020.safetensors", "steps 0 to 14", "--lr")),
    "a group that is not named": (
        lines((1, HEADER[:-1] + ', "groups": [{"params": ["0.weight"]}, {"params": ["0.bias"]}]}'), *(
            (k + 2, json.dumps({"step": k, "lr": [0.1, 0.2], "examples": [1]})) for k in range(20)
        )),
        ("no parameter group", "2.weight", "in one group"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD_TRAJECTORIES)
def test_a_bad_trajectory_is_named_with_its_line(wrong, make_run, influence):
    text, says = BAD_TRAJECTORIES[wrong]
    run = make_run()
    (run / "trajectory.jsonl").write_text(text)
    subject = () if wrong == "a group that is not named" else ("trajectory.jsonl",)
    start = time.process_time()
    result = influence("score", run)
    assert time.process_time() - start < 2
    refused(result, 1, *subject, *says)
    assert len(result.err) < 2000


def test_a_last_line_cut_off_is_dropped_with_a_note(make_run, influence):
    whole, cut = make_run("whole"), make_run("cut")
    (whole / "trajectory.jsonl").write_text(lines())
    (cut / "trajectory.jsonl").write_text(lines() + '{"step": 20, "lr": 0.1, "exam')
    result = influence("score", cut)
    assert result.code == 0, result.err
    assert "note: trajectory.jsonl line 22 is cut off" in result.err
    assert result.out == influence("score", whole).out != ""


def test_a_bad_trajectory_does_not_stop_what_does_not_read_it(make_run, influence):
    run = make_run()
    (run / "trajectory.jsonl").write_text("")
    for flags in (("--lr", "0.1"), ("--lr-weights", "none"), ("--method", "grad-dot")):
        assert influence("score", run, *flags).code == 0


# ---------------------------------------------------------------- the cache
@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    run = build_run(tmp_path_factory.mktemp("filled") / "run")
    with pytest.raises(SystemExit, match="0"):
        cli.app(["score", str(run), "--quiet"], prog_name="influence")
    return run


@pytest.fixture
def cached(filled, tmp_path) -> Path:
    """A run whose cache is full: a copy of its own for each test."""
    return shutil.copytree(filled, tmp_path / "run")


def units(run: Path) -> list[Path]:
    return sorted((run / ".influence").rglob("0*.safetensors"))


def test_a_cache_of_other_data_names_the_example(cached, influence):
    text = replaced(
        DEFINITION,
        (
            TRAIN,
            "data = examples(0, 20).tensors\n    data[0][4] += 1\n    return torch.utils.data.TensorDataset(*data)",
        ),
    )
    (cached / "definition.py").write_text(text)
    refused(
        influence("score", cached),
        1,
        ".influence belongs to other data",
        "example 4 of train_data()",
        "--cache DIR",
    )


def test_a_cache_of_another_loss_names_checkpoint_and_example(cached, influence):
    (cached / "definition.py").write_text(replaced(DEFINITION, (LOSS, f"{LOSS} * 2")))
    says = (
        ".influence belongs to another run",
        "first at example 0 of train_data()",
        f"checkpoints/{FIRST}",
        "cached, ",
        " now",
    )
    refused(influence("score", cached), 1, *says, "--cache DIR", "delete this one")


def test_a_cache_of_a_model_with_other_parameters_is_refused(cached, influence):
    frozen = replaced(
        DEFINITION,
        (
            MODEL,
            MODEL.replace("return ", "m = ") + "\n    m[0].requires_grad_(False)\n    return m",
        ),
    )
    (cached / "definition.py").write_text(frozen)
    refused(
        influence("score", cached),
        1,
        "belongs to another run",
        "gradients of 0.weight, 0.bias, which the model does not train",
        "--cache DIR",
    )


@pytest.mark.parametrize(
    "head", [{"format": "influence-cache", "version": 99}, {"format": "influence-cache"}]
)
def test_a_cache_of_another_version_is_refused(head, cached, influence):
    (cached / ".influence" / "cache.json").write_text(json.dumps(head))
    refused(
        influence("score", cached),
        1,
        ".influence has another version",
        f"found: version {head.get('version')!r}; expected: version {VERSION}",
        "--cache DIR",
        "delete this one",
    )


def test_a_folder_that_is_not_a_cache_is_refused_and_left_alone(make_run, influence, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.jpg").write_bytes(b"jpg")
    refused(
        influence("score", make_run(), "--cache", photos),
        1,
        "photos is not an influence cache",
        "other files",
        "--cache DIR",
    )
    assert [path.name for path in photos.iterdir()] == ["me.jpg"]


@pytest.mark.parametrize("head", ['{"format": "other"}', "{}", "{", "[]"])
def test_a_cache_with_another_head_is_refused(head, cached, influence):
    (cached / ".influence" / "cache.json").write_text(head)
    refused(influence("score", cached), 1, ".influence", "cache")


def test_a_cache_that_is_a_file_is_refused(make_run, influence, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        influence("score", make_run(), "--cache", tmp_path / "file"),
        1,
        "the cache",
        "file can't be written",
        "--cache DIR",
    )


def rename_tensors(path: Path) -> None:
    save_file(
        {f"x{key}": value for key, value in load_file(path).items()},
        path,
        {"format": "influence-unit", "forms": "{}"},
    )


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "other bytes": lambda path: path.write_bytes(b"\xff" * 99),
    "without metadata": lambda path: save_file(load_file(path), path),
    "of other tensors": rename_tensors,
    "of fewer rows": lambda path: save_file(
        {key: value[:3] for key, value in load_file(path).items()}, path, head_of(path)
    ),
}


def head_of(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as content:
        return content.metadata()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_unit_is_named_and_may_be_deleted(damage, cached, influence):
    unit = units(cached)[0]
    whole = unit.read_bytes()
    DAMAGE[damage](unit)
    refused(influence("score", cached), 1, str(unit), "is damaged", "delete it")
    unit.unlink()
    assert influence("score", cached).code == 0
    assert unit.read_bytes() == whole


HOSTILE = ['{"a": NaN}', "[" * 5000, '{"a": 1, "a": 2}', "9" * 5000, "\x00", '{"a": 1e999}']


@pytest.mark.parametrize("text", ["{", "{}", "[]", *HOSTILE])
def test_a_damaged_list_of_columns_is_named(text, cached, influence):
    path = next((cached / ".influence").rglob("columns.json"))
    path.write_text(text)
    refused(influence("score", cached), 1, str(path), "delet")


@pytest.mark.parametrize("text", ["{", "[]", "7", *HOSTILE])
def test_damaged_checkpoint_digests_are_named(text, cached, influence):
    path = cached / ".influence" / "checkpoints.json"
    path.write_text(text)
    refused(influence("score", cached), 1, str(path), "delet")


@pytest.mark.parametrize("value", ['"' + "x" * 10_000_000 + '"', "9" * 5000, "[" * 5000, "1e400"])
def test_an_enormous_value_of_a_trainer_ends_in_one_short_message(value, make_run, influence):
    run = make_run()
    trainer_folder(run, state=f'{{"log_history": [{{"step": 1, "learning_rate": {value}}}]}}')
    result = influence("score", run)
    refused(result, 1, "error: ", "checkpoint-20")
    assert len(result.err) < 5000


SIZES = ('{"forms": {}, "batches": null}', '{"forms": {"0.weight": [1, 2]}, "batches": {}}', '{"forms": {"0.weight": ["dense", -1]}, "batches": {}}', '{"forms": {}, "batches": {"a": [1.5, 2]}}')  # fmt: skip


@pytest.mark.parametrize("text", ["{", "{}", "[]", *SIZES, *HOSTILE])
def test_a_damaged_record_of_sizes_is_named(text, cached, influence):
    path = next((cached / ".influence").rglob("sizes-train.json"))
    path.write_text(text)
    refused(influence("score", cached), 1, str(path), "delete")


@pytest.mark.parametrize("names", [7, [7], {}, "ab", None])
def test_a_damaged_list_of_definitions_is_named(names, cached, influence):
    folder = next((cached / ".influence").glob("*/step-*/train"))
    digest = json.loads(next(folder.rglob("columns.json")).read_text())["definition"]
    (folder / "agrees.json").write_text(json.dumps({digest: names}))
    refused(influence("score", cached), 1, str(folder / "agrees.json"), "delete that file")


# ---------------------------------------------------------------- the disk
def fails(number: int):
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


def test_a_full_disk_says_what_frees_space_and_keeps_finished_units(
    make_run, influence, monkeypatch, tmp_path
):
    run, written, stream = make_run(), [], safetensors_io.stream_tensors

    def full_after_one(path, *content):
        if written:
            path.write_bytes(b"the first few bytes")
            fails(errno.ENOSPC)()
        written.append(path)
        stream(path, *content)

    monkeypatch.setattr(safetensors_io, "stream_tensors", full_after_one)
    refused(
        influence("score", run),
        1,
        ".influence can't be written: the disk is full",
        "bytes free",
        "--store float16",
        "--cache none",
    )
    assert len(units(run)) == 1
    assert not list((run / ".influence").rglob(".tmp-*"))
    monkeypatch.undo()
    again = influence("score", run)
    assert again.code == 0
    assert again.out == influence("score", run, "--cache", tmp_path / "other").out


def test_a_full_disk_while_the_cache_is_begun_is_a_full_disk(make_run, influence, monkeypatch):
    run = make_run()
    monkeypatch.setattr(Path, "write_bytes", fails(errno.ENOSPC))
    refused(influence("score", run), 1, "the cache", "the disk is full")


def test_a_full_disk_under_an_output_file_leaves_none(cached, influence, monkeypatch, tmp_path):
    assert influence("score", cached).code == 0  # the cache has nothing left to write
    monkeypatch.setattr(os, "fsync", fails(errno.ENOSPC))
    refused(
        influence("score", cached, "-o", tmp_path / "scores.csv"),
        1,
        "scores.csv can't be written: the disk is full",
        "-o FILE",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_stdout_is_an_error_not_a_trace(make_run):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "influence_cli", "score", make_run(), "--quiet"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: stdout can't be written: the disk is full\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "command",
    [
        ("inspect",),
        ("self",),
        ("score", "--format", "jsonl"),
        ("score", "--format", "table"),
    ],
    ids=str,
)
def test_a_full_stdout_is_an_error_of_every_command(command, cached, influence, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "__stdout__", full)
        refused(
            influence(*command[:1], cached, *command[1:]),
            1,
            "stdout can't be written: the disk is full",
        )
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_a_read_only_run_names_cache(make_run, influence, monkeypatch):
    run, mkdir = make_run(), Path.mkdir

    def read_only(path, *args, **kwargs):
        return fails(errno.EROFS)() if ".influence" in path.parts else mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(
        influence("score", run),
        1,
        "the cache",
        ".influence can't be written: Read-only file system",
        "--cache DIR",
        "--cache none",
    )
    assert influence("score", run, "--cache", "none").code == 0


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_without_write_permission_names_cache(make_run, influence):
    run = make_run()
    run.chmod(0o500)
    try:
        refused(
            influence("score", run),
            1,
            ".influence can't be written: Permission denied",
            "--cache DIR",
            "--cache none",
        )
    finally:
        run.chmod(0o700)


@pytest.mark.parametrize("moved", [False, True])
def test_a_read_only_cache_is_enough_when_nothing_is_missing(
    moved, filled, cached, influence, monkeypatch
):
    run = cached if moved else filled
    for name in ("touch", "mkdir", "write_bytes"):
        monkeypatch.setattr(Path, name, fails(errno.EROFS))
    monkeypatch.setattr(safetensors_io, "stream_tensors", fails(errno.EROFS))
    result = influence("score", run)
    assert result.code == 0, result.err
    assert result.rows


def test_a_unit_that_can_not_be_written_names_cache(make_run, influence, monkeypatch):
    monkeypatch.setattr(safetensors_io, "stream_tensors", fails(errno.EACCES))
    refused(
        influence("score", make_run()),
        1,
        ".influence can't be written: Permission denied",
        "--cache DIR",
    )


def test_an_output_that_can_not_be_written_is_named(cached, influence, monkeypatch, tmp_path):
    assert influence("score", cached).code == 0  # the cache has nothing left to write
    monkeypatch.setattr(os, "replace", fails(errno.EACCES))
    refused(
        influence("score", cached, "-o", tmp_path / "scores.csv"),
        1,
        "scores.csv can't be written: Permission denied",
        "-o FILE",
    )
    assert not (tmp_path / "scores.csv").exists()


# ---------------------------------------------------------------- memory
def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")


@pytest.mark.parametrize("where", ["probe", "visit"])
def test_out_of_memory_in_a_batch_names_batch_size_and_layers(
    where, make_run, influence, monkeypatch
):
    monkeypatch.setattr(Capture, where, out_of_memory)
    refused(
        influence("score", make_run()),
        1,
        "out of memory",
        "batch of",
        "Tried to allocate 2.00 GiB",
        "--batch-size",
        "--layers",
    )


def test_out_of_memory_inside_the_loss_is_out_of_memory(make_run, influence):
    run = make_run()
    (run / "definition.py").write_text(
        replaced(DEFINITION, (LOSS, f"torch.empty(2**50)\n    {LOSS}"))
    )
    refused(influence("score", run), 1, "out of memory", "--batch-size")


@pytest.mark.parametrize("examples", [1, 6])
def test_out_of_memory_while_a_batch_is_moved_is_out_of_memory(
    examples, make_run, influence, monkeypatch
):
    to = batches.to
    monkeypatch.setattr(
        batches,
        "to",
        lambda batch, *args: out_of_memory() if len(batch[0]) >= examples else to(batch, *args),
    )
    refused(influence("score", make_run()), 1, "out of memory", "--batch-size")


def test_out_of_memory_while_the_model_is_moved_names_the_device(make_run, influence, monkeypatch):
    run = make_run()
    monkeypatch.setattr(nn.Module, "to", out_of_memory)
    refused(
        influence("score", run, "--device", "cpu"),
        1,
        "the model",
        "memory of cpu",
        "Tried to allocate 2.00 GiB",
        "--device",
    )


def test_out_of_memory_while_scores_are_summed_is_an_error(cached, influence, monkeypatch):
    monkeypatch.setattr("influence_cli.methods.inner_products.inner_products", out_of_memory)
    refused(influence("score", cached), 1, "out of memory")


def test_a_model_too_large_for_memory_is_refused(make_run, influence):
    run = make_run(definition=replaced(DEFINITION, (MODEL, "return nn.Linear(4, 3)")))
    (run / "definition.py").write_text(
        replaced(DEFINITION, (MODEL, "return nn.Linear(2**24, 2**24)"))
    )
    refused(influence("score", run), 1, "allocate memory")


def test_init_removes_the_temporary_file_of_a_killed_init(tmp_path, influence):
    name = f".tmp-{socket.gethostname()}-{'0' * 16}-definition.py"
    (tmp_path / name).write_text("import")
    assert influence("init", tmp_path).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["definition.py"]


def test_init_on_a_full_disk_leaves_nothing(tmp_path, influence, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "write_text", full)
    result = influence("init", tmp_path / "new" / "deep")
    assert result.code == 1
    assert "the disk is full" in result.err
    assert list(tmp_path.iterdir()) == []
