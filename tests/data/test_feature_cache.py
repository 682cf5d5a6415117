"""Stored outputs of frozen encoders: same numbers, computed once, never out of date."""

import inspect
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import datasets
import pytest
import torch
from inputs import flags, results
from PIL import Image
from transformers import BertweetTokenizer, MPNetConfig, MPNetModel, RobertaConfig

from clipcacg import processing_clipcacg
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor, label_scores
from clipcacg.scripts import train
from clipcacg.scripts.data import features as feature_cache
from clipcacg.scripts.data import load_posts, reading
from clipcacg.scripts.data.augmentation import Augmentation
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.features import FEATURES, cache_features, key
from clipcacg.scripts.data.labels import label_fields
from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.reporting.predictions import load_checkpoint
from clipcacg.scripts.training import run
from clipcacg.scripts.training.arguments import parse_arguments

MODES = {
    "encoder": {},
    "feature": {"clip_mode": "feature"},
    "none": {"clip_mode": "none"},
    "image": {"modality": "image"},
    "text": {"modality": "text"},
}
NEEDED = {
    "encoder": {"text", "vision", "clip.text", "clip.vision"},
    "feature": {"text", "vision"},
    "none": {"text", "vision"},
    "image": {"vision"},
    "text": {"text"},
}


@pytest.fixture(scope="module")
def posts(posts_folder: Path) -> datasets.DatasetDict:
    return load_posts(DataArguments(data_dir=str(posts_folder), max_train_samples=12, max_eval_samples=5))


@pytest.fixture
def build(backbones: Path) -> Callable[..., tuple[ClipCaCgForSequenceClassification, ClipCaCgProcessor]]:
    """A function that builds a small frozen model and its processor."""

    def make(**config: object) -> tuple[ClipCaCgForSequenceClassification, ClipCaCgProcessor]:
        torch.manual_seed(0)
        names = [backbones / part for part in ("text", "vision", "clip")]
        if {"clip_mode", "modality"} & config.keys():
            names.pop()
        model = ClipCaCgForSequenceClassification.from_backbones(
            *names, hidden_size=32, num_attention_heads=4, **config
        )
        model.freeze_backbones(text=True, vision=True, clip=True)
        return model, ClipCaCgProcessor.from_backbones(*names)

    return make


@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"), [*((mode, "float32", 1e-5) for mode in MODES), ("encoder", "float16", 5e-3)]
)
def test_logits_from_the_cache_are_those_of_the_posts(
    mode: str,
    dtype: str,
    tolerance: float,
    build: Callable,
    posts: datasets.DatasetDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = build(**MODES[mode])
    cached, stores = cache_features(model, processor, posts, dtype, tmp_path)
    assert set(stores) == NEEDED[mode]
    direct = model(**PostCollator(processor, model.config)(list(posts["train"])))
    monkeypatch.setattr(reading, "image_source", lambda value: pytest.fail("an image was read"))
    collator = pickle.loads(pickle.dumps(PostCollator(processor, model.config, stores)))  # as for a worker process
    batch = collator(list(cached["train"]))
    from_cache = model(**batch)
    assert not {FEATURES[name].input for name in stores} & set(batch)
    torch.testing.assert_close(from_cache.logits, direct.logits, atol=tolerance, rtol=0)
    torch.testing.assert_close(from_cache.loss, direct.loss, atol=tolerance, rtol=0)


@pytest.mark.parametrize("mode", ["encoder", "feature"])
def test_posts_that_lack_a_text_or_an_image(
    mode: str, build: Callable, posts: datasets.DatasetDict, tmp_path: Path
) -> None:
    """Beside other posts, and in a batch in which none has a text."""
    model, processor = build(modality_dropout=0.1, **MODES[mode])
    for missing in model.modules():
        if type(missing).__name__ == "MissingModality":
            torch.nn.init.normal_(missing.text)
            torch.nn.init.normal_(missing.image)
    kept, feature = posts["test"].select(range(3)), posts["test"].features["image"]
    some = kept.remove_columns(["text", "image"]).add_column("text", ["", *kept["text"][1:]])
    some = some.add_column("image", [*kept["image"][:2], None], feature=feature)
    cached, stores = cache_features(model, processor, datasets.DatasetDict(train=some), folder=tmp_path)
    plain, stored = PostCollator(processor, model.config), PostCollator(processor, model.config, stores)
    for rows in ((0, 1, 2), (0,), (2,)):
        with torch.no_grad():
            expected = model(**plain([some[row] for row in rows])).logits
            found = model(**stored([cached["train"][row] for row in rows])).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_only_what_is_frozen_is_cached(build: Callable, posts: datasets.DatasetDict, tmp_path: Path) -> None:
    model, processor = build(clip_mode="feature")
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="--freeze_text"):
        cache_features(model, processor, posts, folder=tmp_path)
    model.freeze_backbones(vision=True)
    cached, stores = cache_features(model, processor, posts, folder=tmp_path)
    batch = PostCollator(processor, model.config, stores)(list(cached["test"]))
    assert set(batch) == {"input_ids", "attention_mask", "image_features", "labels"}


def test_the_output_of_frozen_text_layers_is_stored(
    build: Callable, posts: datasets.DatasetDict, tmp_path: Path
) -> None:
    model, processor = build(modality="text")
    keys = {key(model, processor, "text", "float32")}
    for number in (0, 1):
        model.requires_grad_(True)
        model.freeze_backbones(text_layers=number)
        keys.add(key(model, processor, "text", "float32"))
    assert len(keys) == 2, "one for a whole encoder, one for its first layer"
    cached, stores = cache_features(model, processor, posts, folder=tmp_path)
    batch = PostCollator(processor, model.config, stores)(list(cached["train"]))
    assert "input_ids" not in batch
    direct = model(**PostCollator(processor, model.config)(list(posts["train"])))
    torch.testing.assert_close(model(**batch).logits, direct.logits, atol=1e-5, rtol=0)


def test_frozen_layers_run_where_an_encoder_cannot_continue_from_their_output(
    build: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = build(clip_mode="none")
    config = MPNetConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    model.model.text_branch.backbone = MPNetModel(config)
    model.freeze_backbones(text_layers=1)
    assert feature_cache.frozen_backbones(model) == ["vision"]
    assert "the text encoder mpnet cannot continue" in caplog.text


def test_each_text_and_image_is_computed_once(
    build: Callable, posts: datasets.DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: dict[str, int] = {}
    original = feature_cache.outputs

    def counting(model: object, backbone: str, inputs: torch.Tensor, mask: torch.Tensor | None) -> object:
        computed[backbone] = computed.get(backbone, 0) + len(inputs)
        return original(model, backbone, inputs, mask)

    monkeypatch.setattr(feature_cache, "outputs", counting)
    model, processor = build()
    twice = datasets.concatenate_datasets([posts["train"], posts["train"]])
    posts = datasets.DatasetDict(posts, train=twice)
    cached, _ = cache_features(model, processor, posts, folder=tmp_path)
    unique = {
        column: len({digest for split in cached.values() for digest in split[f"{column}_digest"]})
        for column in ("text", "image")
    }
    assert computed == {name: unique[feature.column] for name, feature in FEATURES.items()}
    cache_features(model, processor, posts, folder=tmp_path)
    ablation, _ = build(modality="image")
    cache_features(ablation, processor, posts, folder=tmp_path)
    assert computed == {name: unique[feature.column] for name, feature in FEATURES.items()}


def test_another_image_under_the_same_name_is_computed_anew(build: Callable, tmp_path: Path) -> None:
    model, processor = build(modality="image")
    rows = {"image": [str(tmp_path / "a.png")], "label": [0]}
    values = []
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "a.png")
        posts = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
        cached, stores = cache_features(model, processor, datasets.DatasetDict(test=posts), folder=tmp_path)
        values.append(PostCollator(processor, model.config, stores)(list(cached["test"]))["image_features"])
    assert not torch.allclose(*values)


def test_the_key_changes_with_everything_the_outputs_depend_on(
    build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build()
    keys = {name: key(model, processor, name, "float32") for name in FEATURES}
    processor(images=Image.new("RGB", (20, 30)), text="used a little", return_tensors="pt")
    assert keys == {name: key(model, processor, name, "float32") for name in FEATURES}
    assert key(model, processor, "text", "float16") != keys["text"]

    with monkeypatch.context() as patch:
        for library in feature_cache.LIBRARIES:
            patch.setattr(
                feature_cache, "version", lambda name, changed=library: "0" if name == changed else version(name)
            )
            assert key(model, processor, "text", "float32") != keys["text"], library
    with monkeypatch.context() as patch:
        changed, original = tmp_path / "code.py", inspect.getfile
        source = Path(processing_clipcacg.__file__).read_text()
        patch.setattr(
            feature_cache.inspect,
            "getfile",
            lambda thing: str(changed) if thing is ClipCaCgProcessor else original(thing),
        )
        changed.write_text("# A comment.\n" + source.replace('"""', '"""Reworded: ', 1))
        assert key(model, processor, "vision", "float32") == keys["vision"]
        changed.write_text(source + "\nNO_LIMIT = 1\n")
        assert key(model, processor, "vision", "float32") != keys["vision"]

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again = ClipCaCgForSequenceClassification.from_pretrained(tmp_path / "saved")
    reloaded = ClipCaCgProcessor.from_pretrained(tmp_path / "saved")
    assert keys == {name: key(again, reloaded, name, "float32") for name in FEATURES}

    reloaded.tokenizer.truncation_side = "left"
    assert key(again, reloaded, "text", "float32") != keys["text"]
    reloaded.clip_image_processor.size = {"shortest_edge": 900}  # a large JPEG is then decoded at another scale
    assert key(again, reloaded, "vision", "float32") != keys["vision"]
    processor.tokenizer.model_max_length = 9
    assert key(model, processor, "text", "float32") != keys["text"]
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert key(model, processor, "vision", "float32") != keys["vision"]
    assert key(model, processor, "clip.vision", "float32") == keys["clip.vision"]
    with torch.no_grad():
        next(model.backbones()["clip.text"].parameters()).view(-1)[0] += 1e-3
    assert key(model, processor, "clip.text", "float32") != keys["clip.text"]
    model.backbones()["clip.vision"].config.hidden_act = "gelu"
    assert key(model, processor, "clip.vision", "float32") != keys["clip.vision"]


def test_an_interrupted_run_continues(
    build: Callable, posts: datasets.DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "POSTS_PER_FILE", 1)  # a file after every batch
    model, processor = build(modality="image")
    original, calls = feature_cache.outputs, []

    def interrupted(*arguments: object) -> object:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments)

    many = datasets.DatasetDict(train=datasets.concatenate_datasets([numbered_images(tmp_path, 40)]))
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "outputs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache_features(model, processor, many, folder=tmp_path / "cache")
    counted = []
    monkeypatch.setattr(feature_cache, "outputs", lambda m, b, i, k: counted.append(len(i)) or original(m, b, i, k))
    cached, stores = cache_features(model, processor, many, folder=tmp_path / "cache")
    assert sum(counted) == 8, "32 of the 40 were there"
    assert all(digest in stores["vision"] for digest in cached["train"]["image_digest"])


def numbered_images(folder: Path, count: int) -> datasets.Dataset:
    paths = [str(folder / f"{number}.png") for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(path)
    rows = {"id": list(map(str, range(count))), "image": paths, "label": [0] * count}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))


def fill_in_process(backbones: Path, folder: Path, posts_folder: Path, counts: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = [backbones / part for part in ("text", "vision")]
    model = ClipCaCgForSequenceClassification.from_backbones(*names, clip_mode="none")
    model.freeze_backbones(text=True, vision=True)
    original, counted = feature_cache.outputs, []
    feature_cache.outputs = lambda m, b, i, k: counted.append(len(i)) or original(m, b, i, k)
    posts = load_posts(DataArguments(data_dir=str(posts_folder)))
    cache_features(model, ClipCaCgProcessor.from_backbones(*names), posts, folder=folder)
    counts.put(sum(counted))


def test_two_processes_at_a_time_share_the_work(backbones: Path, posts_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    arguments = (backbones, tmp_path, posts_folder, counts)
    processes = [context.Process(target=fill_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    computed = counts.get(timeout=120) + counts.get(timeout=120)
    for process in processes:
        process.join()
    posts = load_posts(DataArguments(data_dir=str(posts_folder)))
    texts = {text for split in posts.values() for text in split["text"]}
    images = {Path(value["path"]).read_bytes() for split in posts.values() for value in split["image"]}
    assert computed == len(texts) + len(images)
    assert not list(tmp_path.glob("*/tmp*"))


def test_training_from_the_cache_gives_the_same_scores_and_a_whole_checkpoint(
    posts_folder: Path, backbones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "CACHE_FOLDER", tmp_path / "cache")
    text = tmp_path / "text"
    shutil.copytree(backbones / "text", text)
    # The stored layers have no dropout, so the others must have none for equal scores.
    RobertaConfig.from_pretrained(text, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(
        text
    )
    few = {"max_train_samples": 32, "max_eval_samples": 16}
    short = ["--text_model", str(text), "--num_train_epochs", "1", "--freeze_text_layers", "1"]
    short += ["--freeze_vision_blocks", "2"]
    short += [*(word for name, number in few.items() for word in (f"--{name}", str(number))), "--clip_mode", "none"]
    for name, more in (("direct", []), ("cached", ["--cache_features"])):
        train.main(flags(posts_folder, backbones, tmp_path / name, *short, *more))
    direct, cached = results(tmp_path / "direct"), results(tmp_path / "cached")
    for score in ("accuracy", "f1", "f1_macro", "loss"):
        assert cached[f"eval_{score}"] == pytest.approx(direct[f"eval_{score}"], abs=1e-4)
        assert cached[f"test_{score}"] == pytest.approx(direct[f"test_{score}"], abs=1e-4)

    lines = [json.loads(line) for line in (tmp_path / "cached/predictions.jsonl").open()]
    model, processor = load_checkpoint(tmp_path / "cached")
    posts = load_posts(DataArguments(data_dir=str(posts_folder), **few))["test"]
    logits = model(**PostCollator(processor, model.config)(list(posts))).logits
    probabilities = label_scores(logits, model.config)
    assert [line["probabilities"]["positive"] for line in lines] == pytest.approx(
        probabilities[:, 2].tolist(), abs=1e-3
    )


def test_images_that_change_or_are_remote_are_refused(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--augment"):
        train.main(flags(posts_folder, backbones, tmp_path, "--freeze_vision", "--cache_features", "--augment"))
    with pytest.raises(ValueError, match="https://example.org/a.jpg"):
        feature_cache.image_bytes({"bytes": None, "path": "https://example.org/a.jpg"})


def test_training_draws_from_the_stored_views_and_evaluation_from_none(
    posts_folder: Path, backbones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "CACHE_FOLDER", tmp_path / "cache")
    words = "--augment --augment_views 3 --cache_features --freeze_text_layers 1 --clip_mode none --freeze_vision"
    parsed = parse_arguments(flags(posts_folder, backbones, tmp_path, *words.split(), "--max_train_samples", "8"))
    model_arguments, data_arguments, arguments = parsed
    posts = run.load_training_posts(model_arguments, data_arguments, arguments)
    model, processor = run.build(model_arguments, data_arguments.is_sample, label_fields(posts["train"]))
    posts, stores = run.compute_features(arguments, model_arguments, model, processor, posts)
    trainer = run.make_trainer(arguments, model, processor, posts, stores)

    post, row = posts["train"][0], trainer.train_dataset[0]
    drawn = {trainer.train_dataset[0]["image_digest"] for _ in range(40)}
    assert drawn == {f"{post['image_digest']}-{view}" for view in range(3)} and row["text"] == post["text"]
    views = [stores["vision"][name] for name in sorted(drawn)]
    assert len({tuple(view.flatten().tolist()) for view in [*views, stores["vision"][post["image_digest"]]]}) > 2
    with torch.random.fork_rng():
        torch.manual_seed(int(post["image_digest"][:8], 16) + 1)
        changed = Augmentation(processor).augment_image(post["image"])
    pixels = processor(images=[changed], return_tensors="pt")["pixel_values"]
    assert torch.allclose(model.encode("vision", pixels)[0], views[1], atol=1e-5)

    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(8)])
    assert batch["text_features"].shape[:2] == batch["attention_mask"].shape and "pixel_values" not in batch
    held_out = trainer.data_collator([trainer.eval_dataset[0]])
    assert torch.equal(held_out["image_features"][0], stores["vision"][posts["validation"][0]["image_digest"]])
    assert f"{posts['validation'][0]['image_digest']}-0" not in stores["vision"]


def test_an_output_too_large_for_the_dtype_is_reported(
    build: Callable, posts: datasets.DatasetDict, tmp_path: Path
) -> None:
    model, processor = build(modality="text")
    norm = [m for m in model.backbones()["text"].modules() if isinstance(m, torch.nn.LayerNorm)][-1]
    torch.nn.init.constant_(norm.bias, 1e6)
    with pytest.raises(ValueError, match="--cache_dtype float32"):
        cache_features(model, processor, posts, "float16", tmp_path)


def test_a_post_that_cannot_be_read_is_named(build: Callable, tmp_path: Path) -> None:
    model, processor = build(modality="image")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    Image.new("RGB", (40, 30)).save(tmp_path / "good.jpg")
    images = [{"path": str(tmp_path / f"{name}.jpg"), "bytes": None} for name in ("good", "bad")]
    table = datasets.Dataset.from_dict({"id": ["7", "8"], "image": images})
    rows = datasets.DatasetDict(train=table.cast_column("image", datasets.Image(decode=False)))
    with pytest.raises(InputError, match=r"^post 8: .*bad\.jpg"):
        cache_features(model, processor, rows, folder=tmp_path)


def test_a_broken_file_of_the_cache_is_named(build: Callable, posts: datasets.DatasetDict, tmp_path: Path) -> None:
    model, processor = build(modality="image")
    cache_features(model, processor, posts, folder=tmp_path)
    part = next(tmp_path.glob("*/*.safetensors"))
    part.write_bytes(part.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{part.name} is broken. Delete it"):
        cache_features(model, processor, posts, folder=tmp_path)


def test_leftovers_of_killed_processes_are_removed(
    build: Callable, posts: datasets.DatasetDict, tmp_path: Path
) -> None:
    model, processor = build(modality="image")
    _, stores = cache_features(model, processor, posts, folder=tmp_path)
    (stores["vision"].folder / "partial-left").mkdir()
    _, stores = cache_features(model, processor, posts, folder=tmp_path)
    assert not list(stores["vision"].folder.glob("partial-*"))


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_keeps_its_training_mode(
    mode: bool, build: Callable, posts: datasets.DatasetDict, tmp_path: Path
) -> None:
    model, processor = build(modality="text")
    cache_features(model.train(mode), processor, posts, folder=tmp_path)
    assert model.training is mode


def test_bytes_of_an_image_are_read_like_its_file(build: Callable, tmp_path: Path) -> None:
    """A large JPEG, which is decoded at a fraction of its size, from a path and from the bytes of a Parquet file."""
    _, processor = build()
    path = tmp_path / "large.jpg"
    Image.effect_noise((800, 640), 90).convert("RGB").save(path)
    values = [{"path": str(path), "bytes": None}, {"path": "large.jpg", "bytes": path.read_bytes()}]
    views = [processor(images=feature_cache.image_source(value), return_tensors="pt") for value in values]
    for name in ("pixel_values", "clip_pixel_values"):
        assert torch.equal(views[0][name], views[1][name])


def test_a_tokenizer_without_a_fast_form_has_a_key(build: Callable, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a 1\nb 2\n")
    (tmp_path / "bpe.codes").write_text("a b 3\n")
    model, processor = build(clip_mode="none")
    processor.tokenizer = BertweetTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))
    assert not processor.tokenizer.is_fast
    before = key(model, processor, "text", "float32")
    assert before == key(model, processor, "text", "float32")
    (tmp_path / "vocab.txt").write_text("a 1\nc 2\n")
    processor.tokenizer = BertweetTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))
    assert key(model, processor, "text", "float32") != before


def test_an_interrupted_write_leaves_no_file(
    build: Callable, posts: datasets.DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build(modality="image")

    def interrupted(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "save_file", interrupted)
        with pytest.raises(InputError, match="cannot be written to .*: No space left"):
            cache_features(model, processor, posts, folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    cached, stores = cache_features(model, processor, posts, folder=tmp_path)
    assert all(digest in stores["vision"] for digest in cached["train"]["image_digest"])
