"""A batch file through an engine: JSON lines in, JSON lines out, in order, resumable.

It knows the two forms of an input line (README, "Batches of prompts"), what one line's result looks like, and how to go
on where an earlier run stopped. It must not know how tokens are made: anything with `submit`, `poll`, `cancel` and a
tokenizer will do. A file may have millions of lines: only a window of them is in memory at a time (and eight bytes
of hash for each custom_id, to find duplicates).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from moe_jax.llm import Update
from moe_jax.request import SamplingParams
from moe_jax.scheduler import QueueFull
from moe_jax.text import Tokenizer

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MAX_CHOICES = 128

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos")
_KNOWN = {
    COMPLETIONS: {*_SAMPLING, "prompt", "n", "logprobs"},
    CHAT: {
        *_SAMPLING,
        *("messages", "n", "logprobs", "top_logprobs", "max_completion_tokens"),
        *("chat_template_kwargs", "add_generation_prompt"),
    },
}
# Fields that change nothing here, and fields that are fine as long as they ask for nothing.
_IGNORED = {"model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "custom_id"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}


class BatchError(ValueError):
    """The input or the output file cannot be used; nothing was run."""


class Engine(Protocol):
    """The part of `LLM` that is used.

    `submit` raises ValueError for a request that can never be served, QueueFull for one that cannot be now.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    def submit(self, prompt: Any, params: SamplingParams, request_id: str | None = None) -> str: ...
    def poll(self, timeout: float | None) -> Sequence[Update]: ...
    def cancel(self, request_id: str) -> Any: ...


@dataclass(frozen=True)
class Options:
    """How to run a batch. `defaults` is for what a line leaves open.

    With `seed`, a line that has no seed of its own gets one derived from (seed, custom_id), so that a resumed run
    gives what an undisturbed one would have given.
    """

    defaults: SamplingParams = SamplingParams()
    seed: int | None = None
    model: str = "model"
    retry_errors: bool = False  # run again the lines of the output that are errors
    in_flight: int = 256  # requests in the engine at once
    window: int = 4096  # lines read but not yet written: how far others may overtake a slow one

    def __post_init__(self) -> None:
        if min(self.in_flight, self.window) < 1:
            raise ValueError(f"in_flight and window must be positive, found {self.in_flight} and {self.window}")


@dataclass
class Counts:
    """Where a run stands. Tokens and seconds are of this run; the others include what earlier runs did."""

    total: int | None = None  # lines of the input; None: not known
    requests: int = 0  # lines written
    errors: int = 0  # of them, lines that are errors
    skipped: int = 0  # lines that earlier runs had written
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / max(self.seconds, 1e-9)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at the present rate of lines."""
        done = self.requests - self.skipped
        return None if self.total is None or done <= 0 else (self.total - self.requests) * self.seconds / done


def run(
    source: str | Path,
    target: str | Path,
    connect: Callable[[], Engine],
    options: Options | None = None,
    on_progress: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Serves every line of the file `source` that the file `target` does not have yet.

    `connect` is called once, and only if something is left to do. Each line is written, and flushed, as soon as
    those before it are. However the run ends, `target` holds whole lines only.
    Raises BatchError when the files cannot be used.
    """
    options = options or Options()
    source, target = Path(source), Path(target)
    _check_paths(source, target)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(_Output(target))
        old = None
        if options.retry_errors and output.size:
            # The output is written anew beside the old one, good lines copied, and takes its place when complete.
            old = target
            output = stack.enter_context(_Output(target.with_name(target.name + ".retry")))
        counts = Counts(total=_count_lines(source))
        todo = _todo(source, output.path, old, counts)
        work = _Run(todo, output, connect, options, counts, on_progress)
        stack.callback(work.cancel)
        work.finish()
        if old is not None:
            os.replace(output.path, target)
    return counts


class _Run:
    """The window of lines between input and output."""

    def __init__(
        self,
        todo: Iterator[tuple[Line, bytes | None]],
        output: _Output,
        connect: Callable[[], Engine],
        options: Options,
        counts: Counts,
        on_progress: Callable[[Counts], None],
    ):
        self.todo, self.output, self.connect, self.options = todo, output, connect, options
        self.counts, self.on_progress = counts, on_progress
        self.engine: Engine | None = None
        self.window: deque[_Job] = deque()  # in the input's order
        self.queue: deque[tuple[_Job, _Choice]] = deque()  # of the last line read, not yet in the engine
        self.choices: dict[str, tuple[_Job, _Choice]] = {}  # in the engine, by request id

    def finish(self) -> None:
        exhausted = False
        while True:
            room = self._submit()
            while room and not exhausted and len(self.window) < self.options.window:
                entry = next(self.todo, None)
                exhausted = entry is None
                if entry is not None:
                    self._admit(*entry)
                    self._write()
                    room = self._submit()
            self._write()
            if not self.choices:
                if exhausted:
                    return
                continue
            assert self.engine is not None
            for update in self.engine.poll(0.5):
                self._take(update)

    def cancel(self) -> None:
        """Leaves nothing of this run in the engine."""
        for request_id in self.choices:
            with contextlib.suppress(Exception):
                assert self.engine is not None
                self.engine.cancel(request_id)
        self.choices.clear()

    def _admit(self, line: Line, known: bytes | None) -> None:
        job = _Job(line, result=known)
        self.window.append(job)
        if known is not None:
            return
        if line.error is not None:
            self._fail(job, 400, line.error)
            return
        if self.engine is None:
            self.engine = self.connect()
            self.counts.started = time.monotonic()  # loading the model is not serving
        try:
            job.prompt = _prompt(line, self.engine.tokenizer)
            job.choices = [_Choice(params) for params in _params(line, self.options)]
        except ValueError as error:
            self._fail(job, 400, str(error))
            return
        self.queue.extend((job, choice) for choice in job.choices)

    def _submit(self) -> bool:
        """Fills the engine from the queue; False when the engine has enough for now."""
        while self.queue and len(self.choices) < self.options.in_flight:
            job, choice = self.queue[0]
            assert self.engine is not None
            try:
                request_id = self.engine.submit(job.prompt, choice.params)
            except QueueFull:
                if not self.choices:  # nothing of ours would make room
                    raise
                return False
            except ValueError as error:
                self._fail(job, 400, str(error))
                continue
            self.queue.popleft()
            choice.request_id = request_id
            self.choices[request_id] = (job, choice)
        return len(self.choices) < self.options.in_flight

    def _take(self, update: Update) -> None:
        if update.request_id not in self.choices:  # cancelled, or not ours
            return
        job, choice = self.choices[update.request_id]
        choice.token_ids += update.token_ids
        choice.text.append(update.text)
        choice.logprobs += update.logprobs or ()
        self.counts.completion_tokens += len(update.token_ids)
        if update.finish_reason is None:
            return
        del self.choices[update.request_id]
        choice.finish_reason = update.finish_reason
        if update.finish_reason == "abort":
            self._fail(job, 500, "the engine gave up on this request")
        elif all(c.finish_reason for c in job.choices):
            assert self.engine is not None
            self.counts.prompt_tokens += len(job.prompt)
            job.result = _dump(_success(job, self.engine.tokenizer, self.options.model))

    def _fail(self, job: _Job, status: int, message: str) -> None:
        self.queue = deque(entry for entry in self.queue if entry[0] is not job)
        for choice in job.choices:
            if self.choices.pop(choice.request_id, None) and self.engine is not None:
                self.engine.cancel(choice.request_id)
        job.failed = True
        job.result = _dump(_failure(job.line, status, " ".join(message.split())))

    def _write(self) -> None:
        while self.window and (result := self.window[0].result) is not None:
            self.output.append(result)
            self.counts.requests += 1
            self.counts.errors += self.window[0].failed
            self.window.popleft()
        self.on_progress(self.counts)


# -- lines of the input ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of the input, with what is wrong with it, if that can be told without a model."""

    number: int  # from 1
    custom_id: str
    url: str = COMPLETIONS
    body: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def parse_line(raw: bytes, number: int) -> Line:
    """Never raises: what cannot be read becomes a Line with an error, named after its number."""
    custom_id = f"line-{number}"
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return Line(number, custom_id, error=f"not a line of JSON: {error}")
    try:
        _expect(isinstance(value, dict), f"expected a JSON object, found {type(value).__name__}")
        given = value.get("custom_id")
        _expect(given is None or isinstance(given, str), f"custom_id must be a string, found {given!r}")
        custom_id = custom_id if given is None else given
        if value.keys().isdisjoint({"url", "body", "method"}):
            return Line(number, custom_id, CHAT if "messages" in value else COMPLETIONS, value)
        _expect(value.get("method", "POST") == "POST", f"method must be POST, found {value.get('method')!r}")
        url, body = value.get("url"), value.get("body")
        _expect(url in (COMPLETIONS, CHAT), f"url must be {COMPLETIONS} or {CHAT}, found {url!r}")
        _expect(isinstance(body, dict), f"body must be a JSON object, found {type(body).__name__}")
        return Line(number, custom_id, url, body)
    except ValueError as error:
        return Line(number, custom_id, error=str(error))


def derived_seed(seed: int, key: str) -> int:
    """A seed in 0 … 2**63 - 1 for each (seed, key): blake2b, so the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _prompt(line: Line, tokenizer: Tokenizer) -> list[int]:
    """The token ids that the line's prompt or messages stand for."""
    body = line.body
    for name, value in body.items():
        if name not in _KNOWN[line.url] and name not in _IGNORED and value is not None:
            _expect(name in _NEUTRAL, f"unknown field {name!r}")
            _expect(value in _NEUTRAL[name], f"{name}: {value!r} is not supported")
    if line.url == CHAT:
        kwargs = body.get("chat_template_kwargs") or {}
        _expect(isinstance(kwargs, dict), "chat_template_kwargs must be an object")
        reserved = kwargs.keys() & {"self", "messages", "chat_template"}
        _expect(not reserved, f"chat_template_kwargs must not contain {sorted(reserved)}")
        if body.get("add_generation_prompt") is not None:
            kwargs = {**kwargs, "add_generation_prompt": bool(body["add_generation_prompt"])}
        return tokenizer.encode_chat(_messages(body.get("messages")), **kwargs)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    found = "it is missing" if prompt is None else f"found {type(prompt).__name__}"
    raise ValueError(f"prompt must be one string or one list of token ids; {found}")


def _messages(messages: Any) -> list[dict[str, Any]]:
    """The chat's messages; content given as a list of text parts becomes one string, which templates expect."""
    _expect(isinstance(messages, list) and messages, "messages must be a list of at least one message")
    out = []
    for i, message in enumerate(messages):
        _expect(
            isinstance(message, dict) and isinstance(message.get("role"), str),
            f"messages[{i}] must be an object with a role",
        )
        content = message.get("content")
        if isinstance(content, list):
            texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
            _expect(all(isinstance(text, str) for text in texts), f"messages[{i}]: only text content is supported")
            content = "\n".join(texts)
        _expect(content is None or isinstance(content, str), f"messages[{i}]: content must be a string")
        out.append({**message, "content": content})
    return out


def _params(line: Line, options: Options) -> list[SamplingParams]:
    """The parameters of each of the line's n choices."""
    body = {name: value for name, value in line.body.items() if value is not None}
    given = {name: body[name] for name in _SAMPLING if name in body}
    if "stop" in given:
        _expect(isinstance(given["stop"], str | list), "stop must be a string or a list of strings")
    logprobs = body.get("logprobs")
    if line.url == CHAT:
        given["max_tokens"] = body.get("max_completion_tokens", given.get("max_tokens", options.defaults.max_tokens))
        _expect(logprobs in (None, True, False), "logprobs must be true or false (top_logprobs says how many)")
        _expect(logprobs or "top_logprobs" not in body, "top_logprobs needs logprobs")
        logprobs = body.get("top_logprobs", 0) if logprobs else None
    if logprobs is not None:
        given["logprobs"] = logprobs
    n = body.get("n", 1)
    _expect(type(n) is int and 1 <= n <= MAX_CHOICES, f"n must be an integer in 1..{MAX_CHOICES}, found {n!r}")
    params = replace(options.defaults, **given)
    if params.seed is None and options.seed is not None:
        params = params.with_seed(derived_seed(options.seed, line.custom_id))
    seed = params.seed
    if seed is None:
        return [params] * n
    return [params.with_seed(derived_seed(seed, str(i)) if i else seed) for i in range(n)]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


# -- lines of the output --------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    params: SamplingParams
    request_id: str = ""  # once submitted
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[Mapping[int, float]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class _Job:
    line: Line
    prompt: list[int] = field(default_factory=list)
    choices: list[_Choice] = field(default_factory=list)
    result: bytes | None = None  # the line of the output, once known
    failed: bool = False


def _success(job: _Job, tokenizer: Tokenizer, model: str) -> dict[str, Any]:
    chat = job.line.url == CHAT
    choices = []
    for index, choice in enumerate(job.choices):
        text = "".join(choice.text)
        choices.append(
            {
                "index": index,
                **({"message": {"role": "assistant", "content": text}} if chat else {"text": text}),
                "token_ids": choice.token_ids,
                "finish_reason": choice.finish_reason,
                "logprobs": _logprobs(choice, tokenizer, chat),
            }
        )
    completion_tokens = sum(len(choice.token_ids) for choice in job.choices)
    body = {
        "id": ("chatcmpl-" if chat else "cmpl-") + _digest(job.line),
        "object": "chat.completion" if chat else "text_completion",
        "model": job.line.body.get("model") or model,
        "choices": choices,
        "usage": {
            "prompt_tokens": len(job.prompt),
            "completion_tokens": completion_tokens,
            "total_tokens": len(job.prompt) + completion_tokens,
        },
    }
    return _result(job.line, 200, body, None)


def _failure(line: Line, status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status == 400 else "server_error"
    error = {"code": kind, "message": message}
    return _result(line, status, {"error": {"message": message, "type": kind}}, error)


def _result(line: Line, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> dict[str, Any]:
    """Ids are derived from the line and there is no clock, so that running a file again gives the same bytes."""
    digest = _digest(line)
    response = {"status_code": status, "request_id": f"req_{digest}", "body": body}
    return {"id": f"batch_req_{digest}", "custom_id": line.custom_id, "response": response, "error": error}


def _logprobs(choice: _Choice, tokenizer: Tokenizer, chat: bool) -> dict[str, Any] | None:
    """In the shape of OpenAI's chat or completions answers."""
    if choice.params.logprobs is None:
        return None

    def text(token_id: int) -> str:
        return tokenizer.decode([token_id], skip_special_tokens=False)

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        piece = tokenizer.piece(token_id, None) or text(token_id).encode()
        return {"token": text(token_id), "logprob": logprob, "bytes": list(piece)}

    pairs = list(zip(choice.token_ids, choice.logprobs, strict=False))
    tops = [sorted(top.items(), key=lambda item: -item[1])[: choice.params.logprobs] for _, top in pairs]
    if chat:
        content = [
            {**entry(token, logprobs.get(token)), "top_logprobs": [entry(*item) for item in top]}
            for (token, logprobs), top in zip(pairs, tops, strict=True)
        ]
        return {"content": content}
    tokens = [text(token) for token, _ in pairs]
    return {
        "tokens": tokens,
        "token_logprobs": [logprobs.get(token) for token, logprobs in pairs],
        "top_logprobs": [{text(token): logprob for token, logprob in top} for top in tops],
        "text_offset": [*accumulate(map(len, tokens[:-1]), initial=0)] if tokens else [],
    }


def _digest(line: Line) -> str:
    key = f"{line.number}/{line.custom_id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(key, digest_size=12).hexdigest()


def _dump(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can carry
        return json.dumps(value).encode() + b"\n"


# -- files ----------------------------------------------------------------------------------------------------------


class _Output:
    """The output file: whole lines, appended; nobody else's while it is open.

    Opening it repairs what a killed run left: half a line at the end is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise BatchError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise BatchError(f"{path}: the output must be a regular file")
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BatchError(f"{path}: another run is writing this output") from error
            self.size = self._whole_lines()
            os.ftruncate(self._fd, self.size)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if os.fstat(self._fd).st_size != self.size:  # interrupted or out of space within a line
                os.ftruncate(self._fd, self.size)
        finally:
            os.close(self._fd)

    def append(self, line: bytes) -> None:
        """`line` ends with a newline. It is the kernel's when this returns, and survives kill -9."""
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        self.size += len(line)

    def _whole_lines(self) -> int:
        """The offset behind the last newline."""
        end = os.fstat(self._fd).st_size
        while end > 0:
            start = max(0, end - (1 << 16))
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0


def _check_paths(source: Path, target: Path) -> None:
    if not source.exists():
        raise BatchError(f"{source}: no such input file")
    if source.is_dir():
        raise BatchError(f"{source}: the input is a directory")
    if not target.parent.is_dir():
        raise BatchError(f"{target.parent}: no such directory for the output")
    if target.is_dir():
        raise BatchError(f"{target}: the output is a directory")
    if target.exists() and target.samefile(source):
        raise BatchError(f"{target}: input and output are the same file")


def _count_lines(source: Path) -> int | None:
    """Lines that are not blank; None for a pipe, which can be read only once."""
    if not source.is_file():
        return None
    try:
        with source.open("rb") as file:
            return sum(1 for raw in file if not raw.isspace())
    except OSError as error:
        raise BatchError(f"{source}: cannot be read: {error.strerror}") from error


def _lines(source: Path) -> Iterator[Line]:
    """The input's lines, blank ones left out, a second use of a custom_id marked as an error."""
    seen: set[int] = set()
    with source.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.isspace():
                continue
            line = parse_line(raw, number)
            digest = hashlib.blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            key = int.from_bytes(digest, "big")
            if key in seen and line.error is None:
                line = replace(line, error=f"custom_id {line.custom_id!r} was used by an earlier line")
            seen.add(key)
            yield line


def _todo(source: Path, done: Path, old: Path | None, counts: Counts) -> Iterator[tuple[Line, bytes | None]]:
    """The lines that `done` does not have, each with its result if the output `old` has a good one.

    Both outputs must follow the input line by line; raises BatchError, before anything is given, when `done` does
    not.
    """
    lines = _lines(source)
    former = _results(old) if old is not None else iter(())
    for position, (custom_id, failed, _) in enumerate(_results(done), 1):
        _check_follows(next(lines, None), custom_id, source, done, position)
        next(former, None)
        counts.requests += 1
        counts.skipped += 1
        counts.errors += failed
    position = counts.skipped
    for line in lines:
        position += 1
        custom_id, failed, raw = next(former, (line.custom_id, True, None))
        _check_follows(line, custom_id, source, old or done, position)
        yield line, None if failed else raw
    if extra := next(former, None):
        _check_follows(None, extra[0], source, old or done, position + 1)


def _check_follows(line: Line | None, custom_id: str, source: Path, output: Path, position: int) -> None:
    expected = "nothing" if line is None else repr(line.custom_id)
    if line is None or line.custom_id != custom_id:
        raise BatchError(
            f"{output}: belongs to another input: its result {position} is of {custom_id!r}, where {source} has "
            f"{expected}; give another output file"
        )


def _results(output: Path) -> Iterator[tuple[str, bool, bytes]]:
    """(custom_id, whether it is an error, the line) of each line of an output."""
    with output.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                value = json.loads(raw)
                custom_id, failed = value["custom_id"], value["error"] is not None
                _expect(isinstance(custom_id, str), "")
            except (ValueError, TypeError, KeyError, RecursionError):
                raise BatchError(f"{output}: line {number} is not a result of this program") from None
            yield custom_id, failed, raw
