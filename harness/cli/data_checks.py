"""`harness data labels`, `overlap`, `verify` and `show`: what is in a dataset, and is it right?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from harness.cli import base
from harness.cli.data import shown_progress
from harness.cli.show import one_line, printable
from harness.errors import EXIT_FAILED, EXIT_OK, UserError

if TYPE_CHECKING:
    from PIL import Image

    from harness.data.verify import Verdict

_TOP_LABELS = 20
Dataset = Annotated[
    str, typer.Argument(metavar="DIR", help="Packed folder or URL, or `scenes-<count>`.")
]


def labels(
    src: Annotated[str, typer.Argument(help="Packed folder or URL, or `scenes-<count>`.")],
    out: Annotated[Path, typer.Option(help="Folder to make; must not hold anything yet.")],
    min_count: Annotated[int, typer.Option(min=1, help="Images that a label needs.")] = 5,
    mapping: Annotated[
        Path | None,
        typer.Option("--map", help="CSV, TSV or JSON of tag,target.", show_default=False),
    ] = None,
    block: Annotated[
        Path | None, typer.Option(help="Tags to leave out, one a line.", show_default=False)
    ] = None,
    unmapped: Annotated[
        Literal["drop", "keep"], typer.Option(help="Tags that are not in --map.")
    ] = "drop",
    unlabelled: Annotated[
        Literal["drop", "keep"], typer.Option(help="Images that no label is left for.")
    ] = "drop",
    split: Annotated[
        str | None,
        typer.Option(help="Whose images are counted. Default: the one pretraining reads."),
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Take the hashtags in captions.")
    ] = False,
    words: Annotated[bool, typer.Option("--words", help="Take all words of captions.")] = False,
    root: base.Root = None,
) -> int:
    """Turn raw hashtags into a vocabulary and labels, without copying an image.

    Example:

      harness data labels data/photos --out data/photos_named --min-count 20
    """
    # numpy is slow to import; the other verbs must not wait for it
    from harness.data.labels import LabelOptions, make_labels

    options = LabelOptions(
        split=split,
        min_count=min_count,
        mapping=mapping,
        blocked=block,
        unmapped=unmapped,
        unlabelled=unlabelled,
        captions=captions,
        words=words,
    )
    with shown_progress("opening", "reading captions") as progress:
        made = make_labels(src, out, base.tree(root).root, options, progress)
    print(printable(made.summary()))
    print(f"report: {made.folder / 'labels.md'}")
    return EXIT_OK


def overlap(
    pretraining: Annotated[
        str, typer.Argument(metavar="A", help="Pretraining set: folder or URL, or `scenes-N`.")
    ],
    evaluation: Annotated[str, typer.Argument(metavar="B", help="Evaluation set.")],
    split_a: Annotated[
        str | None, typer.Option(help="Split of A. Default: the one pretraining reads.")
    ] = None,
    split_b: Annotated[
        list[str] | None,
        typer.Option(help="Split of B; may be given several times. Default: test."),
    ] = None,
    distance: Annotated[
        int, typer.Option(help="Bits of 64 by which hashes may differ; at most 11.")
    ] = 6,
    similarity: Annotated[
        float,
        typer.Option(min=0, max=1, help="Correlation of the grey pictures that confirms a pair."),
    ] = 0.9,
    out: Annotated[
        Path | None, typer.Option(help="CSV file to write the pairs to.", show_default=False)
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file to draw the closest pairs in.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    fail_above: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Exit with 1 if more than this share of a split of B is in A.",
            show_default=False,
        ),
    ] = None,
    root: base.Root = None,
) -> int:
    """Look for evaluation images among the pretraining images: equal, alike, or mirrored.

    Example:

      harness data overlap data/photos data/imagenet --out overlap.csv --sheet overlap.png
    """
    if sheet is not None:
        _expect_png(sheet)
    # numpy and Pillow are slow to import; the other verbs must not wait for them
    from harness.data import overlap as overlaps
    from harness.data.dataset import open_dataset
    from harness.data.sheet import pair_sheet

    where = base.tree(root).root
    a, b = open_dataset(pretraining, where), open_dataset(evaluation, where)
    one = a.split(split_a or a.meta.split_for("pretrain"))
    others = [b.split(name) for name in split_b or [b.meta.split_for("test")]]
    if any(a.location == b.location and one.name == other.name for other in others):
        raise UserError(
            f"{evaluation}: split {one.name} is compared with itself; choose others by --split-a"
            " and --split-b"
        )
    found = []
    for other in others:
        with shown_progress("opening", "hashing") as progress:
            found.append(overlaps.overlap(one, other, distance, similarity, progress))
    num_pairs = overlaps.write_pairs(out, found) if out is not None else 0
    picture = pair_sheet(found, 16, 128) if sheet is not None else None
    if sheet is not None and picture is not None:
        _save(picture, sheet)
    if as_json:
        answer = {"a": pretraining, "b": evaluation, "splits": [part.as_json() for part in found]}
        print(json.dumps(answer))
    else:
        print(f"{evaluation} in {pretraining}")
        for part in found:
            print("\n".join(overlaps.summary(part)))
        if out is not None:
            print(f"{num_pairs} pairs: {out}")
        if sheet is not None:
            print(f"closest pairs: {sheet}" if picture is not None else "no pair to draw")
    is_above = fail_above is not None and any(part.share > fail_above for part in found)
    if is_above:
        print(f"more than {fail_above:.2%} of a split are duplicates", file=sys.stderr)
    return EXIT_FAILED if is_above else EXIT_OK


def verify(
    dataset: Dataset,
    quick: Annotated[bool, typer.Option("--quick", help="Do not decode the images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    root: base.Root = None,
) -> int:
    """Check every shard, index and image of a dataset; list all damage, and counts by label.

    Example:

      harness data verify data/digits
    """
    # numpy and Pillow are slow to import; the other verbs must not wait for them
    from harness.data.verify import verify as verify_set

    with shown_progress("opening", "checking") as progress:
        found = verify_set(dataset, base.tree(root).root, quick=quick, progress=progress)
    if as_json:
        print(json.dumps(_verdict_json(found, quick)))
    else:
        lines = [*_verdict_lines(dataset, found, quick), *found.damage]
        print("\n".join(map(one_line, lines)))
    if found.damage:
        print(f"{dataset}: {len(found.damage)} problems found", file=sys.stderr)
    return EXIT_FAILED if found.damage else EXIT_OK


def show(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    split: Annotated[
        str | None, typer.Option(help="Split. Default: the one pretraining reads.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1024, help="Images at most.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of images.")] = 0,
    label: Annotated[
        str | None, typer.Option(help="Only images with this class or hashtag.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Pixels of a picture.")] = 96,
    views: Annotated[
        bool, typer.Option("--views", help="Draw crops as training sees them, image by image.")
    ] = False,
    root: base.Root = None,
) -> int:
    """Draw a sample of the images with their labels.

    Example:

      harness data show data/digits --out sheet.png --count 36
    """
    _expect_png(out)
    # numpy and Pillow are slow to import; the other verbs must not wait for them
    from harness.data.dataset import open_dataset
    from harness.data.sheet import sample_sheet

    data = open_dataset(dataset, base.tree(root).root)
    picture, many = sample_sheet(
        data,
        split or data.meta.split_for("pretrain"),
        count=count,
        seed=seed,
        label=label,
        size=size,
        has_views=views,
    )
    _save(picture, out)
    print(f"{out}: {many} images, {picture.width} x {picture.height} pixels")
    return EXIT_OK


def _expect_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: expected a name that ends in .png")


def _save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _verdict_lines(dataset: str, found: Verdict, quick: bool) -> list[str]:
    meta = found.meta
    checked = "checked" if found.is_fingerprint_checked else "not checked"
    lines = [
        f"{dataset}: {'damaged' if found.damage else 'whole'}"
        f"{', images not decoded' if quick else ''}; fingerprint {meta.fingerprint} ({checked})"
    ]
    for name, counts in found.splits.items():
        lines.append(
            f"  {name:<10}{counts.images:>9} images, {counts.labels / max(1, counts.images):.2f}"
            f" labels each, {counts.unlabelled} without a label"
        )
    for what, tables in (
        ("class", {name: counts.by_class for name, counts in found.splits.items()}),
        ("hashtag", {name: counts.by_hashtag for name, counts in found.splits.items()}),
    ):
        lines += _count_table(
            what, {k: table for k, table in tables.items() if any(table.values())}
        )
    return lines


def _count_table(what: str, tables: dict[str, dict[str, int]]) -> list[str]:
    """Images by label, a column for every split, the most frequent labels first."""
    tables = {split: table for split, table in tables.items() if any(table.values())}
    names = {name for table in tables.values() for name in table}
    if not names:
        return []
    total = {name: sum(table[name] for table in tables.values()) for name in names}
    order = sorted(names, key=lambda name: (-total[name], name))
    width = min(40, max(len(what), *(len(name) for name in order[:_TOP_LABELS])))
    lines = [f"  {what:<{width}}" + "".join(f"{split:>10}" for split in tables)]
    for name in order[:_TOP_LABELS]:
        counts = "".join(f"{table[name]:>10}" for table in tables.values())
        lines.append(f"  {name[:width]:<{width}}{counts}")
    more = len(order) - _TOP_LABELS
    return lines if more <= 0 else [*lines, f"  and {more} more; --json has them all"]


def _verdict_json(found: Verdict, quick: bool) -> dict[str, object]:
    return {
        "dataset": found.location,
        "fingerprint": found.meta.fingerprint,
        "fingerprint_checked": found.is_fingerprint_checked,
        "decoded": not quick,
        "damage": found.damage,
        "splits": {
            name: {
                "images": counts.images,
                "labels": counts.labels,
                "unlabelled": counts.unlabelled,
                "classes": counts.by_class,
                "hashtags": counts.by_hashtag,
            }
            for name, counts in found.splits.items()
        },
    }
