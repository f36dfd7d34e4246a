"""The transfer stages of one cell: each task's own, and the features that several tasks share."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.study.datasets import DatasetMeta
from harness.study.protocols import Features, Task, TransferRecipe
from harness.study.protocols.common import OfTask, OnFeatures
from harness.study.recipes import Model, Optimization
from harness.study.stages import StageConfig
from harness.units import format_count

if TYPE_CHECKING:
    from harness.study.chain import Chain


class Transfers:
    """Makes the stages of the tasks in the order of what they start from."""

    def __init__(self, chain: Chain, tasks: dict[str, TransferRecipe], encoder: str | None) -> None:
        self.chain, self.tasks = chain, tasks
        self.from_encoder = {"encoder": encoder} if encoder else {}

    def build(self) -> None:
        """Makes the stage of every task, each once."""
        for task in self.tasks:
            self._task(task)

    def _task(self, task: str) -> str:
        if task in self.chain.ids and task not in ("mae", "wsp"):
            return self.chain.ids[task]
        if task in ("mae", "wsp"):
            raise UserError(f"stages.transfer.{task}: a task cannot be called mae or wsp")
        recipe = self.tasks[task]
        meta = self._dataset(task, recipe)
        model = self._model(task, recipe)
        try:
            recipe = recipe.resolved(self.chain.builder.loaded.bases, meta)
            outputs = recipe.outputs(meta)
            train, test = recipe.num_train(meta), recipe.num_test(meta)
        except UserError as error:
            raise UserError(f"stages.transfer.{task}: {error}") from None
        if train:
            field = f"stages.transfer.{task}.train_images"
            meta.check_count("train", vars(recipe).get("train_images"), field)
        most = max(vars(recipe).get("shots", ()), default=0)
        # At most K of a class: a class may have fewer, but not every class.
        if most > 1 and most > train:
            raise UserError(
                f"stages.transfer.{task}.shots {most}: there are {format_count(train)} labelled"
                f" images of {outputs} classes; use at most that"
            )
        reads_encoder = True
        if isinstance(recipe, OfTask):
            reads_encoder = recipe.uses_encoder
            source = self._source(task, recipe)
            outputs = outputs or source.num_classes
            model = model if recipe.image_size else source.model
            upstream = {"model": self.chain.ids[recipe.of]}
            upstream |= self.from_encoder if recipe.uses_encoder else {}
        elif isinstance(recipe, OnFeatures):
            reads_encoder = False
            upstream = {"features": self._features(recipe, meta, model, train, test)}
        else:
            upstream = dict(self.from_encoder)
        steps = 0
        if isinstance(recipe, Optimization):
            recipe, steps = self.chain.schedule(task, recipe, train)
        config = self.chain.config(
            recipe.protocol,
            recipe,
            "train" if train else "test",
            train or test,
            outputs,
            steps,
            upstream,
            meta,
            model,
            reads_encoder,
        )
        flops = recipe.flops(model, config.samples, train, test, outputs)
        return self.chain.put(task, config, flops, self._label(task))

    def _dataset(self, task: str, recipe: Task) -> DatasetMeta:
        if not recipe.dataset:
            return self.chain.meta
        try:
            return self.chain.builder.dataset(recipe.dataset)
        except UserError as error:
            raise UserError(f"stages.transfer.{task}.dataset: {error}") from None

    def _model(self, task: str, recipe: Task) -> Model:
        """The encoder at the resolution of the task."""
        model, side = self.chain.model, recipe.image_size
        if patch := vars(recipe).get("patch"):  # the cell's is resampled
            model, side = model.model_copy(update={"patch": patch}), side or model.image_size
        if side is None:
            return model
        if side % model.patch:
            near = side // model.patch * model.patch or model.patch
            raise UserError(
                f"stages.transfer.{task}.image_size {side} is not a multiple of patch"
                f" {model.patch}; use {near} or {near + model.patch}"
            )
        return model.model_copy(update={"image_size": side})

    def _source(self, task: str, recipe: OfTask) -> StageConfig:
        """Stage of the task that `of` names; made now if it stands later in the file."""
        name = recipe.of
        fitting = [n for n, r in self.tasks.items() if r.protocol in recipe.of_kinds]
        if name not in fitting:
            kinds = " or ".join(recipe.of_kinds)
            if name in self.tasks:
                found = f"is a {self.tasks[name].protocol} task, expected {kinds}"
            else:
                near = difflib.get_close_matches(name, fitting, n=1)
                found = f"is no task; did you mean '{near[0]}'?" if near else "is no task"
            known = ", ".join(fitting) or f"none: add a task with protocol {kinds}"
            raise UserError(f"stages.transfer.{task}.of: '{name}' {found}; it may name {known}")
        return self.chain.builder.stages[self._task(name)].config

    def _features(
        self, recipe: OnFeatures, meta: DatasetMeta, model: Model, train: int, test: int
    ) -> str:
        """The stage that passes the images of a task through the encoder, shared where equal."""
        key = (recipe.dataset, recipe.pool, recipe.resize)
        features = self.chain.builder.features.get(key)
        if features is None:
            features = Features(dataset=recipe.dataset, pool=recipe.pool, resize=recipe.resize)
            self.chain.builder.features[key] = features
        config = self.chain.config(
            "features", features, "train", train, 0, 0, dict(self.from_encoder), meta, model
        )
        # Of another pooling, resolution or number of images: the name tells them apart.
        parts = [meta.name, "features"]
        parts += [format_count(train)] if recipe.train_images else []
        parts += [recipe.pool] if recipe.pool != "cls" else []
        parts += [f"{model.image_size}px", recipe.resize] if model != self.chain.model else []
        role = "_".join(parts)
        flops = features.flops(model, train + test)
        return self.chain.put(role, config, flops, self._label(role), resources="features")

    def _label(self, what: str) -> str:
        return f"{format_count(self.chain.images)}-{self.chain.start}-{what}"
