"""The arithmetic of the benchmark and a smoke test of its sections; no test compares times."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clipcacg.scripts import benchmark
from clipcacg.scripts.bench import SECTIONS, comparison
from clipcacg.scripts.bench.setting import (
    Figure,
    Setting,
    in_turn,
    make_inputs,
    make_posts,
    make_processor,
    ratio,
    text_lengths,
)

KEYS = {
    "fusion_overhead_forward",
    "fusion_overhead_train",
    "train_posts_per_second_bf16",
    "bi_gru_share",
    "bi_gru_over_one_gru",
    "padding_speedup",
    "cache_epoch_speedup",
    "cache_bytes_per_post",
    "processor_speedup",
    "predict_efficiency",
}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path, "tiny", 1, 4, 8)


def test_a_ratio_is_taken_round_by_round() -> None:
    figure = ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0], "a / b")
    assert (figure.value, figure.low, figure.high) == (3.0, 2.0, 4.0)


def test_cases_run_in_turn_and_the_first_round_is_not_counted() -> None:
    ran: list[str] = []
    times = in_turn(2, a=lambda: ran.append("a"), b=lambda: ran.append("b"))
    assert ran == ["a", "b"] * 3 and [len(rounds) for rounds in times.values()] == [2, 2]


def test_texts_have_the_lengths_of_mvsa(setting: Setting) -> None:
    lengths = torch.tensor(text_lengths(4000), dtype=torch.float)
    assert 28 <= lengths.median() <= 33 and 3 <= lengths.min() and lengths.max() <= 130
    posts, processor = make_posts(setting, 30), make_processor(setting)
    tokens = [len(ids) for ids in processor.tokenizer(list(posts["text"]), truncation=True)["input_ids"]]
    assert tokens == [min(128, length) for length in text_lengths(30)]


def run(output: Path, *sections: str) -> dict[str, Any]:
    flags = f"--size tiny --repeats 1 --batch_size 4 --num_posts 8 --output {output}".split()
    benchmark.main([*flags, "--only", *sections])
    return json.loads(output.read_text())


@pytest.mark.slow
def test_a_smoke_run_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    figures = run(
        tmp_path / "bench.json", "fusion", "fusion_bf16", "sharing", "padding", "cache", "images", "prediction"
    )
    assert figures.keys() >= KEYS | {"shared_vision_saving", "shared_text_vision_saving"}
    assert all(figures[key] > 0 for key in KEYS)
    assert figures["padding_difference"] < 1e-5
    printed = capsys.readouterr().out
    assert all(key in printed for key in KEYS)


def test_a_section_that_fails_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(setting: Setting) -> dict[str, Figure]:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(SECTIONS, "sharing", broken)
    with pytest.raises(SystemExit, match="Sections that failed: sharing"):
        run(tmp_path / "bench.json", "sharing", "fusion")
    assert json.loads((tmp_path / "bench.json").read_text())["fusion_overhead_forward"] > 0
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "speed"])
    assert "invalid choice: 'speed' (choose from" in capsys.readouterr().err


@pytest.mark.slow
def test_the_other_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: comparison.OURS[name] for name in ("eager", "bf16", "onnx")}
    monkeypatch.setattr(comparison, "OURS", few)
    monkeypatch.setattr(comparison, "OTHERS", {name: comparison.OTHERS[name] for name in ("dual_encoder", "itin")})
    figures = run(tmp_path / "bench.json", "memory", "alternatives")
    assert figures["peak_memory_ratio"] > 0 < figures["memory_mib_per_post"]
    for name in ("eager", "bf16", "dual_encoder", "itin"):
        assert min(figures[f"{name}_{key}"] for key in ("posts_per_second", "speedup", "peak_memory_mib")) > 0
    assert figures["eager_largest_change"] == 0 < figures["bf16_largest_change"] < 0.1
    assert figures.get("onnx_largest_change", 0) < 1e-4


def test_a_checkpoint_is_compared_with_itself_on_its_posts(
    checkpoint: Path, posts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "OURS", {name: comparison.OURS[name] for name in ("eager", "channels_last")})
    flags = f"--checkpoint {checkpoint} --data_dir {posts_folder} --repeats 1 --batch_size 4".split()
    for wrong, message in (
        (flags, "--checkpoint and --data_dir need --only prediction or alternatives"),
        ([*flags[2:], "--only", "alternatives"], "with a --checkpoint alone"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--only", "prediction", "--checkpoint", "none/at/all"], "There is no checkpoint none/at/all"),
    ):
        with pytest.raises(SystemExit, match=message):
            benchmark.main(wrong)
    output = tmp_path / "bench.json"
    benchmark.main([*flags, "--output", str(output), "--only", "alternatives"])
    figures = json.loads(output.read_text())
    assert figures["channels_last_largest_change"] < 1e-5 and "itin_speedup" not in figures
    batch = comparison.one_batch(Setting(tmp_path, "tiny", 1, 4, 8, str(checkpoint), str(posts_folder)))
    assert len(batch["input_ids"]) == 4 and not {"labels", "text_labels"} & batch.keys()


def test_every_alternative_takes_the_same_posts(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "tiny", repeats=1, batch_size=2, num_posts=2)
    inputs = make_inputs(setting, text_lengths(2))
    for name, build in (comparison.OURS | comparison.OTHERS).items():
        if name not in ("onnx", "int8", "compiled"):  # seconds each
            build(setting, inputs)()
