"""Contact sheets: pictures in a grid, each with its labels under it."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness.data.augment import view
from harness.data.dataset import Dataset, Split
from harness.data.overlap import Overlap
from harness.errors import UserError
from harness.study.recipes import Augmentation

MAX_LINES = 4
"""Of a caption; what does not fit is said to be there by three dots."""
_GAP = 12
_FONT_SIZE = 13
_INK, _PAPER, _FRAME = (32, 32, 32), (255, 255, 255), (208, 208, 208)
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Tile:
    """A picture and what is said of it."""

    image_HWC: np.ndarray
    caption: str


def draw_sheet(tiles: list[Tile], columns: int, size: int, title: str = "") -> Image.Image:
    """The tiles in rows, each picture as large as fits into a square of `size` pixels."""
    font = _font(_FONT_SIZE)
    line_height = _FONT_SIZE + 4
    captions = [_wrapped(tile.caption, font, size) for tile in tiles]
    heights = [
        size + line_height * max(len(caption) for caption in captions[first : first + columns])
        for first in range(0, len(tiles), columns)
    ]
    columns = min(columns, len(tiles))
    width = columns * (size + _GAP) + _GAP
    heading = _wrapped(title, font, width - 2 * _GAP) if title else []
    top = _GAP + line_height * len(heading) + (_GAP if heading else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP * len(heights)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        pen.text((_GAP, _GAP + number * line_height), line, fill=_INK, font=font)
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        left = _GAP + column * (size + _GAP)
        upper = top + sum(heights[:row]) + row * _GAP
        picture = _fitted(tile.image_HWC, size)
        x, y = left + (size - picture.width) // 2, upper + (size - picture.height) // 2
        sheet.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=_FRAME)
        for number, line in enumerate(captions[place]):
            where = (left, upper + size + 2 + number * line_height)
            pen.text(where, line, fill=_INK, font=font)
    return sheet


def sample_sheet(
    data: Dataset,
    split_name: str,
    *,
    count: int,
    seed: int,
    label: str | None,
    size: int,
    has_views: bool,
) -> tuple[Image.Image, int]:
    """A random sample of a split, the same for the same seed; and the number of its images.

    With `has_views`, each row is an image and what training shows of it in its first epochs.
    """
    split = data.split(split_name)
    rows = np.arange(split.num_samples) if label is None else _rows_with(data, split, label)
    title = f"{data.meta.name}  {split.name}"
    title += f"  {label}: {len(rows)} of {split.num_samples} images" if label else ""
    rows = np.random.default_rng(seed).permutation(rows)[:count]
    columns = min(8, max(1, round(len(rows) ** 0.5)))
    if not has_views:
        tiles = [Tile(split.decode(row), caption(data, split, row)) for row in rows.tolist()]
        return draw_sheet(tiles, columns, size, title), len(rows)
    columns, tiles = 8, []
    side, augment = data.meta.image_size, Augmentation()
    for row in rows.tolist():
        image, key = split.decode(row), int(split.key_hashes[row])
        tiles.append(Tile(image, caption(data, split, row)))
        for epoch in range(columns - 1):
            seen = view(image, side, (seed, epoch, key), augment.crop_scale, augment.flip)
            tiles.append(Tile(seen, f"epoch {epoch}"))
    return draw_sheet(tiles, columns, size, f"{title}  views of {side} pixels"), len(rows)


def pair_sheet(found: list[Overlap], most: int, size: int) -> Image.Image | None:
    """Evaluation images, each beside the image closest to it; None if there are none.

    Of every split the `most` that are closest.
    """
    tiles: list[Tile] = []
    for part in found:
        pairs = np.flatnonzero(~part.is_plain)
        _, firsts = np.unique(part.rows_b[pairs], return_index=True)
        for place in pairs[np.sort(firsts)][:most].tolist():
            row_a, row_b = int(part.rows_a[place]), int(part.rows_b[place])
            same = ("", ", same pixels", ", same bytes")[part.same[place]]
            flipped = ", mirrored" if part.is_mirrored[place] else ""
            alike = f"distance {part.distances[place]}, {part.similarities[place]:.3f}"
            tiles += [
                Tile(part.b.decode(row_b), f"{part.b.name}: {part.b.keys[row_b]}"),
                Tile(
                    part.a.decode(row_a),
                    f"{part.a.name}: {part.a.keys[row_a]}\n{alike}{same}{flipped}",
                ),
            ]
    return draw_sheet(tiles, 2, size, "Evaluation | pretraining") if tiles else None


def caption(data: Dataset, split: Split, row: int) -> str:
    """Class and hashtags of an image, or that it has none."""
    classes, hashtags = data.meta.classes, data.meta.hashtags
    class_id = int(split.class_ids[row])
    own = split.label_ids[split.label_offsets[row] : split.label_offsets[row + 1]].tolist()
    words = [classes[class_id]] if class_id >= 0 else []
    if hashtags:
        words += ["#" + hashtags[tag].lstrip("#") for tag in own]
    elif class_id < 0:
        words += [classes[place] for place in own]
    return " ".join(words) or "no label"


def _rows_with(data: Dataset, split: Split, label: str) -> np.ndarray:
    """Rows that have a class or hashtag of this name. Raises UserError."""
    wanted = label.lstrip("#").casefold()
    classes, hashtags = (
        [name.lstrip("#").casefold() for name in names]
        for names in (data.meta.classes, data.meta.hashtags)
    )
    if wanted not in classes + hashtags:
        near = difflib.get_close_matches(wanted, classes + hashtags, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"--label {label}: no such class or hashtag{hint}")
    owners = np.repeat(np.arange(split.num_samples), np.diff(split.label_offsets))
    ids = [place for place, name in enumerate(hashtags or classes) if name == wanted]
    chosen = np.zeros(split.num_samples, dtype=bool)
    chosen[owners[np.isin(split.label_ids, ids)]] = True
    chosen |= np.isin(split.class_ids, [k for k, name in enumerate(classes) if name == wanted])
    if not chosen.any():
        raise UserError(f"--label {label}: no image of split {split.name} has it; try another")
    return np.flatnonzero(chosen)


def _fitted(image_HWC: np.ndarray, size: int) -> Image.Image:
    picture = Image.fromarray(image_HWC)
    scale = size / max(picture.size)
    # Small pictures are enlarged as they are: smoothing would hide their pixels.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), how)


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    """Lines that fit; a word that does not is cut."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            for piece in _pieces(word, font, width):
                if line and font.getlength(f"{line} {piece}") > width:
                    lines.append(line)
                    line = ""
                line = f"{line} {piece}" if line else piece
        lines.append(line)
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], last + "..."]
    return lines


def _pieces(word: str, font: _Font, width: int) -> list[str]:
    pieces: list[str] = []
    while word:
        many = len(word)
        while many > 1 and font.getlength(word[:many]) > width:
            many -= 1
        pieces.append(word[:many])
        word = word[many:]
    return pieces


def _font(size: int) -> _Font:
    # Matplotlib, a dependency, brings DejaVu: most alphabets. Pillow's own font has Latin only.
    found = importlib.util.find_spec("matplotlib")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)
