"""The only door to attention: nothing outside of this folder imports a file of it."""

from model.kernels.attention import packed_attention, segment_starts

__all__ = ["packed_attention", "segment_starts"]
