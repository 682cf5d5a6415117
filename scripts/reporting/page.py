"""Try a model in the browser: drop a picture, type a text, see what the model says and what it looks at.

    python scripts/demo.py CHECKPOINT

Needs the extra `demo`. A Space of the Hub runs the same page: `build_demo(checkpoint).launch()`. Nothing is kept:
uploads lie in a folder of the process's own for `KEPT_SECONDS`, and no request makes the server read any other file or
fetch an address.
"""

import atexit
import html
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from transformers import HfArgumentParser

from clipcacg.scripts.reporting.explanation import (
    Explanation,
    explain,
    light_up,
    load_checkpoint,
    prepare,
    read_scores,
    strongest,
    tint,
)

try:
    from clipcacg.scripts.data.drawing import draw_image, write_tweet
except ImportError:  # a Space has only this file and explain.py
    draw_image = None

MAX_BYTES = 10 * 2**20  # of a file
MAX_BODY = 2**20  # bytes of any other request
MAX_PIXELS = 50_000_000  # of a picture, which take 150 MB once decoded
MAX_CHARACTERS = 2000
KEPT_SECONDS = 600
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # of all that Pillow reads; for some it starts other programs
GRADES = {"little": "#fff3cd", "some": "#ffd666", "much": "#e0a100"}  # of attention, and their colours
NOT_NEEDED = ("/proxy=", "/process_recording", "/deep_link", "/vibe-")
INTRODUCTION = """# The sentiment of a post
Add a picture and its text. Where the model looks and what moves its score are two things, shown one after the other.
Uploads are deleted after ten minutes."""


@dataclass
class DemoArguments:
    """Where the page is served."""

    share: bool = field(default=False, metadata={"help": "Also under a public gradio.live address."})
    port: int | None = field(default=None, metadata={"help": "Port; left out: the first free one from 7860 on."})


class UploadsOnly:
    """Refuse requests that would have the server fetch an address, or do what this page has no use for.

    Gradio itself turns away paths outside its cache and addresses of private networks, but would download any other
    address, from a file's "path" or behind `file=`.
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
    """The body of a request, or what came of it when it grew too long."""
    body, more = b"", True
    while more and len(body) <= MAX_BODY:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def replay(messages: list[dict[str, Any]], receive: Receive) -> dict[str, Any]:
    """What was read already, then what comes after it."""
    return messages.pop() if messages else await receive()


def names_address(body: bytes) -> bool:
    """Whether a JSON body has an address where a file's path belongs."""

    def inside(value: Any) -> bool:
        if isinstance(value, dict):
            return "://" in str(value.get("path")) or any(map(inside, value.values()))
        return isinstance(value, list) and any(map(inside, value))

    try:
        return inside(json.loads(body))
    except (ValueError, RecursionError):
        return bool(body)


def launch_options() -> dict[str, Any]:
    """What `launch` needs to keep the promises above; Gradio writes into it, so every page gets one of its own."""
    return {
        "max_file_size": MAX_BYTES,
        "app_kwargs": {"middleware": [Middleware(UploadsOnly)]},
        "run_history": False,  # would keep posts in the browser
        "state_session_capacity": 32,  # a visitor has no state here, yet Gradio would hold 140 KB of each of 10,000
        "footer_links": [],
        "ssr_mode": False,
    }


def open_picture(upload: dict[str, Any] | None) -> Image.Image | None:
    """Open an uploaded file without decoding it yet.

    Args:
        upload: What Gradio knows of the file: its "path" in the cache, and "orig_name", as the visitor calls it.

    Raises:
        ValueError: If it was not uploaded, is gone, no picture, or has too many pixels.
    """
    if not upload:
        return None
    path, cache = Path(upload.get("path") or "").resolve(), Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    if not path.is_relative_to(cache):  # Gradio looks at the path only if the request says that it is a file's
        raise ValueError("Only pictures that were added here are read.")
    name = repr((upload.get("orig_name") or "The file")[-60:])
    try:
        picture = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise ValueError("The picture was deleted meanwhile: please add it again.") from None
    except Exception as error:  # what a broken file makes Pillow raise has no common type
        raise ValueError(f"{name} is not a picture in BMP, GIF, JPEG, PNG or WebP.") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels: please make it smaller.")
    picture.filename = name  # for the message if it turns out to be broken
    return picture


def check_text(text: Any) -> str | None:
    """The text as it was typed, or None if there is none.

    Raises:
        ValueError: If it is too long, or no text.
    """
    if text is not None and not isinstance(text, str):
        raise ValueError("The text must be a string.")
    if text and len(text) > MAX_CHARACTERS:
        raise ValueError(f"The text has {len(text)} characters: please keep to {MAX_CHARACTERS}.")
    return text if text and text.strip() else None


@torch.inference_mode()
def predict(model: Any, processor: Any, picture: Image.Image | None, text: str | None) -> dict[str, float] | str:
    """Probabilities by label, or the value of a regression, as `gr.Label` takes them."""
    scores = read_scores(model(**prepare(model, processor, picture, text)).logits[0], model.config)
    return f"{scores['value']:.3f}" if "value" in scores else scores


def signed_words(words: list[str], weights: np.ndarray) -> list[tuple[str, float]]:
    """Words with their weights, the strongest of which is 1 or -1."""
    limit = np.abs(weights).max(initial=0) or 1
    return [(word, round(float(weight / limit), 3)) for word, weight in zip(words, weights, strict=True)]


def graded_words(words: list[str], weights: np.ndarray) -> list[tuple[str, str]]:
    """Words with one of the names in `GRADES`, by thirds of what `light_up` takes for full light."""
    full = max(weights.max(initial=0), 2 * weights.mean()) if words else 1
    grades = np.ceil(3 * weights / full).clip(1, 3).astype(int) - 1
    return [(word, list(GRADES)[grade]) for word, grade in zip(words, grades, strict=True)]


def as_picture(values: np.ndarray) -> Image.Image:
    """Values in 0 to 1 (height, width, 3) as a picture, a small one enlarged."""
    times = max(1, 224 // min(values.shape[:2]))
    return Image.fromarray((values * 255).astype(np.uint8).repeat(times, axis=0).repeat(times, axis=1))


def panels(explanation: Explanation) -> dict[str, Any]:
    """What the panels of the page show, by their names in `build_panels`."""
    found, shown = explanation.attribution, {}
    if explanation.gate is not None:
        notes = f"The gate is at {explanation.gate:.2f} on average, λ, the weight of the picture's side, at "
        shown["gate"] = f"{notes}{explanation.balance:.2f}."
    if found.words is not None:
        shown["words"] = signed_words(explanation.words, found.words)
    for encoder, regions in found.regions.items():
        shown[f"regions, {encoder}"] = as_picture(tint(regions, strongest(found)))
    for side, attention in explanation.attention.items():
        shown[f"{side} to words"] = graded_words(explanation.words, attention.words)
        shown[f"{side} to regions"] = as_picture(light_up(attention.regions))
    return shown


def build_panels(config: Any) -> dict[str, gr.components.Component]:
    """The panels that a model with this config can fill, by name."""
    both = config.modality == "both"
    shown: dict[str, gr.components.Component] = {"label": gr.Label(label="Sentiment")}
    gr.Markdown("## What moved the score: attribution\nRed speaks for this answer, blue or purple against it.")
    if config.modality != "image":
        shown["words"] = gr.HighlightedText(label="Words")
    with gr.Row():
        if config.modality != "text":
            shown["regions, the vision encoder"] = picture_panel("Regions", "what its regions add to the score")
        if both and config.clip_mode == "encoder":
            shown["regions, CLIP"] = picture_panel("Through CLIP", "what its regions add to the score through CLIP")
    if both and config.use_cross_attention:
        gr.Markdown("## Where the model looks: attention\nRegions: the brighter, the more they are looked at.")
        style = {"color_map": GRADES, "show_legend": True, "show_inline_category": False}
        for side in ("text", "picture"):
            shown[f"{side} to words"] = gr.HighlightedText(label=f"Words that the {side} looks at", **style)
        with gr.Row():
            for side in ("text", "picture"):
                shown[f"{side} to regions"] = picture_panel(f"By the {side}", f"regions that the {side} looks at")
    if both and config.use_gating:
        shown["gate"] = gr.Markdown()
    return shown


def picture_panel(label: str, content: str) -> gr.Image:
    """A picture of the answer: a short label that fits a phone, and what it shows for those who cannot see it."""
    alt_text = f"The picture, marked: {content}"
    return gr.Image(
        label=label, alt_text=alt_text, interactive=False, buttons=["fullscreen"], min_width=140, height=260
    )


def draw_example() -> tuple[Image.Image, str]:
    """A drawn post that nobody has seen before."""
    rng = Random()
    return draw_image(rng.randrange(3), rng), write_tweet(rng.randrange(3), rng).strip()


def build_demo(checkpoint: str) -> gr.Blocks:
    """Load a checkpoint, a folder or a Hub name, and build the page; its limits hold whoever launches it."""
    use_own_cache()
    model, processor = load_checkpoint(checkpoint)
    config = model.config
    page = gr.Blocks(title="Sentiment of a post", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS))
    with page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(min_width=300):
                picture = gr.Image(
                    label="Picture", sources=["upload", "clipboard"], height=300, visible=config.modality != "text"
                )
                text = gr.Textbox(
                    label="Text", max_lines=6, max_length=MAX_CHARACTERS, visible=config.modality != "image"
                )
                ask = gr.Button("Explain", variant="primary")
                example = gr.Button("Draw an example", visible=draw_image is not None)
            with gr.Column(min_width=300):
                shown = build_panels(config)

        def answer(picture: dict[str, Any] | None, text: str | None) -> Iterator[dict[Any, Any]]:
            """The sentiment of a post at once, what it rests on some seconds later."""
            try:
                post = open_picture(picture), check_text(text)
                found = {"label": predict(model, processor, *post)}
                yield {shown["label"]: found["label"]}
                found |= panels(explain(model, processor, *post))
            except (OSError, TypeError, ValueError) as error:
                raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
            yield {shown[name]: value for name, value in found.items() if name in shown}

        # Without Gradio's own decoding, which has no limit in pixels and no sentence for a broken file.
        outputs = list(shown.values())
        how = {"preprocess": False, "show_progress_on": outputs[:2], "api_name": "explain"}
        gr.on([ask.click, text.submit], answer, [picture, text], outputs, **how)
        example.click(draw_example, outputs=[picture, text], api_visibility="private")
    page.queue(max_size=20)
    page.launch = partial(page.launch, **launch_options())
    return page


def use_own_cache() -> None:
    """Give Gradio a folder of this process's own: it would share its cache with every other page on the machine."""
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="demo-")
        atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(DemoArguments, description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    arguments, rest = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the cache goes at exit, which a signal alone would skip
    build_demo(rest.checkpoint).launch(share=arguments.share, server_port=arguments.port)


if __name__ == "__main__":
    main()
