# SPDX-License-Identifier: Apache-2.0
"""`SparseKCache`: the generation state of one attention layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sparsek_kernels.attention.api import BACKENDS
from sparsek_kernels.attention.chunk import AttentionState, sparsek_attention_chunk
from sparsek_kernels.attention.plan import HEAD_DIMS, MAX_GROUP
from sparsek_kernels.cache.layout import Buffers, CacheSettings, read_state, write_state
from sparsek_kernels.cache.torch_backend import append_torch, attend_torch
from sparsek_kernels.cache.triton_backend import append_triton, attend_triton

PREFILL_TOKENS = 65_536  # tokens (over the rows of a group) that one call of the attention kernels takes
FORMAT = 1


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
            pool=4 * topk if pool is None else pool,
            gate=gate,
            softmax_scale=head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
            dtype=dtype,
        )
        device = torch.empty(0, device=device).device  # "cuda" with its index
        self._attach(settings, Buffers.allocate(settings, device), backend)

    def _attach(self, settings: CacheSettings, buffers: Buffers, backend: str) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
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
        self.settings, self.backend, self._buffers = settings, backend, buffers

    @classmethod
    def _of(cls, settings: CacheSettings, buffers: Buffers, backend: str) -> SparseKCache:
        cache = cls.__new__(cls)
        cache._attach(settings, buffers, backend)
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

    def rows(self, start: int, stop: int) -> SparseKCache:
        """The cache of rows start ... stop - 1; it shares this cache's memory."""
        size = self.settings.batch_size
        if not 0 <= start < stop <= size:
            raise ValueError(f"rows {start} ... {stop - 1} are not within the cache's {size} rows")
        return self._of(self._resized(stop - start), self._buffers.map(lambda x: x[start:stop]), self.backend)

    def _resized(self, batch_size: int) -> CacheSettings:
        values = {name: getattr(self.settings, name) for name in CacheSettings.__dataclass_fields__}
        return CacheSettings(**{**values, "batch_size": batch_size})

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
        index = torch.tensor(chosen, device=self.device)
        return self._of(
            self._resized(len(chosen)), self._buffers.map(lambda x: x.index_select(0, index)), self.backend
        )

    def reset(self) -> None:
        """Forget every row's sequence, in place: captured graphs stay valid. For some rows: `rows(a, b).reset()`."""
        self._buffers.clear(self.settings.topk)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings and buffers to a file, which appears complete or not at all."""
        values = {name: getattr(self.settings, name) for name in CacheSettings.__dataclass_fields__}
        # Copies: what is saved of a view would be the whole memory behind it.
        buffers = {name: tensor.clone() for name, tensor in self._buffers.tensors().items()}
        content = {"format": FORMAT, "settings": values, "buffers": buffers}
        partial = Path(path).with_name(Path(path).name + ".partial")
        try:
            torch.save(content, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", backend: str = "auto"
    ) -> SparseKCache:
        """A cache from a file of `save`. Executes nothing from the file. Raises ValueError where it is no such file."""
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
        return cls._of(settings, buffers, backend)

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
        Reads the rows' lengths, hence synchronises. Memory beyond the arguments and the output does not grow with s;
        feed a long prompt in pieces to bound those too.

        Raises ValueError for tensors that do not fit the cache; it is then unchanged.
        """
        self._check(query, key, value, scores)
        batch, tokens = query.shape[:2]
        counts = [tokens] * batch if lengths is None else [int(n) for n in lengths]
        if len(counts) != batch or not all(0 <= n <= tokens for n in counts):
            raise ValueError(
                f"lengths must hold {batch} numbers between 0 and the {tokens} tokens given, got {counts}"
            )
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (past, count) in enumerate(zip(self.lengths.tolist(), counts, strict=True)):
            groups.setdefault((past, count), []).append(row)
        finished = []
        for (past, count), chosen in groups.items():
            if count:
                rows = None if len(chosen) == batch else torch.tensor(chosen, device=self.device)
                finished.append((rows, *self._continue(rows, (query, key, value, scores), past, count)))
        for rows, _, state in finished:  # nothing is stored before everything has been computed
            self._store(rows, state)
        if min(counts) == tokens and len(finished) == 1:
            return finished[0][1]
        out = query.new_zeros(query.shape)
        for rows, part, _ in finished:
            out[slice(None) if rows is None else rows, : part.shape[1]] = part
        return out

    def _select(self, rows: torch.Tensor | None) -> Buffers:
        """The buffers of some rows: a copy, or all of them themselves."""
        return self._buffers if rows is None else self._buffers.map(lambda x: x[rows])

    def _continue(
        self, rows: torch.Tensor | None, inputs: tuple[torch.Tensor, ...], past: int, count: int
    ) -> tuple[torch.Tensor, AttentionState]:
        """Attention of the first `count` tokens of rows that all hold `past` tokens, and the state after them."""
        settings = self.settings
        chosen = [x[:, :count] if rows is None else x[rows, :count] for x in inputs]
        state = read_state(self._select(rows), settings, past) if past else None
        outputs = []
        for piece in zip(*(x.split(max(PREFILL_TOKENS // len(x), 1), dim=1) for x in chosen), strict=True):
            out, state = sparsek_attention_chunk(
                *piece,
                topk=settings.topk,
                window=settings.window,
                stride=settings.stride,
                pool=settings.pool,
                gate=settings.gate,
                softmax_scale=settings.softmax_scale,
                state=state,
                backend=self.backend,
            )
            outputs.append(out)
        assert state is not None
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state

    def _store(self, rows: torch.Tensor | None, state: AttentionState) -> None:
        buffers = self._select(rows)
        write_state(buffers, self.settings, state)
        if rows is not None:
            for name, tensor in buffers.tensors().items():
                getattr(self._buffers, name)[rows] = tensor

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
        return attend(self._buffers, self.settings, query)[:, None]

    def _check(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor
    ) -> None:
        settings = self.settings
        batch, tokens = (query.shape[0], query.shape[1]) if query.dim() == 4 else (0, 0)
        wanted = (settings.batch_size, tokens, settings.num_kv_heads, settings.head_dim)
        if query.dim() != 4 or batch != settings.batch_size or query.shape[3] != settings.head_dim:
            raise ValueError(
                f"query has shape {tuple(query.shape)}; this cache takes [{settings.batch_size}, s, hq, "
                f"{settings.head_dim}]"
            )
        if tokens == 0:
            raise ValueError("query has no tokens (s = 0)")
        group, rest = divmod(query.shape[2], settings.num_kv_heads)
        if rest or not group:
            raise ValueError(f"query has {query.shape[2]} heads, not a multiple of the cache's {wanted[2]}")
        if self.backend == "triton" and group > MAX_GROUP:
            raise NotImplementedError(
                f"query has {group} heads per key head; the triton backend has up to {MAX_GROUP}"
            )
        for name, x, shape, dtype in (
            ("query", query, query.shape, settings.dtype),
            ("key", key, wanted, settings.dtype),
            ("value", value, wanted, settings.dtype),
            ("scores", scores, wanted[:3], torch.float32),
        ):
            if tuple(x.shape) != tuple(shape):
                raise ValueError(f"{name} has shape {tuple(x.shape)}; this cache takes {tuple(shape)}")
            if x.dtype != dtype:
                raise ValueError(f"{name} has dtype {x.dtype}; this cache takes {dtype}")
            if x.device != self.device:
                raise ValueError(f"{name} is on {x.device}; this cache is on {self.device}")
