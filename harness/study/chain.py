"""The stages of one cell, made in order: mae, wsp, transfers. Each knows what it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.errors import UserError
from harness.study import flops as count_flops
from harness.study import identity
from harness.study.again import made
from harness.study.builtin import builtin
from harness.study.datasets import ORDER_WINDOW, DatasetMeta, Role, locate
from harness.study.recipes import (
    Duration,
    MaeRecipe,
    Model,
    Optimization,
    WspRecipe,
    epoch_samples,
)
from harness.study.schema import LoadedStudy, Resources, Stages
from harness.study.stage_set import StageSet
from harness.study.stages import Execution, Images, Kind, StageConfig, StageFile
from harness.study.starting import check_file, content_hash, find, is_checkpoint
from harness.study.transfers import Transfers
from harness.units import format_count, steps_of


class Surroundings(Protocol):
    """What a chain needs of the grid it belongs to."""

    loaded: LoadedStudy
    stages: StageSet
    schedules: dict[tuple[int, int, int], Any]
    """Recipes with their lengths in samples: (id of the recipe, epoch, steps) -> (recipe, it)."""
    executions: dict[tuple[Any, ...], tuple[Any, Any, Execution]]
    """Ways to run: key -> (the objects whose id() is in the key, it)."""
    features: dict[tuple[Any, ...], Any]
    """Recipes of the encoder's passes: one object for equal ones."""

    def put(self, stage: StageFile, hashed: str) -> str:
        """Keeps a stage, once however many cells need it; returns its id. `text` is what was
        hashed."""
        ...

    def dataset(self, spec: str) -> DatasetMeta:
        """Metadata of a dataset, read once."""
        ...

    def images(self, meta: DatasetMeta, split: str, images: int, one_window: bool) -> Images:
        """Some images of a split: one object for all stages that read them."""
        ...

    def resources(self, stage: str, axes: dict[str, Any]) -> Resources:
        """How a stage of a cell runs."""
        ...


def path_of(role: str) -> str:
    """Where the recipe of a role stands in the study file."""
    return f"stages.{role}" if role in ("mae", "wsp") else f"stages.transfer.{role}"


@dataclass(frozen=True)
class Link:
    """A stage of a chain, and the text that its id is made of."""

    role: str
    stage: StageFile
    text: identity.Text


class Chain:
    """The stages of one cell, made in order: mae, wsp, transfers."""

    def __init__(
        self,
        builder: Surroundings,
        meta: DatasetMeta,
        model: Model,
        axes: dict[str, Any],
        images: int,
    ) -> None:
        self.builder, self.meta = builder, meta
        self.model, self.axes, self.images = model, axes, images
        self.ids: dict[str, str] = {}
        self.links: list[Link] = []
        self.weights: Path | None = None
        """Weights from elsewhere that the cell starts from."""
        if is_checkpoint(axes["init"]):
            self.weights = find(axes["init"], builder.loaded.bases)
            check_file(self.weights, model.width)

    def build(self, recipes: Stages) -> None:
        """Makes every stage of the cell; `ids` then holds role -> stage id."""
        encoder: str | None = None
        if self.axes["init"] == "mae":
            if recipes.mae is None:
                raise UserError("init mae needs a recipe; add stages.mae to the study")
            encoder = self._mae(recipes.mae)
        if recipes.wsp is not None:
            encoder = self._wsp(recipes.wsp, encoder)
        Transfers(self, recipes.transfer, encoder).build()
        if not self.ids:
            raise UserError(f"init {self.axes['init']}: the cell has no stage; add stages.wsp")

    @property
    def start(self) -> str:
        """Initialization as part of a name."""
        # By content: the ids of transfers hold the whole id of what they start from.
        if self.weights is not None:
            return f"weights_{content_hash(self.weights)[:8]}"
        return str(self.axes["init"])

    def _mae(self, recipe: MaeRecipe) -> str:
        full = self.meta.count("pretrain")
        chosen = {"full": full, "same": self.images}.get(str(recipe.data))
        images = int(recipe.data) if chosen is None else chosen
        if images > full:
            raise UserError(
                f"stages.mae.data {format_count(images)}: dataset {self.meta.name} has"
                f" {format_count(full)} pretraining images; use at most that, or full"
            )
        if recipe.decoder_width % recipe.decoder_heads:
            raise UserError(
                f"stages.mae.decoder_width {recipe.decoder_width} is not a multiple of"
                f" decoder_heads {recipe.decoder_heads}; use"
                f" {-(-recipe.decoder_width // recipe.decoder_heads) * recipe.decoder_heads}"
            )
        kept = count_flops.num_kept(self.model, recipe.mask_ratio)
        if not 0 < kept < self.model.num_patches:
            raise UserError(
                f"stages.mae.mask_ratio {recipe.mask_ratio} keeps {kept} of"
                f" {self.model.num_patches} patches; at least one must stay and one be hidden"
            )
        per_image = count_flops.mae_train(self.model, recipe)
        return self._gradient("mae", recipe, images, 0, per_image, None, "mae")

    def _wsp(self, recipe: WspRecipe, encoder: str | None) -> str:
        classes = self.meta.num_hashtags
        per_image = count_flops.vit_train(self.model, classes)
        label = f"{format_count(self.images)}-{self.start}"
        return self._gradient("wsp", recipe, self.images, classes, per_image, encoder, label)

    def _gradient(
        self,
        kind: Kind,
        recipe: MaeRecipe | WspRecipe,
        images: int,
        classes: int,
        flops_per_image: float,
        encoder: str | None,
        label: str,
    ) -> str:
        self.meta.check_count("val", recipe.val_images, f"stages.{kind}.val_images")
        recipe, steps = self.schedule(kind, recipe, images)
        upstream = {"encoder": encoder} if encoder else {}
        config = self.config(kind, recipe, "pretrain", images, classes, steps, upstream)
        return self.put(kind, config, flops_per_image * config.samples, label)

    def schedule(self, role: str, recipe: Any, images: int) -> tuple[Any, int]:
        """Steps of a gradient stage over `images` different ones, and its recipe with lengths in
        samples. Raises UserError where they do not fit.
        """
        epoch = epoch_samples(images, recipe)
        duration = recipe.duration
        steps = steps_of(duration.unit, duration.amount, epoch, recipe.batch)
        # One object for equal stages of many cells. The recipe is kept, and with it its id().
        key = (id(recipe), epoch, steps)
        known = self.builder.schedules.get(key)
        if known is None:
            known = (recipe, self._with_samples(role, recipe, epoch, steps * recipe.batch))
            self.builder.schedules[key] = known
        return known[1], steps

    def _with_samples(self, role: str, recipe: Any, epoch: int, total: int) -> Any:
        """The recipe with warm-up and cooldown in samples where they are not fractions.

        Equal lengths written in other units are then one recipe. Raises UserError if they do not
        fit into the `total` samples of the stage.
        """
        given = {"warmup": recipe.warmup}
        if recipe.schedule == "wsd":
            given["cooldown"] = recipe.cooldown
        samples, changed = {}, {}
        for name, share in given.items():
            if isinstance(share, Duration):
                per_unit = {"samples": 1, "epochs": epoch, "steps": recipe.batch}[share.unit]
                samples[name] = max(1, round(share.amount * per_unit))
                changed[name] = Duration(samples=samples[name])
            else:
                samples[name] = share * total
        if sum(samples.values()) > total:
            parts = " and ".join(f"{round(n):,} of {name}" for name, n in samples.items())
            raise UserError(
                f"{path_of(role)}: {parts} are more than its {total:,} samples; shorten them, or"
                " train longer"
            )
        return recipe.model_copy(update=changed) if changed else recipe

    def config(
        self,
        kind: Kind,
        recipe: Any,
        split: Role,
        images: int,
        classes: int,
        steps: int,
        upstream: dict[str, str],
        meta: DatasetMeta | None = None,
        model: Model | None = None,
        reads_encoder: bool = True,
    ) -> StageConfig:
        """What decides the numbers of one stage."""
        meta = meta or self.meta
        # Weights from elsewhere are an encoder, of stages that start from none of ours.
        reads_weights = reads_encoder and "encoder" not in upstream
        name = meta.split_for(split)
        one_window = epoch_samples(images, recipe) <= ORDER_WINDOW
        fields = {
            "kind": kind,
            "size": self.axes["size"],
            "model": model or self.model,
            "images": self.builder.images(meta, name, images, one_window),
            "num_classes": classes,
            "recipe": recipe,
            "steps": steps,
            "seed": self.axes["seed"],
            "weights": content_hash(self.weights) if self.weights and reads_weights else "",
            "upstream": upstream,
        }
        return made(StageConfig, fields)  # of what the study file was checked for

    def put(
        self, role: str, config: StageConfig, flops: float, label: str, resources: str = ""
    ) -> str:
        """Keeps the stage of a role; `resources` names it in the rules, if the role does not."""
        readable = f"{config.size}-{label}-s{config.seed}"
        if config.kind == "mae":
            readable = f"{config.size}-{format_count(config.images.images)}-s{config.seed}"
        stages = self.builder.stages
        kept = identity.Text(config)
        hashed = kept.hashed(config.seed, [config.upstream[role] for role in kept.roles])
        fields = {
            "id": f"{readable}-{hashed[: identity.HASH_CHARS]}",
            "kind": config.kind,
            "name": readable,
            "config": config,
            "upstream_kinds": {u: stages[u].kind for u in config.upstream.values()},
            "params": count_flops.encoder_params(config.model),
            "flops": float(flops),
            "execution": self._execution(resources or role, config),
        }
        stage = made(StageFile, fields)
        self.ids[role] = self.builder.put(stage, hashed)
        self.links.append(Link(role, stage, kept))
        return stage.id

    def _execution(self, role: str, config: StageConfig) -> Execution:
        wanted = self.builder.resources(role, self.axes)
        spec = vars(config.recipe).get("dataset") or str(self.axes["dataset"])
        key = (id(wanted), id(config.recipe), role, spec, config.weights)
        known = self.builder.executions.get(key)
        if known is None:
            made = self._new_execution(role, config, wanted, spec)
            known = self.builder.executions[key] = (wanted, config.recipe, made)
        return known[2]

    def _new_execution(
        self, role: str, config: StageConfig, wanted: Resources, spec: str
    ) -> Execution:
        if builtin(spec) is None:
            spec = locate(spec, self.builder.loaded.bases)
        if isinstance(config.recipe, Optimization):
            batch = config.recipe.batch
            chunk = wanted.ranks * (wanted.micro_batch or 1)
            if batch % chunk:
                per = f" x micro_batch {wanted.micro_batch}" if wanted.micro_batch else ""
                near = max(chunk, batch // chunk * chunk)
                raise UserError(
                    f"{path_of(role)}.batch {batch} is not a multiple of {chunk}"
                    f" ({wanted.ranks} ranks{per}); use batch {near} or other resources"
                )
            forward = wanted.micro_batch or batch // wanted.ranks
            share = batch // wanted.ranks
            if config.kind == "lit" and forward < share:
                raise UserError(
                    f"stages.transfer.{role}: a micro_batch of {forward} is less than a rank's"
                    f" share of the batch, {share}: a text is told from all others of the"
                    " batch at once; leave resources.micro_batch out or use more ranks"
                )
            mixes = getattr(config.recipe, "mixup", 0) or getattr(config.recipe, "cutmix", 0)
            if mixes and forward % 2:
                raise UserError(
                    f"{path_of(role)}: mixup needs an even number of images in a forward pass,"
                    f" found {forward}; set an even resources.micro_batch"
                )
        return Execution(
            ranks=wanted.ranks,
            nodes=wanted.nodes,
            time_s=wanted.time,
            threads=wanted.threads,
            share=wanted.share,
            micro_batch=wanted.micro_batch,
            head_batch=wanted.head_batch,
            activation_checkpointing=wanted.activation_checkpointing,
            memory_gib=wanted.memory_gib,
            weights_path=str(self.weights) if config.weights else "",
            zero_config=wanted.zero,
            checkpoint_every_s=wanted.checkpoint_every,
            hang_after_s=wanted.hang_after,
            eval_points=wanted.eval_points,
            dataset_path=spec,
        )
