"""The one entry to the transfer protocols."""

from __future__ import annotations

from harness.ledger.context import StageContext, StageResult
from harness.study.recipes import StageFile
from harness.transfer import fewshot, finetune, probe

PROTOCOLS = {
    "linear_probe": probe.linear_probe,
    "few_shot": fewshot.few_shot,
    "fine_tune": finetune.fine_tune,
}


def run(stage: StageFile, ctx: StageContext) -> StageResult:
    """Run a transfer stage to its end; leaves predictions.parquet (key, label, pred).

    Without upstream weights the encoder is the one of initial weights, the honest lower bound.
    """
    return PROTOCOLS[stage.config.kind](stage, ctx)
