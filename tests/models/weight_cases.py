"""Small networks with weights that no two tensors share, and the classes of other libraries."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from harness.models import interchange
from harness.models.heads import Classifier
from harness.models.init import generator_of, initialize
from harness.models.interchange import Weights
from harness.models.mae import Mae
from harness.models.vit import VisionEncoder
from harness.study.recipes import Duration, MaeRecipe, Model

SMALL = Model(width=32, depth=3, heads=4, patch=4, image_size=16)
RECIPE = MaeRecipe(duration=Duration(steps=1), decoder_width=24, decoder_depth=2, decoder_heads=3)
SAID = {"heads": SMALL.heads, "decoder_heads": RECIPE.decoder_heads}
"""Width 32 has 2 heads in the size table: the file must say that these have 4."""


def disturbed(module: nn.Module) -> nn.Module:
    """The module initialized, and every parameter moved: biases and norms differ as well."""
    initialize(module, 0)
    with torch.no_grad():
        for name, param in module.named_parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator_of(1, name))
    return module


def mae(recipe: MaeRecipe = RECIPE) -> Mae:
    module = disturbed(Mae(SMALL, recipe))
    assert isinstance(module, Mae)
    return module


def classifier(classes: int = 5) -> Classifier:
    module = disturbed(Classifier(VisionEncoder(SMALL), classes, "cls"))
    assert isinstance(module, Classifier)
    return module


def weights_of(module: nn.Module, **said: object) -> Weights:
    """Encoder, decoder and head of one of our modules."""
    weights = interchange.parse(
        {name: value.detach().clone() for name, value in module.state_dict().items()},
        said={**SAID, "layout": "harness", **said},
    )
    assert not weights.problems
    return weights


def finetuned() -> Weights:
    """What MAE fine-tuning leaves: `fc_norm` for `norm`, and a head (timm's own class)."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=5,
        global_pool="avg",
    )  # fmt: skip
    for name, param in model.named_parameters():
        param.data = torch.randn(param.shape, generator=generator_of(2, name))
    return interchange.parse(dict(model.state_dict()), said=SAID)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(one: Weights, other: Weights) -> None:
    """Bit for bit, section by section."""
    assert one.sections().keys() == other.sections().keys()
    for section, part in one.sections().items():
        found = other.sections()[section]
        assert part.keys() == found.keys(), section
        for name, value in part.items():
            assert value.dtype == found[name].dtype
            assert torch.equal(value, found[name]), f"{section} {name}"
