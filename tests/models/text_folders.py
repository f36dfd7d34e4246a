"""A text model as `transformers` saves it: XLM-R's layout, of two layers and forty words."""

from __future__ import annotations

from pathlib import Path


def tiny_xlm_roberta(folder: Path) -> Path:
    """Folder with config.json, model.safetensors and the tokenizer; equal every time."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

    pieces = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = [f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = ["▁red", "▁blue", "▁ring", "▁star", "▁on", "▁picture", "▁of"]
    plain = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = [(piece, 0.0) for piece in pieces]
    vocabulary += [(piece, -2.0) for piece in words] + [(p, -8.0) for p in [*letters, *plain, "▁"]]
    vocabulary.append(("<mask>", 0.0))
    tokenizer = XLMRobertaTokenizer(vocab=vocabulary)
    tokenizer.save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=42,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        XLMRobertaModel(config).save_pretrained(folder)
    return folder
