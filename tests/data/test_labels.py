"""Labels out of raw hashtags: what is counted, mapped, dropped; sets without own shards."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.data.dataset import Dataset, Split, open_dataset
from harness.data.index import layout_of, load_index
from harness.data.labels import LabelOptions, Labels, make_labels
from harness.data.pack import pack
from harness.data.relabel import fold_tag
from harness.errors import DataError
from harness.study.locations import join_location
from tests.conftest import Harness
from tests.data.test_remote import Server

RNG = np.random.default_rng(0)
Row = dict[str, object]


def make_set(folder: Path, rows: list[Row], name: str = "set") -> Path:
    """A packed set of these samples: hashtags, caption, class, split as a manifest has them."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "manifest.jsonl", "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            line = {"path": f"{number}.png", "key": f"k{number:05d}", **row}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    pack(str(folder / "manifest.jsonl"), folder.parent / name)
    return folder.parent / name


def weak(num: int, seed: int = 0) -> list[Row]:
    """Samples with 0 to 4 hashtags out of a long-tailed vocabulary, in several spellings."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for number in range(num):
        tags = [f"tag{int(rng.paretovariate(0.7))}" for _ in range(rng.randrange(5))]
        spelled = [rng.choice([f"#{tag}", tag.upper(), f" #{tag}!"]) for tag in tags]
        rows.append({"hashtags": spelled, "split": "val" if number % 10 == 0 else "pretrain"})
    return rows


def tags_of(row: Row) -> list[str]:
    tags = row["hashtags"]
    assert isinstance(tags, list)
    return tags


def names_of(data: Dataset, split: Split) -> dict[str, list[str]]:
    starts = split.label_offsets
    return {
        split.keys[row]: [
            data.meta.hashtags[k] for k in split.label_ids[starts[row] : starts[row + 1]]
        ]
        for row in range(split.num_samples)
    }


# --- the vocabulary, against a counter -----------------------------------------------------------


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    rows = weak(400)
    return make_set(tmp_path_factory.mktemp("tagged") / "src", rows), rows


def oracle(rows: list[Row], min_count: int) -> tuple[list[str], dict[str, list[str]]]:
    """Vocabulary and labels by key, counted by hand over the pretraining samples."""
    folded = [sorted({fold_tag(tag) for tag in row["hashtags"]}) for row in rows]  # type: ignore[attr-defined]
    counts = Counter(
        tag
        for tags, row in zip(folded, rows, strict=True)
        if row["split"] == "pretrain"
        for tag in tags
    )
    kept = sorted(((-n, tag) for tag, n in counts.items() if n >= min_count))
    names = [tag for _, tag in kept]
    labels = {f"k{n:05d}": [t for t in names if t in tags] for n, tags in enumerate(folded)}
    return names, {key: tags for key, tags in labels.items() if tags}


def test_vocabulary_and_labels_are_those_of_a_plain_count(
    tagged: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    src, rows = tagged
    names, labels = oracle(rows, 4)
    made = make_labels(str(src), tmp_path / "out", tmp_path, LabelOptions(min_count=4))
    data = open_dataset(str(tmp_path / "out"), tmp_path)
    assert data.meta.hashtags == names and 3 < len(names) < 40
    found = {**names_of(data, data.split("pretrain")), **names_of(data, data.split("val"))}
    assert found == labels
    source = open_dataset(str(src), tmp_path)
    for split in ("pretrain", "val"):
        by_key = {key: row for row, key in enumerate(source.split(split).keys)}
        for row, key in enumerate(data.split(split).keys):
            ours, theirs = data.split(split).decode(row), source.split(split).decode(by_key[key])
            np.testing.assert_array_equal(ours, theirs)
    assert data.meta.layout["val"] == layout_of(data.split("val").index)
    assert not list((tmp_path / "out").rglob("*.tar")), "no image is copied"
    assert made.meta == data.meta


def test_the_report_counts_what_a_plain_count_counts(
    tagged: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    src, rows = tagged
    made = make_labels(str(src), tmp_path / "out", tmp_path, LabelOptions(min_count=4))
    names, labels = oracle(rows, 4)
    pretrain = [(f"k{n:05d}", row) for n, row in enumerate(rows) if row["split"] == "pretrain"]
    raw = [set(tags_of(row)) for _, row in pretrain]
    report = made.report
    assert report.images == len(pretrain)
    assert report.occurrences == sum(map(len, raw))
    assert report.raw_distinct == len({tag for tags in raw for tag in tags})
    kept = sum(fold_tag(tag) in names for tags in raw for tag in tags)
    assert report.kept_share == kept / report.occurrences
    counts = [len(labels.get(key, [])) for key, _ in pretrain]
    assert report.coverage == sum(map(bool, counts)) / len(counts)
    assert report.images_by_labels == {str(k): n for k, n in sorted(Counter(counts).items())}
    of_class = sorted(
        (sum(name in labels.get(key, []) for key, _ in pretrain) for name in names), reverse=True
    )
    assert report.labels == sum(of_class)
    top = max(1, round(len(names) / 10))
    assert report.top_share["10 %"] == sum(of_class[:top]) / sum(of_class)
    assert report.classes_below_10 == sum(n < 10 for n in of_class)
    assert report.by_rank == {
        rank: of_class[rank - 1]
        for rank in sorted({1, 2, 5, 10, 20, len(names)})
        if rank <= len(names)
    }
    text = (tmp_path / "out" / "labels.md").read_text()
    assert f"{report.coverage:.1%}" in text and f"`{names[0]}`" in text
    stored = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert stored["images"] == dict(zip(names, of_class, strict=True))
    assert stored["report"]["coverage"] == report.coverage


def test_a_count_is_of_images_not_of_occurrences(tmp_path: Path) -> None:
    rows: list[Row] = [{"hashtags": ["#Cat", "cat", "CAT!"], "split": "pretrain"}] * 2
    rows += [{"hashtags": ["dog"], "split": "pretrain"}] * 3
    src = make_set(tmp_path / "src", rows)
    made = make_labels(str(src), tmp_path / "out", tmp_path, LabelOptions(min_count=3))
    assert made.meta.hashtags == ["dog"]
    assert made.report.fates["rare"].examples == {"cat": 6}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json"])
def test_a_mapping_joins_splits_and_drops_tags(tmp_path: Path, suffix: str) -> None:
    rows: list[Row] = [
        {"hashtags": tags, "split": "pretrain"}
        for tags in (
            ["puppy"],
            ["#Dog"],
            ["dogs", "puppy"],
            ["catdog"],
            ["cat"],
            ["sunset"],
            ["nsfw"],
        )
    ]
    src = make_set(tmp_path / "src", rows)
    pairs = {"Puppy": ["n02"], "dog": ["n02"], "#dogs": ["n02"], "catdog": ["n01", "n02"]}
    pairs |= {"cat": ["n01"], "nsfw": ["n09"]}
    file = tmp_path / f"map.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps({k: v if len(v) > 1 else v[0] for k, v in pairs.items()}))
    else:
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        lines = [f"{tag}{mark}{target}" for tag, targets in pairs.items() for target in targets]
        file.write_text("\n".join([f"tag{mark}synset", *lines]))
    block = tmp_path / "block.txt"
    block.write_text("#NSFW\n\n")
    options = LabelOptions(min_count=1, mapping=file, blocked=block)
    made = make_labels(str(src), tmp_path / "out", tmp_path, options)
    assert made.meta.hashtags == ["n02", "n01"]
    data = open_dataset(str(tmp_path / "out"), tmp_path)
    assert names_of(data, data.split("pretrain")) == {
        "k00000": ["n02"],
        "k00001": ["n02"],
        "k00002": ["n02"],
        "k00003": ["n02", "n01"],
        "k00004": ["n01"],
    }
    fates = {fate: count.examples for fate, count in made.report.fates.items() if fate != "kept"}
    assert fates == {"rare": {}, "unmapped": {"sunset": 1}, "blocked": {"nsfw": 1}, "empty": {}}
    kept = make_labels(
        str(src),
        tmp_path / "kept",
        tmp_path,
        LabelOptions(min_count=1, mapping=file, unmapped="keep", unlabelled="keep"),
    )
    assert kept.meta.hashtags == ["n02", "n01", "n09", "sunset"]
    assert kept.meta.splits == {"pretrain": 7}


def test_captions_give_hashtags_or_words(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"caption": "A dog on the beach #Dog #beach", "split": "pretrain"},
        {"caption": "another DOG", "split": "pretrain"},
        {"caption": "#DOG!", "split": "pretrain"},
    ]
    src = make_set(tmp_path / "src", rows)
    one, all_words = (
        make_labels(str(src), tmp_path / name, tmp_path, options)
        for name, options in (
            ("tags", LabelOptions(min_count=1)),
            ("words", LabelOptions(min_count=2, words=True)),
        )
    )
    assert one.meta.hashtags == ["dog", "beach"] and one.meta.splits == {"pretrain": 2}
    assert all_words.meta.hashtags == ["dog"] and all_words.meta.splits == {"pretrain": 3}


def test_class_names_serve_where_there_are_no_hashtags(tmp_path: Path) -> None:
    pack("digits", tmp_path / "digits")
    file = tmp_path / "map.csv"
    file.write_text("".join(f"{d},{'odd' if d % 2 else 'even'}\n" for d in range(10)) + "2,prime\n")
    options = LabelOptions(mapping=file)
    make_labels(str(tmp_path / "digits"), tmp_path / "out", tmp_path, options)
    data = open_dataset(str(tmp_path / "out"), tmp_path)
    assert set(data.meta.hashtags) == {"odd", "even", "prime"} and data.meta.num_classes == 10
    for split in ("train", "test"):
        opened = data.split(split)
        for row, names in enumerate(names_of(data, opened).values()):
            digit = int(opened.class_ids[row])
            expected = {"odd" if digit % 2 else "even"} | ({"prime"} if digit == 2 else set())
            assert set(names) == expected


def test_splits_of_classes_pass_unchanged(
    scenes: Dataset, scenes_root: Path, tmp_path: Path
) -> None:
    options = LabelOptions(min_count=40)
    made = make_labels("scenes-600", tmp_path / "out", scenes_root, options)
    data = open_dataset(str(tmp_path / "out"), scenes_root)
    assert made.meta.splits["pretrain"] < 600 and made.meta.splits["val"] < 100
    for name in ("train", "test"):
        ours, theirs = data.split(name), scenes.split(name)
        assert list(ours.keys) == list(theirs.keys)
        np.testing.assert_array_equal(ours.class_ids, theirs.class_ids)


# --- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [False, True])
def test_a_lost_index_is_made_again_byte_for_byte(tmp_path: Path, captions: bool) -> None:
    rows = weak(120, seed=3)
    for row in rows:
        row["caption"] = "so nice " + " ".join(t.strip() for t in tags_of(row))
    src = make_set(tmp_path / "src", rows)
    options = LabelOptions(min_count=3, captions=captions)
    make_labels(str(src), tmp_path / "out", tmp_path, options)
    for split in ("pretrain", "val"):
        file = tmp_path / "out" / "index" / f"{split}.safetensors"
        before = file.read_bytes()
        file.unlink()
        open_dataset(str(tmp_path / "out"), tmp_path).split(split)
        assert file.read_bytes() == before
    (tmp_path / "out" / "labels.json").write_text("{}")
    file.unlink()
    with pytest.raises(DataError, match=r"labels\.json: cannot be used .*make the labels again"):
        open_dataset(str(tmp_path / "out"), tmp_path).split("val")


def test_the_fingerprint_is_of_the_targets_not_of_paths_or_shards(
    tagged: tuple[Path, list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, _ = tagged
    monkeypatch.setattr("harness.data.pack.SHARD_SAMPLES", 37)
    pack(str(src), tmp_path / "other" / "many")

    def labels(source: Path, name: str, **options: object) -> Labels:
        chosen = LabelOptions(min_count=4, **options)  # type: ignore[arg-type]
        return make_labels(str(source), tmp_path / name, tmp_path, chosen)

    one, many = labels(src, "one"), labels(tmp_path / "other" / "many", "deep/er/two")
    assert one.meta.fingerprint == many.meta.fingerprint
    assert len(many.meta.shards["pretrain"]) > len(one.meta.shards["pretrain"])
    assert one.meta.layout != many.meta.layout
    assert labels(src, "keep", unlabelled="keep").meta.fingerprint != one.meta.fingerprint
    assert labels(src, "more", split="val").meta.fingerprint != one.meta.fingerprint
    splits = [
        open_dataset(str(tmp_path / n), tmp_path).split("pretrain") for n in ("one", "deep/er/two")
    ]
    assert [splits[0].keys[i] for i in splits[0].subset(50)] == [
        splits[1].keys[i] for i in splits[1].subset(50)
    ]


def test_shards_without_a_labelled_image_are_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.data.pack.SHARD_SAMPLES", 5)
    rows: list[Row] = [{"hashtags": ["rare"], "split": "pretrain"}] * 30
    rows[7] = rows[8] = {"hashtags": ["Dog"], "split": "pretrain"}
    src = make_set(tmp_path / "src", rows)
    block = tmp_path / "block.txt"
    block.write_text("rare")
    options = LabelOptions(min_count=2, blocked=block)
    made = make_labels(str(src), tmp_path / "out", tmp_path, options)
    assert 1 <= len(made.meta.shards["pretrain"]) <= 2
    split = open_dataset(str(tmp_path / "out"), tmp_path).split("pretrain")
    assert sorted(split.keys) == ["k00007", "k00008"] and split.decode(1).shape == (8, 8, 3)
    entries = made.meta.shards["pretrain"]
    path = tmp_path / "out" / "index" / "pretrain.safetensors"
    assert load_index(path, entries) is not None


def test_a_common_parent_can_be_moved_and_reached_by_a_link(tmp_path: Path) -> None:
    src = make_set(tmp_path / "here" / "src", weak(60))
    (tmp_path / "link").symlink_to(tmp_path / "here")
    out = tmp_path / "link" / "named" / "out"
    make_labels(str(tmp_path / "link" / "set"), out, tmp_path, LabelOptions(min_count=2))
    assert src.is_dir()
    (tmp_path / "link").unlink()
    os.rename(tmp_path / "here", tmp_path / "there")
    split = open_dataset(str(tmp_path / "there" / "named" / "out"), tmp_path / "new").split("val")
    assert split.decode(0).shape == (8, 8, 3)


def test_it_can_lie_beside_its_source_behind_a_url_or_alone_here(tmp_path: Path) -> None:
    far = tmp_path / "far"
    src = make_set(far / "src", weak(60))
    make_labels(str(src), far / "named", tmp_path, LabelOptions(min_count=2))
    near = names_of(data := open_dataset(str(far / "named"), tmp_path), data.split("pretrain"))
    with Server(far) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        data = open_dataset(f"{server.url}/named", tmp_path / "a")
        assert names_of(data, data.split("pretrain")) == near
        assert data.split("pretrain").decode(0).shape == (8, 8, 3)
        alone, options = tmp_path / "b" / "out", LabelOptions(min_count=2)
        made = make_labels(f"{server.url}/set", alone, tmp_path / "b", options)
        assert str(made.meta.shards["val"][0]["file"]).startswith(server.url)
        file = alone / "index" / "pretrain.safetensors"
        before = file.read_bytes()
        file.unlink()
        data = open_dataset(str(alone), tmp_path / "b")
        assert names_of(data, data.split("pretrain")) == near and file.read_bytes() == before
        data.split("pretrain").decode(0)
        # One copy of each shard serves the source and its labels.
        open_dataset(f"{server.url}/set", tmp_path / "b").split("pretrain").decode(0)
        assert server.asked["set/pretrain/000000.tar"] == 2
        server.shutdown()


def test_parent_folders_of_urls_are_walked() -> None:
    assert join_location("s3://bucket/a/b/", "../c/x.tar") == "s3://bucket/a/c/x.tar"
    assert join_location("s3://bucket/a/b", "../../c") == "s3://bucket/c"


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 4, "nowhere': no"),
        (["set", "--split", "dev"], 4, "no split 'dev'; it has: pretrain, val"),
        (["set", "--map", "none.csv"], 4, "none.csv: there is no such file"),
        (["set", "--map", "bad.csv"], 2, "bad.csv:2: found 3 columns; expected two"),
        (["set", "--map", "odd.csv"], 2, "odd.csv:1: found '###' -> 'x'; expected a tag"),
        (["set", "--map", "bad.json"], 2, "bad.json: 'a': found 3; expected"),
        (["set", "--unmapped", "keep"], 2, "--unmapped keep: of tags that are not in --map FILE"),
        (["set", "--min-count", "1000"], 2, "no label is on 1000 images of split pretrain"),
        (["set", "--captions"], 2, "no caption has a hashtag; --words takes all words"),
        (["set", "--out", "set"], 2, "set: exists and is not empty; choose another --out"),
        (["done"], 2, "done: has derived labels itself; give the set that it was made from"),
    ],
)
def test_mistakes_are_one_line(
    here: Harness,
    tagged: tuple[Path, list[Row]],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    shutil.copytree(tagged[0], tmp_path / "set")
    (tmp_path / "bad.csv").write_text("a,b\na,b,c\n")
    (tmp_path / "odd.csv").write_text("###,x\n")
    (tmp_path / "bad.json").write_text('{"a": 3}')
    make_labels(str(tmp_path / "set"), tmp_path / "done", tmp_path, LabelOptions(min_count=4))
    out = [] if "--out" in arguments else ["--out", "out"]
    done = here("data", "labels", *arguments, *out, check=code)
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_prints_coverage_and_tail(
    harness: Harness, tagged: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    done = harness("data", "labels", tagged[0], "--out", "out", "--min-count", "4")
    assert "coverage: " in done.stdout and "tail: " in done.stdout and "labels.md" in done.stdout
    assert (tmp_path / "out" / "labels.json").is_file()
