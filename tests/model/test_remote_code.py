"""A checkpoint is complete: where this project is not installed it loads, trains and saves itself again."""

import importlib.util
import inspect
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.utils import HF_MODULES_CACHE

from clipcacg.scripts.data.sample import make_tiny_backbones

ROOT = Path(__file__).parents[2]
CODE = [f"{part}_clipcacg.py" for part in ("configuration", "modeling", "pipeline", "processing")]
MODEL = {"config.json", "model.safetensors", *CODE}
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
PROCESSOR = {"processor_config.json", *TOKENIZER, *(f"clip_tokenizer/{name}" for name in TOKENIZER)}
TRAINER = {"training_args.bin"}
RESUME = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
# What each way to a checkpoint writes. The first generation is saved here, the second from remote code.
FILES = {
    "first/classifier": MODEL | PROCESSOR,
    "first/base": MODEL | PROCESSOR,
    "first/alone": MODEL,
    "second/saved": MODEL,
    "second/trained": MODEL | PROCESSOR | TRAINER,
    "second/run/checkpoint-1": MODEL | PROCESSOR | TRAINER | RESUME,
}
AUTO_MAP = {
    "AutoConfig": "configuration_clipcacg.ClipCaCgConfig",
    "AutoModel": "modeling_clipcacg.ClipCaCgModel",
    "AutoModelForSequenceClassification": "modeling_clipcacg.ClipCaCgForSequenceClassification",
    "AutoProcessor": "processing_clipcacg.ClipCaCgProcessor",
}
HEAD = ["classifier.bias", "classifier.weight"]
# What the functions below use, in a process where this project cannot be imported.
PRELUDE = """
from __future__ import annotations
import sys
sys.modules["clipcacg"] = None  # whoever imports it gets a ModuleNotFoundError
import importlib.util, json, os, pickle, traceback
import torch
import transformers as hf
"""
ANSWER = """
name, *arguments, answer = json.loads(sys.argv[1])
try:
    result = globals()[name](*arguments)
except BaseException:
    result = traceback.format_exc()
with open(answer, "w") as file:
    json.dump(result, file)
"""


def fresh(workdir: Path, calls: dict[str, tuple]) -> dict[str, Any]:
    """Call functions of this file, each in its own process in an empty folder, without the project and its caches.

    Args:
        workdir: For the results.
        calls: Name of the result to the function and its arguments. An exception's result is its traceback.
    """
    (workdir / "empty").mkdir(parents=True)
    code = PRELUDE + "\n".join({inspect.getsource(function): None for function, *_ in calls.values()}) + ANSWER
    answers = {}
    for name, (function, *arguments) in calls.items():
        shutil.rmtree(HF_MODULES_CACHE, ignore_errors=True)
        call = json.dumps([function.__name__, *arguments, workdir / "answer.json"], default=str)
        commands.run(["-c", code, call], workdir / "empty")
        answers[name] = json.loads((workdir / "answer.json").read_text())
    assert not any((workdir / "empty").iterdir())
    return answers


def build(backbones: str, folder: str, posts: dict[str, list[str]]) -> dict[str, Any]:
    """Build on backbones, save a checkpoint of either class, and return what they compute."""
    from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification, __file__
    from clipcacg.processing_clipcacg import ClipCaCgProcessor

    names = {f"{name}_model": f"{backbones}/{name}" for name in ("text", "vision", "clip")}
    processor = ClipCaCgProcessor.from_backbones(**names)
    model = ClipCaCgForSequenceClassification.from_backbones(**names, hidden_size=32)
    for name, part in {"classifier": model, "base": model.model, "alone": model}.items():
        part.save_pretrained(f"{folder}/{name}")
        if name != "alone":
            processor.save_pretrained(f"{folder}/{name}")
    with torch.no_grad():
        outputs = model(**processor(**posts, return_tensors="pt"))
    return {name: outputs[name].tolist() for name in ("logits", "fused_embeds")} | {"file": __file__}


def load_alone(auto_class: str, folder: str) -> str:
    """Load with one Auto class, which finds no code that another has loaded before it."""
    loaded = getattr(hf, auto_class).from_pretrained(folder, trust_remote_code=True)
    return f"{type(loaded).__module__.partition('.')[0]} {type(loaded).__name__}"


def load(folder: str, processor_folder: str, posts: dict[str, list[str]]) -> dict[str, Any]:
    """Load with all Auto classes and return what the models compute, and which of their weights were amiss."""
    result: dict[str, Any] = {"installed": importlib.util.find_spec("clipcacg") is not None}
    result["labels"] = list(hf.AutoConfig.from_pretrained(folder, trust_remote_code=True).id2label.values())
    processor = hf.AutoProcessor.from_pretrained(processor_folder, trust_remote_code=True)
    for auto_class, name in (hf.AutoModel, "fused_embeds"), (hf.AutoModelForSequenceClassification, "logits"):
        model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        result[f"{name} amiss"] = {kind: sorted(keys) for kind, keys in info.items() if keys}
        with torch.no_grad():
            result[name] = model(**processor(**posts, return_tensors="pt"))[name].tolist()
    return result


def train(first: str, second: str, posts: dict[str, list[str]]) -> dict[str, Any]:
    """Save a second generation in two ways: a loaded model as it is, and another after one more step of training."""
    hf.AutoModel.from_pretrained(f"{first}/base", trust_remote_code=True).save_pretrained(f"{second}/saved")
    processor = hf.AutoProcessor.from_pretrained(f"{first}/classifier", trust_remote_code=True)
    auto_class = hf.AutoModelForSequenceClassification
    model = auto_class.from_pretrained(f"{first}/classifier", trust_remote_code=True)

    def collate(rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        images, text = zip(*rows, strict=True)
        return {**processor(images=images, text=text, return_tensors="pt"), "labels": torch.tensor([0, 2])}

    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "save_steps": 1, "learning_rate": 0.01}
    settings |= {"remove_unused_columns": False, "report_to": "none", "use_cpu": True}
    arguments = hf.TrainingArguments(f"{second}/run", **settings)
    rows = list(zip(posts["images"], posts["text"], strict=True))
    trainer = hf.Trainer(model, arguments, collate, rows, processing_class=processor)
    trainer.train()
    trainer.save_model(f"{second}/trained")
    with torch.no_grad():
        return {"logits": model.eval()(**processor(**posts, return_tensors="pt")).logits.tolist()}


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_backbones(tmp_path_factory.getbasetemp() / "backbones")


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    files = [str(tmp_path_factory.mktemp("posts") / f"{colour}.png") for colour in ("red", "gray")]
    for file in files:
        Image.linear_gradient("L").convert("RGB").save(file)
    Image.new("RGB", (90, 70), "red").save(files[0])
    return {"images": files, "text": ["a good day", "what a dull and never ending afternoon"]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def here(backbones: Path, checkpoints: Path, posts: dict) -> dict[str, Any]:
    """What the models compute in this process, which saves the first generation."""
    return build(str(backbones), str(checkpoints / "first"), posts)


@pytest.fixture(scope="module")
def first(here: dict, checkpoints: Path, posts: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first generation loaded elsewhere; the last of these processes saves the second."""
    calls: dict[str, tuple] = {}
    for folder in ("first/classifier", "first/base"):
        calls |= {f"{auto_class} {folder}": (load_alone, auto_class, checkpoints / folder) for auto_class in AUTO_MAP}
        calls[folder] = (load, checkpoints / folder, checkpoints / folder, posts)
    calls["first/alone"] = (load, checkpoints / "first/alone", checkpoints / "first/classifier", posts)
    calls["train"] = (train, checkpoints / "first", checkpoints / "second", posts)
    return fresh(tmp_path_factory.mktemp("elsewhere") / "work", calls)


@pytest.fixture(scope="module")
def second(first: dict, checkpoints: Path, posts: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The second generation loaded elsewhere again."""
    trained = checkpoints / "second/trained"
    calls: dict[str, tuple] = {f"{a} second/trained": (load_alone, a, trained) for a in AUTO_MAP}
    calls |= {f: (load, checkpoints / f, trained, posts) for f in FILES if f.startswith("second")}
    return fresh(tmp_path_factory.mktemp("elsewhere") / "work", calls)


@pytest.mark.parametrize("auto_class", AUTO_MAP)
@pytest.mark.parametrize("folder", ["first/classifier", "first/base", "second/trained"])
def test_each_auto_class_loads_without_the_others(first: dict, second: dict, folder: str, auto_class: str):
    result = (first | second)[f"{auto_class} {folder}"]
    assert result == f"transformers_modules {AUTO_MAP[auto_class].partition('.')[2]}"


@pytest.mark.parametrize("folder", FILES)
def test_a_checkpoint_is_complete_and_no_more(second: dict, checkpoints: Path, folder: str):
    path = checkpoints / folder
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == FILES[folder]
    for name in CODE:
        assert (path / name).read_bytes() == (ROOT / name).read_bytes()
    assert json.loads((path / "config.json").read_text())["auto_map"] == AUTO_MAP
    if "processor_config.json" in FILES[folder]:
        auto_map = json.loads((path / "processor_config.json").read_text())["auto_map"]
        assert auto_map["AutoProcessor"] == AUTO_MAP["AutoProcessor"]


@pytest.mark.parametrize("folder", FILES)
def test_it_computes_the_same_elsewhere(here: dict, first: dict, second: dict, folder: str):
    result = (first | second)[folder]
    assert isinstance(result, dict), result
    assert not result["installed"] and result["labels"] == ["negative", "neutral", "positive"]
    headless = folder in ("first/base", "second/saved")
    assert result["fused_embeds amiss"] == {}
    assert result["logits amiss"] == ({"missing_keys": HEAD} if headless else {})
    trained = folder in ("second/trained", "second/run/checkpoint-1")
    name = "fused_embeds" if headless else "logits"
    expected = first["train"] if trained else here
    torch.testing.assert_close(result[name], expected[name], atol=1e-5, rtol=0)
    if trained:  # the step was not for nothing
        assert max_difference(expected["logits"], here["logits"]) > 1e-3


def max_difference(a: list, b: list) -> float:
    return (torch.tensor(a) - torch.tensor(b)).abs().max().item()


IN_PLACE = """

class InPlaceInit(ClipCaCgForSequenceClassification):
    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.GRU)):
            for parameter in module.parameters(recurse=False):
                parameter.data.normal_()
"""


def changed_weights(folder: str) -> list[str]:
    """Names of the weights that differ from the file after loading."""
    from safetensors.torch import load_file

    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "InPlaceInit"
    saved = load_file(f"{folder}/model.safetensors")
    return [name for name, value in model.state_dict().items() if not torch.equal(value, saved[name])]


def test_a_subclass_in_remote_code_that_initialises_in_place_reloads_every_weight(
    here: dict, checkpoints: Path, tmp_path: Path
):
    folder = shutil.copytree(checkpoints / "first/classifier", tmp_path / "subclass")
    with (folder / "modeling_clipcacg.py").open("a") as file:
        file.write(IN_PLACE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForSequenceClassification"] = "modeling_clipcacg.InPlaceInit"
    (folder / "config.json").write_text(json.dumps(config))
    assert fresh(tmp_path / "work", {"changed": (changed_weights, folder)})["changed"] == []


# What the second generation of the code computes differently.
CHANGES = {
    "configuration_clipcacg.py": ('model_type = "clipcacg"', 'model_type, added = "clipcacg", 100'),
    "modeling_clipcacg.py": ("logits = self.classifier(", "logits = 100 + self.classifier("),
    "processing_clipcacg.py": ("return BatchFeature({", "data['pixel_values'] += 100; return BatchFeature({"),
    "pipeline_clipcacg.py": ('"score": scores', '"score": 100 + scores'),
}


def load_both(folders: list[str], installed: bool, posts: dict[str, list[str]], out: str) -> dict[str, Any]:
    """Load with every Auto class and as a pipeline from each folder in turn; return what each computes and saves."""
    if installed:
        del sys.modules["clipcacg"]
    classes = ("AutoConfig", "AutoProcessor", "AutoModelForSequenceClassification")
    loaded: dict[str, list] = {}
    for folder in folders:
        loaded[folder] = [getattr(hf, name).from_pretrained(folder, trust_remote_code=True) for name in classes]
        loaded[folder].append(hf.pipeline("image-text-sentiment", model=folder, trust_remote_code=True, device=-1))
    rows = [{"image": posts["images"][0], "text": posts["text"][0], "label": 0}]
    batch = loaded[folders[0]][1].collate(rows)
    result = {}
    for folder, (config, processor, model, sentiment) in loaded.items():
        collate = pickle.loads(pickle.dumps(processor.collate))
        computed = [
            getattr(config, "added", 0),
            collate(rows)["pixel_values"].mean().item(),
            model(**batch).logits.mean().item(),
            sentiment(rows[0])[0]["score"],
        ]
        saved = []
        for number, part in enumerate((config, processor, model, sentiment)):
            part.save_pretrained(f"{out}/{number}")
            for name in sorted(os.listdir(f"{out}/{number}")):
                if name.endswith(".py"):
                    saved.append(open(f"{out}/{number}/{name}").read() == open(f"{folder}/{name}").read())
        result[folder] = [["A", "B"][value > 50] for value in computed], saved
    return result


@pytest.mark.parametrize(
    ("order", "installed"),
    [
        ("AB", False),
        ("BA", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("AB", True), ("BA", False), ("ABA", True))),
    ],
)
def test_two_checkpoints_of_different_code_each_run_and_save_their_own(
    order: str, installed: bool, here: dict, checkpoints: Path, posts: dict, tmp_path: Path
):
    folders = {name: str(shutil.copytree(checkpoints / "first/classifier", tmp_path / name / "run")) for name in "AB"}
    for name, (old, new) in CHANGES.items():
        code = Path(folders["B"], name).read_text()
        assert old in code
        Path(folders["B"], name).write_text(code.replace(old, new))
    call = (load_both, [folders[name] for name in order], installed, posts, tmp_path / order)
    result = fresh(tmp_path / "work", {"both": call})["both"]
    assert isinstance(result, dict), result
    for name, folder in folders.items():
        assert result[folder] == [[name] * 4, [True] * 16]
