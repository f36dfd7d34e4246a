"""Recipes of the pretraining stages and what all recipes are made of: fields that change numbers.

Every default lives here and nowhere else. A field at its default does not enter a stage's
identity, so a new field with a default keeps old ids; changing a default is a new recipe and
needs a bump of `identity.VERSION`.

"paper" marks a value from Singh et al. 2023 (arXiv 2303.13496) or the MAE paper it follows
(He et al. 2022, arXiv 2111.06377); "ours" marks a choice of this project.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from harness.errors import UserError
from harness.units import parse_count


class Frozen(BaseModel):
    """Base of all configs: immutable, keyword-only, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


def _count(value: Any) -> int:
    try:
        return parse_count(value)
    except UserError as error:
        raise ValueError(str(error)) from None


Count = Annotated[int, BeforeValidator(_count)]
"""A whole number of at least 1, written 4000, 4k or 3B."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


Pool = Literal["cls", "mean", "mean_fc_norm"]
"""What stands for an image: the class token, the mean of the normed patch tokens, or the norm of
the mean of the patch tokens."""


Resize = Literal["timm", "mae", "swag"]
"""How a position table is resized to another grid, bicubic: as timm does (antialiased, and by
another cubic kernel, so it differs also where the grid grows), as the MAE reference does (neither
antialiased nor corners aligned), or as SWAG does (corners aligned)."""


class Duration(Frozen):
    """How long a stage trains, in exactly one unit; converted by `harness.units.steps_of`."""

    samples: Count | None = None
    epochs: Positive | None = None
    steps: Count | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> Duration:
        given = [name for name in ("samples", "epochs", "steps") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of samples, epochs, steps; found {found}")
        return self

    @property
    def unit(self) -> Literal["samples", "epochs", "steps"]:
        """The unit that was given."""
        return next(u for u in ("samples", "epochs", "steps") if getattr(self, u) is not None)  # type: ignore[return-value]

    @property
    def amount(self) -> float:
        """The number that was given, in that unit."""
        return float(getattr(self, self.unit))


def _share_tag(value: Any) -> str:
    return "literal[part]" if isinstance(value, (dict, Duration)) else "literal[fraction]"


# Tags are written as pydantic names literals, which messages leave out.
Share = Annotated[
    Annotated[Fraction, Tag("literal[fraction]")] | Annotated[Duration, Tag("literal[part]")],
    Discriminator(_share_tag),
]
"""Part of a stage's duration: a fraction of it, or a duration of its own such as {samples: 40k}."""


class Optimization(Frozen):
    """AdamW, its schedule and its batch; shared by every gradient stage."""

    duration: Duration
    batch: Count = 128
    """Images per optimizer step over all ranks and accumulation steps."""
    lr: Positive = 1e-3
    """Peak learning rate, as it is: not scaled by the batch."""
    lr_min: Annotated[float, Field(ge=0)] = 0.0
    warmup: Share = 0.05
    """Linear warm-up from 0."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    cooldown: Share = 0.2
    """Linear decay at the end of `wsd`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class Augmentation(Frozen):
    """Random resized crop and horizontal flip (He et al. 2022, sec. 4)."""

    crop_scale: tuple[Fraction, Annotated[float, Field(gt=0, le=1)]] = (0.2, 1.0)
    """Smallest and largest area of the crop, as a fraction of the image."""
    flip: bool = True


def over(default: Augmentation) -> BeforeValidator:
    """For a recipe whose augmentation has a default of its own: fields that a study leaves out are
    those of this default.
    """

    def merge(value: Any) -> Any:
        return {**default.model_dump(), **value} if isinstance(value, dict) else value

    return BeforeValidator(merge)


LABELLED_VIEWS = Augmentation(crop_scale=(0.4, 1.0))
"""Where an image has to show what it is labelled with (ours)."""


class MaeRecipe(Optimization):
    """Masked autoencoder pre-pretraining (He et al. 2022, sec. 3)."""

    kind: Literal["mae"] = "mae"
    data: Literal["full", "same"] | Count = "full"
    """Which images MAE sees: all of the pretraining split, the cell's own subset, or N of them."""
    lr: Positive = 1.5e-3
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    norm_target: bool = True
    """Standardise the pixels of each target patch (paper)."""
    decoder_width: Count = 512
    decoder_depth: Count = 8
    decoder_heads: Count = 16
    clip: Annotated[float, Field(ge=0)] = 0.0
    augment: Augmentation = Augmentation()
    val_images: Count | None = None
    """Held-out images that val_loss is measured on; none means all."""


class WspRecipe(Optimization):
    """Weakly supervised pretraining on hashtags (Singh et al. 2023, sec. 3)."""

    kind: Literal["wsp"] = "wsp"
    drop_path: Fraction = 0.0
    pool: Pool = "cls"
    resize: Resize = "timm"
    augment: Annotated[Augmentation, over(LABELLED_VIEWS)] = LABELLED_VIEWS
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Images 2i and 2i + 1 of a batch, and their targets, are mixed with a share drawn from
    Beta(mixup, mixup) (Zhang et al. 2018, arXiv 1710.09412); 0 mixes nothing."""
    resample: Annotated[float, Field(ge=1, le=1000)] | None = None
    """Samples of an epoch, as a multiple of its unique images; more than 1 repeats images with rare
    hashtags, by the inverse square root of the frequency (after Mahajan et al. 2018; the paper's
    3 billion images make 5 billion samples). None shows every image once."""
    val_images: Count | None = None
    """Held-out images that val_loss is measured on; none means all."""


def epoch_samples(images: int, recipe: Frozen) -> int:
    """Samples of one epoch over `images` unique images: as many, or more with `resample` or, of
    clips, with `repeats`.
    """
    factor = recipe.resample if isinstance(recipe, WspRecipe) else None
    shown = images if factor is None else round(images * factor)
    # Of pydantic's objects, getattr of what is not there is slow, and plans are of many stages.
    return shown * vars(recipe).get("repeats", 1)


class Model(Frozen):
    """Shape of the encoder at the resolution it is trained at."""

    width: int
    depth: int
    heads: int
    patch: int
    image_size: int

    @property
    def num_patches(self) -> int:
        """Patches of one image, the class token not counted."""
        return (self.image_size // self.patch) ** 2
