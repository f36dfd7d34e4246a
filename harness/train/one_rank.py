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

    They are views of the flat share that the optimizer writes to, and take no memory twice;
    gradients are all there at the end of a backward pass, where DeepSpeed moves them on as they
    come. Nothing is changed where parameters are offloaded.
    """
    zero = engine.optimizer
    offload: Any = zero.parameter_offload
    if offload.offload_device is not None:
        return
    params = list(engine.module.parameters())
    offload._remove_module_hooks()
    _forget_hooks(engine)
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
        _Gradients(zero, params)


def _forget_hooks(engine: Any) -> None:
    """Before and after a forward pass DeepSpeed visits every module, and looks at a parameter each
    time it is read: all in search of parameters that are in pieces.
    """
    for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
        getattr(engine, hook).remove()
        setattr(engine, hook, None)
    for module in engine.module.modules():
        module._parameters = dict(module._parameters)


class _Gradients:
    """Gradients go to the optimizer's buffers at the end of a backward pass, all in one call."""

    def __init__(self, zero: Any, params: list[Any]) -> None:
        self.zero = zero
        self.params = [param for param in params if param.requires_grad]
        buffers = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        self.sums: list[Tensor] = [
            buffers[param.ds_id].narrow(0, 0, param.ds_numel) for param in self.params
        ]
        self.epilogue = zero.independent_gradient_partition_epilogue
        # Called within `backward` when all gradients are there; the hooks that take them one by one
        # are not needed.
        zero.independent_gradient_partition_epilogue = self.take
        for hooks in (zero._grad_acc_hooks, zero._leaf_module_hooks):
            for hook in hooks:
                hook.remove()
            hooks.clear()

    def take(self) -> None:
        """Copy in the first micro step, add in the others; the parameters lose their gradients."""
        sums, grads = [], []
        for param, own in zip(self.params, self.sums, strict=True):
            if param.grad is None:  # it took no part
                if self.zero.micro_step_id == 0:
                    own.zero_()
                continue
            sums.append(own)
            grads.append(param.grad.flatten())
            param.grad = None
        if sums:
            with torch.no_grad():
                if self.zero.micro_step_id == 0:
                    torch._foreach_copy_(sums, grads)  # pyright: ignore[reportPrivateImportUsage]
                else:
                    torch._foreach_add_(sums, grads)  # pyright: ignore[reportPrivateImportUsage]
        self.epilogue()
