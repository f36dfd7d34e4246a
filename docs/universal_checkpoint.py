"""DeepSpeed's universal checkpoint with two optimizer groups, loaded by ZeRO-3, against a run that
never stopped. Prints the losses of steps 10 to 19 of both, and of the load mended by hand.
"""

import importlib
import os
import subprocess
import sys
import tempfile

import torch
from torch import nn

CONFIG = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "checkpoint": {"load_universal": False},
}


def train(folder, resume, mend):
    """Steps 0 to 19 with a checkpoint after 10, or 10 to 19 from it."""
    import deepspeed

    # No compiler needed: gloo's all-reduce does as well.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    CONFIG["checkpoint"]["load_universal"] = resume
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    begin = 0
    if resume:
        wanted = [group["weight_decay"] for group in engine.optimizer.param_groups]
        engine.load_checkpoint(folder, tag="universal")
        begin = 10
        found = [group["weight_decay"] for group in engine.optimizer.param_groups]
        states = list(engine.optimizer.optimizer.state.values())
        shared = len({id(state["step"]) for state in states}) < len(states)
        if engine.local_rank == 0:
            print(f"weight decay {wanted} is {found}; one step count for all groups: {shared}")
        if mend:
            for group, value in zip(engine.optimizer.param_groups, wanted, strict=True):
                group["weight_decay"] = value
            for state in states:
                state["step"] = state["step"].clone()
    for step in range(begin, 20):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 16, generator=generator)
        y = x.sum(1, keepdim=True).sin()
        own = slice(engine.local_rank * 4, engine.local_rank * 4 + 4)
        loss = (engine(x[own]) - y[own]).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach() / 2
        torch.distributed.all_reduce(total)
        if engine.local_rank == 0 and step >= 10:
            print(f"{step} {total.item():.7f}")
        if step == 9 and not resume:
            engine.save_checkpoint(folder, tag="ten")
    # Without it a rank that ends first takes the store away, and the other sometimes fails.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch(*arguments):
    """Runs this script on two ranks."""
    about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    about |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]


if len(sys.argv) > 1:
    folder, how = sys.argv[1:]
    train(folder, resume=how != "whole", mend=how == "mended")
else:
    with tempfile.TemporaryDirectory() as folder:
        print("never stopped", flush=True)
        launch(folder, "whole")
        tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        tool += ["--input_folder", f"{folder}/ten", "--output_folder", f"{folder}/universal"]
        subprocess.run(tool, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for how in ("loaded", "mended"):
            print(how, flush=True)
            launch(folder, how)
