"""Tokens of an image from its size, by the providers' own formulas, and the size of an image."""

import math
import re
from collections.abc import Mapping

from kimi_core.tokens.models import bare_name, model_tokens

DEFAULT_IMAGE_TOKENS = 1_000
"""An estimate, for models whose formula is not public or images whose size is not known."""

# "Calculating costs" in https://platform.openai.com/docs/guides/images-vision; what was billed
# agrees: https://community.openai.com/t/1262691 and /1281361 (read 2026-11-21).
# Model -> tokens of the whole image, tokens of each 512 px tile. First match wins.
_TILES: tuple[tuple[re.Pattern[str], int, int], ...] = (
    (re.compile(r"gpt-4o-mini"), 2833, 5667),
    (re.compile(r"o[13](-|$)"), 75, 150),
    (re.compile(r"gpt-5"), 70, 140),
    (re.compile(r"(chat)?gpt-4"), 85, 170),
)
# Model -> tokens of each 32 px patch.
_PATCHES: tuple[tuple[re.Pattern[str], float], ...] = (
    (re.compile(r"gpt-(4\.1|5)-mini"), 1.62),
    (re.compile(r"gpt-(4\.1|5)-nano"), 2.46),
    (re.compile(r"o4-mini"), 1.72),
)
_MAX_PATCHES = 1536
_PATCH = 32
_TILE = 512

# "tokens = (width px * height px)/750"; larger than 1568 px or about 1,600 tokens is scaled down
# -- https://docs.anthropic.com/en/docs/build-with-claude/vision
_ANTHROPIC_EDGE = 1568
_ANTHROPIC_MAX = 1600

# 258 for an image of at most 384 px; larger ones are cut into tiles of 258 each, their side the
# shorter edge / 1.5, between 256 and 768 px -- https://ai.google.dev/gemini-api/docs/tokens
_GEMINI_TILE_TOKENS = 258
_GEMINI_SMALL = 384


def image_tokens(model: str, width: int, height: int, detail: str | None = None) -> int:
    """Return what an image of this size, in pixels, costs the model in tokens.

    `detail` is OpenAI's: `low`, `high` or `auto`, which counts as `high`.
    """
    if width <= 0 or height <= 0:
        return DEFAULT_IMAGE_TOKENS
    template = model_tokens(model).template
    if template in ("openai", "openai-cl100k"):
        return _openai(bare_name(model), width, height, detail)
    if template == "anthropic":
        scale = min(1.0, _ANTHROPIC_EDGE / max(width, height))
        return min(_ANTHROPIC_MAX, math.ceil(width * scale * height * scale / 750))
    if template == "gemini":
        return _gemini(width, height)
    return DEFAULT_IMAGE_TOKENS


def _openai(name: str, width: int, height: int, detail: str | None) -> int:
    for pattern, per_patch in _PATCHES:
        if pattern.match(name):
            return math.ceil(_patches(width, height) * per_patch)
    for pattern, base, tile in _TILES:
        if pattern.match(name):
            return base if detail == "low" else base + tile * _tiles(width, height)
    return DEFAULT_IMAGE_TOKENS


def _tiles(width: int, height: int) -> int:
    """Return the 512 px tiles of an image, fitted into 2048 px and to a short side of 768 px."""
    fit = min(1.0, 2048 / max(width, height))
    width, height = round(width * fit), round(height * fit)
    fit = min(1.0, 768 / max(1, min(width, height)))
    width, height = round(width * fit), round(height * fit)
    return max(1, math.ceil(width / _TILE)) * max(1, math.ceil(height / _TILE))


def _patches(width: int, height: int) -> int:
    """Return the 32 px patches of an image, scaled down to at most 1536 of them."""
    count = math.ceil(width / _PATCH) * math.ceil(height / _PATCH)
    if count <= _MAX_PATCHES:
        return count
    scale = math.sqrt(_PATCH * _PATCH * _MAX_PATCHES / (width * height))
    across, down = width * scale / _PATCH, height * scale / _PATCH
    # Whole patches along one edge: the scale is lowered until one of them comes out even.
    ratios = [math.floor(edge) / edge for edge in (across, down) if edge >= 1]
    scale = min(ratios, default=1.0)
    whole = math.ceil(across * scale - 1e-9) * math.ceil(down * scale - 1e-9)
    return min(_MAX_PATCHES, whole)


def _gemini(width: int, height: int) -> int:
    if max(width, height) <= _GEMINI_SMALL:
        return _GEMINI_TILE_TOKENS
    side = min(768, max(256, math.floor(min(width, height) / 1.5)))
    return math.ceil(width / side) * math.ceil(height / side) * _GEMINI_TILE_TOKENS


def image_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a PNG, JPEG, GIF or WebP from its first bytes, else None.

    Nothing is decoded; a JPEG's Exif rotation is not looked at.
    """
    size: tuple[int, int] | None = None
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if data[12:16] == b"IHDR" and len(data) >= 24:
            size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith((b"GIF87a", b"GIF89a")):
        if len(data) >= 10:
            size = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    elif data.startswith(b"\xff\xd8"):
        size = _jpeg_size(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size = _webp_size(data)
    return size if size is not None and min(size) > 0 else None


# Start of frame markers, SOF0 to SOF15; C4, C8 and CC are other segments.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# TEM, RST0 to RST7 and SOI have no length.
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _BARE_MARKERS:
            at += 2
        elif marker in _SOF:
            if at + 9 > len(data):
                return None
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            return int.from_bytes(data[at + 7 : at + 9], "big"), height
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


_WEBP_LENGTH: Mapping[bytes, int] = {b"VP8 ": 30, b"VP8L": 25, b"VP8X": 30}


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if len(data) < _WEBP_LENGTH.get(kind, len(data) + 1):
        return None
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return width, height
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return width, height
