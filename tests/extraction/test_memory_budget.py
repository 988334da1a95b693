"""The bytes of disk and memory that a request needs, and the sizes of batches and units."""

import json

import pytest
import torch

from influence_cli.cache.identity import Settings
from influence_cli.extraction import memory_budget
from influence_cli.extraction.memory_budget import (
    MemoryBudget,
    SizeRecord,
    default_batch,
    stored_bytes,
)
from influence_cli.gradients.forms import Dense, Factors
from influence_cli.gradients.sparse_forms import EmbeddingRows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COLUMNS = ["weight", "bias"]
# as stored: 12 float32 numbers per example, and 3
WEIGHT, BIAS = Dense((4, 3), torch.ones(2, 12)), Dense((3,), torch.ones(2, 3))


def budget(device=CPU, storage_dtype=torch.float32, batch_size=None, examples=10_000):
    return MemoryBudget(
        Settings(torch.float32, storage_dtype),
        device,
        None,
        batch_size,
        lambda split, columns: ({"weight": WEIGHT, "bias": BIAS}, 100.0),
        lambda split: examples,
    )


def test_values_need_their_bytes_and_memory_for_a_batch_and_two_units():
    # 16 bytes per example, 8 per norm, and the gradients
    stored = 16 + 2 * 8 + 15 * 4
    # a batch of 7; one example takes its activations twice, and its gradients
    working = 7 * (2 * 100 + 15 * 4)
    of_seven = budget(batch_size=7)
    assert of_seven.needs("train", COLUMNS, 3) == (3 * stored, working + 3 * stored)
    assert of_seven.needs("train", COLUMNS, 20_000) == (20_000 * stored, working + 8192 * stored)
    small = budget(batch_size=7, examples=50)  # a unit has at most the examples of the split
    assert small.needs("train", COLUMNS, 200) == (200 * stored, working + 50 * stored)


def test_norms_need_the_bytes_of_numbers_and_the_memory_of_a_batch():
    working = 7 * (2 * 100 + 15 * 4)
    assert budget(batch_size=7).needs("train", COLUMNS, 5, "norms") == (5 * (16 + 16), working)


def test_a_batch_on_a_gpu_takes_no_host_memory(monkeypatch):
    monkeypatch.setattr(memory_budget, "free_cuda_bytes", lambda device: 1 << 30)
    assert budget(CUDA).needs("train", COLUMNS, 5, "norms") == (160, 0)


@pytest.mark.parametrize(
    ("storage_dtype", "gradients"),
    [(torch.float32, 60), (torch.float64, 120), (torch.float16, 30 + 8), (torch.int8, 15 + 8)],
)
def test_a_scale_per_row_is_stored_beside_small_numbers(storage_dtype, gradients):
    disk_bytes, _ = budget(storage_dtype=storage_dtype).needs("train", COLUMNS, 10)
    assert disk_bytes == 10 * (32 + gradients)


def test_a_tensor_that_a_layer_and_its_bias_share_is_counted_once():
    left, right = torch.ones(2, 1, 3), torch.ones(2, 1, 4)
    forms = {
        "weight": Factors((3, 4), left, right),
        "bias": Dense((3,), left.flatten(1)),
        "other": BIAS,
    }
    assert stored_bytes(forms, 1.0, 0) == {
        "weight": ("factors", (3 + 4) * 4),
        "bias": ("shared", 0),
        "other": ("dense", 3 * 4),
    }


def test_only_numbers_are_stored_in_another_format():
    # an example has two rows of three numbers, and whole numbers of 8 bytes: ids and offsets
    rows = EmbeddingRows(
        (9, 3), torch.tensor([0, 5, 2, 5]), torch.ones(4, 3), torch.tensor([0, 2, 4])
    )
    assert stored_bytes({"table": rows}, 0.5, 4) == {
        "table": ("rows", 2 * (3 * 2 + 4) + 2 * 8 + 3 * 8 // 2)
    }


@pytest.mark.parametrize(
    ("working", "free", "examples"),
    [(1, 1 << 40, 4096), (1 << 20, 1 << 30, 256), (3 << 20, 1 << 30, 64), (1 << 40, 1 << 30, 1)],
)
def test_a_batch_on_a_gpu_takes_a_quarter_of_its_free_memory(working, free, examples, monkeypatch):
    monkeypatch.setattr(memory_budget, "free_cuda_bytes", lambda device: free)
    assert default_batch(working, CUDA) == examples


@pytest.mark.parametrize(
    ("working", "examples"), [(0, 1024), (384 << 10, 1024), (385 << 10, 512), (1 << 40, 1)]
)
def test_a_batch_on_a_cpu_takes_a_fixed_number_of_bytes(working, examples):
    assert default_batch(working, CPU) == examples


@pytest.mark.parametrize(
    ("size", "examples"), [(1, 4096), (32 << 10, 4096), ((32 << 10) + 1, 2048)]
)
def test_a_unit_has_at_most_128_mib_of_gradients(size, examples):
    assert SizeRecord(None, {"weight": ("dense", size)}).unit_examples(["weight"]) == examples


def test_a_record_on_disk_is_used_again(tmp_path):
    """The keys of batches stay the same, or a resumed command would compute other batches."""
    content = {"forms": {"weight": ["dense", 48]}, "batches": {"e6ef59bce9fe": [32, 260]}}
    (tmp_path / "sizes-train.json").write_text(json.dumps(content))
    record = SizeRecord.open(tmp_path, "train")
    assert record.has_batch(["weight"]) and record.batch(["weight"]) == 32
    assert record.working_bytes(["weight"]) == 260 and record.example_bytes(["weight"]) == 48
