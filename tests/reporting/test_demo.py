"""The demo: what it answers, what it refuses, and how it behaves in a real browser."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from inputs import ask_page, free_port, upload, wait_for
from PIL import Image

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification, masked_mean
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.mvsa import load_mvsa

page_module = pytest.importorskip(
    "clipcacg.scripts.reporting.page", reason='needs the extra "demo"', exc_type=ImportError
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"
TEXT = "Feeling blessed <img src=x onerror=alert(1)> & <b>bold</b> #today"
SIDES = ("text", "image")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def checkpoint(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with everything in it."""
    torch.manual_seed(0)
    names = [backbones / part for part in ("text", "vision", "clip")]
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    ClipCaCgForSequenceClassification.from_backbones(*names, hidden_size=32).save_pretrained(folder)
    ClipCaCgProcessor.from_backbones(*names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image, and files that are no image or too large."""
    folder = tmp_path_factory.mktemp("posts")
    values = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / "good.jpg")
    (folder / "half.jpg").write_bytes((folder / "good.jpg").read_bytes()[:3000])
    (folder / "text <b>.jpg").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    Image.new("1", (9000, 6000)).save(folder / "bomb.png")
    Image.fromarray(values).save(folder / "program.eps")
    return folder


def test_an_answer_below_min_confidence_is_uncertain(checkpoint: Path, posts: Path) -> None:
    model, processor = page_module.load_checkpoint(str(checkpoint))
    with Image.open(posts / "good.jpg") as image:
        usual, unsure, sure = (
            page_module.predict(model, processor, image, TEXT, limit) for limit in (None, 0.99, 0.01)
        )
    assert usual == sure and "unsure" not in usual
    assert unsure["label"] == "uncertain" and unsure["unsure"].startswith("No label is as likely as 99%: ")
    assert all(f"{label} {score:.0%}" in unsure["unsure"] for label, score in usual["label"].items())
    with pytest.raises(
        InputError, match="--min_confidence cannot be used: min_confidence must be from 0 to 1, not 1.5"
    ):
        page_module.build_demo(str(checkpoint), min_confidence=1.5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server puts temporary files."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(checkpoint: Path, cache: Path) -> Iterator[str]:
    """The address of the demo, run as a person would run it. At its end nothing of it must be left."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
    url, log = f"http://127.0.0.1:{free_port()}", cache.parent / "server.log"
    command = [sys.executable, str(SCRIPT), str(checkpoint), "--port", url.rpartition(":")[2]]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=cache.parent, env=env | {"TMPDIR": str(cache)}, stdout=file, stderr=file
        )
    try:
        wait_for(url, process, log)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not [path for path in cache.rglob("*") if path.is_file()]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another server, which the demo must not be made to visit, and the paths that it was asked for."""
    visits: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            visits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", visits
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.slow
def test_a_post_is_answered(server: str, checkpoint: Path, posts: Path) -> None:
    label, words, *_ = ask_page(server, upload(server, posts / "good.jpg"), TEXT)
    inputs = ClipCaCgProcessor.from_pretrained(checkpoint)(images=posts / "good.jpg", text=TEXT, return_tensors="pt")
    model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint)
    expected = model(**inputs).logits.softmax(dim=-1)[0]
    assert label["label"] == model.config.id2label[expected.argmax().item()]
    assert label["confidences"][0]["confidence"] == pytest.approx(expected.max().item(), abs=1e-5)
    assert [word["token"] for word in words] == TEXT.split()
    assert max(abs(word["class_or_confidence"]) for word in words) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("text <b>.jpg", "'text &lt;b&gt;.jpg' is not an image in BMP, GIF, JPEG, PNG or WebP."),
        ("empty.png", "'empty.png' is not an image in BMP, GIF, JPEG, PNG or WebP."),
        ("program.eps", "'program.eps' is not an image in BMP, GIF, JPEG, PNG or WebP."),
        ("bomb.png", "'bomb.png' has more than 50 million pixels: please make it smaller."),
        ("half.jpg", "cannot be read as an image"),
    ],
)
def test_a_bad_file_gets_one_sentence(server: str, posts: Path, name: str, sentence: str) -> None:
    answer = ask_page(server, upload(server, posts / name), TEXT)
    assert sentence in answer and "\n" not in answer and len(answer) < 200
    assert "Traceback" not in answer and "/" not in answer.replace("/b", "")  # no path of the server's


@pytest.mark.slow
def test_a_missing_part_gets_one_sentence(server: str, posts: Path) -> None:
    image = upload(server, posts / "good.jpg")
    assert ask_page(server, None, TEXT) == "This model needs an image."
    assert ask_page(server, image, " \n") == "This model needs a text."
    assert ask_page(server, image, "a" * 2001) == "The text has 2001 characters; the limit is 2000."
    assert ask_page(server, image, {"text": "a"}) == "The text must be a string."
    Path(image["path"]).unlink()
    assert ask_page(server, image, TEXT) == "The image has been deleted: please add it again."


def test_graded_words() -> None:
    grades = [grade for _, grade in page_module.graded_words(["a", "b", "c"], np.array([0.1, 0.3, 0.6]))]
    assert grades == ["little", "some", "much"]
    assert {grade for _, grade in page_module.graded_words(["a", "b"], np.array([0.3, 0.31]))} == {"some"}
    assert page_module.graded_words([], np.zeros(0)) == page_module.signed_words([], np.zeros(0)) == []


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "MPO", "PNG", "WEBP"])
def test_image_formats(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    path = tmp_path / "upload"
    Image.new("P", (30, 20)).convert("RGB").save(path, kind)
    image = page_module.open_image({"path": str(path), "orig_name": "a.b"})
    assert image.convert("RGB").size == (30, 20)


@pytest.mark.slow
def test_no_other_file_is_opened(server: str, posts: Path) -> None:
    """A page that opened these would answer with labels, because they are images, or would say that they are not."""
    mark = {"meta": {"_type": "gradio.FileData"}}
    own = upload(server, posts / "good.jpg")["path"]
    for path in (str(posts / "good.jpg"), f"{own}/../../../../{posts}/good.jpg", "/etc/passwd", "good.jpg"):
        assert ask_page(server, {"path": path, **mark}, TEXT) == "no sentence"
    assert ask_page(server, {"path": f"file://{posts}/good.jpg", **mark}, TEXT) == "HTTP 403"
    assert ask_page(server, {"path": f"file:{posts}/good.jpg", **mark}, TEXT) == "no sentence"
    for path in (str(posts / "good.jpg"), "/etc/passwd", f"{own}/../../../../{posts}/good.jpg", "", "."):
        # Without its mark Gradio does not look at a file's path.
        assert ask_page(server, {"path": path}, TEXT) == "Only images that were added here are read."
    for image in ({"url": "/etc/passwd", **mark}, "/etc/passwd", [own], 7, {}):
        assert isinstance(ask_page(server, image, TEXT), str)
    for path in ("/etc/passwd", str(posts / "good.jpg"), "..%2f..%2fetc/passwd", f"file://{posts}/good.jpg"):
        assert httpx.get(f"{server}/gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.slow
def test_no_address_is_fetched(server: str, posts: Path, elsewhere: tuple[str, list[str]]) -> None:
    address, visits = elsewhere
    mark = {"meta": {"_type": "gradio.FileData"}}
    good = upload(server, posts / "good.jpg")
    metadata = "http://169.254.169.254/latest/meta-data"
    for target in (f"{address}/a.png", metadata, "https://example.com/a.png", "ftp://example.com/a.png"):
        assert ask_page(server, {"path": target, **mark}, TEXT) == "HTTP 403"
        assert ask_page(server, good, {"path": target, **mark}) == "HTTP 403"
        # Gradio itself turns private addresses away here, with words of its own.
        assert httpx.get(f"{server}/gradio_api/file={target}").text == "Not allowed here."
        assert httpx.get(f"{server}/gradio_api/proxy={target}").status_code == 403
        # Beside an upload of one's own an address changes nothing.
        assert isinstance(ask_page(server, {**good, "url": target}, TEXT), list)
    escaped = json.dumps({"data": [{"path": metadata, **mark}, TEXT]}).replace("http", "\\u0068ttp")
    for route in ("call/explain", "run/explain", "api/explain", "queue/join"):
        assert httpx.post(f"{server}/gradio_api/{route}", content=escaped).status_code == 403
    assert not visits


@pytest.mark.slow
def test_size_limits_and_what_is_not_needed(server: str, posts: Path) -> None:
    large = io.BytesIO(b"\xff\xd8" + bytes(page_module.MAX_BYTES))
    response = httpx.post(f"{server}/gradio_api/upload", files={"files": ("large.jpg", large)}, timeout=60)
    assert response.status_code == 413 and "maximum allowed size" in response.text
    body = json.dumps({"data": [None, "a" * page_module.MAX_BODY]})
    assert httpx.post(f"{server}/gradio_api/call/explain", content=body).status_code == 403
    for nested in ("[" * 100_000, '{"a":' * 100_000, "no json"):
        assert httpx.post(f"{server}/gradio_api/call/explain", content=nested).status_code == 403
    assert httpx.post(f"{server}/gradio_api/process_recording", files={"video": b"a"}).status_code == 403
    assert httpx.get(f"{server}/gradio_api/deep_link?session_hash=a").status_code == 403
    assert httpx.get(f"{server}/gradio_api/runs").status_code == 404
    config = httpx.get(f"{server}/config").json()
    assert config["analytics_enabled"] is False


def test_limits_hold_whoever_launches_the_page(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a Space does it, which knows nothing but `build_demo`."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = page_module.build_demo(str(checkpoint))
    assert page.delete_cache == (60, page_module.KEPT_SECONDS) and not page.analytics_enabled
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        assert page.max_file_size == page_module.MAX_BYTES and not page.run_history
        assert httpx.get(f"{url}gradio_api/file=https://example.com/").text == "Not allowed here."
    finally:
        page.close()


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_alone(backbones: Path, posts: Path, tmp_path: Path, modality: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    names = [backbones / part for part in ("text", "vision", "clip")]
    folder = tmp_path / "checkpoint"
    fields = {"modality": modality, "num_labels": 1}
    ClipCaCgForSequenceClassification.from_backbones(*names, hidden_size=32, **fields).save_pretrained(folder)
    ClipCaCgProcessor.from_backbones(*names).save_pretrained(folder)
    page = page_module.build_demo(str(folder))
    shown = {block.label for block in page.blocks.values() if getattr(block, "label", None) and block.visible}
    assert ("Image" in shown) == (modality == "image") and ("Text" in shown) == (modality == "text")
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        image = upload(url.rstrip("/"), posts / "good.jpg") if modality == "image" else None
        label, *_ = ask_page(url.rstrip("/"), image, TEXT if modality == "text" else None)
        float(label["label"])
    finally:
        page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser without a window."""
    if CHROMIUM is None:
        pytest.skip("needs the program chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra test")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (375, 812)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, server: str) -> Iterator[Any]:
    with visit(browser, server, *request.param) as page:
        yield page


@contextmanager
def visit(browser: Any, server: str, width: int, height: int) -> Iterator[Any]:
    """The demo in a new window, which must not contact other servers or run scripts of a text."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page, asked, shouted = context.new_page(), [], []
    page.on("request", lambda asked_for: asked.append(asked_for.url))
    page.on("dialog", lambda dialog: (shouted.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: shouted.append(str(error)))
    page.goto(server)
    page.get_by_label("Text").wait_for()
    yield page
    assert not shouted and not [url for url in asked if not url.startswith((server, "data:", "blob:"))]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def wait_for_images(page: Any) -> None:
    """Wait for four marked images; the browser loads the last one only once it is in view."""
    last = page.get_by_alt_text("The marked image").nth(3)
    last.evaluate("element => element.scrollIntoView()", timeout=60_000)
    last.wait_for(timeout=60_000)


def check_answer(page: Any, tmp_path: Path) -> None:
    """A label, the words as they were typed, and four marked images."""
    wait_for_images(page)
    assert page.locator("[data-testid=label-output-value]").inner_text() in ("negative", "neutral", "positive")
    for words in page.locator(".textfield").all():
        assert words.inner_text().split() == TEXT.split()
    assert not page.locator("img[src='x']").count()
    image = Image.open(io.BytesIO(page.screenshot(path=tmp_path / "page.png", full_page=True)))
    assert image.height > 1000 and len(image.getcolors(2**24)) > 1000


@pytest.mark.slow
def test_with_a_mouse(page: Any, posts: Path, tmp_path: Path) -> None:
    page.locator("input[type=file]").set_input_files(posts / "good.jpg")
    page.locator("img[src*='/file=']").wait_for()
    page.get_by_label("Text").fill(TEXT)
    page.get_by_role("button", name="Analyze").click()
    check_answer(page, tmp_path)


@pytest.mark.slow
def test_with_the_keyboard_alone(page: Any, posts: Path, tmp_path: Path) -> None:
    def tab_to(script: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate(f"(element => {script})(document.activeElement)"):
                return
        raise AssertionError(f"Tab does not reach {script}")

    tab_to("element.ariaLabel?.includes('upload')")
    choosers: list[Any] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    for _ in range(20):  # right after loading a key may come too soon
        page.keyboard.press("Enter")
        page.wait_for_timeout(1000)
        if choosers:
            break
    choosers[0].set_files(posts / "good.jpg")
    page.locator("img[src*='/file=']").wait_for()
    tab_to("element.tagName == 'TEXTAREA'")
    page.keyboard.type(TEXT)
    tab_to("element.innerText == 'Analyze'")
    page.keyboard.press("Enter")
    check_answer(page, tmp_path)


@pytest.mark.slow
def test_bad_files_and_examples(page: Any, posts: Path, tmp_path: Path) -> None:
    page.get_by_label("Text").fill(TEXT)
    page.keyboard.press("Enter")
    page.get_by_text("This model needs an image.").wait_for()
    page.locator("input[type=file]").set_input_files(posts / "text <b>.jpg")
    page.get_by_role("button", name="Analyze").click()
    page.get_by_text("'text <b>.jpg' is not an image in BMP, GIF, JPEG, PNG or WebP.").wait_for()
    page.screenshot(path=tmp_path / "sentence.png")
    page.get_by_role("button", name="Draw an example").click()
    page.locator("img[src*='image.webp']").wait_for()
    page.get_by_role("button", name="Analyze").click()
    wait_for_images(page)


@pytest.fixture(scope="module")
def examples(posts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The posts that the heads of `with_heads` know; their images are larger than the model's input."""
    folder = tmp_path_factory.mktemp("examples")

    def enlarged(row: dict[str, Any]) -> dict[str, Any]:
        row["image"].resize((4 * row["image"].width, 4 * row["image"].height)).save(folder / f"{row['id']}.png")
        return row | {"image": str(folder / f"{row['id']}.png")}

    return [enlarged(row) for row in load_mvsa(posts_folder).select(range(24))]


@pytest.fixture(scope="module")
def with_heads(backbones: Path, examples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers posts of every kind, and knows the sentiment of each text and image of `examples`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("heads") / "checkpoint"
    fields = {"clip_mode": "feature", "use_modality_heads": True, "modality_dropout": 0.1, "hidden_size": 32}
    model = ClipCaCgForSequenceClassification.from_backbones(backbones / "text", backbones / "vision", **fields).eval()
    processor = ClipCaCgProcessor.from_backbones(backbones / "text", backbones / "vision")
    images, texts = ([row[column] for row in examples] for column in ("image", "text"))
    inputs = processor(images=images, text=texts, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        text = masked_mean(outputs.text_hidden_states[0], inputs["attention_mask"].bool())
        image = outputs.image_hidden_states[0].mean(dim=1)
        for head, states, column in (
            (model.modality_heads.text, text, "text_label"),
            (model.modality_heads.image, image, "image_label"),
        ):
            known = torch.cat([states, torch.ones(len(states), 1)], dim=1).double()
            wanted = 10 * torch.nn.functional.one_hot(torch.tensor([row[column] for row in examples]), 3).double()
            solution = torch.linalg.lstsq(known, wanted, driver="gelsd").solution
            head.weight[:], head.bias[:] = solution[:-1].T, solution[-1]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1280, 900), (375, 812)], ids=["desktop", "phone"])
def test_posts_of_every_kind(
    browser: Any, with_heads: Path, examples: list, tmp_path: Path, monkeypatch: Any, size: tuple[int, int]
) -> None:
    """Complete, without an image, without a text, and in conflict: the panels that each has, and what they say."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    demo = page_module.build_demo(str(with_heads))
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True)
    known = {(side, row[f"{side}_label"]): row[side] for row in examples for side in SIDES}
    negative, positive = 0, 2
    happy, sad = known["text", positive], known["image", negative]
    kinds = {
        "complete": (known["image", positive], happy),
        "no image": (None, happy),
        "no text": (sad, None),
        "conflict": (sad, happy),
    }
    try:
        with visit(browser, url.rstrip("/"), *size) as page:
            for kind, (image, text) in kinds.items():
                if kind != "conflict":  # it adds a text to the post without, whose hidden panels come back
                    page.goto(url)
                page.get_by_label("Text").fill(text or "")
                if image is not None and kind != "conflict":
                    page.locator("input[type=file]").set_input_files(image)
                    page.locator("img[src*='/file=']").wait_for()
                page.get_by_role("button", name="Analyze").click()
                maps = {"no image": 0, "no text": 1}.get(kind, 3)
                overlays = page.get_by_alt_text("The marked image")
                if text:
                    page.locator(".textfield").first.wait_for(timeout=60_000)
                for number in range(maps):
                    overlays.nth(number).evaluate("element => element.scrollIntoView()", timeout=60_000)
                    overlays.nth(number).wait_for(timeout=60_000)
                page.screenshot(path=tmp_path / f"{kind}.png", full_page=True)
                assert overlays.count() == maps and page.locator(".textfield").count() == bool(text) * (maps or 1)
                found = page.locator("[data-testid=label-output-value]").all_inner_texts()
                said = {"complete": ["positive"] * 2, "no image": ["positive"], "no text": ["negative"]}
                assert found[1:] == said.get(kind, ["positive", "negative"])
                share = page.get_by_text("Conflict: ")
                if kind in ("complete", "conflict"):
                    percent = int(share.inner_text().split()[1].rstrip("%,"))
                    assert percent > 90 if kind == "conflict" else percent < 10
                captions = [f"{what} the {side} attends to" for what in ("Words", "Image regions") for side in SIDES]
                captions += [f"Sentiment of the {side} alone" for side in SIDES]
                shown = [page.get_by_text(caption).is_visible() for caption in captions]
                if kind not in ("complete", "conflict"):
                    assert shown == [False] * 4 + [bool(text), bool(image)] and not share.is_visible()
                else:
                    assert all(shown)
                    drawn = overlays.nth(1).evaluate("element => [element.naturalWidth, element.naturalHeight]")
                    edge = min(Image.open(image).size)
                    assert drawn == pytest.approx([64 / 73 * edge] * 2, abs=4)  # the crop, in pixels of the upload
    finally:
        demo.close()
