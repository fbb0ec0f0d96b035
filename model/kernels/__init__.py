"""The only door to the kernels: nothing outside of this folder imports a file of it."""

from model.kernels.attention import packed_attention, segment_starts
from model.kernels.linear import fixed_linear

__all__ = ["fixed_linear", "packed_attention", "segment_starts"]
