"""Autocast by device: the same choice for training, validation and inference."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None for fp32. `auto` takes bf16 only where the hardware computes it natively."""
    if precision == "fp32":
        return None
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # emulated bf16 on a CPU without these instructions is several times slower than fp32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else None


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast context of ``train.precision`` on a device; does nothing for fp32."""
    dtype = autocast_dtype(precision, device)
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()
