"""The one entry to the transfer protocols."""

from __future__ import annotations

import importlib

from harness.ledger.context import StageContext, StageResult
from harness.study.stages import StageFile

# By name: torchvision's detection models, video and language libraries take seconds to import, and
# a stage needs one protocol.
PROTOCOLS = {
    "features": "features:features",
    "linear_probe": "probe:linear_probe",
    "sgd_probe": "sgd_probe:sgd_probe",
    "knn": "neighbours:knn",
    "few_shot": "fewshot:few_shot",
    "prompt_tuning": "prompt_tuning:prompt_tuning",
    "fine_tune": "finetune:fine_tune",
    "evaluate": "evaluate:evaluate",
    "lit": "lit:lit",
    "zero_shot": "zero_shot:zero_shot",
    "retrieval": "retrieval:retrieval",
    "detection": "detection:detection",
    "video": "video:video",
}
"""Kind -> module:function in this package."""

_SOLVERS = ("linear_probe", "sgd_probe", "knn", "few_shot")
"""One call of a solver on one process: nothing tells how far it is."""


def run(stage: StageFile, ctx: StageContext) -> StageResult:
    """Run a transfer stage to its end; leaves predictions.parquet and samples.parquet.

    Without upstream weights the encoder is the one of initial weights, the honest lower bound.
    """
    module, function = PROTOCOLS[stage.config.kind].split(":")
    protocol = getattr(importlib.import_module(f"harness.transfer.{module}"), function)
    if stage.config.kind in _SOLVERS:
        ctx.whereabouts.at = None
    return protocol(stage, ctx)
