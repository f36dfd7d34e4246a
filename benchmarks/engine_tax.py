"""What DeepSpeed ZeRO-3 and the engine add to a training step, over a bare loop of the same model.

    python benchmarks/engine_tax.py [--sizes d32x3 d64x4] [--out FILE.json]

Both arms start from the same weights and see the same batch; their losses are compared first, then
blocks of steps are timed in ABBA order. Reported is the median of paired log-ratios with a
bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import machine
from torch import Tensor
from torch.nn import functional as F

from harness.models.heads import Classifier
from harness.models.init import initialize
from harness.models.mae import Mae
from harness.models.vit import VisionEncoder
from harness.study.recipes import MaeRecipe, Model, WspRecipe
from harness.study.sizes import SIZES
from harness.study.stages import Execution
from harness.train.engine import Engine
from harness.train.groups import parameter_groups

BATCH, CLASSES, STEPS_PER_BLOCK, PAIRS, WARMUP = 128, 60, 3, 16, 4


def measure(size: str, kind: str, device: str) -> dict[str, object]:
    shape = SIZES[size]
    model = Model(width=shape.width, depth=shape.depth, heads=shape.heads, patch=4, image_size=24)
    recipe: MaeRecipe | WspRecipe
    if kind == "mae":
        recipe = MaeRecipe.model_validate(
            {
                "duration": {"steps": 10},
                "decoder_width": 32,
                "decoder_depth": 1,
                "decoder_heads": 2,
                "batch": BATCH,
                "clip": 1.0,
            }
        )
        bare_model: torch.nn.Module = Mae(model, recipe)
    else:
        recipe = WspRecipe.model_validate({"duration": {"steps": 10}, "batch": BATCH})
        bare_model = Classifier(VisionEncoder(model), CLASSES, "cls")
    initialize(bare_model, 0)
    ours_model = copy.deepcopy(bare_model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 24, 24, generator=generator).to(device)
    noise = torch.rand(BATCH, model.num_patches, generator=generator).to(device)
    target = torch.randint(0, CLASSES, (BATCH,), generator=generator).to(device)
    bare_model.to(device)

    def loss_of(forward: Callable[..., object]) -> Tensor:
        if kind == "mae":
            return forward(images, noise)[0]  # type: ignore[index]
        return F.cross_entropy(forward(images), target)  # type: ignore[arg-type]

    groups = parameter_groups(bare_model, depth=model.depth, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    execution = Execution(dataset_path="none", device=device)  # type: ignore[arg-type]
    engine = Engine(
        ours_model,
        parameter_groups(ours_model, depth=model.depth, weight_decay=recipe.weight_decay),
        recipe,
        execution,
        rank=0,
        ranks=1,
    )
    engine.set_lr(recipe.lr)

    def bare() -> Tensor:
        loss = loss_of(bare_model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def ours() -> Tensor:
        loss = loss_of(engine.forward)
        engine.backward(loss)
        engine.step()
        return loss

    difference = max(abs(bare().item() - ours().item()) for _ in range(WARMUP))

    def block(step: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        for _ in range(STEPS_PER_BLOCK):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / STEPS_PER_BLOCK

    gc.disable()
    ratios, bare_s, ours_s = [], [], []
    for _ in range(PAIRS):
        a, b, c, d = block(bare), block(ours), block(ours), block(bare)
        ratios.append(np.log((b + c) / (a + d)))
        bare_s.append((a + d) / 2)
        ours_s.append((b + c) / 2)
    gc.enable()
    engine.close()
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(ratios, len(ratios))) for _ in range(2000)]
    low, high = np.exp(np.quantile(medians, [0.025, 0.975]))
    return {
        "size": size,
        "kind": kind,
        "bare_ms": round(float(np.median(bare_s)) * 1e3, 2),
        "ours_ms": round(float(np.median(ours_s)) * 1e3, 2),
        "ratio": round(float(np.exp(np.median(ratios))), 4),
        "ci95": [round(float(low), 4), round(float(high), 4)],
        "largest_loss_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sizes", nargs="+", default=["d32x3", "d64x4"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in given.sizes:
        for kind in ("mae", "wsp"):
            rows.append(measure(size, kind, given.device))
            print(json.dumps(rows[-1]), flush=True)
    about = {
        "benchmark": "engine_tax",
        "machine": machine("torch", "deepspeed"),
        "threads": 1,
        "rows": rows,
    }
    if given.out:
        given.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
