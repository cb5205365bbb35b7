"""The endpoints: each parses a request, asks the service, and writes the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from duoserve import __version__
from duoserve.interface import Piece, ServiceState
from duoserve.server import asking
from duoserve.server.answers import Chat, Completions, Dialect, Head, answer, new_head, usage_of
from duoserve.server.asking import Asked
from duoserve.server.backend import Model, Service
from duoserve.server.errors import bad
from duoserve.server.generation import Choice, Generation, Wanted, begin
from duoserve.server.host import LOADING, ServiceLoader
from duoserve.server.http import EventResponse, json_response, large_json_response, read_fields, unless_gone
from duoserve.server.metrics import Metrics
from duoserve.server.preparing import Preparing
from duoserve.server.records import RequestLog
from duoserve.server.settings import ServerSettings
from duoserve.server.sse import events
from duoserve.server.status import PAGE, PAGE_HEADERS, status
from duoserve.server.token_text import TokenText


class Endpoints:
    """The handlers of all paths, over one ``loader``."""

    def __init__(self, loader: ServiceLoader, settings: ServerSettings) -> None:
        self._loader = loader
        self._settings = settings
        self._request_log = RequestLog()
        self._metrics = Metrics(settings.name, lambda: None if loader.known is None else loader.known.figures())
        self._request_log.listeners.append(self._metrics.ended)
        self._preparing = Preparing(settings.text_s)
        self._tokens: TokenText | None = None
        self._since, self._created = time.monotonic(), int(time.time())

    async def health(self, request: Request) -> Response:
        """200 if requests are taken, else 503; a probe needs no key."""
        state = self._loader.state
        code = 200 if state == ServiceState.READY else 503
        return json_response({"status": state}, code, {"Retry-After": "5"} if state == LOADING else None)

    async def models(self, request: Request) -> Response:
        """The list of models, which has one."""
        return json_response({"object": "list", "data": [self._model_card(self._loader.service().model)]})

    async def model(self, request: Request) -> Response:
        """The model by its name, which may have slashes."""
        service = self._loader.service()
        self._check_model(request.path_params["name"])
        return json_response(self._model_card(service.model))

    async def completions(self, request: Request) -> ASGIApp:
        """``/v1/completions``."""
        service = self._loader.service()
        fields = await read_fields(request, self._settings.max_body_bytes)
        asked, prompts = asking.completion(fields)
        self._check_model(asked.model)
        _check_room(asked, len(prompts), service.capacity)
        prompt_ids = [await self._preparing.encode(service.model, prompt) for prompt in prompts]
        return await self._answered(request, service, Completions(), asked, prompt_ids)

    async def chat(self, request: Request) -> ASGIApp:
        """``/v1/chat/completions``."""
        service = self._loader.service()
        fields = await read_fields(request, self._settings.max_body_bytes)
        asked, messages = asking.chat(fields)
        self._check_model(asked.model)
        _check_room(asked, 1, service.capacity)
        prompt_ids = await self._preparing.render(service.model, messages)
        assert service.model.tokenizer is not None  # there is a prompt, so there is a tokenizer
        return await self._answered(request, service, Chat(service.model.tokenizer), asked, [prompt_ids])

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text, as vLLM gives them, with their entries of the vocabulary if those are wanted."""
        model = self._loader.service().model
        fields = await read_fields(request, self._settings.max_body_bytes)
        self._check_model(fields.text("model"))
        fields.refuse_other(add_special_tokens=True)
        with_entries = fields.flag("return_token_strs")
        prompt = fields.text("prompt")
        if prompt is None:
            raise fields.wrong("prompt", "text")
        tokens = await self._preparing.encode(model, prompt)
        found = {"count": len(tokens), "max_model_len": model.max_context, "tokens": tokens}
        if with_entries and model.tokenizer is not None:
            found["token_strs"] = map(model.tokenizer.entry, tokens)
        return await large_json_response(found)

    async def metrics(self, request: Request) -> Response:
        """The metrics in Prometheus's text format."""
        return Response(self._metrics.text(), media_type=self._metrics.content_type)

    async def version(self, request: Request) -> Response:
        """The version of duoserve."""
        return json_response({"version": __version__})

    async def page(self, request: Request) -> Response:
        """The status page."""
        return Response(PAGE, headers=PAGE_HEADERS, media_type="text/html")

    async def status(self, request: Request) -> Response:
        """The data of the status page."""
        data = status(self._loader, self._request_log, self._settings, self._since)
        return json_response(data, headers={"Cache-Control": "no-store"})

    def _model_card(self, model: Model) -> dict[str, object]:
        return {
            "id": self._settings.name,
            "object": "model",
            "created": self._created,
            "owned_by": "duoserve",
            "max_model_len": model.max_context,
        }

    def _token_text(self, model: Model) -> TokenText:
        """One TokenText for all answers, as it keeps what it has made."""
        if self._tokens is None:
            self._tokens = TokenText(model.tokenizer)
        return self._tokens

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.name:
            raise asking.not_found(name, self._settings.name)

    async def _answered(
        self, request: Request, service: Service, dialect: Dialect, asked: Asked, prompts: Sequence[Sequence[int]]
    ) -> ASGIApp:
        """The answer to ``asked`` for each of ``prompts``.

        If the client goes away, all work on it is stopped, and ClientGone is raised.
        """
        head = new_head(dialect, self._settings.name)
        tokens = None if asked.logprobs is None else self._token_text(service.model)
        pairs = [(ids, repeat) for ids in prompts for repeat in range(asked.n)]
        context = service.model.max_context
        wanted = [
            Wanted(ids, asked.params(len(ids), context, repeat), dialect.writer(index, tokens, ids), dialect.goes_on)
            for index, (ids, repeat) in enumerate(pairs)
        ]
        generation = await begin(service, self._request_log, head.id, wanted, asked)
        try:
            if asked.stream:
                first = await unless_gone(request.receive, generation.next(self._settings.ping_s))
                frames = events(first, generation, dialect, head, asked, self._settings.ping_s)
                return EventResponse(frames, generation.close)
            return await unless_gone(request.receive, _whole(generation, dialect, head, large=tokens is not None))
        except BaseException:
            generation.close()
            raise


def _check_room(asked: Asked, prompts: int, capacity: int) -> None:
    """Raises a 400 if there are more choices than ``capacity``: each is a request, and all are taken together."""
    choices = asked.n * prompts
    if choices > capacity:
        message = f"{choices} choices are more than the {capacity} requests that this server takes at once"
        raise bad("n" if asked.n > 1 else "prompt", f"{message} (--max-batch and --max-waiting together)")


async def _whole(generation: Generation, dialect: Dialect, head: Head, large: bool) -> Response:
    """All choices in their order, once they are complete; ``large``: with log-probabilities, maybe a million."""
    pieces: dict[Choice, list[Piece]] = {choice: [] for choice in generation.choices}
    while not generation.finished:
        event = await generation.next(None)
        if event is not None:
            pieces[event.choice].append(event.piece)
    usage = usage_of(generation.prompt_tokens, generation.output_tokens)
    choices = (choice.writer.whole(pieces[choice]) for choice in generation.choices)
    if large:
        return await large_json_response(answer(head, dialect.whole_object, choices, usage))
    return json_response(answer(head, dialect.whole_object, list(choices), usage))
