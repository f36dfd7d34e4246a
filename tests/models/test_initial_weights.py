"""Initial weights: by name and seed, spread as documented, saved and loaded exactly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.errors import UserError
from harness.models.heads import Classifier
from harness.models.init import initialize
from harness.models.mae import Mae
from harness.models.vit import VisionEncoder, sincos_positions
from harness.models.weights import read_encoder, save_encoder
from harness.study.recipes import Duration, MaeRecipe, Model

SMALL = Model(width=64, depth=2, heads=2, patch=4, image_size=16)
RECIPE = MaeRecipe(duration=Duration(steps=1), decoder_width=16, decoder_depth=1, decoder_heads=2)


def classifier(num_classes: int = 7) -> Classifier:
    return Classifier(VisionEncoder(SMALL), num_classes, "cls")


def test_mae_and_classifier_start_with_the_same_encoder() -> None:
    mae, supervised = Mae(SMALL, RECIPE), classifier()
    initialize(mae, 3)
    initialize(supervised, 3)
    left, right = mae.encoder.state_dict(), supervised.encoder.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_another_seed_changes_every_drawn_tensor_and_the_global_generator_none() -> None:
    one, same, other = classifier(), classifier(), classifier()
    initialize(one, 0)
    torch.manual_seed(99)
    initialize(same, 0)
    initialize(other, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        drawn = name.endswith("cls_token") or (name.endswith("weight") and a.ndim > 1)
        drawn = drawn and not name.startswith("head.")
        assert torch.equal(a, b) != drawn, name


def test_spread_of_every_tensor_is_the_documented_one() -> None:
    mae = Mae(SMALL, RECIPE)
    initialize(mae, 0)
    for name, param in mae.named_parameters():
        if name.endswith("bias"):
            assert not param.any(), name
        elif param.ndim == 1:
            assert (param == 1).all(), name
        elif name.endswith("token"):
            assert param.std().item() == pytest.approx(0.02, rel=0.4), name
        else:
            rows, columns = param.shape[0], param[0].numel()
            xavier = (2 / (rows + columns)) ** 0.5
            assert param.std().item() == pytest.approx(xavier, rel=0.1), name
            assert param.abs().max() <= 3**0.5 * xavier, name


def test_classifier_head_is_zero_so_the_first_logits_are() -> None:
    model = classifier()
    initialize(model, 0)
    assert not model(torch.randn(2, 3, 16, 16)).any()
    assert torch.equal(model.encoder.pos_embed, sincos_positions(4, 64))


def test_encoder_weights_survive_the_disk(tmp_path: Path) -> None:
    source, target = VisionEncoder(SMALL), VisionEncoder(SMALL)
    initialize(source, 0)
    path = tmp_path / "weights.safetensors"
    save_encoder(path, source.state_dict())
    target.load_state_dict(read_encoder(target, path))
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name]), name
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_wrong_weights_are_named_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    encoder = VisionEncoder(SMALL)
    tensors = dict(encoder.state_dict())
    tensors["extra"] = tensors.pop("norm.bias")
    tensors["cls_token"] = torch.zeros(1, 1, 32)
    save_encoder(path, tensors)
    assert load_file(path).keys() == tensors.keys()
    with pytest.raises(UserError) as error:
        read_encoder(encoder, path)
    assert error.value.problems == (
        f"{path}: missing: norm.bias",
        f"{path}: unexpected: extra",
        f"{path}: cls_token is (1, 1, 32), the model has (1, 1, 64)",
    )


def test_a_torn_file_is_a_users_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="cannot be read as safetensors weights"):
        read_encoder(VisionEncoder(SMALL), path)
