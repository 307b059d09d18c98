"""POST /v1/embeddings: texts as vectors (`LanguageModel.embed` says what they can be used for)."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from chatwright.config import UserError
from chatwright.language_model import LanguageModel
from chatwright.serve.api.completions import TokenIds
from chatwright.serve.api.parameters import BOOKKEEPING, Body, Count, Nothing
from chatwright.serve.api.reading import to_the_end, unless_gone
from chatwright.serve.errors import ApiError, naming
from chatwright.serve.operation.request_context import context_of, in_time
from chatwright.serve.pool import ModelPool
from chatwright.serve.service import TooLong

MOST_INPUTS = 256
Vector = np.ndarray[Any, np.dtype[np.float32]]


class EmbeddingRequest(Body):
    """Body of POST /v1/embeddings."""

    harmless: ClassVar = BOOKKEEPING
    refused: ClassVar[Mapping[str, Nothing]] = {
        "input_type": (),
        "truncate_prompt_tokens": (),
        "embed_dtype": ("float32",),
    }

    model: str
    input: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    """Must be the model's width: these vectors cannot be shortened."""

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts, one or several."""
        if isinstance(self.input, str):
            return [self.input]
        several: list[Any] = list(self.input)
        return [several] if isinstance(several[0], int) else several


def encoded(model: LanguageModel, body: EmbeddingRequest) -> list[list[int]]:
    """Token ids of the inputs. Raises UserError for an empty or too long input, an id outside the vocabulary,
    and dimensions other than the model's width."""
    width, most = model.model.config.width, model.tokenizer.vocab_size
    if body.dimensions not in (None, width):
        message = f"dimensions: the vectors of this model have {width}"
        raise ApiError(400, message, param="dimensions", code="invalid_value")
    inputs = [model.tokenizer.encode(one) if isinstance(one, str) else one for one in body.inputs]
    for number, ids in enumerate(inputs):
        if not ids:
            raise UserError(f"input: text {number} is empty")
        if max(ids) >= most:
            raise UserError(f"input: token ids of this model are 0 to {most - 1}")
        if len(ids) > model.model.config.context:
            raise TooLong(
                f"input {number} has {len(ids)} tokens, the model's context holds "
                f"{model.model.config.context}"
            )
    return inputs


def vector(model: LanguageModel, ids: Sequence[int]) -> Vector:
    """The vector of an input."""
    return model.embed(ids).numpy()


def routes(pool: ModelPool) -> APIRouter:
    """The route."""
    router = APIRouter()
    one_at_a_time = asyncio.Semaphore(1)  # embedding shares the processors with the engine's answers

    @router.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        async def work() -> dict[str, Any]:
            async with pool.use(body.model) as service, in_time(service.limits.timeout):
                with service.occupied():
                    with naming("input"):
                        inputs = await asyncio.to_thread(encoded, service.model, body)
                        service.check_length(max(map(len, inputs)))
                    async with one_at_a_time:
                        found = [await to_the_end(vector, service.model, ids) for ids in inputs]
            tokens = sum(map(len, inputs))
            context_of(request).prompt_tokens = tokens
            return written(body, found, tokens)

        return await unless_gone(request, work(), {})

    return router


def written(body: EmbeddingRequest, found: Sequence[Vector], tokens: int) -> dict[str, Any]:
    """The body of the response; `tokens`: number of tokens of all inputs."""

    def one(values: Vector) -> Any:
        if body.encoding_format == "base64":
            return base64.b64encode(values.astype("<f4").tobytes()).decode()
        return values.tolist()

    return {
        "object": "list",
        "model": body.model,
        "data": [
            {"object": "embedding", "index": at, "embedding": one(values)} for at, values in enumerate(found)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
