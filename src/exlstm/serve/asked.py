"""What a client asks: the JSON of a request becomes `Asked`, or one sentence about what is wrong with it.

Every field of the API is in one of three tables: it is used, it changes nothing and is taken, or it would change the answer
and is refused unless it says what happens anyway. Any other name is refused with the nearest one.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from exlstm.models.config import nearest
from exlstm.serve.config import Serve

DEFAULT_TOKENS = 256
STOPS, STOP_CHARACTERS, STOP_TOKENS = 4, 256, 8
USED = {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
USED |= {"stop", "stop_token_ids", "seed", "n", "stream", "stream_options"}
OWN = {True: {"messages"}, False: {"prompt", "echo"}}
TAKEN = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
TAKEN |= {"parallel_tool_calls"}
# What each of them may be besides null.
REFUSED: dict[str, tuple] = {
    "logprobs": (False,),
    "top_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
# name: (least, most, left out); a least that is no number of it stands as "above".
NUMBERS = {
    "temperature": (0, 2, 1.0),
    "top_p": ("above 0", 1, 1.0),
    "min_p": (0, 1, 0.0),
    "repetition_penalty": ("above 0", 100, 1.0),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MESSAGE = {"role", "content", "name", "refusal", "annotations"}
IDLE = {"tool_calls", "function_call", "audio"}


class Refused(Exception):
    """Why a request is not answered: a sentence, and how the API says it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, wait: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait

    def body(self) -> dict:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request that fits: `n` texts behind each prompt, by the same rules."""

    prompts: list[list[int]]
    n: int
    rules: dict[str, Any]
    """arguments of an engine's Request, without the prompt"""
    chat: bool
    stream: bool = False
    usage: bool = False
    """whether a stream ends with the usage"""
    echo: list[str] = field(default_factory=list)
    """the prompts as text where they come back, else nothing"""


def wrong(name: str, value, wanted: str) -> Refused:
    return Refused(400, f"{name} is {shown(value)}, wanted {wanted}", name)


def shown(value) -> str:
    """A value for a sentence: short, and printable whatever it holds."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else repr(value[:50] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read(body: bytes, chat: bool, settings: Serve, tokenizer) -> Asked:
    """The request in the body of /v1/chat/completions or of /v1/completions. Refused: it does not fit."""
    given = _object(body)
    _check_names(given, chat)
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("model", settings.title()) != settings.title():
        sentence = f"model is {shown(given['model'])}, wanted {settings.title()!r}, which is all that is served here"
        raise Refused(404, sentence, "model", "model_not_found")
    rules, echo = _rules(given, settings, tokenizer), []
    if chat:
        text, end = _conversation(given.get("messages"), settings.template)
        rules["stop"] = [*rules["stop"], end]
        prompts = [_tokens("messages", text, settings, tokenizer)]
    else:
        prompts = _prompts(given.get("prompt"), settings, tokenizer)
        echo = [tokenizer.decode(prompt) for prompt in prompts] if _flag(given, "echo") else []
    n = _whole(given, "n", 1, settings.max_choices, 1)
    if n * len(prompts) > settings.max_choices:
        told = f"{len(prompts)} prompts and n {n} make {n * len(prompts)} texts, wanted at most {settings.max_choices}"
        raise Refused(400, told, "n")
    return Asked(prompts, n, rules, chat, *_streaming(given), echo)


def _object(body: bytes) -> dict:
    def constant(name):
        raise ValueError(f"it holds {name}")

    try:
        given = json.loads(body, parse_constant=constant)
    except RecursionError:
        raise Refused(400, "the body is nested too deeply, wanted a JSON object") from None
    except ValueError as error:
        told = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise Refused(400, f"the body is no JSON ({told[:100]}), wanted a JSON object") from None
    if not isinstance(given, dict):
        raise Refused(400, f"the body is {shown(given)}, wanted a JSON object")
    return given


def _check_names(given: dict, chat: bool):
    known = USED | OWN[chat]
    for name, value in given.items():
        if name in REFUSED and value is not None:
            # 0 is not False here.
            if not any(type(value) is type(same) and value == same for same in REFUSED[name]):
                sentence = f"{name} is {shown(value)}, which this server cannot do; leave it out"
                raise Refused(400, sentence, name, "unsupported_parameter")
        elif name not in known | TAKEN | REFUSED.keys():
            sentence = f"unknown field {shown(name)}{nearest(name, sorted(known))}"
            raise Refused(400, sentence, name[:50].encode("ascii", "replace").decode(), "unknown_parameter")


def _rules(given: dict, settings: Serve, tokenizer) -> dict:
    most = settings.max_tokens
    tokens = _whole(given, "max_tokens", 1, most, min(DEFAULT_TOKENS, most))
    rules = {"max_tokens": _whole(given, "max_completion_tokens", 1, most, tokens)}
    for name, (least, largest, default) in NUMBERS.items():
        rules[name] = _number(given, name, least, largest, default)
    rules["top_k"] = _whole(given, "top_k", 0, 2**31 - 1, 0)
    # Drawn here: every request without a seed writes something else, also the first ones of a fresh process.
    rules["seed"] = _whole(given, "seed", -(2**63), 2**63 - 1, secrets.randbits(62))
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    wanted = f"a text or up to {STOPS}, each of 1 to {STOP_CHARACTERS} characters"
    if not isinstance(stop, list) or len(stop) > STOPS:
        raise wrong("stop", stop, wanted)
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= STOP_CHARACTERS:
            raise wrong("stop", stop, wanted)
        _check_text("stop", text)
    ends = given.get("stop_token_ids", [])
    if not isinstance(ends, list) or len(ends) > STOP_TOKENS or not _are_tokens(ends, tokenizer):
        wanted = f"a list of up to {STOP_TOKENS} tokens from 0 to {tokenizer.vocab_size - 1}"
        raise wrong("stop_token_ids", ends, wanted)
    rules["stop"], rules["eos"] = stop, sorted({*ends, *settings.eos})
    return rules


def _streaming(given: dict) -> tuple[bool, bool]:
    stream, options = _flag(given, "stream"), given.get("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise Refused(400, "stream_options came without stream, wanted stream true beside them", "stream_options")
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", options, 'an object such as {"include_usage": true}')
    return stream, _flag(options, "include_usage")


def _whole(given: dict, name: str, least: int, most: int, default: int) -> int:
    value = given.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise wrong(name, value, f"a whole number from {least} to {most}")
    return value


def _number(given: dict, name: str, least, most: float, default: float) -> float:
    value = given.get(name, default)
    # What is no number fits no limit; an int may be too large for a float.
    fits = type(value) in (int, float) and value <= most
    if not fits or not (value > 0 if isinstance(least, str) else value >= least):
        came = f"{least} and up to" if isinstance(least, str) else f"from {least} to"
        raise wrong(name, value, f"a number {came} {most}")
    return float(value)


def _flag(given: dict, name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return bool(value)


# Prompts


def _prompts(prompt, settings: Serve, tokenizer) -> list[list[int]]:
    """The tokens of a text or tokens, or of a list of those."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not all(isinstance(one, str | list) for one in prompt):
        raise wrong("prompt", prompt, "a text, a list of texts, a list of tokens, or a list of those")
    if not prompt:
        raise Refused(400, "prompt is empty, wanted at least one token", "prompt")
    if len(prompt) > settings.max_choices:
        raise Refused(400, f"prompt holds {len(prompt)} prompts, wanted at most {settings.max_choices}", "prompt")
    return [_tokens("prompt", one, settings, tokenizer) for one in prompt]


def _tokens(name: str, prompt: str | list, settings: Serve, tokenizer) -> list[int]:
    if isinstance(prompt, str):
        _check_text(name, prompt)
        try:
            prompt = tokenizer.encode(prompt)
        except ValueError as error:
            raise Refused(400, f"{name} cannot be read: {error}", name) from None
    elif not _are_tokens(prompt, tokenizer):
        wanted = f"whole numbers from 0 to {tokenizer.vocab_size - 1}"
        raise Refused(400, f"{name} holds something else than tokens, wanted {wanted}", name)
    if not prompt:
        raise Refused(400, f"{name} is empty, wanted at least one token", name)
    if len(prompt) > settings.max_prompt:
        sentence = f"{name} has {len(prompt)} tokens, wanted at most {settings.max_prompt}"
        raise Refused(400, sentence, name, "context_length_exceeded")
    return prompt


def _are_tokens(values: list, tokenizer) -> bool:
    return all(type(value) is int and 0 <= value < tokenizer.vocab_size for value in values)


def _check_text(name: str, text: str):
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(400, f"{name} holds half a surrogate pair, wanted Unicode text", name) from None


def _conversation(messages, template: str) -> tuple[str, str]:
    """A chat as a text that the assistant goes on from, and what ends its turn."""
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", messages, "a list of messages, at least one")
    before, behind = template.split("{content}")
    told = []
    for i, message in enumerate(messages):
        role, content = _message(f"messages[{i}]", message)
        told.append(_said(before, role) + content + behind)
    # A word that follows begins with its space.
    answer = _said(before, "assistant").rstrip(" ")
    end = behind.strip() or (behind + _said(before, "user")).rstrip()
    return "".join(told) + answer, end


def _said(before: str, role: str) -> str:
    return before.replace("{role}", role).replace("{Role}", role.capitalize())


def _message(where: str, message) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise wrong(where, message, "an object with role and content")
    for name, value in message.items():
        if name not in MESSAGE and not (name in IDLE and not value):
            raise Refused(400, f"{where} has the field {shown(name)}, wanted role and content", where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content is no text, wanted a text or a list of parts of type text", where)
    return ROLES[role], content
