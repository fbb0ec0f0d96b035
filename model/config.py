"""Sizes of the networks: frozen dataclasses, and one table of named variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from model.errors import UnsupportedError

WINDOW_FRAMES = 16
"""Pixel frames that attend to each other; encoder and decoder never see more (published value, not in its config)."""

VOXEL_GRID = 64
FSQ_LEVELS = 4
"""Levels of every FSQ channel; a codebook of 4096 is six channels of four levels."""


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """One transformer stack. The published encoder is norm="layer" with biases, the decoder norm="rms" with QK norm."""

    width: int
    blocks: int
    heads: int
    mlp: int
    norm: Literal["layer", "rms"]
    bias: bool
    qk_norm: bool

    def __post_init__(self) -> None:
        """Refuse head widths that 4D RoPE cannot split into four axes of channel pairs."""
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise UnsupportedError(
                f"width {self.width} with {self.heads} heads: the head width must be a whole multiple of 8"
            )

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def attention_tokens(self) -> int:
        """Tokens of an item of which attention takes as long as all else.

        By operations (2 N C a token against 4 C C + 2 C mlp of the matrices) it would be half as many; measured on the
        small models, with all that is neither, times of 64 x 64 to 1536 x 1536 pixels and of 1000 to 24,000 voxels then
        lie within 1.4 of each other.
        """
        return 2 * (2 * self.width + self.mlp)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole tokenizer.

    patch: frames, rows, columns of one token. latent_channels: L. bottleneck: "gaussian" gives latents,
    "fsq" gives `codebooks` codes of 0..4095 a token. linear_path is not part of the published architecture: it exists
    for the small bundled models (see model/linear_path.py) and adds tensors of its own; with "fsq" it wants experts.
    experts: linear codecs to choose from for each patch, 0 for one without a choice; marks: latents that name the
    choice; components: of a patch, which experts share (see model/experts.py).
    """

    patch: tuple[int, int, int] = (4, 16, 16)
    pixel_channels: int = 3
    latent_channels: int
    bottleneck: Literal["gaussian", "fsq"]
    codebooks: int = 0
    encoder: StackConfig
    decoder: StackConfig
    linear_path: bool = False
    experts: int = 0
    marks: int = 0
    components: int = 0

    def __post_init__(self) -> None:
        """Refuse experts that their marks cannot name, or that have nothing to choose from."""
        if not self.experts:
            if self.marks or self.components or (self.linear_path and self.bottleneck == "fsq"):
                raise UnsupportedError(f"marks {self.marks}, components {self.components} and no experts")
            return
        if not self.linear_path or self.experts < 2:
            raise UnsupportedError(f"{self.experts} experts, linear_path={self.linear_path}; wanted two, and one")
        if self.marks < 1 or self.mark_levels**self.marks != self.experts:
            raise UnsupportedError(f"{self.experts} experts with {self.marks} marks; wanted a whole power of that many")
        if not self.marks < self.latent_channels <= self.components:
            raise UnsupportedError(
                f"{self.components} components for {self.latent_channels} latents, {self.marks} of them marks; wanted "
                "more latents than marks, and as many components or more"
            )
        if self.bottleneck == "fsq" and self.mark_levels != FSQ_LEVELS:
            raise UnsupportedError(f"marks of {self.mark_levels} values; wanted {FSQ_LEVELS}, as codes have")

    @property
    def mark_levels(self) -> int:
        """Values that a mark takes."""
        return round(self.experts ** (1 / self.marks)) if self.marks else 0

    @property
    def patch_values(self) -> int:
        """Values of one patch (3072 as published)."""
        t, h, w = self.patch
        return t * h * w * self.pixel_channels

    @property
    def frame_values(self) -> int:
        """Values of one frame of a patch (768): all that an image or a voxel fills."""
        _, h, w = self.patch
        return h * w * self.pixel_channels

    @property
    def window(self) -> int:
        """Latent frames of one window (4 as published)."""
        return WINDOW_FRAMES // self.patch[0]

    @property
    def codebook_size(self) -> int:
        """Codes of one codebook; 0 for a continuous model."""
        return FSQ_LEVELS ** (self.latent_channels // self.codebooks) if self.codebooks else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in the header of our safetensors files."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of to_json; unknown keys are a TypeError. `digits` is a key that older files have."""
        fields = dict(values)
        if fields.pop("digits", False):
            raise ValueError("small models with codes are of another kind now; this file is of an older version")
        fields["patch"] = tuple(fields["patch"])
        fields["encoder"] = StackConfig(**fields["encoder"])
        fields["decoder"] = StackConfig(**fields["decoder"])
        return cls(**fields)

    @classmethod
    def from_published(cls, arch: Mapping[str, Any]) -> ModelConfig:
        """Read the published config keys (`encoder_model_channels`, ...; `model: model_cfg: arch_cfg` in its files)."""
        for side in ("encoder", "decoder"):
            if arch.get(f"{side}_attn_mode", "full") != "full" or arch.get(f"{side}_pe_mode", "joint") != "joint":
                raise UnsupportedError(
                    f"{side}: attn_mode {arch.get(f'{side}_attn_mode')!r} and pe_mode {arch.get(f'{side}_pe_mode')!r}; "
                    "supported: 'full' and 'joint'"
                )
        codebooks = int(arch["quantizer_num_codebooks"]) if arch.get("use_quantizer") else 0
        config = cls(
            patch=tuple(arch["patch_size"]),
            latent_channels=int(arch["latent_channels"]),
            bottleneck="fsq" if codebooks else "gaussian",
            codebooks=codebooks,
            encoder=_published_stack(arch, "encoder"),
            decoder=_published_stack(arch, "decoder"),
        )
        wanted = arch.get("quantizer_codebook_size", config.codebook_size)
        if codebooks and (arch.get("quantizer_type") != "fsq" or wanted != config.codebook_size):
            raise UnsupportedError(
                f"quantizer {arch.get('quantizer_type')!r} with codebooks of {wanted}; supported: 'fsq' with "
                f"{config.codebook_size} for {config.latent_channels} channels in {codebooks} codebooks"
            )
        return config


@dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """The Gaussian decoder: voxel features to `gaussians` Gaussians a voxel. The defaults are the published numbers.

    feature_channels: of a voxel's features (16 x 16 RGB). window: side of an attention window in cells; odd blocks
    shift it by half. softcap: bound of the attention scores. multipliers: of the network's outputs for offset, colour,
    scale, rotation, opacity. reach: how far a Gaussian may lie from its voxel's centre, in half cells. smallest_scale:
    standard deviation, in units of the world, of the filter that every Gaussian is widened by. initial_scale,
    initial_opacity: what an output of 0 means.
    """

    feature_channels: int = 768
    width: int = 768
    blocks: int = 12
    heads: int = 12
    mlp: int = 3072
    grid: int = VOXEL_GRID
    window: int = 8
    softcap: float = 30.0
    gaussians: int = 32
    multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 0.1, 1.0)
    reach: float = 1.5
    smallest_scale: float = 0.0009
    initial_scale: float = 0.004
    initial_opacity: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what cannot be split into heads, or windows that cannot be shifted by half."""
        if self.width % self.heads:
            raise UnsupportedError(f"width {self.width} does not split into {self.heads} heads")
        if self.window < 2 or self.window % 2:
            raise UnsupportedError(f"window {self.window}: odd blocks shift it by half, so it must be even")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in the header of our safetensors files."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GaussianConfig:
        """Inverse of to_json; unknown keys are a TypeError."""
        return cls(**{**values, "multipliers": tuple(values["multipliers"])})

    @classmethod
    def from_published(cls, arch: Mapping[str, Any]) -> GaussianConfig:
        """Read the published config keys; what they say beyond sizes must be what this network does."""
        of_splats = arch["representation_config"]
        fixed = {
            "attn_mode": (arch.get("attn_mode"), "swin"),
            "perturb_offset": (of_splats.get("perturb_offset"), True),
            "scaling_activation": (of_splats.get("scaling_activation"), "softplus"),
        }
        for key, (given, supported) in fixed.items():
            if given != supported:
                raise UnsupportedError(f"{key} {given!r}; supported: {supported!r}")
        offset, colour, scale, rotation, opacity = (
            float(of_splats["lr"][key]) for key in ("_xyz", "_features_dc", "_scaling", "_rotation", "_opacity")
        )
        return cls(
            feature_channels=int(arch["latent_channels"]),
            width=int(arch["model_channels"]),
            blocks=int(arch["num_blocks"]),
            heads=int(arch["num_heads"]),
            mlp=int(arch["mlp_channels"]),
            grid=int(arch["resolution"]),
            window=int(arch["window_size"]),
            gaussians=int(of_splats["num_gaussians"]),
            multipliers=(offset, colour, scale, rotation, opacity),
            reach=float(of_splats["voxel_size"]),
            smallest_scale=float(of_splats["3d_filter_kernel_size"]),
            initial_scale=float(of_splats["scaling_bias"]),
            initial_opacity=float(of_splats["opacity_bias"]),
        )


def _published_stack(arch: Mapping[str, Any], side: str) -> StackConfig:
    return StackConfig(
        width=int(arch[f"{side}_model_channels"]),
        blocks=int(arch[f"{side}_num_blocks"]),
        heads=int(arch[f"{side}_num_heads"]),
        mlp=int(arch[f"{side}_mlp_channels"]),
        norm="rms" if arch[f"{side}_use_rms_norm"] else "layer",
        bias=bool(arch[f"{side}_use_bias"]),
        qk_norm=bool(arch[f"{side}_qk_rms_norm"]),
    )


def _encoder(width: int, blocks: int, heads: int, mlp: int) -> StackConfig:
    return StackConfig(width=width, blocks=blocks, heads=heads, mlp=mlp, norm="layer", bias=True, qk_norm=False)


def _decoder(width: int, blocks: int, heads: int, mlp: int) -> StackConfig:
    return StackConfig(width=width, blocks=blocks, heads=heads, mlp=mlp, norm="rms", bias=False, qk_norm=True)


# So400m: 27 blocks of width 1152, 16 heads of 72, MLP 4304, on both sides (published).
_SO400M = (1152, 27, 16, 4304)
# tiny keeps the head width of 72, so that it runs through the same attention code as the published size.
_TINY_ENCODER = (144, 6, 2, 576)
_TINY_DECODER = (144, 4, 2, 576)

VARIANTS: dict[str, ModelConfig] = {
    "so400m-continuous": ModelConfig(
        latent_channels=48, bottleneck="gaussian", encoder=_encoder(*_SO400M), decoder=_decoder(*_SO400M)
    ),
    "so400m-stage1": ModelConfig(
        latent_channels=32, bottleneck="gaussian", encoder=_encoder(*_SO400M), decoder=_decoder(*_SO400M)
    ),
    "so400m-discrete": ModelConfig(
        latent_channels=48, bottleneck="fsq", codebooks=8, encoder=_encoder(*_SO400M), decoder=_decoder(*_SO400M)
    ),
    "tiny-continuous": ModelConfig(
        latent_channels=48,
        bottleneck="gaussian",
        encoder=_encoder(*_TINY_ENCODER),
        decoder=_decoder(*_TINY_DECODER),
        linear_path=True,
        experts=64,
        marks=2,
        components=192,
    ),
    "tiny-discrete": ModelConfig(
        latent_channels=48,
        bottleneck="fsq",
        codebooks=8,
        encoder=_encoder(*_TINY_ENCODER),
        decoder=_decoder(*_TINY_DECODER),
        linear_path=True,
        experts=16,
        marks=2,
        components=128,
    ),
}
