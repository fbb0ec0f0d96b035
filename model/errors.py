"""What the model refuses. Messages are meant for the person who called: what was given, what is allowed."""


class ModelError(Exception):
    """Base of all errors that a caller can cause."""


class ShapeError(ModelError, ValueError):
    """A tensor or array of the wrong rank, size or dtype."""


class RangeError(ModelError, ValueError):
    """Values outside of what the model takes (codes, coordinates, NaN latents)."""


class WeightsError(ModelError):
    """A weights file that is missing, truncated, or does not fit the model."""


class UnsupportedError(ModelError, ValueError):
    """A request that this model cannot serve (codes from a continuous model, an unknown output)."""
