"""The server: what it answers equals what the model writes, whoever else asks; bad input is a sentence; nobody blocks others."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exlstm.cli import main
from exlstm.data.tokenizer import Bytes
from exlstm.serve import app, command
from exlstm.serve.asked import Refused, read
from exlstm.serve.config import Serve
from exlstm.serve.metrics import Metrics
from exlstm.serve.prefixes import PIECE, Prefixes, Reading
from exlstm.serve.worker import FAILURES, Worker
from test_language import build, writer

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
ENDLESS = {"prompt": "on and on", "max_tokens": 1_000_000, "seed": 0}
GOOD = {"prompt": "a", "max_tokens": 2, "seed": 1}


class Client:
    """Asks a server of this process; `worker` is its engine's thread."""

    def __init__(self, server, port):
        self.server, self.worker, self.port = server, server.worker, port

    def open(self, method, path, body=None, **headers):
        """An answer that is still to be read, with its connection."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection.request(method, path, raw, headers)
        return connection

    def raw(self, method, path, body=None, **headers):
        with contextlib.closing(self.open(method, path, body, **headers)) as connection:
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def post(self, path, body, **headers):
        """Status and JSON."""
        status, _, data = self.raw("POST", path, body, **headers)
        return status, json.loads(data)

    def write(self, **body):
        """The answer to a completion that fits."""
        status, answer = self.post(COMPLETE, body)
        assert status == 200, answer
        return answer

    def texts(self, **body):
        return [choice["text"] for choice in self.write(**body)["choices"]]

    def stream(self, path, **body):
        """The events of a stream; the last of a whole one is "[DONE]"."""
        status, headers, data = self.raw("POST", path, {**body, "stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), data
        parts = data.decode().split("\n\n")
        assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
        return [part if part == "[DONE]" else json.loads(part) for part in (part[6:] for part in parts)]

    def metric(self, name):
        _, _, data = self.raw("GET", "/metrics")
        return float(re.search(rf"^exlstm_{name} (\S+)$", data.decode(), re.M)[1])

    def until(self, name, value):
        """Waits until a metric has a value."""
        end = time.monotonic() + 20
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, wanted {value}"
            time.sleep(0.005)


def wait_for(found):
    """What a function finds, as soon as it is something."""
    end = time.monotonic() + 20
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return value


@contextlib.contextmanager
def served(model, room=None, **changes):
    """A server of `model` in this process, at a port of its own; `room` is what a connection holds that nobody reads."""
    config = Serve(model="here", **{"slots": 4, "max_tokens": 1_000_000, "drain": 1.0, **changes})
    config.check()
    with command.listening(config.host, 0) as listener:
        if room:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        server = command.Server(config, Worker(model, config))
        server.worker.start()
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Client(server, listener.getsockname()[1])
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(20)
            server.worker.stop()
            assert not thread.is_alive() and not server.worker.thread.is_alive()


@pytest.fixture(scope="module")
def model():
    return writer()


@pytest.fixture(scope="module")
def client(model):
    with served(model) as client:
        yield client


# What it writes

RULES = [
    {"temperature": 0},
    {"seed": 3},
    {"seed": 3, "top_k": 5, "temperature": 0.8},
    {"seed": 4, "top_p": 0.9, "repetition_penalty": 1.3},
    {"seed": 5, "min_p": 0.1, "temperature": 1.2, "stop": ["e", "xyz"]},
]
MANY = [{"prompt": "ab" * (i % 7 + 1), "max_tokens": 5 + i % 12, **RULES[i % len(RULES)]} for i in range(20)]


def test_requests_at_once_write_what_each_writes_alone(client, model):
    wanted = [[model.generate(**body)] for body in MANY]
    with ThreadPoolExecutor(len(MANY)) as pool:
        assert list(pool.map(lambda body: client.texts(**body), MANY)) == wanted
    assert client.texts(**MANY[3]) == wanted[3]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: ", ".join(rules))
def test_a_stream_says_what_the_whole_answer_says(client, rules):
    body = {"prompt": ["ab", "schön, 猫"], "n": 2, "max_tokens": 40, "echo": True, "seed": 1, **rules}
    whole = client.write(**body)
    *events, usage, done = client.stream(COMPLETE, **body, stream_options={"include_usage": True})
    texts, reasons = [""] * 4, [None] * 4
    for event in events:
        (choice,) = event["choices"]
        assert reasons[choice["index"]] is None and event["usage"] is None and event["object"] == "text_completion"
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert texts[0].startswith("ab") and texts[3].startswith("schön, 猫")
    assert usage["choices"] == [] and done == "[DONE]"
    assert {**usage["usage"]} == whole["usage"]


def test_characters_come_whole(model):
    """A model that writes nothing but one character of three bytes."""
    letters = "猫".encode()
    with served(model) as client:
        tokens = [letters[i % 3] for i in range(30)]
        step = client.worker.engine._chooser
        choose, at = step._choose, iter(tokens)

        def chosen(logits, *needs):
            found = choose(logits, *needs)
            found[:] = next(at, letters[0])
            return found

        step._choose = chosen
        events = client.stream(COMPLETE, prompt="a", max_tokens=8)[:-1]
    texts = [event["choices"][0]["text"] for event in events]
    # The last character has two of its bytes.
    assert texts == ["猫", "猫", "\ufffd"]


def tokens_until(model, stop):
    """How many tokens the text of the next test has up to the end of its stop."""
    decoder, text = model.tokenizer.decoder(), ""
    for count, token in enumerate(model.generate([97, 98], 60, seed=1), 1):
        text += decoder.push(token)
        if stop in text:
            return count
    return 60


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_is_found_wherever_its_tokens_part(client, model, stream):
    text = model.generate("ab", 60, seed=1)
    for start in (3, 17, 40):
        stop = text[start : start + 4]
        wanted = text[: text.index(stop)]
        body = {"prompt": "ab", "max_tokens": 60, "seed": 1, "stop": [stop, "\0never"]}
        if stream:
            choices = [event["choices"][0] for event in client.stream(COMPLETE, **body)[:-1]]
            assert "".join(choice["text"] for choice in choices) == wanted
            assert choices[-1]["finish_reason"] == "stop"
        else:
            answer = client.write(**body)
            assert answer["choices"][0]["text"] == wanted and answer["choices"][0]["finish_reason"] == "stop"
            # Those of the stop are written too.
            assert answer["usage"]["completion_tokens"] == tokens_until(model, stop)


def test_choices_draw_by_themselves_and_usage_counts_all(client, model):
    answer = client.write(prompt=[[97, 98], [99]], n=3, max_tokens=7, seed=5)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6)) and len({*texts}) == 6
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 6
    counts = {"prompt_tokens": 3, "completion_tokens": 42, "total_tokens": 45}
    assert answer["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    assert client.texts(prompt="c", n=3, max_tokens=7, seed=5) == texts[3:]
    assert client.texts(prompt="c", max_tokens=7) != client.texts(prompt="c", max_tokens=7)
    first = model.generate([99], 1, seed=5)
    ended = client.write(prompt="c", max_tokens=7, seed=5, stop_token_ids=first)
    assert ended["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}


def test_a_chat_is_a_text_by_the_template(client, model):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "who"},
    ]
    prompt = "System: be brief\n\nUser: hi\n\nAssistant: yes?\n\nUser: who\n\nAssistant:"
    wanted = model.generate(prompt, 30, seed=2, stop="\n\nUser:").lstrip()
    status, answer = client.post(CHAT, {"messages": messages, "max_completion_tokens": 30, "seed": 2, "user": "me"})
    assert status == 200 and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted} and choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    *events, done = client.stream(CHAT, messages=messages, max_tokens=30, seed=2)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant" and deltas[-1] == {} and done == "[DONE]"
    assert "".join(delta.get("content", "") for delta in deltas) == wanted
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    marked = Serve(template="<{role}>{content}</s>\n")
    body = json.dumps({"messages": messages[1:2], "stop": "x"}).encode()
    asked = read(body, True, marked, model.tokenizer)
    assert bytes(asked.prompts[0]).decode() == "<user>hi</s>\n<assistant>" and asked.rules["stop"] == ["x", "</s>"]


def test_prompts_that_begin_alike_are_read_from_there_on(client):
    start = "".join(chr(97 + i * i % 26) for i in range(2 * PIECE + 100))
    first = client.write(prompt=start, max_tokens=10, seed=1)
    again = client.write(prompt=start, max_tokens=10, seed=1)
    other = client.write(prompt=start[:-50] + "x", max_tokens=10, seed=1)
    unlike = client.write(prompt="x" + start, max_tokens=10, seed=1)
    answers = first, again, other, unlike, client.write(prompt="x" * PIECE + start[PIECE:], max_tokens=10, seed=1)
    found = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert found == [0, 2 * PIECE, 2 * PIECE, 0, 0]
    assert first["choices"] == again["choices"] != other["choices"]


def test_tokens_that_stand_for_nothing_are_not_written():
    wide = build(vocab_size=300)
    wide.tokenizer = Bytes()
    with served(wide) as client:
        assert client.write(prompt=[1, 2], n=4, max_tokens=50, seed=0)["usage"]["completion_tokens"] == 200
        assert client.post(COMPLETE, {**GOOD, "prompt": [256]})[0] == 400


def test_states_of_prompts_have_a_bound(model):
    def read_all(text, prefixes):
        reading = Reading(model.eval(), list(text.encode()), prefixes)
        while not reading.done:
            reading.step()
        return reading

    prefixes = Prefixes(1 << 30)
    read_all("a" * PIECE, prefixes)
    one = prefixes.used
    prefixes = Prefixes(2 * one)
    for letter in "abac":
        read_all(letter * PIECE, prefixes)
        assert prefixes.used <= 2 * one
    assert [read_all(letter * PIECE, prefixes).found for letter in "acb"] == [PIECE, PIECE, 0]
    assert read_all("a" * PIECE, Prefixes(0)).found == 0


# What does not fit

DEEP = {"messages": [{"role": "user", "content": "a"}]}
BAD = {
    "no prompt": (COMPLETE, {}, "prompt is null, wanted a text"),
    "null prompt": (COMPLETE, {"prompt": None}, "prompt is null"),
    "empty prompt": (COMPLETE, {"prompt": ""}, "prompt is empty"),
    "no prompts": (COMPLETE, {"prompt": []}, "prompt is empty"),
    "an empty one": (COMPLETE, {"prompt": ["a", []]}, "prompt is empty"),
    "prompt of objects": (COMPLETE, {"prompt": [{}]}, "prompt is a list of 1"),
    "mixed prompt": (COMPLETE, {"prompt": [1, "a"]}, "prompt is a list of 2"),
    "tokens beyond": (COMPLETE, {"prompt": [[1, 256]]}, "whole numbers from 0 to 255"),
    "tokens true": (COMPLETE, {"prompt": [[True]]}, "something else than tokens"),
    "surrogates": (COMPLETE, {"prompt": "a\ud800"}, "half a surrogate pair"),
    "long prompt": (COMPLETE, {"prompt": "a" * 200_000}, "200000 tokens, wanted at most 131072"),
    "many prompts": (COMPLETE, {"prompt": ["a"] * 1000}, "prompt holds 1000 prompts, wanted at most 32"),
    "prompts times n": (COMPLETE, {"prompt": ["a"] * 9, "n": 9}, "9 prompts and n 9 make 81 texts"),
    "n times many": (COMPLETE, {**GOOD, "n": 10**9}, "n is 1000000000, wanted a whole number from 1 to 32"),
    "n 0": (COMPLETE, {**GOOD, "n": 0}, "n is 0"),
    "n true": (COMPLETE, {**GOOD, "n": True}, "n is True"),
    "tokens 0": (COMPLETE, {**GOOD, "max_tokens": 0}, "max_tokens is 0"),
    "tokens negative": (COMPLETE, {**GOOD, "max_tokens": -1}, "max_tokens is -1"),
    "tokens huge": (COMPLETE, {**GOOD, "max_tokens": 10**30}, "max_tokens is 1000000000000"),
    "tokens text": (COMPLETE, {**GOOD, "max_tokens": "9"}, "max_tokens is '9'"),
    "tokens float": (CHAT, {**DEEP, "max_completion_tokens": 1.5}, "max_completion_tokens is 1.5"),
    "temperature negative": (
        COMPLETE,
        {**GOOD, "temperature": -0.1},
        "temperature is -0.1, wanted a number from 0 to 2",
    ),
    "temperature huge": (COMPLETE, b'{"prompt": "a", "temperature": 1e999}', "temperature is inf"),
    "temperature of 400 digits": (COMPLETE, {**GOOD, "temperature": 10**400}, "temperature is 1000000"),
    "top_p of 400 digits": (COMPLETE, {**GOOD, "top_p": -(10**400)}, "top_p is -1000000"),
    "temperature NaN": (COMPLETE, b'{"prompt": "a", "temperature": NaN}', "it holds NaN"),
    "top_p 0": (COMPLETE, {**GOOD, "top_p": 0}, "top_p is 0, wanted a number above 0 and up to 1"),
    "top_k negative": (COMPLETE, {**GOOD, "top_k": -1}, "top_k is -1"),
    "min_p list": (COMPLETE, {**GOOD, "min_p": [1]}, "min_p is a list of 1"),
    "penalty 0": (COMPLETE, {**GOOD, "repetition_penalty": 0}, "repetition_penalty is 0"),
    "stops": (COMPLETE, {**GOOD, "stop": ["a"] * 10_000}, "stop is a list of 10000, wanted a text or up to 4"),
    "stop empty": (COMPLETE, {**GOOD, "stop": ""}, "stop is a list of 1"),
    "stop long": (COMPLETE, {**GOOD, "stop": "a" * 999}, "each of 1 to 256 characters"),
    "stop numbers": (COMPLETE, {**GOOD, "stop": [1]}, "stop is a list of 1"),
    "stop tokens": (COMPLETE, {**GOOD, "stop_token_ids": [-1]}, "stop_token_ids is a list of 1"),
    "seed float": (COMPLETE, {**GOOD, "seed": 0.5}, "seed is 0.5"),
    "seed huge": (COMPLETE, {**GOOD, "seed": 2**70}, "seed is 1180591620717411303424"),
    "stream text": (COMPLETE, {**GOOD, "stream": "yes"}, "stream is 'yes', wanted true or false"),
    "usage alone": (
        COMPLETE,
        {**GOOD, "stream_options": {"include_usage": True}},
        "stream_options came without stream",
    ),
    "options": (COMPLETE, {**GOOD, "stream": True, "stream_options": [1]}, "stream_options is a list of 1"),
    "logprobs": (COMPLETE, {**GOOD, "logprobs": 0}, "logprobs is 0, which this server cannot do"),
    "logit_bias": (COMPLETE, {**GOOD, "logit_bias": {"1": 100}}, "logit_bias is an object of 1"),
    "suffix": (COMPLETE, {**GOOD, "suffix": "z"}, "suffix is 'z'"),
    "penalty": (CHAT, {**DEEP, "presence_penalty": 1}, "presence_penalty is 1"),
    "tools": (CHAT, {**DEEP, "tools": [{}]}, "tools is a list of 1"),
    "response_format": (CHAT, {**DEEP, "response_format": {"type": "json_object"}}, "response_format is an object"),
    "a typo": (COMPLETE, {**GOOD, "max_token": 3}, "unknown field 'max_token', did you mean 'max_tokens'?"),
    "echo of a chat": (CHAT, {**DEEP, "echo": True}, "unknown field 'echo'"),
    "no messages": (CHAT, {}, "messages is null"),
    "messages empty": (CHAT, {"messages": []}, "messages is a list of 0"),
    "message a text": (CHAT, {"messages": ["a"]}, "messages[0] is 'a'"),
    "role": (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role is 'tool', wanted one of"),
    "content": (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content is no text"),
    "picture": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is no text"),
    "not JSON": (COMPLETE, b"{", "the body is no JSON"),
    "no body": (COMPLETE, b"", "the body is no JSON"),
    "not UTF-8": (COMPLETE, b'{"prompt": "\xff"}', "it is not UTF-8"),
    "a list": (COMPLETE, b"[]", "the body is a list of 0, wanted a JSON object"),
    "nested": (COMPLETE, b"[" * 100_000, "nested too deeply"),
    "digits": (COMPLETE, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "the body is no JSON"),
}


def sentence(answer):
    """The message of an error in the API's shape: one sentence."""
    (error,) = answer.values()
    assert set(error) == {"message", "type", "param", "code"} and set(answer) == {"error"}
    message = error["message"]
    assert 0 < len(message) < 300 and "\n" not in message and "Traceback" not in message
    return message


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(client, case):
    path, body, told = BAD[case]
    status, answer = client.post(path, body)
    assert status == 400 and told in sentence(answer)
    assert answer["error"]["type"] == "invalid_request_error"
    assert client.write(**GOOD)["usage"]["completion_tokens"] == 2


def test_what_changes_nothing_is_taken(client):
    idle = {"user": "me", "metadata": {"a": "b"}, "logprobs": None, "logit_bias": {}, "best_of": 1, "suffix": ""}
    idle |= {"presence_penalty": 0, "frequency_penalty": 0.0, "store": False, "model": "here", "stop": None}
    assert client.texts(**GOOD, **idle) == client.texts(**GOOD)
    assert client.texts(prompt="a\0b", max_tokens=3, seed=1)
    for name in ("other", 1, ["here"], "\ud800"):
        status, answer = client.post(COMPLETE, {**GOOD, "model": name})
        assert status == 404 and "wanted 'here'" in sentence(answer) and answer["error"]["code"] == "model_not_found"


names = st.sampled_from(sorted({"prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "stream", "echo"}))
scalars = st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner))
bodies = st.dictionaries(names | st.text(max_size=6), values, max_size=6)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=bodies, chat=st.booleans(), lack=st.integers(0, 30))
def test_no_body_is_a_mistake_of_the_server(client, body, chat, lack):
    raw = json.dumps({"prompt": "a", "max_tokens": 2, **body}).encode()
    if chat:
        raw = json.dumps({**DEEP, "max_tokens": 2, **{k: v for k, v in body.items() if k != "prompt"}}).encode()
    raw = raw[: len(raw) - lack] if lack > 25 else raw
    # What is asked may be a lot of tokens; those are another test's.
    if b'"max_tokens": 2' in raw or lack > 25:
        status, _, data = client.raw("POST", CHAT if chat else COMPLETE, raw)
        assert status in (200, 400), data
        if status == 400:
            sentence(json.loads(data))
    assert client.raw("GET", "/health")[0] == 200


# Who may ask


def test_a_key_is_wanted_wherever_texts_are(model):
    with served(model, key="s3cret", cors=("*",)) as client:
        for path in ("/v1/models", "/metrics", "/v1/models/here", "/nowhere"):
            for wrong in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"}):
                status, headers, data = client.raw("GET", path, **wrong)
                assert status == 401 and headers["www-authenticate"] == "Bearer"
                assert json.loads(data)["error"]["type"] == "authentication_error"
        assert client.raw("GET", "/v1/models", Authorization="bearer s3cret")[0] == 200
        assert client.post(COMPLETE, GOOD)[0] == 401
        assert client.post(COMPLETE, GOOD, Authorization="Bearer s3cret", Host="example.org")[0] == 200
        for path in ("/", "/health"):
            assert client.raw("GET", path)[0] == 200


@pytest.mark.parametrize(
    ("words", "told"),
    {
        "": "serve wants the folder of a run",
        "x --host 0.0.0.0": "can be reached from elsewhere, wanted a key for it: --key or $EXLSTM_KEY",
        "x --host ::": "wanted a key",
        "x --host example.org": "wanted a key",
        "x --cors *": "cors * lets scripts of every page ask",
        "x --cors localhost:3000": "cors holds 'localhost:3000', wanted origins such as http://localhost:3000",
        "x --cors http://localhost:1 http://localhost:2/": "cors holds 'http://localhost:2/'",
        "x --port 65536": "port is 65536",
        "x --slots 0": "slots is 0",
        "x --timeout nan": "timeout is nan",
        "x --template a": "wanted {role} or {Role}, and behind it {content}",
        "x --template {content}{role}": "wanted {role} or {Role}, and behind it {content}",
        "x --key schlüssel": "visible ASCII",
        "nowhere": "nowhere does not exist",
    }.items(),
)
def test_settings_that_do_not_fit_are_one_sentence(words, told, capsys, monkeypatch):
    monkeypatch.delenv("EXLSTM_KEY", raising=False)
    assert main(["serve", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("exlstm: ") and told in error and error.count("\n") == 1


def test_what_cannot_be_listened_at_is_told(client):
    for host, port in (("127.0.0.1", client.port), ("a" * 70, 0), ("no host", 0)):
        with pytest.raises(ValueError, match="cannot be listened at"):
            command.listening(host, port)


def test_counts_are_exact():
    metrics = Metrics()
    metrics.tokens = 10**12 + 1
    assert "\nexlstm_generated_tokens_total 1000000000001\n" in metrics.text({})


def test_the_extra_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in ("command", "app", "answers"):
        monkeypatch.delitem(sys.modules, f"exlstm.serve.{name}")
    assert main(["serve", "here"]) == 2
    assert "pip install 'exlstm[serve]'" in capsys.readouterr().err


def test_the_key_comes_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("EXLSTM_KEY", "abc")
    config = Serve(model="x", host="0.0.0.0", cors=("*",))
    config.check()
    assert config.secret() == "abc" and "abc" not in command.greeting(config, 1)


def test_pages_of_others_cannot_ask(client, model):
    theirs = {"Origin": "http://localhost:3000"}
    status, headers, _ = client.raw("POST", COMPLETE, GOOD, **theirs)
    assert not [name for name in headers if name.lower().startswith("access-control")]
    asks = {**theirs, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    status, headers, _ = client.raw("OPTIONS", COMPLETE, **asks)
    assert status == 405 and "access-control-allow-origin" not in headers
    # Without asking first a page may send this, and a name of its own for this machine.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, answer = client.post(COMPLETE, GOOD, Content_Type=kind)
        assert status == 415 and "wanted application/json" in sentence(answer)
    status, answer = client.post(COMPLETE, GOOD, Host="example.org:80")
    assert status == 403 and "is not this machine" in sentence(answer)
    with served(model, cors=("http://localhost:3000",), key="k") as open_one:
        status, headers, _ = open_one.raw("OPTIONS", COMPLETE, **asks)
        assert status == 200 and headers["access-control-allow-origin"] == "http://localhost:3000"
        assert "access-control-allow-credentials" not in headers
        assert open_one.raw("OPTIONS", COMPLETE, **{**asks, "Origin": "http://localhost:1"})[0] == 400


def test_the_page_needs_nobody_else(client):
    status, headers, page = client.raw("GET", "/")
    page = page.decode()
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert not re.findall(r"https?:|//\w|@import|url\(|<script[^>]+src|innerHTML", page)
    assert "default-src 'none'" in headers["content-security-policy"]
    for path in ("/v1/completions", "/v1/chat/completions", "tokens/s", "abort()"):
        assert path in page


def test_paths(client):
    models = json.loads(client.raw("GET", "/v1/models")[2])
    assert [m["id"] for m in models["data"]] == ["here"]
    assert json.loads(client.raw("GET", "/v1/models/here")[2])["object"] == "model"
    for path in ("/", "/health", "/v1/models"):
        assert client.raw("HEAD", path)[::2] == (200, b"")
    for method, path, status in (
        ("GET", "/v1/models/there", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/health/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/../pyproject.toml", 404),
        ("GET", COMPLETE, 405),
        ("POST", "/health", 405),
    ):
        found, _, data = client.raw(method, path)
        assert found == status and sentence(json.loads(data))


# How much, and for how long


@pytest.mark.parametrize("how", ["told", "chunks"])
def test_a_body_that_is_too_large_is_not_kept(client, how):
    raw = json.dumps({**GOOD, "prompt": "a" * (2 << 20)}).encode()
    body = raw if how == "told" else (raw[i : i + 65536] for i in range(0, len(raw), 65536))
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", COMPLETE, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 413 and "more than 1048576 bytes" in sentence(json.loads(response.read()))
    assert client.write(**GOOD)


def test_a_full_queue_says_when_to_come_again(model):
    with served(model, slots=1, queue=1) as client:
        first = client.open("POST", COMPLETE, {**ENDLESS, "stream": True})
        client.until("slots_taken", 1)
        second = client.open("POST", COMPLETE, {**GOOD, "stream": True})
        client.until("requests_waiting", 1)
        status, headers, data = client.raw("POST", COMPLETE, GOOD)
        assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
        assert json.loads(data)["error"]["type"] == "rate_limit_error" and "come again" in sentence(json.loads(data))
        first.close()
        assert second.getresponse().read().endswith(b"data: [DONE]\n\n")
        second.close()
        assert client.write(**GOOD)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_slots_while_another_writes(client, model, stream):
    wanted = model.generate("ab", 120, seed=1)
    before = client.metric("cancelled_total")
    gone = client.open("POST", COMPLETE, {**ENDLESS, "n": 3, "stream": stream})
    client.until("slots_taken", 3)
    if stream:
        assert gone.getresponse().read(6) == b"data: "
    other = client.open("POST", COMPLETE, {"prompt": "ab", "max_tokens": 120, "seed": 1})
    gone.sock.close() if gone.sock else gone.close()
    gone.close()
    client.until("cancelled_total", before + 1)
    assert json.loads(other.getresponse().read())["choices"][0]["text"] == wanted
    other.close()
    client.until("slots_taken", 0)
    tokens = client.metric("generated_tokens_total")
    time.sleep(0.05)
    assert client.metric("generated_tokens_total") == tokens


def test_who_waits_and_goes_away_is_not_served(model):
    with served(model, slots=1) as client:
        first = client.open("POST", COMPLETE, {**ENDLESS, "stream": True})
        client.until("slots_taken", 1)
        for count, stream in enumerate((False, True), 1):
            waits = client.open("POST", COMPLETE, {**ENDLESS, "n": 4, "stream": stream})
            client.until("requests_waiting", 1)
            waits.close()
            client.until("requests_waiting", 0)
            wait_for(lambda count=count: client.worker.metrics.statuses[499] == count)
        first.close()
        client.until("slots_taken", 0)


def test_a_request_has_its_time(model):
    with served(model, timeout=0.15, slots=1) as client:
        status, answer = client.post(COMPLETE, ENDLESS)
        assert status == 504 and "took longer than 0.15 seconds" in sentence(answer)
        *events, last = client.stream(COMPLETE, **ENDLESS)
        assert len(events) > 1 and "took longer" in sentence(last)
        client.until("slots_taken", 0)
        first = client.open("POST", COMPLETE, {**ENDLESS, "stream": True})
        client.until("slots_taken", 1)
        # Also of one that only waits; its time begins with it.
        assert client.post(COMPLETE, {**GOOD, "max_tokens": 10**6})[0] == 504
        first.close()


def test_a_long_request_lets_others_begin(model):
    """Its texts take turns with those of others."""
    with served(model, slots=1) as client:
        many = client.open("POST", COMPLETE, {"prompt": "a" * 20_000, "n": 32, "max_tokens": 50, "stream": True})
        client.until("requests_waiting", 1)
        assert client.write(**GOOD)
        assert client.metric("generated_tokens_total") < 16 * 50 and client.metric("requests_waiting") == 1
        many.close()


def test_requests_that_wait_hold_few_states(model):
    """However many have begun: the state of a large model takes as much memory as a slot."""
    with served(model, slots=1, prefix_mib=0) as client:
        held, write = [], client.worker._write

        def counted():
            held.append(sum(job.reading is not None for job in client.worker._waiting))
            write()

        client.worker._write = counted
        bodies = [{"prompt": letter * 9, "n": 3, "max_tokens": 20, "seed": 1} for letter in "abcdef"]
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda body: client.write(**body), bodies))
    assert max(held) <= 2
    for body, answer in zip(bodies, answers, strict=True):
        wanted = model.generate([body["prompt"]] * 3, 20, seed=1)
        assert [choice["text"] for choice in answer["choices"]] == wanted
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_half_bodies_and_silent_clients_do_not_stay(model, monkeypatch):
    monkeypatch.setattr(app, "BODY", 0.2)
    monkeypatch.setattr(command, "PATIENCE", 0.2)
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    with served(model) as client:
        silent = [socket.create_connection(("127.0.0.1", client.port), timeout=10) for _ in range(40)]
        for i, connection in enumerate(silent):
            connection.sendall((b"", b"GET /health HTT", head.encode(), head.encode() + b'\r\n{"prompt"')[i % 4])
        assert client.write(**GOOD)
        for i, connection in enumerate(silent):
            with connection, contextlib.suppress(ConnectionResetError):
                assert connection.recv(100).startswith(b"HTTP/1.1 408" if i % 4 == 3 else b"")
        assert client.write(**GOOD)


@pytest.mark.parametrize("stream", [False, True])
def test_who_does_not_read_is_cut_off(model, monkeypatch, stream):
    """Others are answered meanwhile, and what it has is freed."""
    monkeypatch.setattr(app, "SLACK", 0.3)
    monkeypatch.setattr(command, "PATIENCE", 0.2)
    with served(model, room=4096, timeout=0.6) as client:
        body = json.dumps({"prompt": "a" * 5_000, "n": 32, "echo": True, "max_tokens": 1, "stream": stream}).encode()
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", client.port))
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            connections, here = client.server.server_state.connections, connection.getsockname()
            (slow,) = wait_for(lambda: [c for c in list(connections) if c.client == here])
            assert client.write(**GOOD)
            wait_for(lambda: slow not in connections)
        assert client.metric("slots_taken") == 0 and client.write(**GOOD)


def test_bytes_that_are_no_request_do_no_harm(client):
    for raw in (b"\0" * 999, b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000, b"\x16\x03\x01\x02\0"):
        connection = socket.create_connection(("127.0.0.1", client.port), timeout=10)
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(raw + b"\r\n\r\n")
            assert connection.recv(100)[:10] in (b"HTTP/1.1 4", b"")
        assert client.write(**GOOD)


# When it breaks, and when it ends


def test_a_step_that_fails_ends_its_requests_alone(model, capfd):
    with served(model) as client:
        engine = client.worker.engine
        engine._launch, launch = lambda writing: 1 / 0, engine._launch
        for _ in range(FAILURES - 1):
            status, answer = client.post(COMPLETE, GOOD)
            assert status == 500 and "division by zero" in sentence(answer)
        engine._launch = launch
        assert client.write(**GOOD) and client.raw("GET", "/health")[0] == 200
        engine._launch = lambda writing: 1 / 0
        for _ in range(FAILURES):
            assert client.raw("GET", "/health")[0] == 200
            assert client.post(COMPLETE, GOOD)[0] == 500
        client.worker.thread.join(20)
        status, _, data = client.raw("GET", "/health")
        assert status == 503 and sentence(json.loads(data))
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_mistake_between_the_tokens_hangs_nobody(model, monkeypatch, capfd):
    def feed(*_):
        raise ValueError("no such token")

    def full(*_):
        raise torch.cuda.OutOfMemoryError("no room")

    with served(model) as client:
        with monkeypatch.context() as patched:
            patched.setattr("exlstm.models.sampling.Row.feed", feed)
            status, answer = client.post(COMPLETE, GOOD)
            assert status == 500 and "no such token" in sentence(answer)
        with monkeypatch.context() as patched:
            patched.setattr("exlstm.serve.prefixes.read", feed)
            for _ in range(FAILURES):
                status, answer = client.post(COMPLETE, GOOD)
                assert status == 500 and "could not be read" in sentence(answer)
            # A prompt that is too long for the memory is not the device's end either.
            patched.setattr("exlstm.serve.prefixes.read", full)
            for _ in range(FAILURES):
                assert client.post(COMPLETE, GOOD)[0] == 500
        assert client.write(**GOOD) and client.metric("slots_taken") == 0
    assert "no such token" in capfd.readouterr().err


def test_a_dead_engine_is_told_at_once(model, capfd):
    with served(model) as client:
        running = client.open("POST", COMPLETE, {**ENDLESS, "stream": True})
        client.until("slots_taken", 1)

        def step():
            raise SystemExit("gone")

        client.worker.engine.step = step
        assert b"the engine does not run any more: SystemExit: gone" in running.getresponse().read()
        running.close()
        assert client.raw("GET", "/health")[0] == 503
        status, answer = client.post(COMPLETE, GOOD)
        assert status == 503 and "gone" in sentence(answer) and answer["error"]["type"] == "server_error"
    assert "SystemExit" in capfd.readouterr().err


def test_a_hung_engine_is_not_healthy(model, monkeypatch):
    with served(model) as client:
        free, held = threading.Event(), threading.Event()
        step = client.worker.engine.step

        def stuck():
            held.set()
            free.wait(20)
            return step()

        client.worker.engine.step = stuck
        running = client.open("POST", COMPLETE, GOOD)
        assert held.wait(20) and client.raw("GET", "/health")[0] == 200
        monkeypatch.setattr("exlstm.serve.worker.HUNG", 0.0)
        assert client.raw("GET", "/health")[0] == 503
        with pytest.raises(Refused, match="it hangs"):
            client.worker.submit(None)
        monkeypatch.undo()
        free.set()
        assert running.getresponse().status == 200
        running.close()


def test_what_runs_at_the_end_is_told(model):
    with served(model, drain=0.0) as client:
        running = client.open("POST", COMPLETE, {**ENDLESS, "stream": True})
        client.until("slots_taken", 1)
        client.server.handle_exit(signal.SIGTERM, None)
        assert b"the server has ended before the request was done" in running.getresponse().read()
        running.close()


def test_a_signal_lets_what_runs_end(model, tmp_path):
    model.save_pretrained(tmp_path / "small")
    words = ["-m", "exlstm", "serve", str(tmp_path / "small"), "--port", "0"]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"^serves small at http://127.0.0.1:(\d+), as in: curl ", process.stdout.readline())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"prompt": "a", "max_tokens": 800, "seed": 1, "stream": True})
        connection.request("POST", COMPLETE, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.read(6) == b"data: "
        # What anybody sends leaves nothing in the log.
        for raw in (
            b"GET\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: [::1]\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as other:
                other.sendall(raw)
                assert other.recv(9) == b"HTTP/1.1 "
        process.terminate()
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (128 + signal.SIGTERM, "", "")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    finally:
        process.kill()
