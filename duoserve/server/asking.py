"""From the body of a request, a completion or a chat, to what is asked of the engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from duoserve.errors import RequestError
from duoserve.interface import MAX_LOGPROBS, Objectives
from duoserve.sampling import HIGHEST_SEED, LOWEST_SEED, MAX_STOPS, RANGES, SamplingParams
from duoserve.server.errors import ApiError, bad
from duoserve.server.fields import BodyFields, shown

MAX_N = 16
MAX_PROMPTS = 128
MAX_CHOICES = 256  # of one request: its number of prompts times ``n``
MAX_MESSAGES = 2048
MAX_TOKENS = 2**31  # beyond any context; the engine knows the real bound
MAX_OBJECTIVE_MS = 86_400_000  # a day
COMPLETION_TOKENS = 16  # OpenAI's default
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
NOT_FROM_CLIENTS = ("chat_template", "chat_template_kwargs")
NOT_SUPPORTED = (
    *("tools", "functions", "logit_bias", "suffix", "echo", "presence_penalty", "frequency_penalty"),
    *("reasoning_effort", "audio"),
    # fields of vLLM
    *("min_tokens", "stop_token_ids", "bad_words", "allowed_token_ids", "use_beam_search"),
    *("truncate_prompt_tokens", "continue_final_message", "include_stop_str_in_output"),
    *("guided_regex", "guided_choice", "guided_grammar"),
    *("structural_tag", "documents", "logits_processors", "prompt_embeds"),
    *("return_token_ids", "return_tokens_as_token_ids", "repetition_detection", "vllm_xargs"),
)
# Of these {} asks for a search or for any JSON, and 0 for the prompt's tokens alone or for no thoughts.
NOT_EVEN_EMPTY = ("web_search_options", "guided_json", "structured_outputs", "prompt_logprobs", "thinking_token_budget")

Messages = list[dict[str, str]]
Prompt = str | list[int]


@dataclass(frozen=True)
class Asked:
    """A request, checked as far as that needs neither tokenizer nor engine.

    ``prompt_field`` names the field that has the prompt. ``max_tokens`` None: all that the context holds. ``sampling``
    has fields of SamplingParams by name. ``include_usage`` asks for the usage at the end of a stream, ``usage_so_far``
    for it in each chunk. ``arrived`` is when the body was there, in seconds of ``time.monotonic``.
    """

    model: str | None
    prompt_field: str
    max_tokens: int | None
    sampling: Mapping[str, Any]
    n: int
    logprobs: int | None
    stream: bool
    include_usage: bool
    usage_so_far: bool
    objectives: Objectives
    arrived: float = field(default_factory=time.monotonic)

    def params(self, prompt_tokens: int, context: int, repeat: int) -> SamplingParams:
        """The parameters of a prompt's ``repeat``-th choice; raises a 400 if ``context`` tokens do not hold it.

        With a seed, choices count up from it, or they would all be the same; the highest seed is followed by 0.
        """
        room = context - prompt_tokens
        if room < 1 or (self.max_tokens or 1) > room:
            raise self._too_long(prompt_tokens, context)
        sampling = dict(self.sampling)
        if (seed := sampling.get("seed")) is not None:
            counted = seed + repeat
            sampling["seed"] = counted if counted <= HIGHEST_SEED else counted - HIGHEST_SEED - 1
        return _sampling_params(max_tokens=self.max_tokens or room, **sampling)

    def _too_long(self, prompt_tokens: int, context: int) -> ApiError:
        """Clients know this refusal by its code, some by how OpenAI's message begins."""
        wanted = "" if self.max_tokens is None else f" and max_tokens={self.max_tokens}"
        too_long = prompt_tokens >= context
        message = (
            f"this model's maximum context length is {context} tokens, but there are {prompt_tokens} in the prompt"
            f"{wanted}: {'shorten the prompt' if too_long else 'lower max_tokens'}"
        )
        at_fault = self.prompt_field if too_long else "max_tokens"
        return ApiError(400, message, param=at_fault, code="context_length_exceeded")


def completion(fields: BodyFields) -> tuple[Asked, list[Prompt]]:
    """The body of ``/v1/completions``, and its prompts."""
    fields.refuse_other(add_special_tokens=True, skip_special_tokens=True)
    prompts = _prompts(fields)
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    max_tokens = fields.integer("max_tokens", 1, MAX_TOKENS)
    asked = _asked(fields, "prompt", max_tokens or COMPLETION_TOKENS, logprobs)
    if asked.n * len(prompts) > MAX_CHOICES:
        raise bad("n", f"{len(prompts)} prompts with n={asked.n} are more than {MAX_CHOICES} choices")
    return asked, prompts


def chat(fields: BodyFields) -> tuple[Asked, Messages]:
    """The body of ``/v1/chat/completions``, and its messages. Only the template writes special tokens."""
    fields.refuse_other(add_generation_prompt=True, add_special_tokens=False, skip_special_tokens=True)
    messages = _messages(fields)
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    wants = fields.flag("logprobs")
    if top and not wants:
        raise bad("top_logprobs", "top_logprobs needs logprobs to be true")
    most = fields.integer("max_completion_tokens", 1, MAX_TOKENS) or fields.integer("max_tokens", 1, MAX_TOKENS)
    return _asked(fields, "messages", most, (top or 0) if wants else None), messages


def _asked(fields: BodyFields, prompt_field: str, max_tokens: int | None, logprobs: int | None) -> Asked:
    _refuse(fields)
    stream = fields.flag("stream")
    options = fields.part("stream_options")
    if not stream and fields.raw("stream_options") is not None:
        raise bad("stream_options", "stream_options needs stream to be true")
    sampling = _sampling(fields)
    _sampling_params(**sampling)
    return Asked(
        model=fields.text("model"),
        prompt_field=prompt_field,
        max_tokens=max_tokens,
        sampling=sampling,
        n=_n(fields),
        logprobs=logprobs,
        stream=stream,
        include_usage=options.flag("include_usage"),
        usage_so_far=options.flag("continuous_usage_stats"),
        objectives=_objectives(fields),
    )


def _n(fields: BodyFields) -> int:
    """How many choices a prompt has."""
    n, best_of = fields.integer("n", 1, MAX_N) or 1, fields.integer("best_of", 1, MAX_N)
    if best_of not in {None, n}:
        raise bad("best_of", f"best_of is {best_of} and n is {n}, but this server makes no more than it returns")
    return n


def _refuse(fields: BodyFields) -> None:
    """Refuses fields that would change the answer and are not supported, unless their value asks for nothing."""
    for name in NOT_FROM_CLIENTS:
        if fields.raw(name) not in (None, {}):
            raise bad(name, f"{name} is not taken from clients")
    fields.refuse(*NOT_SUPPORTED)
    fields.refuse_even_empty(*NOT_EVEN_EMPTY)
    fields.refuse_other(length_penalty=1.0, modalities=["text"], verbosity="medium")
    if fields.part("response_format").text("type") not in {None, "text"}:
        raise fields.wrong("response_format", 'of type "text": this server constrains no output')


def _sampling(fields: BodyFields) -> dict[str, Any]:
    top_k = fields.integer("top_k", -1, MAX_TOKENS)  # -1 is off, as vLLM has it
    found = {
        "top_k": None if top_k is None else max(0, top_k),
        **{name: fields.number(name, low, high) for name, (low, high) in RANGES.items()},
        "stop": _stops(fields),
        "seed": fields.integer("seed", LOWEST_SEED, HIGHEST_SEED),
        "ignore_eos": fields.flag("ignore_eos"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _stops(fields: BodyFields) -> list[str] | None:
    """One text or several. They are checked here, for what else is there may be too deep to be told of."""
    value = fields.raw("stop")
    stops = [value] if isinstance(value, str) else value
    if stops is None or (isinstance(stops, list) and len(stops) <= MAX_STOPS and all(map(_is_stop, stops))):
        return stops
    raise fields.wrong("stop", f"at most {MAX_STOPS} non-empty strings")


def _is_stop(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _sampling_params(**values: Any) -> SamplingParams:
    try:
        return SamplingParams(**values)
    except RequestError as error:
        name = str(error).partition(" ")[0]  # the message begins with the field's name
        raise bad(name if name in values else None, str(error)) from error


def _objectives(fields: BodyFields) -> Objectives:
    ttft_ms = fields.number("slo_ttft_ms", 0.001, MAX_OBJECTIVE_MS)
    tpot_ms = fields.number("slo_tpot_ms", 0.001, MAX_OBJECTIVE_MS)
    return Objectives.of_ms(ttft_ms, tpot_ms)


def _prompts(fields: BodyFields) -> list[Prompt]:
    """The prompts: text, token ids, or a list of either."""
    value = fields.raw("prompt")
    if isinstance(value, str) or _is_ids(value):
        return [value]
    several = isinstance(value, list) and 0 < len(value) <= MAX_PROMPTS
    if several and (all(isinstance(one, str) for one in value) or all(_is_ids(one) for one in value)):
        return list(value)
    raise fields.wrong("prompt", f"text, token ids, or at most {MAX_PROMPTS} of one kind of these")


def _is_ids(value: object) -> bool:
    """Whether ``value`` is a list of integers (not booleans). The engine checks them against the vocabulary."""
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _messages(fields: BodyFields) -> Messages:
    value = fields.raw("messages")
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise fields.wrong("messages", f"an array of 1 to {MAX_MESSAGES} messages")
    return [_message(one, f"messages[{place}]") for place, one in enumerate(value)]


def _message(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise bad(where, f"{where} is {shown(value)}, but must be an object")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise bad(f"{where}.role", f"{where}.role is {shown(role)}, but must be one of {', '.join(ROLES)}")
    fields = BodyFields(value, f"{where}.")
    fields.refuse("tool_calls", "function_call")
    message = {"role": ROLES[role], "content": _content(value.get("content"), f"{where}.content", role)}
    name = fields.text("name")
    return message if name is None else message | {"name": name}


def _content(value: object, where: str, role: str) -> str:
    """The content of a message: text, or text in parts; an assistant's may be absent."""
    if isinstance(value, str):
        return value
    if value is None and role == "assistant":
        return ""
    if isinstance(value, list):
        return "\n".join(_text_part(part, f"{where}[{place}]") for place, part in enumerate(value))
    raise bad(where, f"{where} is {shown(value)}, but must be text or an array of text parts")


def _text_part(part: object, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise bad(where, f'{where} must be {{"type": "text", "text": ...}}: this server takes nothing but text')
    return text


def not_found(model: str, known: str) -> ApiError:
    """The 404 for a model that is not served here."""
    message = f"the model {shown(model)} is not served here; {known} is"
    return ApiError(404, message, param="model", code="model_not_found")
