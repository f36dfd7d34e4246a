"""What DeepSpeed ZeRO-3 and the engine add to a training step, over a bare loop of the same model.

    python benchmarks/engine_tax.py [--sizes d32x3 d64x4] [--out FILE.json]

Both arms start from the same weights and see the same batch; their losses are compared first, then
blocks of steps are timed in ABBA order. Reported is the median of paired log-ratios with a
bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from paired import compare
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

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = compare(bare, ours, pairs=PAIRS, steps=STEPS_PER_BLOCK, wait=wait)
    engine.close()
    return {
        "size": size,
        "kind": kind,
        **found,
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
