"""Textures of a mesh: decoded under the limits of images, made smaller, each once; what cannot be read is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image as PILImage

from media.errors import MediaError
from media.image import decode_rgba
from media.limits import Limits
from media.mesh_parts import rgba_bytes, shown
from media.types import UInt8Array

SIDE = 2048
"""No texture is kept larger: objects are drawn at a few hundred pixels, and a file may have many textures."""


class Textures:
    """notes: what was left out, and why."""

    def __init__(self, limits: Limits) -> None:
        # A texture becomes no tokens: its pixels alone count.
        self._limits = replace(limits, window_tokens=limits.image_pixels, item_tokens=limits.image_pixels)
        self._left = limits.decode_bytes
        self._known: dict[str, UInt8Array | None] = {}
        self.notes: list[str] = []

    def get(self, name: str, read: Callable[[str], bytes | None]) -> UInt8Array | None:
        """uint8 [h, w, 4], RGBA; None, and a note, for a file that is missing or cannot be used.

        read: gives the file of that name, None if there is none. Raises MediaError if all of them together
        are too large.
        """
        if name not in self._known:
            self._known[name] = self._decoded(name, read)
        return self._known[name]

    def _decoded(self, name: str, read: Callable[[str], bytes | None]) -> UInt8Array | None:
        try:
            content = read(name)
            pixels = None if content is None else decode_rgba(content, self._limits)
            reason = "is missing"
        except MediaError as error:
            pixels, reason = None, f"is left out ({error.detail})"
        if pixels is None:
            self.notes.append(f"the texture {shown(name)} {reason}: grey is used in its place")
            return None
        factor = -(-max(pixels.shape[:2]) // SIDE)
        if factor > 1:
            pixels = np.asarray(PILImage.fromarray(pixels).reduce(factor))
        pixels = rgba_bytes(pixels)
        self._left -= pixels.size
        if self._left < 0:
            raise MediaError(
                "item_too_large",
                f"the textures of the mesh take more than {self._limits.decode_bytes} bytes together",
                limit=self._limits.decode_bytes,
            )
        return pixels
