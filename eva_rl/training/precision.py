"""Which device and which arithmetic a run uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from eva_rl.errors import UserError
from eva_rl.settings import check_precision


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda` (also `cuda:1`), or `auto`: CUDA where there is one.

    Raises:
        UserError: if the device is unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device must be cpu, cuda or auto, got {name}.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be cpu, cuda or auto, got {name}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name} was given, but this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def resolved(precision: str, device: torch.device) -> str:
    """`float32` or `bfloat16`: what `autocast` computes in."""
    if precision == "auto":
        return "bfloat16" if _has_bfloat16(device) else "float32"
    return precision


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context the forward pass runs in: `float32`, `bfloat16`, or `auto`.

    `auto` takes bfloat16 where the processor multiplies it in hardware: CUDA from Ampere on, and CPUs with AMX or
    AVX-512 BF16. Elsewhere it takes float32, as emulated bfloat16 is several times slower there.
    """
    check_precision(precision)
    return torch.autocast(device.type, torch.bfloat16) if resolved(precision, device) == "bfloat16" else nullcontext()


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
