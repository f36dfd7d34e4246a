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
