"""OpenAISampler against servers that misbehave: each is a real HTTP server on loopback whose faults a test writes down."""

import email.utils
import json
import random
import socket
import sys
import threading
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import openai
import pytest
from conftest import POLICY, needs_vllm
from datasets import load_dataset
from draws import drain

from trl_offpolicy import DataRewriter, OpenAISampler, RewriteConfig
from trl_offpolicy.cli import main
from trl_offpolicy.cli.rewrite import _command_for
from trl_offpolicy.sampling.sampler import Request, SamplerError, SamplingParams
from trl_offpolicy.sampling.server_answers import read_answer, retry_after


def tokens(ids, log_probs=None, **more):
    log_probs = [-0.5] * len(ids) if log_probs is None else log_probs
    return {"token_ids": ids, "logprobs": {"token_logprobs": log_probs}, **more}


# Parts of a choice that are no answer to a request for at most 64 tokens.
MALFORMED = [
    *(tokens([5, token]) for token in (-1, 10**12, "a", 1.5, None, True, [])),
    *(tokens([5, 6], [-0.5, x]) for x in (None, "x", float("-inf"), float("nan"), 5.0, -9999.0, True)),
    tokens([5] * 65),
    tokens([5, 6], [-0.5]),
    tokens([]),
    tokens(7, []),
    tokens([5], {"0": -0.5}),
    tokens([5], finish_reason=None),
    tokens([5], finish_reason="abort"),
    tokens([5], text=["A"]),
    {"token_ids": None},
    {"logprobs": None},
    {"logprobs": []},
]


class Server(ThreadingHTTPServer):
    """Serves the model `name` with completions that depend on the seed alone, and meets each request with what `fault` says.

    `fault(body)` returns `None` (answer), what to change in the answer, or the name of a fault; it is called in the request's thread and
    may wait.
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(
        self,
        tokenizer,
        port=0,
        fault=lambda body: None,
        token_ids=True,
        extended=True,
        key=None,
        name=POLICY,
        retry_after=None,
        parsed=None,
    ):
        self.parsed = parsed or {}
        self.tokenizer, self.fault, self.token_ids, self.extended = tokenizer, fault, token_ids, extended
        self.key, self.name, self.dead = key, name, False
        self.busy = [] if retry_after is None else [("Retry-After", retry_after)]
        self.lock, self.seen, self.in_flight, self.most_in_flight, self.hung_up = (
            threading.Lock(),
            [],
            0,
            0,
            threading.Event(),
        )
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def die(self):
        """Refuses connections from now on, and cuts those that are open."""
        self.dead = True
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, headers=(), content_type="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for header, value in (("Content-Type", content_type), ("Content-Length", str(len(data))), *headers):
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(data)

    def refused(self):
        key = self.server.key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self.answer({"error": {"message": f"wrong key: {self.headers['Authorization']}"}}, 401)
            return True
        return False

    def do_GET(self):
        if not self.refused():
            models = [{"id": self.server.name, "object": "model", "max_model_len": 4096}]
            self.answer({"object": "list", "data": models if self.server.name else []})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        chat = self.path.endswith("/chat/completions")
        if not chat and not server.token_ids and not isinstance(body["prompt"], str):
            return self.answer({"error": {"message": "no such route"}}, 404)
        if not server.extended and {"top_k", "repetition_penalty", "min_p"} & body.keys():
            return self.answer({"error": {"message": "unknown parameter"}}, 400)
        if body.get("top_k") == 0:  # SGLang's rule, `SamplingParams.verify`; vLLM takes -1 as well
            return self.answer({"message": "top_k must be -1 (disable) or at least 1, got 0."}, 400)
        with server.lock:
            server.seen.append(body)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        fault = server.fault(body)
        with server.lock:
            server.in_flight -= 1
        self.meet(fault, body, chat)

    def meet(self, fault, body, chat):
        if fault == "cut" or self.server.dead:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"te')
            self.close_connection = True
        elif fault == "hang":
            self.connection.recv(1)  # until the client closes
            self.server.hung_up.set()
            self.close_connection = True
        elif fault == "garbage":
            self.answer(b'{"choices": [{"text": "A', headers=())
        elif fault == "page":
            self.answer(b"<html>busy</html>", content_type="text/html")
        elif isinstance(fault, int):
            self.answer({"error": {"message": f"fault {fault}"}}, fault, [("Retry-After-Ms", "10"), *self.server.busy])
        else:
            changed = MALFORMED[len(self.server.seen) % len(MALFORMED)] if fault == "malformed" else fault or {}
            self.answer({"object": "x", "choices": [{**self.choice(body, chat), **changed}]})

    def choice(self, body, chat):
        rng = random.Random(body["seed"])
        text = f"{rng.randrange(10**6)}\n\\boxed{{{rng.randrange(3)}}}"
        if chat:
            message = {"role": "assistant", "content": text, **self.server.parsed}
            return {"index": 0, "message": message, "finish_reason": "stop"}
        ids = [*self.server.tokenizer(text)["input_ids"], self.server.tokenizer.eos_token_id][: body["max_tokens"]]
        log_probs = {
            "token_logprobs": [-rng.random() for _ in ids],
            "tokens": [],
            "text_offset": [],
            "top_logprobs": [],
        }
        text = self.server.tokenizer.decode(ids, skip_special_tokens=True)
        reason = "stop" if ids[-1] == self.server.tokenizer.eos_token_id else "length"
        return {"index": 0, "text": text, "token_ids": ids, "logprobs": log_probs, "finish_reason": reason}


@pytest.fixture
def serve(tokenizer):
    started = []

    def serve(**kwargs):
        started.append(Server(tokenizer, **kwargs))
        return started[-1]

    yield serve
    for server in started:
        if not server.dead:
            server.die()


@pytest.fixture
def sample(request):
    """Makes a sampler that is closed after the test, impatient enough for one."""

    def sample(*servers, **kwargs):
        kwargs = {"request_timeout": 30.0, "give_up_after": 20.0, "batch_size": 4, **kwargs}
        sampler = OpenAISampler(POLICY, [server.url for server in servers], **kwargs)
        request.addfinalizer(sampler.close)
        return sampler

    return sample


def requests(num, text="2+{}?"):
    params = SamplingParams(max_completion_length=64)
    return [Request(f"r{i}", [{"role": "user", "content": text.format(i)}], 1000 + i, params) for i in range(num)]


def after_canary(fault):
    """`fault` for all but the canary, which is known by its one token."""
    return lambda body: fault(body) if body["max_tokens"] > 1 else None


@pytest.fixture
def expected(serve, sample):
    return drain(sample(serve()), requests(40))


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "garbage", "page", "hang", "malformed"])
def test_every_fault_is_survived_and_nothing_is_lost(serve, sample, expected, fault):
    """Every third request of one server meets the fault; the completions are those of an undisturbed run."""
    count = iter(range(10**6))
    bad = serve(fault=after_canary(lambda body: fault if next(count) % 3 == 2 and len(bad.seen) < 30 else None))
    sampler = sample(bad, serve(), request_timeout=0.5 if fault == "hang" else 30.0)
    assert drain(sampler, requests(40)) == expected
    assert len(bad.seen) > 3


JUNK = [None, True, -1, 0, 1.5, 10**400, float("nan"), float("inf"), "", "\ud800", [], [[]], {}, {"a": None}]


def with_junk(value, rng):
    """`value` with something else in one place, or with a place less."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice(JUNK)
    key = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
    changed = value.copy()
    if rng.random() < 0.2:
        del changed[key]
    else:
        changed[key] = with_junk(value[key], rng)
    return changed


@pytest.mark.parametrize("chat", [True, False])
def test_whatever_a_server_sends_is_an_answer_or_said_to_be_none(chat):
    """One place of a sound answer changed, 3,000 times: what is taken for an answer obeys what was asked, by a check of its own."""
    rng, taken = random.Random(0), 0
    choice = {"index": 0, "finish_reason": "stop"}
    choice |= (
        {"message": {"role": "assistant", "content": "A", "tool_calls": None}}
        if chat
        else {"text": "A", **tokens([7, 8, 9])}
    )
    kind = openai.types.chat.ChatCompletion if chat else openai.types.Completion
    for _ in range(3000):
        body = with_junk({"id": "x", "object": "x", "choices": [choice], "usage": None}, rng)
        response = kind.construct(**body) if isinstance(body, dict) else body
        try:
            text, ids, log_probs, reason = read_answer(response, "http://host/v1", not chat, most=4, vocabulary=10)
        except (ValueError, NotImplementedError):
            continue
        except SamplerError as error:
            assert chat and "--reasoning-parser" in str(error)
            continue
        taken += 1
        assert isinstance(text, str) and reason in ("stop", "length")
        assert len(ids) == len(log_probs) and len(ids) == (0 if chat else 3)
        assert all(isinstance(i, int) and i in range(10) for i in ids) and all(-9999 < x < 0.1 for x in log_probs)
    assert 300 < taken < 2900


def test_a_busy_server_is_waited_for_and_no_request_is_at_fault(serve, sample, expected):
    """Four of five completions are rate-limited while the canary passes."""
    count = iter(range(10**6))
    server = serve(fault=after_canary(lambda body: 429 if next(count) % 5 else None), retry_after="0.01")
    sampler = sample(server)
    with pytest.warns(UserWarning, match="is busy .status 429, it asks for 0.01 s.; trying again in 0.01 s") as told:
        completions = drain(sampler, requests(10))
    assert completions == {name: expected[name] for name in completions} and len(completions) == 10
    assert len(server.seen) > 40 > 10 * len(told)


def test_a_server_that_is_about_to_start_is_waited_for(serve, sample):
    count = iter(range(10**6))
    with pytest.warns(UserWarning, match="is busy"):
        sampler = sample(serve(fault=lambda body: 503 if next(count) < 3 else None, retry_after="0.01"))
    assert len(drain(sampler, requests(3))) == 3


def test_a_server_that_stays_busy_ends_the_run_resumably(serve, sample):
    """And is not asked all the time, nor waited for a day, as it asks; what it has taken before is waited for."""
    let_go, count = threading.Event(), iter(range(10**6))

    def fault(body):
        if next(count):
            return 429
        let_go.wait(30)

    server = serve(fault=after_canary(fault), retry_after="86400")
    sampler = sample(server, give_up_after=0.2)
    for request in requests(8):
        sampler.submit(request)
    with pytest.warns(UserWarning, match="it asks for 86,400 s.; trying again in 0.2 s"):
        while len(server.seen) < 9 and sampler._finished.empty():  # long after those 0.2 s
            time.sleep(0.01)
        let_go.set()
        (first,) = sampler.poll()
        assert first.finish_reason == "stop"
        with pytest.raises(SamplerError, match="no server has answered for 0.2 s.*429"):
            sampler.poll()
    assert len(server.seen) < 20


def test_a_server_that_dies_while_it_is_tried_again_ends_the_run(serve, sample):
    """Though it answered one request after it was set aside: what fails after that answer is counted from then on."""
    let_go, down = threading.Event(), threading.Event()

    def fault(body):
        if body["seed"] == 1000:
            let_go.wait(30)
            return None
        return 500 if down.is_set() else None

    sampler = sample(serve(fault=fault), give_up_after=0.2)
    down.set()
    for request in requests(2):
        sampler.submit(request)
    while not sampler._servers[0].failures:
        time.sleep(0.01)
    let_go.set()
    (first,) = sampler.poll()
    assert first.id == "r0"
    with pytest.raises(SamplerError, match="no server has answered for 0.2 s.*fault 500"):
        sampler.poll()


def test_retry_after_is_a_number_or_a_date():
    def asked(header):
        headers = {} if header is None else {"Retry-After": header}
        return retry_after(SimpleNamespace(response=SimpleNamespace(headers=headers)))

    assert asked("120") == 120 and asked("0.5") == 0.5
    date = email.utils.format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    assert asked(date) == pytest.approx(300, abs=5)
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert [
        asked(header) for header in (None, "", "0", "-1", "nan", "soon", past, "Fri, 31 Dec 99999999 23:59:59 GMT")
    ] == [None] * 8
    assert retry_after(TimeoutError()) is None


def test_poll_returns_when_it_is_over_though_a_server_never_answers(serve, sample):
    sampler = sample(serve(fault=after_canary(lambda body: "hang" if body["seed"] % 2 else None)))
    for request in requests(4):
        sampler.submit(request)
    answered = set()
    sampler.over = lambda: len(answered) == 2
    while not sampler.over():
        answered |= {completion.id for completion in sampler.poll()}
    assert answered == {"r0", "r2"} and sampler.poll() == []


@pytest.mark.parametrize("part", ["reasoning_content", "reasoning", "thinking", "unheard_of"])
def test_what_a_server_takes_apart_is_no_row(serve, sample, part):
    """The reasoning beside the content: nobody can say what the model wrote. Where ids come along, they say it."""
    for content in ("\\boxed{1}", None):
        with pytest.raises(SamplerError, match=rf"`{part}` beside `content`.*--reasoning-parser"):
            sample(serve(token_ids=False, parsed={part: "I think", "content": content}))
    server = serve(fault=after_canary(lambda body: "hang"), token_ids=False)
    sampler = sample(server)
    server.fault, server.parsed = lambda body: None, {part: "I think"}
    sampler.submit(requests(1)[0])
    with pytest.raises(SamplerError, match="--reasoning-parser"):
        sampler.poll()


def test_the_text_is_the_decoded_ids_whatever_a_server_says_it_is(serve, sample, expected, monkeypatch):
    whole = Handler.choice
    monkeypatch.setattr(
        Handler, "choice", lambda *given: {**whole(*given), "text": "", "reasoning_content": "I think"}
    )
    assert drain(sample(serve()), requests(40)) == expected


def chat_answer(reason="stop", **message):
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", **message}}
    response = openai.types.chat.ChatCompletion.construct(id="x", object="x", choices=[choice])
    return read_answer(response, "http://host/v1", False, most=4, vocabulary=10)


def test_no_part_of_a_message_is_dropped_and_none_passes_for_an_empty_completion():
    for part in (
        {"reasoning_details": [{"type": "reasoning.text", "text": "I think"}]},
        {"function_call": {"name": "f", "arguments": "{}"}},
        {"provider_specific_fields": {"reasoning_content": "I think", "refusal": None}},
    ):
        for content in ("5", "", None):
            with pytest.raises(SamplerError, match=f"`{next(iter(part))}` beside `content`"):
                chat_answer(content=content, **part)
    with pytest.raises(ValueError, match="the text None"):
        chat_answer(content=None)
    assert chat_answer(content=None, refusal="I will not")[3] == "refusal"
    harmless = {
        "annotations": [{"type": "url_citation"}],
        "provider_specific_fields": {"refusal": None},
        "tool_calls": [],
    }
    assert chat_answer(content="5", refusal=None, audio=None, reasoning="", **harmless) == ("5", [], [], "stop")
    assert chat_answer(content="") == ("", [], [], "stop")  # the model said nothing


def test_a_chat_text_ends_where_the_turn_does(serve, sample):
    server = serve(token_ids=False, parsed={"content": "5<|im_end|>\n<|im_start|>user"})
    with pytest.warns(UserWarning, match="does not heed `stop`"):
        completion = drain(sample(server), requests(1))["r0"]
    assert (completion.text, completion.finish_reason) == ("5", "stop")


def saying(monkeypatch, change):
    """Every server's `choice(body)` becomes `change(choice, body)`."""
    plain = Handler.choice
    monkeypatch.setattr(Handler, "choice", lambda self, body, chat: change(plain(self, body, chat), body))


def test_a_server_with_another_tokenizer_is_refused(serve, sample, tokenizer, monkeypatch):
    """Its texts are right, but its ids are other tokens here; not one of them becomes a completion."""
    sampler = sample(serve(), serve())
    saying(
        monkeypatch,
        lambda choice, body: {**choice, "token_ids": [(i + 9) % len(tokenizer) for i in choice["token_ids"]]},
    )
    for request in requests(8):
        sampler.submit(request)
    with pytest.raises(
        SamplerError, match=r"another tokenizer than the model here: it says '\d+.*but its token ids are .* 3 times"
    ):
        sampler.poll()


@pytest.mark.parametrize("odd", [1000, 1039])
def test_a_text_that_differs_from_the_ids_for_other_reasons_is_no_other_tokenizer(
    serve, sample, expected, monkeypatch, odd
):
    """Engines write special tokens, white space and a cut end in their own ways, and someone may have changed one text on its way."""
    ways = [
        lambda text: f"{text}<|im_end|>",
        lambda text: " " + text.replace("\n", " ") + "\n",
        lambda text: text[:-4],
        lambda text: f"{text}\ufffd",
        lambda text: "",
    ]

    def change(choice, body):
        if body["max_tokens"] == 1:
            return choice
        if body["seed"] == odd:
            return {**choice, "text": "I cannot say this in public."}
        return {**choice, "text": ways[body["seed"] % len(ways)](choice["text"])}

    saying(monkeypatch, change)
    assert drain(sample(serve()), requests(40)) == expected


@pytest.mark.parametrize(
    ("num_tokens", "said", "reason", "told"),
    [
        (64, "stop", "length", None),
        (63, "length", "length", "cut a completion before the limit that was asked for"),
        (63, "stop", "stop", "at no token that ends a turn"),
        (64, "length", "length", None),
    ],
)
def test_a_completion_has_ended_as_its_ids_say(serve, sample, tokenizer, num_tokens, said, reason, told):
    """Whatever the server says; and one that ends them in a way of its own is warned of."""
    ids = tokenizer("5")["input_ids"] * num_tokens
    sampler = sample(serve(fault=after_canary(lambda body: tokens(ids, text="5" * num_tokens, finish_reason=said))))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        (completion,) = drain(sampler, requests(1)).values()
    assert (completion.finish_reason, completion.completion_ids) == (reason, ids)
    assert [told in str(w.message) for w in given] == ([True] if told else [])


def test_a_server_that_comes_back_as_one_that_takes_text_apart_ends_the_run(serve, sample):
    """That shows when it is asked whether it is there again, and no waiting mends it."""
    server = serve(token_ids=False)
    sampler = sample(server, give_up_after=5.0)
    server.fault, server.parsed = after_canary(lambda body: 401), {"reasoning": "I think"}
    sampler.submit(requests(1)[0])
    deadline = time.monotonic() + 20
    while sampler._finished.empty() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not sampler._finished.empty()
    with pytest.raises(SamplerError, match="--reasoning-parser"):
        sampler.poll()


def test_a_connection_that_fails_says_why(serve, sample, monkeypatch):
    """Nobody listens, no such name, no TLS, a proxy's 502 for http and https; a line break behind the key is none of its own."""
    proxy = serve().url.replace("http://", "http://me:pa55word@").removesuffix("/v1")
    answer = Handler.do_GET
    monkeypatch.setattr(Handler, "do_CONNECT", lambda self: self.send_error(502), raising=False)
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: self.send_error(502) if self.path.startswith("http") else answer(self)
    )
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("no_proxy", "127.0.0.1,.invalid")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")
    server = serve(key="sk-very-secret")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        urls = [
            f"http://127.0.0.1:{taken.getsockname()[1]}/v1", "http://nobody.invalid/v1", server.url.replace("http", "https"),
            "http://10.1.2.3/v1", "https://10.1.2.3/v1",
        ]  # fmt: skip
        with pytest.raises(SamplerError) as raised:
            OpenAISampler(POLICY, urls)
    shown = f"(through the proxy {proxy.replace('me:pa55word', '***')})"
    causes = [
        "nothing listens there", "name cannot be resolved", "write http://", f"{shown}: InternalServerError: ",
        f"{shown}: ProxyError: 502",
    ]  # fmt: skip
    assert "Connection error" not in str(raised.value) and "pa55word" not in str(raised.value)
    for why in causes:
        assert why in str(raised.value)
    assert drain(sample(server), requests(1))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very\nsecret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds a character"):
        OpenAISampler(POLICY, server.url)


def test_a_dead_servers_requests_go_to_the_other_and_a_restarted_one_is_used_again(serve, sample, tokenizer, expected):
    def dies_after_five(body):
        if len(mortal.seen) == 5:
            threading.Thread(target=mortal.die).start()
        return "cut" if len(mortal.seen) >= 5 else None

    mortal, steady = serve(fault=after_canary(dies_after_five)), serve()
    sampler = sample(mortal, steady)
    assert drain(sampler, requests(40)) == expected
    assert len(steady.seen) > 30
    again = serve(port=mortal.server_address[1])
    deadline = time.monotonic() + 60
    while not any(body["max_tokens"] > 1 for body in again.seen):
        assert time.monotonic() < deadline, "the restarted server is never asked again"
        assert drain(sampler, requests(8)) == {f"r{i}": expected[f"r{i}"] for i in range(8)}


def test_a_slow_server_is_waited_for_though_another_is_dead(serve, sample):
    """Longer than `give_up_after`: it is at work."""
    let_go = threading.Event()
    slow, dead = serve(fault=after_canary(lambda body: let_go.wait(30) and None)), serve()
    sampler = sample(slow, dead, give_up_after=0.4)
    dead.die()
    for request in requests(8):
        sampler.submit(request)
    deadline = time.monotonic() + 30
    while (
        sampler._servers[1].failures < 3 and time.monotonic() < deadline
    ):  # the tries come ever more seldom: 0.1 s each here
        time.sleep(0.05)
    time.sleep(0.5)
    let_go.set()
    completions = {}
    while finished := sampler.poll():
        completions |= {c.id: c for c in finished}
    assert len(completions) == 8 and all(c.finish_reason == "stop" for c in completions.values())


def test_requests_in_flight_are_bounded_and_go_where_fewest_are(serve, sample):
    """A server that holds what it gets has its four; everything else goes to the other one, four at a time."""
    release, four = threading.Event(), threading.Barrier(4, timeout=30)
    slow = serve(fault=after_canary(lambda body: [release.wait(30)].clear()))
    fast = serve(fault=after_canary(lambda body: [four.wait()].clear()))  # answers only four at once
    sampler = sample(slow, fast)
    for request in requests(44):
        sampler.submit(request)
    finished = []
    while len(finished) < 40:
        finished += sampler.poll()
    release.set()
    while more := sampler.poll():
        finished += more
    assert sorted(c.id for c in finished) == sorted(f"r{i}" for i in range(44))
    assert slow.most_in_flight == fast.most_in_flight == 4 and len(slow.seen) == 5 and len(fast.seen) == 41


def test_abort_closes_the_connection(serve, sample):
    server = serve(fault=after_canary(lambda body: "hang"))
    sampler = sample(server)
    (request,) = requests(1)
    sampler.submit(request)
    deadline = time.monotonic() + 30
    while len(server.seen) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    sampler._answer_tokens, sampler._answer_seconds = 10**6, 1.0  # at which rate it has drawn all by now
    assert sampler.abort(request.id) == request.params.max_completion_length
    assert sampler.abort("never there") == 0
    assert server.hung_up.wait(30) and sampler.poll() == []


def test_an_abort_gives_the_slot_back_whenever_it_comes(serve, sample, expected):
    """Also of a request that was just about to be sent; and what is asked for anew is not answered with what was aborted."""
    sampler = sample(serve(), batch_size=4)
    for request in requests(300):
        sampler.submit(request)
        sampler.abort(request.id)
    assert drain(sampler, requests(40)) == expected
    deadline = time.monotonic() + 30
    while sampler._servers[0].outstanding and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sampler._servers[0].outstanding == 0
    first, other = requests(2)
    sampler.submit(first)
    while sampler._finished.empty() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sampler.abort(first.id) == len(expected[first.id].completion_ids) > 0  # finished, and not taken
    assert drain(sampler, [replace(other, id=first.id)])[first.id].text == expected[other.id].text


def test_what_no_server_can_answer_is_said_and_the_rest_goes_on(serve, sample, expected):
    """400 is the request's own fault at once; a 500 that always meets the same request becomes so, others being answered."""

    def fault(body):
        return {1003: 400, 1007: 500}.get(body["seed"])

    completions = drain(sample(serve(fault=fault), serve(fault=fault)), requests(40))
    assert "fault 400" in completions["r3"].error and "fault 500" in completions["r7"].error
    for name, completion in completions.items():
        assert completion == expected[name] if name not in ("r3", "r7") else True
    assert completions["r3"].finish_reason == "refused" and completions["r7"].finish_reason == "error"


ROWS = [{"problem": f"problem {i}", "solution": f"demonstration \\boxed{{{i % 3}}}"} for i in range(30)]


def rewrite_cli(tmp_path, name, url, *more):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return main(
        ["rewrite", "--model_name_or_path", POLICY, "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / name),
         "--num_generations", "3", "--max_completion_length", "64", "--sampler", "openai", "--base_url", url, "--batch_size", "4", *more]
    )  # fmt: skip


@pytest.mark.slow
def test_the_circuit_breaker_stops_resumably_with_the_journal_intact(serve, tmp_path, monkeypatch, capfd):
    """The only server dies and stays away: exit code 3; back again, the resumed run gives the rows of an undisturbed one."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    assert rewrite_cli(tmp_path, "undisturbed", serve(key="sk-very-secret").url) == 0

    def dies_after_thirty(body):
        if len(mortal.seen) == 30:
            threading.Thread(target=mortal.die).start()
        return "cut" if len(mortal.seen) >= 30 else None

    mortal = serve(fault=dies_after_thirty, key="sk-very-secret")
    assert rewrite_cli(tmp_path, "killed", mortal.url, "--give_up_after", "2") == 3
    journal = (tmp_path / "killed" / "journal.jsonl").read_text().splitlines()
    assert 10 < len(journal) < 31 and all(json.loads(line) for line in journal)
    assert "no server has answered for 2 s" in capfd.readouterr().out
    assert rewrite_cli(tmp_path, "killed", mortal.url) == 3, "no server at the start: nothing lost, come back later"
    assert rewrite_cli(tmp_path, "killed", serve(port=mortal.server_address[1], key="sk-very-secret").url) == 0
    kept = (tmp_path / "killed" / "journal.jsonl").read_text().splitlines()
    assert kept[: len(journal)] == journal
    one, other = (load_dataset(str(tmp_path / run / "dataset"), split="train") for run in ("undisturbed", "killed"))
    assert one.to_list() == other.to_list() and {"self", "expert"} <= set(one["source"])
    # The key is in no file and in no message, though the server quotes it when it refuses.
    monkeypatch.setenv("OPENAI_API_KEY", "sk-also-secret")
    assert rewrite_cli(tmp_path, "refused", serve(key="sk-very-secret").url) == 2
    printed = "".join(capfd.readouterr())
    assert "OPENAI_API_KEY" in printed and "-secret" not in printed
    assert not any("-secret" in file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())


def test_rows_of_which_attempts_failed_are_neither_done_nor_pushed_unless_told(serve, tmp_path, capsys):
    """The same command draws what failed, and the rows are those of an engine that never failed; or one says that they will do."""
    more = ("--verifier", "exact", "--stages", "self", "--max_rows", "10")
    ended = {"finish_reason": "content_filter"}
    bad = serve(fault=after_canary(lambda body: ended if body["seed"] % 7 == 0 else None))
    assert rewrite_cli(tmp_path, "run", bad.url, *more) == 3
    assert "The engine failed at" in (told := capsys.readouterr().out) and "Run the same command again" in told
    push = ["push", str(tmp_path / "run"), "--hub_dataset_id", "me/rows"]
    assert main(push) == 2 and "--accept_failed True" in capsys.readouterr().err
    assert rewrite_cli(tmp_path, "accepted", bad.url, *more, "--accept_failed") == 0
    assert rewrite_cli(tmp_path, "run", serve().url, *more) == 0
    assert rewrite_cli(tmp_path, "well", serve().url, *more) == 0
    one, other = (load_dataset(str(tmp_path / run / "dataset"), split="train") for run in ("run", "well"))
    assert one.to_list() == other.to_list()
    # What cannot be asked at all will not be better the next time.
    refusing = serve(fault=after_canary(lambda body: 400 if body["seed"] % 7 == 0 else None))
    assert rewrite_cli(tmp_path, "refused", refusing.url, *more) == 0


def test_a_server_that_goes_on_behind_the_end_of_a_turn_is_cut_there(serve, sample, expected, monkeypatch):
    plain = Handler.choice

    def runs_on(self, body, chat):
        choice = plain(self, body, chat)
        junk = self.server.tokenizer("\nuser: and then?")["input_ids"]
        choice["token_ids"] += junk
        choice["text"] += "\nuser: and then?"
        choice["logprobs"]["token_logprobs"] += [-9.0] * len(junk)
        return {**choice, "finish_reason": "length"}

    server = serve()
    sampler = sample(server)
    monkeypatch.setattr(Handler, "choice", runs_on)
    with pytest.warns(UserWarning, match="does not heed `stop_token_ids`"):
        assert drain(sampler, requests(40)) == expected
    assert all(body["stop_token_ids"] == [2] for body in server.seen if body["max_tokens"] > 1)


@pytest.mark.parametrize("extended", [True, False])
def test_a_server_without_token_ids_gives_rows_without_them(serve, tmp_path, extended):
    """Chat only, with or without the fields that OpenAI's API does not have; said once, and not a fault."""
    with pytest.warns(UserWarning, match="returns no token ids") as said:
        server = serve(token_ids=False, extended=extended)
        sampler = OpenAISampler(POLICY, server.url)
        asked_before = len(server.seen)
        args = RewriteConfig(str(tmp_path / "run"), num_generations=4, max_completion_length=64)
        rewritten = DataRewriter(POLICY, args, sampler=sampler).rewrite(ROWS)
    (told,) = [str(w.message) for w in said if "token ids" in str(w.message)]
    assert ("repetition_penalty" in told) != extended  # a server's own defaults would reshape what is drawn
    assert not any(rewritten["completion_ids"]) and not any(rewritten["behavior_log_probs"])
    drawn = [row for row in rewritten if row["source"] != "expert"]
    assert drawn and all("\\boxed" in row["completion"][0]["content"] for row in drawn)
    assert all(("repetition_penalty" in body) == extended and body["messages"] for body in server.seen)
    stops = {"stop_token_ids": [2]} if extended else {"stop": ["<|im_end|>"]}  # where the chat template ends a turn
    assert all(stops.items() <= body.items() for body in server.seen[asked_before:])
    if not extended:
        with pytest.raises(ValueError, match="top_k=5"):
            sampler.submit(Request("r", [], 1, SamplingParams(top_k=5)))
    # A plain text goes where no chat template renders it.
    (drawn,) = drain(sampler, [Request("plain", "2+2=", 7, SamplingParams(max_completion_length=64))]).values()
    assert server.seen[-1]["prompt"] == "2+2=" and drawn.text.startswith(str(random.Random(7).randrange(10**6)))
    sampler.close()


def test_secrets_stay_out_of_what_is_recorded(tmp_path, monkeypatch, capsys):
    """W&B records `sys.argv`, and `run_config.yaml` is pushed."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = [
        "rewrite",
        "--model_name_or_path",
        POLICY,
        "--dataset_name",
        str(data),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    monkeypatch.setattr(
        "sys.argv", ["trl-offpolicy", *argv, "--sampler", "openai", "--base_url", "http://me:pa55word@127.0.0.1:9/v1"]
    )
    assert main() == 3 and sys.argv[-1] == "http://***@127.0.0.1:9/v1"
    for url in (
        "me:pa55word@host:8000/v1",
        "http://me:pa55w/ord@host/v1",
        "ftp://me:pa55word@host",
        "http://host/v1?key=pa55word",
    ):
        assert main([*argv, "--sampler", "openai", "--base_url", url]) == 2
    assert main([*argv, "--base_url", "http://me:pa55word@host/v1"]) == 2, "without the sampler that takes it"
    printed = "".join(capsys.readouterr())
    assert "pa55w" not in printed and "http://host:port/v1" in printed and "--sampler openai" in printed
    following = _command_for([*argv, "--shard", "0/2", "--base_url", "http://me:pa55word@host/v1"], "1/2")
    assert "'http://***@host/v1' --shard 1/2" in following
    assert main([*argv, "--sampler", "vllm", "--engine_kwargs", '{"hf_token": "hf_secret"}']) == 2
    told = capsys.readouterr().err
    assert "set HF_TOKEN instead" in told and "hf_secret" not in told


def test_bad_addresses_and_options_say_what_to_write(serve, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        nobody = f"http://user:pass@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SamplerError, match="no server answers") as error:
            OpenAISampler(POLICY, nobody)
        assert "pass" not in str(error.value)
        with pytest.warns(UserWarning, match="starting with 1"):
            sampler = OpenAISampler(POLICY, [nobody, serve().url])
        assert drain(sampler, requests(3)).keys() == {"r0", "r1", "r2"}
        sampler.close()
    # Lists no model, but serves it, as `transformers serve` does.
    sampler = OpenAISampler(POLICY, serve(name=None).url)
    assert drain(sampler, requests(3)).keys() == {"r0", "r1", "r2"}
    sampler.close()
    with pytest.raises(ValueError, match="http://host:port/v1"):
        OpenAISampler(POLICY, "localhost:8000")
    with pytest.raises(ValueError, match=r"does not serve 'other'.*served_model_name"):
        OpenAISampler(POLICY, serve().url, served_model_name="other")
    with pytest.raises(SamplerError, match="has trouble.*fault 500"):
        OpenAISampler(POLICY, serve(fault=lambda body: 500).url)
    common = [
        "rewrite",
        "--model_name_or_path",
        POLICY,
        "--dataset_name",
        str(tmp_path / "rows.jsonl"),
        "--output_dir",
        str(tmp_path),
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    for more, message in (
        (["--sampler", "openai"], "--base_url"),
        (["--base_url", "http://x"], "option of --sampler openai"),
        (["--sampler", "vllm", "--engine_kwargs", "max_num_seqs=3"], "write a JSON object"),
        (["--sampler", "openai", "--base_url", "http://x", "--adapter", "a"], "option of --sampler vllm"),
    ):
        assert main([*common, *more]) == 2
        assert message in capsys.readouterr().err


@needs_vllm
@pytest.mark.slow
def test_rows_are_the_same_from_a_server_and_from_the_engine_in_process(policy, vllm_server, tmp_path):
    """The command line with both vLLM engines and different windows: the same ids and text; the log-probs agree to 1e-4."""
    from quickstart_task import GUIDED_PROMPT, demonstrations, problems

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in demonstrations(problems(40, 3))))
    common = [
        "rewrite", "--model_name_or_path", policy, "--dataset_name", str(rows), "--num_generations", "2", "--max_completion_length", "64",
        "--guided_prompt", GUIDED_PROMPT,
    ]  # fmt: skip
    engine = json.dumps({"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20})
    runs = {
        "vllm": ["--sampler", "vllm", "--dtype", "float32", "--batch_size", "16", "--engine_kwargs", engine],
        "openai": ["--sampler", "openai", "--base_url", vllm_server, "--batch_size", "5"],
    }
    datasets = {}
    for name, more in runs.items():
        assert main([*common, "--output_dir", str(tmp_path / name), *more]) == 0
        datasets[name] = load_dataset(str(tmp_path / name / "dataset"), split="train")
    one, other = datasets.values()
    for column in ("id", "source", "completion", "completion_ids", "num_sampled", "num_correct"):
        assert list(one[column]) == list(other[column]), column
    for a, b in zip(one["behavior_log_probs"], other["behavior_log_probs"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert {"self", "expert"} <= set(one["source"])


def test_a_server_tells_log_probs_of_texts_or_is_refused(serve, sample):
    """As vLLM writes them; a server without them, or without token ids, is refused with the way out."""
    asked = [([5, 6], [7]), ([5], [8, 9]), ([5], [])]

    def told(body):
        of = [None, *({str(i): {"logprob": -i / 10}} for i in body["prompt"][1:])]
        return {"prompt_logprobs": of} if "prompt_logprobs" in body else None

    assert sample(serve(fault=told)).token_log_probs(asked) == [[-0.7], [-0.8, -0.9], []]
    for server, why in ((serve(), "returns no `prompt_logprobs`"), (serve(token_ids=False), "takes no token ids")):
        with (
            pytest.warns() if not server.token_ids else nullcontext(),
            pytest.raises(NotImplementedError, match=f"{why}.*vllm serve"),
        ):
            sample(server).token_log_probs([])
    others = serve(fault=lambda body: {"prompt_logprobs": [None, {"1": {"logprob": -0.5}}]})
    with pytest.raises(SamplerError, match="none of this prompt"):
        sample(others).token_log_probs(asked)


def test_text_alone_needs_no_tokenizer_of_the_model(serve, sample):
    """As a teacher is asked: a server that could take token ids is sent messages, and calls its model what nobody here can load."""
    server = serve(name="nobody/knows")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = OpenAISampler("nobody/knows", server.url, text_only=True)
    completions = drain(sampler, requests(3))
    sampler.close()
    assert all(c.text and not c.completion_ids for c in completions.values()) and sampler.processing_class is None
    assert all("messages" in body for body in server.seen)
