"""Every bad command line, one flag wrong at a time: its own message, exit code 2, nothing on stdout. Flags are refused, never adjusted."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from influence_cli.cli import init
from tests.conftest import DEFINITION
from tests.refusals import refused, replaced

UNLABELLED = DEFINITION[: DEFINITION.index("def label(")]


@pytest.fixture
def run(make_run) -> Path:
    return make_run(steps=(10, 20, 30))


# ---------------------------------------------------------------- one value, wrong by itself
WRONG = {
    "--method tracing": ("--method tracing: unknown", "tracin, grad-dot, grad-cos"),
    "--format nonsense": ("--format nonsense: unknown", "table, csv, tsv, jsonl, parquet"),
    "--precision float8": ("--precision float8: unknown", "float32, float64, bfloat16"),
    "--precision float16": ("--precision float16: unknown", "float32, float64, bfloat16"),
    "--store double": ("--store double: unknown", "float64, float32, float16, bfloat16"),
    "--device tpu": ("--device tpu: unknown", "auto, cpu, cuda, cuda:N or mps"),
    "--device cuda:x": ("--device cuda:x: unknown", "auto, cpu, cuda, cuda:N or mps"),
    "--device meta": ("--device meta: unknown", "auto, cpu, cuda, cuda:N or mps"),
    "--lr-weights half": ("--lr-weights half: unknown", "point, segment, none"),
    "--lr-weights segment": (
        "--lr-weights segment needs a trajectory.jsonl",
        "--trajectory",
        "--lr-weights point",
    ),
    "--lr 0": ("--lr 0", "above 0"),
    "--lr -0.1": ("--lr -0.1", "above 0"),
    "--lr nan": ("--lr nan", "above 0"),
    "--lr inf": ("--lr inf", "above 0"),
    "--top 0": ("--top 0", "a number from 1, or all"),
    "--top -3": ("--top -3", "a number from 1, or all"),
    "--top 2.5": ("--top 2.5", "a number from 1, or all"),
    "--top some": ("--top some", "a number from 1, or all"),
    "--top \u00b2": ("--top \u00b2", "a number from 1, or all"),
    "--batch-size 0": ("--batch-size 0", "a number from 1, or auto"),
    "--batch-size many": ("--batch-size many", "a number from 1, or auto"),
    "--batch-size \u00b2": ("--batch-size \u00b2", "a number from 1, or auto"),
    "--by word": ("--by word", "tracin", "expected: checkpoint, layer"),
    "--by train": ("--by train", "tracin", "expected: checkpoint, layer"),
    "--steps 40": ("--steps 40: no checkpoint has such a step", "10, 20, 30"),
    "--steps 10,25": ("--steps 25: no checkpoint has such a step", "10, 20, 30"),
    "--steps 11:20": ("--steps 11:20: no checkpoint has such a step", "10, 20, 30"),
    "--steps last": ("--steps 'last' can't be read at 'last'", "100,200", "100:500"),
    "--steps 10,": ("--steps '10,' can't be read at ''", "100,200"),
    "--steps 1:2:3": ("--steps '1:2:3' can't be read", "100,200"),
    "--layers head": (
        "--layers 'head' matches no trained parameter or module",
        "0.weight, 0.bias, 2.weight, 2.bias",
        "inspect",
    ),
    "--layers !head": ("--layers 'head' matches no trained parameter", "0.weight"),
    "--layers !*": ("--layers !* leaves no parameter", "0.weight"),
    "--definition nowhere.py": ("--definition nowhere.py: no such file", "definition.py"),
    "--checkpoints nowhere": ("--checkpoints nowhere: no such folder", "checkpoints"),
    "--trajectory nowhere.jsonl": ("--trajectory nowhere.jsonl: no such file", "trajectory.jsonl"),
    "--group-by nowhere.txt": (
        "--group-by nowhere.txt",
        "No such file",
        "one group name per training example",
    ),
    "-o nowhere/scores.csv": ("-o nowhere/scores.csv: its folder does not exist",),
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_value_names_its_flag_and_what_was_expected(flags, run, influence):
    refused(influence("score", run, *flags.split()), 2, *WRONG[flags])


@pytest.mark.parametrize("command", ["score", "self", "cache", "inspect"])
@pytest.mark.parametrize(
    "flags",
    [
        "--precision float8",
        "--store double",
        "--device tpu",
        "--batch-size 0",
        "--steps 40",
        "--layers head",
        "--train 99",
    ],
)
def test_a_shared_flag_is_refused_alike_by_every_command(flags, command, run, influence):
    refused(influence(command, run, *flags.split()), 2, flags.split()[0], *WRONG.get(flags, ())[:1])


@pytest.mark.parametrize("flags", ["--lr fast", "--nonsense", "--top", "--batch-size"])
def test_what_the_command_line_itself_can_not_read_is_refused(flags, run, influence):
    result = influence("score", run, *flags.split())
    assert result.code == 2
    assert result.out == ""
    assert flags.split()[0] in result.err
    assert "Traceback" not in result.err


def test_an_unknown_command_is_refused(influence):
    result = influence("scores")
    assert result.code == 2
    assert result.out == ""
    assert "scores" in result.err


@pytest.mark.parametrize("command", ["score", "self", "cache", "inspect"])
def test_a_run_that_is_not_there_is_named(command, influence, tmp_path):
    refused(
        influence(command, tmp_path / "nowhere"),
        2,
        "no run at",
        "nowhere",
        "definition.py and checkpoints/",
        "influence init",
    )


# ---------------------------------------------------------------- ids
IDS = {
    "20": ("20: out of range", "20 examples (0 to 19)"),
    "3,99": ("99: out of range", "20 examples (0 to 19)"),
    "15:21": ("15:21: out of range", "20 examples (0 to 19)"),
    "20:": ("20:: out of range", "20 examples (0 to 19)"),
    "5:5": ("5:5: an empty range", "half-open"),
    "7:3": ("7:3: an empty range", "half-open"),
    "-1": ("'-1' is not an id or a range", "expected: ids like 0,5,10:20"),
    "one": ("'one' is not an id or a range", "expected: ids like 0,5,10:20"),
    "1.5": ("'1.5' is not an id or a range", "expected: ids like 0,5,10:20"),
    "\u00b2": ("'\u00b2' is not an id or a range", "expected: ids like 0,5,10:20"),
    ",": ("no ids", "expected: ids like 0,5,10:20"),
    "@nowhere.txt": ("@nowhere.txt", "No such file", "a text file of ids"),
    "99999999999999999999": ("out of range", "(0 to 19)"),
}


@pytest.mark.parametrize("flag", ["--train", "--queries"])
@pytest.mark.parametrize("spec", IDS)
def test_bad_ids_name_flag_dataset_and_size(spec, flag, make_run, influence):
    run = make_run(definition=replaced(DEFINITION, ("examples(1, 6)", "examples(1, 20)")))
    source = (
        (f"{flag[2:].replace('queries', 'query')}_data() has",)
        if "range" in IDS[spec][0] and "out of" in IDS[spec][0]
        else ()
    )
    refused(influence("score", run, flag, spec), 2, f"{flag}", *IDS[spec], *source)


@pytest.mark.parametrize("flag", ["--train", "--queries"])
def test_bad_ids_in_a_file_name_flag_and_id(flag, run, influence, tmp_path):
    (tmp_path / "ids.txt").write_text("0, 1  # two good ones\n77\n")
    refused(
        influence("score", run, flag, f"@{tmp_path / 'ids.txt'}"),
        2,
        f"{flag} 77: out of range",
        "examples (0 to ",
    )


def test_a_file_of_ids_that_is_no_text_is_refused(run, influence, tmp_path):
    (tmp_path / "ids.bin").write_bytes(b"\xff\xfe\x00")
    refused(
        influence("score", run, "--train", f"@{tmp_path / 'ids.bin'}"),
        2,
        "--train @",
        "ids.bin",
        "a text file of ids",
    )


def test_an_empty_file_of_ids_is_refused(run, influence, tmp_path):
    (tmp_path / "ids.txt").write_text("# none today\n")
    refused(
        influence("score", run, "--train", f"@{tmp_path / 'ids.txt'}"), 2, "--train @", "no ids"
    )


@pytest.mark.parametrize("command", ["score", "cache", "inspect"])
def test_both_ids_from_one_stdin_are_refused(command, run, influence):
    refused(
        influence(command, run, "--queries", "-", "--train", "-", stdin="1\n"),
        2,
        "--queries - and --train -",
        "stdin",
        "@ids.txt",
    )


def test_bad_ids_from_a_pipe_are_named(run, influence):
    refused(
        influence("score", run, "--train", "-", stdin="1\n55\n"),
        2,
        "--train 55: out of range",
        "20 examples",
    )


def test_an_empty_pipe_is_refused(run, influence):
    refused(
        influence("score", run, "--train", "-", stdin=""),
        2,
        "--train -: no ids",
        "expected: ids like",
    )


# ---------------------------------------------------------------- flags that contradict each other
CONFLICTS = {
    "--lr 0.1 --lr-weights point": ("--lr and --lr-weights both", "give one"),
    "--method grad-dot --lr 0.1": (
        "--lr does not apply to --method grad-dot",
        "no learning-rate weights",
    ),
    "--method grad-cos --lr-weights none": (
        "--lr-weights does not apply to --method grad-cos",
        "no learning-rate weights",
    ),
    "--cache none --store float16": ("--cache none", "--store", "give one"),
    "--method grad-dot --steps 10,20": (
        "--method grad-dot reads one checkpoint",
        "--steps 10,20 selects 2",
        "name one step",
    ),
    "--method grad-cos --steps 10:": (
        "--method grad-cos reads one checkpoint",
        "--steps 10: selects 3",
        "name one step",
    ),
}


@pytest.mark.parametrize("flags", CONFLICTS)
def test_contradicting_flags_are_refused(flags, run, influence):
    refused(influence("score", run, *flags.split()), 2, *CONFLICTS[flags])
    assert not list(run.rglob("0*.safetensors")), "work was done before the flags were refused"


@pytest.mark.parametrize(
    "command",
    [
        "self",
        "inspect",
    ],
)
def test_two_sources_of_rates_are_refused_by_every_command(command, run, influence):
    refused(
        influence(command, run, "--lr", "0.1", "--lr-weights", "none"),
        2,
        "--lr and --lr-weights both",
        "give one",
    )


def test_a_cache_of_nothing_is_refused(run, influence):
    refused(
        influence("cache", run, "--cache", "none"),
        2,
        "--cache none stores nothing",
        "name a folder",
    )


# ---------------------------------------------------------------- learning rates
@pytest.mark.parametrize("command", ["score", "self"])
def test_a_missing_learning_rate_names_lr_and_where_it_was_looked_for(command, run, influence):
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        save_file(load_file(path), path)
    says = (
        "no learning rate for checkpoints/step-000020.safetensors, checkpoints/step-000030.safetensors",
        "trajectory.jsonl",
    )
    refused(
        influence(command, run),
        2,
        *says,
        "metadata",
        "trainer_state.json",
        "--lr X",
        "--lr-weights none",
    )
    assert not list(run.rglob("0*.safetensors")), "work was done before the rates were missed"
    assert influence(command, run, "--lr", "0.1").code == 0


def test_a_missing_learning_rate_does_not_stop_an_inspection(run, influence):
    for path in (run / "checkpoints").iterdir():
        save_file(load_file(path), path)
    result = influence("inspect", run)
    assert result.code == 0, result.err
    assert "no learning rate for" in result.err
    assert "--lr X" in result.err


# ---------------------------------------------------------------- groups and output
def test_groups_by_label_without_a_label_function_are_refused(make_run, influence):
    result = influence("score", make_run(definition=UNLABELLED), "--group-by", "label")
    refused(result, 2, "--group-by label", "definition.py has no label(example)", "--group-by FILE")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\n" * 19, ("has 19 lines", "one per training example, 20")),
        ("a\n" * 21, ("has 21 lines", "one per training example, 20")),
        ("", ("has 0 lines", "one per training example, 20")),
        ("a\n" * 18 + "\n \n", ("empty lines 19, 20", "a group name on each line")),
    ],
)
def test_a_group_file_that_does_not_fit_is_refused(text, says, run, influence, tmp_path):
    (tmp_path / "groups.txt").write_text(text)
    refused(
        influence("score", run, "--group-by", tmp_path / "groups.txt"),
        2,
        "--group-by",
        "groups.txt",
        *says,
    )


def test_a_group_file_that_is_no_text_is_refused(run, influence, tmp_path):
    (tmp_path / "groups.bin").write_bytes(b"\xff\xfe\x00")
    refused(
        influence("score", run, "--group-by", tmp_path / "groups.bin"),
        2,
        "--group-by",
        "groups.bin",
        "one group name per training example",
    )


@pytest.mark.parametrize("command", ["score", "self"])
def test_an_output_that_is_a_folder_is_refused(command, run, influence, tmp_path):
    refused(influence(command, run, "-o", tmp_path), 2, f"-o {tmp_path} is a folder")


def test_parquet_without_its_library_says_what_to_install(run, influence, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(
        influence("score", run, "--format", "parquet"),
        2,
        "--format parquet needs pyarrow",
        "pip install",
    )


# ---------------------------------------------------------------- the machine
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_where_there_is_none_is_refused(device, run, influence):
    refused(
        influence("score", run, "--device", device),
        2,
        f"--device {device}",
        "0 CUDA devices",
        "--device auto",
    )


def test_more_cuda_devices_than_there_are_is_refused(run, influence):
    refused(
        influence("score", run, "--device", "cuda:99"),
        2,
        "--device cuda:99",
        f"{torch.cuda.device_count()} CUDA devices",
        "--device auto",
    )


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="MPS is here")
def test_mps_where_there_is_none_is_refused(run, influence):
    refused(
        influence("score", run, "--device", "mps"),
        2,
        "--device mps: not available",
        "--device auto",
    )


# ---------------------------------------------------------------- init
def test_init_never_overwrites(run, influence):
    refused(influence("init", run), 2, "definition.py is there already", "another folder")
    assert (run / "definition.py").read_text() == DEFINITION


def test_init_names_its_templates(influence, tmp_path):
    refused(
        influence("init", tmp_path / "new", "--template", "gan"),
        2,
        "--template gan: unknown",
        *init.TEMPLATES,
    )
    assert not (tmp_path / "new").exists()


def test_init_into_a_file_is_refused(influence, tmp_path):
    (tmp_path / "file").write_text("")
    refused(influence("init", tmp_path / "file"), 2, "can't be written")


def test_debug_shows_the_trace_of_a_refused_flag_too(run, influence):
    result = influence("score", run, "--steps", "40", "--debug")
    assert result.code == 2
    assert result.out == ""
    assert "Traceback (most recent call last)" in result.err
    assert "\nerror: --steps 40: no checkpoint has such a step" in result.err
