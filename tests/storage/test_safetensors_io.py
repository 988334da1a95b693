"""The reader and the writer of safetensors files agree with the safetensors library."""

import json
import os
import time

import pytest
import safetensors.torch
import torch

from influence_cli.storage.checksums import digest_tensors
from influence_cli.storage.safetensors_io import (
    CODES,
    TensorFile,
    TruncatedFile,
    read_head,
    read_tensors,
    write_tensors,
)


def sample() -> dict[str, torch.Tensor]:
    """One tensor of each dtype, a scalar and an empty one."""
    numbers = torch.arange(6).reshape(2, 3)
    return {f"of {code}": numbers.to(dtype) for dtype, code in CODES.items()} | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


def same(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name].dtype == value.dtype
        assert values[name].shape == value.shape
        assert torch.equal(as_bytes(values[name]), as_bytes(value))


def as_bytes(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("direct", [False, True])
def test_the_library_reads_what_we_write(direct, tmp_path):
    write_tensors(tmp_path / "x", sample(), {"step": "3"}, direct)
    same(safetensors.torch.load_file(tmp_path / "x"), sample())
    with safetensors.safe_open(tmp_path / "x", "pt") as content:
        assert content.metadata()["step"] == "3"


def test_we_read_what_the_library_writes(tmp_path):
    safetensors.torch.save_file(sample(), tmp_path / "x", {"step": "3"})
    same(read_tensors(tmp_path / "x"), sample())
    with TensorFile(tmp_path / "x") as file:
        assert file.metadata["step"] == "3"


def test_equal_tensors_give_equal_bytes(tmp_path):
    for name in "ab":
        write_tensors(tmp_path / name, sample(), {"one": "1", "two": "2"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_checksum_ignores_metadata_and_alignment(tmp_path):
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    write_tensors(tmp_path / "ours", tensors, {"learning_rate": "0.1"})
    safetensors.torch.save_file(tensors, tmp_path / "library", {"learning_rate": "0.2"})
    assert digest_tensors(tmp_path / "ours") == digest_tensors(tmp_path / "library")
    write_tensors(tmp_path / "other", tensors | {"b": torch.tensor([4.0])}, {})
    assert digest_tensors(tmp_path / "other") != digest_tensors(tmp_path / "ours")


def entry(start: int, stop: int, shape=(1,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def write_raw(path, head, content: bytes) -> None:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def test_a_forked_process_reads_into_memory_of_its_own(tmp_path):
    for name, value in (("parent", 1.0), ("child", 2.0)):
        write_tensors(tmp_path / name, {"a": torch.full((1000,), value)}, {})
    read_tensors(tmp_path / "parent")  # its block is free now, in both processes
    child = os.fork()
    if not child:
        kept = read_tensors(tmp_path / "child")
        (tmp_path / "done").touch()
        time.sleep(0.5)
        os._exit(0 if kept["a"].unique().tolist() == [2.0] else 1)
    while not (tmp_path / "done").exists():
        time.sleep(0.01)
    assert read_tensors(tmp_path / "parent")["a"].unique().tolist() == [1.0]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_tensor_that_is_not_aligned_is_read(tmp_path):
    values = torch.tensor([1.5, -2.0])
    for pad in range(8):  # of the header, so that the tensor starts at each remainder
        text = json.dumps({"a": entry(0, 8, (2,))}).encode() + b" " * pad
        write_raw(tmp_path / "x", text, values.numpy().tobytes())
        assert torch.equal(read_tensors(tmp_path / "x")["a"], values)


MALFORMED = {
    "no JSON": (b"{", b""),
    "a list": ([], b""),
    "an entry without offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "an unknown dtype": ({"a": entry(0, 4, dtype="F7")}, b"1234"),
    "another size than its shape": ({"a": entry(0, 4, (2,))}, b"1234"),
    "a negative offset": ({"a": entry(-4, 0)}, b""),
    "a shape that is an object": (
        {"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}},
        b"1234",
    ),
    "a shape that is a text": (
        {"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}},
        b"1234",
    ),
    "metadata that are a list": ({"__metadata__": [], "a": entry(0, 4)}, b"1234"),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 12)}, b"1234" * 3),
    "an overlap": ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"),
    "bytes after its last tensor": ({"a": entry(0, 4)}, b"12345"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused(case, tmp_path):
    write_raw(tmp_path / "x", *MALFORMED[case])
    with pytest.raises(ValueError, match=r"header is invalid|after its last tensor") as raised:
        TensorFile(tmp_path / "x")
    assert not isinstance(raised.value, TruncatedFile)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    write_raw(tmp_path / "x", {"a": entry(0, 8, (2,))}, b"12345678")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:kept])
    with pytest.raises(TruncatedFile):
        TensorFile(tmp_path / "x")


@pytest.mark.parametrize("number", ["-0.0", "0.0", "true", '"0"'])
def test_a_shape_or_an_offset_that_is_not_whole_is_refused(number):
    head = '{"a": {"dtype": "F32", "shape": [0], "data_offsets": [NUMBER, 0]}}'
    head = head.replace("NUMBER", number)
    with pytest.raises(ValueError, match="not whole"):
        read_head(head.encode(), 0, 0)
