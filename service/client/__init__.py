"""Python client of AToken Serve; needs httpx, numpy and safetensors only."""

from service.client.client import Client
from service.client.errors import AnswerError, ClientError, ProblemError, UnreachableError
from service.client.records import Decoded, EncodedFile, ItemTokens, Model, TokenFile

__all__ = [
    "AnswerError",
    "Client",
    "ClientError",
    "Decoded",
    "EncodedFile",
    "ItemTokens",
    "Model",
    "ProblemError",
    "TokenFile",
    "UnreachableError",
]
