"""`init: checkpoint:PATH`: what cannot be read, or does not fit, is said by the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.study.cells import build_grid
from harness.study.schema import load_study
from tests.conftest import SMALL


def safetensors(path: Path, width: int, name: str = "patch_embed.proj.weight") -> None:
    """A header, and no tensor: nothing more is read for a plan."""
    entry = {"dtype": "F32", "shape": [width, 3, 4, 4], "data_offsets": [0, 192 * width]}
    header = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def write(base: Path) -> None:
    for name in ("x.ckpt", "w.py", "x.pth", "odd/adapter.bin", "model.safetensors.index.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("x")
    (base / "torn.safetensors").write_bytes(b"\xff" * 40)
    safetensors(base / "d16.safetensors", 16)
    safetensors(base / "d24.safetensors", 24)
    safetensors(base / "hf.safetensors", 24, "vit.embeddings.patch_embeddings.projection.weight")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "x.ckpt",
            "x.ckpt: not a file of weights; expected a name that ends in .safetensors, .pth",
        ),
        ("w.py", "w.py: not a file of weights; expected"),
        ("odd", "odd: holds adapter.bin, expected one of model.safetensors"),
        ("model.safetensors.index.json", "names the files beside it; give their folder"),
        ("torn.safetensors", "torn.safetensors: cannot be read as safetensors"),
        ("d24.safetensors", "d24.safetensors: width is 24, the model has 16"),
        ("hf.safetensors", "hf.safetensors: width is 24, the model has 16"),
    ],
)
def test_what_cannot_be_a_start_is_said_by_the_plan(
    name: str, expected: str, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(UserError) as error:
        build_grid(load_study(study_file(small(name))))
    assert expected in str(error.value)


@pytest.mark.parametrize("name", ["d16.safetensors", "x.pth"])
def test_what_may_be_a_start_is_planned(
    name: str, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    write(tmp_path)
    assert len(build_grid(load_study(study_file(small(name)))).cells) == 2


def small(name: str) -> str:
    text = SMALL.replace("[random, mae]", f"['checkpoint:{name}']").replace(", d32x3", "")
    return text
