"""What a stage is: model shape, data, recipe, what it starts from; and how it is run."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from harness.study.protocols import Features, TransferRecipe
from harness.study.recipes import (
    Frozen,
    MaeRecipe,
    Model,
    Optimization,
    WspRecipe,
    epoch_samples,
)

Kind = Literal[
    "mae",
    "wsp",
    "features",
    "linear_probe",
    "sgd_probe",
    "knn",
    "few_shot",
    "prompt_tuning",
    "fine_tune",
    "evaluate",
    "lit",
    "zero_shot",
    "retrieval",
    "detection",
    "video",
]

Recipe = MaeRecipe | WspRecipe | Features | TransferRecipe


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

    kind: Kind
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
    """Role -> stage id. `encoder`: where the weights come from; `features`: the frozen encoder's
    pass over the images; `model`: a task that this one judges further."""

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
    nodes: int = 1
    """Nodes that a scheduler spreads them over, at least."""
    time_s: float | None = None
    """Time limit for a scheduler."""
    threads: int = 1
    """CPU threads of one rank."""
    share: int = 1
    """Up to so many stages of one rank use one GPU at a time; no meaning on a CPU."""
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
    hang_after_s: float = 1800.0
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
