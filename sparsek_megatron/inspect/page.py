# SPDX-License-Identifier: Apache-2.0
"""One HTML file, without anything to load: the text with the tokens that a query attends to, and the plots.

Which keys query i attends to, and their gates, follow from one score and one eviction per key and one threshold per
refresh point; the page holds these and its script draws any layer, head and query from them.
"""

from __future__ import annotations

import base64
import html
import json
import math
from typing import Any

from sparsek_megatron.config import SparseKConfig
from sparsek_megatron.inspect.heads import HeadStatistics

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
#text { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid #ccc; padding: 1em; }
#text span { color: #aaa; }
#text .local { color: #000; background: #dbeafe; }
#text .kept { color: #000; }
#text .query { color: #fff; background: #111; }
.controls { position: sticky; top: 0; background: #fff; padding: .6em 0; display: flex; gap: 1.5em; flex-wrap: wrap; }
.controls input[type=range] { width: 24em; }
.warning { background: #fff3cd; border-left: 4px solid #d97706; padding: .3em .8em; margin: .3em 0; }
img { max-width: 100%; }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text"), picker = document.getElementById("head");
const slider = document.getElementById("query"), count = document.getElementById("count");
const spans = data.tokens.map((token, j) => {
  const span = document.createElement("span");
  span.textContent = token;
  span.addEventListener("click", () => { slider.value = j; draw(); });
  text.appendChild(span);
  return span;
});
data.heads.forEach((head, i) => picker.add(new Option(`layer ${head.layer}, head ${head.head}`, i)));
function draw() {
  const head = data.heads[picker.value], i = Number(slider.value), stride = data.stride;
  const refresh = stride * Math.floor(i / stride), tau = head.threshold[refresh / stride];
  let kept = 0, local = 0;
  spans.forEach((span, j) => {
    let kind = "", gate = 0;
    if (j > refresh - data.window && j <= i) { kind = "local"; local += 1; }
    else if (j <= i && i < head.evict[j]) {
      kind = "kept"; kept += 1;
      gate = tau === null ? 1 : Math.min(1, Math.max(0, head.scores[j] - tau));
    }
    span.className = j === i ? "query" : kind;
    span.style.background = kind === "kept" ? `rgba(245, 158, 11, ${0.2 + 0.8 * gate})` : "";
    const end = head.evict[j] >= spans.length ? "the end" : `query ${head.evict[j]}`;
    const weight = kind === "kept" ? `, gate ${gate.toFixed(3)}` : "";
    span.title = `${j}: score ${head.scores[j]}${weight}, attended until ${end}`;
  });
  count.textContent = `query ${i}: ${local} local and ${kept} selected of ${i + 1} tokens`;
}
picker.addEventListener("change", draw);
slider.addEventListener("input", draw);
draw();
"""


def _numbers(values: Any, digits: int = 4) -> list[float | int | None]:
    return [None if not math.isfinite(v) else round(v, digits) for v in values]


def _data(tokens: list[str], heads: list[HeadStatistics], settings: SparseKConfig) -> str:
    """JSON that is safe inside a script element."""
    content = {
        "tokens": tokens,
        "window": settings.window,
        "stride": settings.stride,
        "heads": [
            {
                "layer": h.layer,
                "head": h.head,
                "scores": _numbers(h.scores.tolist()),
                "evict": h.evict.tolist(),
                "threshold": _numbers(h.threshold.tolist()),
            }
            for h in heads
        ],
    }
    return json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")


def render(
    tokens: list[str], heads: list[HeadStatistics], settings: SparseKConfig, *, png: bytes, title: str
) -> str:
    """The page. tokens: the text of each token, in order."""
    warnings = [w for h in heads for w in h.warnings]
    boxes = "".join(f'<div class="warning">{html.escape(w)}</div>' for w in warnings)
    numbers = ", ".join(f"{n} {getattr(settings, n)}" for n in ("topk", "window", "stride", "pool", "gate"))
    image = base64.b64encode(png).decode()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>{len(tokens)} tokens; {html.escape(numbers)}. Black: the query. Blue: its local window. Orange: the keys selected for
it, stronger for larger gates. Grey: not attended. Click a token or move the slider to choose another query.</p>
<div id="warnings">{boxes or "<p>No dead heads found.</p>"}</div>
<div class="controls"><label>Head <select id="head"></select></label>
<label>Query <input id="query" type="range" min="0" max="{len(tokens) - 1}" value="{len(tokens) - 1}"></label>
<output id="count"></output></div>
<div id="text"></div>
<h2>All heads</h2>
<img alt="Ages, gates, thresholds and pool overflow of all heads" src="data:image/png;base64,{image}">
<script id="data" type="application/json">{_data(tokens, heads, settings)}</script>
<script>{SCRIPT}</script>
</body></html>
"""
