"""Transfer protocols: what a pretrained encoder is judged on (Singh et al. 2023, sec. 4.4).

A protocol is a recipe that also says what its stage starts from and what it costs. One module a
family of protocols; a new one joins `TransferRecipe`, `harness.study.stages.Kind`,
`harness.study.measures` and `harness.transfer.run`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from harness.study.protocols.common import Features, Task
from harness.study.protocols.detection import Detection
from harness.study.protocols.fine_tune import Evaluate, FineTune
from harness.study.protocols.frozen import FewShot, Knn, LinearProbe, PromptTuning, SgdProbe
from harness.study.protocols.video import Video
from harness.study.protocols.zero_shot import Lit, Retrieval, TextTower, ZeroShot

TransferRecipe = Annotated[
    LinearProbe
    | SgdProbe
    | Knn
    | FewShot
    | PromptTuning
    | FineTune
    | Evaluate
    | Lit
    | ZeroShot
    | Retrieval
    | Detection
    | Video,
    Field(discriminator="protocol"),
]

__all__ = [
    "Detection",
    "Evaluate",
    "Features",
    "FewShot",
    "FineTune",
    "Knn",
    "LinearProbe",
    "Lit",
    "PromptTuning",
    "Retrieval",
    "SgdProbe",
    "Task",
    "TextTower",
    "TransferRecipe",
    "Video",
    "ZeroShot",
]
