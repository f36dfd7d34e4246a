"""The `tune` section: what it means, and every mistake in it with file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.ledger import tuned
from harness.ledger.tree import Tree
from harness.study.cells import build_grid
from harness.study.groups import groups_of
from harness.study.schema import load_study
from tests.conftest import SMALL

Write = Callable[[str], Path]
RATES = "wsp.lr: {low: 1e-3, high: 1e-2, log: true}"


def section(params: str = RATES, at: str = "data: 1k", more: str = "") -> str:
    return f"{SMALL}tune:\n  params: {{{params}}}\n  at: {{{at}}}\n{more}"


def test_the_section_leaves_every_identity_alone(study_file: Write) -> None:
    plain = build_grid(load_study(study_file(SMALL)))
    tuned_grid = build_grid(load_study(study_file(section())))
    assert [c.id for c in plain.cells] == [c.id for c in tuned_grid.cells]
    assert plain.stages.keys() == tuned_grid.stages.keys()


def test_a_group_for_every_size_and_init_and_only_fields_its_stages_have(study_file: Write) -> None:
    both = f"{RATES}, mae.lr: {{low: 1e-3, high: 1e-2}}"
    tune, groups = groups_of(build_grid(load_study(study_file(section(both)))))
    assert [g.label for g in groups] == [
        *("size=d16x2,init=random", "size=d16x2,init=mae"),
        *("size=d32x3,init=random", "size=d32x3,init=mae"),
    ]
    assert {g.match["init"]: list(g.space) for g in groups} == {
        "random": ["wsp.lr"],
        "mae": ["wsp.lr", "mae.lr"],
    }
    assert not tune.maximize


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (section("wsp.lr: {low: 1e-2, high: 1e-3}"), r"low 0.01 is not below high 0.001"),
        (section("wsp.lr: {low: 0, high: 1, log: true}"), "starts above 0"),
        (section("wsp.lr: {low: 1}"), "give low and high, or options"),
        (section("lr: {low: 1, high: 2}"), "such as wsp.lr"),
        (section("wsp.batch: {options: [64]}"), "at least two values"),
        (section(more="  metrik: x.y\n"), "did you mean 'metric'"),
        (section(more="  metric: loss\n"), "such as wsp.val_loss"),
        (section(more="  pruner: {kind: medium}\n"), "median"),
    ],
)
def test_a_bad_section_is_an_error_of_that_line(study_file: Write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"study.yaml:\d+: tune.*{message}"):
        load_study(study_file(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL, "has no section `tune`"),
        (section(at="dato: 1k"), "no axis 'dato'; did you mean 'data'"),
        (section(at="data: 2k"), "matches no cell"),
        (section(at="seed: 0"), "2 cells for size=d16x2,init=random; fix data"),
        (section("wsp.rl: {low: 1, high: 2}"), r"wsp\.rl: unknown key"),
        (section("wsp.warmup: {low: 0.5, high: 7}"), r"less than 1"),
        (section("wps.lr: {low: 1, high: 2}"), "no group has that stage"),
        (section(more="  metric: prob.acc1\n"), "has no stage 'prob'"),
    ],
)
def test_a_section_that_does_not_fit_the_study_is_an_error(
    study_file: Write, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        groups_of(build_grid(load_study(study_file(text))))


def test_a_best_value_at_an_end_is_said_and_a_group_without_one_has_no_rule(
    study_file: Write, tmp_path: Path
) -> None:
    tune, groups = groups_of(build_grid(load_study(study_file(section()))))

    def row(i: int, rates: list[float]) -> dict[str, object]:
        trials = [
            {"number": n, "outcome": "finished", "set": {"wsp.lr": r}, "value": r, "cell": "c"}
            for n, r in enumerate(rates)
        ]
        space = {k: s.model_dump() for k, s in groups[i].space.items()}
        about = {"label": groups[i].label, "match": groups[i].match, "space": space}
        failed = {"number": 9, "outcome": "diverged", "set": {"wsp.lr": 1}, "value": None}
        return {**about, "trials": [*trials, failed]}

    rows = [row(0, [2e-3, 1.01e-3]), row(1, [3e-3]), row(2, [])]
    content = tuned.write(Tree(tmp_path), "small", tune, rows)
    assert [g["at_edge"] for g in content["groups"]] == [{"wsp.lr": "low"}, {}, {}]
    assert content["budget_used"] == {"random": 4, "mae": 2}
    text = (tmp_path / "tune/small.yaml").read_text()
    assert text.splitlines()[2:] == [
        "overrides:",
        "- {match: {size: d16x2, init: random}, set: {wsp.lr: 0.00101}}"
        "  # wsp.lr at the low end of its range",
        "- {match: {size: d16x2, init: mae}, set: {wsp.lr: 0.003}}",
    ]
