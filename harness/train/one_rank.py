"""ZeRO-3 with one rank: the share of a rank is the whole model, so nothing is taken apart.

DeepSpeed (0.19) goes the same way with one rank as with many: before a layer it points each
parameter at its share and waits for the device, after the layer it lets go again; gradients pass
through a bucket, one parameter at a time. On a GPU the waiting alone keeps the host from running
ahead: a step of ViT-L took 1.4 times a plain loop's time in WSP and 3.3 times in MAE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keep_whole(engine: Any) -> None:
    """Parameters of a DeepSpeed engine of stage 3 stay whole between its steps; same numbers.

    They are views of the flat share that the optimizer writes to: no memory is added. Nothing is
    changed where parameters are offloaded.
    """
    zero = engine.optimizer
    offload: Any = zero.parameter_offload
    if offload.offload_device is not None:
        return
    params = list(engine.module.parameters())
    offload._remove_module_hooks()
    # These gather after each step what is whole already.
    zero.persistent_parameters = []
    partition, epilogue = zero._partition_all_parameters, zero.checkpoint_event_epilogue
    zero._partition_all_parameters = lambda: None  # what a step begins with

    def whole() -> None:
        epilogue()
        params[0].all_gather(params)

    # Around files, parameters are in pieces: else they would be written twice.
    zero.checkpoint_event_prologue = partition
    zero.checkpoint_event_epilogue = whole
    whole()
    if not zero.offload_optimizer:
        _Gradients(zero)


class _Gradients:
    """Gradients go to the optimizer's buffers at the end of a backward pass, all in one call."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.ready: list[Any] = []
        self.buffers = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        self.epilogue = zero.independent_gradient_partition_epilogue
        # Its hooks call the one when a parameter has its gradient, the other when all have.
        zero.reduce_ready_partitions_and_remove_grads = self.ready.append
        zero.independent_gradient_partition_epilogue = self.take

    def take(self) -> None:
        """Copy in the first micro step, add in the others; the parameters lose their gradients."""
        if self.ready:
            grads = [param.grad.flatten() for param in self.ready]
            sums: list[Tensor] = [
                self.buffers[param.ds_id].narrow(0, 0, param.ds_numel) for param in self.ready
            ]
            with torch.no_grad():
                if self.zero.micro_step_id == 0:
                    torch._foreach_copy_(sums, grads)  # pyright: ignore[reportPrivateImportUsage]
                else:
                    torch._foreach_add_(sums, grads)  # pyright: ignore[reportPrivateImportUsage]
            for param in self.ready:
                param.grad = None
            self.ready.clear()
        self.epilogue()
