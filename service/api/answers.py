"""What a JSON answer looks like: for the OpenAPI document, and for the tests that hold the answers against it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ProblemDocument(BaseModel):
    """The body of every error, `application/problem+json` (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = Field(description="The request id.")
    code: str = Field(description="Stable; each has a page at /errors/{code}.")
    item: int | None = Field(None, description="Position of the item that failed.")
    limit: float | str | None = None
    actual: float | str | None = None
    retry_after: float | None = None


class Tensor(BaseModel):
    """An array in JSON: little-endian bytes in row-major order, in base64."""

    model_config = ConfigDict(extra="forbid")

    dtype: Literal["float32", "float16", "int16", "int32", "uint8"]
    shape: list[int]
    data: str


TensorOrList = Tensor | list[Any]


class Usage(BaseModel):
    """What a request cost."""

    model_config = ConfigDict(extra="forbid")

    tokens: int


class BadItem(BaseModel):
    """An item that failed beside others that did not."""

    model_config = ConfigDict(extra="forbid")

    id: str
    status: Literal["error"]
    error: ProblemDocument


class Reconstruction(BaseModel):
    """The picture (PNG), clip (MP4) or Gaussians (PLY) after encode and decode."""

    model_config = ConfigDict(extra="forbid")

    media_type: str
    data: str
    psnr_db: float | None = Field(None, description="null when it equals the original.")
    ssim: float | None = Field(None, description="3D: like psnr_db the mean over views, rendered on black.")
    views: int | None = Field(None, description="3D: how many views it was compared with; none for ready-made voxels.")
    held_out: bool | None = Field(None, description="3D: whether the tokens were made without those views.")
    decoder: str | None = Field(None, description="3D: name of the Gaussian decoder.")
    note: str | None = Field(None, description="3D: what to know of its quality.")


class LayoutDocument(BaseModel):
    """Sizes in pixels and frames, and the grid of tokens along t, x, y: what decode needs to be exact."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    frames: int
    height: int
    width: int
    grid: list[int]
    fps: float | None


class EncodedItem(BaseModel):
    """One item of the answer of /encode and /embed; only the outputs that were asked for are there."""

    model_config = ConfigDict(extra="forbid")

    id: str
    status: Literal["ok"]
    kind: Literal["image", "video", "voxels"]
    notes: list[str]
    layout: LayoutDocument
    tokens: int
    revision: str | None = Field(description="Of the model: an item that is sent to /decode by itself goes back to it.")
    coords: TensorOrList | None = None
    latents: TensorOrList | None = None
    codes: TensorOrList | None = None
    embedding: TensorOrList | None = None
    features: TensorOrList | None = None
    reconstruction: Reconstruction | None = None


class EmbeddedText(BaseModel):
    """One text of the answer of /embed. It has no tokens, and counts as one in `usage`."""

    model_config = ConfigDict(extra="forbid")

    id: str
    status: Literal["ok"]
    kind: Literal["text"]
    notes: list[str]
    revision: str | None = Field(description="Of the model.")
    embedding: TensorOrList


class DecodedItem(BaseModel):
    """One item of the answer of /decode. pixels: uint8 [H, W, 3], of a clip [T, H, W, 3]."""

    model_config = ConfigDict(extra="forbid")

    id: str
    status: Literal["ok"]
    kind: Literal["image", "video", "voxels"]
    tokens: int
    fps: float | None = None
    pixels: TensorOrList | None = None
    coords: TensorOrList | None = None
    feats: TensorOrList | None = None


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="The request id.")
    model: str | None
    revision: str | None
    usage: Usage


class EncodeAnswer(_Answer):
    """JSON answer of /encode and /embed; items in the order of the request."""

    items: list[EncodedItem | EmbeddedText | BadItem]


class DecodeAnswer(_Answer):
    """JSON answer of /decode; items in the order of the request."""

    items: list[DecodedItem | BadItem]
