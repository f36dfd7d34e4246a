"""Zero-shot classification and retrieval: against oracles, and what a trained tower is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lit_jobs
import pyarrow.parquet
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.retrieval import RetrievalHitRate

from analysis.bootstrap import of_difference, read_samples
from harness import transfer
from harness.models.lit import read_lit
from harness.study import scenes_spec
from harness.study.captions_spec import CLASS_NAMES
from harness.study.protocols import Lit, Retrieval, TextTower, ZeroShot
from harness.study.protocols.common import Features
from harness.study.recipes import Duration
from harness.study.stages import Recipe, StageFile
from harness.transfer.retrieval import ranks
from harness.transfer.zero_shot import class_vectors
from tests.transfer.conftest import MODEL

CPU = torch.device("cpu")
ZERO_SHOT = ZeroShot(of="lit", names=CLASS_NAMES)
RETRIEVAL = Retrieval(of="lit")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero-shot")


@pytest.fixture(scope="module")
def towers(root: Path) -> Path:
    """The folder of a lit stage."""
    lit_jobs.train(root, root / "lit")
    return root / "lit"


def judge(recipe: Recipe, root: Path, folder: Path, towers: Path, dataset: str) -> StageFile:
    """Runs a task of the lit stage in `towers`; the stage."""
    stage = lit_jobs.stage(recipe, dataset)
    context = replace(tiny.context(folder), root=root, upstream={"model": towers})
    result = transfer.run(stage, context)
    samples = pyarrow.parquet.read_table(folder / "samples.parquet").to_pandas()
    means = samples.groupby("metric", observed=True).value.mean()
    measured = {n: v for n, v in result.metrics.items() if not n.startswith("n_")}
    assert means.to_dict() == pytest.approx(measured)  # the result is the mean of its samples
    return stage


def columns(path: Path) -> dict[str, list[object]]:
    return pyarrow.parquet.read_table(path).to_pydict()


@pytest.fixture(scope="module")
def tiny_names() -> dict[str, tuple[str, ...]]:
    return {name: (f"{name} thing", f"a {name}") for name in tiny.CLASSES}


def test_a_class_is_the_mean_of_its_names_in_all_prompts_made_length_one(towers: Path) -> None:
    lit = read_lit(towers, CPU)
    names, templates = [("ring", "donut"), ("star",)], ("a {}", "{}!", "{}")
    found = class_vectors(lit, names, templates)
    for place, own in enumerate(names):
        texts = [t.format(name) for name in own for t in templates]
        expected = F.normalize(torch.stack([lit.texts([t])[0] for t in texts]).mean(dim=0), dim=0)
        torch.testing.assert_close(found[place], expected)
    assert not torch.allclose(found[0], class_vectors(lit, [("ring",)], templates)[0])


@pytest.mark.long
def test_accuracies_are_those_of_torchmetrics(root: Path, towers: Path, tmp_path: Path) -> None:
    judge(ZERO_SHOT, root, tmp_path, towers, "scenes-64")
    table = columns(tmp_path / "predictions.parquet")
    label, pred = (torch.tensor(table[name]) for name in ("label", "pred"))
    samples = pyarrow.parquet.read_table(tmp_path / "samples.parquet").to_pandas()
    lit = read_lit(towers, CPU)
    names = [CLASS_NAMES[name] for name in scenes_spec.CLASSES]
    class_QE = class_vectors(lit, names, ZERO_SHOT.templates)
    values = load_file(tmp_path / "features" / "test-000000.safetensors")["values"]
    scores = lit.images(values) @ class_QE.T
    for k in (1, 5):
        oracle = MulticlassAccuracy(len(names), top_k=k, average="micro")(scores, label)
        found = samples[samples.metric == f"acc{k}"].value.mean()
        assert found == pytest.approx(oracle.item(), abs=1e-6)
    assert torch.equal(pred, scores.argmax(dim=1))


def test_five_classes_have_no_top_five(
    root: Path, towers: Path, tmp_path: Path, tiny_names: dict[str, tuple[str, ...]]
) -> None:
    recipe = ZeroShot(of="lit", names=tiny_names, templates=("a picture of {}",))
    judge(recipe, root, tmp_path, towers, str(tiny.folder()))
    assert set(columns(tmp_path / "samples.parquet")["metric"]) == {"acc1"}


def test_every_wording_and_every_image_is_a_query_once(
    root: Path, towers: Path, tmp_path: Path
) -> None:
    judge(RETRIEVAL, root, tmp_path, towers, "captions-192")
    samples = pyarrow.parquet.read_table(tmp_path / "samples.parquet").to_pandas()
    counts = samples.groupby("metric", observed=True).key.nunique().to_dict()
    for k in (1, 5, 10):
        assert counts[f"i2t_recall{k}"] == 1000 and counts[f"t2i_recall{k}"] == 2000
    texts = samples[samples.metric == "t2i_recall1"].key
    assert {key.rsplit("#")[1] for key in texts} == {"0", "1"}
    assert {key.rsplit("#")[0] for key in texts} == set(
        samples[samples.metric == "i2t_recall1"].key
    )


def test_recall_is_torchmetrics_hit_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    group_C = torch.arange(9).repeat_interleave(torch.arange(1, 10))  # 1 to 9 captions an image
    image = F.normalize(torch.randn(9, 4, generator=generator), dim=1)
    text = F.normalize(image[group_C] + torch.randn(45, 4, generator=generator), dim=1)
    for query, answer, of_query, of_answer in (
        (image, text, torch.arange(9), group_C),
        (text, image, group_C, torch.arange(9)),
    ):
        found = ranks(query, answer, of_query, of_answer)
        scores = query @ answer.T
        index = torch.arange(len(query))[:, None].expand_as(scores)
        target = of_query[:, None] == of_answer[None]
        for k in (1, 3, 5):
            oracle = RetrievalHitRate(top_k=k)(scores.flatten(), target.flatten(), index.flatten())
            assert (found < k).float().mean().item() == pytest.approx(oracle.item())


def test_a_tower_that_says_the_same_of_everything_finds_nothing() -> None:
    same = torch.ones(6, 3)
    places = torch.arange(6)
    assert ranks(same, same, places, places).tolist() == [5] * 6


# --- what the image tower is worth ------------------------------------------------------------

BUDGET = Lit(
    duration=Duration(samples=40_000),
    batch=64,
    lr=4e-3,
    text=TextTower(width=64, depth=1, heads=4),
)


@pytest.mark.long
def test_words_find_more_in_what_a_trained_encoder_sees(
    trained_encoder: Path, random_encoder: Path, data_root: Path, tmp_path: Path
) -> None:
    found: dict[str, Path] = {}
    for name, encoder in (("trained", trained_encoder), ("random", random_encoder)):

        def run(
            recipe: Recipe, dataset: str, upstream: str = "", name: str = name, encoder=encoder
        ) -> Path:
            folder = tmp_path / name / recipe.protocol
            stage = lit_jobs.stage(recipe, dataset)
            images = stage.config.images.model_copy(update={"images": 8000})
            steps = 40_000 // 64 if isinstance(recipe, Lit) else 0
            update = {"model": MODEL, "images": images, "steps": steps}
            stage = stage.model_copy(update={"config": stage.config.model_copy(update=update)})
            role = "features" if isinstance(recipe, Lit) else "model"
            context = replace(
                tiny.context(folder, upstream=encoder),
                root=data_root,
                upstream={role: tmp_path / name / upstream} if upstream else {},
            )
            transfer.run(stage, context)
            return folder

        run(Features(), "captions")
        run(BUDGET, "captions", "features")
        for recipe, dataset in ((ZERO_SHOT, "scenes-16000"), (RETRIEVAL, "captions")):
            folder = run(recipe, dataset, "lit")
            found[f"{name} {recipe.protocol}"] = folder
    for metric in ("acc1", "i2t_recall10", "t2i_recall10"):
        protocol = "zero_shot" if metric == "acc1" else "retrieval"
        one, other = (
            read_samples(found[f"{name} {protocol}"], metric) for name in ("trained", "random")
        )
        assert one is not None and other is not None
        gain = of_difference(one.mean() - other.mean(), [one], [other])
        print(f"{metric}: {one.mean():.3f} against {other.mean():.3f}, {gain}")
        assert gain.low > 0, metric
