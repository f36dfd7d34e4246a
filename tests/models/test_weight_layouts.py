"""Layouts: exact inverses of each other, and those of the real classes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import timm
import torch
import transformers

from harness.models import interchange
from harness.models.convert import encoder_tensors_for, tensors_in
from harness.models.interchange import Weights
from harness.models.layouts import LAYOUTS, Layout
from harness.models.vit import VisionEncoder
from harness.models.weight_files import read_weights, write_weights
from tests.models import weight_cases as cases

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def kinds() -> dict[str, Weights]:
    return {
        "encoder": cases.weights_of(cases.classifier().encoder),
        "head": cases.weights_of(cases.classifier()),
        "mae": cases.weights_of(cases.mae()),
        "finetuned": cases.finetuned(),
    }


def holds(layout: Layout, kind: str) -> bool:
    return (layout, kind) not in {("timm", "mae"), ("maws", "mae"), ("hf", "finetuned")}


@pytest.mark.parametrize("kind", ["encoder", "head", "mae", "finetuned"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_every_pair_of_layouts_is_an_exact_round_trip(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    start = kinds()[kind]
    able = [layout for layout in LAYOUTS if holds(layout, kind)]
    assert len(able) >= 3
    for one, other in itertools.product(able, able):
        write_weights(start, tmp_path / f"one{suffix}", one)
        first = read_weights(tmp_path / f"one{suffix}")
        cases.assert_same(start, first)
        write_weights(first, tmp_path / f"two{suffix}", other)
        second = read_weights(tmp_path / f"two{suffix}")
        write_weights(second, tmp_path / f"back{suffix}", one)
        cases.assert_same(start, read_weights(tmp_path / f"back{suffix}"))
        before, after = tensors_in(one, first), tensors_in(one, second)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    weights = cases.weights_of(cases.mae())
    for name in ("a.pth", "longer.pth"):
        write_weights(weights, tmp_path / name, "mae")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "longer.pth").read_bytes()
    for name in ("a.safetensors", "b.safetensors"):
        write_weights(weights, tmp_path / name, "harness")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = read_weights(tmp_path / "a.safetensors")
    assert (found.layout, found.heads, found.decoder_heads) == ("harness", 4, 3)
    names = ["a.pth", "a.safetensors", "b.safetensors", "longer.pth"]
    assert cases.contents(tmp_path) == names


@pytest.mark.parametrize(
    ("layout", "kind", "expected"),
    [
        ("timm", "mae", "layout timm has no decoder"),
        ("maws", "mae", "layout maws has no decoder"),
        ("hf", "finetuned", "no fc_norm"),
    ],
)
def test_what_a_layout_has_no_place_for_is_refused(
    layout: Layout, kind: str, expected: str
) -> None:
    from harness.errors import UserError

    with pytest.raises(UserError, match=expected):
        tensors_in(layout, kinds()[kind])


def test_features_are_those_of_timm_and_of_transformers(tmp_path: Path) -> None:
    ours = cases.classifier().eval()
    weights = cases.weights_of(ours)
    bare = cases.weights_of(ours.encoder)
    images = cases.images()
    with torch.no_grad():
        tokens, logits = ours.encoder(images), ours(images)

        model = timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=5
        ).eval()
        model.load_state_dict(tensors_in("timm", weights), strict=True)
        torch.testing.assert_close(model.forward_features(images), tokens, **CLOSE)
        torch.testing.assert_close(model(images), logits, **CLOSE)

        write_weights(bare, tmp_path / "vit", "hf")
        vit = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
        found = vit.eval()(images).last_hidden_state
        torch.testing.assert_close(found, tokens, **CLOSE)

        # With nothing hidden, and noise that keeps the order, MAE's encoder is the plain one.
        masked = transformers.ViTMAEModel.from_pretrained(tmp_path / "vit", mask_ratio=0.0)
        noise = torch.linspace(0, 1, 16).expand(3, -1)
        found = masked.eval()(images, noise=noise).last_hidden_state
        torch.testing.assert_close(found, tokens, **CLOSE)

        write_weights(weights, tmp_path / "cls", "hf")
        theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "cls")
        torch.testing.assert_close(theirs.eval()(images).logits, logits, **CLOSE)


def vit_config(**more: object) -> dict[str, object]:
    return {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 128, "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-6,
        **more,
    }  # fmt: skip


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize(
    "name", ["ViTModel", "ViTForImageClassification", "ViTMAEModel", "ViTMAEForPreTraining"]
)
def test_what_save_pretrained_writes_is_read(name: str, shard: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    is_mae = "MAE" in name
    decoder = {
        "decoder_hidden_size": 24, "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 3, "decoder_intermediate_size": 96,
    }  # fmt: skip
    config = (
        transformers.ViTMAEConfig(**vit_config(**decoder, mask_ratio=0.0))
        if is_mae
        else transformers.ViTConfig(**vit_config(num_labels=7))
    )
    model = getattr(transformers, name)(config).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")

    weights = read_weights(tmp_path, drop=["pooler."])
    assert (weights.layout, weights.heads, weights.image_size) == ("hf", 4, 16)
    assert bool(weights.decoder) == (name == "ViTMAEForPreTraining")
    if weights.decoder:
        assert weights.decoder_heads == 3
    assert bool(weights.head) == (name == "ViTForImageClassification")
    encoder = VisionEncoder(cases.SMALL).eval()
    encoder.load_state_dict(encoder_tensors_for(weights, cases.SMALL, "mae"))
    images = cases.images()
    body = getattr(model, "vit", model)
    extra = {"noise": torch.linspace(0, 1, 16).expand(3, -1)} if is_mae else {}
    with torch.no_grad():
        expected = body(images, **extra).last_hidden_state
        torch.testing.assert_close(encoder(images), expected, **CLOSE)

    # A state dict in memory has other names in transformers 5 than its files; both are read.
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("pooler.")}
    cases.assert_same(weights, interchange.parse(kept, config=config.to_dict()))


@pytest.mark.parametrize("prefix", ["module.", "trunk.", "vision_encoder.", "visual.trunk."])
@pytest.mark.parametrize("container", ["", "model", "state_dict"])
def test_wrapped_state_dicts_of_torch_save_are_read(
    prefix: str, container: str, tmp_path: Path
) -> None:
    weights = cases.weights_of(cases.classifier())
    state = {prefix + name: value for name, value in tensors_in("timm", weights).items()}
    content = {container: state, "epoch": 7} if container else state
    torch.save(content, tmp_path / "it.pth")
    found = read_weights(tmp_path / "it.pth")
    cases.assert_same(weights, found)
    assert found.extra.get("beside", []) == (["epoch"] if container else [])
    assert found.layout == ("mae" if container == "model" else "timm")


def test_a_checkpoint_of_the_mae_reference_with_its_options_is_read(tmp_path: Path) -> None:
    from argparse import Namespace

    weights = cases.weights_of(cases.mae())
    state = tensors_in("mae", weights)
    assert {"mask_token", "decoder_pos_embed", "decoder_pred.weight"} <= state.keys()
    torch.save({"model": state, "args": Namespace(lr=1.0), "epoch": 3}, tmp_path / "it.pth")
    found = read_weights(tmp_path / "it.pth")
    cases.assert_same(weights, found)
    assert found.layout == "mae"
    assert found.extra["beside"] == ["args", "epoch"]


def test_a_clip_is_read_when_its_other_half_is_named(tmp_path: Path) -> None:
    from harness.errors import UserError

    weights = cases.weights_of(cases.classifier().encoder)
    state = {f"visual.trunk.{k}": v for k, v in tensors_in("timm", weights).items()}
    state["logit_scale"] = torch.zeros(())
    state["text.blocks.0.norm1.weight"] = torch.zeros(8)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"unexpected: logit_scale, text\.blocks.*--drop"):
        read_weights(tmp_path / "clip.pt")
    found = read_weights(tmp_path / "clip.pt", drop=["text.", "logit_scale"])
    cases.assert_same(weights, found)
    assert found.extra["dropped"] == ["logit_scale", "text.blocks.0.norm1.weight"]


def test_mae_positions_that_a_file_leaves_out_are_sincos() -> None:
    ours = cases.mae()
    state = tensors_in("mae", cases.weights_of(ours))
    del state["pos_embed"]
    found = interchange.parse(state)
    assert not found.problems
    assert torch.equal(found.encoder["pos_embed"], ours.encoder.pos_embed)
    assert found.notes
