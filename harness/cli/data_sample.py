"""`harness data sample`: the order in which training reads a dataset."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from harness.cli import base
from harness.cli.show import one_line
from harness.errors import EXIT_OK, UserError


def sample(
    dataset: Annotated[
        str, typer.Argument(metavar="DIR", help="Packed folder or URL, or `scenes-<count>`.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="Epoch, counted from 0.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="First position in the epoch.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Samples; may run on into later epochs.")] = 10,
    subset: Annotated[
        int | None, typer.Option(min=1, help="Images of the nested subset. Default: all.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split. Default: the one pretraining reads.")
    ] = None,
    resample: Annotated[
        float | None,
        typer.Option(help="Samples per image of an epoch, 1 to 1000, as in stages.wsp."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to read with; changes nothing.")] = 1,
    workers: Annotated[
        int, typer.Option(min=1, help="Reading threads of a rank; changes nothing.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help='Print {"keys": [...]}.')] = False,
    root: base.Root = None,
) -> int:
    """Print the keys of the samples that training reads, in order.

    Example:

      harness data sample data/digits --epoch 1 --start 100 --count 5
    """
    # numpy and torch are slow to import; the other verbs must not wait for them
    from harness.data.dataset import open_dataset
    from harness.data.loader import sample_rows

    if resample is not None and not 1 <= resample <= 1000:  # nan is neither
        raise UserError(f"--resample {resample:g}: expected 1 to 1000")
    data = open_dataset(dataset, base.tree(root).root)
    opened = data.split(split or data.meta.split_for("pretrain"))
    stream = opened.stream(subset or opened.num_samples, seed, resample)
    if start >= stream.num_samples:
        raise UserError(
            f"--start {start}: an epoch has {stream.num_samples} samples; expected 0 to"
            f" {stream.num_samples - 1}"
        )
    first = epoch * stream.num_samples + start
    rows = sample_rows(stream, first, count, ranks=ranks, threads=workers)
    keys = [opened.keys[row] for row in rows.tolist()]
    if as_json:
        answer = {
            "keys": keys,
            "split": opened.name,
            "unique_images": stream.num_unique,
            "epoch_samples": stream.num_samples,
        }
        print(json.dumps(answer))
        return EXIT_OK
    print(
        f"{dataset}: split {opened.name}, {stream.num_unique} unique images,"
        f" {stream.num_samples} samples an epoch, seed {seed}"
    )
    places = stream.at(first, count)
    for place, key in enumerate(keys):
        position = (first + place) % stream.num_samples
        print(f"epoch {places.epochs[place]}  position {position:>8}  {one_line(key)}")
    return EXIT_OK
