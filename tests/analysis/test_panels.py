"""Drawings: nothing is cut at their edges."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes

from analysis import panels


@pytest.mark.parametrize("top", [0.71, 0.72, 0.73, 0.74, 0.75])
def test_labels_of_ticks_are_inside_whatever_ticks_the_axes_choose(top: float) -> None:
    def draw(ax: Axes) -> None:
        ax.plot([1e3, 1e5], [0.55, top])
        ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")

    panel = panels.Panel(title="10-shot top-1", alt="a line", draw=draw)
    figure = panels.Figure(name="x", title="x", caption="", panels=(panel,))
    pixels = panels.render(figure)[0].pixels
    ink = (pixels[..., :3] < 250).any(axis=2) & (pixels[..., 3] > 0)
    assert ink.any()
    edges = {"left": ink[:, :2], "right": ink[:, -2:], "top": ink[:2], "bottom": ink[-2:]}
    assert not [name for name, edge in edges.items() if np.any(edge)]
