"""Drawn street scenes in Penn-Fudan's folders: what stands in for it where it is not at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ghn_jax.detection.penn_fudan import FOLDER

Colour = tuple[int, int, int]


def _colour(rng: np.random.Generator, low: int = 0, high: int = 255) -> Colour:
    red, green, blue = rng.integers(low, high, 3).tolist()
    return red, green, blue


def _street(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Houses with windows, a pavement, and posts, bins and trees that are no pedestrians."""
    image = Image.new("RGB", (width, height), _colour(rng, 120, 240))
    draw = ImageDraw.Draw(image)
    ground = int(height * rng.uniform(0.6, 0.8))
    left = 0
    while left < width:
        right = left + int(rng.uniform(0.15, 0.4) * width)
        top = int(rng.uniform(0, 0.4) * height)
        draw.rectangle([left, top, right, ground], _colour(rng, 60, 220))
        pane, side = _colour(rng), max(height // 16, 2)
        for x in range(left + side, right - side, 2 * side):
            for y in range(top + side, ground - 2 * side, 3 * side):
                draw.rectangle([x, y, x + side, y + 2 * side], pane)
        left = right
    draw.rectangle([0, ground, width, height], _colour(rng, 70, 170))
    for _ in range(rng.integers(2, 6)):
        x, foot = int(rng.uniform(0, width)), int(rng.uniform(ground, height))
        tall, wide = rng.uniform(0.1, 0.5) * height, rng.uniform(0.02, 0.15) * height
        shape = draw.ellipse if rng.random() < 0.3 else draw.rectangle
        shape([x, foot - tall, x + wide, foot], _colour(rng))
    return image


def _figure(rng: np.random.Generator, tall: float, x: float, foot: float, size: tuple[int, int]):
    """Parts of a pedestrian, each a mask and a colour: legs, arms, body and head."""
    wide, top = tall * rng.uniform(0.28, 0.36), foot - tall
    head, stride = tall * 0.075, wide * rng.uniform(0.1, 0.5)
    hip, neck, limb = top + 0.5 * tall, top + 0.15 * tall, max(round(0.09 * tall), 1)
    skin, coat, trousers = _colour(rng, 90, 235), _colour(rng), _colour(rng)

    def part(method: str, where, colour: Colour, **options):
        mask = Image.new("L", size, 0)
        getattr(ImageDraw.Draw(mask), method)(where, fill=255, **options)
        return np.asarray(mask) > 0, colour

    for side in (-1, 1):
        end = (x + side * stride, foot - limb / 2)
        yield part("line", [(x + side * 0.06 * tall, hip), end], trousers, width=limb)
        hand = (x + side * wide / 2, hip + 0.02 * tall)
        yield part("line", [(x + side * 0.1 * tall, neck + limb / 2), hand], coat, width=limb)
    yield part("rectangle", [x - 0.11 * tall, neck, x + 0.11 * tall, hip + 0.05 * tall], coat)
    yield part("ellipse", [x - head, top, x + head, top + 2.2 * head], skin)


def draw_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A street with one to three pedestrians, the nearer before the farther ones.

    Returns:
      (height, width, 3) pixels and (height, width) numbers of pedestrians, both uint8.
    """
    pixels = np.array(_street(rng, height, width))
    numbers = np.zeros((height, width), np.uint8)
    count = int(rng.integers(1, 4))
    places = (rng.permutation(count) + rng.uniform(0.3, 0.7, count)) * width / count
    heights = np.sort(rng.uniform(0.35, 0.75, count)) * height
    for number, (x, tall) in enumerate(zip(places, heights, strict=True), 1):
        foot = min(0.4 * height + 0.75 * tall, height - 1)
        for mask, colour in _figure(rng, tall, x, foot, (width, height)):
            pixels[mask], numbers[mask] = colour, number
    noise = rng.normal(0, 8, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), numbers


def write_scenes(folder: str | Path, count: int, *, height: int = 160, seed: int = 0) -> Path:
    """Writes scenes as the official folder has its photographs; those that are there stay.

    Args:
      folder: in which `PennFudanPed` is made.
      count: how many.
      height: in pixels; they are up to a fifth wider.
      seed: of what is drawn.

    Returns:
      The folder `PennFudanPed`.
    """
    root = Path(folder) / FOLDER
    images, masks = root / "PNGImages", root / "PedMasks"
    for part in (images, masks):
        part.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        name, width = f"Scene{i:05}", round(height * rng.uniform(1, 1.2))
        if not (images / f"{name}.png").exists():
            pixels, numbers = draw_scene(rng, height, width)
            Image.fromarray(numbers).save(masks / f"{name}_mask.png")
            Image.fromarray(pixels).save(images / f"{name}.png")
    return root
