"""The protocols on a frozen encoder: what they leave, one pass for all, trained against random."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import MODEL
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.classification import MulticlassAccuracy

from analysis.bootstrap import Interval, of_difference, read_samples
from harness import transfer
from harness.ledger.context import StageResult
from harness.study.cells import build_grid
from harness.study.protocols import Features, FewShot, Knn, LinearProbe, PromptTuning, SgdProbe
from harness.study.scenes_spec import CLASSES
from harness.study.schema import load_study
from harness.study.stages import Images, Recipe, StageFile
from harness.transfer import logistic

SOLVED = [LinearProbe(), SgdProbe(batch=64, base_lr=1.0), Knn()]


@pytest.fixture(scope="module", params=SOLVED, ids=lambda recipe: recipe.protocol)
def solved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StageResult]:
    folder = tmp_path_factory.mktemp("solved")
    return folder, tiny.judge(tiny.stage(request.param), tiny.context(folder))


def test_acc1_is_that_of_scikit_learn_and_torchmetrics(solved: tuple[Path, StageResult]) -> None:
    folder, result = solved
    table = pd.read_parquet(folder / "predictions.parquet")
    found = result.metrics["acc1"]
    assert found == pytest.approx(accuracy_score(table["label"], table["pred"]), abs=1e-12)
    theirs = MulticlassAccuracy(tiny.NUM_CLASSES, average="micro")
    pred, label = (torch.tensor(table[name].to_numpy()) for name in ("pred", "label"))
    assert found == pytest.approx(theirs(pred, label).item(), abs=1e-6)
    assert found is not None and 0.3 < found < 1  # five classes: chance is 0.2
    samples = pd.read_parquet(folder / "samples.parquet")
    assert set(samples["metric"]) == {"acc1"}
    assert samples["value"].mean() == pytest.approx(found, abs=1e-12)
    assert list(samples["key"]) == list(table["key"])


def test_knn_is_that_of_scikit_learn_on_the_same_features(tmp_path: Path) -> None:
    tiny.judge(tiny.stage(Knn(k=7, temperature=0.1)), tiny.context(tmp_path))
    train, test = (
        load_file(tmp_path / f"before/features/{name}-000000.safetensors")
        for name in ("train", "test")
    )
    theirs = KNeighborsClassifier(
        n_neighbors=7,
        metric="cosine",
        weights=lambda distance: np.exp((1 - distance) / 0.1),  # type: ignore[arg-type]  # the stubs know names only
    )
    theirs.fit(train["values"].double().numpy(), train["classes"].numpy())
    wanted = theirs.predict(test["values"].double().numpy())
    assert list(pd.read_parquet(tmp_path / "predictions.parquet")["pred"]) == list(wanted)


def test_few_shot_counts_how_often_an_image_was_right(tmp_path: Path) -> None:
    recipe = FewShot(shots=(1, 5), splits=3)
    result = tiny.judge(tiny.stage(recipe), tiny.context(tmp_path))
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    for shots in (1, 5):
        own = samples[samples["metric"] == f"acc1_{shots}shot"].set_index("key")["value"]
        rows = table[table["shots"] == shots]
        wanted = (rows["label"] == rows["pred"]).groupby(rows["key"], observed=True).mean()
        assert own.to_dict() == wanted.to_dict()
        assert own.mean() == pytest.approx(result.metrics[f"acc1_{shots}shot"], abs=1e-12)


@pytest.mark.parametrize("recipe", [*SOLVED, FewShot(shots=(2,), splits=2)])
def test_a_second_rank_has_nothing_to_do(recipe: Recipe, tmp_path: Path) -> None:
    context = replace(tiny.context(tmp_path, rank=1, ranks=2), upstream={"features": Path("no")})
    transfer.run(tiny.stage(recipe), context)
    assert list(tmp_path.iterdir()) == []


def test_logits_in_blocks_lead_to_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 8, generator=generator)
    class_M = torch.randint(0, 4, (300,), generator=generator)
    whole = logistic.fit(features, class_M, 4, 1e-2, tolerance=1e-9).weights
    monkeypatch.setattr(logistic, "BLOCK", 4 * 70)  # five blocks, the last is short
    torch.testing.assert_close(
        logistic.fit(features, class_M, 4, 1e-2, tolerance=1e-9).weights, whole, atol=1e-6, rtol=0
    )


FIVE = """\
name: five
axes:
  init: [random, mae]
defaults: {size: d16x2, data: 1k, dataset: scenes-2k, image_size: 24}
stages:
  mae: {duration: {samples: 1k}, decoder_width: 32, decoder_depth: 1, decoder_heads: 2}
  wsp: {duration: {samples: 1k}}
  transfer:
    linear: {protocol: linear_probe}
    sgd: {protocol: sgd_probe}
    knn: {protocol: knn}
    few_shot: {protocol: few_shot}
    mean: {protocol: knn, pool: mean}
    prompts: {protocol: prompt_tuning}
"""


def test_one_pass_of_an_encoder_serves_all_that_read_it(tmp_path: Path) -> None:
    file = tmp_path / "five.yaml"
    file.write_text(FIVE)
    grid = build_grid(load_study(file))
    passes = {s.id: s for s in grid.stages.values() if s.kind == "features"}
    assert len(passes) == 4  # two encoders, two poolings
    for cell in grid.cells:
        used = {
            task: grid.stages[cell.stages[task]].config.upstream
            for task in ("linear", "sgd", "knn", "few_shot", "mean", "prompts")
        }
        shared = {tuple(used[task].items()) for task in ("linear", "sgd", "knn", "few_shot")}
        assert len(shared) == 1 and list(used["knn"]) == ["features"]
        assert used["mean"]["features"] != used["knn"]["features"]
        assert passes[used["knn"]["features"]].config.upstream == {"encoder": cell.stages["wsp"]}
        assert used["prompts"] == {"encoder": cell.stages["wsp"]}


# --- a trained encoder against a random one ------------------------------------------------------

RECIPES = [
    LinearProbe(),
    SgdProbe(base_lr=1.0),
    Knn(),
    FewShot(shots=(1, 5), splits=5),
    PromptTuning(shots=(5,), splits=2, epochs=8, warmup_epochs=1, lr=2e-2),
]


def on_scenes(recipe: Recipe) -> StageFile:
    file = tiny.stage(recipe)
    images = Images(dataset="scenes", fingerprint="", split="train", images=4000)
    update = {"model": MODEL, "images": images, "num_classes": len(CLASSES)}
    config = file.config.model_copy(update=update)
    execution = file.execution.model_copy(update={"dataset_path": "scenes-16000"})
    return file.model_copy(update={"config": config, "execution": execution})


@pytest.fixture(scope="module")
def judged(
    tmp_path_factory: pytest.TempPathFactory,
    data_root: Path,
    trained_encoder: Path,
    random_encoder: Path,
) -> dict[tuple[str, str], Path]:
    """(encoder, protocol) -> folder of the stage; the images pass through each encoder once."""
    folders = {}
    for name, weights in (("trained", trained_encoder), ("random", random_encoder)):
        for recipe in (Features(), *RECIPES):
            folder = tmp_path_factory.mktemp(name)
            folders[name, recipe.protocol] = folder
            context = replace(
                tiny.context(folder, upstream=weights),
                root=data_root,
                upstream={"features": folders[name, "features"]},
            )
            transfer.run(on_scenes(recipe), context)
    return folders


@pytest.mark.long
@pytest.mark.parametrize(
    ("protocol", "metric"),
    [
        ("linear_probe", "acc1"),
        ("sgd_probe", "acc1"),
        ("knn", "acc1"),
        ("few_shot", "acc1_1shot"),
        ("few_shot", "acc1_5shot"),
        ("prompt_tuning", "acc1_5shot"),
    ],
)
def test_a_trained_encoder_beats_a_random_one(
    judged: dict[tuple[str, str], Path], protocol: str, metric: str
) -> None:
    trained, random = (
        read_samples(judged[name, protocol], metric) for name in ("trained", "random")
    )
    assert trained is not None and random is not None
    gain: Interval = of_difference(trained.mean() - random.mean(), [trained], [random])
    print(f"{protocol} {metric}: {trained.mean():.3f} {random.mean():.3f} {gain}")
    assert gain.samples == 4000
    assert gain.low > 0.02
