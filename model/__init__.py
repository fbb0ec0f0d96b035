"""AToken from scratch: images, clips and voxel sets to tokens and back. These names are the public ones."""

from model.config import VARIANTS, ModelConfig
from model.errors import ModelError, RangeError, ShapeError, UnsupportedError, WeightsError
from model.tokenizer import Tokenizer

__all__ = [
    "VARIANTS",
    "ModelConfig",
    "ModelError",
    "RangeError",
    "ShapeError",
    "Tokenizer",
    "UnsupportedError",
    "WeightsError",
]
