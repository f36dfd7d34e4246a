"""Which cells and stages a study file stands for, and what they are called."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import NotFoundError, UserError
from harness.study.cell_states import cell_state
from harness.study.cells import Ablation, Grid, build_grid
from harness.study.cost import Speeds, makespan, pace, running_left
from harness.study.flops import mae_train, vit_forward, vit_train
from harness.study.plan import check_budget, make_plan, unseen_images
from harness.study.recipes import MaeRecipe
from harness.study.schema import load_study
from harness.study.select import choose, find_cell, parse_filter, select
from tests.conftest import SMALL

Write = Callable[..., Path]
GRIDS = Path(__file__).parents[2] / "grids"


def grid_of(study_file: Write, text: str = SMALL) -> Grid:
    return build_grid(load_study(study_file(text)))


def ids(grid: Grid, kind: str) -> set[str]:
    return {s.id for s in grid.stages.values() if s.kind == kind}


def test_one_mae_run_feeds_every_data_size(study_file: Write) -> None:
    grid = grid_of(study_file)
    assert len(grid.cells) == 8
    mae = ids(grid, "mae")
    assert len(mae) == 2  # one per model size
    assert {grid.feeds[m] for m in mae} == {2}
    assert len(ids(grid, "wsp")) == 8 and len(ids(grid, "linear_probe")) == 8


def test_mae_on_the_cells_own_images_is_not_shared(study_file: Write) -> None:
    grid = grid_of(study_file, SMALL.replace("  mae:\n", "  mae:\n    data: same\n"))
    assert len(ids(grid, "mae")) == 4
    # `full` of a 4k set and `same` at 4k are the same 4k images: the same stage.
    full = grid_of(study_file)
    assert ids(full, "mae") < ids(grid, "mae")


def test_naive_and_shared_flops_by_hand(study_file: Write) -> None:
    grid = grid_of(study_file)
    naive = shared = 0.0
    for cell in grid.cells:
        wsp, probe = grid.stages[cell.stages["wsp"]], grid.stages[cell.stages["probe"]]
        model, classes = wsp.config.model, wsp.config.num_classes
        # 2000 samples are 16 steps of 128: 2048 samples.
        own = vit_train(model, classes) * 2048
        test = grid.datasets["scenes-4k"].splits["test"]
        own += vit_forward(model) * (probe.config.images.images + test)
        shared += own
        naive += own
        if "mae" in cell.stages:
            recipe = grid.stages[cell.stages["mae"]].config.recipe
            assert isinstance(recipe, MaeRecipe)
            naive += mae_train(model, recipe) * 2048
            shared += mae_train(model, recipe) * 2048 / 2
    plan = make_plan(grid, dict.fromkeys(grid.stages, "planned"), Speeds(), 2)
    assert plan.totals.flops_naive == pytest.approx(naive)
    assert plan.totals.flops_shared == pytest.approx(shared)
    assert plan.totals.flops_remaining == pytest.approx(shared)


def test_equal_durations_in_other_units_are_the_same_stage(study_file: Write) -> None:
    a = grid_of(study_file)
    b = grid_of(study_file, SMALL.replace("samples: 2k", "steps: 16"))
    assert list(a.stages) == list(b.stages)


def test_weights_from_elsewhere_enter_an_identity_by_content_not_by_path(
    study_file: Write, tmp_path: Path
) -> None:
    def grid(name: str) -> Grid:
        text = SMALL.replace("init: [random, mae]", f"init: [random, 'checkpoint:{name}']")
        return grid_of(study_file, text)

    empty = (2).to_bytes(8, "little") + b"{}"  # the header of a file without tensors
    (tmp_path / "a-1.safetensors").write_bytes(empty)
    (tmp_path / "b.pth").write_bytes(empty)
    (tmp_path / "c.bin").write_bytes(b"others")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "hf" / "config.json").write_text("{}")
    found = {name: grid(name) for name in ("a-1.safetensors", "b.pth", "c.bin", "hf")}

    def hashes(name: str, kind: str) -> set[str]:
        return {stage.rsplit("-", 1)[1] for stage in ids(found[name], kind)}

    for kind in ("wsp", "linear_probe"):
        assert hashes("a-1.safetensors", kind) == hashes("b.pth", kind)
        random = {s.rsplit("-", 1)[1] for s in ids(grid_of(study_file), kind) if "random" in s}
        for name in ("c.bin", "hf"):
            assert hashes(name, kind) & hashes("b.pth", kind) == random
    stage = next(s for s in found["a-1.safetensors"].stages.values() if s.config.weights)
    assert stage.config.weights == hashlib.sha256(empty).hexdigest()
    assert stage.execution.weights_path == str(tmp_path / "a-1.safetensors")
    names = {c.name for c in found["a-1.safetensors"].cells}
    assert "d16x2-1k-a_1-s0" in names and "d16x2-1k-random-s0" in names
    # Transfers start from what wsp made, which started from the file.
    probes = [s for s in found["b.pth"].stages.values() if s.kind == "linear_probe"]
    assert all(s.config.upstream and not s.config.weights for s in probes)


def test_without_wsp_the_tasks_judge_the_weights_themselves(
    study_file: Write, tmp_path: Path
) -> None:
    (tmp_path / "a.pth").write_bytes(b"weights")
    text = SMALL.replace("[random, mae]", "['checkpoint:a.pth']")
    text = text.replace("  wsp:\n    duration: {samples: 2k}\n", "")
    stages = grid_of(study_file, text).stages.values()
    assert {(s.kind, bool(s.config.weights)) for s in stages} == {
        ("features", True),
        ("linear_probe", False),
    }


def test_a_warmup_in_samples_steps_or_epochs_is_one_recipe(study_file: Write) -> None:
    def wsp(warmup: str) -> list[str]:
        text = SMALL.replace("data: [1k, 4k]", "data: [1k]")
        text = text.replace("  wsp:\n", f"  wsp:\n    warmup: {warmup}\n")
        return sorted(ids(grid_of(study_file, text), "wsp"))

    assert wsp("{samples: 256}") == wsp("{steps: 2}") == wsp("{epochs: 0.256}")
    assert len({*wsp("{samples: 256}"), *wsp("{samples: 257}"), *wsp("0.125")}) == 12
    assert wsp("0.05") == sorted(ids(grid_of(study_file, SMALL.replace(", 4k]", "]")), "wsp"))


@pytest.mark.parametrize(
    "extra",
    [
        "resources: {ranks: 2, threads: 3, micro_batch: 32, checkpoint_every: 5m}\n",
        "retry: {killed: 9}\n",
        "budget: {hours: 1000}\n",
        "question: What else?\n",
    ],
)
def test_execution_never_enters_identity(study_file: Write, extra: str) -> None:
    before = grid_of(study_file)
    after = grid_of(study_file, SMALL + extra)
    assert list(before.stages) == list(after.stages)
    assert [c.id for c in before.cells] == [c.id for c in after.cells]


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        (
            "decoder_depth: 1",
            "decoder_depth: 1\n    mask_ratio: 0.6",
            {"mae", "wsp", "features", "linear_probe"},
        ),
        (
            "protocol: linear_probe",
            "protocol: linear_probe, pool: mean",
            {"features", "linear_probe"},
        ),
        (
            "protocol: linear_probe",
            "protocol: linear_probe, penalties: [1e-3]",
            {"linear_probe"},
        ),
        ("decoder_depth: 1", "decoder_depth: 1\n    mask_ratio: 0.75", set()),  # the default
        ("scenes-4k", "scenes-5k", {"mae", "wsp", "features", "linear_probe"}),
    ],
)
def test_a_change_renames_its_stage_and_all_below(
    study_file: Write, old: str, new: str, changed: set[str]
) -> None:
    before, after = grid_of(study_file), grid_of(study_file, SMALL.replace(old, new))
    for cell_before, cell_after in zip(before.cells, after.cells, strict=True):
        if "mae" not in cell_before.stages:
            continue
        pairs = zip(cell_before.stages.values(), cell_after.stages.values(), strict=True)
        for stage, stage_after in pairs:
            kind = before.stages[stage].kind
            assert after.stages[stage_after].kind == kind
            assert (stage != stage_after) == (kind in changed), kind


def test_the_random_arm_does_not_know_of_the_mae_recipe(study_file: Write) -> None:
    before = grid_of(study_file)
    after = grid_of(study_file, SMALL.replace("decoder_depth: 1", "decoder_depth: 2"))
    for a, b in zip(before.cells, after.cells, strict=True):
        assert (a.stages == b.stages) == (a.axes["init"] == "random")


def test_ids_are_pinned(study_file: Write) -> None:
    """A change here orphans every run tree: bump identity.VERSION on purpose, never by accident."""
    text = SMALL.replace("dataset: scenes-4k", "dataset: pinned").replace(
        "size: [d16x2, d32x3]", "size: [d16x2]"
    )
    folder = study_file("x").parent / "pinned"
    folder.mkdir()
    (folder / "dataset.json").write_text(
        '{"schema": 1, "name": "pinned", "fingerprint": "abc", "image_size": 32, "hashtags": ["a"],'
        ' "classes": ["x", "y"], "splits": {"pretrain": 4000, "val": 10, "train": 10, "test": 10}}'
    )
    grid = build_grid(load_study(study_file(text), [folder.parent]))
    assert list(grid.stages)[: len(PINNED)] == PINNED


PINNED = [
    "d16x2-1k-random-s0-a4cec1613103",
    "d16x2-1k-random-pinned_features-s0-7c4681d3a11e",
    "d16x2-1k-random-probe-s0-f33ae5f42078",
    "d16x2-4k-s0-7a64af326634",
    "d16x2-1k-mae-s0-97652715ceca",
    "d16x2-1k-mae-pinned_features-s0-a13207817122",
]


def described(folder: Path, name: str, layout: str, images: int = 100_000) -> str:
    """A dataset as `harness data pack` describes it; returns its spec."""
    meta = {
        "schema": 1,
        "name": name,
        "fingerprint": "same",
        "image_size": 24,
        "hashtags": ["a"],
        "classes": ["x", "y"],
        "splits": {"pretrain": images, "val": 10, "train": 10, "test": 10},
        "layout": {"pretrain": layout},
    }
    (folder / name).mkdir()
    (folder / name / "dataset.json").write_text(json.dumps(meta))
    return name


def test_the_cut_into_shards_is_part_of_an_id_only_where_it_moves_the_order(
    study_file: Write,
) -> None:
    folder = study_file("x").parent
    grids = []
    for name, layout in (("one", "aaaa"), ("other", "bbbb")):
        spec = described(folder, name, layout)
        text = SMALL.replace("scenes-4k", spec).replace(
            "data: [1k, 4k]", "data: [1k, 65536, 65537]"
        )
        grids.append(build_grid(load_study(study_file(text), [folder])))
    for a, b in zip(grids[0].cells, grids[1].cells, strict=True):
        order_differs = a.images > 65_536
        assert (a.stages["wsp"] != b.stages["wsp"]) == (order_differs or "mae" in a.stages)
        if "mae" in a.stages:  # it reads all 100,000
            assert a.stages["mae"] != b.stages["mae"]
    config = {c.images: grids[0].stages[c.stages["wsp"]].config for c in grids[0].cells}
    assert [config[n].images.layout for n in (1000, 65_536, 65_537)] == ["", "", "aaaa"]


def test_resampling_defines_the_samples_of_an_epoch(study_file: Write) -> None:
    text = SMALL.replace(
        "wsp:\n    duration: {samples: 2k}", "wsp:\n    duration: {epochs: 2}\n    resample: 1.5"
    )
    before, after = grid_of(study_file), grid_of(study_file, text)
    for a, b in zip(before.cells, after.cells, strict=True):
        wsp = after.stages[b.stages["wsp"]].config
        assert wsp.epoch_samples == round(1.5 * b.images)
        assert wsp.steps == -(-2 * wsp.epoch_samples // wsp.recipe.batch)
        assert a.stages["wsp"] != b.stages["wsp"] and a.stages.get("mae") == b.stages.get("mae")
    # The paper's: 3 billion unique images make 5 billion samples.
    maws = build_grid(load_study(GRIDS / "maws.yaml"))
    sizes = {s.config.epoch_samples for s in maws.stages.values() if s.kind == "wsp"}
    assert sizes == {5_000_000_000}


def test_axes_zip_include_exclude(study_file: Write) -> None:
    text = SMALL.replace("init: [random, mae]", "init: [random, mae]\n  wsp.lr: [1e-3, 2e-3]")
    text += "zip: [[size, wsp.lr]]\nexclude: [{size: d32x3, data: 1k}]\n"
    text += "include: [{size: d48x4, data: full, init: mae, wsp.lr: 5e-4}]\n"
    grid = grid_of(study_file, text)
    found = {(c.axes["size"], c.axes["data"], c.axes["init"], c.axes["wsp.lr"]) for c in grid.cells}
    assert found == {
        ("d16x2", 1000, "random", 1e-3),
        ("d16x2", 1000, "mae", 1e-3),
        ("d16x2", 4000, "random", 1e-3),
        ("d16x2", 4000, "mae", 1e-3),
        ("d32x3", 4000, "random", 2e-3),
        ("d32x3", 4000, "mae", 2e-3),
        ("d48x4", 4000, "mae", 5e-4),
    }
    lrs = {c.axes["size"]: grid.stages[c.stages["wsp"]].config.recipe.lr for c in grid.cells}
    assert lrs == {"d16x2": 1e-3, "d32x3": 2e-3, "d48x4": 5e-4}


def test_overrides_apply_to_matching_cells_only(study_file: Write) -> None:
    text = SMALL + "overrides:\n- {match: {size: d32x3, data: 4000}, set: {wsp.lr: 3e-4}}\n"
    grid = grid_of(study_file, text)
    for cell in grid.cells:
        special = cell.axes["size"] == "d32x3" and cell.axes["data"] == 4000
        assert (grid.stages[cell.stages["wsp"]].config.recipe.lr == 3e-4) == special


def test_an_ablation_reuses_what_it_does_not_touch(study_file: Write) -> None:
    loaded = load_study(study_file())
    parent = next(c for c in build_grid(loaded).cells if c.name == "d32x3-4k-mae-s0")
    ablation = Ablation(parent=parent.id, values=parent.axes, set={"wsp.lr": 3e-4}, tag="low-lr")
    grid = build_grid(loaded, [ablation])
    child = next(c for c in grid.cells if c.parent == parent.id)
    assert (child.tag == "low-lr" and child.name.endswith("low_lr")) or "low-lr" in child.name
    assert child.stages["mae"] == parent.stages["mae"]
    assert child.stages["wsp"] != parent.stages["wsp"]
    assert child.stages["probe"] != parent.stages["probe"]


def test_axes_of_one_last_word_are_told_apart_in_names(study_file: Write) -> None:
    text = SMALL.replace("init: [random, mae]", "init: [mae]\n  wsp.lr: [1e-3]\n  mae.lr: [2e-3]")
    names = {c.name for c in grid_of(study_file, text).cells}
    assert "d16x2-1k-mae-s0-mae.lr=0.002-wsp.lr=0.001" in names
    # One alone keeps its short name, and with it the ids there are.
    text = SMALL.replace("init: [random, mae]", "init: [mae]\n  wsp.lr: [1e-3]")
    assert "d16x2-1k-mae-s0-lr=0.001" in {c.name for c in grid_of(study_file, text).cells}


def test_an_ablation_is_found_by_its_tag_as_it_was_given(study_file: Write) -> None:
    loaded = load_study(study_file())
    parent = build_grid(loaded).cells[0]
    ablation = Ablation(parent=parent.id, values=parent.axes, set={"wsp.lr": 3e-4}, tag="low-lr")
    cells = build_grid(loaded, [ablation]).cells
    rows = [{"id": c.id, "name": c.name, "tag": c.tag} for c in cells]
    for text in ("low-lr", f"{parent.name}-low-lr", f"{parent.name}-low_lr"):
        assert find_cell(rows, text) == rows[-1]
        assert choose(cells, {}, text).stages == list(cells[-1].stages.values())


@pytest.mark.parametrize(
    ("budget", "flops", "hours"),
    [
        ("{flops: 1G}", 1e9, None),
        ("{flops: 2.5E, hours: 90m}", 2.5e18, 1.5),
        ("{flops: 3e20, hours: 2d}", 3e20, 48),
        ("{hours: 10}", None, 10),
    ],
)
def test_a_budget_is_written_as_other_numbers_are(
    study_file: Write, budget: str, flops: float | None, hours: float | None
) -> None:
    found = load_study(study_file(SMALL + f"budget: {budget}\n")).study.budget
    assert (found.flops, found.hours) == (flops, hours)


@pytest.mark.parametrize("budget", ["{flops: 1x}", "{flops: -1}", "{hours: soon}", "{hours: 0}"])
def test_a_wrong_budget_is_a_line(study_file: Write, budget: str) -> None:
    with pytest.raises(UserError, match=r"study.yaml:19: budget\.(flops|hours): "):
        load_study(study_file(SMALL + f"budget: {budget}\n"))


def test_only_selects_by_axes_and_says_what_there_is(study_file: Write) -> None:
    cells = grid_of(study_file).cells
    assert len(select(cells, "size=d32x3,init=mae")) == 2
    assert len(select(cells, "data=1k|4000")) == 8
    assert len(select(cells, "data=4k, data=1k")) == 8
    assert select(cells, "data=full") == select(cells, "data=4k")  # all there are
    with pytest.raises(UserError, match="did you mean 'size'"):
        select(cells, "sise=d32x3")
    with pytest.raises(NotFoundError, match="size has d16x2, d32x3"):
        select(cells, "size=b")
    with pytest.raises(UserError, match="is not axis=value"):
        parse_filter("size")


def test_a_cell_is_found_by_name_id_or_beginning(study_file: Write) -> None:
    rows = [{"id": c.id, "name": c.name} for c in grid_of(study_file).cells]
    assert find_cell(rows, rows[3]["id"]) == rows[3] == find_cell(rows, rows[3]["name"])
    assert find_cell(rows, rows[3]["id"][:-3]) == rows[3]
    with pytest.raises(UserError, match="means 4 cells"):
        find_cell(rows, "d32x3")
    with pytest.raises(NotFoundError, match="did you mean"):
        find_cell(rows, "d32x3-4k-mea-s0")


def test_cell_state_is_the_worst_of_its_stages() -> None:
    assert cell_state(["done", "done"]) == "done"
    assert cell_state(["done", "planned"]) == "waiting"
    assert cell_state(["planned", "waiting"]) == "planned"
    assert cell_state(["done", "running", "waiting"]) == "running"
    assert cell_state(["done", "diverged", "blocked"]) == "diverged"
    assert cell_state(["failed", "running"]) == "failed"


def test_the_budget_stops_a_submission(study_file: Write) -> None:
    grid = grid_of(study_file, SMALL + "budget: {flops: 1e9}\n")
    plan = make_plan(grid, dict.fromkeys(grid.stages, "planned"), Speeds(), 2)
    with pytest.raises(UserError, match=r"budget\.flops is 1 GFLOPs"):
        check_budget(plan)
    check_budget(make_plan(grid, dict.fromkeys(grid.stages, "done"), Speeds(), 2))


def test_makespan_is_bounded_by_the_longest_and_by_the_area() -> None:
    assert makespan([(5, 1), (3, 1), (3, 1), (1, 1)], 2) == 6
    assert makespan([(10, 1), (3, 1)], 2) == 10
    assert makespan([(4, 8), (4, 8)], 8) == 8
    assert makespan([], 2) == 0


def test_time_left_follows_what_is_measured_not_the_plan() -> None:
    """A running stage at its own rate: 40 of 100 steps are 4000 samples in 20 s, 60 take 30 s."""
    status = {"step": 40, "steps": 100, "samples": 4000, "samples_per_s": 200.0}
    assert running_left(5.0, 1000.0, status) == pytest.approx(30.0)
    assert running_left(5.0, 1000.0, status | {"step": 100, "samples": 10_000}) == 0
    # Without steps the plan's estimate runs down, and does not stand still where it was too low.
    left = [running_left(10.0, elapsed, {}) for elapsed in (0.0, 4.0, 60.0, 120.0)]
    assert left == pytest.approx([10.0, 6.0, 6.0, 12.0])
    # Stages that ended took twice as long (mae) and half as long (wsp) as they were planned.
    found = pace([("mae", 20.0, 10.0), ("mae", 40.0, 20.0), ("wsp", 5.0, 10.0)])
    assert found == pytest.approx({"mae": 2.0, "wsp": 0.5, "": 65 / 40})
    assert pace([]) == {}


def test_guessed_times_count_steps_on_a_cpu_and_the_slower_of_two_on_a_gpu(
    study_file: Write,
) -> None:
    stage = next(s for s in grid_of(study_file).stages.values() if s.kind == "wsp")
    steps = stage.config.steps
    long = stage.model_copy(update={"flops": 1e15})
    cpu, gpu = Speeds(), Speeds(device="cuda")
    idle = [s.seconds(stage.model_copy(update={"flops": 0.0})) for s in (cpu, gpu)]
    assert idle == pytest.approx([1.5 + 0.015 * steps, 20 + 0.03 * steps])
    assert cpu.seconds(long) == pytest.approx(idle[0] + 1e15 / 25e9)
    assert gpu.seconds(long) == pytest.approx(20 + max(0.03 * steps, 1e15 / 400e12))
    # What was measured holds the steps already.
    known = Speeds(flops_per_s={("wsp", stage.config.size): 1e9})
    assert known.seconds(long) == pytest.approx(1.5 + 1e6) and known.is_measured(long)


def test_a_data_size_that_wsp_does_not_get_to_see_is_told(study_file: Write) -> None:
    # 2000 samples are 16 steps of 128: 2048 samples, of 4k images half.
    (note,) = unseen_images(grid_of(study_file))
    assert note.startswith("4 cells of 4k images see 2048 of them at most")
    longer = SMALL.replace("samples: 2k", "samples: 4k")
    assert longer != SMALL and not unseen_images(grid_of(study_file, longer))


def test_what_scale_study_has_run_is_not_run_again_for_mae_data() -> None:
    known, own = (build_grid(load_study(GRIDS / f"{n}.yaml")) for n in ("scale_study", "mae_data"))
    random = [c for c in own.cells if c.axes["init"] == "random"]
    assert len(random) == 16
    assert {s for c in random for s in c.stages.values()} <= known.stages.keys()
