# SPDX-License-Identifier: Apache-2.0
"""`SparseKCache`: the generation state of one attention layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from sparsek_kernels.attention.plan import HEAD_DIMS, MAX_GROUP
from sparsek_kernels.cache.file import read_file, write_file
from sparsek_kernels.cache.layout import Buffers, CacheSettings
from sparsek_kernels.cache.torch_backend import append_torch, attend_torch, prefill_torch
from sparsek_kernels.cache.triton_backend import append_triton, attend_triton, prefill_triton
from sparsek_kernels.settings import BACKENDS, pool_size, require_choice, scale_or_default

PREFILL_TOKENS = 65_536  # tokens (over the rows of a group) that one call of the attention kernels takes
UNKNOWN = -1  # length of a row that captured steps may have moved on


class SparseKCache:
    """What SparseK attention keeps of `batch_size` sequences: allocated once, the same size at any length.

    Per row and KV head: the `topk` selected key/value rows with their scores, a ring of the last `window + stride` rows
    with theirs, the `pool` best scores and the threshold of the gates. Outputs equal those of `sparsek_attention` over
    the whole sequence, given the same scores: `prefill` runs its kernels, `decode` attends to the cache, and the
    selection is refreshed every `stride` tokens of a row. Rows may have different lengths.

        cache = SparseKCache(2, 8, 128, topk=512, window=512, dtype=torch.bfloat16, device="cuda")
        out = cache.prefill(query, key, value, scores)         # [2, s, hq, d], any s, as often as wanted
        out = cache.decode(query, key, value, scores)          # [2, 1, hq, d]

    `decode` needs nothing from the host on CUDA: it can be captured in a CUDA graph, which replays correctly at every
    length, refreshes included (they are part of a kernel that finds on the device whether one is due).

    Args:
        batch_size: sequences, b.
        num_kv_heads: key/value heads on this rank, hkv.
        head_dim: size of a head, d.
        topk, window, stride, pool, gate, softmax_scale: as in `sparsek_attention`; `pool == topk` is hard selection.
        dtype: of keys and values: bfloat16, float16 or float32.
        device: where the cache lives.
        backend: "triton" (CUDA), "torch" (anywhere), or "auto": Triton on CUDA, torch on CPU.

    Raises:
        ValueError: a setting that does not fit, naming it, its value and what would fit.
        NotImplementedError: a head size that the Triton backend does not have.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        topk: int,
        window: int,
        stride: int = 64,
        pool: int | None = None,
        gate: str = "key_value",
        softmax_scale: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        settings = CacheSettings(
            batch_size=batch_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            topk=topk,
            window=window,
            stride=stride,
            pool=pool_size(topk, window, stride, pool),
            gate=gate,
            softmax_scale=scale_or_default(softmax_scale, head_dim),
            dtype=dtype,
        )
        device = torch.empty(0, device=device).device  # "cuda" with its index
        held = torch.zeros(batch_size, dtype=torch.int64)
        self._attach(settings, Buffers.allocate(settings, device), held, backend)

    def _attach(self, settings: CacheSettings, buffers: Buffers, held: torch.Tensor, backend: str) -> None:
        """held: what the host knows of the rows' lengths, [b] int64; UNKNOWN stays so."""
        require_choice("backend", backend, BACKENDS)
        device = buffers.key.device
        if backend == "auto":
            backend = "triton" if device.type == "cuda" else "torch"
        if backend == "triton":
            if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
                raise ValueError(f'backend "triton" needs CUDA, got device {device}; use backend="torch"')
            if settings.head_dim not in HEAD_DIMS:
                raise NotImplementedError(
                    f"head_dim is {settings.head_dim}; the triton backend has {HEAD_DIMS}"
                )
        self.settings, self.backend, self._buffers, self._held = settings, backend, buffers, held

    @classmethod
    def _of(cls, settings: CacheSettings, buffers: Buffers, held: torch.Tensor, backend: str) -> SparseKCache:
        cache = cls.__new__(cls)
        cache._attach(replace(settings, batch_size=len(held)), buffers, held, backend)
        return cache

    @property
    def device(self) -> torch.device:
        return self._buffers.key.device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: a function of the settings alone."""
        return sum(x.numel() * x.element_size() for x in self._buffers.tensors().values())

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens consumed by each row, [b] int32 on the cache's device."""
        return self._buffers.length[:, 0]

    def lengths_on_host(self) -> list[int]:
        """`lengths` as numbers. Waits for the device only where a captured graph may have stepped a row."""
        held = self._held.tolist()
        return self.lengths.tolist() if UNKNOWN in held else held

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _grow(self, counts: torch.Tensor | int) -> None:
        self._held.add_((self._held != UNKNOWN) * counts)

    def rows(self, start: int, stop: int) -> SparseKCache:
        """The cache of rows start ... stop - 1; it shares this cache's memory."""
        size = self.settings.batch_size
        if not 0 <= start < stop <= size:
            raise ValueError(f"rows {start} ... {stop - 1} are not within the cache's {size} rows")
        part = self._buffers.map(lambda x: x[start:stop])
        return self._of(self.settings, part, self._held[start:stop], self.backend)

    def fork(self, rows: Sequence[int] | None = None) -> SparseKCache:
        """An independent copy whose row i is this cache's row `rows[i]` (any number of them; None copies all in order).

        Several continuations of one prompt: `cache.fork([0] * 4)`.
        """
        size = self.settings.batch_size
        chosen = list(range(size)) if rows is None else [int(row) for row in rows]
        if not chosen or not all(0 <= row < size for row in chosen):
            raise ValueError(
                f"rows must name at least one of the cache's rows 0 ... {size - 1}, got {chosen}"
            )
        index = torch.tensor(chosen)
        copy = self._buffers.map(lambda x: x.index_select(0, index.to(self.device)))
        return self._of(self.settings, copy, self._held[index], self.backend)

    def reset(self) -> None:
        """Forget every row's sequence, in place: captured graphs stay valid. For some rows: `rows(a, b).reset()`."""
        self._buffers.clear()
        self._held.clamp_(max=0)  # UNKNOWN is below

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings and buffers to a file, which appears complete or not at all."""
        write_file(path, self.settings, self._buffers)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", backend: str = "auto"
    ) -> SparseKCache:
        """A cache from a file of `save`. Executes nothing from the file. Raises ValueError where it is no such file."""
        settings, buffers = read_file(path, device)
        return cls._of(settings, buffers, buffers.length[:, 0].to("cpu", torch.int64), backend)

    @torch.no_grad()
    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: torch.Tensor,
        *,
        lengths: Sequence[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append tokens to every row and return their attention, by the kernels of training.

        query [b, s, hq, d], key and value [b, s, hkv, d] in the cache's dtype, scores [b, s, hkv] fp32. lengths: how
        many of the s tokens of each row are its own; the rest (padding on the right) is not read, its output is 0.
        Waits for the device only where a captured graph may have stepped a row before. Memory beyond the arguments and
        the output does not grow with s; feed a long prompt in pieces to bound those too.

        Raises ValueError for tensors that do not fit the cache, NotImplementedError inside a CUDA graph's capture
        (launches depend on the lengths); the cache is then unchanged.
        """
        self._check(query, key, value, scores)
        if self._capturing():
            raise NotImplementedError("prefill cannot be captured in a CUDA graph: capture decode")
        batch, tokens = query.shape[:2]
        counts = [tokens] * batch if lengths is None else [int(n) for n in lengths]
        if len(counts) != batch or not all(0 <= n <= tokens for n in counts):
            raise ValueError(
                f"lengths must hold {batch} numbers between 0 and the {tokens} tokens given, got {counts}"
            )
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (past, count) in enumerate(zip(self.lengths_on_host(), counts, strict=True)):
            groups.setdefault((past, count), []).append(row)
        results = []
        for (past, count), chosen in groups.items():
            if count:
                rows = None if len(chosen) == batch else torch.tensor(chosen, device=self.device)
                results.append((rows, *self._continue(rows, (query, key, value, scores), past, count)))
        for rows, _, buffers in results:  # nothing is stored before everything has been computed
            self._replace(rows, buffers)
        self._grow(torch.tensor(counts))
        if min(counts) == tokens and len(results) == 1:
            return results[0][1]
        out = query.new_zeros(query.shape)
        for rows, part, _ in results:
            out[slice(None) if rows is None else rows, : part.shape[1]] = part
        return out

    def _continue(
        self, rows: torch.Tensor | None, inputs: tuple[torch.Tensor, ...], past: int, count: int
    ) -> tuple[torch.Tensor, Buffers]:
        """Attention of the first `count` tokens of rows (None: all) that hold `past` each, and their buffers after it:
        the cache's own where one call of the kernels does it all, whose last act is to write them."""
        chosen = [x[:, :count] if rows is None else x[rows, :count] for x in inputs]
        pieces = list(zip(*(x.split(max(PREFILL_TOKENS // len(x), 1), dim=1) for x in chosen), strict=True))
        buffers = self._buffers
        if rows is not None or len(pieces) > 1:
            buffers = buffers.map(lambda x: x.clone() if rows is None else x[rows])
        run = prefill_triton if self.backend == "triton" else prefill_torch
        outputs = []
        for piece in pieces:
            outputs.append(run(buffers, self.settings, past, *piece))
            past += piece[0].shape[1]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), buffers

    def _replace(self, rows: torch.Tensor | None, buffers: Buffers) -> None:
        if buffers is not self._buffers:
            for name, tensor in buffers.tensors().items():
                getattr(self._buffers, name)[slice(None) if rows is None else rows] = tensor

    @torch.no_grad()
    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Append one token to every row and return its attention: query [b, 1, hq, d] -> [b, 1, hq, d].

        Arguments as in `prefill`, with s = 1. Time and memory do not depend on the rows' lengths.

        Raises ValueError for tensors that do not fit the cache; it is then unchanged.
        """
        self._check(query, key, value, scores)
        if query.shape[1] != 1:
            raise ValueError(
                f"decode takes one token per row, got {query.shape[1]}: use prefill for several at once"
            )
        query, key, value = (
            x[:, 0] if x.stride(-1) == 1 else x[:, 0].contiguous() for x in (query, key, value)
        )
        append, attend = (
            (append_triton, attend_triton) if self.backend == "triton" else (append_torch, attend_torch)
        )
        append(self._buffers, self.settings, key, value, scores[:, 0])
        if self._capturing():
            self._held.fill_(UNKNOWN)  # for good: a replay asks nobody here
        self._grow(1)
        return attend(self._buffers, self.settings, query)[:, None]

    def _check(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor
    ) -> None:
        self.settings.check(query, key, value, scores, self.device)
        group = query.shape[2] // self.settings.num_kv_heads
        if self.backend == "triton" and group > MAX_GROUP:
            raise NotImplementedError(
                f"query has {group} heads per key head; the triton backend has up to {MAX_GROUP}"
            )
