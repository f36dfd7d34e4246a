"""Text towers: a small transformer over bytes, and models that `transformers` saved.

Shapes: B texts, T tokens of the longest of them, W width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from harness.errors import UserError
from harness.study.protocols import TextTower
from harness.study.words import TextFolder

SPECIALS = 2
"""Tokens around a text: its begin and its end."""


class Tokenizer(Protocol):
    """Texts -> tokens int64 [B, T] and mask bool [B, T], True where there is a token."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The first token of a text stands for it; texts that are too long are cut."""
        ...


class ByteTokenizer:
    """The bytes of UTF-8: 0 pads, 1 begins, 2 ends, byte b is 3 + b. It needs no vocabulary."""

    vocabulary = 3 + 256

    def __init__(self, context: int) -> None:
        self.context = context

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and mask; of each text at most `context` bytes."""
        raws = [text.encode()[: self.context] for text in texts]
        tokens_BT = torch.zeros(len(raws), max(map(len, raws)) + SPECIALS, dtype=torch.int64)
        for place, raw in enumerate(raws):
            row = torch.tensor([1, *(3 + byte for byte in raw), 2])
            tokens_BT[place, : len(row)] = row
        return tokens_BT, tokens_BT > 0


class ByteTower(nn.Module):
    """Pre-norm transformer, every token sees every other; [B, W], the normed first token."""

    def __init__(self, shape: TextTower, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(ByteTokenizer.vocabulary, shape.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, context + SPECIALS, shape.width))
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads, qkv_bias=True) for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[B, W]; padding is seen by no token."""
        x_BTW = self.embed(tokens_BT) + self.pos_embed[:, : tokens_BT.shape[1]]
        mask_B11T = mask_BT[:, None, None]
        for block in self.blocks:
            x_BTW = block(x_BTW, attn_mask=mask_B11T)
        return self.norm(x_BTW[:, 0])


# --- models that transformers saved ---------------------------------------------------------------


class FolderTokenizer:
    """The tokenizer of a folder, with begin and end as it was trained with."""

    def __init__(self, folder: Path, context: int) -> None:
        self.tokenizer: Any = _load(folder, "AutoTokenizer")
        self.length = context + SPECIALS
        # Tokenizers say 1e30 where they know no limit.
        limit = min(int(self.tokenizer.model_max_length), _positions(folder))
        if self.length > limit:
            raise UserError(
                f"{folder}: takes {limit} tokens, context {context} makes {self.length}; use"
                f" context {limit - SPECIALS} or less"
            )

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and mask, padded on the right."""
        found = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return found["input_ids"], found["attention_mask"].bool()


class FolderTower(nn.Module):
    """A `transformers` encoder; [B, W], the last hidden state of the first token.

    Without dropout: what a step does is then the same over any number of ranks.
    """

    def __init__(self, folder: Path, *, with_weights: bool) -> None:
        super().__init__()
        if with_weights:
            self.model: Any = _load(folder, "AutoModel", dtype=torch.float32)
        else:
            config = _load(folder, "AutoConfig")
            self.model = _transformers(folder).AutoModel.from_config(config, dtype=torch.float32)
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # of another task; without a gradient it would only decay
        self.model.eval()

    def train(self, mode: bool = True) -> FolderTower:
        """The model stays in evaluation mode: no dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[B, W]; padding is seen by no token."""
        found = self.model(input_ids=tokens_BT, attention_mask=mask_BT.long())
        return found.last_hidden_state[:, 0]

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        """The class of its layers: those of its longest list of modules."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        return (type(max(lists, key=len)[0]),) if lists else ()


def save_folder(source: Path, to: Path) -> None:
    """Config and tokenizer of a text model, without its weights."""
    _load(source, "AutoConfig").save_pretrained(to)
    _load(source, "AutoTokenizer").save_pretrained(to)


def make_tokenizer(text: TextTower | TextFolder, context: int, folder: Path | None) -> Tokenizer:
    """The tokenizer of a text tower; `folder` is where that of `transformers` lies now."""
    if isinstance(text, TextTower):
        return ByteTokenizer(context)
    return FolderTokenizer(folder or Path(text.folder), context)


@functools.cache
def _positions(folder: Path) -> int:
    config = _load(folder, "AutoConfig")
    positions = int(getattr(config, "max_position_embeddings", 10**9))
    # RoBERTa and its kin count positions from the padding id on.
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)


def _transformers(folder: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{folder}: a text tower of `transformers`, which is not installed: pip install"
            " 'vision-scaling-harness[text]', or give text: {width: ..., depth: ...}"
        ) from None
    return transformers


def _load(folder: Path, name: str, **options: Any) -> Any:
    """An Auto class's object from files here: nothing is fetched, no code of a model is run."""
    kind = getattr(_transformers(folder), name)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: cannot be read by transformers ({name}): {first}") from None
