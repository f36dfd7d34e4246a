"""Two towers in one space: a text tower that trains, and the features of one that does not.

Source: LiT (Zhai et al. 2022, arXiv 2111.07991), with CLIP's linear projections and learned
temperature (Radford et al. 2021, arXiv 2103.00020). Shapes: B pairs, T tokens, D width of the image
tower, E width of the shared space.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import UserError
from harness.models.init import Values
from harness.models.text import ByteTower, FolderTower, Tokenizer, make_tokenizer
from harness.models.weight_files import METADATA_KEY
from harness.study.protocols import Lit, TextTower
from harness.study.words import TextFolder

FILE = "lit.safetensors"
TEXT_FOLDER = "text"
"""Beside it: config and tokenizer of a text tower of `transformers`."""


class TwoTowers(nn.Module):
    """Unit vectors of image features and of texts in one space, and the scale of their products."""

    def __init__(self, recipe: Lit, features: int, folder: Path | None = None) -> None:
        super().__init__()
        shared = recipe.embed or features
        self.text: ByteTower | FolderTower
        if isinstance(recipe.text, TextTower):
            self.text = ByteTower(recipe.text, recipe.context)
        else:
            # Its weights are set with all others.
            self.text = FolderTower(folder or Path(recipe.text.folder), with_weights=False)
        self.image_projection = nn.Linear(features, shared, bias=False)
        self.text_projection = nn.Linear(recipe.text.width, shared, bias=False)
        self.log_scale = nn.Parameter(torch.zeros(1))

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        """Classes of the layers that DeepSpeed gathers, and that are recomputed, as a whole."""
        return self.text.layer_types if isinstance(self.text, FolderTower) else (Block,)

    def forward(
        self, features_BD: Tensor | None, tokens_BT: Tensor | None, mask_BT: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """image_BE, text_BE, float32 and of length 1; log_scale_1. None for what is not given."""
        image_BE = text_BE = None
        if features_BD is not None:
            dtype = self.image_projection.weight.dtype
            image_BE = F.normalize(self.image_projection(features_BD.to(dtype)).float(), dim=-1)
        if tokens_BT is not None and mask_BT is not None:
            text_BE = self.text_projection(self.text(tokens_BT, mask_BT))
            text_BE = F.normalize(text_BE.float(), dim=-1)
        return image_BE, text_BE, self.log_scale.float()


def start_values(recipe: Lit) -> Values:
    """What does not start by chance: the temperature, a text tower from a folder."""
    values: Values = {"log_scale": torch.full((1,), -math.log(recipe.temperature)).clone}
    if isinstance(recipe.text, TextFolder):
        tower = FolderTower(Path(recipe.text.folder), with_weights=True)
        own = {f"text.{name}": value.detach() for name, value in tower.named_parameters()}
        values |= {name: value.float for name, value in own.items()}
    return values


@dataclass(frozen=True, kw_only=True)
class TrainedLit:
    """What a `lit` stage left."""

    recipe: Lit
    model: TwoTowers
    tokenizer: Tokenizer

    @torch.inference_mode()
    def texts(self, texts: list[str], batch: int = 256) -> Tensor:
        """float32 [B, E] on the CPU, of length 1."""
        device = self.model.log_scale.device
        found = []
        for first in range(0, len(texts), batch):
            tokens_BT, mask_BT = self.tokenizer(texts[first : first + batch])
            text_BE = self.model(None, tokens_BT.to(device), mask_BT.to(device))[1]
            found.append(text_BE.cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def images(self, features_MD: Tensor) -> Tensor:
        """float32 [M, E] on the CPU, of length 1, from pooled features of the image tower."""
        return self.model(features_MD.to(self.model.log_scale.device), None, None)[0].cpu()


def read_lit(stage_folder: Path, device: torch.device) -> TrainedLit:
    """The towers of a `lit` stage, ready to use. UserError for a file that is none of these."""
    path = stage_folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        recipe = Lit.model_validate(said["recipe"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as the towers of a lit task: {first}") from None
    text_folder = stage_folder / TEXT_FOLDER
    model = TwoTowers(recipe, said["features"], text_folder)
    model.load_state_dict(tensors)
    tokenizer = make_tokenizer(recipe.text, recipe.context, text_folder)
    return TrainedLit(recipe=recipe, model=model.to(device).eval(), tokenizer=tokenizer)
