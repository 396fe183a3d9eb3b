# SPDX-License-Identifier: Apache-2.0
"""A cache's settings and buffers in a file."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import torch

from sparsek_kernels.cache.layout import Buffers, CacheSettings

FORMAT = 1


def write_file(path: str | os.PathLike[str], settings: CacheSettings, buffers: Buffers) -> None:
    """The file appears complete or not at all."""
    # Copies: what is saved of a view would be the whole memory behind it.
    tensors = {name: tensor.clone() for name, tensor in buffers.tensors().items()}
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        torch.save({"format": FORMAT, "settings": asdict(settings), "buffers": tensors}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str], device: torch.device | str) -> tuple[CacheSettings, Buffers]:
    """What `write_file` wrote. Executes nothing from the file. Raises ValueError where it is no such file."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        settings, buffers = CacheSettings(**content["settings"]), Buffers(**content["buffers"])
        expected = Buffers.allocate(settings, torch.device("meta")).tensors()
        for name, tensor in buffers.tensors().items():
            if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
    except FileNotFoundError:
        raise
    except Exception as err:
        reason = " ".join(str(err).split())[:200]
        raise ValueError(f"{os.fspath(path)} is not a saved SparseKCache ({reason})") from err
    return settings, buffers
