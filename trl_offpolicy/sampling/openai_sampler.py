"""Sampling from servers that speak OpenAI's API: one `vllm serve`, a fleet of them, SGLang, or whatever answers.

The requests run on an event loop in a thread of their own, through the `openai` SDK, which retries and backs off. A
server that still fails is set aside and asked again later; its requests go to the others. Where a server takes token
ids and returns them (vLLM; SGLang since July 2026, https://github.com/sgl-project/sglang/pull/30917), prompts are
rendered here and rows carry ids and log-probs, the same as from the engine in process. Elsewhere the server's own chat
template renders, and rows carry the text alone.
"""

import asyncio
import math
import os
import queue
import threading
import warnings
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..data.redaction import redacted
from ..data.tokenization import says_otherwise
from ..data.turns import end_of_turn_id, special_tokens, stop_token_ids, turn_text
from .loading import load_processing_class
from .provenance import adapted_revision
from .sampler import (
    LONGEST_BLOCK,
    Completion,
    Request,
    Sampler,
    SamplerError,
    SamplingParams,
    cannot_draw_hinted,
    check_positive,
    drawn_completion,
    needs,
    prompt_ids,
)
from .server_answers import ENDED_BY_SERVER, cause, ended, read_answer, read_prompt_log_probs, retry_after, shown


try:
    import openai
except ModuleNotFoundError:
    openai = None  # `OpenAISampler` says how to install it

# Ways of asking a server, the best first: token ids in and out; messages with the fields that override the defaults of
# the model's generation config (vLLM and SGLang know them); messages with nothing but OpenAI's own fields.
DIALECTS = ("token_ids", "chat_extended", "chat")
CANARY = Request("canary", [{"role": "user", "content": "Hi"}], 1, SamplingParams(max_completion_length=1))
NO_CONTEXT = 1 << 30  # tokens of context of a server that does not say how many it takes
MAX_TRIES = 3  # of one request while other requests are answered; after that the request counts as one that no server can answer
BUSY = (429, 503)  # statuses of a server that is overloaded or starting; the request is not at fault
TELL_EVERY = 60.0  # seconds from one sentence on a busy server to the next
_SCORING = "The log-probabilities of given texts are told by `vllm serve`, and by the engines in this process (--sampler vllm or transformers)."
CONNECT = 10.0  # seconds for a connection
LOOK = 0.5  # seconds after which `poll` looks whether it is over, while it waits
KNOWN_LETTERS = (
    8  # when this many letters of a server's texts match what its token ids decode to here, it has the same tokenizer
)
MOST_DOUBTFUL = 3  # when this many completions do not match before that, it has another tokenizer

# Exceptions that a faulty server causes; `NotImplementedError` is raised here when a server returns no token ids.
_FAILURES = (*([openai.OpenAIError] if openai else []), TimeoutError, ValueError, NotImplementedError)


@dataclass(eq=False, slots=True)
class _Server:
    client: Any
    url: str  # as it is printed
    room: int  # requests in flight that it takes; fewer after it has said that it is busy
    outstanding: int = 0
    ready: bool = False
    busy: bool = False  # it said that it is overloaded, so it gets no new requests; those it has go on
    warned_at: float = -math.inf  # when the user was last told that we wait for it
    failures: int = 0  # since its last answer
    reviving: asyncio.Task | None = None
    context: int = NO_CONTEXT
    letters: int = 0  # letters of its texts that matched what its token ids decode to here
    doubtful: set[str] = field(
        default_factory=set
    )  # requests that it has answered with ids that say something else than its text


@dataclass(eq=False, slots=True)
class _Job:
    """A request on its way."""

    request: Request
    ids: list[int] | None
    answered: int  # how many answers there had been when it was last at fault
    tries: int = 0
    failed: set[_Server] = field(default_factory=set)
    task: asyncio.Task | None = None
    aborted: bool = False
    sent: float | None = None  # when this try began
    completion: Completion | None = None


class OpenAISampler(Sampler):
    """
    A [`Sampler`] on one or many OpenAI-compatible servers. The API key is `OPENAI_API_KEY`, if the servers want one.

    Args:
        model (`str`): The model that will be trained, Hub id or local directory; rows carry its name.
        base_url (`str` or `list[str]`): Where it is served, for example `"http://127.0.0.1:8000/v1"`.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer with a chat template; by default the
            model's.
        served_model_name (`str`, *optional*): What the servers call the model; by default as `model`.
        revision (`str`, *optional*): Revision that rows carry and the tokenizer is taken from; no server tells its
            own.
        batch_size (`int`, *optional*, defaults to `128`): Requests in flight at each server.
        request_timeout (`float`, *optional*, defaults to `600.0`): Seconds for one completion, the SDK's retries
            included.
        give_up_after (`float`, *optional*, defaults to `300.0`): Seconds of failures without a single answer after
            which `poll` raises, unless a server is still at work.
        text_only (`bool`, *optional*, defaults to `False`): Ask with messages, which the servers render, whatever else
            they can do: completions have no token ids, and no tokenizer of the model is needed here.

    Raises:
        ModuleNotFoundError: The `openai` SDK is not installed.
        SamplerError: No server answers, at the start or for `give_up_after` seconds.
        ValueError: A URL that is none, or servers that refuse us or do not serve the model.
    """

    def __init__(
        self,
        model: str,
        base_url: str | list[str],
        processing_class=None,
        served_model_name: str | None = None,
        revision: str | None = None,
        batch_size: int = 128,
        request_timeout: float = 600.0,
        give_up_after: float = 300.0,
        text_only: bool = False,
    ):
        needs("openai", "openai", "OpenAISampler")
        check_positive(batch_size=batch_size, request_timeout=request_timeout, give_up_after=give_up_after)
        self.name, self.revision, self.served_model_name = model, revision or "unknown", served_model_name or model
        self.batch_size, self.request_timeout, self.give_up_after = batch_size, request_timeout, give_up_after
        self.processing_class = processing_class
        self.stop_token_ids: list[int] = []
        self._stop: str | None = None  # the end of a turn as text, for servers that know no token ids
        self._stops: list[str] = []  # all `stop_token_ids` as text
        self._key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(
                "OPENAI_API_KEY holds a character that no HTTP header may hold, such as a line break or an accent; set it anew."
            )
        self._servers = [self._server(url) for url in ([base_url] if isinstance(base_url, str) else base_url)]
        # As many again wait here, so that no slot is idle while finished ones are verified.
        self.slots = batch_size * len(self._servers)
        self.capacity = 2 * self.slots
        self._under_way: dict[str, _Job | None] = {}  # by request id; `None` for one that no server is asked for
        self._waiting: deque[_Job] = deque()
        # Holds pairs of a job (`None` as in `_under_way`) and its completion, warnings, or the exception that ends
        # everything.
        self._finished: queue.SimpleQueue = queue.SimpleQueue()
        self._answered = 0
        self._answer_tokens, self._answer_seconds = 0, 0.0
        self._failing_since: float | None = None  # the first failure after the last answer
        self._last_error = ""
        self._vocabulary = 1 << 31  # until there is a tokenizer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-sampler", daemon=True)
        self._thread.start()
        try:
            self._wait(self._connect(DIALECTS[1:] if text_only else DIALECTS))
            if self._dialect == "token_ids":
                self.processing_class = load_processing_class(model, processing_class, revision=revision)
                self._vocabulary = _vocabulary(model, revision, self.processing_class)
                self.stop_token_ids = stop_token_ids(self.processing_class)
            else:
                message = "returns no token ids: rows will carry no `completion_ids` and no `behavior_log_probs`"
                try:
                    tokenizer = load_processing_class(model, processing_class, revision=revision)
                except (OSError, ValueError):  # a name that only the servers know, or no chat template
                    message += "; it is not told where a turn ends, for want of a chat template here"
                else:
                    self.stop_token_ids = stop_token_ids(tokenizer)
                    self._stops = tokenizer.convert_ids_to_tokens(self.stop_token_ids)
                    end = end_of_turn_id(tokenizer)
                    self._stop = None if end is None else tokenizer.convert_ids_to_tokens(end)
                if self._dialect == "chat":
                    message += (
                        "; nor does it take `top_k`, `min_p` and `repetition_penalty`: if its defaults or the model's generation "
                        "config set one, rows are not drawn from the model alone. Start the server without such defaults"
                    )
                if self._dialect == "chat" or not text_only:
                    warnings.warn(f"{self._servers[0].url} {message}.", stacklevel=2)
        except BaseException:
            self.close()
            raise

    @property
    def takes_token_ids(self) -> bool:
        """Whether prompts are rendered here; else the servers' own chat template renders them."""
        return self._dialect == "token_ids"

    def with_adapter(self, adapter: str) -> "OpenAISampler":
        """
        A sampler on the same servers that asks for `adapter` under that name (`vllm serve --lora-modules NAME=…`).
        """
        urls, revision = [str(server.client.base_url) for server in self._servers], self.revision
        other = OpenAISampler(
            self.name,
            urls,
            self.processing_class,
            adapter,
            revision,
            self.batch_size,
            self.request_timeout,
            self.give_up_after,
        )
        known = Path(adapter).is_dir()  # a name that only the servers know has no revision
        other.name, other.revision = adapter, adapted_revision(revision, adapter) if known else f"{revision}+unknown"
        return other

    # ---- the four calls ----

    def submit(self, request: Request) -> None:
        if request.unhinted_prompt is not None:
            raise cannot_draw_hinted(repr(self))
        ids: Any = None
        if request.params.max_repeats and self._dialect != "token_ids":
            raise ValueError(
                f"You passed max_repeats={request.params.max_repeats}, but {self._servers[0].url} returns no token ids, so it is not "
                "known to count repeated ones. Leave it out."
            )
        if self._dialect == "chat":
            params, usual = request.params, SamplingParams()
            for name in ("top_k", "min_p", "repetition_penalty"):
                if getattr(params, name) != (plain := getattr(usual, name)):
                    raise ValueError(
                        f"You passed {name}={getattr(params, name)}, which {self._servers[0].url} does not take; use {plain:g}."
                    )
            if request.chat_template_kwargs:
                raise ValueError(
                    f"You passed chat_template_kwargs={request.chat_template_kwargs}, which {self._servers[0].url} does not take."
                )
        if self._dialect == "token_ids":
            ids = prompt_ids(self.processing_class, request, min(server.context for server in self._servers))
            if isinstance(ids, Completion):
                self._under_way[request.id] = None
                self._finished.put((None, ids))
                return
        job = self._under_way[request.id] = _Job(request, ids, self._answered)
        self._loop.call_soon_threadsafe(self._enqueue, job)

    def poll(self) -> list[Completion]:
        finished: list[Completion] = []
        while self._under_way and not (self._finished.empty() and (finished or self.over())):
            try:
                item = self._finished.get(timeout=LOOK)
            except queue.Empty:
                continue
            if isinstance(item, UserWarning):
                warnings.warn(item, stacklevel=2)
                continue
            if isinstance(item, BaseException):
                self._finished.put(item)  # for the next poll
                if finished:
                    break
                raise item
            job, completion = item
            if (
                self._under_way.get(completion.id, item) is job
            ):  # otherwise it was aborted, or submitted again in the meantime
                del self._under_way[completion.id]
                finished.append(completion)
        return finished

    def abort(self, request_id: str) -> int:
        """
        Forgets a request. How much a server has drawn of an answer that is not finished it does not say; what is
        returned is the time since it was sent times the tokens per second of the answers so far.
        """
        job = self._under_way.pop(request_id, None)
        if job is None:
            return 0
        self._loop.call_soon_threadsafe(self._cancel, job)
        if (completion := job.completion) is not None:  # finished, and not taken yet
            return len(completion.completion_ids)
        if job.sent is None or not self._answer_seconds:
            return 0
        drawn = (self._loop.time() - job.sent) * self._answer_tokens / self._answer_seconds
        return min(round(drawn), job.request.params.max_completion_length)

    def token_log_probs(self, pairs: list[tuple[list[int], list[int]]]) -> list[list[float] | None]:
        """
        As every [`Sampler`]'s, by vLLM's `prompt_logprobs`.

        Raises:
            NotImplementedError: The servers do not return them; says what to use instead.
            SamplerError: No server answers.
        """
        if self._dialect != "token_ids":
            raise NotImplementedError(f"{self._servers[0].url} takes no token ids. {_SCORING}")
        fits = [i for i, (p, t) in enumerate(pairs) if len(p) + len(t) < min(s.context for s in self._servers)]
        asked = [pairs[i] for i in fits] or [([1, 2], [3])]  # an empty list asks whether they can
        scored = self._wait(self._score_all(asked))
        return [scored[fits.index(i)] if i in fits else None for i in range(len(pairs))]

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._under_way = {}
        self._wait(self._hang_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- on the event loop ----

    def _wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _enqueue(self, job: _Job) -> None:
        self._waiting.append(job)
        self._dispatch()

    def _cancel(self, job: _Job) -> None:
        job.aborted = True
        if job.task is not None:
            job.task.cancel()  # closes the connection, and the server stops generating

    async def _hang_up(self) -> None:
        self._waiting.clear()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for server in self._servers:
            await server.client.close()

    def _dispatch(self) -> None:
        """Sends what waits to the ready servers with the fewest requests outstanding, as far as they have room."""
        while self._waiting and (free := [s for s in self._servers if s.ready and s.outstanding < s.room]):
            job = self._waiting.popleft()
            if not job.aborted:
                # One that has failed this request before comes last.
                server = min(free, key=lambda s: (s in job.failed, s.outstanding))
                server.outstanding += 1
                job.task = self._loop.create_task(self._try(job, server))
                # As a callback, because a task that is cancelled before it begins would never reach its own last line.
                job.task.add_done_callback(partial(self._give_back, server))

    def _give_back(self, server: _Server, _task: asyncio.Task) -> None:
        server.outstanding -= 1
        self._dispatch()

    async def _try(self, job: _Job, server: _Server) -> None:
        job.sent = self._loop.time()
        try:
            completion = await self._ask(server, job.request, job.ids, self._dialect)
            self._count_answer(server)
            self._answer_tokens += len(completion.completion_ids)
            self._answer_seconds += self._loop.time() - job.sent
        except _FAILURES as error:
            completion = self._fault(job, server, error)
        except Exception as error:
            self._finished.put(error)  # ours: `poll` raises it
            return
        if completion is None:
            job.sent = None
            self._waiting.appendleft(job)
        else:
            job.completion = completion
            self._finished.put((job, completion))

    def _fault(self, job: _Job, server: _Server, error: Exception) -> Completion | None:
        """What to answer when a try has failed: nothing if it is the server's fault, and another may do better."""
        reason, finish_reason = self._explained(error), "refused"
        status = getattr(error, "status_code", None)
        if status not in (400, 413, 422):
            self._set_aside(server, error)
            if status in BUSY:
                return None
            job.failed.add(server)
            if self._answered > job.answered:  # as long as no request is answered, this one is not to blame
                job.tries, job.answered = job.tries + 1, self._answered
            if job.tries < MAX_TRIES:
                return None
            reason, finish_reason = f"{job.tries} tries failed: {reason}", "error"
        return Completion(job.request.id, "", [], [], finish_reason, reason)

    def _count_answer(self, server: _Server) -> None:
        self._answered += 1
        self._failing_since, server.failures = None, 0
        server.room = min(server.room + 1, self.batch_size)

    def _note_failure(self, server: _Server, error: BaseException) -> None:
        self._last_error = f"{server.url}: {self._explained(error)}"
        if self._failing_since is None:
            self._failing_since = self._loop.time()

    def _set_aside(self, server: _Server, error: Exception) -> None:
        self._note_failure(server, error)
        if server.ready:
            server.ready = False
            server.failures += 1
            server.busy = getattr(error, "status_code", None) in BUSY
            if server.busy:
                server.room = max(1, server.outstanding // 2)
            server.reviving = self._loop.create_task(self._revive(server, error))

    async def _revive(self, server: _Server, error: BaseException | None = None) -> None:
        """
        Tries a failed server ever more seldom until it answers; opens the circuit if none has answered for too long.
        """
        await asyncio.sleep(0)  # lets the failed request's task end, so that it is no longer counted as outstanding
        while not server.ready:
            since = self._failing_since
            waited = since is not None and self._loop.time() - since > self.give_up_after
            # A server that is ready, or busy with requests, may still answer; if it hangs, its requests time out.
            if waited and not any(other.ready or (other.busy and other.outstanding) for other in self._servers):
                message = f"no server has answered for {self.give_up_after:g} s; the last one said: {self._last_error}"
                self._finished.put(SamplerError(message))
                return
            wait, message = self._pause(server, error)
            if message:
                self._finished.put(UserWarning(message))
            await asyncio.sleep(wait)
            if server.busy:  # it answered, though only that it is overloaded: send it as many requests as it may have
                server.ready, server.busy = True, False
                self._dispatch()
                return
            try:
                await self._greet(server)
                await self._ask(server, CANARY, [1, 2, 3], self._dialect)
            except _FAILURES as failure:
                error = failure
                self._note_failure(server, error)
                server.failures += 1
            except (
                Exception
            ) as ours:  # errors that waiting cannot cure, such as a server whose parsers change the model's text
                self._finished.put(ours)
                return
            else:
                server.ready, server.letters = True, 0  # a restarted server may have another tokenizer
                self._count_answer(server)
                self._dispatch()

    def _pause(self, server: _Server, error: BaseException | None) -> tuple[float, str | None]:
        """
        Seconds until a failed server is asked again, as it says or ever longer, and at times a sentence on one that is
        busy.
        """
        asked = retry_after(error)
        wait = min(30.0, self.give_up_after / 4, 0.25 * 2 ** min(server.failures, 8))
        if asked is not None:
            wait = min(asked, self.give_up_after)
        status = getattr(error, "status_code", None)
        if status not in BUSY or self._loop.time() < server.warned_at + TELL_EVERY:
            return wait, None
        server.warned_at = self._loop.time()
        asks = "" if asked is None else f", it asks for {asked:,.6g} s"
        return wait, f"{server.url} is busy (status {status}{asks}); trying again in {wait:.3g} s."

    # ---- one server ----

    def _server(self, url: str) -> _Server:
        parts = _address(url)
        if parts.path in ("", "/"):
            url = parts._replace(path="/v1").geturl()
        timeout = openai.Timeout(self.request_timeout, connect=CONNECT)
        try:
            http_client = openai.DefaultAsyncHttpxClient(event_hooks={"response": [_no_retry_if_busy]})
        except (ImportError, ValueError) as error:
            raise ValueError(f"The proxy before {shown(url)} cannot be used: {error}") from error
        client = openai.AsyncOpenAI(base_url=url, api_key=self._key, timeout=timeout, http_client=http_client)
        return _Server(client, shown(url), self.batch_size)

    async def _connect(self, dialects: tuple[str, ...]) -> None:
        """Greets all servers and settles the best of the dialects that those who answer have in common."""
        greetings = (self._patiently(self._greet, server) for server in self._servers)
        errors = await asyncio.gather(*greetings, return_exceptions=True)
        messages = [
            f"{s.url}: {self._explained(e)}" for s, e in zip(self._servers, errors, strict=True) if e is not None
        ]
        for error in errors:
            if getattr(error, "status_code", None) in (401, 403):
                raise ValueError(f"A server refuses us; is OPENAI_API_KEY set, and right? {'; '.join(messages)}")
            if error is not None and not isinstance(error, (openai.OpenAIError, TimeoutError)):
                raise error
        there = [s for s, error in zip(self._servers, errors, strict=True) if error is None]
        if not there:
            raise SamplerError(f"no server answers. {'; '.join(messages)}")
        if messages:
            warnings.warn(f"Not every server answers; starting with {len(there)}. {'; '.join(messages)}", stacklevel=2)
        self._dialect = await self._common_dialect(there, dialects)
        for server in self._servers:
            server.ready = server in there
            if not server.ready:
                server.reviving = self._loop.create_task(self._revive(server))

    async def _common_dialect(self, servers: list[_Server], dialects: tuple[str, ...]) -> str:
        for dialect in dialects:
            canaries = (self._patiently(self._ask, server, CANARY, [1, 2, 3], dialect) for server in servers)
            answers = await asyncio.gather(*canaries, return_exceptions=True)
            failed = [(s, a) for s, a in zip(servers, answers, strict=True) if isinstance(a, BaseException)]
            for server, error in failed:
                if isinstance(error, SamplerError):
                    raise error
                if not isinstance(error, NotImplementedError) and not 400 <= getattr(error, "status_code", 0) < 429:
                    raise SamplerError(f"{server.url} has trouble: {self._explained(error)}") from error
            if not failed:
                return dialect
        raise ValueError(f"{failed[0][0].url} cannot draw a completion: {self._explained(failed[0][1])}")

    async def _patiently(self, ask, server: _Server, *arguments):
        """
        `await ask(server, *arguments)`; as long as the server says that it is busy again, for `give_up_after` seconds
        at most.
        """
        deadline = self._loop.time() + self.give_up_after
        while True:
            try:
                return await ask(server, *arguments)
            except openai.APIStatusError as error:
                left = deadline - self._loop.time()
                if error.status_code not in BUSY or left <= 0:
                    raise
                server.failures += 1
                wait, message = self._pause(server, error)
            if message:
                warnings.warn(message, stacklevel=2)
            await asyncio.sleep(min(wait, left))

    async def _greet(self, server: _Server) -> None:
        """Asks a server whether it serves the model."""
        try:
            async with asyncio.timeout(min(30.0, self.request_timeout)):
                listed = [model async for model in await server.client.models.list()]
            models = {str(model.id): getattr(model, "max_model_len", None) or NO_CONTEXT for model in listed}
            if wrong := [length for length in models.values() if type(length) is not int or length < 1]:
                raise ValueError(f"max_model_len {wrong[0]!r:.50}")
        except openai.NotFoundError:
            return  # has no such route; what it serves shows when it is asked for a completion
        except (AttributeError, TypeError, ValueError) as error:
            raise openai.OpenAIError(f"it sent something that is no list of models: {error}") from error
        if not models:
            return  # `transformers serve` lists what is in its cache, and serves other models too
        if self.served_model_name not in models:
            raise ValueError(
                f"{server.url} does not serve {self.served_model_name!r} but {sorted(models)}; pass one of them as `served_model_name`."
            )
        server.context = models[self.served_model_name]

    async def _score_all(self, pairs: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probs of the targets, from whichever servers are ready, as many at a time as one takes."""
        free = asyncio.Semaphore(self.batch_size)

        async def one(number: int, prompt: list[int], target: list[int]) -> list[float]:
            ready = [server for server in self._servers if server.ready] or self._servers
            server = ready[number % len(ready)]
            async with free:
                try:
                    return await self._patiently(self._score, server, prompt, target)
                except openai.BadRequestError as error:
                    raise NotImplementedError(f"{server.url}: {self._explained(error)}. {_SCORING}") from error
                except (openai.OpenAIError, TimeoutError, ValueError) as error:
                    raise SamplerError(
                        f"{server.url} did not tell the log-probs of a text: {self._explained(error)}"
                    ) from error

        return await asyncio.gather(*(one(i, *pair) for i, pair in enumerate(pairs)))

    async def _score(self, server: _Server, prompt: list[int], target: list[int]) -> list[float]:
        ids = [*prompt, *target]
        async with asyncio.timeout(self.request_timeout):
            response = await server.client.completions.create(
                model=self.served_model_name, prompt=ids, max_tokens=1, seed=1, extra_body={"prompt_logprobs": 0}
            )
        found = getattr(response.choices[0], "prompt_logprobs", None)
        if not found:
            raise NotImplementedError(f"{server.url} returns no `prompt_logprobs`. {_SCORING}")
        return read_prompt_log_probs(found, ids)[len(prompt) - 1 :] if target else []

    async def _ask(self, server: _Server, request: Request, ids: list[int] | None, dialect: str) -> Completion:
        params, client = request.params, server.client
        fields: dict[str, Any] = {
            "model": self.served_model_name, "temperature": params.temperature, "top_p": params.top_p, "seed": request.seed,
            "max_tokens": params.max_completion_length,
        }  # fmt: skip
        # Sent explicitly, because the server would use the model's generation config otherwise. SGLang refuses
        # top_k=0.
        extra: dict[str, Any] = {}
        if dialect != "chat":
            extra = {
                "top_k": params.top_k or -1,
                "min_p": params.min_p,
                "repetition_penalty": params.repetition_penalty,
            }
            extra["stop_token_ids"] = self.stop_token_ids
            if params.max_repeats:
                extra["repetition_detection"] = {"max_pattern_size": LONGEST_BLOCK, "min_count": params.max_repeats}
        if stop := [*params.stop, *([self._stop] if dialect == "chat" and self._stop else [])]:
            extra["stop"] = stop
        async with asyncio.timeout(self.request_timeout):
            if dialect == "token_ids":
                fields["max_tokens"] = min(fields["max_tokens"], server.context - len(ids))
                response = await client.completions.create(
                    prompt=ids, logprobs=0, extra_body={**extra, "return_token_ids": True}, **fields
                )
            elif isinstance(request.prompt, str):
                response = await client.completions.create(prompt=request.prompt, extra_body=extra, **fields)
            else:
                if request.chat_template_kwargs:
                    extra["chat_template_kwargs"] = request.chat_template_kwargs
                response = await client.chat.completions.create(messages=request.prompt, extra_body=extra, **fields)
        text, ids, log_probs, reason = read_answer(
            response, server.url, dialect == "token_ids", fields["max_tokens"], self._vocabulary
        )
        if reason in ENDED_BY_SERVER:
            return Completion(request.id, "", [], [], "error", f"the server ended it: {reason}")
        if dialect != "token_ids":
            if ends := [text.index(stop) for stop in (*self._stops, *params.stop) if stop in text]:
                self._tell_unheeded(server, "stop")
                text, reason = text[: min(ends)], "stop"
            return Completion(request.id, text, [], [], reason)
        if self.processing_class is None:  # the first question to a server
            return Completion(request.id, text, ids, log_probs, reason)
        self._compare(server, request.id, text, ids)
        at_text = any(word in turn_text(self.processing_class, ids) for word in params.stop)
        if not at_text and not set(self.stop_token_ids).intersection(ids):
            # A generation config, which only the server has, may end turns at another special token.
            special = ids[-1] in special_tokens(self.processing_class).all
            reason, message = ended(reason, special, len(ids), fields["max_tokens"])
            if message:
                warnings.warn(f"{server.url} {message}", stacklevel=2)
        completion = drawn_completion(
            request.id, ids, log_probs, reason, self.processing_class, self.stop_token_ids, params.stop
        )
        if len(kept := completion.completion_ids) < len(ids):
            self._tell_unheeded(server, "stop_token_ids" if kept[-1] in self.stop_token_ids else "stop")
        return completion

    def _compare(self, server: _Server, request_id: str, text: str, ids: list[int]) -> None:
        """
        Holds the server's own `text` against what its `ids` say here, until it is known to have the tokenizer of here.
        One text that differs may have been changed behind the model, so that answer alone is refused; several, and no
        row of the server's would be the model's.
        """
        if server.letters >= KNOWN_LETTERS:
            return
        decoded = says_otherwise(self.processing_class, {"completion_ids": ids, "completion": text})
        if decoded is None:
            server.letters += sum(map(str.isalpha, text))
            return
        server.doubtful.add(request_id)
        message = f"it says {text!r:.100}, but its token ids are {decoded!r:.100} to the tokenizer of {self.name!r}"
        if len(server.doubtful) >= MOST_DOUBTFUL:
            raise SamplerError(
                f"{server.url} has another tokenizer than the model here: {message}, and so {MOST_DOUBTFUL} times. Serve the model that you "
                "pass, or pass the one that is served."
            )
        raise ValueError(message)

    def _tell_unheeded(self, server: _Server, field: str) -> None:
        warnings.warn(
            f"{server.url} went on behind the end of a turn: it does not heed `{field}`. Completions are cut there, but what it wrote "
            "behind was paid for. Start it with a generation config whose `eos_token_id` holds that token.",
            stacklevel=3,
        )

    def _explained(self, error: BaseException) -> str:
        """An error in one line, without the key (a server may quote it)."""
        return redacted(cause(error), self._key).replace("\n", " ")[:300]


def _address(url: str):
    """The parts of a server's URL."""
    try:
        parts = urlsplit(url)
        good = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and not parts.query + parts.fragment
        )
    except ValueError:
        good = False
    if not good:
        # A user and a password may stand anywhere in what is no URL, before an "@".
        passed = "…@" * ("@" in url) + url.rpartition("@")[2].partition("?")[0]
        raise ValueError(
            f"You passed base_url={passed!r}; write it as http://host:port/v1, and what is no letter or digit in a user and password "
            "before the host percent-encoded."
        )
    return parts


async def _no_retry_if_busy(response) -> None:
    """
    The SDK would wait and ask again for each request by itself, and say nothing; we do, for all of a server's
    together.
    """
    if response.status_code in BUSY:
        response.headers["x-should-retry"] = "false"


def _vocabulary(model: str, revision: str | None, processing_class) -> int:
    """
    How many token ids the model has, padding of its embedding included; the tokenizer's where no config can be had.
    """
    from transformers import PretrainedConfig

    vocabulary = max(getattr(processing_class, "tokenizer", processing_class).get_vocab().values()) + 1
    try:
        config, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    except OSError:  # a name that only the servers know
        return vocabulary
    return max(vocabulary, config.get("text_config", config).get("vocab_size") or 0)
