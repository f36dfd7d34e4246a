"""Zero-shot: a text tower trained to a frozen image tower (LiT), then judged by words alone.

"LiT" marks a value of Zhai et al. 2022 (arXiv 2111.07991), "CLIP" one of Radford et al. 2021
(arXiv 2103.00020). Files that a recipe names are read when the study is planned: what they hold
enters the identity of a stage, not where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from harness.errors import UserError
from harness.study import flops as count_flops
from harness.study.builtin import builtin
from harness.study.datasets import DatasetMeta
from harness.study.protocols.common import OfTask, OnFeatures
from harness.study.recipes import Count, Frozen, Model, Optimization, Positive
from harness.study.words import (
    TEMPLATES,
    TextFolder,
    check_names,
    check_templates,
    listed,
    read_names,
    read_templates,
    text_folder,
)


class TextTower(Frozen):
    """The built-in text tower: a pre-norm transformer over the bytes of UTF-8."""

    width: Count = 256
    depth: Count = 4
    heads: Count = 4

    @model_validator(mode="after")
    def _heads_divide(self) -> TextTower:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


def _folder(value: Any) -> Any:
    return {"folder": value} if isinstance(value, str) else value


def _text_tag(value: Any) -> str:
    is_folder = isinstance(value, TextFolder) or (isinstance(value, dict) and "folder" in value)
    return "literal[folder]" if is_folder else "literal[tower]"


# Tags are written as pydantic names literals, which messages leave out.
Text = Annotated[
    Annotated[TextTower, Tag("literal[tower]")] | Annotated[TextFolder, Tag("literal[folder]")],
    Discriminator(_text_tag),
    BeforeValidator(_folder),
]
"""The built-in text tower's shape, or the folder of a `transformers` model (paper: XLM-R Large)."""


class Lit(Optimization, OnFeatures):
    """A text tower trained on image-caption pairs, the image tower frozen (paper sec. 4.1)."""

    protocol: Literal["lit"] = "lit"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """LiT's released recipe."""
    text: Text = TextTower()
    context: Count = 100
    """Tokens of a caption, begin and end not counted; what is longer is cut (paper's release)."""
    embed: Count | None = None
    """Width of the shared space; none means the image tower's (the release's B and L)."""
    temperature: Positive = 0.07
    """Where it starts; it is learned (CLIP)."""
    max_scale: Annotated[float, Field(ge=1)] = 100.0
    """Bound of 1 / temperature (CLIP)."""

    def outputs(self, meta: DatasetMeta) -> int:
        """No classes."""
        return 0

    def resolved(self, bases: Sequence[Path], meta: DatasetMeta) -> Self:
        """With the hash and the shape of the text tower's folder."""
        if isinstance(self.text, TextTower):
            return self
        return self.model_copy(update={"text": text_folder(self.text.folder, bases)})

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Training of the text tower and of both projections, every caption `context` long."""
        text = self.text
        forward = count_flops.text_forward(text.width, text.depth, self.context + 2)
        projections = 2.0 * (model.width + text.width) * (self.embed or model.width)
        # Nobody needs a gradient of the image features.
        unused = 2.0 * model.width * (self.embed or model.width)
        return samples * (3.0 * (forward + projections) - unused)


class ZeroShot(OfTask):
    """Classification by the text embeddings of class names in prompts."""

    of_kinds = ("lit",)
    uses_encoder = True

    protocol: Literal["zero_shot"] = "zero_shot"
    templates: tuple[str, ...] | str = TEMPLATES
    """Prompts with {} for a name, or a file of them (YAML, JSON, or a line each)."""
    names: dict[str, Annotated[tuple[str, ...], BeforeValidator(listed)]] | str = {}
    """Class -> what it is called, one name or several, or a file (YAML, JSON) that says so. A class
    that is not listed goes by its own name, underscores read as spaces."""

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        return value if isinstance(value, str) else check_templates(value)

    def resolved(self, bases: Sequence[Path], meta: DatasetMeta) -> Self:
        """With the content of its files. Raises UserError for names of classes there are not."""
        templates, names = self.templates, self.names
        if isinstance(templates, str):
            templates = read_templates(templates, bases)
        if isinstance(names, str):
            names = read_names(names, bases)
        found = builtin(meta.name)
        names = names or (dict(found.class_names) if found else {})
        check_names(names, meta)
        return self.model_copy(update={"templates": templates, "names": names})

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Images through the encoder; prompts are not counted."""
        return count_flops.vit_forward(model) * test


class Retrieval(OfTask):
    """Finding an image by its caption, and a caption by its image."""

    of_kinds = ("lit",)
    uses_encoder = True

    protocol: Literal["retrieval"] = "retrieval"
    recalls: tuple[Count, ...] = (1, 5, 10)
    """Among so many of the best answers the right one has to be (CLIP)."""

    def outputs(self, meta: DatasetMeta) -> int:
        """No classes."""
        return 0

    def resolved(self, bases: Sequence[Path], meta: DatasetMeta) -> Self:
        """Raises UserError where no one has that many answers."""
        if max(self.recalls) >= meta.count("test"):
            raise UserError(
                f"recalls {max(self.recalls)}: dataset {meta.name} has {meta.count('test')} test"
                " images; recall among all of them is 1"
            )
        return self

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Images through the encoder; captions are not counted."""
        return count_flops.vit_forward(model) * test


__all__ = ["Lit", "Retrieval", "TextFolder", "TextTower", "ZeroShot"]
