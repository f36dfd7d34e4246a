"""What a wrong study file says: one line a problem, all at once, file and line, what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import NotFoundError, UserError
from harness.study.cells import build_grid
from harness.study.schema import load_study
from tests.conftest import SMALL

Write = Callable[..., Path]


def problems(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        build_grid(load_study(path))
    return list(caught.value.problems)


def test_a_misspelt_key_names_the_line_and_the_likely_key(study_file: Write) -> None:
    path = study_file(SMALL.replace("decoder_depth: 1", "decoder_dept: 1"))
    assert problems(path) == [
        f"{path}:13: stages.mae.decoder_dept: unknown key; did you mean 'decoder_depth'?"
    ]


def test_all_problems_are_listed_at_once(study_file: Write) -> None:
    text = SMALL.replace("axes:", "axis:").replace("samples: 2k", "sample: 2k")
    found = problems(study_file(text))
    assert len(found) >= 4  # axes missing, axis unknown, and both durations
    assert any("did you mean 'axes'?" in p for p in found)
    assert any("axes: is missing" in p for p in found)
    assert sum("did you mean 'samples'?" in p for p in found) == 2


@pytest.mark.parametrize(
    ("duration", "message"),
    [
        ("{samples: 2k, epochs: 3}", "give exactly one of samples, epochs, steps; found samples"),
        ("{}", "found none"),
        ("{samples: -5}", "not a count"),
        ("{samples: many}", "not a count"),
        ("{epochs: 0}", "greater than 0"),
        ("{epochs: .inf}", "finite"),
    ],
)
def test_a_bad_duration_is_one_line(study_file: Write, duration: str, message: str) -> None:
    text = SMALL.replace("  wsp:\n    duration: {samples: 2k}", f"  wsp:\n    duration: {duration}")
    found = problems(study_file(text))
    assert len(found) == 1, found
    assert "study.yaml:16: stages.wsp.duration" in found[0] and message in found[0]


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        ("2.5", "less than 1"),
        ("soon", "valid number"),
        ("{sampels: 5}", "unknown key; did you mean 'samples'?"),
        (
            "{samples: 3k}",
            "3,000 of warmup are more than its 2,048 samples; shorten them, or train",
        ),
        ("0.7\n    schedule: wsd\n    cooldown: 0.6", "1,434 of warmup and 1,229 of cooldown are"),
    ],
)
def test_a_bad_warmup_is_one_problem(study_file: Write, warmup: str, message: str) -> None:
    found = problems(study_file(SMALL.replace("  wsp:\n", f"  wsp:\n    warmup: {warmup}\n")))
    assert any(message in line and "stages.wsp" in line for line in found), found
    assert len(found) == 1, found


def test_a_batch_that_does_not_divide_says_what_would(study_file: Write) -> None:
    text = SMALL + "resources: {ranks: 2, micro_batch: 24}\n"
    found = problems(study_file(text))
    assert any(
        "batch 128 is not a multiple of 48 (2 ranks x micro_batch 24); use batch 96" in p
        for p in found
    ), found


def test_only_stages_of_one_rank_may_share_a_gpu(study_file: Write) -> None:
    rules = "resources: [{set: {share: 4}}, {match: {stage: wsp}, set: {ranks: 2}}]\n"
    path = study_file(SMALL + rules)
    line = len(SMALL.splitlines()) + 1
    (found,) = problems(path)
    assert found.startswith(f"{path}:{line}: resources.1.set: share 4 with 2 ranks: only"), found
    shared = build_grid(load_study(study_file(SMALL + "resources: {share: 4}\n")))
    plain = build_grid(load_study(study_file(SMALL)))
    assert shared.stages.keys() == plain.stages.keys()
    assert {s.execution.share for s in shared.stages.values()} == {4}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size: [d16x2, d32x3]", "size: [d16x2, d32x2]", "did you mean"),
        ("data: [1k, 4k]", "data: [1k, 5k]", "has 4k pretraining images"),
        ("init: [random, mae]", "init: [random, moco]", "known: random, mae, checkpoint:PATH"),
        ("init: [random, mae]", "init: ['checkpoint:no.pth']", "no such file or folder of weights"),
        ("init: [random, mae]", "init: ['checkpoint:.']", "holds no weights; expected files that"),
        ("image_size: 24", "image_size: 23", "not a multiple of patch 4"),
        ("image_size: 24", "image_sise: 24", "did you mean 'image_size'?"),
        ("dataset: scenes-4k", "dataset: no/such", "harness data pack"),
        ("name: small", "name: ../up", "not a usable name"),
        ("name: small", "name: small\nname: twice", "given twice"),
        ("name: small", "name: small\nzip: [[size, data, init, seed]]", "not an axis"),
        ("name: small", "name: small\nexclude: [{size: b}]", "matches no cell"),
        ("protocol: linear_probe", "protocol: linear_prob", "linear_probe"),
        ("protocol: linear_probe", "protocol: linear_probe, pol: cls", "did you mean 'pool'?"),
        ("duration: {samples: 2k}", "duration: {samples: '${axes.nope}'}", "has no 'nope'"),
        (
            "duration: {samples: 2k}",
            "duration: {samples: '${stages.mae.duration.samples}'}",
            "itself",
        ),
    ],
)
def test_each_mistake_is_named(study_file: Write, old: str, new: str, message: str) -> None:
    found = problems(study_file(SMALL.replace(old, new, 1)))
    assert any(message in p for p in found), found
    assert all("study.yaml" in p for p in found), found


def test_an_override_is_blamed_for_its_own_mistake(study_file: Write) -> None:
    path = study_file(SMALL + "overrides:\n- match: {size: d16x2}\n  set: {wsp.lrr: 1e-3}\n")
    assert problems(path) == [f"{path}:21: wsp.lrr: unknown key; did you mean 'lr'?"]


def test_a_missing_file_and_binary_rubbish_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "rubbish.yaml").write_bytes(b"\xff\xfe\x00name: [")
    with pytest.raises(UserError, match="not UTF-8"):
        load_study(tmp_path / "rubbish.yaml")
    (tmp_path / "open.yaml").write_text("name: [a\n")
    with pytest.raises(UserError, match=r"open.yaml:\d+: not valid YAML"):
        load_study(tmp_path / "open.yaml")
    (tmp_path / "tag.yaml").write_text(
        f"name: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n"
        "axes: !!python/name:os.system\n"
    )
    with pytest.raises(UserError, match="not valid YAML"):
        load_study(tmp_path / "tag.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_yaml_bomb_is_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="too much data"):
        load_study(tmp_path / "bomb.yaml")


def test_interpolation_keeps_types_and_reads_the_environment(
    study_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY_SEED", "7")
    text = SMALL.replace(
        "  wsp:\n    duration: {samples: 2k}", "  wsp:\n    duration: ${stages.mae.duration}"
    )
    text = text.replace("image_size: 24", "image_size: ${stages.mae.decoder_width}")
    text = text.replace("name: small", "name: s${env:STUDY_SEED}")
    loaded = load_study(study_file(text))
    assert loaded.study.stages.wsp is not None
    assert loaded.study.stages.wsp.duration.samples == 2000
    assert loaded.study.defaults["image_size"] == 32
    assert loaded.study.name == "s7"


def test_mistakes_of_every_phase_are_listed_at_once(study_file: Write) -> None:
    """Of keys, axes, rules, datasets and recipes: one round, a line of the file each."""
    text = SMALL.replace("d16x2, d32x3", "d16x2, d32x9").replace("random, mae", "random, mea")
    text = text.replace("scenes-4k", "scenez-4k")
    text += (
        "overrides:\n"
        "- {match: {siz: d16x2}, set: {wsp.lr: 1e-3}}\n"
        "- {match: {size: d16x2}, set: {wsp.lrr: 1e-3}}\n"
        "resources: {rank: 2}\n"
        "retry: {ooom: 3}\n"
    )
    path = study_file(text)
    found = {p.removeprefix(f"{path}:").split(":")[0]: p for p in problems(path)}
    expected = {
        "3": "size 'd32x9': unknown; did you mean 'd32x3'?",
        "5": "init 'mea': unknown; did you mean 'mae'?",
        "7": "did you mean 'scenes-4k'?",
        "20": "overrides matches on 'siz', which is not an axis; did you mean 'size'?",
        "21": "wsp.lrr: unknown key; did you mean 'lr'?",
        "22": "resources.rank: unknown key; did you mean 'ranks'?",
        "23": "retry.ooom: unknown key; did you mean 'oom'?",
    }
    assert found.keys() == expected.keys(), found
    for line, message in expected.items():
        assert message in found[line], found[line]


def test_mistakes_in_recipes_hide_no_others(study_file: Write) -> None:
    text = SMALL.replace("  wsp:\n", "  wsp:\n    lrr: 1\n").replace("d32x3", "d32x9")
    found = problems(study_file(text + "overrides: [{match: {}, set: {mae.clap: 1}}]\n"))
    assert len(found) == 3, found
    assert all(any(w in p for p in found) for w in ("wsp.lrr", "'d32x9'", "mae.clap")), found
    # Nothing is said of what follows from a mistake: the batch of a stage that was left out.
    lost = problems(study_file(SMALL.replace("    duration: {samples: 2k}\n", "", 1)))
    assert len(lost) == 1 and "stages.mae.duration: is missing" in lost[0], lost


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("overrides: [{match: {data: 5k}, set: {wsp.lr: 1}}]", "overrides {data: 5k} matches no"),
        ("overrides: [{match: {data: 5k}, set: {wsp.lr: x}}]", "wsp.lr: input should be a valid"),
        ("resources: [{match: {size: b}, set: {}}]", "resources {size: b} matches no cell"),
        ("resources: [{match: {size: b}, set: {ranks: x}}]", "resources.0.set.ranks: 'x' is not"),
        ("resources: [{match: {stage: prob}, set: {}}]", "no stage 'prob'; did you mean 'probe'?"),
        (
            "resources: [{match: {stage: mae, init: random}, set: {}}]",
            "resources {stage: mae, init: random} matches no stage of a cell",
        ),
        ("resources: {zero: zero3_fp23}", "zero 'zero3_fp23': unknown; did you mean 'zero3_fp32'?"),
        ("resources: {zero: mine.json}", "mine.json: no such DeepSpeed config"),
    ],
)
def test_a_rule_that_does_nothing_or_cannot_is_a_mistake(
    study_file: Write, rule: str, message: str
) -> None:
    path = study_file(SMALL + rule + "\n")
    found = problems(path)
    assert any(p.startswith(f"{path}:19: ") and message in p for p in found), found


def test_a_deepspeed_config_is_looked_for_beside_the_study_and_read(study_file: Write) -> None:
    path = study_file(SMALL + "resources: {zero: mine.json}\n")
    file = path.parent / "mine.json"
    file.write_text('{"train_batch_size": 4}')
    (found,) = problems(path)
    assert f"{path}:19: resources: {file}: sets train_batch_size; the harness owns it" in found
    file.write_text('{"zero_optimization": {"stage": 3}}')
    stages = build_grid(load_study(path)).stages.values()
    assert {s.execution.zero_config for s in stages} == {str(file)}


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("  mae:\n", "  mae:\n    data: 9k\n", 11, "stages.mae.data 9k: dataset scenes-4k has 4k"),
        ("  mae:\n", "  mae:\n    data: sane\n", 11, "expected full, same or a number"),
        ("  mae:\n", "  mae:\n    data: -3\n", 11, "-3 is not a count; expected a whole number"),
        ("decoder_heads: 2", "decoder_heads: 5", 12, "decoder_width 32 is not a multiple of"),
        ("  mae:\n", "  mae:\n    mask_ratio: 0.99\n", 11, "mask_ratio 0.99 keeps 0 of 36"),
        (
            "  mae:\n",
            "  mae:\n    val_images: 99M\n",
            11,
            "val_images 99M: split 'val' of scenes-4k",
        ),
        ("linear_probe", "linear_probe, train_images: 99M", 18, "train_images 99M: split 'train'"),
        ("linear_probe", "few_shot, shots: [1, 100000]", 18, "shots 100000: "),
        ("linear_probe", "linear_prob", 18, "found 'linear_prob'; did you mean 'linear_probe'?"),
        ("linear_probe", "linear_probe, dataset: scenez", 18, "did you mean 'scenes'?"),
        ("linear_probe", "linear_probe, pool: meen", 18, "did you mean 'mean'?"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_with_its_place(
    study_file: Write, old: str, new: str, line: int, message: str
) -> None:
    path = study_file(SMALL.replace(old, new, 1))
    (found,) = problems(path)
    assert found.startswith(f"{path}:{line}: ") and message in found, found


def test_mae_without_a_recipe_is_told_at_the_init_that_asks_for_it(study_file: Write) -> None:
    start, end = SMALL.index("  mae:\n"), SMALL.index("  wsp:\n")
    path = study_file(SMALL[:start] + SMALL[end:])
    assert problems(path) == [f"{path}:5: init mae needs a recipe; add stages.mae to the study"]


def test_a_problem_is_told_where_an_override_made_it(study_file: Write) -> None:
    rule = "overrides: [{match: {size: d16x2}, set: {mae.mask_ratio: 0.99}}]\n"
    path = study_file(SMALL + rule)
    (found,) = problems(path)
    assert found.startswith(f"{path}:19: stages.mae.mask_ratio 0.99 keeps 0"), found
