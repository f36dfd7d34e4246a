"""Prompt tuning against timm's own blocks, and what takes a gradient."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from harness.models.heads import pooled
from harness.models.init import initialize
from harness.models.prompts import PromptedClassifier
from harness.models.vit import VisionEncoder
from harness.study import flops
from harness.study.recipes import Model, Pool
from tests.models.test_counted_flops import counted

SMALL = Model(width=32, depth=3, heads=2, patch=4, image_size=16)


def encoder() -> VisionEncoder:
    made = VisionEncoder(SMALL)
    initialize(made, 0)
    return made


def prompted(num_prompts: int, pool: Pool = "cls") -> PromptedClassifier:
    return PromptedClassifier(
        encoder(), num_prompts, 5, pool, torch.Generator().manual_seed(1)
    ).eval()


def images(num: int = 4) -> torch.Tensor:
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("pool", ["cls", "mean", "mean_fc_norm"])
def test_without_prompts_it_is_the_encoder(pool: Pool) -> None:
    torch.testing.assert_close(
        prompted(0, pool).pooled(images()), pooled(encoder(), images(), pool)
    )


def timm_features(model: PromptedClassifier) -> torch.Tensor:
    """[B, 1 + T + L, D]: every block of timm's ViT on tokens with its prompts put in by hand.

    Prompts stand at the end here and behind the class token there: attention does not care.
    """
    vit = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0
    )
    vit.load_state_dict(model.encoder.state_dict())
    vit.eval()
    tokens = vit._pos_embed(vit.patch_embed(images()))
    for i, block in enumerate(vit.blocks):
        rows = [torch.cat([sample, model.prompts[i]]) for sample in tokens]
        tokens = block(torch.stack(rows))[:, : tokens.shape[1]]
    return vit.norm(tokens)


@pytest.mark.parametrize("num_prompts", [1, 7])
def test_it_is_timm_with_prompts_put_in_by_hand(num_prompts: int) -> None:
    model = prompted(num_prompts)
    theirs = timm_features(model)
    torch.testing.assert_close(model.pooled(images()), theirs[:, 0], atol=1e-5, rtol=1e-5)
    model.pool = "mean"
    torch.testing.assert_close(
        model.pooled(images()), theirs[:, 1:].mean(dim=1), atol=1e-5, rtol=1e-5
    )


def test_prompts_change_what_the_encoder_sees() -> None:
    assert not torch.allclose(prompted(4).pooled(images()), prompted(0).pooled(images()), atol=1e-3)


def test_only_prompts_and_head_take_a_gradient() -> None:
    model = prompted(4)
    torch.nn.init.normal_(model.head.weight)
    model(images()).square().sum().backward()
    assert set(model.learned()) == {"prompts", "head.weight", "head.bias"}
    for name, param in model.named_parameters():
        assert (param.grad is not None) == (name in model.learned()), name
    assert model.prompts.grad is not None
    # Every prompt of every block is of use: none is left out by a slice.
    assert (model.prompts.grad.abs().sum(dim=2) > 0).all()


def test_prompts_start_in_the_bounds_of_the_paper() -> None:
    model = PromptedClassifier(encoder(), 200, 5, "cls", torch.Generator().manual_seed(0))
    bound = (6 / (3 * 4 * 4 + 32)) ** 0.5
    assert model.prompts.abs().max() <= bound
    assert model.prompts.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert model.head.weight.abs().max() == 0


def test_what_is_learned_can_be_put_into_another_one() -> None:
    first, other = prompted(3), prompted(3)
    torch.nn.init.normal_(first.head.weight)
    with torch.no_grad():
        first.prompts.mul_(2)
    other.load_learned({name: value.clone() for name, value in first.learned().items()})
    assert torch.equal(first(images()), other(images()))


@pytest.mark.parametrize("train", [False, True])
def test_flops_are_those_that_torch_counts(train: bool) -> None:
    with torch.device("meta"):
        bare = VisionEncoder(SMALL)
        model = PromptedClassifier(bare, 6, 20, "cls", torch.Generator(device="cpu"))
        got = counted(model, torch.rand(1, 3, 16, 16), train=train)
    formula = flops.prompted_train if train else flops.prompted_forward
    assert got == formula(SMALL, 6, 20)
