"""What a stage is: model shape, data, recipe. The semantic fields, those that change the numbers.

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

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
    augment: Augmentation = Augmentation(crop_scale=(0.4, 1.0))
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Images 2i and 2i + 1 of a batch, and their targets, are mixed with a share drawn from
    Beta(mixup, mixup) (Zhang et al. 2018, arXiv 1710.09412); 0 mixes nothing."""
    resample: Annotated[float, Field(ge=1)] | None = None
    """Samples of an epoch, as a multiple of its unique images; more than 1 repeats images with rare
    hashtags, by the inverse square root of the frequency (after Mahajan et al. 2018; the paper's
    3 billion images make 5 billion samples). None shows every image once."""
    val_images: Count | None = None
    """Held-out images that val_loss is measured on; none means all."""


class OnDataset(Frozen):
    """A task on labelled images of its own."""

    dataset: str | None = None
    """A dataset as in a study's `dataset`; none means the pretraining set's own labelled split."""


class LinearProbe(OnDataset):
    """Logistic regression on frozen features; the penalty is chosen on a split of the train set."""

    protocol: Literal["linear_probe"] = "linear_probe"
    train_images: Count | None = None
    """Use at most this many labelled training images; none means all."""
    penalties: tuple[Positive, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """L2 penalties tried, per image (ours)."""
    pool: Pool = "cls"
    resize: Resize = "timm"


class FewShot(OnDataset):
    """Logistic regression on K labelled images a class, over several splits (paper sec. 4.4)."""

    protocol: Literal["few_shot"] = "few_shot"
    shots: tuple[Count, ...] = (1, 5, 10)
    splits: Count = 5
    penalty: Positive = 1e-3
    pool: Pool = "cls"
    resize: Resize = "timm"


class FineTune(Optimization, OnDataset):
    """Every weight trained on the labelled set, with layer-wise learning-rate decay."""

    protocol: Literal["fine_tune"] = "fine_tune"
    train_images: Count | None = None
    lr: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    drop_path: Fraction = 0.0
    label_smoothing: Fraction = 0.1
    pool: Pool = "cls"
    resize: Resize = "timm"
    augment: Augmentation = Augmentation(crop_scale=(0.4, 1.0))


TransferRecipe = Annotated[LinearProbe | FewShot | FineTune, Field(discriminator="protocol")]
Recipe = MaeRecipe | WspRecipe | LinearProbe | FewShot | FineTune


def epoch_samples(images: int, recipe: Recipe) -> int:
    """Samples of one epoch over `images` unique images: as many, or more with `resample`."""
    factor = recipe.resample if isinstance(recipe, WspRecipe) else None
    return images if factor is None else round(images * factor)


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


class Images(Frozen):
    """Which images a stage reads. `fingerprint` stands for their content; paths never enter."""

    dataset: str
    """Readable name; not semantic (the fingerprint is), left out of the identity."""
    fingerprint: str
    split: str
    images: int
    """Distinct images: the nested subset of the split with this many members."""
    layout: str = ""
    """How the split is cut into shards, where the order of samples depends on it: see
    `harness.study.datasets.ORDER_WINDOW`."""


class StageConfig(Frozen):
    """Everything that decides the numbers of one stage. Its hash is the stage's identity."""

    kind: Literal["mae", "wsp", "linear_probe", "few_shot", "fine_tune"]
    size: str
    """Readable name of `model`; not semantic."""
    model: Model
    images: Images
    """Training images. Evaluation reads the split `val` (wsp) or `test` (transfer) of the set."""
    num_classes: int = 0
    """Outputs of the head: hashtags for wsp, classes for transfer, 0 for mae."""
    recipe: Recipe
    steps: int = 0
    """Optimizer steps; 0 for protocols that train by a solver."""
    seed: int = 0
    weights: str = ""
    """sha256 of the weights from elsewhere that the encoder starts from; none if empty."""
    upstream: dict[str, str] = {}
    """Role -> stage id. The only role so far is `encoder`: where the weights come from."""

    @property
    def epoch_samples(self) -> int:
        """Images shown in one epoch: the unique ones, or more with `resample`."""
        return epoch_samples(self.images.images, self.recipe)

    @property
    def samples(self) -> int:
        """Images shown to the model during training, repeats counted."""
        return self.steps * self.recipe.batch if isinstance(self.recipe, Optimization) else 0


class Execution(Frozen):
    """How a stage is run: never part of its identity, may differ between attempts."""

    ranks: int = 1
    """Processes of one stage; one GPU each on CUDA."""
    threads: int = 1
    """CPU threads of one rank."""
    micro_batch: int | None = None
    """Images per forward pass of one rank; none means the whole share of the rank."""
    activation_checkpointing: bool = False
    """Blocks keep their input only, and are computed again in the backward pass."""
    sharded_init: bool | None = None
    """Whether the model is built shard by shard; none means where it is large for the host."""
    head_batch: int | None = None
    """Images whose logits are there at a time in wsp; none means the whole forward pass's."""
    device: Literal["cpu", "cuda"] = "cpu"
    memory_gib: float | None = None
    """Memory of all ranks; enforced on a CPU. None means no limit."""
    zero_config: str | None = None
    """Name or path of a DeepSpeed config; none picks ds_configs/ by device."""
    checkpoint_every_s: float = 60.0
    eval_points: int = 8
    """How often val_loss is measured during wsp, evenly spaced, the last at the end."""
    weights_path: str = ""
    """Where the weights from elsewhere are."""
    dataset_path: str
    """Where the shards are: 'scenes', 'scenes-64k' or a directory."""


class StageFile(Frozen):
    """Content of stage.json: the identity, its full config, and how to run it."""

    schema_version: int = Field(default=1, alias="schema")
    id: str
    kind: str
    name: str
    config: StageConfig
    upstream_kinds: dict[str, str] = {}
    """Stage id -> kind, to find the folder of an upstream stage."""
    params: int
    """Parameters of the encoder, without head or decoder."""
    flops: float
    """Training FLOPs of the whole stage, by `harness.study.flops`."""
    execution: Execution

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
