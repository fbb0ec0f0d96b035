"""The `atoken` command. Commands import what they need when they run, so that `atoken --help` is there at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="AToken: images and videos to tokens and back, as a service or right here.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Redis = Annotated[
    str | None, typer.Option(metavar="URL", help="Where the API and its workers meet. Default: ATOKEN_REDIS_URL.")
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Bundled name, or file or folder with weights. Repeat for several."),
]
Model = Annotated[str, typer.Option("--model", help="Bundled name, or file or folder with weights.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: what suits the device.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Arithmetic threads. Default: the cores that are there.")]
Files = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Pictures and clips.", exists=True, dir_okay=False)
]

DEFAULT_MODEL = "tiny-continuous"


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """AToken: images and videos to tokens and back, as a service or right here."""
    context.obj = debug


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: a free one. Default: 8000.")] = None,
    redis: Redis = None,
    model: Models = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
) -> None:
    """Serve HTTP. Without --redis everything runs here: the API, one worker and a private Redis."""
    from service.cli.model_names import check_models

    settings = _settings(
        host=host, port=port, redis_url=redis, device=device, dtype=dtype, threads=threads, models=model
    )
    if settings.redis_url is None:  # else the files of the models are the workers' and may not be here
        check_models(settings.models)
    from service import embedded

    raise typer.Exit(embedded.serve(settings))


@app.command()
def worker(
    redis: Redis = None,
    model: Models = None,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of one batch.")] = None,
) -> None:
    """Work for an API that runs elsewhere. Start as many as there are GPUs."""
    from service.cli.errors import CommandError
    from service.cli.model_names import check_models

    settings = _settings(
        redis_url=redis, device=device, dtype=dtype, threads=threads, models=model, batch_tokens=batch_tokens
    )
    if settings.redis_url is None:
        raise CommandError("a worker needs a queue: give --redis URL, or set ATOKEN_REDIS_URL")
    check_models(settings.models)
    from service.worker.main import run

    raise typer.Exit(run(settings))


@app.command()
def encode(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="Token file to write.")],
    outputs: Annotated[
        str | None,
        typer.Option(help="Comma separated: latents, codes, embedding, features. Default: what decode needs."),
    ] = None,
    fit: Annotated[
        str, typer.Option(help="pad: keep every pixel. crop: as published, drop what fills no patch.")
    ] = "pad",
    up: Annotated[
        str | None, typer.Option(help="Mesh files: axis that is up, y or z. Default: y in GLB, glTF, OBJ, else z.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
) -> None:
    """Encode pictures, clips and 3D files into one token file, without a server."""
    from service.cli import local

    tokenizer = local.load(model, device, dtype, threads)
    print(local.encode_files(tokenizer, files, output, outputs=_names(outputs), fit=fit, up=up))


@app.command()
def decode(
    file: Annotated[Path, typer.Argument(metavar="FILE.tokens", help="A token file.", exists=True, dir_okay=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="picture.png .webp .jpg, clip.mp4 .mkv, array.npy; 3D also .ply .splat .spz .npz"
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Default: the bundled model that the file names.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Decode tokens of other weights, if the shapes fit.")] = False,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
) -> None:
    """Decode a token file, without a server. Several items go to OUTPUT with -0, -1, ... before the suffix."""
    from service.cli import local

    for line in local.decode_file(file, output, model=model, device=device, dtype=dtype, threads=threads, force=force):
        print(line)


@app.command()
def embed(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE...]", help="Pictures and clips.", exists=True, dir_okay=False)
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Plain English words, after the files. Repeat for several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole embeddings as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write them as .npy, float32 [files and texts, D].")
    ] = None,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = None,
) -> None:
    """Embed pictures, clips, 3D files and words for search, without a server; prints how similar they are."""
    from service.cli import local
    from service.cli.errors import UsageError

    if not files and not text:
        raise UsageError("there is nothing to embed: give files, --text WORDS, or both")
    tokenizer = local.load(model, device, dtype, threads)
    for line in local.embed_items(tokenizer, files or [], text or [], as_json=as_json, output=output):
        print(line)


@app.command()
def verify(
    path: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Conformance cases. Default: those in the package.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    dump: Annotated[Path | None, typer.Option(metavar="OUT", help="Folder for what was computed.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Print every tensor, not only those that fail.")] = False,
) -> None:
    """Check the model against stored results: exit status 0 if all hold, 1 if not, 2 for an unreadable folder."""
    from service.cli.errors import CommandError

    if dtype not in ("float32", "bfloat16", "float16"):
        raise CommandError(f"--dtype {dtype!r}; wanted float32, bfloat16 or float16")
    if dtype != "float32":
        print(f"The limits are for float32: errors of about 1e-2 are normal in {dtype}.", flush=True)
    from model.verify import SHIPPED, main_report
    from service.cli.verify_kinds import ALL_KINDS

    raise typer.Exit(main_report(path or SHIPPED, device, dtype, dump, ALL_KINDS, every))


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print the model cards as JSON.")] = False) -> None:
    """List the bundled models."""
    from service.cli import local

    for line in local.list_models(as_json=as_json):
        print(line)


@app.command()
def version() -> None:
    """Print the versions that a bug report needs."""
    from service.cli import local

    for line in local.list_versions():
        print(line)


def main() -> None:
    """Entry point: every error a person can do something about is one line; exit status 1, 2 for a wrong command."""
    try:
        app()
    except Exception as error:
        from service.cli.errors import UsageError, explain

        line = explain(error)
        if "--debug" in sys.argv[1:2]:
            raise
        print(
            f"atoken: {line}"
            if line
            else f"atoken: an unexpected fault ({type(error).__name__}: {error}); `atoken --debug ...` shows where",
            file=sys.stderr,
        )
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _settings(**given: Any) -> Any:
    """Settings from the environment, with what the command line says on top."""
    from service.cli.errors import CommandError
    from service.settings import Settings

    values = {name: value for name, value in given.items() if value is not None}
    if models := values.get("models"):
        # The default one is known by its name, which for a file is its stem.
        values["default_model"] = models[0].partition("=")[0] if "=" in models[0] else Path(models[0]).stem
    settings = Settings(**values)
    if settings.redis_url is not None and not settings.redis_url.startswith(("redis://", "rediss://", "unix://")):
        raise CommandError("the address of a Redis starts with redis://, rediss:// or unix://")
    return settings


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    main()
