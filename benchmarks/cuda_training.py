"""A training step of the paper's sizes on one CUDA GPU: the engine beside a bare loop.

    python benchmarks/cuda_training.py [--sizes b l h] [--out FILE.json]

bfloat16 at 224 pixels. Both arms start from the same weights and see the same batch: the engine is
DeepSpeed ZeRO-3 with the settings of ds_configs/zero3_bf16.json, the bare loop keeps bfloat16
weights and gradients beside float32 ones that torch's fused AdamW updates. Blocks of steps are
timed in ABBA order; reported are the median of paired log-ratios with a bootstrap 95 % interval,
images/s, the closed-form operations of a step per second, and their share of the rate of an
8192 x 8192 x 8192 product, measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from paired import compare
from torch import Tensor

from harness.models.heads import Classifier, label_targets
from harness.models.mae import Mae
from harness.models.vit import VisionEncoder
from harness.study.flops import mae_train, vit_train
from harness.study.recipes import Duration, MaeRecipe, Model, Optimization, WspRecipe
from harness.study.sizes import SIZES
from harness.study.stages import Execution
from harness.train.blueprint import Blueprint
from harness.train.build import build_engine
from harness.train.groups import parameter_groups

TAGS, WARMUP, STEPS_PER_BLOCK, PAIRS = 28_000, 3, 4, 6
BATCHES = {"b": 256, "l": 128, "h": 64}


def matmul_rate() -> float:
    """FLOP/s of a bfloat16 product of two square matrices of random numbers."""
    size, times = 8192, 20
    one, other = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(one, other)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        torch.mm(one, other)
    torch.cuda.synchronize()
    return 2 * size**3 * times / (time.perf_counter() - start)


class Bare:
    """Mixed precision by hand, without sharding, hooks or buckets."""

    def __init__(self, blueprint: Blueprint, recipe: Optimization) -> None:
        self.clip = recipe.clip
        self.model, groups = blueprint.whole()
        self.low: list[Tensor] = []
        self.high: list[Tensor] = []
        for group in groups:
            params = list(group["params"])
            group["params"] = [param.detach().cuda().requires_grad_() for param in params]
            self.low += params
            self.high += group["params"]
        self.model.to("cuda", torch.bfloat16)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        grads = [param.grad for param in self.low]
        for param, grad in zip(self.high, grads, strict=True):
            param.grad = None if grad is None else grad.float()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.high, self.clip, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.low, self.high)  # pyright: ignore[reportPrivateImportUsage]
        for param in (*self.low, *self.high):
            param.grad = None


def measure(size: str, kind: str, batch: int, peak: float) -> dict[str, object]:
    """One row: a size and a stage's kind."""
    shape = SIZES[size]
    model = Model(
        width=shape.width, depth=shape.depth, heads=shape.heads, patch=shape.patch, image_size=224
    )
    if kind == "mae":
        mae = MaeRecipe(duration=Duration(steps=10), batch=batch, clip=1.0)
        recipe: Optimization = mae
        make: Callable[[], torch.nn.Module] = lambda: Mae(model, mae)  # noqa: E731
        flops = mae_train(model, mae)
    else:
        recipe = WspRecipe(duration=Duration(steps=10), batch=batch)
        make = lambda: Classifier(VisionEncoder(model), TAGS, "cls")  # noqa: E731
        flops = vit_train(model, TAGS)
    blueprint = Blueprint(
        make=make,
        seed=0,
        groups=lambda module: parameter_groups(
            module, depth=model.depth, weight_decay=recipe.weight_decay
        ),
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=generator).to("cuda", torch.bfloat16)
    noise = torch.rand(batch, model.num_patches, generator=generator).cuda()
    labels = torch.randint(0, TAGS, (2 * batch,), generator=generator).cuda()
    targets = label_targets(labels, torch.arange(0, 2 * batch + 1, 2).cuda())

    def loss_of(forward: Callable[..., Any]) -> Tensor:
        if kind == "mae":
            return forward(images, noise)[0]
        return forward(images, targets, None).mean()

    execution = Execution(dataset_path="none", device="cuda")
    torch.cuda.reset_peak_memory_stats()
    engine = build_engine(blueprint, recipe, execution, rank=0, ranks=1)
    engine.set_lr(recipe.lr)

    def ours() -> Tensor:
        loss = loss_of(engine.forward)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    own = [ours().item() for _ in range(WARMUP)]
    memory = torch.cuda.max_memory_allocated()
    plain = Bare(blueprint, recipe)

    def bare() -> Tensor:
        loss = loss_of(plain.model)
        plain.step(loss)
        return loss.detach()

    other = [bare().item() for _ in range(WARMUP)]

    found = compare(bare, ours, pairs=PAIRS, steps=STEPS_PER_BLOCK, wait=torch.cuda.synchronize)
    engine.close()
    seconds = found["ours_ms"] / 1e3
    return {
        "size": size,
        "kind": kind,
        "batch": batch,
        **found,
        "images_per_s": round(batch / seconds, 1),
        "tflop_per_s": round(batch * flops / seconds / 1e12, 1),
        "share_of_matmul": round(batch * flops / seconds / peak, 3),
        "peak_memory_gb": round(memory / 1e9, 2),
        "losses": own,
        "losses_bare": other,
    }


def main() -> None:
    """Measures and prints each row, and writes all at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sizes", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    peak = matmul_rate()
    rows = []
    for size in given.sizes:
        for kind in ("mae", "wsp"):
            rows.append(measure(size, kind, BATCHES[size], peak))
            print(json.dumps(rows[-1]), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    about = {
        "benchmark": "cuda_training",
        "machine": machine("torch", "deepspeed") | {"gpu": torch.cuda.get_device_name()},
        "matmul_tflop_per_s": round(peak / 1e12, 1),
        "rows": rows,
    }
    if given.out:
        given.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
