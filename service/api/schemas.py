"""What a request may say: options of the three operations, and their JSON bodies. Unknown names are errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SkipValidation, ValidationError, model_validator
from pydantic_core import ErrorDetails

from service.errors import Problem
from service.view import FRAMES, MOST_PIXELS, PICTURE_SIDE, SIDES, TURNTABLE_FRAMES, TURNTABLE_SIDE, Background

Text = Annotated[str, Field(max_length=200)]


def _split(value: object) -> object:
    """Accept "a,b", ["a", "b"] and ["a,b"] alike: form fields and query parameters are text."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return [name.strip() for entry in value for name in entry.split(",") if name.strip()]
    return value


Up = Literal["y", "z"]
UP = Field(
    None,
    description="Mesh files: the axis that is up. Default: y in GLB, glTF and OBJ, z in PLY, STL and OFF.",
)
EncodeOutput = Literal["latents", "codes", "embedding", "features", "reconstruction"]
EmbedOutput = Literal["embedding", "features"]


class Options(BaseModel):
    """What every operation takes. In the query, in form fields, in the part `request` or in the JSON body."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Text | None = Field(None, description="Name from /v1/models; left out: the first model that can do it.")
    on_error: Literal["partial", "fail"] | None = Field(
        None,
        description="Several items: `partial` (default of JSON answers) answers the good ones, `fail` refuses all with "
        "the first problem. Answers that cannot carry a problem beside a result (token file, npy) always fail.",
    )
    floats: bool = Field(False, description="JSON answers: tensors as nested lists instead of base64.")


class EncodeOptions(Options):
    """Options of /encode."""

    outputs: Annotated[list[EncodeOutput], BeforeValidator(_split), Field(min_length=1)] | None = Field(
        None, description="Comma separated or repeated. Default: `codes` of a model that has them, else `latents`."
    )
    fit: Literal["pad", "crop"] = Field(
        "pad",
        description="`pad` keeps every pixel; `crop` drops what does not fill a patch, as the published code does.",
    )
    up: Up | None = UP
    sample: bool = Field(False, description="Draw latents from the posterior instead of taking its mean; needs `seed`.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="Of `sample=true`, and only there.")

    @model_validator(mode="after")
    def _check_seed(self) -> EncodeOptions:
        if self.sample and self.seed is None:
            raise ValueError("`sample=true` needs a `seed`, any whole number from 0")
        if self.seed is not None and not self.sample:
            raise ValueError("`seed` means something only with `sample=true`; send both or neither")
        return self


class EmbedOptions(Options):
    """Options of /embed."""

    outputs: Annotated[list[EmbedOutput], BeforeValidator(_split), Field(min_length=1)] | None = Field(
        None, description="`embedding` (default) for the item, `features` for each token."
    )
    fit: Literal["pad", "crop"] = "pad"
    up: Up | None = UP


class DecodeOptions(Options):
    """Options of /decode."""

    force: bool = Field(False, description="Decode tokens of another model or revision, if the shapes fit.")
    quality: Annotated[int, Field(ge=1, le=100)] = Field(90, description="Of JPEG and lossy WebP.")
    format: Literal["ply", "splat", "spz"] | None = Field(
        None,
        description="3D, as `application/octet-stream`: default splat, 32 bytes a Gaussian; spz takes half.",
    )
    azimuth: Annotated[float, Field(ge=-360, le=360)] = Field(
        30.0,
        description="3D as a picture or clip: degrees around z, counterclockwise seen from above; 0 looks along +y.",
    )
    elevation: Annotated[float, Field(ge=-89, le=89)] = Field(20.0, description="3D: degrees above the horizon.")
    distance: Annotated[float, Field(ge=0.8, le=10)] = Field(
        2.0, description="3D: of the camera from the middle, in sides of the cube that the object lies in."
    )
    fov: Annotated[float, Field(ge=5, le=120)] = Field(40.0, description="3D: full angle of the picture in degrees.")
    side: Annotated[int, Field(ge=SIDES[0], le=SIDES[1])] | None = Field(
        None, description=f"3D: pixels of the square picture; default {PICTURE_SIDE}, of a clip {TURNTABLE_SIDE}."
    )
    frames: Annotated[int, Field(ge=2, le=FRAMES[1])] = Field(
        TURNTABLE_FRAMES, description="3D as a clip: pictures of one turn around the object."
    )
    background: Background = Field("white", description="3D as a picture or clip.")

    @model_validator(mode="after")
    def _check_pixels(self) -> DecodeOptions:
        pixels = self.frames * (self.side or 0) ** 2
        if "frames" in self.model_fields_set and pixels > MOST_PIXELS:
            raise ValueError(
                f"`frames` {self.frames} of `side` {self.side} are {pixels} pixels, at most {MOST_PIXELS} are allowed"
            )
        return self


class MediaItem(BaseModel):
    """One picture or clip in a JSON body of /encode."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text | None = None
    data: str = Field(description="Base64, or a base64 `data:` URL. Addresses are not fetched.")


class _MediaBody(BaseModel):
    items: list[MediaItem] | None = None
    file: str | list[str] | None = Field(None, description="Shorthand of `items`: base64, one or several.")
    data: str | list[str] | None = Field(None, description="The same as `file`.")

    @model_validator(mode="after")
    def _check_one(self) -> _MediaBody:
        if sum(value is not None for value in (self.items, self.file, self.data)) != 1:
            raise ValueError("give the content as exactly one of `items`, `file` and `data`")
        return self


class EncodeBody(EncodeOptions, _MediaBody):
    """JSON body of /encode."""


# Not checked here: a text that cannot be used is a problem of its item alone, as with base64.
GivenText = SkipValidation[str]
GivenTexts = SkipValidation[str | list[str]]


class EmbedItem(BaseModel):
    """One picture or clip, or one text, in a JSON body of /embed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text | None = None
    data: str | None = Field(None, description="Base64, or a base64 `data:` URL. Addresses are not fetched.")
    text: GivenText | None = Field(None, description="Plain English words, instead of `data`.")

    @model_validator(mode="after")
    def _check_one(self) -> EmbedItem:
        if (self.data is None) == (self.text is None):
            raise ValueError("an item has exactly one of `data` and `text`")
        return self


class EmbedBody(EmbedOptions):
    """JSON body of /embed."""

    items: list[EmbedItem] | None = None
    file: str | list[str] | None = Field(None, description="Shorthand of `items`: base64, one or several.")
    data: str | list[str] | None = Field(None, description="The same as `file`.")
    text: GivenTexts | None = Field(None, description="Shorthand of `items`: plain English words, one text or several.")

    @model_validator(mode="after")
    def _check_one(self) -> EmbedBody:
        if sum(value is not None for value in (self.items, self.file, self.data, self.text)) != 1:
            raise ValueError("give the content as exactly one of `items`, `file`, `data` and `text`")
        return self


ECHO = Field(None, description="As in the answer of /encode; not read.")


class _Echo(BaseModel):
    """What an item of the answer of /encode says beside its tokens, so that it can be sent back as it is."""

    status: Any = Field(None, description="As in the answer of /encode; an item with `error` has no tokens to decode.")
    error: Any = ECHO
    kind: Any = ECHO
    notes: Any = ECHO
    tokens: Any = ECHO
    embedding: Any = ECHO
    features: Any = ECHO
    reconstruction: Any = ECHO


class DecodeItem(_Echo):
    """Tokens of one item in a JSON body: arrays, or a token file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text | None = None
    latents: Any = Field(None, description="[n, L]: nested lists or {dtype, shape, data}.")
    codes: Any = Field(None, description="[n, K], whole numbers: nested lists or {dtype, shape, data}.")
    coords: Any = Field(None, description="[n, 4] (t, x, y, z; x = patch row): nested lists or {dtype, shape, data}.")
    layout: dict[str, Any] | None = Field(
        None, description="As in the answer of /encode; left out: the coords' grid, filled up to whole patches."
    )
    data: str | None = Field(None, description="A token file in base64, instead of arrays.")
    revision: Text | None = Field(
        None, description="Revision of the model that made the arrays: chooses the model, or is checked."
    )


class DecodeBody(DecodeOptions, _Echo):
    """JSON body of /decode: `items`, or the fields of one item at the top. An answer of /encode is one, too."""

    id: Text | None = Field(None, description="Of the one item; beside `items` not read.")
    usage: Any = ECHO
    items: list[DecodeItem] | None = None
    latents: Any = None
    codes: Any = None
    coords: Any = None
    layout: dict[str, Any] | None = None
    data: str | None = None
    revision: Text | None = Field(
        None, description="Revision of the model that made the arrays: chooses the model, or is checked."
    )

    @model_validator(mode="after")
    def _check_one(self) -> DecodeBody:
        inline = [name for name in ("latents", "codes", "coords", "layout", "data") if getattr(self, name) is not None]
        if self.items is not None and inline:
            raise ValueError(f"`items` and `{inline[0]}` exclude each other")
        if self.items is None and not inline and self.status != "error":
            raise ValueError("give `items`, or `latents` or `codes` with `coords`, or a token file as `data`")
        return self


NO_TEXT = "only /embed takes text: it has a place among the embeddings, but no tokens"
TEXT_IS_AN_ITEM = "texts are content, not an option; send them as form fields `text` or in a JSON body"

S = TypeVar("S", bound=BaseModel)


def validate(schema: type[S], values: Mapping[str, Any]) -> S:
    """Return values as a record of schema. Raises Problem invalid_parameter: the wrong fields and what they take.

    The value is told where it is one of a choice, a number or a yes or no, never of content.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise _problem_of(error, schema) from None


def _problem_of(error: ValidationError, schema: type[BaseModel]) -> Problem:
    messages: dict[str, str] = {}
    # A field that may be text or a list has an error for each form; the one that lies deepest says what is wrong.
    for entry in sorted(error.errors(include_url=False), key=lambda entry: -len(entry["loc"])):
        messages.setdefault(_field_of(entry["loc"]), _message_of(entry, schema))
    errors = [{"field": field, "message": message} for field, message in list(messages.items())[:10]]
    detail = "; ".join(
        f"`{entry['field']}`: {entry['message']}" if entry["field"] else entry["message"] for entry in errors
    )
    return Problem("invalid_parameter", detail, extra={"errors": errors})


def _field_of(loc: tuple[int | str, ...]) -> str:
    """Name a field as its sender does: not `outputs.0`, which may come from "a,b", and not `file.str`."""
    if loc[:1] in (("outputs",), ("file",), ("data",)):
        loc = loc[:1]
    return ".".join(str(step) for step in loc)[:200]


def _message_of(entry: ErrorDetails, schema: type[BaseModel]) -> str:
    kind, given, bounds = entry["type"], entry["input"], entry.get("ctx", {})
    if kind == "extra_forbidden":
        if entry["loc"][-1] == "text":
            return TEXT_IS_AN_ITEM if issubclass(schema, EmbedOptions) else NO_TEXT
        items: dict[type[BaseModel], type[BaseModel]] = {DecodeBody: DecodeItem, EmbedBody: EmbedItem}
        item = items.get(schema, MediaItem)
        known = schema if len(entry["loc"]) == 1 else item
        return f"unknown name; known are {', '.join(sorted(known.model_fields))}"
    if kind == "value_error":
        return str(bounds["error"])
    if kind == "missing":
        return "is missing"
    if entry["loc"][:1] == ("outputs",):
        names = get_args(EmbedOutput if issubclass(schema, EmbedOptions) else EncodeOutput)
        given = "none" if kind == "too_short" else shown(given)
        return f"given is {given}, allowed are {', '.join(names)}"
    if entry["loc"][0] in ("file", "data") and len(entry["loc"]) > 1:
        return f"given is {type_of(given)}, wanted is base64 text or a list of such"
    if kind == "literal_error":
        return f"given is {shown(given)}, wanted is {bounds['expected']}"
    if kind == "string_too_long":
        return f"given are {len(given)} characters, at most {bounds['max_length']} are allowed"
    if "int" in kind:
        return f"given is {shown(given)}, wanted is a whole number"
    if "bool" in kind:
        return f"given is {shown(given)}, wanted is true or false"
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return f"given is {shown(given)}, wanted is {words} {bounds[name]}"
    return f"given is {type_of(given)}, wanted is {WANTED.get(kind, 'another type')}"


BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
WANTED = {"string_type": "text", "list_type": "a list", "dict_type": "an object", "model_type": "an object"}
TYPES = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def shown(given: object) -> str:
    """Return what was given, short and printable: what comes from outside goes into logs and pages."""
    if isinstance(given, str):
        kept = "".join(character for character in given[:50] if character.isprintable())
        return f"{kept!r}" + ("..." if len(given) > 50 else "")
    return str(given)[:50] if isinstance(given, int | float) else type_of(given)


def type_of(given: object) -> str:
    """Return the JSON type of a value, in words."""
    return TYPES.get(type(given), "null")
