"""Which spellings are one hashtag."""

from __future__ import annotations

import random
import unicodedata

import pytest

from harness.data.relabel import fold_tag, tags_in, words_in


@pytest.mark.parametrize(
    ("spellings", "folded"),
    [
        (
            ["#Dog", "dog", "DOG!", " #dog ", "\uff03\uff24\uff2f\uff27", "d\u00adog", "\u200edog"],
            "dog",
        ),
        (["#Straße", "STRASSE", "strasse"], "strasse"),
        (["Caf\u00e9", "CAFE\u0301", "#cafe\u0301"], "caf\u00e9"),
        (["\u2764\ufe0f", "\u2764"], "\u2764"),
        (["#\u0939\u093f\u0928\u094d\u0926\u0940"], "\u0939\u093f\u0928\u094d\u0926\u0940"),
        (["\ufb01sh", "#FISH"], "fish"),
        (["golden\u00a0 retriever", "Golden Retriever"], "golden retriever"),
        (["###", "!?", "", " ", "\u200b"], ""),
    ],
)
def test_spellings_of_one_tag_fold_to_one(spellings: list[str], folded: str) -> None:
    assert {fold_tag(spelling) for spelling in spellings} == {folded}


def test_accents_tell_tags_apart() -> None:
    assert fold_tag("cafe") != fold_tag("caf\u00e9")


def test_folding_twice_is_folding_once_and_caseless() -> None:
    rng = random.Random(0)
    ranges = [(0x20, 0x250), (0x300, 0x370), (0x370, 0x3000), (0xA000, 0xD7FF), (0xF900, 0xFFFF)]
    for _ in range(20_000):
        code_points = [rng.randrange(*rng.choice(ranges)) for _ in range(rng.randrange(1, 6))]
        raw = "".join(map(chr, code_points))
        folded = fold_tag(raw)
        assert fold_tag(folded) == folded, ascii(raw)
        assert fold_tag(unicodedata.normalize("NFD", raw)) == folded, ascii(raw)
        assert unicodedata.normalize("NFKC", folded.casefold()) == folded
        assert "#" not in (folded[:1], folded[-1:])


def test_hashtags_of_captions_keep_the_vowels_of_every_script() -> None:
    hindi, thai = "#\u0939\u093f\u0928\u094d\u0926\u0940", "#\u0e01\u0e33\u0e25\u0e31\u0e07"
    caption = f"Look, {hindi} {thai}, \uff03犬 #a#b #a It&#39;s http://x.org/#top #it's"
    assert tags_in(caption) == [hindi, thai, "\uff03犬", "#a", "#b", "#it"]
    assert words_in("Don't stop: a t-shirt, a dog\u2019s life") == [
        "Don't",
        "stop",
        "a",
        "t-shirt",
        "dog\u2019s",
        "life",
    ]
