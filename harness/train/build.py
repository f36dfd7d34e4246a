"""From a blueprint to an engine: whole, or shard by shard for what is large for the host."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn

from harness.errors import UserError
from harness.study.recipes import Optimization
from harness.study.stages import Execution
from harness.train.blueprint import Blueprint, Groups
from harness.train.engine import Engine, connect, partition
from harness.train.zero_config import config_path, read_config


def build_engine(
    blueprint: Blueprint, recipe: Optimization, execution: Execution, *, rank: int, ranks: int
) -> Engine:
    """An engine with the blueprint's weights, to the same bits whichever way it is built.

    Models that are large for the host are built shard by shard: every rank makes each Block on the
    meta device, fills it and keeps its share before it makes the next.
    """
    stage = read_config(config_path(execution.zero_config, execution.device))
    in_shards = execution.sharded_init
    if in_shards is None:
        in_shards = _is_large(blueprint.empty(), execution)
    if in_shards and stage.get("zero_optimization", {}).get("stage") != 3:
        raise UserError("a model is built in shards by ZeRO stage 3 only; use a zero config of it")
    if in_shards:
        connect(execution, rank, ranks)
        model, groups = build_sharded(blueprint, stage)
    else:
        model, groups = blueprint.whole()
    engine = Engine(model, groups, recipe, execution, rank=rank, ranks=ranks)
    if engine.dtype != torch.float32:
        engine.set_weights(blueprint.values(blueprint.empty()))
    return engine


def _is_large(model: nn.Module, execution: Execution) -> bool:
    """Whether whole copies on all ranks of a host would take a quarter of its memory."""
    size = sum(param.numel() for param in model.parameters()) * 4
    here = int(os.environ.get("LOCAL_WORLD_SIZE", execution.ranks))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return size * here > memory / 4


def build_sharded(blueprint: Blueprint, config: Mapping[str, Any]) -> tuple[nn.Module, Groups]:
    """The model with partitioned parameters, Block by Block, and its optimizer groups."""
    model = blueprint.empty()
    values = blueprint.values(model)
    names = {id(param): name for name, param in model.named_parameters()}
    groups = blueprint.groups(model)
    named = [[names[id(param)] for param in group["params"]] for group in groups]
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    blocks = [(name, part) for name, part in model.named_modules() if isinstance(part, Block)]
    for prefix, part in [*blocks, ("", model)]:  # the model last: what is in no Block
        for path, module in part.named_modules():
            for name, param in module.named_parameters(recurse=False):
                if param.is_meta:
                    value = values[".".join(filter(None, (prefix, path, name)))]().to(dtype)
                    setattr(module, name, nn.Parameter(value, param.requires_grad))
        partition(part, config, dtype)
    params = dict(model.named_parameters())
    for group, members in zip(groups, named, strict=True):
        group["params"] = [params[name] for name in members]
    return model, groups
