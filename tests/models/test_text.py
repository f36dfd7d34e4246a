"""Text towers: bytes, padding, and models that transformers saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from text_folders import tiny_xlm_roberta

from harness.errors import NotFoundError, UserError
from harness.models.init import initialize
from harness.models.lit import TwoTowers
from harness.models.text import ByteTokenizer, ByteTower, FolderTokenizer, FolderTower
from harness.study.protocols import Lit, TextTower
from harness.study.recipes import Duration
from harness.study.words import text_folder, text_hash

TEXTS = ["a red ring", "été 環", ""]


def test_bytes_are_cut_at_the_context_and_padded_to_the_longest() -> None:
    tokens, mask = ByteTokenizer(7)(["ab", "été 環!", ""])
    raw = "été 環!".encode()[:7]
    assert tokens.tolist() == [
        [1, 3 + ord("a"), 3 + ord("b"), 2, 0, 0, 0, 0, 0],
        [1, *(3 + byte for byte in raw), 2],
        [1, 2, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert mask.sum(dim=1).tolist() == [4, 9, 2]
    assert tokens.max() < ByteTokenizer.vocabulary


def byte_tower() -> ByteTower:
    tower = ByteTower(TextTower(width=16, depth=2, heads=2), context=40)
    initialize(tower, 0)
    return tower


def test_padding_changes_nothing() -> None:
    tower, tokenizer = byte_tower(), ByteTokenizer(40)
    together = tower(*tokenizer([*TEXTS, "a text that is longer than the others"]))
    for place, text in enumerate(TEXTS):
        torch.testing.assert_close(tower(*tokenizer([text]))[0], together[place])


def test_the_order_of_bytes_matters() -> None:
    tower, tokenizer = byte_tower(), ByteTokenizer(40)
    one, other = tower(*tokenizer(["ab", "ba"]))
    assert (one - other).abs().max() > 1e-3


def test_every_byte_reaches_the_text_vector() -> None:
    tower = byte_tower()
    tokens, mask = ByteTokenizer(40)(["some text"])
    embedded = tower.embed(tokens).detach().requires_grad_()
    tower.embed.forward = lambda _: embedded  # type: ignore[method-assign]
    tower(tokens, mask)[0, 0].backward()
    assert embedded.grad is not None and (embedded.grad.abs().sum(dim=2) > 0).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_xlm_roberta(tmp_path_factory.mktemp("xlm"))


def test_a_folder_gives_the_first_hidden_state_of_transformers_own_model(folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tower, tokenizer = FolderTower(folder, with_weights=True), FolderTokenizer(folder, 20)
    tower.train()  # no dropout even so
    found = tower(*tokenizer(TEXTS[:2]))
    model = AutoModel.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS[:2], padding=True, return_tensors="pt")
    torch.testing.assert_close(found, model(**inputs).last_hidden_state[:, 0])
    assert not any(name.startswith("model.pooler") for name, _ in tower.named_parameters())
    assert [kind.__name__ for kind in tower.layer_types] == ["XLMRobertaLayer"]


def test_texts_are_cut_and_keep_begin_and_end(folder: Path) -> None:
    tokens, mask = FolderTokenizer(folder, 4)(["a red ring on a blue ring", "ring"])
    assert tokens.shape == (2, 6)
    assert tokens[0, 0] == 0 and tokens[0, -1] == 2  # <s> and </s>
    assert not mask[1, 3:].any()


def test_a_context_that_the_model_has_no_positions_for_says_how_long_it_may_be(
    folder: Path,
) -> None:
    with pytest.raises(UserError, match=r"takes 40 tokens, context 39 makes 41; use context 38"):
        FolderTokenizer(folder, 39)


def test_the_hash_of_a_folder_is_that_of_weights_config_and_tokenizer(tmp_path: Path) -> None:
    one, other = (tiny_xlm_roberta(tmp_path / name) for name in "ab")
    assert text_hash(one) == text_hash(other)
    (one / "README.md").write_text("a note")
    assert text_hash(one) == text_hash(other)
    tokenizer = one / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert text_hash(one) != text_hash(other)


def test_a_folder_becomes_its_hash_and_shape(folder: Path) -> None:
    found = text_folder(folder.name, (Path("/nowhere"), folder.parent))
    assert (found.width, found.depth, found.sha256) == (16, 2, text_hash(folder))
    with pytest.raises(NotFoundError, match="no such folder of a text tower"):
        text_folder("absent", (folder.parent,))
    with pytest.raises(UserError, match="does not give hidden_size"):
        text_folder(".", (folder.parent,))


def test_two_towers_start_with_the_folders_weights_and_the_recipes_temperature(
    folder: Path,
) -> None:
    from harness.models.lit import start_values

    recipe = Lit(duration=Duration(steps=1), text=text_folder(str(folder), ()), temperature=0.1)
    values = start_values(recipe)
    own = load_file(folder / "model.safetensors")
    for name, value in own.items():
        if not name.startswith("pooler."):
            assert torch.equal(values[f"text.model.{name}"](), value), name
    assert values["log_scale"]().exp().item() == pytest.approx(10)
    assert set(values) <= {name for name, _ in TwoTowers(recipe, 8).named_parameters()}


def test_without_transformers_one_line_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    with pytest.raises(UserError, match="vision-scaling-harness\\[text\\]"):
        FolderTower(folder, with_weights=True)
