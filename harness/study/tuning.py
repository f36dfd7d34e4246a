"""The `tune` section of a study file: which fields are searched, for which cells, how long."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from harness.study.recipes import Count, Frozen


class Space(Frozen):
    """Values a field may take: a range `{low, high}` or a list of `options`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    """Search evenly in the logarithm."""
    whole: bool = False
    """Whole numbers only."""
    options: list[Any] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Space:
        if self.options is not None:
            if self.low is not None or self.high is not None or self.log or self.whole:
                raise ValueError("give either options or low and high, not both")
            if len(self.options) < 2:
                raise ValueError("options needs at least two values")
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or options")
        elif self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        elif self.log and self.low <= 0:
            raise ValueError(f"a log range starts above 0; found low {self.low:g}")
        elif self.whole and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"whole needs whole low and high; found {self.low:g}, {self.high:g}")
        return self

    @property
    def ends(self) -> list[Any]:
        """The options, or both ends of the range."""
        if self.options is not None:
            return self.options
        assert self.low is not None and self.high is not None
        return [int(v) if self.whole else v for v in (self.low, self.high)]


class Pruner(Frozen):
    """When a poor trial is stopped early, judged by its metric at the evaluation points."""

    kind: Literal["percentile", "median", "hyperband", "none"] = "median"
    keep: float = Field(default=50.0, gt=0, lt=100)
    """percentile: a trial goes on while it is among the best `keep` % of its group so far."""
    startup: Count = 4
    """median, percentile: finished trials of the group before any is pruned."""
    warmup: Count = 2
    """Evaluation points of a trial before it may be pruned."""


class Tune(Frozen):
    """`harness tune FILE`: the same number of trials for every group of cells."""

    params: dict[str, Space] = Field(min_length=1)
    """Stage field (wsp.lr) -> the values it may take. A group without the stage skips it."""
    for_each: list[str] = Field(default=["size", "init"], min_length=1)
    """Axes whose every combination is searched on its own."""
    at: dict[str, Any] = {}
    """Where the other axes stand during the search."""
    metric: str = "wsp.val_loss"
    """Stage and metric; trials stop after that stage."""
    direction: Literal["minimize", "maximize"] | None = None
    """None: less is better if the metric's name has `loss`, more otherwise."""
    trials: Count = 12
    """Budget of each group: finished, pruned and diverged trials all count."""
    parallel: Count | None = None
    """Open trials of one group at a time. None: as few as keep the slots busy."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """grid: one range, evenly divided into as many values as there are trials."""
    startup: Count = 5
    """tpe: random trials before it proposes; equal for all groups."""
    pruner: Pruner = Pruner()
    seed: int = Field(default=0, ge=0)

    @field_validator("metric")
    @classmethod
    def _stage_and_key(cls, metric: str) -> str:
        if not all(metric.partition(".")):
            raise ValueError(f"{metric!r}: expected stage.metric, such as wsp.val_loss")
        return metric

    @field_validator("params")
    @classmethod
    def _fields(cls, params: dict[str, Space]) -> dict[str, Space]:
        for key in params:
            if "." not in key:
                raise ValueError(f"{key!r}: expected a stage field, such as wsp.lr")
        return params

    @model_validator(mode="after")
    def _grid_is_one_range(self) -> Tune:
        spaces = list(self.params.values())
        if self.sampler == "grid" and (len(spaces) != 1 or spaces[0].low is None):
            raise ValueError("sampler grid divides one range; found other params")
        return self

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        if self.direction is None:
            return "loss" not in self.metric.split(".")[-1]
        return self.direction == "maximize"

    @property
    def role(self) -> str:
        """Role of the stage that gives the metric."""
        return self.metric.partition(".")[0]

    @property
    def key(self) -> str:
        """Name of the metric in that stage's results."""
        return self.metric.partition(".")[2]
