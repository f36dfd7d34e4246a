"""What only a GPU can show: bfloat16 training at ViT-L, with DeepSpeed's fused optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from harness.models.heads import Classifier, label_targets
from harness.models.mae import Mae
from harness.models.vit import VisionEncoder
from harness.study.recipes import Duration, MaeRecipe, Model, Optimization, WspRecipe
from harness.study.sizes import SIZES
from harness.study.stages import Execution
from harness.train.blueprint import Blueprint
from harness.train.build import build_engine
from harness.train.groups import parameter_groups
from harness.train.schedule import lr_at

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS, BATCH, TAGS = 200, 32, 28_000
SIZE = SIZES["l"]
MODEL = Model(
    width=SIZE.width, depth=SIZE.depth, heads=SIZE.heads, patch=SIZE.patch, image_size=224
)


def losses_of(recipe: Optimization, blueprint: Blueprint, *, is_mae: bool) -> list[float]:
    """Losses of 200 steps on eight fixed batches."""
    execution = Execution(dataset_path="", device="cuda")
    engine = build_engine(blueprint, recipe, execution, rank=0, ranks=1)
    assert engine.dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(BATCH, 3, 224, 224, generator=generator) for _ in range(8)]
    labels = torch.randint(0, TAGS, (8, 2 * BATCH), generator=generator)
    offsets = torch.arange(0, 2 * BATCH + 1, 2)
    losses = []
    for step in range(STEPS):
        engine.set_lr(lr_at(recipe, step, STEPS))
        batch = images[step % 8].to(engine.device, torch.bfloat16)
        if is_mae:
            loss = engine.forward(batch)[0]
        else:
            own = label_targets(labels[step % 8].cuda(), offsets.cuda())
            loss = engine.forward(batch, own, None).mean()
        engine.backward(loss)
        engine.step()
        norm = engine.norm_on_device()
        assert norm is not None and norm.isfinite().item(), step
        losses.append(loss.item())
    engine.close()
    return losses


def groups(module: torch.nn.Module) -> list[dict[str, object]]:
    return parameter_groups(module, depth=SIZE.depth, weight_decay=0.05)


def test_weakly_supervised_vit_l_trains_200_steps_in_bfloat16() -> None:
    recipe = WspRecipe(duration=Duration(steps=STEPS), batch=BATCH, lr=1e-4)
    blueprint = Blueprint(
        make=lambda: Classifier(VisionEncoder(MODEL), TAGS, "cls"), seed=0, groups=groups
    )
    losses = losses_of(recipe, blueprint, is_mae=False)
    assert all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(math.log(TAGS), abs=0.01)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_mae_of_vit_l_trains_200_steps_in_bfloat16() -> None:
    recipe = MaeRecipe(duration=Duration(steps=STEPS), batch=BATCH, lr=1.5e-4)
    blueprint = Blueprint(make=lambda: Mae(MODEL, recipe), seed=0, groups=groups)
    losses = losses_of(recipe, blueprint, is_mae=True)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-8:]) < sum(losses[:8])


def test_layer_norm_on_cuda_computes_in_float32() -> None:
    norm = VisionEncoder(MODEL).norm.to("cuda", torch.bfloat16)
    tokens = 3 * torch.randn(64, 50, SIZE.width, device="cuda", dtype=torch.bfloat16)
    exact = torch.nn.functional.layer_norm(
        tokens.float(), (SIZE.width,), norm.weight.float(), norm.bias.float(), norm.eps
    )
    assert (norm(tokens) != exact.bfloat16()).float().mean() < 1e-4


def test_the_optimizer_starts_from_exact_weights_in_bfloat16() -> None:
    recipe = MaeRecipe(duration=Duration(steps=1), batch=BATCH)
    blueprint = Blueprint(make=lambda: Mae(MODEL, recipe), seed=0, groups=groups)
    execution = Execution(dataset_path="", device="cuda")
    engine = build_engine(blueprint, recipe, execution, rank=0, ranks=1)
    model, _ = blueprint.whole()
    expected = dict(model.named_parameters())
    for name, value in engine.tensors():
        assert torch.equal(value, expected[name]), name
    engine.close()
