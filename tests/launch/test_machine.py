"""Which hosts, cores and GPUs there are: variables, nvidia-smi, hostfiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import NotFoundError, UserError
from harness.launch.hostfile import machine_of_hostfile
from harness.launch.machine import Host, Machine, detect

TWO = "GPU 0: NVIDIA H100 (UUID: GPU-aaaa)\nGPU 1: NVIDIA H100 (UUID: GPU-bbbb)"
MIG = """\
GPU 0: NVIDIA A100 (UUID: GPU-aaaa)
  MIG 3g.20gb     Device  0: (UUID: MIG-1111)
  MIG 3g.20gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA A100 (UUID: GPU-bbbb)"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH has one program: an nvidia-smi that prints this file, and fails without it."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("HARNESS_DEVICE", raising=False)
    tool, listed = tmp_path / "bin/nvidia-smi", tmp_path / "listed"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] && exec /bin/cat {listed}\n')
    tool.chmod(0o755)
    return listed


def seen() -> tuple[str, ...]:
    machine = detect()
    return machine.slots if machine.device == "cuda" else ()


def test_every_gpu_that_nvidia_smi_lists_is_a_slot(nvidia_smi: Path) -> None:
    nvidia_smi.write_text(TWO + "\n")
    assert seen() == ("0", "1")


def test_the_instances_of_a_gpu_cut_by_mig_are_slots(nvidia_smi: Path) -> None:
    nvidia_smi.write_text(MIG + "\n")
    assert seen() == ("MIG-1111", "MIG-2222", "1")


def test_an_nvidia_smi_without_driver_means_no_gpu(nvidia_smi: Path) -> None:
    assert seen() == ()


# The driver's own rules, as torch states them in torch.cuda._parse_visible_devices.
VISIBLE = {
    "1": ("1",),
    "1,0": ("1", "0"),
    " 0 , 1 ": ("0", "1"),
    "": (),
    "-1": (),
    "NoDevFiles": (),
    "0,-1,1": ("0",),
    "0,0": (),
    "GPU-aaaa,GPU-bbbb": ("GPU-aaaa", "GPU-bbbb"),
    "MIG-1111": ("MIG-1111",),
    "MIG-GPU-aaaa/1/0": ("MIG-GPU-aaaa/1/0",),
    "GPU-aaaa,MIG-1111": ("GPU-aaaa",),
    "GPU-aaaa,0": ("GPU-aaaa",),
}


@pytest.mark.parametrize(("text", "slots"), VISIBLE.items())
@pytest.mark.parametrize("installed", [True, False], ids=["nvidia-smi", "none"])
def test_cuda_visible_devices_is_honoured(
    text: str,
    slots: tuple[str, ...],
    installed: bool,
    nvidia_smi: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvidia_smi.write_text(TWO + "\n")
    if not installed:
        monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert seen() == slots


def test_an_index_of_no_gpu_ends_the_list(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi.write_text(TWO + "\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,0")
    assert seen() == ("1",)
    monkeypatch.setenv("HARNESS_DEVICE", "cpu")
    assert detect().device == "cpu"
    monkeypatch.setenv("HARNESS_DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="no NVIDIA GPU is visible"):
        detect()


# --- hostfiles ----------------------------------------------------------------------------


def test_a_hostfile_of_deepspeed_is_a_machine(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# our cluster\nworker-1 slots=4\n\n  me@worker-2   slots=2  # the old one\n")
    assert machine_of_hostfile(file, "cuda") == Machine(
        device="cuda",
        hosts=(
            Host(name="worker-1", slots=("0", "1", "2", "3"), remote=True),
            Host(name="me@worker-2", slots=("0", "1"), remote=True),
        ),
    )
    assert machine_of_hostfile(file, "cuda").slots == (
        *(f"worker-1:{i}" for i in range(4)),
        *("me@worker-2:0", "me@worker-2:1"),
    )


def test_every_problem_of_a_hostfile_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    lines = [
        *("a slots=2", "b slot=2", "a slots=4", "c slots=0", "d", "-oProxyCommand=x slots=1"),
        *("e slots=two", "f slots=1 slots=2", "g slots=2 colour=red", "h slots=\u00b2"),
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        machine_of_hostfile(file, "cpu")
    assert error.value.problems == (
        f"{file}:2: slot: unknown key; did you mean 'slots'?",
        f"{file}:3: host a is listed already, in line 1; give each host one line",
        f"{file}:4: slots=0: expected a whole number of at least 1",
        f"{file}:5: host d has no slots; write `d slots=N`",
        f"{file}:6: '-oProxyCommand=x' is no host name; expected letters, digits, . _ - and user@",
        f"{file}:7: slots=two: expected a whole number of at least 1",
        f"{file}:8: slots is given twice for host f",
        f"{file}:9: colour: unknown key; known: slots",
        f"{file}:10: slots=\u00b2: expected a whole number of at least 1",
    )


def test_a_hostfile_without_hosts_or_without_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    with pytest.raises(NotFoundError, match="no such hostfile"):
        machine_of_hostfile(file, "cpu")
    file.write_text("# nobody yet\n")
    with pytest.raises(UserError, match="lists no host"):
        machine_of_hostfile(file, "cpu")
