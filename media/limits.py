"""Every number that bounds what a media item may cost. Change one here or through the service's settings."""

from __future__ import annotations

from dataclasses import dataclass, fields

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one media item. All are inclusive. Source of the numbers: serving design, section 4.7."""

    image_bytes: int = 20 * MIB
    """Size of an image file."""
    image_pixels: int = 33_554_432
    """Width times height of an image (8192 x 4096)."""
    image_side: int = 16_384
    """Longer side of an image, in pixels."""
    video_bytes: int = 64 * MIB
    """Size of a clip's file."""
    video_seconds: float = 120.0
    """Duration of a clip."""
    frame_pixels: int = 8_847_360
    """Width times height of a clip's frame (4096 x 2160)."""
    frames_decoded: int = 2000
    """Frames that a decoder may produce for one clip."""
    frames_used: int = 2000
    """Frames of one clip that become tokens; item_tokens is usually the tighter bound."""
    window_tokens: int = 32_768
    """Tokens that attend to each other: an image of 2896 x 2896 pixels, or 16 frames of 1920 x 1088. The work grows
    with their square, so this is tighter than item_tokens."""
    item_tokens: int = 131_072
    """Tokens of one item: 436 frames of 640 x 480."""
    request_tokens: int = 262_144
    """Tokens of all items of one request together."""
    mesh_bytes: int = 32 * MIB
    """Size of a mesh file, packed or not."""
    mesh_vertices: int = 2_000_000
    """Vertices of a mesh, counted after all instances are laid out."""
    mesh_faces: int = 2_000_000
    """Triangles of a mesh, counted after all instances are laid out."""
    mesh_instances: int = 2_000
    """Nodes of a glTF scene."""
    archive_bytes: int = 64 * MIB
    """Size of a zip file."""
    archive_members: int = 300
    """Members of a zip file."""
    archive_unpacked_bytes: int = 256 * MIB
    """Size of what a zip file's members unpack to, together."""
    views: int = 64
    """Posed pictures of one asset."""
    view_side: int = 2048
    """Side of a posed picture or of its depth map, in pixels."""
    text_characters: int = 1000
    """Length of a text, without space around it."""
    decode_bytes: int = 512 * MIB
    """uint8 pixels that one item may decode to, be it from a file or from tokens."""
    child_cpu_s: float = 20.0
    """CPU time of one task in a decoder process."""
    child_wall_s: float = 30.0
    """Wall time of one task in a decoder process."""
    child_memory_bytes: int = 1 * GIB
    """Address space of a decoder process on top of what its libraries take."""
    child_open_files: int = 64
    """Open files of a decoder process."""
    child_max_tasks: int = 2000
    """Tasks after which a decoder process is replaced."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not value > 0:
                raise ValueError(f"limit {entry.name} must be above 0, not {value!r}")

    @classmethod
    def local(cls) -> Limits:
        """Bounds for a person's own files (CLI, training): only against nonsense sizes, not against strangers."""
        huge = 2**31 - 1
        return cls(
            image_bytes=GIB,
            image_pixels=huge,
            image_side=huge,
            video_bytes=64 * GIB,
            video_seconds=7 * 24 * 3600.0,
            frame_pixels=huge,
            frames_decoded=huge,
            frames_used=huge,
            mesh_bytes=4 * GIB,
            mesh_vertices=huge,
            mesh_faces=huge,
            mesh_instances=huge,
            archive_bytes=16 * GIB,
            archive_members=65_536,
            archive_unpacked_bytes=16 * GIB,
            views=4096,
            view_side=16_384,
            window_tokens=huge,
            item_tokens=huge,
            request_tokens=huge,
            text_characters=huge,
            decode_bytes=64 * GIB,
            child_cpu_s=3600.0,
            child_wall_s=3600.0,
            child_memory_bytes=16 * GIB,
        )
