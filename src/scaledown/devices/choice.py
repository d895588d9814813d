"""Chooses the device and the dtype that a model runs with."""

import os
from typing import TYPE_CHECKING, Any

from scaledown.errors import ModelError

if TYPE_CHECKING:
    import torch


def same_bits() -> None:
    """Make float32 products on a CPU independent of the number of threads, by MKL's strict mode.

    MKL reads the variable before its first product. A value that the user has set stays.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def choose_device(name: str) -> str:
    """Choose the device to run on.

    Args:
        name: cpu, cuda, cuda:N, mps, or auto for the best one. Under torchrun, `auto` and `cuda` are the GPU
            of this process.

    Returns:
        `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        ModelError: This machine has no such device.
    """
    import torch

    if name in {"auto", "cuda"} and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    if name == "auto":
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"--device {name}: use auto, cpu, cuda, cuda:N or mps") from None
    missing = (
        (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count())
        or (device.type == "mps" and not torch.backends.mps.is_available())
        or device.type not in {"cpu", "cuda", "mps"}
    )
    if missing:
        raise ModelError(f"--device {name}: this machine has no such device; use --device auto")
    return name


def dtype_to_train(name: str, device: str) -> "torch.dtype":
    """Return the dtype for training.

    Args:
        name: `auto`, `float32`, `bfloat16` or `float16`. `auto` is bfloat16 on a CUDA GPU or a CPU with
            instructions for it, else float32.
        device: `cpu`, `cuda`, `cuda:N` or `mps`.
    """
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    is_fast = device.startswith(("cuda", "cpu")) and not is_slow_in_bfloat16(device)
    return torch.bfloat16 if is_fast else torch.float32


def dtype_to_run(name: str, device: str) -> "torch.dtype":
    """Return the dtype for inference.

    Args:
        name: As for `dtype_to_train`, but `auto` is float16 on a GPU that emulates bfloat16.
        device: `cpu`, `cuda`, `cuda:N` or `mps`.
    """
    import torch

    if name == "auto" and emulates_bfloat16(device):
        return torch.float16
    return dtype_to_train(name, device)


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products in bfloat16: AVX512-BF16 or AMX.

    Others emulate it, which takes up to 40 times as long.
    """
    found = _capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def has_amx() -> bool:
    """Whether this processor multiplies tiles in bfloat16 (Intel AMX)."""
    return bool(_capabilities().get("amx_bf16"))


def _capabilities() -> dict[str, Any]:
    """Return the instructions of this processor, by torch's names; empty if this torch does not list them."""
    import torch

    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def is_slow_in_bfloat16(device: str) -> bool:
    """Whether a CPU or GPU has no instructions for products in bfloat16."""
    return emulates_bfloat16(device) or (device == "cpu" and not multiplies_bfloat16())


def emulates_bfloat16(device: str) -> bool:
    """Whether a device is a GPU of a compute capability below 8 (V100, T4), on which bfloat16 is slow."""
    import torch

    return (
        device.startswith("cuda")
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) < (8, 0)
    )
