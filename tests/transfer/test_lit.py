"""LiT through the training loop: it learns, resumes, and is the same over ranks."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import lit_jobs
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from harness import transfer
from harness.data.captions import draw
from harness.errors import PreemptedError, UserError
from harness.models.lit import read_lit
from harness.study.protocols import Lit
from harness.study.words import text_folder
from harness.transfer.features import read_features
from tests.models.text_folders import tiny_xlm_roberta

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the captions and their features are."""
    return tmp_path_factory.mktemp("lit-root")


@pytest.fixture(scope="module")
def straight(root: Path) -> tuple[Path, tiny.Rows]:
    """A whole run, and its rows."""
    rows = tiny.Rows()
    lit_jobs.train(root, root / "straight", metrics=rows)
    return root / "straight", rows


def test_the_loss_starts_near_chance_and_falls(straight: tuple[Path, tiny.Rows]) -> None:
    rows = straight[1].rows
    assert rows[0]["loss"] < math.log(32) + 3  # at 1 / 0.07 unrelated vectors cost more than chance
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2


def test_towers_read_back_give_the_loss_that_was_reported(
    root: Path, straight: tuple[Path, tiny.Rows]
) -> None:
    folder, rows = straight
    lit = read_lit(folder, CPU)
    stage = lit_jobs.stage(lit_jobs.RECIPE)
    context = lit_jobs.with_features(root, tiny.context(folder))
    _, test = read_features(stage, context)
    drawn = draw("test", 0, 1000)
    texts = [drawn.captions[int(key.removeprefix("test-"))][0] for key in test.keys]
    image, text = lit.images(test.values_MD), lit.texts(texts)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(1000))
    scale = lit.model.log_scale.exp().detach()
    losses = []
    for first in range(0, 1000 - 31, 32):
        logits = scale * image[first : first + 32] @ text[first : first + 32].T
        target = torch.arange(32)
        losses += [F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)]
    assert rows.rows[-1]["val_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bits(
    root: Path, straight: tuple[Path, tiny.Rows], tmp_path: Path
) -> None:
    rows = tiny.Rows()
    with pytest.raises(PreemptedError):
        lit_jobs.train(root, tmp_path, metrics=rows, should_stop=tiny.StopAfter(3))
    lit_jobs.train(root, tmp_path, metrics=rows)
    assert rows.timeless() == straight[1].timeless()
    one, other = (load_file(f / "lit.safetensors") for f in (tmp_path, straight[0]))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_chunks_of_the_similarities_change_rounding_only(
    root: Path, straight: tuple[Path, tiny.Rows], tmp_path: Path
) -> None:
    rows = tiny.Rows()
    context = lit_jobs.with_features(root, tiny.context(tmp_path, metrics=rows))
    transfer.run(lit_jobs.stage(lit_jobs.RECIPE, head_batch=5), context)
    for one, other in zip(rows.timeless(), straight[1].timeless(), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_accumulation_is_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    context = lit_jobs.with_features(root, tiny.context(tmp_path))
    with pytest.raises(UserError, match=r"micro_batch of 8 is less than .* of the batch, 32"):
        transfer.run(lit_jobs.stage(lit_jobs.RECIPE, micro_batch=8), context)


def test_a_set_without_captions_names_the_sample(root: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from harness.errors import DataError
    from harness.study.protocols.common import Features

    features = replace(tiny.context(tmp_path / "features"), root=root)
    transfer.run(lit_jobs.stage(Features(), str(tiny.folder())), features)
    context = replace(
        tiny.context(tmp_path / "lit"), root=root, upstream={"features": features.folder}
    )
    with pytest.raises(DataError, match=r"000000.tar: byte offset \d+: sample .* has no caption"):
        transfer.run(lit_jobs.stage(lit_jobs.RECIPE, str(tiny.folder())), context)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_xlm_r_from_a_folder_trains_and_needs_the_folder_no_more(
    root: Path, tmp_path: Path, checkpointing: bool
) -> None:
    source = tiny_xlm_roberta(tmp_path / "xlm-r")
    text = text_folder(str(source), ())
    recipe = Lit.model_validate(lit_jobs.RECIPE.model_dump() | {"text": text, "context": 30})
    rows = tiny.Rows()
    context = lit_jobs.with_features(root, tiny.context(tmp_path / "lit", metrics=rows))
    file = lit_jobs.stage(recipe, activation_checkpointing=checkpointing)
    transfer.run(file, context)
    assert rows.rows[-1]["loss"] < rows.rows[0]["loss"]
    source.rename(tmp_path / "gone")
    lit = read_lit(tmp_path / "lit", CPU)
    assert lit.texts(["a red ring", "a blue star"]).shape == (2, 24)
    before = load_file(tmp_path / "gone" / "model.safetensors")
    trained = dict(lit.model.text.named_parameters())
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(trained[f"model.{name}"], before[name])


def test_a_text_tower_that_changed_since_the_plan_is_refused(root: Path, tmp_path: Path) -> None:
    source = tiny_xlm_roberta(tmp_path / "xlm-r")
    recipe = Lit.model_validate(
        lit_jobs.RECIPE.model_dump() | {"text": text_folder(str(source), ())}
    )
    config = source / "config.json"
    config.write_text(config.read_text() + " ")
    context = lit_jobs.with_features(root, tiny.context(tmp_path / "lit"))
    with pytest.raises(UserError, match="the text tower has changed since the study was planned"):
        transfer.run(lit_jobs.stage(recipe), context)


@pytest.mark.long
def test_two_ranks_do_what_one_does(root: Path, straight: tuple[Path, tiny.Rows]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("lit_jobs.py")
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(root)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    expected = straight[1].timeless()
    for rank in range(2):
        found = json.loads((root / f"rows_{rank}.json").read_text())
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    one, both = (load_file(f / "lit.safetensors") for f in (straight[0], root / "both"))
    tiny.assert_same_to_rounding(one, both)
