"""Whether CUDA registers a sealed memfd that is mapped read-only, and how much faster copies
get."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZE = 256 << 20
REPEATS = 8
FLAGS = {"default": 0, "portable": 1, "read_only": 8, "portable | read_only": 9}
"""Flags of cudaHostRegister."""
F_SEAL_FUTURE_WRITE = 0x0010


def registration() -> dict[str, Any]:
    """Every kind of mapping with every flag: bytes/s from host to device, registered and not."""
    torch.zeros(1, device="cuda")
    found: dict[str, Any] = {"ok": True, "h2d_gb_s": {}}
    pinned = torch.empty(SIZE, dtype=torch.uint8, pin_memory=True).fill_(7)
    found["h2d_gb_s"]["pinned"] = rates(pinned)
    found["h2d_gb_s"]["pageable"] = rates(torch.empty(SIZE, dtype=torch.uint8).fill_(7))
    for name, sealed, writable in (
        ("sealed memfd, mapped read-only", True, False),
        ("unsealed memfd, mapped read-only", False, False),
        ("unsealed memfd, mapped read-write", False, True),
    ):
        with mapping(sealed=sealed, writable=writable) as memory:
            found[name] = {flag: register(memory, bits) for flag, bits in FLAGS.items()}
    return found


@contextlib.contextmanager
def mapping(*, sealed: bool, writable: bool) -> Iterator[Tensor]:
    """What a client of the daemon maps; the daemon's own mapping stays writable."""
    descriptor = os.memfd_create("kvshare-gpu-check", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    daemon = mmap.mmap(descriptor, SIZE)
    np.frombuffer(daemon, dtype=np.uint8)[:] = 7
    if sealed:
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    client = mmap.mmap(descriptor, SIZE, mmap.MAP_SHARED, access)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors
        yield torch.from_numpy(np.frombuffer(client, dtype=np.uint8))
    os.close(descriptor)  # the mappings end with the process


def register(memory: Tensor, flags: int) -> dict[str, Any]:
    """The status of cudaHostRegister and, if it is 0, the rate of copies from there."""
    runtime = torch.cuda.cudart()
    began = time.perf_counter()
    try:
        status = int(runtime.cudaHostRegister(memory.data_ptr(), SIZE, flags))
    except RuntimeError as error:
        return {"registered": False, "status": str(error)}
    seconds = time.perf_counter() - began
    if status:
        forget_error()
        return {"registered": False, "status": status}
    try:
        return {
            "registered": True,
            "register_s": seconds,
            "is_pinned": bool(memory.is_pinned()),
            "h2d_gb_s": rates(memory),
            "right": bool((memory.to("cuda") == 7).all()),
        }
    finally:
        runtime.cudaHostUnregister(memory.data_ptr())


def forget_error() -> None:
    """Clear the error that a refused registration leaves for the next launch."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).cudaGetLastError()
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def rates(source: Tensor) -> dict[str, float]:
    """GB/s from host to device on a stream of its own, whole and in pieces of 2 MiB."""
    target = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
    return {
        "whole": rate(source, target, SIZE),
        "2 MiB pieces": rate(source, target, 2 << 20),
    }


def rate(source: Tensor, target: Tensor, piece: int) -> float:
    with torch.cuda.stream(torch.cuda.Stream()):
        for warm in (True, False):
            repeats = 1 if warm else REPEATS
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(repeats):
                for start in range(0, SIZE, piece):
                    part = slice(start, start + piece)
                    target[part].copy_(source[part], non_blocking=True)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    return round(SIZE * REPEATS / seconds / 1e9, 2)
