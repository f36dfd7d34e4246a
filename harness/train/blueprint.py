"""A model before it has weights: how to make it, what to put in, what the optimizer gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.init import Values, assign, initial_values, set_tables
from harness.models.vit import VisionEncoder

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Built whole, or on the meta device and filled tensor by tensor, to the same weights."""

    make: Callable[[], nn.Module]
    seed: int
    groups: Callable[[nn.Module], Groups]
    """Optimizer groups of a model whose parameters have their shapes."""
    start: Callable[[VisionEncoder], Mapping[str, Tensor]] | None = None
    """Encoder weights to start from, for an encoder of that shape; none: initial ones."""
    given: Callable[[], Values] = dict
    """What else does not start by chance."""

    def whole(self) -> tuple[nn.Module, Groups]:
        """The model with its weights, on the CPU in float32, and its optimizer groups."""
        model = self.make()
        assign(model, self.values(model))
        return model, self.groups(model)

    def empty(self) -> nn.Module:
        """The model on the meta device: shapes without memory. Only its fixed tables are there."""
        with torch.device("meta"):
            model = self.make()
        set_tables(model)
        return model

    def values(self, model: nn.Module) -> Values:
        """What every parameter starts with."""
        values = initial_values(model, self.seed)
        if self.start is not None:
            encoder: Any = model.get_submodule("encoder")
            tensors = self.start(encoder)
            values |= {f"encoder.{name}": tensor.float for name, tensor in tensors.items()}
        return values | self.given()
