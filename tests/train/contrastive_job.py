"""Child of test_contrastive.py: one of two ranks; writes its loss and gradients.

Usage: contrastive_job.py OUT RANK, with MASTER_ADDR and MASTER_PORT set.
"""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from harness.train.contrastive import contrastive_loss

NUM, WIDTH, LIMIT = 12, 6, 2.5


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of NUM pairs in double precision, and a temperature beyond LIMIT."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(NUM, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    return image, text, torch.tensor([2.6], dtype=torch.float64)


def outcome(image: Tensor, text: Tensor, log_scale: Tensor, limit: float) -> list[Tensor]:
    """The loss, and its gradients by two towers of one layer and by the temperature."""
    towers = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64) for _ in range(2)]
    for seed, tower in enumerate(towers):
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(tower.weight, generator=generator)
    log_scale = log_scale.clone().requires_grad_()
    vectors = [F.normalize(t(x), dim=-1) for t, x in zip(towers, (image, text), strict=True)]
    loss = contrastive_loss(*vectors, log_scale, max_scale=math.exp(limit), chunk=4)
    loss.backward()
    weights = [towers[0].weight, towers[1].weight, log_scale]
    return [loss.detach(), *(w.grad for w in weights if w.grad is not None)]


def main(out: Path, rank: int) -> None:
    """This rank's half of the batch."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    image, text, log_scale = inputs()
    own = slice(rank * NUM // 2, (rank + 1) * NUM // 2)
    found = {
        name: outcome(image[own], text[own], log_scale, limit)
        for name, limit in (("free", 700.0), ("bounded", LIMIT))
    }
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
