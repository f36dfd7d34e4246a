"""The DeepSpeed engine: what it refuses, and that sharding changes no weight."""

import json
import os
from pathlib import Path

import deepspeed
import pytest
import tiny
import torch
from deepspeed.utils import z3_leaf_module
from timm.models.vision_transformer import VisionTransformer

from harness.errors import UserError
from harness.models.heads import Classifier
from harness.models.init import initialize
from harness.models.vit import VisionEncoder
from harness.study.recipes import Duration, WspRecipe
from harness.study.stages import Execution
from harness.train import engine as engine_room
from harness.train.blueprint import Blueprint
from harness.train.build import build_engine
from harness.train.engine import Engine, connect
from harness.train.groups import parameter_groups
from harness.train.optimizer import plain_architectures
from harness.train.zero_config import batch_plan, config_path, read_config


def small_engine(**execution: object) -> tuple[Engine, dict[str, torch.Tensor]]:
    model = Classifier(VisionEncoder(tiny.MODEL), 5, "cls")
    initialize(model, 0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    engine = Engine(
        model,
        parameter_groups(model, depth=2, weight_decay=0.05),
        WspRecipe(duration=Duration(steps=4), batch=8),
        Execution.model_validate({"dataset_path": "stand-in", **execution}),
        rank=0,
        ranks=1,
    )
    return engine, before


def test_every_block_is_a_leaf_and_nothing_else_is() -> None:
    """A Block of another class would get hooks on every Linear, and nobody would be told."""
    engine, _ = small_engine()
    modules = dict(engine._engine.module.named_modules())
    leaves = {name for name, module in modules.items() if z3_leaf_module(module)}
    assert leaves == {f"encoder.blocks.{i}" for i in range(tiny.MODEL.depth)}


@pytest.mark.parametrize("name", ["zero3_fp32", "zero3_bf16", "zero3_offload"])
def test_shipped_configs_are_stage_3_and_leave_the_harness_its_keys(name: str) -> None:
    config = read_config(config_path(name, "cpu"))
    assert config["zero_optimization"]["stage"] == 3


def test_device_picks_the_config() -> None:
    assert config_path(None, "cpu").name == "zero3_fp32.json"
    assert config_path(None, "cuda").name == "zero3_bf16.json"


def test_a_config_that_sets_what_the_harness_owns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"train_batch_size": 8, "gradient_clipping": 1.0, "bf16": {}}))
    with pytest.raises(UserError) as error:
        read_config(path)
    assert error.value.problems == (
        f"{path}: sets train_batch_size; the harness owns it: remove it and set"
        " stages.<stage>.batch",
        f"{path}: sets gradient_clipping; the harness owns it: remove it and set"
        " stages.<stage>.clip",
    )


def test_unknown_and_unreadable_configs_say_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'zero9': unknown; known: .*zero3_fp32.*, or a"):
        config_path("zero9", "cpu")
    torn = tmp_path / "torn.json"
    torn.write_text("{")
    with pytest.raises(UserError, match=r"torn\.json: cannot be read as JSON"):
        read_config(torn)


def test_batch_is_split_over_ranks_and_accumulation() -> None:
    assert batch_plan(128, 1, None) == (128, 1)
    assert batch_plan(128, 2, None) == (64, 1)
    assert batch_plan(128, 2, 16) == (16, 4)
    assert batch_plan(8, 1, 100) == (8, 1)


def test_a_batch_that_does_not_divide_is_a_users_error() -> None:
    with pytest.raises(UserError, match="batch 100 is not a multiple of 8 ranks"):
        batch_plan(100, 8, None)
    with pytest.raises(UserError, match=r"not a multiple of 96 \(8 ranks x micro-batch 12\)"):
        batch_plan(4096, 8, 12)


def test_sharding_changes_no_weight() -> None:
    engine, before = small_engine()
    after = dict(engine.tensors())
    engine.close()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_evaluation_leaves_training_bits_alone() -> None:
    def trained(evaluate: bool) -> dict[str, torch.Tensor]:
        engine, _ = small_engine()
        images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            if evaluate:
                with engine.evaluating():
                    logits = engine.forward(images[:5])
                    assert not logits.requires_grad
            engine.backward(engine.forward(images).logsumexp(dim=1).mean())
            engine.step()
        tensors = dict(engine.tensors())
        engine.close()
        return tensors

    plain, evaluated = trained(False), trained(True)
    for name, value in plain.items():
        assert torch.equal(value, evaluated[name]), name


def test_lower_zero_stages_train_the_same(tmp_path: Path) -> None:
    """The stage is an execution choice: same weights to rounding."""
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for stage in (0, 1, 3):
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        engine, _ = small_engine(zero_config=str(path))
        for _ in range(3):
            engine.backward(engine.forward(images).logsumexp(dim=1).mean())
            engine.step()
        results.append(tiny.without_key_bias(dict(engine.tensors())))
        engine.close()
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_one_rank_opens_no_port() -> None:
    engine, _ = small_engine()
    engine.close()
    assert torch.distributed.get_world_size() == 1
    assert "MASTER_PORT" not in os.environ


def test_importing_the_engine_starts_no_thread() -> None:
    """A process that imported it forks workers; a thread would be lost in them."""
    import subprocess
    import sys

    code = (
        "import os, harness.train.engine, torch;"
        "print(len(os.listdir('/proc/self/task')), torch.cuda.is_initialized())"
    )
    # As the local pool starts it: OpenBLAS would make its threads when numpy is imported.
    env = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["1", "False"], done.stdout
    assert engine_room.deepspeed is not None


def test_timms_own_init_is_skipped_by_deepspeed_without_a_word() -> None:
    """Why weights are set tensor by tensor here, and never by timm inside zero.Init."""
    connect(Execution(dataset_path=""), 0, 1)

    def vit() -> VisionTransformer:
        return VisionTransformer(
            img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=0
        )

    torch.manual_seed(0)
    usual = {name: param.std().item() for name, param in vit().named_parameters()}
    # DeepSpeed's own Linear would stay in this process for good.
    zero = {"stage": 3, "memory_efficient_linear": False}
    config = {"train_batch_size": 1, "zero_optimization": zero}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = vit()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found = {name: param.std().item() for name, param in model.named_parameters()}
    name = "blocks.0.attn.qkv.weight"
    assert usual[name] == pytest.approx(0.02, rel=0.1)
    # torch's default for a Linear: uniform with variance 1 / (3 fan_in).
    assert found[name] == pytest.approx((3 * 64) ** -0.5, rel=0.1)
    assert usual["blocks.0.attn.qkv.bias"] == 0.0 < found["blocks.0.attn.qkv.bias"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bfloat16_the_optimizer_starts_from_exact_weights_and_they_are_exported(
    stage: int, tmp_path: Path
) -> None:
    zero = {"stage": stage, "memory_efficient_linear": False}
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero}))
    recipe = WspRecipe(duration=Duration(steps=4), batch=8)
    blueprint = Blueprint(
        make=lambda: Classifier(VisionEncoder(tiny.MODEL), 5, "cls"),
        seed=0,
        groups=lambda model: parameter_groups(model, depth=2, weight_decay=0.05),
    )
    execution = Execution(dataset_path="", zero_config=str(config))
    engine = build_engine(blueprint, recipe, execution, rank=0, ranks=1)
    exact = dict(blueprint.whole()[0].named_parameters())
    for name, value in engine.tensors():
        assert torch.equal(value, exact[name].detach()), name
    engine.close()
    rounded = exact["encoder.blocks.0.attn.qkv.weight"].detach().bfloat16().float()
    assert not torch.equal(rounded, exact["encoder.blocks.0.attn.qkv.weight"].detach())


def test_with_one_rank_parameters_stay_whole_and_are_the_optimizers_own_memory() -> None:
    engine, _ = small_engine()
    zero = engine._engine.optimizer
    flats = [flat.untyped_storage().data_ptr() for flat in zero.fp16_partitioned_groups_flat]
    images = torch.randn(8, 3, 16, 16)
    for _ in range(2):
        for param in engine._engine.module.parameters():
            assert param.shape == param.ds_shape
            assert param.untyped_storage().data_ptr() in flats
        engine.backward(engine.forward(images).logsumexp(dim=1).mean())
        assert all(param.grad is None for param in engine._engine.module.parameters())
        engine.step()
    engine.close()


def test_with_one_rank_a_saved_model_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    engine, _ = small_engine()
    engine.save(tmp_path)
    engine.close()
    file = tmp_path / "deepspeed" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    saved = torch.load(file, weights_only=False)["module"]
    assert sum(tensor.numel() for tensor in saved.values()) == 0


def test_the_gradient_norm_is_that_of_all_gradients() -> None:
    engine, _ = small_engine()
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = Classifier(VisionEncoder(tiny.MODEL), 5, "cls")
    initialize(model, 0)
    model(images).logsumexp(dim=1).mean().backward()
    wanted = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])  # type: ignore[misc]
    engine.backward(engine.forward(images).logsumexp(dim=1).mean())
    engine.step()
    assert engine.grad_norm() == pytest.approx(wanted.item(), rel=1e-6)
    engine.close()


@pytest.mark.parametrize(
    ("given", "seen"),
    [(None, None), ("9.0a", "9.0"), ("8.0 9.0a+PTX;10.0f", "8.0 9.0+PTX;10.0"), ("8.6", "8.6")],
)
def test_architectures_reach_deepspeed_without_letters(
    given: str | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCH_CUDA_ARCH_LIST"
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    with plain_architectures():
        assert os.environ.get(name) == seen
    assert os.environ.get(name) == given
