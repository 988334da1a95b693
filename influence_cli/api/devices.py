"""Finds the device that a run computes on."""

import torch

from influence_cli.errors import UsageProblem
from influence_cli.parallel.ranks import Place


def check_tf32(tf32: bool, device: torch.device) -> None:
    """Raises UsageProblem for TF32 on another device than an NVIDIA GPU that has it."""
    if tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UsageProblem(
            f"--precision tf32: {device} does not multiply in TF32",
            "expected: --device cuda, and an NVIDIA GPU from compute capability 8.0 (Ampere) on",
            "--precision float32 computes all bits",
        )


def find_device(name: str, place: Place) -> torch.device:
    """`--device`; of several ranks each has the CUDA device of its local number. Raises
    UsageProblem where it is not there.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name == "cuda" and place.count > 1:
        device_count = torch.cuda.device_count()
        if device_count not in (0, 1) and place.local >= device_count:
            raise UsageProblem(
                f"{place.beside} ranks on this machine, which has {device_count} CUDA devices",
                f"--nproc-per-node {device_count}, one a device",
            )
        # where each rank is shown one device, that is 0
        name = f"cuda:{place.local if device_count > 1 else 0}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageProblem(f"--device {name}: unknown", "expected: auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageProblem(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that "
            "torch can use",
            f"torch {torch.__version__}; --device auto uses the best device of this machine",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageProblem(
            "--device mps: not available on this machine",
            "--device auto uses the best device of this machine",
        )
    return device
