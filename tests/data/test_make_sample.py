"""The sample: its layout and labels, the tiny encoders, and that both are made once, completely and reproducibly."""

import multiprocessing
from collections import Counter
from pathlib import Path
from random import Random

import commands
import pytest
import torch
from PIL import Image

from clipcacg.scripts.data import sample as module
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.sample import make_sample, make_tiny_backbones

FRESH_PROCESS = """
import runpy, sys, warnings
script, folder = sys.argv[1:3]
sys.argv[1:] = [folder, "--num_posts", "3"]
runpy.run_path(script, run_name="__main__")
warnings.simplefilter("error")
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
for name in ("text", "vision", "clip"):
    _, info = AutoModel.from_pretrained(f"{folder}/backbones/{name}", output_loading_info=True)
    assert not any(info.values()), info
    for part, names in ((AutoTokenizer, ("text", "clip")), (AutoImageProcessor, ("vision", "clip"))):
        if name in names:
            print(name, type(part.from_pretrained(f"{folder}/backbones/{name}")).__name__)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def label_pairs(folder: Path) -> list[tuple[str, str]]:
    rows = (folder / "labelResultAll.txt").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "ID\ttext,image"
    return [tuple(row.split("\t")[1].split(",")) for row in rows[1:]]


def test_layout_of_the_posts(tmp_path: Path):
    folder = make_sample(tmp_path / "posts", num_posts=80)
    numbers = range(1, 81)
    expected = {f"data/{number}.{ending}" for number in numbers for ending in ("jpg", "txt")}
    assert set(content(folder)) == expected | {"labelResultAll.txt", module.MARKER}
    texts = [(folder / f"data/{number}.txt").read_bytes() for number in numbers]
    not_utf8 = [text for text in texts if "\ufffd" in text.decode("utf-8", errors="replace")]
    assert 0 < len(not_utf8) < 40
    assert all(text.decode("gb18030").strip() for text in not_utf8)
    sizes = set()
    for number in numbers:
        with Image.open(folder / f"data/{number}.jpg") as image:
            image.load()
            sizes.add(image.size)
    assert len(sizes) > 40 and all(96 <= side <= 160 for size in sizes for side in size)


def test_labels_need_both_modalities(tmp_path: Path):
    counts = Counter(label_pairs(make_sample(tmp_path / "posts", num_posts=400)))
    opposed = {("positive", "negative"), ("negative", "positive")}
    assert sum(counts[pair] for pair in opposed) == 10
    kept = {pair: count for pair, count in counts.items() if pair not in opposed}
    assert len(kept) == 7 and max(kept.values()) - min(kept.values()) <= 1
    for side in (0, 1):
        best: dict[str, Counter] = {}
        for pair, count in kept.items():
            label = pair[0] if pair[1] == "neutral" else pair[1]
            best.setdefault(pair[side], Counter())[label] += count
        assert sum(max(labels.values()) for labels in best.values()) / sum(kept.values()) == pytest.approx(
            5 / 7, abs=0.01
        )


@pytest.mark.parametrize("make", [lambda path, seed: make_sample(path, 20, seed), make_tiny_backbones])
def test_the_seed_decides_every_byte(make, tmp_path: Path):
    torch.manual_seed(5)
    first, again, other = (content(make(tmp_path / name, seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again
    assert first.keys() == other.keys()
    assert first != other
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())


def test_a_finished_sample_is_reused_and_another_replaced(tmp_path: Path):
    folder = make_sample(tmp_path / "posts", num_posts=8)
    stamp = (folder / "data/1.jpg").stat().st_mtime_ns
    assert make_sample(folder, num_posts=8) == folder
    assert (folder / "data/1.jpg").stat().st_mtime_ns == stamp
    assert len(label_pairs(make_sample(folder, num_posts=9))) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".posts.lock", "posts"]


def test_foreign_files_are_left_alone(tmp_path: Path):
    (tmp_path / "posts").mkdir()
    (tmp_path / "posts/mine.txt").write_text("keep")
    with pytest.raises(InputError, match="posts"):
        make_sample(tmp_path / "posts", num_posts=8)
    assert content(tmp_path / "posts") == {"mine.txt": b"keep"}


def test_an_interrupted_run_leaves_no_half_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw_image, drawn = module.draw_image, []

    def draw_three(mood: int, rng: Random) -> Image.Image:
        drawn.append(mood)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw_image(mood, rng)

    monkeypatch.setattr(module, "draw_image", draw_three)
    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path / "posts", num_posts=8)
    assert not (tmp_path / "posts").exists()
    monkeypatch.undo()
    folder = make_sample(tmp_path / "posts", num_posts=8)
    assert content(folder) == content(make_sample(tmp_path / "whole", num_posts=8))
    assert not (tmp_path / ".posts.partial").exists()


def test_two_processes_at_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=make_sample, args=(tmp_path / "posts", 60)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert content(tmp_path / "posts") == content(make_sample(tmp_path / "alone", 60))


def test_a_fresh_process_makes_the_same_sample_and_loads_it_without_a_warning(backbones: Path, tmp_path: Path):
    script = Path(module.__file__).parents[1] / "make_sample.py"
    result = commands.run(["-c", FRESH_PROCESS, script, tmp_path / "new"], tmp_path)
    assert content(tmp_path / "new/backbones") == content(backbones)
    assert len(label_pairs(tmp_path / "new/posts")) == 3
    names = ["RobertaTokenizer", "ConvNextImageProcessor", "CLIPTokenizer", "CLIPImageProcessor"]
    assert [line.split()[1] for line in result.stdout.splitlines()[2:]] == names
    assert not [
        line for line in result.stderr.splitlines() if line and "weights" not in line and "model shards" not in line
    ]
    assert sum(len(data) for data in content(backbones).values()) < 4e6
