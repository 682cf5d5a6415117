"""Many requests at once, some of them bad: each gets its own answer."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from inputs import ask_page, free_port, upload, wait_for
from transformers import pipeline

from clipcacg.pipeline_clipcacg import ImageTextSentimentPipeline
from clipcacg.processing_clipcacg import ClipCaCgProcessor

REQUESTS, SHARE_BAD = 100, 10  # one in ten is bad


@pytest.fixture(scope="module")
def sentiment(checkpoint: Path) -> ImageTextSentimentPipeline:
    return pipeline("image-text-sentiment", model=str(checkpoint), trust_remote_code=True)


def good_posts(folder: Path, count: int) -> list[dict[str, str]]:
    """Distinct posts, with texts from one word to more than the encoder takes."""
    images = sorted(str(path) for path in (folder / "data").glob("*.jpg"))[:count]
    return [{"image": image, "text": f"post {n} is so nice " * (n % 30)} for n, image in enumerate(images, 1)]


def bad_posts(folder: Path) -> list[Any]:
    """What a client may send by mistake or on purpose."""
    folder.mkdir()
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(200))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>")
    files = [{"image": str(folder / name), "text": "a"} for name in ("cut.jpg", "empty.jpg", "page.jpg", "gone.jpg")]
    others = [{"image": None, "text": "a"}, {"image": 5, "text": "a"}, {"text": "a"}, "a", None]
    return [*files, *others, {"image": files[0]["image"], "text": ["a", "b"]}]


def mixed(good: list[Any], bad: list[Any]) -> list[tuple[str, int]]:
    """The requests in a random order: which list, and the index in it."""
    requests = [("good", n % len(good)) for n in range(REQUESTS - REQUESTS // SHARE_BAD)]
    requests += [("bad", n % len(bad)) for n in range(REQUESTS // SHARE_BAD)]
    random.Random(0).shuffle(requests)
    return requests


def answer(sentiment: ImageTextSentimentPipeline, post: Any) -> Any:
    """Labels with their scores, or class and message of an error that the project raises."""
    try:
        return {entry["label"]: entry["score"] for entry in sentiment(post)}
    except (OSError, TypeError, ValueError) as error:
        return type(error).__name__, str(error)


def same(found: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    if isinstance(expected, dict) and isinstance(found, dict):
        return found == pytest.approx(expected, abs=tolerance)
    return found == expected


def test_the_pipeline_under_many_threads(
    sentiment: ImageTextSentimentPipeline, posts_folder: Path, tmp_path: Path
) -> None:
    good, bad = good_posts(posts_folder, 45), bad_posts(tmp_path / "bad")
    alone = {("good", n): answer(sentiment, post) for n, post in enumerate(good)}
    alone |= {("bad", n): answer(sentiment, post) for n, post in enumerate(bad)}
    assert all(isinstance(scores, dict) == (kind == "good") for (kind, _), scores in alone.items())
    assert len({tuple(scores.values()) for (kind, _), scores in alone.items() if kind == "good"}) == len(good)
    requests = mixed(good, bad)
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda r: answer(sentiment, (good if r[0] == "good" else bad)[r[1]]), requests))
    assert len(found) == REQUESTS == sum(kind == "good" for kind, _ in requests) + REQUESTS // SHARE_BAD
    wrong = [(request, one, alone[request]) for request, one in zip(requests, found, strict=True)]
    assert not [case for case in wrong if not same(case[1], case[2])]


def test_threads_that_ask_for_different_things(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer keeps the padding and limit of its last call; no thread may get those of another."""
    processor, interval = ClipCaCgProcessor.from_pretrained(checkpoint), sys.getswitchinterval()
    keywords = [{}, {"max_length": 10}, {"padding": "max_length", "max_length": 40}, {"pad_to_multiple_of": 8}]
    cases = [({"text": ["so nice " * (n % 59)]}, keywords[n % 4]) for n in range(236)]
    alone = [dict(processor(**text, **more)) for text, more in cases]
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(32) as threads:
            found = list(threads.map(lambda case: dict(processor(**case[0], **case[1])), cases * 5))
    finally:
        sys.setswitchinterval(interval)
    assert found == alone * 5


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the demo."""
    pytest.importorskip("gradio", reason='needs the extra "demo"')
    folder = tmp_path_factory.mktemp("page")
    # With an eighth of the steps: these tests do not look at how exact an attribution is.
    code = (
        "from clipcacg.scripts.reporting import explanation; explanation.N_STEPS = 4\n"
        "from clipcacg.scripts.demo import main; main()"
    )
    url = f"http://127.0.0.1:{free_port()}"
    environment = os.environ | {"TMPDIR": str(folder)}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-c", code, str(checkpoint), "--port", url.rpartition(":")[2]]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_for(url, process, folder / "log")
        yield url
        assert "scripts/" not in (folder / "log").read_text()  # no traceback of the project
    finally:
        process.kill()
        process.wait()


def ask(client: Any, url: str, image: Any, text: Any) -> Any:
    """The label with its scores and the words with their weights, or the message of an error.

    A request that a full queue refuses is repeated a little later.
    """
    while (found := ask_page(url, image, text, client)) == "HTTP 503":
        turned_away.append(text)
        time.sleep(random.random())
    if isinstance(found, str):
        return found
    label, words, *_ = found
    scores = {entry["label"]: entry["confidence"] for entry in label["confidences"]}
    return scores | {f"{n} {word['token']}": word["class_or_confidence"] for n, word in enumerate(words)}


turned_away: list[Any] = []


def page_posts(url: str, posts: Path, bad: Path) -> dict[str, list[tuple[Any, Any]]]:
    """Uploaded images with texts, and what the page refuses."""
    bad_posts(bad)
    images = [upload(url, path) for path in sorted((posts / "data").glob("*.jpg"))[:20]]
    broken = [upload(url, bad / name) for name in ("cut.jpg", "page.jpg")]
    good = [(image, f"post {n} is so nice " * (1 + n % 9)) for n, image in enumerate(images)]
    address = {"path": "http://127.0.0.1/a.png", "meta": {"_type": "gradio.FileData"}}
    refused = [(image, "a") for image in broken] + [(address, "a"), (None, "a"), (images[0], None)]
    return {"good": good, "bad": [*refused, (images[0], "a" * 2001), (images[0], 5), ("x", "a"), (5, 5)]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_under_many_visitors(page: str, posts_folder: Path, tmp_path: Path) -> None:
    posts = page_posts(page, posts_folder, tmp_path / "bad")
    with httpx.Client(timeout=300, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        alone = {(kind, n): ask(client, page, *post) for kind in posts for n, post in enumerate(posts[kind])}
        assert all(isinstance(found, dict) == (kind == "good") for (kind, _), found in alone.items()), alone
        requests = mixed(posts["good"], posts["bad"])
        started = time.monotonic()
        with ThreadPoolExecutor(REQUESTS) as threads:
            found = list(threads.map(lambda r: ask(client, page, *posts[r[0]][r[1]]), requests))
    print(f"{REQUESTS} requests in {time.monotonic() - started:.1f} s, turned away {len(turned_away)} times")
    wrong = [(request, one) for request, one in zip(requests, found, strict=True) if not same(one, alone[request])]
    assert not wrong
    assert turned_away  # the limit of the queue held
