"""Files that are damaged, dangerous or not what they should be; resizing; our own metadata."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch.nn import functional as F

from harness.errors import HarnessError, NotFoundError, UserError
from harness.models import interchange
from harness.models.convert import cast, encoder_tensors_for, resized, tensors_in
from harness.models.init import initialize
from harness.models.interchange import Weights
from harness.models.positions import Resize, distance_from_sincos, resize_positions
from harness.models.vit import VisionEncoder
from harness.models.weight_files import inspect_weights, read_file, read_weights, write_weights
from harness.models.weights import read_encoder, save_encoder, start_of
from harness.study.protocols import LinearProbe
from harness.study.recipes import Model
from tests.models import weight_cases as cases


@pytest.fixture(scope="module")
def weights() -> Weights:
    return cases.weights_of(cases.mae())


class Bomb:
    """Pickled, it makes a folder when the file is loaded by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_file_that_holds_code_is_refused_in_one_line_and_nothing_runs(
    suffix: str, is_zip: bool, tmp_path: Path
) -> None:
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "trace"
    content = {"model": {"cls_token": torch.zeros(1, 1, 8)}, "args": Bomb(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)
    assert "refused, it holds code or objects (posix.mkdir)" in str(error.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the file is what it is meant to be
    assert trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_refused_in_one_line_and_nothing_runs(
    protocol: int, tmp_path: Path
) -> None:
    path, trace = tmp_path / "evil.bin", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Bomb(trace), protocol))
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert "\n" not in str(error.value)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.script(torch.nn.BatchNorm1d(2)).save(str(path))
    with pytest.raises(UserError, match="TorchScript program"):
        read_weights(path)


def test_a_module_saved_whole_is_refused(tmp_path: Path) -> None:
    torch.save(cases.mae(), tmp_path / "module.pt")
    with pytest.raises(UserError, match=r"holds code or objects \(harness\.models\.mae\.Mae\)"):
        read_weights(tmp_path / "module.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.999])
def test_truncated_and_empty_files_are_one_line(
    name: str, part: float, weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / name
    write_weights(weights, path, "mae")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match="cannot be read as") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["mae", "hf"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_25_damaged_files_of_a_kind_give_an_error_of_ours_or_other_values(
    suffix: str, layout: interchange.Layout, weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    write_weights(weights, path, layout)
    whole = path.read_bytes()
    rng = random.Random(f"{suffix}{layout}")
    refused = 0
    for _ in range(25):
        damaged = bytearray(whole)
        # Most hits where names and shapes are: the head of safetensors, the pickle of a zip.
        reach = len(damaged) if rng.random() < 0.3 else 6000
        for _ in range(rng.randint(1, 30)):
            damaged[rng.randrange(reach)] = rng.randrange(256)
        if rng.random() < 0.2:
            del damaged[rng.randrange(reach) :]
        path.write_bytes(damaged)
        try:
            found = read_weights(path)
        except HarnessError as error:
            refused += 1
            assert str(error)
        else:
            assert found.encoder.keys() == weights.encoder.keys()
    assert refused >= 10


@pytest.mark.parametrize("layout", ["harness", "mae", "hf"])
def test_every_missing_and_every_unexpected_tensor_is_listed(
    layout: interchange.Layout, weights: Weights, tmp_path: Path
) -> None:
    whole = tensors_in(layout, weights)
    needed = [n for n in whole if "pos" not in n and "patch" not in n]
    rng = random.Random(0)
    gone = rng.sample(needed, 7)
    state = {name: value for name, value in whole.items() if name not in gone}
    state |= {"extra.thing": torch.zeros(1), f"{needed[-1]}.more": torch.zeros(2)}
    path = tmp_path / "w.safetensors"
    save_file({name: value.clone() for name, value in state.items()}, path)
    with pytest.raises(UserError) as error:
        read_weights(path)
    missing = next(p for p in error.value.problems if ": missing: " in p)
    assert set(missing.split(": missing: ")[1].split(", ")) == set(gone)
    unexpected = next(p for p in error.value.problems if ": unexpected: " in p)
    for name in ("extra.thing", f"{needed[-1]}.more", "--drop"):
        assert name in unexpected
    assert set(inspect_weights(path).problems) >= {f"missing: {missing.split(': missing: ')[1]}"}


def test_each_tensor_alone_is_missed(weights: Weights) -> None:
    # Block 3 of 3, and block 2 of the decoder's 2: depth is told by what is there.
    for layout in ("mae", "hf"):
        whole = tensors_in(layout, weights)
        for name in whole:
            state = {k: v for k, v in whole.items() if k != name}
            try:
                problems = interchange.parse(state).problems
            except UserError as error:
                problems = error.problems
            if name == "pos_embed" or name.endswith("position_embeddings"):
                continue
            assert any(p.startswith("missing: ") and name in p for p in problems), name


def test_wrong_shapes_and_kinds_are_listed(weights: Weights) -> None:
    state = tensors_in("mae", weights)
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(96, 32)
    state["decoder_norm.bias"] = torch.zeros(8)
    state["cls_token"] = torch.zeros(1, 1, 32, dtype=torch.int8)
    assert interchange.parse(state).problems == (
        "cls_token is int8, expected floating point",
        "blocks.1.mlp.fc1.weight is (96, 32), expected (128, 32)",
        "decoder.norm.bias is (8,), expected (24,)",
    )


@pytest.mark.parametrize("shape", [(1, 16, 32), (1, 15, 32), (17, 32)])
def test_positions_that_are_no_square_with_a_class_token_are_refused(
    shape: tuple[int, ...], weights: Weights
) -> None:
    state = tensors_in("mae", weights)
    state["pos_embed"] = torch.zeros(shape)
    with pytest.raises(UserError, match=r"pos_embed is \(.*expected \(1, 1 \+ grid \* grid"):
        interchange.parse(state)


@pytest.mark.parametrize(("grid", "target"), [(14, 32), (16, 37), (14, 7)])
def test_resizing_is_torchs_with_the_flags_of_each_and_timms(grid: int, target: int) -> None:
    table = torch.randn(1, 1 + grid * grid, 24, generator=torch.Generator().manual_seed(0))
    square = table[:, 1:].reshape(1, grid, grid, 24).permute(0, 3, 1, 2)
    flags: dict[Resize, dict[str, bool]] = {
        "mae": {"align_corners": False},
        "swag": {"align_corners": True},
        "timm": {"align_corners": False, "antialias": True},
    }
    results = {}
    for variant, options in flags.items():
        expected = F.interpolate(square, size=(target, target), mode="bicubic", **options)
        found = results[variant] = resize_positions(table, target, variant)
        assert torch.equal(found[0, 0], table[0, 0])
        rows = expected.permute(0, 2, 3, 1).reshape(1, target * target, 24)
        torch.testing.assert_close(found[:, 1:], rows, rtol=0, atol=0)
    theirs = resample_abs_pos_embed(table, [target, target])
    torch.testing.assert_close(results["timm"], theirs, rtol=0, atol=0)
    assert not torch.allclose(results["mae"], results["swag"], atol=1e-2)
    assert not torch.allclose(results["mae"], results["timm"], atol=1e-2)
    assert resize_positions(table, grid, "mae") is table


def test_an_encoder_takes_weights_of_another_resolution(weights: Weights) -> None:
    larger = cases.SMALL.model_copy(update={"image_size": 24})
    for variant in ("mae", "swag", "timm"):
        tensors = encoder_tensors_for(weights, larger, variant)
        VisionEncoder(larger).load_state_dict(tensors, strict=True)
        expected = resize_positions(weights.encoder["pos_embed"], 6, variant)
        assert torch.equal(tensors["pos_embed"], expected)
        assert torch.equal(resized(weights, 24, variant).encoder["pos_embed"], expected)
    assert resized(weights, 24, "mae").decoder["pos_embed"].shape == (1, 37, 24)
    half = encoder_tensors_for(cast(weights, torch.bfloat16), cases.SMALL, "mae")
    assert {value.dtype for value in half.values()} == {torch.float32}


def test_every_mismatch_with_the_model_is_listed(weights: Weights) -> None:
    other = Model(width=48, depth=2, heads=3, patch=8, image_size=16)
    with pytest.raises(UserError) as error:
        encoder_tensors_for(weights, other, "mae")
    assert error.value.problems == (
        "width is 32, the model has 48",
        "depth is 3, the model has 2",
        "patch is 4, the model has 8",
        "heads is 4, the model has 3",
    )
    with pytest.raises(UserError, match=r"has fc_norm .* no norm"):
        encoder_tensors_for(cases.finetuned(), cases.SMALL, "mae")
    assert cases.finetuned().pool == "mean_fc_norm"
    used = encoder_tensors_for(cases.finetuned(), cases.SMALL, "mae", "mean_fc_norm")
    assert torch.equal(used["norm.weight"], cases.finetuned().encoder["fc_norm.weight"])


def test_a_stages_file_says_what_its_tensors_do_not(weights: Weights, tmp_path: Path) -> None:
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    tensors = encoder_tensors_for(weights, cases.SMALL, "mae")
    save_encoder(new, tensors, cases.SMALL, "mean")
    save_encoder(old, tensors)
    found = read_weights(new)
    assert (found.layout, found.heads, found.pool) == ("harness", 4, "mean")
    # Older files, without a header of ours, are timm's names; heads come from the size table.
    assert (read_weights(old).layout, read_weights(old).heads) == ("timm", 2)
    for path in (new, old):
        encoder = VisionEncoder(cases.SMALL)
        encoder.load_state_dict(read_encoder(encoder, path))
        assert all(torch.equal(v, tensors[k]) for k, v in encoder.state_dict().items())
    header = {path: path.read_bytes()[8:].split(b'{"dtype"', 1)[0] for path in (new, old)}
    assert b"heads" in header[new] and b"heads" not in header[old]
    assert load_file(new).keys() == load_file(old).keys()


def test_a_header_that_denies_its_tensors_is_a_problem(weights: Weights) -> None:
    state = tensors_in("harness", weights)
    said = {"layout": "harness", "width": 32, "depth": 12, "heads": 5, "image_size": 224}
    assert interchange.parse(state, said=said).problems == (
        "metadata: depth is 12, the tensors have 3",
        "metadata: image_size is 224, the tensors have 16",
        "5 heads do not divide width 32",
    )
    problems = interchange.parse(state, config={"hidden_act": "relu", "hidden_size": 64}).problems
    assert problems == (
        "config.json: hidden_size is 64, the tensors have 32",
        "config.json: hidden_act is relu; the encoder has gelu",
    )


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    for name, content, expected in (
        ("notes.txt", b"x", "expected a name that ends in .safetensors, .pth, .pt, .bin"),
        ("index.index.json", b"[]", "expected a JSON object"),
        ("other.index.json", b"{}", "expected a weight_map"),
        ("out.index.json", b'{"weight_map": {"a": "../a.bin"}}', "not a file beside it"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            read_file(tmp_path / name)
        assert expected in str(error.value)
    with pytest.raises(NotFoundError, match="no such weight file"):
        read_file(tmp_path / "absent.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="a folder without weights"):
        read_file(tmp_path / "folder")
    for content, expected in (
        ([1, 2], "expected a state dict, found list"),
        ({"a": torch.zeros(1), "b": 3}, "not tensors: b"),
        ({"a": torch.zeros(1)}, "no ViT"),
    ):
        torch.save(content, tmp_path / "it.pth")
        with pytest.raises(UserError, match=expected):
            read_weights(tmp_path / "it.pth")


def test_an_index_that_its_shards_deny_is_an_error(weights: Weights, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in tensors_in("hf", weights).items()}
    save_file(state, tmp_path / "model-1.safetensors")
    table = dict.fromkeys(state, "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    cases.assert_same(weights, read_weights(tmp_path))
    gone = table.popitem()[0]
    index.write_text(json.dumps({"weight_map": table}))
    with pytest.raises(UserError, match=f"does not hold what the index says: {gone}"):
        read_weights(tmp_path)


def test_sincos_tables_are_told_from_others(weights: Weights) -> None:
    assert distance_from_sincos(weights.encoder["pos_embed"]) == 0
    moved = weights.encoder["pos_embed"] + 0.5
    assert distance_from_sincos(moved) == pytest.approx(0.5)
    assert distance_from_sincos(torch.zeros(1, 16, 8)) is None


def test_a_task_at_another_resolution_resizes_the_positions_of_our_own_weights(
    tmp_path: Path,
) -> None:
    small = Model(width=32, depth=1, heads=2, patch=4, image_size=16)
    encoder = VisionEncoder(small)
    initialize(encoder, 0)
    save_encoder(tmp_path / "w.safetensors", encoder.state_dict(), small, "cls")
    large = small.model_copy(update={"image_size": 24})
    config = tiny.stage(LinearProbe()).config.model_copy(update={"model": large})
    found = start_of(config, tmp_path / "w.safetensors", VisionEncoder(large))
    expected = resample_abs_pos_embed(encoder.pos_embed, [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(found["pos_embed"], expected)
    for name, value in encoder.state_dict().items():
        if name != "pos_embed":
            torch.testing.assert_close(found[name], value)
