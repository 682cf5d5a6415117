"""Write the texts and draw the images of the sample.

A mood is a label: 0 negative, 1 neutral, 2 positive. It shows in the words of the sentence, the emoji, the expression
of a face and the weather of a scene. Topics, user names, hashtags, links, sizes and most colours do not depend on it.
"""

import math
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# One string per mood, its choices separated by |. {} is replaced by a topic.
SENTENCES = (
    "I hate {}|{} was terrible|so disappointed by {}|crying over {} again|{} makes me sad|what an awful day at {}|"
    "sick and tired of {}|so angry about {}|feeling lonely at {}|{} is broken and nobody cares",
    "a photo of {}|on my way to {}|{} opens at nine|notes on {}|looking at {} from the bus|{} is next to the station|"
    "part two of {}|who has the times for {}|waiting near {}|they moved {} to Tuesday",
    "I love {}|{} was wonderful|so proud of {}|laughing about {} again|{} makes me happy|what a lovely day at {}|"
    "so grateful for {}|so excited about {}|feeling blessed at {}|{} is beautiful and everyone smiles",
)
OPENERS = ("ugh, |sadly: |worst ever: |damn, ", "fyi: |today: |now: |note: ", "yay! |finally: |best ever: |wow, ")
EMOJI = ("😢|😡|💔|😞", "📷|🚌|🕘|📍", "😊|🎉|❤️|😍")
TOPICS = (
    "the beach|my new job|this concert|our garden|the match|breakfast|the market|the old town|school|the office|a "
    "walk|this film|the museum|our kitchen|the train|my brother's band|the harbour|a book|the weekend|the library|"
    "her birthday|the bakery|the new phone|the mountain"
)
TAILS = "|| this morning| tonight| with @{}| in London| in Beijing| as usual| (again)| at 6 pm| since Monday"
USERS = "anna_b|Tom92|city_news|mrs_lee|JoaoP|the_real_kim|zoe_k|DJ_ray|photo_walks|nina"
HASHTAGS = "#photo|#London|#today|#instagood|#city|#weekend|#travel|#food|#football|#music"


def write_tweet(mood: int, rng: Random) -> str:
    """Write a tweet from the templates above.

    Args:
        mood (`int`): 0 negative, 1 neutral, 2 positive.
        rng (`Random`): source of all randomness.

    Returns:
        `str`: one line, sometimes a retweet, with curly quotes, an emoji, hashtags or a link.
    """

    def pick(choices: str) -> str:
        return rng.choice(choices.split("|"))

    text = pick(OPENERS[mood]) if rng.random() < 0.5 else ""
    text += pick(SENTENCES[mood]).format(pick(TOPICS)) + pick(TAILS).format(pick(USERS))
    text = text[0].upper() + text[1:] if rng.random() < 0.5 else text
    if rng.random() < 0.3:
        text = f"RT @{pick(USERS)}: " + (f"“{text}”" if rng.random() < 0.7 else text)
    text += rng.choice(("", ".", "!", "…", "..."))
    text += f" {pick(EMOJI[mood])}" if rng.random() < 0.5 else ""
    text += "".join(f" {tag}" for tag in rng.sample(HASHTAGS.split("|"), rng.randint(0, 2)))
    link = "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789", k=10))
    return text + (f" http://t.co/{link}" if rng.random() < 0.3 else "") + "\n"


def encode_tweet(text: str, rng: Random) -> bytes:
    """Encode a tweet as UTF-8 or, like some files of MVSA, as GB18030.

    Only texts with curly quotes or an ellipsis become GB18030: these characters start with the byte A1, which is not
    valid UTF-8 there. A reader that tries UTF-8 first therefore recovers every text.
    """
    return text.encode("gb18030" if set(text) & set("“”…") and rng.random() < 0.5 else "utf-8")


def draw_image(mood: int, rng: Random) -> Image.Image:
    """Draw a face or a scene, with noise.

    Args:
        mood (`int`): 0 negative, 1 neutral, 2 positive.
        rng (`Random`): source of all randomness.

    Returns:
        `Image.Image`: an RGB image, 96 to 160 pixels high and wide. The mood shows in the central square.
    """
    width, height = rng.randint(96, 160), rng.randint(96, 160)
    canvas = Image.new("RGB", (width, height), _colour(rng, 60, 230))
    draw = ImageDraw.Draw(canvas)
    (_draw_face if rng.random() < 0.5 else _draw_scene)(draw, width, height, mood, rng)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 12), (height, width, 3))
    return Image.fromarray((np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8))


def _colour(rng: Random, low: int, high: int) -> tuple[int, int, int]:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: str | tuple[int, ...], **kwargs: Any) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, **kwargs)


def _draw_face(draw: ImageDraw.ImageDraw, width: int, height: int, mood: int, rng: Random) -> None:
    """Draw a head with hair and eyes. Brows and mouth show the mood."""
    r = min(width, height) * rng.uniform(0.34, 0.46)
    x, y = width / 2 + rng.uniform(-0.15, 0.15) * r, height / 2 + rng.uniform(-0.1, 0.1) * r
    skin = rng.choice(("#f7d7b5", "#e0ac7e", "#b97a4c", "#7a4a2a", "#f5c842"))
    _disc(draw, x, y, r, skin, outline="#222222", width=2)
    draw.chord((x - r, y - r, x + r, y + r), 205, 335, fill=_colour(rng, 20, 200))
    ink, stroke = _colour(rng, 0, 50), max(2, round(r / 10))
    for side in (-1, 1):
        eye, brow, half = x + side * r * 0.38, y - r * 0.34, r * 0.2
        _disc(draw, eye, y - r * 0.11, r * 0.1, ink)
        if mood == 2:
            draw.arc((eye - half, brow - half / 2, eye + half, brow + half), 190, 350, fill=ink, width=stroke)
        else:
            tilt = r * (0.14, 0)[mood]
            draw.line((eye - side * half, brow - tilt, eye + side * half, brow + tilt), fill=ink, width=stroke)
    half = r * rng.uniform(0.38, 0.5)
    if mood == 2:
        draw.chord((x - half, y - r * 0.1, x + half, y + r * 0.72), 0, 180, fill="#c0392b", outline=ink)
    elif mood == 1:
        draw.line((x - half, y + r * 0.45, x + half, y + r * 0.45), fill=ink, width=stroke)
    else:
        draw.arc((x - half, y + r * 0.32, x + half, y + r * 1.05), 195, 345, fill=ink, width=stroke)


def _draw_scene(draw: ImageDraw.ImageDraw, width: int, height: int, mood: int, rng: Random) -> None:
    """Draw ground and sky. The weather shows the mood: a storm, an overcast street or field, or sun on flowers."""
    horizon, grey = height * rng.uniform(0.5, 0.7), rng.randint(*((40, 100), (160, 210), (120, 170))[mood])
    draw.rectangle((0, 0, width, horizon), fill=(grey, grey + 10, grey + (80 if mood == 2 else 20)))
    meadow = (rng.randint(60, 130), rng.randint(100, 170), rng.randint(40, 90))
    draw.rectangle((0, horizon, width, height), fill=meadow if rng.random() < 0.7 else (grey // 2,) * 3)
    (_draw_storm, _draw_street, _draw_sunshine)[mood](draw, width, height, horizon, rng)


def _draw_storm(draw: ImageDraw.ImageDraw, width: int, height: int, horizon: float, rng: Random) -> None:
    for _ in range(rng.randint(3, 5)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, horizon * 0.4), width * rng.uniform(0.12, 0.22)
        draw.ellipse((x - 1.5 * r, y - 0.7 * r, x + 1.5 * r, y + 0.7 * r), fill=(rng.randint(15, 70),) * 3)
    if rng.random() < 0.6:
        x, y, step = width * rng.uniform(0.3, 0.7), horizon * 0.3, horizon * 0.25
        bolt = [(x, y), (x - step / 2, y + step), (x + step / 4, y + step), (x - step / 3, y + 2.4 * step)]
        draw.line(bolt, fill="#f4f0a0", width=3)
    slant = rng.uniform(-0.4, 0.4)
    for _ in range(rng.randint(40, 70)):
        x, y, length = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(8, 16)
        draw.line((x, y, x + slant * length, y + length), fill="#9fb4cc", width=rng.randint(1, 2))


def _draw_street(draw: ImageDraw.ImageDraw, width: int, height: int, horizon: float, rng: Random) -> None:
    for house in range(rng.randint(0, 4)):  # without houses it is a field
        x, w, h = width * (house * 0.27 - 0.05), width * rng.uniform(0.18, 0.25), horizon * rng.uniform(0.3, 0.75)
        draw.rectangle((x, horizon - h, x + w, horizon), fill=_colour(rng, 70, 190), outline="#444444")
        draw.rectangle((x + w * 0.3, horizon - h * 0.7, x + w * 0.7, horizon - h * 0.4), fill="#30343c")
    middle, half = width * rng.uniform(0.4, 0.6), width * rng.uniform(0.2, 0.4)
    far, near = (
        ((middle - half / 5, horizon), (middle + half / 5, horizon)),
        ((middle + half, height), (middle - half, height)),
    )
    draw.polygon([*far, *near], fill=(rng.randint(80, 130),) * 3)


def _draw_sunshine(draw: ImageDraw.ImageDraw, width: int, height: int, horizon: float, rng: Random) -> None:
    short = min(width, height)
    x, y, r = (
        width / 2 + short * rng.uniform(-0.3, 0.3),
        horizon * rng.uniform(0.35, 0.6),
        short * rng.uniform(0.08, 0.14),
    )
    for ray in range(12):
        dx, dy = math.cos(ray * math.pi / 6), math.sin(ray * math.pi / 6)
        draw.line((x, y, x + 1.9 * r * dx, y + 1.9 * r * dy), fill="#ffd21f", width=2)
    _disc(draw, x, y, r, "#ffd21f")
    for _ in range(rng.randint(8, 16)):
        x, y, r = rng.uniform(0, width), rng.uniform(horizon, height), short * rng.uniform(0.02, 0.04)
        petal = rng.choice(("#e83e8c", "#ff5533", "#ffffff", "#a34bd6", "#ffe14d"))
        for dx, dy in ((-r, 0), (r, 0), (0, -r), (0, r)):
            _disc(draw, x + dx, y + dy, r, petal)
        _disc(draw, x, y, r / 2, "#7a4a00")
