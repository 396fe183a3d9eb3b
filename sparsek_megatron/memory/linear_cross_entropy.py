# SPDX-License-Identifier: Apache-2.0
"""Cross entropy of a vocabulary-parallel linear layer whose logits never exist whole.

    loss_i = log sum_v exp(x_i . w_v) - x_i . w_(label_i)

The forward pass keeps one fp32 number per token, the log of the sum; the backward pass computes each chunk's
logits again and turns them into their gradient in place of a saved softmax. Recomputation, and not gradients
made ahead in the forward pass, because the caller may weigh every token's loss differently (loss masks): the
weight's gradient is known only then. It costs one matrix product more, 4 instead of 3.

Legend: s sequence length, b batch, h hidden size, v vocabulary (padded), tp = tensor_model_parallel_size;
c rows of a rank's sequence in one chunk; g = tp under sequence parallelism (tokens are gathered), else 1.

Collectives: none in the chunk loop but those of the linear layer itself (gather and reduce-scatter of hidden
states under sequence parallelism, all-reduce of their gradient otherwise), started one chunk ahead; ranks
combine their per-token numbers in one all-gather of 8 bytes per token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits of one chunk on one rank: 0.5 GiB in bf16, large enough that the fp32 sum of weight gradients costs
# little.
CHUNK_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class Layout:
    """How tokens and vocabulary are spread over ranks."""

    group: Any  # tensor-parallel process group, or None
    sequence_parallel: bool
    rows: int  # c

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def gathered(self) -> int:
        """g: ranks whose tokens one chunk holds."""
        return self.size if self.sequence_parallel else 1

    def slices(self, length: int) -> list[slice]:
        """Chunks of a rank's `length` sequence rows, of equal size but for the last."""
        return [slice(a, min(a + self.rows, length)) for a in range(0, length, self.rows)]


def chunk_rows(chunk_tokens: int | None, *, batch: int, gathered: int, vocabulary: int) -> int:
    """Sequence rows of one rank in a chunk: of about `chunk_tokens` tokens in all, or of `CHUNK_ELEMENTS`
    logits.
    """
    tokens = chunk_tokens or max(1, CHUNK_ELEMENTS // vocabulary)
    return max(1, tokens // (batch * gathered))


def _row_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(log sum exp, logit of the target or 0 where another rank has it), both [rows] in at least fp32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = (target >= 0) & (target < logits.shape[1])
    picked = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    return torch.logsumexp(logits, 1), torch.where(inside, picked, 0.0)


def _row_gradient(logits: Tensor, target: Tensor, log_sum: Tensor, d_loss: Tensor) -> Tensor:
    """d loss / d logits [rows, v / tp] in the dtype of the logits: (softmax - one-hot) * d_loss."""
    softmax = torch.exp(logits.to(log_sum.dtype) - log_sum[:, None])
    one_hot = torch.arange(logits.shape[1], device=logits.device)[None, :] == target[:, None]
    return (torch.where(one_hot, softmax - 1, softmax) * d_loss[:, None]).to(logits.dtype)


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


def _rowwise(function: Any, logits: Tensor, *rest: Tensor) -> Any:
    """Run `function`, fused on a GPU: it then reads the logits once or twice and keeps no fp32 copy of
    them.
    """
    return (_compiled(function) if logits.is_cuda else function)(logits, *rest)


def _gathered_chunks(hidden: Tensor, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
    """(slice of rows, tokens [g * c * b, h]) of each chunk, the next gather under way while one is worked
    on.
    """
    slices = layout.slices(hidden.shape[0])
    flat = hidden.shape[-1]
    if layout.gathered == 1:
        for rows in slices:
            yield rows, hidden[rows].reshape(-1, flat)
        return

    def start(rows: slice) -> tuple[Tensor, Any]:
        part = hidden[rows].contiguous()
        out = torch.empty(layout.size * part.shape[0], *part.shape[1:], dtype=part.dtype, device=part.device)
        return out, dist.all_gather_into_tensor(out, part, group=layout.group, async_op=True)

    ahead = start(slices[0])
    for i, rows in enumerate(slices):
        out, work = ahead
        work.wait()
        if i + 1 < len(slices):
            ahead = start(slices[i + 1])
        yield rows, out.view(-1, flat)


def _combine_over_ranks(log_sum: Tensor, picked: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The same of the whole vocabulary, from each rank's shard of it."""
    if layout.size == 1:
        return log_sum, picked
    mine = torch.stack((log_sum, picked))
    every = torch.empty(layout.size, *mine.shape, dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(every.view(-1, *mine.shape[1:]), mine, group=layout.group)
    return torch.logsumexp(every[:, 0], 0), every[:, 1].sum(0)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with fp32 sums, `total` fp32 and a, b in the model's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, layout: Layout) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_sum = torch.empty(target.shape, dtype=dtype, device=hidden.device)
        picked = torch.empty_like(log_sum)
        for rows, tokens in _gathered_chunks(hidden, layout):
            shape = target[:, rows].shape
            one, other = _rowwise(_row_statistics, tokens @ weight.t(), target[:, rows].reshape(-1))
            log_sum[:, rows], picked[:, rows] = one.view(shape), other.view(shape)
        log_sum, picked = _combine_over_ranks(log_sum, picked, layout)
        ctx.save_for_backward(hidden, weight, target, log_sum)
        ctx.layout = layout
        return log_sum - picked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (d_loss,) = grads
        hidden, weight, target, log_sum = ctx.saved_tensors
        layout: Layout = ctx.layout
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape, dtype=log_sum.dtype, device=weight.device)
        pending = None
        for rows, tokens in _gathered_chunks(hidden, layout):
            columns = (x[:, rows].reshape(-1) for x in (target, log_sum, d_loss))
            d_logits = _rowwise(_row_gradient, tokens @ weight.t(), *columns)
            if d_hidden is not None:
                part = (d_logits @ weight).view(-1, *hidden.shape[1:])
                pending = _return_gradient(part, d_hidden[rows], layout, pending)
            if ctx.needs_input_grad[1]:
                _add_product(d_weight, d_logits.t(), tokens)
        if pending is not None:
            _finish(pending)
        return d_hidden, d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None


def _return_gradient(part: Tensor, into: Tensor, layout: Layout, pending: Any) -> Any:
    """Start summing a chunk's gradient over ranks into its place, once the chunk before is done."""
    if layout.size == 1:
        into.copy_(part)
        return None
    if pending is not None:
        _finish(pending)
    if layout.sequence_parallel:
        out = torch.empty(into.shape, dtype=into.dtype, device=into.device)
        return dist.reduce_scatter_tensor(out, part, group=layout.group, async_op=True), out, into
    return dist.all_reduce(part, group=layout.group, async_op=True), part, into


def _finish(pending: Any) -> None:
    work, source, into = pending
    work.wait()
    into.copy_(source)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: Any = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Loss of each token, [b, s] in nats, in fp32 (fp64 for fp64 input).

    hidden [s, b, h], this rank's [s / tp, b, h] under sequence parallelism; weight [v / tp, h], this rank's
    rows of the output layer; labels [b, s] int64 of the whole sequence, whole vocabulary. group: the
    tensor-parallel process group, None for one rank. chunk_tokens: tokens whose logits exist at a time; None
    takes `CHUNK_ELEMENTS` logits.

    Differentiable in hidden and weight. The hidden states' gradient is complete on every rank (summed over
    the group), the weight's is accumulated in fp32. A label outside the vocabulary gives a loss that only a
    mask makes meaningful, as in Megatron. Raises ValueError where shapes do not fit.
    """
    size = 1 if group is None else group.size()
    gathered = size if sequence_parallel else 1
    length, batch = hidden.shape[0] * gathered, hidden.shape[1]
    if labels.shape != (batch, length):
        raise ValueError(f"labels {tuple(labels.shape)}: hidden states of this layout need {(batch, length)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight {tuple(weight.shape)}: does not fit hidden states of width {hidden.shape[-1]}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: must be at least 1, or None for the default")
    rows = chunk_rows(chunk_tokens, batch=batch, gathered=gathered, vocabulary=weight.shape[0])
    layout = Layout(group if size > 1 else None, sequence_parallel and size > 1, rows)
    target = labels.t().reshape(layout.gathered, hidden.shape[0], batch) - layout.rank * weight.shape[0]
    losses: Any = _LinearCrossEntropy.apply(hidden, weight, target, layout)
    return losses.reshape(length, batch).t().contiguous()
