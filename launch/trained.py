"""What is submitted to train on nodes that come and go, whatever the command trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchx.specs import AppDef, macros

from launch.component import app, bytes_of, checked, literal, on_volumes, refuse, say, size_of


def trained(
    command: str,
    kind: str,
    settings: Sequence[str],
    told: str,
    *,
    name: str,
    data: str,
    out: str,
    config: str,
    nodes: str,
    workers: int,
    metrics_port: int,
    where: dict[str, str],
    gpus: int,
    **common: Any,
) -> AppDef:
    """kind: of the settings, in equiav.config. told: what is said behind the first line."""
    if not out:
        refuse("out: no folder is named for the run. Give one that outlives its nodes (--out s3://BUCKET/NAME)")
    least, most = size_of(nodes)
    disk = bytes_of("scratch", where["scratch"])
    name = name or out.rstrip("/").rpartition("/")[2]
    remote = "://" in out
    folder = f"{out.rstrip('/')}/checkpoints"
    given = ["--stream.url", data, "--out", f"/tmp/{name}" if remote else out, "--device", "cuda" if gpus else "cpu"]
    given += ["--checkpoint.url", folder] if remote else []
    run = checked("equiav.config", kind, command, [*given, *settings], config or None)
    if run.resume == "never":
        refuse(
            "resume is never: a node that is replaced could not go on. Choose a folder that is empty instead (--out)"
        )
    if run.device == "cuda" and not gpus:
        refuse("device is cuda, and gpus is 0: say how many a node has (--gpus 8)")
    if run.stream.cache_bytes > disk * 3 // 4:
        stream = dataclasses.replace(run.stream, cache_bytes=disk * 3 // 4)
        run = dataclasses.replace(run, stream=stream)
    if workers < 0:
        refuse(f"workers is {workers}, expected 0 or more")
    workers = workers or gpus or 1
    say(f"{command}s {run.model.size} on {run.stream.url}{told}: {nodes} node(s) of {workers} worker(s), into {out}")
    if most * workers > run.train.micro_batches:
        say(f"train.batch_size has work for {run.train.micro_batches} workers; further ones wait as spares")
    from equiav.config import to_yaml

    program = ["launch.node", f"--run={name}", "--nodes", f"{least}:{most}", "--workers", str(workers)]
    folder = run.checkpoint.url or str(Path(run.out) / "checkpoints")
    program += ["--folder", folder, "--data", run.stream.url]
    tune = getattr(run, "tune", None)
    also = {"weights": run.weights, "test": tune.test_url if tune else ""}
    paths = {"out": folder, "data": run.stream.url} | {setting: path for setting, path in also.items() if path}
    program += ["--metrics-port", str(metrics_port)] if metrics_port else []
    program = [*map(literal, program), "--index", macros.replica_id, "--", command]
    return app(name, program, nodes=(least, most), settings=to_yaml(run), gpus=gpus,
               metadata={**where, "metrics_port": metrics_port, "paths": on_volumes(paths)}, **common)  # fmt: skip
