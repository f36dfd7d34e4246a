"""`harness weights`: what a person sees, what a program reads, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from harness.cli.main import command_line
from harness.models.convert import tensors_in
from harness.models.weight_files import read_weights, write_weights
from tests.conftest import Harness
from tests.models import weight_cases as cases


class Here:
    """The command line in this process: torch is loaded once, not by every call."""

    def __init__(self, runner: CliRunner) -> None:
        self.runner = runner

    def __call__(self, *arguments: object, check: int = 0) -> Result:
        done = self.runner.invoke(command_line(), [str(a) for a in arguments])
        assert done.exit_code == check, f"{done.stdout}\n{done.stderr}\n{done.exception!r}"
        return done


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(CliRunner())


@pytest.fixture
def mae_file(tmp_path: Path) -> Path:
    path = tmp_path / "mae.pth"
    write_weights(cases.weights_of(cases.mae()), path, "mae")
    return path


def test_inspect_tells_people_and_programs(here: Here, mae_file: Path) -> None:
    text = here("weights", "inspect", mae_file).stdout
    module = cases.mae()
    encoder = sum(t.numel() for t in module.encoder.state_dict().values())
    decoder = sum(p.numel() for p in module.decoder.parameters()) + 17 * 24
    assert f"{mae_file}: mae" in text
    assert f"encoder    {encoder:,} parameters: width 32, depth 3" in text
    assert f"decoder    {decoder:,} parameters: width 24, depth 2" in text
    assert "17 (16 px), 2-D sin-cos" in text
    found = json.loads(here("weights", "inspect", mae_file, "--json").stdout)
    assert found["parameters"] == {
        "encoder": encoder,
        "decoder": decoder,
        "total": encoder + decoder,
    }
    assert (found["size"], found["image_size"], found["dtypes"]) == ("d32x3", 16, ["float32"])
    assert found["problems"] == []
    # The reference's files do not say how many heads; where one does, this is no d32x3.
    here("weights", "convert", mae_file, "w.safetensors", "--to", "mae", "--heads", 4)
    found = json.loads(here("weights", "inspect", "w.safetensors", "--json").stdout)
    assert (found["size"], found["heads"]) == (None, 4)


def test_inspect_lists_what_is_wrong_and_fails(here: Here, tmp_path: Path) -> None:
    state = tensors_in("timm", cases.weights_of(cases.classifier()))
    state["head.scale"] = state.pop("norm.bias")
    save_file(state, tmp_path / "odd.safetensors")
    done = here("weights", "inspect", "odd.safetensors", check=1)
    assert "problem    missing: norm.bias" in done.stdout
    assert "problem    unexpected: head.scale" in done.stdout
    assert "head       165 parameters: 5 classes" in done.stdout
    done = here("weights", "convert", "odd.safetensors", "x.pth", "--to", "mae", check=2)
    assert "missing: norm.bias" in done.stderr and "unexpected: head.scale" in done.stderr
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("layout", ["timm", "mae", "harness"])
def test_weights_that_end_in_fc_norm_are_named_and_converted(
    layout: str, here: Here, tmp_path: Path
) -> None:
    """What fine-tuning of an MAE leaves, and timm's global_pool="avg"."""
    write_weights(cases.finetuned(), tmp_path / "tuned.safetensors", "timm")
    done = here("weights", "inspect", "tuned.safetensors")
    assert "pooling    mean of the patches, then the norm; ends in fc_norm" in done.stdout
    done = here("weights", "convert", "tuned.safetensors", "out.safetensors", "--to", layout)
    assert f"out.safetensors: {layout}" in done.stdout and "ends in fc_norm" in done.stdout
    cases.assert_same(read_weights(tmp_path / "out.safetensors"), cases.finetuned())


def test_tensors_that_are_not_finite_are_a_problem(here: Here, tmp_path: Path) -> None:
    state = tensors_in("timm", cases.weights_of(cases.classifier()))
    state["blocks.1.norm1.bias"][3] = float("nan")
    state["head.weight"][0, 0] = float("-inf")
    save_file(state, tmp_path / "odd.safetensors")
    done = here("weights", "inspect", "odd.safetensors", check=1)
    assert "problem    not finite: blocks.1.norm1.bias, head.weight" in done.stdout
    done = here("weights", "convert", "odd.safetensors", "x.pth", "--to", "mae", check=2)
    assert done.stderr == ("odd.safetensors: not finite: blocks.1.norm1.bias, head.weight\n")


def test_convert_there_and_back_keeps_every_bit(here: Here, mae_file: Path, tmp_path: Path) -> None:
    # Heads of width 32 and of the decoder are not told by a .pth file of the reference.
    refused = here("weights", "convert", mae_file, "hf", "--to", "hf", check=2)
    assert "the number of decoder heads is not known; say it with --decoder-heads" in refused.stderr
    done = here(
        "weights", "convert", mae_file, "hf", "--to", "hf", "--heads", 4, "--decoder-heads", 3
    )
    assert "hf/model.safetensors" in done.stdout and "hf/config.json" in done.stdout
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["num_attention_heads"], config["decoder_num_attention_heads"]) == (4, 3)
    here("weights", "convert", "hf", "back.pth", "--to", "mae")
    files = (mae_file, tmp_path / "back.pth")
    one, other = (torch.load(path, weights_only=True)["model"] for path in files)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_convert_refuses_to_overwrite(here: Here, mae_file: Path, tmp_path: Path) -> None:
    convert = ("weights", "convert", mae_file, "out.safetensors", "--to", "harness")
    here(*convert)
    before = (tmp_path / "out.safetensors").read_bytes()
    done = here(*convert, "--no-decoder", check=2)
    assert done.stderr == "out.safetensors: is there already; --force replaces it\n"
    assert (tmp_path / "out.safetensors").read_bytes() == before
    here(*convert, "--no-decoder", "--force")
    assert not any("decoder" in name for name in load_file(tmp_path / "out.safetensors"))


def test_convert_resizes_and_casts(here: Here, mae_file: Path, tmp_path: Path) -> None:
    done = here(
        "weights", "convert", mae_file, "big.safetensors", "--to", "timm", "--no-decoder",
        "--image-size", 24, "--resize", "swag", "--dtype", "bfloat16",
    )  # fmt: skip
    assert "37 (24 px)" in done.stdout
    found = read_weights(tmp_path / "big.safetensors")
    assert (found.image_size, found.layout, found.decoder) == (24, "timm", {})
    assert {value.dtype for value in found.encoder.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--to", "timm"), "layout timm has no decoder; leave it out with --no-decoder"),
        (("--to", "mae", "--image-size", "24"), "--image-size and --resize go together"),
        (("--to", "mae", "--resize", "mae"), "--image-size and --resize go together"),
        (("--to", "mae", "--image-size", "25", "--resize", "mae"), "25 is no multiple of patch 4"),
        (("--to", "mae", "--heads", "5"), "--heads 5 does not divide width 32"),
        (("--to", "harness", "--drop", "blocks.1."), "missing: blocks.1.norm1.weight"),
    ],
)
def test_mistakes_are_a_line_and_write_nothing(
    arguments: tuple[str, ...], expected: str, here: Here, mae_file: Path, tmp_path: Path
) -> None:
    done = here("weights", "convert", mae_file, "x.safetensors", *arguments, check=2)
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert cases.contents(tmp_path) == ["mae.pth"]


def test_a_missing_file_and_a_wrong_name(here: Here, mae_file: Path) -> None:
    done = here("weights", "inspect", "absent.pth", check=4)
    assert done.stderr == "absent.pth: no such weight file\n"
    done = here("weights", "convert", mae_file, "x.zip", "--to", "mae", check=2)
    assert "expected a name that ends in .safetensors" in done.stderr


def test_a_name_without_a_suffix_is_one_of_safetensors(
    here: Here, mae_file: Path, tmp_path: Path
) -> None:
    here("weights", "convert", mae_file, "encoder", "--to", "timm", "--no-decoder")
    assert cases.contents(tmp_path) == ["encoder.safetensors", "mae.pth"]
    done = here("weights", "convert", mae_file, "encoder", "--to", "timm", check=2)
    assert done.stderr == "encoder.safetensors: is there already; --force replaces it\n"


def test_help_imports_no_torch(harness: Harness) -> None:
    for words in (("--help",), ("weights", "--help"), ("weights", "convert", "--help")):
        done = harness(*words, env={"PYTHONPROFILEIMPORTTIME": "1"})
        imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
        assert not imported & {"torch", "numpy", "timm", "safetensors"}
