"""The only door to attention: nothing outside of this folder imports a file of it."""

from model.kernels.sdpa import packed_attention

__all__ = ["packed_attention"]
