"""The model on a CUDA device, against the CPU; `python -m pytest -m gpu`. Skipped where there is no device."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[1]
LABELS = torch.tensor([0, 1, 2])
VARIANTS = {
    "encoder": {}, "feature": {"clip_mode": "feature"}, "none": {"clip_mode": "none"},
    "image": {"modality": "image"}, "text": {"modality": "text"},
}  # fmt: skip
every_variant = pytest.mark.parametrize("variant", VARIANTS)

Inputs = dict[str, Tensor]
Build = Callable[..., ClipCaCgForSequenceClassification]


@pytest.fixture
def build(tiny_config: Callable[..., ClipCaCgConfig]) -> Build:
    """A function that makes a tiny model of a variant, the same each time, without dropout."""

    def make(variant: str, **overrides: object) -> ClipCaCgForSequenceClassification:
        torch.manual_seed(0)
        model = ClipCaCgForSequenceClassification(tiny_config(**{**VARIANTS[variant], **overrides}))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.eval()

    return make


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def on_card(inputs: Inputs) -> Inputs:
    return {name: value.cuda() for name, value in inputs.items()}


def training_step(model: nn.Module, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in evaluation mode: attention dropout of the encoders would differ between devices."""
    model.zero_grad()
    loss = model(**inputs, labels=LABELS.to(next(model.parameters()).device)).loss
    loss.backward()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@every_variant
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_and_training_step_equal_the_cpus(build: Build, inputs: Inputs, variant: str, attention: str) -> None:
    here, there = build(variant, attn_implementation=attention), build(variant, attn_implementation=attention).cuda()
    assert_close(there(**on_card(inputs)).logits.cpu(), here(**inputs).logits, rtol=1e-4, atol=1e-4)
    (loss, gradients), (expected, wanted) = training_step(there, on_card(inputs)), training_step(here, inputs)
    assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_cpus_float32(
    build: Build, inputs: Inputs, variant: str, dtype: torch.dtype
) -> None:
    expected = build(variant)(**inputs).logits
    assert_close(build(variant).to("cuda", dtype)(**on_card(inputs)).logits.float().cpu(), expected, rtol=0, atol=0.05)
    model = build(variant).cuda()
    with torch.autocast("cuda", dtype):
        logits = model(**on_card(inputs)).logits.float().cpu()
        _, gradients = training_step(model, on_card(inputs))
    assert_close(logits, expected, rtol=0, atol=0.05)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients.values())


@pytest.mark.parametrize("variant", ["encoder", "feature"])
def test_compiled_equals_eager(build: Build, inputs: Inputs, variant: str) -> None:
    torch._dynamo.reset()
    model = build(variant).cuda()
    compiled = torch.compile(model)
    assert_close(compiled(**on_card(inputs)).logits, model(**on_card(inputs)).logits, rtol=1e-3, atol=1e-4)
    loss, gradients = training_step(compiled, on_card(inputs))
    expected, wanted = training_step(model, on_card(inputs))
    assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    assert len(gradients) == len(wanted)


@every_variant
def test_activation_checkpointing_gives_equal_gradients(build: Build, inputs: Inputs, variant: str) -> None:
    model = build(variant).cuda()
    _, wanted = training_step(model, on_card(inputs))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.contrastive_loss_weight = 0.0  # evaluation mode has no such term
    for part in model.backbones().values():
        for name in ("attention_dropout", "attention_probs_dropout_prob"):
            if hasattr(part.config, name):
                setattr(part.config, name, 0.0)
    _, gradients = training_step(model, on_card(inputs))
    for name, gradient in wanted.items():
        assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_distributed_training_on_one_card(build: Build, inputs: Inputs, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        model = build("encoder").cuda()
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
        loss, gradients = training_step(wrapped, on_card(inputs))
    finally:
        torch.distributed.destroy_process_group()
    expected, wanted = training_step(build("encoder").cuda(), on_card(inputs))
    assert_close(loss, expected)
    assert {name.removeprefix("module.") for name in gradients} == set(wanted)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Launch a command of scripts/ as a user would."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf")}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def accuracy(folder: Path) -> float:
    return json.loads((folder / "all_results.json").read_text())["test_accuracy"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's training in bfloat16 from end to end."""
    folder = tmp_path_factory.mktemp("sample")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "bf16"]
    run([*launcher, str(ROOT / "scripts/train.py"), "--bf16", "--output_dir", str(folder / "out")], folder)
    return folder


def test_the_sample_trains_in_bfloat16(sample: Path) -> None:
    assert accuracy(sample / "out") >= 0.95


def test_predictions_of_the_card_equal_those_of_the_cpu(sample: Path) -> None:
    posts = next((sample / "hf").glob("clipcacg/sample/posts*"))
    lines: dict[str, list[dict]] = {}
    for device, visible in (("cuda", os.environ.get("CUDA_VISIBLE_DEVICES", "0")), ("cpu", "")):
        command = [sys.executable, str(ROOT / "scripts/predict.py"), str(sample / "out"), "--input", str(posts)]
        environment = {**os.environ, "HF_HOME": str(sample / "hf"), "CUDA_VISIBLE_DEVICES": visible}
        output = sample / f"{device}.jsonl"
        subprocess.run([*command, "--output", str(output)], cwd=sample, env=environment, check=True)
        lines[device] = [json.loads(line) for line in output.read_text().splitlines()]
    for there, here in zip(lines["cuda"], lines["cpu"], strict=True):
        assert there["id"] == here["id"]
        assert there["probabilities"] == pytest.approx(here["probabilities"], abs=5e-3)


def test_cached_features_and_a_repeated_run_on_the_card(tmp_path: Path) -> None:
    flags = ["--max_train_samples", "64", "--max_eval_samples", "64", "--num_train_epochs", "2"]
    flags += ["--freeze_text", "--freeze_vision", "--freeze_clip", "--full_determinism"]
    predictions = []
    for name, more in {"plain": [], "again": [], "cached": ["--cache_features"]}.items():
        command = [sys.executable, str(ROOT / "scripts/train.py"), *flags, *more, "--output_dir", str(tmp_path / name)]
        run(command, tmp_path)
        text = (tmp_path / name / "predictions.jsonl").read_text()
        predictions.append([json.loads(line)["probabilities"] for line in text.splitlines()])
    plain, again, cached = predictions
    assert plain == again
    for one, other in zip(plain, cached, strict=True):
        assert one == pytest.approx(other, abs=2e-2)
