"""`python -m benchmarks.retrieval [CLIPS]`: exact ranks among many candidates (`equiav eval retrieval`), and what they take,
beside what one writes in a few lines of torch. Each in a process of its own, whose peak of memory is its own. Without CLIPS
100,000: some minutes on two cores.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from equiav.evaluate.retrieval import ranks

D, ROWS = 512, 1024


def plain(queries: Tensor, candidates: Tensor) -> Tensor:
    """In float32, so many rows at a time: what rounding puts before the right candidate counts as better."""
    found = []
    for k in range(0, len(queries), ROWS):
        similarity = queries[k : k + ROWS] @ candidates.T
        right = similarity.diagonal(offset=k).unsqueeze(1)
        found.append((similarity >= right).sum(dim=1))
    return torch.cat(found)


def pairs(count: int) -> tuple[Tensor, Tensor]:
    """Embeddings as those of a trained model: near each other, the right ones a little nearer."""
    g = torch.Generator().manual_seed(0)
    middle = torch.randn(D, generator=g)
    one = 0.7 * middle + torch.randn(count, D, generator=g)
    other = one + 7.0 * torch.randn(count, D, generator=g)
    return torch.nn.functional.normalize(one, dim=1), torch.nn.functional.normalize(other, dim=1)


def measure(name: str, count: int) -> None:
    queries, candidates = pairs(count)
    begun = time.perf_counter()
    places = {"ours": ranks, "plain": plain}[name](queries, candidates)
    spent = time.perf_counter() - begun
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20  # type: ignore[index]
    print(
        json.dumps({"seconds": spent, "GiB": peak, "median": float(places.double().median()), "sum": int(places.sum())})
    )


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    if len(sys.argv) > 2:
        return measure(sys.argv[2], count)
    print(
        f"| {count:,} x {count:,}, d = {D}, one direction | seconds | peak of the process, GiB | median rank | sum of ranks |"
    )
    print("|---|---|---|---|---|")
    for name, what in (("ours", "exact, as in float64, ties counted"), ("plain", "float32, a few lines of torch")):
        command = [sys.executable, "-m", "benchmarks.retrieval", str(count), name]
        said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {what} | {said['seconds']:.1f} | {said['GiB']:.2f} | {said['median']:g} | {said['sum']:,} |", flush=True
        )


if __name__ == "__main__":
    main()
