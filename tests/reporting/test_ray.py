"""The example on Ray Data in scripts/README.md."""

import json
import re
from pathlib import Path

import pyarrow.parquet
import pytest

from clipcacg.scripts.predict import main as predict

ray = pytest.importorskip("ray")
PAGE = (Path(__file__).parents[2] / "scripts/README.md").read_text(encoding="utf-8")
(EXAMPLE,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "import ray" in code)


@pytest.mark.slow
def test_two_workers_of_ray_predict_what_the_command_predicts(
    checkpoint: Path, posts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("outputs", "shards"):
        Path(name).mkdir()
    Path("outputs/sample").symlink_to(checkpoint)
    for shard in range(4):
        numbers = range(10 * shard + 1, 10 * shard + 11)
        posts = [{"id": f"post {n}", "text": f"day {n}", "image": f"{posts_folder}/data/{n}.jpg"} for n in numbers]
        posts[shard] |= {"image": "none.jpg"} if shard == 2 else {}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(posts), f"shards/{shard}.parquet")
    predict(["outputs/sample", "--input", "shards", "--num_workers", "0", "--output", "lines"])
    expected = {line["id"]: line for line in map(json.loads, Path("lines").read_text().splitlines())}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        exec(EXAMPLE, {"__name__": "__main__"})
    finally:
        ray.shutdown()
    found = {row["id"]: row for row in pyarrow.parquet.read_table("predictions_of_ray").to_pylist()}
    assert found.keys() == expected.keys() and len(found) == 40
    assert "none.jpg" in found["post 23"]["error"] and "none.jpg" in expected["post 23"]["error"]
    for post_id in found.keys() - {"post 23"}:
        assert found[post_id]["label"] == expected[post_id]["label"] and found[post_id]["error"] is None
        probabilities = dict(found[post_id]["probabilities"])
        assert probabilities == pytest.approx(expected[post_id]["probabilities"], abs=1e-5)
