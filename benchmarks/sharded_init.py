"""Host memory and time to build a large ViT for WSP: shard by shard on several ranks, or whole.

    python benchmarks/sharded_init.py [--size 2b] [--ranks 2] [--whole] [--out FILE]

Each rank is a process of this machine (gloo, CPU). `weights` is the growth of a rank's peak memory
while the model is made on the meta device, filled and partitioned, bfloat16 as on a GPU; `engine`
is the peak after DeepSpeed's set-up, with the optimizer's float32 weights and gradient buffers.
Moments, which are made in the first step, are not in it. No step is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine


def one_rank(arguments: argparse.Namespace) -> None:
    """Builds, and prints what it took as JSON."""
    from harness.models.heads import Classifier
    from harness.models.vit import VisionEncoder
    from harness.study.flops import encoder_params
    from harness.study.recipes import Duration, Model, WspRecipe
    from harness.study.sizes import SIZES
    from harness.study.stages import Execution
    from harness.train.blueprint import Blueprint
    from harness.train.build import build_sharded
    from harness.train.engine import Engine, connect
    from harness.train.groups import parameter_groups
    from harness.train.zero_config import config_path, read_config

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    size = SIZES[arguments.size]
    model = Model(
        width=size.width, depth=size.depth, heads=size.heads, patch=size.patch, image_size=224
    )
    recipe = WspRecipe(duration=Duration(steps=1), batch=2 * ranks)
    blueprint = Blueprint(
        make=lambda: Classifier(VisionEncoder(model), 28_000, "cls"),
        seed=0,
        groups=lambda module: parameter_groups(module, depth=size.depth, weight_decay=0.1),
    )
    execution = Execution(dataset_path="", zero_config=arguments.config)
    connect(execution, rank, ranks)
    before, began = _peak(), time.perf_counter()
    if arguments.whole:
        module, groups = blueprint.whole()
    else:
        config = read_config(config_path(execution.zero_config, "cpu"))
        module, groups = build_sharded(blueprint, config)
    weights, weights_s = _peak(), time.perf_counter() - began
    found: dict[str, Any] = {
        "parameters": encoder_params(model) + 28_000 * (size.width + 1),
        "start_gib": round(before / 2**30, 2),
        "weights_gib": round((weights - before) / 2**30, 2),
        "weights_s": round(weights_s, 1),
    }
    if arguments.engine:
        began = time.perf_counter()
        Engine(module, groups, recipe, execution, rank=rank, ranks=ranks)
        found |= {
            "engine_gib": round((_peak() - before) / 2**30, 2),
            "engine_s": round(time.perf_counter() - began, 1),
        }
    print("RESULT", json.dumps(found), flush=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="every rank builds all of it first")
    parser.add_argument("--engine", action="store_true", help="go on to DeepSpeed's set-up")
    parser.add_argument("--config", default="zero3_bf16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sharded_init.json"))
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        one_rank(arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {
        "WORLD_SIZE": str(arguments.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    about |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    outputs = [tempfile.TemporaryFile("w+") for _ in range(arguments.ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    codes = [process.wait() for process in processes]
    found = []
    for output, code in zip(outputs, codes, strict=True):
        output.seek(0)
        text = output.read()
        assert code == 0, text
        found.append(json.loads(text.split("RESULT ", 1)[1].splitlines()[0]))
    way = "whole" if arguments.whole else "shard by shard"
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    report[f"{arguments.size}, {arguments.ranks} ranks, {way}"] = found
    report["machine"] = machine()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
