"""OpenAISampler against servers that misbehave: each is a real HTTP server on loopback whose faults a test writes down."""

import json
import random
import socket
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import POLICY, needs_vllm
from datasets import load_dataset
from test_sampling import drain

from trl_offpolicy import DataRewriter, OpenAISampler, RewriteConfig
from trl_offpolicy.cli import main
from trl_offpolicy.sampling import Request, SamplerError, SamplingParams


class Server(ThreadingHTTPServer):
    """Serves the model `name` with completions that depend on the seed alone, and meets each request with what `fault` says.

    `fault(body)` returns `None` (answer), or the name of a fault; it is called in the request's thread and may wait.
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(
        self, tokenizer, port=0, fault=lambda body: None, token_ids=True, extended=True, key=None, name=POLICY
    ):
        self.tokenizer, self.fault, self.token_ids, self.extended = tokenizer, fault, token_ids, extended
        self.key, self.name, self.dead = key, name, False
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
        if not chat and not server.token_ids:
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
            self.answer({"error": {"message": f"fault {fault}"}}, fault, [("Retry-After-Ms", "10")])
        else:
            self.answer({"object": "x", "choices": [self.choice(body, chat)]})

    def choice(self, body, chat):
        rng = random.Random(body["seed"])
        text = f"{rng.randrange(10**6)}\n\\boxed{{{rng.randrange(3)}}}"
        if chat:
            return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        ids = [*self.server.tokenizer(text)["input_ids"], self.server.tokenizer.eos_token_id][: body["max_tokens"]]
        log_probs = {
            "token_logprobs": [-rng.random() for _ in ids],
            "tokens": [],
            "text_offset": [],
            "top_logprobs": [],
        }
        return {"index": 0, "text": text, "token_ids": ids, "logprobs": log_probs, "finish_reason": "stop"}


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


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "garbage", "page", "hang"])
def test_every_fault_is_survived_and_nothing_is_lost(serve, sample, expected, fault):
    """Every third request of one server meets the fault; the completions are those of an undisturbed run."""
    count = iter(range(10**6))
    bad = serve(fault=after_canary(lambda body: fault if next(count) % 3 == 2 and len(bad.seen) < 30 else None))
    sampler = sample(bad, serve(), request_timeout=0.5 if fault == "hang" else 30.0)
    assert drain(sampler, requests(40)) == expected
    assert len(bad.seen) > 3


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
    sampler.abort(request.id)
    sampler.abort("never there")
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
    sampler.abort(first.id)  # finished, and not taken
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


@pytest.mark.parametrize("extended", [True, False])
def test_a_server_without_token_ids_gives_rows_without_them(serve, tmp_path, extended):
    """Chat only, with or without the fields that OpenAI's API does not have; said once, and not a fault."""
    with pytest.warns(UserWarning, match="returns no token ids") as said:
        server = serve(token_ids=False, extended=extended)
        sampler = OpenAISampler(POLICY, server.url)
        args = RewriteConfig(str(tmp_path / "run"), num_generations=4, max_completion_length=64)
        rewritten = DataRewriter(POLICY, args, sampler=sampler).rewrite(ROWS)
    sampler.close()
    (told,) = [str(w.message) for w in said if "token ids" in str(w.message)]
    assert ("repetition_penalty" in told) != extended  # a server's own defaults would reshape what is drawn
    assert not any(rewritten["completion_ids"]) and not any(rewritten["behavior_log_probs"])
    drawn = [row for row in rewritten if row["source"] != "expert"]
    assert drawn and all("\\boxed" in row["completion"][0]["content"] for row in drawn)
    assert all(("repetition_penalty" in body) == extended and body["messages"] for body in server.seen)
    if not extended:
        with pytest.raises(ValueError, match="top_k=5"):
            sampler.submit(Request("r", [], 1, SamplingParams(top_k=5)))


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
    assert main() == 3 and sys.argv[-1] == "http://127.0.0.1:9/v1"
    assert "pa55word" not in "".join(capsys.readouterr())
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
