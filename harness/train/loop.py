"""The training loop: one for MAE, weakly supervised pretraining and fine-tuning.

Everything random is a function of (seed, step): the images and their views, the masks, drop
path. A run that was stopped and resumed therefore goes on with the same bits, and the number
of ranks changes nothing but rounding.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.data import loader
from harness.data.dataset import Split, open_dataset
from harness.data.order import Stream
from harness.errors import DivergedError, PreemptedError
from harness.ledger.context import StageContext, StageResult
from harness.models.init import seed_of
from harness.study.recipes import Optimization
from harness.study.stages import StageFile
from harness.train import checkpoint
from harness.train.build import build_engine
from harness.train.checkpoint import Progress
from harness.train.engine import Engine
from harness.train.memory import memory_checked
from harness.train.objectives import OBJECTIVES, Objective, part, to_device
from harness.train.schedule import lr_at

NUM_ROWS = 50
"""Rows of metrics.jsonl of a short run, about; more would only draw the same curve."""
_LONG_EVERY = 100
"""Steps between rows of a long run: what happens to a loss within them is seldom looked for."""
_MOST_ROWS = 1000


def steps_between_rows(steps: int) -> int:
    """Of metrics.jsonl, for a run of so many steps."""
    return max(1, min(steps // NUM_ROWS, max(_LONG_EVERY, steps // _MOST_ROWS)))


def train(stage: StageFile, ctx: StageContext) -> StageResult:
    """Run the stage (kinds mae and wsp) to its end, from its last checkpoint if it has one.

    Leaves metrics rows, weights.safetensors and, for mae, reconstructions.npz.
    Raises DivergedError on a non-finite loss or gradient, OutOfMemoryError where a step does not
    fit, PreemptedError when asked to stop.
    """
    started = time.perf_counter()
    data = open_dataset(stage.execution.dataset_path, ctx.root)
    objective = OBJECTIVES[stage.config.kind](stage.config, ctx, data)
    return run(objective, stage, ctx, data.split(stage.config.images.split), started)


def run(
    objective: Objective,
    stage: StageFile,
    ctx: StageContext,
    split: Split,
    started: float,
) -> StageResult:
    """Train `objective` on the stage's subset of `split`; `started` is when set-up began."""
    # --- set-up ---
    config, recipe, execution = stage.config, stage.config.recipe, stage.execution
    assert isinstance(recipe, Optimization), f"stage {stage.id} has no gradient recipe"
    steps, batch = config.steps, recipe.batch
    with ExitStack() as on_exit:  # whatever ends the run
        engine = build_engine(
            objective.blueprint(), recipe, execution, rank=ctx.rank, ranks=ctx.ranks
        )
        on_exit.callback(engine.close)
        engine.on_forward = ctx.whereabouts.move
        ctx.whereabouts.at = (0, "setup")
        on_exit.callback(_leave, ctx)
        progress = Progress()
        if ctx.rank == 0:
            ctx.check_lease()
            checkpoint.remove_partial(ctx.folder, ctx.check_lease)
        found = checkpoint.latest(ctx.folder)
        if found is not None:
            progress = checkpoint.load(found, engine)
        # Without a checkpoint too: an attempt that was killed before its first one left rows.
        ctx.metrics.rewind(progress.step)
        train_before_s = progress.wall_s["train"]
        earlier_s = sum(progress.wall_s.values())
        row_every = steps_between_rows(steps)
        points = execution.eval_points if objective.evaluated_on_the_way else 1
        eval_steps = {round(steps * point / points) for point in range(1, points + 1)} | {steps}
        # On CUDA one step late: reading the newest loss would wait for the device to go idle.
        reader = _LossReader(engine, progress, batch, lag=1 if engine.device.type == "cuda" else 0)
        progress.wall_s["setup"] += time.perf_counter() - started
        train_started = last_checkpoint = time.perf_counter()
        other_s = 0.0  # evaluation and checkpoints, within the training time
        last_row: dict[str, float | None] = {}

        stream = split.stream(
            config.images.images,
            config.seed,
            getattr(recipe, "resample", None),
            getattr(recipe, "repeats", 1),
        )
        on_exit.enter_context(_naming_samples(split, stream, batch))
        batches = loader.train_batches(
            split,
            stream,
            batch=batch,
            start_step=progress.step,
            num_steps=steps - progress.step,
            rank=ctx.rank,
            ranks=ctx.ranks,
            image_size=config.model.image_size,
            augment=objective.augment,
            pin=engine.device.type == "cuda",
            make=objective.make_batch,
        )
        on_exit.callback(batches.close)  # ends its reading thread
        ctx.whereabouts.at = (progress.step, "data")
        for step, rank_batch in enumerate(batches, start=progress.step):
            ctx.whereabouts.at = (step, "compute")
            # --- one optimizer step ---
            engine.set_lr(lr_at(recipe, step, steps))
            share = batch // ctx.ranks
            losses = []
            with memory_checked(engine, objective.allows):
                for start in range(0, share, engine.micro_batch):
                    first = ctx.rank * share + start
                    _seed(seed_of(config.seed, "forward", step, first), engine.device)
                    micro = part(rank_batch, start, start + engine.micro_batch)
                    micro = to_device(micro, engine.device)
                    loss = objective.loss(engine, micro, step, first)
                    engine.backward(loss)
                    engine.step()
                    losses.append(loss.detach())

            # --- what all ranks must agree on: the loss, and whether to stop or save ---
            due = time.perf_counter() - last_checkpoint >= execution.checkpoint_every_s
            done = step + 1
            wishes = {"stop": ctx.should_stop(), "save": due and ctx.rank == 0}
            ctx.whereabouts.at = (step, "reduce")
            signals = reader.put(done, torch.stack(losses), **wishes)
            progress.step = done

            # --- metrics row, with held-out metrics at the evaluation points ---
            if done % row_every == 0 or done in eval_steps:
                reader.drain()
                last_row = {
                    "loss": progress.loss_sum / progress.loss_count,
                    "lr": lr_at(recipe, step, steps),
                    "grad_norm": engine.grad_norm(),
                    "flops": stage.flops * done / steps,
                }
                progress.loss_sum, progress.loss_count = 0.0, 0
                if done in eval_steps:
                    ctx.whereabouts.at = (step, "evaluate")
                    with _timed(progress, "eval") as eval_time:
                        last_row |= objective.evaluate(engine)
                    other_s += eval_time.seconds
                for name, value in last_row.items():
                    # Loss and gradient can be finite while the held-out loss no longer is.
                    if value is not None and not math.isfinite(value):
                        norm = last_row["grad_norm"]
                        raise DivergedError(done, done * batch, value, norm, name)
                wall_s = train_before_s + time.perf_counter() - train_started - other_s
                row = {"step": done, "samples": done * batch, "wall_s": wall_s, **last_row}
                ctx.metrics.append(row)
            ctx.report(step=done, samples=done * batch, loss=reader.last_loss)

            # --- checkpoint; never after the last step, so that a resumed run has one to do ---
            if (signals.stop or signals.save) and done < steps:
                ctx.whereabouts.at = (step, "checkpoint")
                reader.drain()
                now = time.perf_counter()
                progress.wall_s["train"] = train_before_s + now - train_started - other_s
                with _timed(progress, "checkpoint") as checkpoint_time:
                    ctx.metrics.sync()
                    checkpoint.save(ctx.folder, engine, progress, ctx.check_lease)
                other_s += checkpoint_time.seconds
                last_checkpoint = time.perf_counter()
                if signals.stop:
                    raise PreemptedError(f"asked to stop; checkpoint saved at step {done}")
            ctx.whereabouts.at = (done, "data")

        # --- the end ---
        assert progress.step == steps, f"the loader ended at step {progress.step} of {steps}"
        progress.wall_s["train"] = train_before_s + time.perf_counter() - train_started - other_s
        ctx.check_lease()
        ctx.whereabouts.at = (steps, "evaluate")
        with _timed(progress, "eval"):
            finished = objective.finish(engine)
        metrics: dict[str, float | None] = {
            name: value
            for name, value in last_row.items()
            if name not in ("lr", "grad_norm", "flops")
        }
        wall_s = progress.wall_s | {"total": sum(progress.wall_s.values())}
        return StageResult(
            metrics=metrics | finished,
            steps=steps,
            samples=steps * batch,
            flops=stage.flops,
            wall_s=wall_s,
            earlier_s=earlier_s,
        )


@dataclass(frozen=True)
class _Signals:
    """What all ranks agreed on after a step."""

    stop: bool
    save: bool


class _LossReader:
    """Losses of finished steps, read `lag` steps late; adds them up in `progress`."""

    def __init__(self, engine: Engine, progress: Progress, batch: int, lag: int) -> None:
        self.engine, self.progress, self.batch, self.lag = engine, progress, batch, lag
        self.last_loss = math.nan
        self._pending: deque[tuple[int, Tensor, Tensor, Tensor | None]] = deque()

    def put(self, step: int, losses: Tensor, *, stop: bool, save: bool) -> _Signals:
        """Queue a rank's losses of `step` (counted from 1) and its wishes; all must call.

        The answer is that of the step `lag` before. Raises DivergedError for its loss.
        """
        flags = torch.tensor([stop, save], dtype=torch.float32)
        flags = flags.to(losses.device, non_blocking=True)
        norm = self.engine.norm_on_device()
        is_bad = flags[:1] * 0 if norm is None else (~norm.isfinite()).float().reshape(1)
        # One small reduction a step carries all four.
        own = torch.cat([losses.float().mean()[None], flags, is_bad])
        self._pending.append((step, self.engine.total(own), losses, norm))
        return self._read() if len(self._pending) > self.lag else _Signals(False, False)

    def drain(self) -> None:
        """Read everything queued, waiting for the device. Wishes read here come up again."""
        while self._pending:
            self._read()

    def _read(self) -> _Signals:
        step, values, losses, norm = self._pending.popleft()
        loss, stop, save, bad_norm = values.tolist()
        loss /= self.engine.ranks
        if bad_norm or not math.isfinite(loss):
            raise self._diverged(step, loss, losses, norm)
        self.last_loss = loss
        self.progress.loss_sum += loss
        self.progress.loss_count += 1
        return _Signals(stop > 0, save > 0)

    def _diverged(
        self, step: int, loss: float, losses: Tensor, norm: Tensor | None
    ) -> DivergedError:
        """All ranks get here in the same step: they may speak to each other."""
        engine = self.engine
        measured = None if norm is None else norm.item()
        error = DivergedError(step, step * self.batch, loss, measured)
        share = self.batch // engine.ranks
        bad_S = torch.zeros(self.batch, device=losses.device)
        own_S = (~losses.isfinite()).float().repeat_interleave(engine.micro_batch)
        bad_S[engine.rank * share : (engine.rank + 1) * share] = own_S
        error.places = engine.total(bad_S).nonzero().flatten().tolist()
        return error


def _seed(seed: int, device: torch.device) -> None:
    """As torch.manual_seed for this device; that one takes 3 ms a call to note what the others
    are to do once they are in use.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _leave(ctx: StageContext) -> None:
    ctx.whereabouts.at = None


@contextmanager
def _naming_samples(split: Split, stream: Stream, batch: int) -> Iterator[None]:
    """Puts the keys of the samples into a DivergedError, whatever part of a step finds it."""
    try:
        yield
    except DivergedError as error:
        rows = stream.at((error.step - 1) * batch, batch).rows
        error.keys = [str(split.keys[k]) for k in (rows[error.places] if error.places else rows)]
        raise


class _Elapsed:
    seconds = 0.0


@contextmanager
def _timed(progress: Progress, kind: str) -> Iterator[_Elapsed]:
    """Add the time spent inside to progress.wall_s[kind]."""
    elapsed, start = _Elapsed(), time.perf_counter()
    yield elapsed
    elapsed.seconds = time.perf_counter() - start
    progress.wall_s[kind] += elapsed.seconds
