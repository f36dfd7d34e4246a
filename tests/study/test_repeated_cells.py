"""Ids made from parts that are kept, and cells made from another seed's, are those of the whole."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.study import identity
from harness.study.again import renewed
from harness.study.cell_names import plain
from harness.study.cells import Grid, build_grid, only
from harness.study.schema import load_study
from harness.study.stage_set import outline_of, outlines
from harness.study.stages import StageFile
from tests.conftest import SMALL

GRIDS = Path(__file__).parents[2] / "grids"


@pytest.mark.parametrize("name", ["smoke", "scale_study", "transfer", "maws"])
def test_ids_put_together_from_parts_are_those_of_the_whole(name: str) -> None:
    grid = build_grid(load_study(GRIDS / f"{name}.yaml"))
    for stage in grid.stages.values():
        config, text = stage.config, identity.Text(stage.config)
        whole = identity.canonical(identity.semantic_fields(config))
        hashed = text.hashed(config.seed, [config.upstream[role] for role in text.roles])
        assert hashed == hashlib.sha256(whole.encode()).hexdigest()
        assert stage.id == f"{stage.name}-{hashed[:12]}"


@pytest.mark.parametrize(
    "axes",
    [
        {"size": "d8x2", "data": 4000, "init": "mae", "seed": 3},
        {"wsp.lr": 1e-05, "seed": 0, "zeta": True, "one": 1, "also one": 1.0, "true": True},
        {"seed": 12, "init": 'checkpoint:/tmp/"quoted"/größe\n.pt', "mae.warmup": 0.1, "a": 1e22},
        {"seed": 1, "list": [1, "x"], "none": None},
    ],
)
def test_the_hash_of_a_cell_is_that_of_its_whole_text(axes: dict[str, Any]) -> None:
    stages = {"wsp": "d8x2-4k-s3-0123", "mae": "d8x2-full-s3-4567", "probe ä": 'x"y'}
    whole = identity.canonical({"stages": stages, "axes": plain(axes)})
    expected = hashlib.sha256(whole.encode()).hexdigest()[:10]
    assert identity.CellText(plain(axes), stages).digest(axes["seed"], stages) == expected


def test_a_renewed_stage_is_pydantics_own_copy_and_leaves_the_first_as_it_was() -> None:
    for stage in build_grid(load_study(GRIDS / "smoke.yaml")).stages.values():
        before = stage.model_dump_json(by_alias=True)
        fields = {"id": "other", "config": renewed(stage.config, {"seed": 9, "upstream": {}})}
        ours, theirs = renewed(stage, fields), stage.model_copy(update=fields)
        assert ours == theirs
        assert ours.model_dump_json(by_alias=True) == theirs.model_dump_json(by_alias=True)
        assert ours.model_fields_set == theirs.model_fields_set
        assert stage.model_dump_json(by_alias=True) == before
        with pytest.raises(ValueError, match="frozen"):
            ours.name = "no"  # pyright: ignore[reportAttributeAccessIssue]


SEEDS_MATTER = """
overrides:
- {match: {seed: 1, init: mae}, set: {wsp.lr: 1e-4}}
resources:
- {match: {seed: 2, stage: wsp}, set: {micro_batch: 16}}
"""


@pytest.mark.parametrize(
    "name", ["smoke", "scale_study", "mae_data", "one_gpu", "maws", "transfer", "rules"]
)
def test_cells_of_several_seeds_are_those_of_each_seed_alone(name: str, tmp_path: Path) -> None:
    """A chain is built for one seed and repeated for others; alone, each is built in full."""
    folder = tmp_path / "grids"
    shutil.copytree(GRIDS, folder)  # a study names files beside it
    raw = SMALL + SEEDS_MATTER if name == "rules" else (GRIDS / f"{name}.yaml").read_text()
    study = yaml.safe_load(raw)
    extra = study.pop("include", [])
    study["include"] = [e for e in extra if e.get("seed", 0) == 0]
    study["axes"].pop("seed", None)

    def grid(seeds: list[int]) -> Grid:
        include = [{**e, "seed": s} for e in study["include"] for s in seeds]
        text = yaml.safe_dump(study | {"axes": study["axes"] | {"seed": seeds}, "include": include})
        (folder / "study.yaml").write_text(text)
        return build_grid(load_study(folder / "study.yaml"))

    if name == "rules":  # of a rule that matches no cell a study is refused
        seeds = [2, 0, 1]
        whole = grid(seeds)
        apart = {s: whole for s in seeds}
        for stage in whole.stages.values():
            is_two = stage.config.seed == 2 and stage.kind == "wsp"
            assert stage.execution.micro_batch == (16 if is_two else None)
            if stage.kind == "wsp":
                slow = stage.config.seed == 1 and "mae" in stage.name
                assert (stage.config.recipe.lr == 1e-4) == slow
    else:
        seeds = [3, 0, 11]
        whole, apart = grid(seeds), {s: grid([s]) for s in seeds}
    for seed in seeds:
        alone = apart[seed]
        mine = [c for c in whole.cells if c.axes["seed"] == seed]
        assert mine == [c for c in alone.cells if c.axes["seed"] == seed]
        for cell in mine:
            for stage in cell.stages.values():
                assert whole.stages[stage] == alone.stages[stage]
                written = whole.stages[stage].model_dump(mode="json", by_alias=True)
                assert StageFile.model_validate(written) == whole.stages[stage]
    assert {s for c in whole.cells for s in c.stages.values()} == whole.stages.keys()


def test_an_outline_says_what_the_stage_says() -> None:
    grid = build_grid(load_study(GRIDS / "scale_study.yaml"))
    known = outlines(grid.stages)
    assert list(known) == list(grid.stages) and len(known) == len(grid.stages)
    own = {stage_id for stage_id, outline in known.items() if outline.like.id == stage_id}
    assert 0 < len(own) < 0.6 * len(known)  # the study has two seeds
    for stage_id, outline in known.items():
        stage = grid.stages[stage_id]
        assert stage is grid.stages[stage_id] and stage.id == stage_id
        assert (outline.seed, outline.upstream) == (
            stage.config.seed,
            tuple(stage.config.upstream.values()),
        )
        assert outline == outline_of(grid.stages, stage_id)
        alike = {"exclude": {"id": True, "name": True, "upstream_kinds": True}}
        one, two = stage.model_dump(**alike), outline.like.model_dump(**alike)  # type: ignore[arg-type]
        for dumped in (one, two):
            dumped["config"].pop("seed"), dumped["config"].pop("upstream")
        assert one == two
        assert [grid.stages[u].kind for u in outline.upstream] == [*stage.upstream_kinds.values()]
    assert outlines(dict(grid.stages)).keys() == known.keys()


def test_a_part_of_a_grid_has_no_other_stages() -> None:
    grid = build_grid(load_study(GRIDS / "scale_study.yaml"))
    everything = list(grid.stages.values())
    part = only(grid, grid.cells[-3:])
    wanted = {s for cell in grid.cells[-3:] for s in cell.stages.values()}
    assert {*part.stages} == wanted and [*part.stages] == [s for s in grid.stages if s in wanted]
    for stage in everything:
        assert (stage.id in part.stages) == (stage.id in wanted)
        if stage.id not in wanted:
            with pytest.raises(KeyError):
                part.stages[stage.id]
