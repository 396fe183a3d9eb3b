# SPDX-License-Identifier: Apache-2.0
"""Brute force SparseK attention in float64: the definition as an n x n matrix of gates, differentiated by autograd."""

import torch


def threshold(pool_scores: torch.Tensor, topk: int) -> torch.Tensor:
    """tau of a descending vector longer than topk, by trying every split into saturated, fractional and zero."""
    z = pool_scores
    n = len(z)
    for ones in range(topk + 1):
        for upper in range(max(ones, topk), n + 1):
            size = upper - ones
            if size == 0:
                if z[topk - 1] - z[topk] >= 1:
                    return (z[topk - 1] + z[topk] - 1) / 2
                continue
            tau = (z[ones:upper].sum() + ones - topk) / size
            saturated = ones == 0 or z[ones - 1] - tau >= 1
            inside = z[ones] - tau < 1 and z[upper - 1] - tau > 0
            excluded = upper == n or z[upper] - tau <= 0
            if saturated and inside and excluded:
                return tau
    raise AssertionError("no threshold found")


def gate_matrix(u: torch.Tensor, *, topk: int, window: int, stride: int, pool: int):
    """Scores [n] -> (gates [n, n], visible [n, n] bool) for queries x keys."""
    n = len(u)
    ranks = u.tolist()
    gates, visible = [], torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        c = i // stride * stride
        visible[i, max(0, c - window + 1) : i + 1] = True
        row = 1 + 0 * u
        candidates = sorted(range(max(0, c - window + 1)), key=lambda j: (-ranks[j], j))[:pool]
        selected = candidates[:topk]
        visible[i, selected] = True
        if len(candidates) > topk:
            index = torch.tensor(candidates)
            tau = threshold(u[index], topk)
            row = row.index_put((index,), (u[index] - tau).clamp(0, 1))
        gates.append(row)
    return torch.stack(gates), visible


def attention(query, key, value, scores, *, topk, window, stride, pool, gate, softmax_scale=None):
    """[b, s, hq, d], [b, s, hkv, d] twice, [b, s, hkv], all float64 -> [b, s, hq, d]."""
    b, _, hq, d = query.shape
    hkv = key.shape[2]
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    rows = []
    for batch in range(b):
        heads = []
        for h in range(hq):
            g = h // (hq // hkv)
            m, visible = gate_matrix(scores[batch, :, g], topk=topk, window=window, stride=stride, pool=pool)
            qk = query[batch, :, h] @ key[batch, :, g].T * scale
            if gate == "key_value":
                logits = qk * m
            elif gate == "value":
                logits = qk
            else:
                logits = qk + torch.where(visible, m, 1.0).log()
            weights = torch.softmax(logits.masked_fill(~visible, float("-inf")), dim=-1)
            if gate != "logit":
                weights = weights * m
            heads.append(weights @ value[batch, :, g])
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows)
