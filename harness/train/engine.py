"""DeepSpeed, and nothing else of it anywhere: set-up, one training step, state in and out.

What a run is comes from the recipe; a JSON in ds_configs/ says only how DeepSpeed does it.
Importing this module imports DeepSpeed whole and starts no thread and no CUDA context, so a
process may import it once and fork a worker for each stage.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from harness.errors import UserError
from harness.models.init import Values
from harness.study.recipes import Optimization
from harness.study.stages import Execution
from harness.train import ema
from harness.train.one_rank import keep_whole
from harness.train.optimizer import make_optimizer
from harness.train.reshard import Saved, recut, shares
from harness.train.zero_config import batch_plan, config_path, read_config

# DeepSpeed picks its accelerator when imported. device_count asks NVML and creates no context.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.device_count() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import (
    TorchCheckpointEngine,
)
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    set_z3_leaf_modules,
)
from deepspeed.utils.tensor_fragment import fragment_address
from timm.models.vision_transformer import Block


def _module(name: str) -> Any:
    # By name: deepspeed.comm.torch as an attribute is torch itself.
    return importlib.import_module(f"deepspeed.{name}")


# deepspeed.initialize imports this module lazily, and with it the whole of torch._inductor:
# 1.0 to 1.7 s in every worker, where here it is paid once by the process that forks them.
_module("runtime.zero.muon.muon_optimizer")

logger.setLevel(logging.WARNING)

# Debug aids that DeepSpeed runs some 700 times a step for a small model, to no effect: profiler
# ranges, and messages that only rank 0 would print if asked to. 2 ms of a 50 ms step.
_module("utils.nvtx").enable_nvtx = False
for _name in ("partition_parameters", "partitioned_param_coordinator"):
    _module(f"runtime.zero.{_name}").print_rank_0 = lambda *args, **kwargs: None

# As torch.nn.utils.clip_grad_norm_ does; torch leaves it out of its __all__.
_foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]

_RENDEZVOUS = timedelta(minutes=30)  # what torch itself allows for with init_method="env://"

# --- processes ----------------------------------------------------------------------------


def connect(execution: Execution, rank: int, ranks: int) -> torch.device:
    """Join the process group of this stage; the device of this rank.

    Several ranks meet at MASTER_ADDR:MASTER_PORT. One rank uses a store inside the process:
    no port, so nothing to collide with.
    """
    torch.set_num_threads(execution.threads)
    cuda = execution.device == "cuda"
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != execution.device:
        name = {"cpu": "CPU_Accelerator", "cuda": "CUDA_Accelerator"}[execution.device]
        set_accelerator(getattr(_module(f"accelerator.{execution.device}_accelerator"), name)())
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        # Unset, DeepSpeed starts the program numactl in every step to count devices.
        os.environ.setdefault("LOCAL_SIZE", str(ranks))
        # DeepSpeed would compile a shared-memory all-reduce here: half a minute, and if killed
        # it leaves a lock at which every later run waits forever. Gloo does the same work.
        _module("comm.torch").build_shm_op = lambda: None
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            rank=rank,
            world_size=ranks,
            device_id=device if cuda else None,
            store=_store(rank, ranks),
        )
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return device


def _store(rank: int, ranks: int) -> Any:
    """Where the ranks find each other.

    The local pool opens the port before it starts anybody, and rank 0 inherits it (the file
    descriptor HARNESS_RENDEZVOUS_FD): between choosing a port and using it, nobody can take it.
    """
    # The stores are documented, but left out of torch.distributed.__all__.
    if ranks == 1:
        return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    opened = os.environ.pop("HARNESS_RENDEZVOUS_FD", None)
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0,
        timeout=_RENDEZVOUS,
        master_listen_fd=None if opened is None else int(opened),
    )


# --- the engine ---------------------------------------------------------------------------


class Engine:
    """A model under DeepSpeed: forward, backward, step; whole tensors in and out."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        recipe: Optimization,
        execution: Execution,
        *,
        rank: int,
        ranks: int,
    ) -> None:
        """Shard `model`, which already holds its initial weights on the CPU in float32."""
        self.rank, self.ranks = rank, ranks
        self.on_forward: Callable[[], None] = lambda: None
        """Called before each forward pass: a sign that an evaluation gets on."""
        self.device = connect(execution, rank, ranks)
        self.head_batch = execution.head_batch
        self.micro_batch, self.accumulation = batch_plan(recipe.batch, ranks, execution.micro_batch)
        path = config_path(execution.zero_config, execution.device)
        config = read_config(path) | {
            "train_batch_size": recipe.batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": recipe.clip,
            "steps_per_print": 10**9,
        }
        config["checkpoint"] = config.get("checkpoint", {}) | {"tag_validation": "Ignore"}
        self.dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
        if config.get("zero_optimization", {}).get("stage") == 3:
            # Hooks on whole Blocks only: they are fewer than on every Linear.
            set_z3_leaf_modules(model, list(_layer_types(model)), raise_if_not_found=False)
        if execution.activation_checkpointing:
            checkpoint_blocks(model)
        with _quick_collection():
            self._engine: Any = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(groups, recipe, config, self.device),
                config=config,
                dist_init_required=False,
            )[0]
        self._engine.checkpoint_engine = _SafeCheckpoints(self._engine._config)
        if self._engine.zero_optimization_stage() == 3:
            self._engine.optimizer.get_grad_norm_direct = self._norm
            if ranks == 1:
                # A step then takes, on one core, 1.03 to 1.13 times a plain loop's time for d32x3
                # and d64x4 (benchmarks/results/engine_tax.json).
                keep_whole(self._engine)
        self._average: ema.Average | None = None
        if decay := getattr(recipe, "ema", None):
            if self._engine.zero_optimization_stage() != 3:
                raise UserError(f"{path}: a moving average (ema) needs ZeRO stage 3")
            self._average = ema.Average(decay, getattr(recipe, "ema_warmup", False))

    # One training step is: set_lr; then forward and backward `accumulation` times; then step.

    def set_lr(self, lr: float) -> None:
        """Set each group's learning rate to lr times the group's scale."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def forward(self, *args: Any) -> Any:
        """The model's forward, through its root, as ZeRO-3 needs."""
        self.on_forward()
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of loss / accumulation; reduces over ranks."""
        self._engine.backward(loss)

    def step(self) -> None:
        """End of a micro step; clips and updates the weights after the last one."""
        is_last = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if self._average is not None and is_last:
            self._average.update(self._own_weights())

    def grad_norm(self) -> float | None:
        """Norm over all gradients before clipping, of the last step; waits for the device.

        None where DeepSpeed measures none: before the first step, and with ZeRO stage 0.
        """
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def norm_on_device(self) -> Tensor | None:
        """The same, on the device and without waiting for it; a copy, which no later step writes
        to."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm, device=self.device).detach().clone()

    def _norm(
        self, gradients: list[Tensor], params: list[nn.Parameter], norm_type: float = 2
    ) -> Tensor:
        """The norm of a group's gradients over all ranks; -1 where it is not finite.

        As DeepSpeed's own, which takes the norm of one gradient at a time: hundreds of calls.
        """
        norms = _foreach_norm(gradients, norm_type, dtype=torch.float64)
        square = self.total(torch.stack(norms).square().sum())
        norm = square.sqrt()
        return torch.where(norm.isfinite(), norm, -torch.ones_like(norm))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside: no gradients, no drop path. `forward` is used as in training."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside: the weights are their moving average, where one is kept."""
        if self._average is None or not self._average.updates:
            yield
            return
        self._swap_average(self._average)
        try:
            yield
        finally:
            self._swap_average(self._average)

    def _swap_average(self, average: ema.Average) -> None:
        zero: Any = self._engine.optimizer
        zero.checkpoint_event_prologue()
        average.swap(self._own_weights())
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()

    def _own_weights(self) -> list[Tensor]:
        """This rank's float32 shares under ZeRO-3, one flat tensor a sub-group."""
        return [flat.data for flat in self._engine.optimizer.fp32_partitioned_groups_flat]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 value on the CPU) of each parameter; every rank must iterate."""
        for name, param in self._engine.module.named_parameters():
            # Of stage 3, and of the lower ones in bfloat16; else parameters are whole already.
            is_kept = hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")
            full = safe_get_full_fp32_param(param) if is_kept else None
            if full is None:
                full = param
            yield name, full.detach().float().cpu().clone()

    def set_weights(self, values: Values) -> None:
        """Set the float32 weights that the optimizer keeps, tensor by tensor.

        DeepSpeed takes them from the model's bfloat16 ones: MAE's last digits would be lost between
        its stage and the next.
        """
        zero: Any = self._engine.optimizer
        if self._engine.zero_optimization_stage() < 3:
            for name, param in self._engine.module.named_parameters():
                safe_set_full_fp32_param(param, values[name]().to(self.device))
            return
        # DeepSpeed's function for this fails where a parameter does not divide by the ranks.
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            offset = 0
            for param in group:
                own = shares(values[zero.param_names[param]]().flatten(), self.rank, self.ranks)
                flat.data[offset : offset + len(own)].copy_(own)
                offset += len(own)

    # --- ranks ---

    def any_rank(self, flag: bool) -> bool:
        """True on all ranks if `flag` is true on one of them."""
        if self.ranks == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, on every rank."""
        return values if self.ranks == 1 else self.total(values) / self.ranks

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.ranks > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.ranks > 1:
            dist.barrier()

    # --- checkpoints ---

    def save(self, folder: Path) -> None:
        """Write this rank's weights and optimizer state below `folder`; all ranks must call."""
        self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        if self._average is not None:
            self._average.save(ema.file_of(folder, self.rank))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with the same number of ranks."""
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        assert loaded is not None, f"DeepSpeed found no checkpoint in {folder}"
        if self._average is not None:
            self._average.load(*ema.read(ema.file_of(folder, self.rank)), self._flat_device())

    def load_from_other_ranks(self, folder: Path, ranks: int) -> None:
        """Read what `save` wrote with `ranks` ranks, and take this rank's new share of it.

        Raises UserError where the checkpoint or this engine is not of ZeRO stage 3.
        """
        zero: Any = self._engine.optimizer
        if self._engine.zero_optimization_stage() != 3:
            raise UserError(
                f"{folder}: was written by {ranks} ranks; only ZeRO stage 3 can go on with"
                f" {self.ranks}: set zero, or resume with resources.ranks: {ranks}"
            )
        read = self._engine.checkpoint_engine.load
        saved = Saved(folder / "deepspeed", ranks, lambda path: read(str(path), "cpu"))
        groups = [[zero.param_names[param] for param in group] for group in zero.fp16_groups]
        flats, states = recut(saved, groups, self.rank, self.ranks)
        zero.checkpoint_event_prologue()
        state = zero.state_dict()
        state["fp32_flat_groups"] = flats
        state["optimizer_state_dict"]["state"] = states
        # DeepSpeed takes the entry of its own rank.
        zero.load_state_dict({self.rank: state})
        zero.checkpoint_event_epilogue()
        if self._average is not None:
            found = [ema.read(ema.file_of(folder, rank)) for rank in range(ranks)]
            old = [flats for flats, _ in found]
            new = [
                torch.cat([shares(saved.other(n, old), self.rank, self.ranks) for n in group])
                for group in groups
            ]
            self._average.load(new, found[0][1], self._flat_device())

    def _flat_device(self) -> torch.device:
        # The CPU where the optimizer is offloaded.
        return self._own_weights()[0].device

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model. The process group stays: it is the process's."""
        self._engine.destroy()


def partition(module: nn.Module, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Every rank keeps its share of the parameters of `module` that are whole; no more is left."""
    settings = {"train_micro_batch_size_per_gpu": 1, **config}  # DeepSpeed wants to know a batch
    deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=dtype)


def checkpoint_blocks(model: nn.Module) -> None:
    """Layers keep their input only; the backward pass computes the rest again, to the same bits.

    Inside the call of a layer, whose hooks gather its parameters for both passes.
    """
    for module in model.modules():
        if isinstance(module, _layer_types(model)):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def _layer_types(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """Classes of a model's layers: timm's Block, or what the model says."""
    return getattr(model, "layer_types", (Block,))


class _SafeCheckpoints(TorchCheckpointEngine):
    """DeepSpeed's reader and writer of files; reading runs no code found in the file."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of a checkpoint file: tensors, plain values, three classes of DeepSpeed."""
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, fragment_address]):
            try:
                return torch.load(path, map_location=map_location, weights_only=True)
            except pickle.UnpicklingError as error:
                why = str(error).partition("WeightsUnpickler error:")[2] or str(error)
                raise UserError(
                    f"{path}: refused, it holds more than tensors and plain values"
                    f" ({' '.join(why.split())[:200]}); remove its step's folder and `harness"
                    " retry`: it goes on from the one before, if there is one"
                ) from None


@contextmanager
def _quick_collection() -> Iterator[None]:
    """DeepSpeed calls gc.collect in its set-up; do not let it walk the imported modules.

    0.2 s of 0.3 s with torch, timm and DeepSpeed loaded.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
