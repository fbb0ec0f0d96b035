"""What a person reads when a command fails: one line that says what was given and what to do, never a traceback."""

from __future__ import annotations

# By name, so that printing an error does not import what defines it.
SAYS_WHY = {
    "media.errors.MediaError",
    "model.errors.ModelError",
    "service.queue.jobs.QueueUnavailable",
    "service.queue.server.ServerError",
    "service.embedded.StartError",
    "service.cli.errors.CommandError",
}
EXTRA_OF = {
    "torch": "local",
    "fastapi": "local",
    "uvicorn": "local",
    "starlette": "local",
    "redis": "local",
    "structlog": "local",
    "pydantic_settings": "local",
    "PIL": "local",
    "av": "local",
    "pebble": "local",
}


class CommandError(Exception):
    """A command was given something that it cannot use."""


class UsageError(CommandError):
    """The command line itself is wrong: exit status 2."""


def explain(error: BaseException) -> str | None:
    """Return the line for a person, or None when the error is a fault of ours."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = EXTRA_OF.get(error.name.partition(".")[0])
        if extra is not None:
            return f"this command needs the package {error.name!r}: pip install 'atoken-serve[{extra}]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    names = {f"{base.__module__}.{base.__qualname__}" for base in type(error).__mro__}
    if names & SAYS_WHY:
        return str(error)
    if "pydantic_core._pydantic_core.ValidationError" in names:
        return _explain_settings(error)
    return None


def _explain_settings(error: BaseException) -> str:
    lines = []
    for found in error.errors():  # type: ignore[attr-defined]
        path = "__".join(str(part) for part in found["loc"])
        name = f"{path} (ATOKEN_{path.upper()})" if path else "settings"
        lines.append(f"{name}: {found['msg']}")
    return "; ".join(lines)
