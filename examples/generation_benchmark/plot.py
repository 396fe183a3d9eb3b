# SPDX-License-Identifier: Apache-2.0
"""The benchmark's picture, drawn from its CSV file alone."""

from pathlib import Path


def plot(results: list[dict[str, str]], path: Path) -> None:
    """Time per token and cache bytes against the context, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    batches = sorted({int(r["batch"]) for r in results})
    for batch in batches:
        here = [r for r in results if int(r["batch"]) == batch]
        contexts = sorted({int(r["context"]) for r in here})
        for side, style in (("SparseK", "o-"), ("dense", "s--")):
            points = []
            for context in contexts:
                times = [
                    float(r["us_per_token"])
                    for r in here
                    if int(r["context"]) == context and (r["side"] == "SparseK") == (side == "SparseK")
                ]
                points += [(context, min(times))] if times else []
            if points:
                left.plot(*zip(*points, strict=True), style, label=f"{side}, batch {batch}")
    for side, style in (("SparseK", "o-"), ("dense", "s--")):
        points = sorted(
            {
                (int(r["context"]), int(r["bytes_per_sequence"]))
                for r in results
                if (r["side"] == "SparseK") == (side == "SparseK")
            }
        )
        if points:
            right.plot(*zip(*points, strict=True), style, label=side)
    left.set_ylabel("attention of one token, all layers (us)")
    right.set_ylabel("cache of one sequence (bytes)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context (tokens)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
