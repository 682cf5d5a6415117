"""Encoders and tokenizers with their own code: a checkpoint holds that code, and runs it only where it is trusted."""

import json
import shutil
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from inputs import SCRIPTS
from PIL import Image
from transformers import AutoConfig, BertConfig

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification, ClipCaCgModel
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts import evaluate_checkpoint, train
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.reporting.hub import checkpoint_files
from clipcacg.scripts.reporting.predictions import load_checkpoint

# The text encoder has a model type that transformers knows, as jina-embeddings-v2 has; the vision encoder has not.
CODE = {
    "configuration_words": """
from transformers import PreTrainedConfig

class WordsConfig(PreTrainedConfig):
    model_type = "bert"

    def __init__(self, vocab_size=9, width=8, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.width = vocab_size, width
""",
    "modeling_words": """
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_words import WordsConfig
from .layers_words import Words

class WordsModel(PreTrainedModel):
    config_class = WordsConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = Words(config.vocab_size, config.width)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, attention_mask=None):
        return BaseModelOutput(3 * self.words(input_ids))
""",
    "layers_words": "from torch import nn\n\nclass Words(nn.Embedding):\n    pass\n",
    "tokenization_words": """
from transformers import PreTrainedTokenizerFast

class WordsTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **kwargs):
        return super().__call__([one.replace("good", "bad") for one in text], **kwargs)
""",
    "configuration_pixels": """
from transformers import PreTrainedConfig

class PixelsConfig(PreTrainedConfig):
    model_type = "tiny-pixels"
    image_size = 16
""",
    "modeling_pixels": """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_pixels import PixelsConfig

class PixelsModel(PreTrainedModel):
    config_class = PixelsConfig

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.post_init()

    def forward(self, pixel_values):
        return BaseModelOutput(self.patches(pixel_values))
""",
}
CLASSES = {"text": ("words", "Words"), "vision": ("pixels", "Pixels")}
POST = {"images": "post.png", "text": "a good day"}

# Loads without this package or with it, in a process that has seen nothing of the encoders.
RELOAD = """
import json, sys
if sys.argv[2] == "absent":
    sys.modules["clipcacg"] = None
else:
    import clipcacg
import torch, transformers as hf
folder, answer = sys.argv[1], {}
processor = hf.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images="post.png", text="a good day", return_tensors="pt")
for name, field in ("AutoModel", "fused_embeds"), ("AutoModelForSequenceClassification", "logits"):
    model = getattr(hf, name).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        answer[field] = model(**inputs)[field].tolist()
model.save_pretrained("again")
processor.save_pretrained("again")
answer["again"] = sorted(p.name for p in __import__("pathlib").Path("again").glob("*.py"))
json.dump(answer, open("answer.json", "w"))
"""


def custom_encoder(part: str, backbones: Path, folder: Path) -> Path:
    """A folder of an encoder with its own code, and with the tokenizer and image processor of a tiny one."""
    module, name = CLASSES[part]
    shutil.copytree(backbones / part, folder)
    for file, code in CODE.items():
        if file.endswith(module):
            (folder / f"{file}.py").write_text(code)
    vocab_size = json.loads((backbones / "text/config.json").read_text())["vocab_size"]
    fields: dict[str, Any] = {"vocab_size": vocab_size} if part == "text" else {}
    fields |= {"model_type": "bert" if part == "text" else "tiny-pixels"}
    fields["auto_map"] = {
        "AutoConfig": f"configuration_{module}.{name}Config", "AutoModel": f"modeling_{module}.{name}Model"
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    if part == "text":
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "WordsTokenizer"}
        tokenizer["auto_map"] = {"AutoTokenizer": [None, "tokenization_words.WordsTokenizer"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    from safetensors.torch import save_file

    weights = {"words.weight": torch.randn(vocab_size, 8)}
    if part == "vision":
        weights = {"patches.weight": torch.randn(8, 3, 8, 8), "patches.bias": torch.randn(8)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def encoders(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("custom")
    names: dict[str, Any] = {f"{part}_model": custom_encoder(part, backbones, folder / part) for part in CLASSES}
    return names | {"clip_mode": "none", "trust_remote_code": True}


@pytest.fixture(scope="module")
def checkpoint(encoders: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    model = ClipCaCgForSequenceClassification.from_backbones(**encoders, hidden_size=16, num_attention_heads=2)
    model.save_pretrained(folder)
    ClipCaCgProcessor.from_backbones(**encoders).save_pretrained(folder)
    (folder / "README.md").write_text("# A card that somebody wrote\n")
    return folder


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "post.png")
    return tmp_path


@pytest.mark.parametrize("package", ["absent", "present"])
def test_auto_classes_reload_it_in_a_fresh_process(
    package: str, checkpoint: Path, encoders: dict[str, Any], workdir: Path
) -> None:
    for original in (encoders["text_model"], encoders["vision_model"]):
        original.rename(original.with_name(f"{original.name}, not here"))
    try:
        commands.run(["-c", RELOAD, checkpoint, package], workdir)
    finally:
        for original in (encoders["text_model"], encoders["vision_model"]):
            original.with_name(f"{original.name}, not here").rename(original)
    answer = json.loads((workdir / "answer.json").read_text())
    model, processor = load_checkpoint(str(checkpoint), True)
    inputs = processor(images=workdir / "post.png", text=POST["text"], return_tensors="pt")
    with torch.no_grad():
        expected = {"logits": model(**inputs).logits, "fused_embeds": model.base_model(**inputs).fused_embeds}
    for field, value in expected.items():
        torch.testing.assert_close(torch.tensor(answer[field]), value, atol=1e-6, rtol=0)
    assert {f"{name}.py" for name in CODE} < set(answer["again"]) == {path.name for path in checkpoint.glob("*.py")}


def test_the_commands_run_it_where_it_is_trusted(checkpoint: Path, posts_folder: Path, workdir: Path) -> None:
    words = [SCRIPTS / "predict.py", checkpoint, "--image", "post.png", "--text", POST["text"]]
    printed = commands.run([*words, "--trust_remote_code"], workdir).stdout
    assert json.loads(printed)["label"] in ("negative", "neutral", "positive")
    data = ["--data_dir", posts_folder, "--splits", "random", "--output", workdir / "scores.json"]
    commands.run([SCRIPTS / "evaluate_checkpoint.py", checkpoint, *data, "--trust_remote_code"], workdir)
    assert json.loads((workdir / "scores.json").read_text())["posts"] > 0
    with pytest.raises(SystemExit, match="'bert' has code of its own.*--trust_remote_code"):
        evaluate_checkpoint.main([str(word) for word in (checkpoint, *data)])


def test_training_goes_on_from_it(checkpoint: Path, posts_folder: Path, tmp_path: Path) -> None:
    data = ["--data_dir", str(posts_folder), "--output_dir", str(tmp_path / "out"), "--max_train_samples", "8"]
    start = ["--model_name_or_path", str(checkpoint), "--text_trust_remote_code", "--num_train_epochs", "1"]
    train.main([str(SCRIPTS / "configs" / "sample.yaml"), *data, *start])
    assert (tmp_path / "out" / "layers_words.py").exists()
    load_checkpoint(str(tmp_path / "out"), True)


def test_a_push_takes_their_code_along(checkpoint: Path) -> None:
    assert {f"{name}.py" for name in CODE} < set(checkpoint_files(checkpoint, trust_remote_code=True))
    with pytest.raises(InputError, match="trust_remote_code=True"):
        checkpoint_files(checkpoint)
    (checkpoint / "layers_words.py").rename(checkpoint / "elsewhere")
    try:
        with pytest.raises(InputError, match=r"incomplete: there is no layers_words\.py"):
            checkpoint_files(checkpoint, trust_remote_code=True)
    finally:
        (checkpoint / "elsewhere").rename(checkpoint / "layers_words.py")


def test_untrusted_code_never_runs(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "trap")
    for name in CODE:
        (folder / f"{name}.py").write_text("raise RuntimeError('untrusted code ran')")
    config = AutoConfig.from_pretrained(folder)  # this package is installed, so no code is needed
    config.save_pretrained(tmp_path / "config")
    saved = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "config")]
    assert saved[0]["text_config"] == saved[1]["text_config"] and "auto_map" in saved[0]["vision_config"]
    for load in (ClipCaCgModel.from_pretrained, ClipCaCgForSequenceClassification.from_pretrained):
        with pytest.raises(ValueError, match=r"^The encoder 'bert' has code of its own, which the checkpoint holds"):
            load(folder)


def test_code_that_a_checkpoint_cannot_hold_is_refused(encoders: dict[str, Any], tmp_path: Path) -> None:
    names: dict[str, Any] = encoders | {"hidden_size": 16, "num_attention_heads": 2}
    for part, module in (("text", "words"), ("vision", "pixels")):
        names[f"{part}_model"] = shutil.copytree(encoders[f"{part}_model"], tmp_path / part)
        source = names[f"{part}_model"] / f"modeling_{module}.py"
        text = (names[f"{part}_model"] / "config.json").read_text().replace(f"modeling_{module}", "modeling_ours")
        (names[f"{part}_model"] / "config.json").write_text(text)
        source.rename(source.with_name("modeling_ours.py"))
    with pytest.raises(ValueError, match=r"two files called modeling_ours\.py, but the code of PixelsConfig has one"):
        ClipCaCgModel.from_backbones(**names)


def test_a_custom_model_with_a_config_of_transformers_is_refused(encoders: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(encoders["text_model"], tmp_path / "text")
    BertConfig(auto_map={"AutoModel": "modeling_words.WordsModel"}).save_pretrained(folder)
    with pytest.raises(ValueError, match="has its own model class but no config class"):
        ClipCaCgModel.from_backbones(**encoders | {"text_model": folder})


def test_the_name_of_unused_code_is_not_saved(tmp_path: Path) -> None:
    """A repository may offer code for an encoder that transformers knows; without trust it is not used."""
    text = BertConfig(auto_map={"AutoConfig": "user/name--configuration_words.WordsConfig", "AutoModel": "a.B"})
    ClipCaCgConfig(text_config=text).save_pretrained(tmp_path)
    assert type(ClipCaCgConfig.from_pretrained(tmp_path).text_config) is BertConfig
