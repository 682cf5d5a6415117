"""A page for the browser: add an image and a text, see the predicted sentiment and which inputs it depends on.

A Space runs the same page: `build_demo(checkpoint).launch()`. Uploads are kept for `KEPT_SECONDS` in a folder of the
process, and no request makes the server read another file or fetch an address.
"""

import atexit
import html
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from clipcacg.processing_clipcacg import UNCERTAIN, ClipCaCgProcessor, check_min_confidence, modality_scores
from clipcacg.scripts.data.drawing import draw_image, write_tweet
from clipcacg.scripts.data.errors import InputError, as_input_error
from clipcacg.scripts.reporting.explanation import Explanation, explain, prepare, strongest
from clipcacg.scripts.reporting.overlays import gild, tint
from clipcacg.scripts.reporting.predictions import load_checkpoint

MAX_BYTES = 10 * 2**20  # of an uploaded file
MAX_BODY = 2**20  # bytes of any other request
MAX_PIXELS = 50_000_000  # of an image; they take 150 MB once decoded
MAX_CHARACTERS = 2000
KEPT_SECONDS = 600
HEIGHT = 260  # pixels of a panel with a marked image
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # Pillow reads more, and starts other programs for some
GRADES = {"little": "#fff3cd", "some": "#ffd666", "much": "#e0a100"}  # of attention, with their colours
NOT_NEEDED = ("/proxy=", "/process_recording", "/deep_link", "/vibe-")
INTRODUCTION = """# Sentiment of a post
Add {post}. The page shows the predicted sentiment, what moved the score, and what the model attends to.
Uploads are deleted after ten minutes."""
ATTENTION = "## What the model attends to (attention)\nGolden image regions get more attention."
CONFLICT = "**Conflict: {:.0%}**, the probability that text and image are opposite: one positive, the other negative."
POSTS = {"image": "an image", "text": "a text", "both": "an image and its text"}


class UploadsOnly:
    """Refuse requests that would make the server fetch an address, and routes that this page does not use.

    Gradio itself refuses paths outside its cache and addresses in private networks, but downloads any other address in
    a file's "path" or behind `file=`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        refused = any(name in path for name in NOT_NEEDED) or "://" in path.partition("file=")[2]
        if not refused and scope.get("method") == "POST" and not path.endswith("/upload"):
            body = await read_body(receive)
            refused = len(body) > MAX_BODY or names_address(body)
            receive = partial(replay, [{"type": "http.request", "body": body}], receive)
        await (PlainTextResponse("Not allowed here.", 403) if refused else self.app)(scope, receive, send)


async def read_body(receive: Receive) -> bytes:
    """Read the body of a request, or the beginning of one that is too long."""
    body, more = b"", True
    while more and len(body) <= MAX_BODY:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def replay(messages: list[dict[str, Any]], receive: Receive) -> dict[str, Any]:
    """Receive the messages that were read already, then new ones."""
    return messages.pop() if messages else await receive()


def names_address(body: bytes) -> bool:
    """Whether a JSON body holds an address in place of a file's path."""

    def inside(value: Any) -> bool:
        if isinstance(value, dict):
            return "://" in str(value.get("path")) or any(map(inside, value.values()))
        return isinstance(value, list) and any(map(inside, value))

    try:
        return inside(json.loads(body))
    except (ValueError, RecursionError):
        return bool(body)


def launch_options() -> dict[str, Any]:
    """Options of `launch` that set the limits above. Gradio writes into them, so every page gets its own."""
    return {
        "max_file_size": MAX_BYTES,
        "app_kwargs": {"middleware": [Middleware(UploadsOnly)]},
        "run_history": False,  # it would keep posts in the browser
        "state_session_capacity": 32,  # Gradio keeps 140 KB per visitor, by default of 10,000
        "footer_links": [],
        "ssr_mode": False,
    }


def open_image(upload: dict[str, Any] | None) -> Image.Image | None:
    """Open an uploaded file without decoding it yet.

    Args:
        upload: Gradio's record of the file: "path" is its place in the cache, "orig_name" its name.

    Raises:
        InputError: If it was not uploaded, is gone, is no image, or has too many pixels.
    """
    if not upload:
        return None
    path, cache = Path(upload.get("path") or "").resolve(), Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    if not path.is_relative_to(cache):  # Gradio checks the path only if the request marks it as a file's
        raise InputError("Only images that were added here are read.")
    name = repr((upload.get("orig_name") or "The file")[-60:])
    try:
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise InputError("The image has been deleted: please add it again.") from None
    except Exception as error:  # Pillow's errors for a broken file have no common base class
        raise InputError(f"{name} is not an image in BMP, GIF, JPEG, PNG or WebP.") from error
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels: please make it smaller.")
    image.filename = name  # the processor names it in its errors
    return image


def check_text(text: Any) -> str | None:
    """The text unchanged, or None if it is empty.

    Raises:
        InputError: If it is too long, or not a string.
    """
    if text is not None and not isinstance(text, str):
        raise InputError("The text must be a string.")
    if text and len(text) > MAX_CHARACTERS:
        raise InputError(f"The text has {len(text)} characters; the limit is {MAX_CHARACTERS}.")
    return text if text and text.strip() else None


@torch.inference_mode()
def predict(
    model: Any, processor: Any, image: Image.Image | None, text: str | None, min_confidence: float | None = None
) -> dict[str, Any]:
    """Values of the panels that need one forward pass: the answer, and what the modality heads say."""
    outputs = model(**prepare(model, processor, image, text))
    (answer,) = ClipCaCgProcessor.post_process(outputs.logits, model.config, min_confidence)
    shown = {"label": f"{answer['value']:.3f}" if model.config.task == "regression" else answer["scores"]}
    if answer.get("label") == UNCERTAIN and min_confidence is not None:  # a gr.Label names the highest of its scores
        ranked = sorted(answer["scores"].items(), key=lambda entry: -entry[1])
        listed = ", ".join(f"{html.escape(label)} {score:.0%}" for label, score in ranked)
        shown |= {"label": UNCERTAIN, "unsure": f"No label is as likely as {min_confidence:.0%}: {listed}."}
    if model.config.use_modality_heads:
        (found,) = modality_scores(outputs, model.config)
        shown |= {f"label of the {side}": found[side] for side in ("text", "image")}
        shown["conflict"] = None if found["conflict"] is None else CONFLICT.format(found["conflict"])
    return shown


def signed_words(words: list[str], weights: np.ndarray) -> list[tuple[str, float]]:
    """Words with their weights, scaled to at most 1 in absolute value."""
    limit = np.abs(weights).max(initial=0) or 1
    return [(word, round(float(weight / limit), 3)) for word, weight in zip(words, weights, strict=True)]


def graded_words(words: list[str], weights: np.ndarray) -> list[tuple[str, str]]:
    """Words with a grade of `GRADES`, by thirds of the weight that `gild` shows at full color."""
    full = max(weights.max(initial=0), 2 * weights.mean()) if words else 1
    grades = np.ceil(3 * weights / full).clip(1, 3).astype(int) - 1
    return [(word, list(GRADES)[grade]) for word, grade in zip(words, grades, strict=True)]


def as_image(values: np.ndarray) -> Image.Image:
    """Values in 0 to 1 (height, width, 3) as an image; a small one is enlarged to the height of its panel."""
    image = Image.fromarray((values * 255).astype(np.uint8))
    return image if image.height >= HEIGHT else image.resize((image.width * HEIGHT // image.height, HEIGHT))


def panels(explanation: Explanation) -> dict[str, Any]:
    """Values of the page's panels, by their names in `build_panels`."""
    found, shown = explanation.attribution, {}
    if explanation.gate is not None:
        notes = f"Mean gate (equation 12): {explanation.gate:.2f}. Weight λ of the image's side (equation 15): "
        shown["gate"] = f"{notes}{explanation.balance:.2f}."
    if found.words is not None:
        shown["words"] = signed_words(explanation.words, found.words)
    for encoder, regions in found.regions.items():
        shown[f"regions, {encoder}"] = as_image(tint(regions, strongest(found)))
    if explanation.attention:
        shown["attention"] = ATTENTION
    for side, attention in explanation.attention.items():
        shown[f"{side} to words"] = graded_words(explanation.words, attention.words)
        shown[f"{side} to regions"] = as_image(gild(attention.regions))
    return shown


def build_panels(config: Any, min_confidence: float | None = None) -> dict[str, gr.components.Component]:
    """The panels for a model with this config, by name."""
    both = config.modality == "both"
    shown: dict[str, gr.components.Component] = {"label": gr.Label(label="Sentiment")}
    if min_confidence is not None:
        shown["unsure"] = gr.Markdown()
    if config.use_modality_heads:
        with gr.Row():
            for side in ("text", "image"):
                shown[f"label of the {side}"] = gr.Label(label=f"Sentiment of the {side} alone", min_width=220)
        shown["conflict"] = gr.Markdown()
    gr.Markdown("## What moved the score (attribution)\nRed raises the score of this label, blue or purple lowers it.")
    if "text" in config.modalities:
        shown["words"] = gr.HighlightedText(label="Words that moved the score")
    with gr.Row():
        for name, encoder in (("vision", "the vision encoder"), ("clip", "CLIP")):
            if name in config.encoders:
                label = f"Image regions that moved the score, through {encoder}"
                shown[f"regions, {encoder}"] = image_panel(label)
    if both and config.use_cross_attention:
        shown["attention"] = gr.Markdown(ATTENTION)
        style = {"color_map": GRADES, "show_legend": True, "show_inline_category": False}
        for side in ("text", "image"):
            shown[f"{side} to words"] = gr.HighlightedText(label=f"Words the {side} attends to", **style)
        with gr.Row():
            for side in ("text", "image"):
                shown[f"{side} to regions"] = image_panel(f"Image regions the {side} attends to")
    if both and config.use_gating:
        shown["gate"] = gr.Markdown()
    return shown


def image_panel(label: str) -> gr.Image:
    """Image panel of a heat map."""
    alt_text = f"The marked image: {label}"
    return gr.Image(
        label=label, alt_text=alt_text, interactive=False, buttons=["fullscreen"], min_width=240, height=HEIGHT
    )


def draw_example() -> tuple[Image.Image, str]:
    """Draw a new random post."""
    rng = Random()
    return draw_image(rng.randrange(3), rng), write_tweet(rng.randrange(3), rng).strip()


def build_demo(checkpoint: str, trust_remote_code: bool = False, min_confidence: float | None = None) -> gr.Blocks:
    """Load a checkpoint and build its page, whose limits hold whoever launches it.

    Args:
        checkpoint: Folder or Hub name.
        trust_remote_code: See `load_checkpoint`.
        min_confidence: Probability below which an answer is "uncertain".

    Raises:
        InputError: If the checkpoint cannot be loaded, or `min_confidence` does not fit it.
    """
    use_own_cache()
    model, processor = load_checkpoint(checkpoint, trust_remote_code, dtype=torch.float32)
    if min_confidence is not None:
        with as_input_error("--min_confidence cannot be used", ValueError):
            check_min_confidence(min_confidence, model.config)
    model.requires_grad_(False)
    config = model.config
    page = gr.Blocks(title="Sentiment of a post", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS))
    with page:
        post = "an image, a text, or both" if config.modality_dropout else POSTS[config.modality]
        gr.Markdown(INTRODUCTION.format(post=post))
        with gr.Row():
            with gr.Column(min_width=300):
                reads_image, reads_text = ("image" in config.modalities, "text" in config.modalities)
                image = gr.Image(label="Image", sources=["upload", "clipboard"], height=300, visible=reads_image)
                text = gr.Textbox(label="Text", max_lines=6, max_length=MAX_CHARACTERS, visible=reads_text)
                analyze = gr.Button("Analyze", variant="primary")
                example = gr.Button("Draw an example")
            with gr.Column(min_width=300):
                shown = build_panels(config, min_confidence)

        def answer(image: dict[str, Any] | None, text: str | None) -> Iterator[dict[Any, Any]]:
            """The predicted sentiment at once, its explanation some seconds later; panels of a missing side vanish."""
            try:
                post = open_image(image), check_text(text)
                found = predict(model, processor, *post, min_confidence)
                at_once = {name: found.get(name) for name in shown}
                yield {
                    shown[name]: gr.update(value=value, visible=name not in found or value is not None)
                    for name, value in at_once.items()
                }
                found |= panels(explain(model, processor, *post))
            except InputError as error:
                raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
            yield {
                panel: gr.update(visible=False) if found.get(name) is None else found[name]
                for name, panel in shown.items()
            }

        # preprocess=False: Gradio's own decoding has no limit of pixels and no message for a broken file.
        outputs = list(shown.values())
        how = {"preprocess": False, "show_progress_on": outputs[:2], "api_name": "explain"}
        gr.on([analyze.click, text.submit], answer, [image, text], outputs, **how)
        example.click(draw_example, outputs=[image, text], api_visibility="private")
    page.queue(max_size=20)
    page.launch = partial(page.launch, **launch_options())
    return page


def use_own_cache() -> None:
    """Give Gradio a cache of this process; by default all pages of a machine share one."""
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="demo-")
        atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
