"""The Accelerate configs: what each one asks for, and two processes that train with them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from inputs import SCRIPTS, flags, free_port, make_inputs
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification

CONFIGS = SCRIPTS / "configs" / "accelerate"


def load(name: str) -> ClusterConfig:
    return load_config_from_file(str(CONFIGS / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("single_gpu_bf16", DistributedType.NO, 1),
        ("multi_gpu_ddp", DistributedType.MULTI_GPU, 2),
        ("multi_node_ddp", DistributedType.MULTI_GPU, 16),
        ("fsdp", DistributedType.FSDP, 2),
        ("deepspeed_zero2", DistributedType.DEEPSPEED, 2),
    ],
)
def test_what_each_config_asks_for(name: str, kind: DistributedType, processes: int) -> None:
    config = load(name)
    machines = 2 if name == "multi_node_ddp" else 1
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.mixed_precision == "bf16" and not config.use_cpu
    assert bool(config.fsdp_config) == (name == "fsdp") and bool(config.deepspeed_config) == (
        name == "deepspeed_zero2"
    )


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """Accelerate's plugin, from the FSDP config."""
    fields = dict(load("fsdp").fsdp_config)
    layers = fields.pop("fsdp_transformer_layer_cls_to_wrap").split(",")
    version = fields.pop("fsdp_version")
    fields = {name.removeprefix("fsdp_"): value for name, value in fields.items()}
    return FullyShardedDataParallelPlugin(version, transformer_cls_names_to_wrap=layers, **fields)


def test_fsdp_shards_the_layers_of_the_papers_backbones(tiny_config: Callable[..., ClipCaCgConfig]) -> None:
    plugin = fsdp_plugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT and not plugin.cpu_ram_efficient_loading
    plugin.set_auto_wrap_policy(ClipCaCgForSequenceClassification(tiny_config()))  # an error if a class is missing


@pytest.mark.slow
def test_two_processes_train_with_the_config(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    """On CPUs with gloo. There Accelerate 1.15 silently runs FSDP's config as DDP; the next test shards."""
    config = yaml.safe_load((CONFIGS / "multi_gpu_ddp.yaml").read_text()) | {"use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    more = ["--max_train_samples", "64", "--per_device_train_batch_size", "16", "--use_cpu", "--num_train_epochs", "1"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "config.yaml")]
    launcher += ["--main_process_port", "0"]
    arguments = flags(posts_folder, backbones, tmp_path / "model", *more)
    subprocess.run([*launcher, str(SCRIPTS / "train.py"), *arguments], check=True, cwd=tmp_path, capture_output=True)
    assert json.loads((tmp_path / "model/trainer_state.json").read_text())["global_step"] == 2  # 64 / (2 x 16)
    assert "test_accuracy" in json.loads((tmp_path / "model/all_results.json").read_text())


@pytest.mark.slow
def test_two_machines_train_with_the_config(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    """Two launchers, as on two machines, which meet at an address that is not localhost's."""
    config = yaml.safe_load((CONFIGS / "multi_node_ddp.yaml").read_text()) | {"use_cpu": True, "mixed_precision": "no"}
    config |= {"num_processes": 2, "main_process_ip": "127.0.0.2", "main_process_port": free_port()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    more = ["--max_train_samples", "64", "--per_device_train_batch_size", "16", "--use_cpu", "--num_train_epochs", "1"]
    train = [str(SCRIPTS / "train.py"), *flags(posts_folder, backbones, tmp_path / "model", *more)]
    launchers = []
    for rank in (0, 1):
        launcher = ["-m", "accelerate.commands.launch", "--config_file", "config.yaml", "--machine_rank", str(rank)]
        launchers.append(commands.start([*launcher, *train], tmp_path, errors=tmp_path / f"{rank}.log"))
    for rank, launcher in enumerate(launchers):
        launcher.join()
        assert launcher.exitcode == 0, (tmp_path / f"{rank}.log").read_text()
    assert json.loads((tmp_path / "model/trainer_state.json").read_text())["global_step"] == 2  # 64 / (2 x 16)
    assert "test_accuracy" in json.loads((tmp_path / "model/all_results.json").read_text())


@pytest.mark.slow
def test_a_sharded_model_is_the_same_model(tiny_config: Callable[..., ClipCaCgConfig], tmp_path: Path) -> None:
    """Two processes with gloo. The Accelerator shards on GPUs only; the function it calls works without one."""
    ClipCaCgForSequenceClassification(tiny_config()).save_pretrained(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent / "tests")}
    done = subprocess.run([*torchrun, __file__, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shard_and_compare(folder: str) -> None:
    """One of the two processes: logits, loss and gradients before and after Accelerate's FSDP2 takes the model."""
    torch.distributed.init_process_group("gloo")
    model = ClipCaCgForSequenceClassification.from_pretrained(folder).eval()
    inputs = {**make_inputs([9, 5], [7, 4]), "labels": torch.tensor([0, 2])}
    before = model(**inputs)
    before.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    state = SimpleNamespace(fsdp_plugin=fsdp_plugin())
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    stub = {"mixed_precision": "no", "is_main_process": True, "device": torch.device("cpu"), "torch_device_mesh": mesh}
    names = SimpleNamespace(fsdp_dim_names=["shard"])
    model = fsdp2_prepare_model(SimpleNamespace(state=state, parallelism_config=names, **stub), model)
    after = model(**inputs)
    after.loss.backward()
    assert_close(after.logits, before.logits)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.to_local().numel() <= parameter.numel() // 2 + 64, name
        assert_close(parameter.grad.full_tensor(), gradients[name], msg=name)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    shard_and_compare(sys.argv[1])
