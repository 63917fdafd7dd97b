"""Batch files through a toy engine: both forms, order, errors, resumption after kill -9."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moe_jax import batch
from moe_jax.batch import BatchError, Counts, Options, derived_seed, parse_line
from moe_jax.llm import Update
from moe_jax.request import SamplingParams
from moe_jax.scheduler import QueueFull
from moe_jax.text import Tokenizer, full_text

ROOT = Path(batch.__file__).parents[1]
EOS = 256


def toy_tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if tag %}[{{ tag }}]{% endif %}"
    return Tokenizer(backend, {"eos_token": "<eos>"}, chat_template=template)


@dataclass
class Running:
    prompt: list[int]
    params: SamplingParams
    seed: int
    sent: int = 0
    tokens: list[int] = field(default_factory=list)


class ToyLLM:
    """Tokens are a hash of (prompt, seed, position); requests finish in an order of their own."""

    max_model_len = 200

    def __init__(self, delay: float = 0.0, **options: Any):
        self.options = options
        self.delay = delay
        self.tokenizer = toy_tokenizer()
        self.running: dict[str, Running] = {}
        self.submitted: list[str] = []
        self.peak = 0
        self.closed = False

    def __enter__(self) -> ToyLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed = True

    def submit(self, prompt: list[int], params: SamplingParams, request_id: str | None = None) -> str:
        if not prompt or len(prompt) >= self.max_model_len:
            raise ValueError(f"prompt of {len(prompt)} tokens, expected 1 to {self.max_model_len - 1}")
        request_id = request_id or f"r{len(self.submitted)}"
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4), "big")
        seed = 0 if params.temperature == 0 else seed
        self.running[request_id] = Running(prompt, params, seed)
        self.submitted.append(self.tokenizer.decode(prompt))
        self.peak = max(self.peak, len(self.running))
        return request_id

    def poll(self, timeout: float | None) -> list[Update]:
        time.sleep(self.delay)
        updates = []
        ids = list(self.running)
        for request_id in dict.fromkeys(ids[:2] + ids[::-1][:6]):  # mostly the newest: finishes out of order
            run = self.running[request_id]
            text, reason = "", None
            for _ in range(3):
                run.tokens.append(token(run.prompt, run.seed, len(run.tokens)))
                text, stop, used = full_text(self.tokenizer, run.tokens, run.params.stop)
                ended = run.tokens[-1] == EOS and not run.params.ignore_eos
                reason = "stop" if stop or ended else "length" if len(run.tokens) >= run.params.max_tokens else None
                if reason:
                    break
            new = run.tokens[run.sent :]
            run.sent = len(run.tokens)
            logprobs = [{t: -1.0, (t + 1) % 256: -2.0} for t in new] if run.params.logprobs is not None else None
            updates.append(Update(request_id, new, text if reason else "", logprobs, reason))
            if reason:
                del self.running[request_id]
        return updates

    def cancel(self, request_id: str) -> None:
        self.running.pop(request_id, None)


def token(prompt: list[int], seed: int, position: int) -> int:
    digest = hashlib.blake2b(f"{prompt} {seed} {position}".encode(), digest_size=2).digest()
    return EOS if digest[0] == 7 else toy_byte(b" abcdefghijklmnopqrstuvwxyz\xf0\x9f\x99\x82"[digest[1] % 31])


_ALPHABET: dict[int, int] = {}


def toy_byte(value: int) -> int:
    if not _ALPHABET:
        tokenizer = toy_tokenizer()
        _ALPHABET.update({tokenizer.piece(i, None)[0]: i for i in range(256)})
    return _ALPHABET[value]


def run(folder: Path, lines: list[Any] | None = None, llm: ToyLLM | None = None, **options: Any) -> list[dict]:
    """Writes the input, if given, runs it, reads the output."""
    if lines is not None:
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in raw))
    options.setdefault("seed", 5)
    batch.run(folder / "in.jsonl", folder / "out.jsonl", lambda: llm or ToyLLM(), Options(**options))
    return read(folder)


def read(folder: Path) -> list[dict]:
    raw = (folder / "out.jsonl").read_bytes()
    assert not raw or raw.endswith(b"\n")
    return [json.loads(line) for line in raw.splitlines()]


def simple(n: int) -> list[dict]:
    return [{"custom_id": f"id{i}", "prompt": f"prompt {i}", "max_tokens": 1 + i * 7 % 30} for i in range(n)]


def openai(url: str, **body: Any) -> dict:
    return {"custom_id": "c", "method": "POST", "url": url, "body": body}


# -- what a line gives ----------------------------------------------------------------------------------------------


def test_simple_form(tmp_path: Path) -> None:
    (row,) = run(tmp_path, [{"custom_id": "a", "prompt": "hello"}])
    assert row["custom_id"] == "a" and row["error"] is None and row["response"]["status_code"] == 200
    body = row["response"]["body"]
    (choice,) = body["choices"]
    assert choice["text"] == toy_tokenizer().decode(choice["token_ids"])
    assert choice["finish_reason"] in ("stop", "length") and choice["index"] == 0 and choice["logprobs"] is None
    n = len(choice["token_ids"])
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": n, "total_tokens": 5 + n}
    assert body["object"] == "text_completion"


def test_openai_completions(tmp_path: Path) -> None:
    ids = toy_tokenizer().encode("hello")
    bodies: list[dict] = [{"prompt": "hello"}, {"prompt": ids}, {"prompt": ["hello"]}, {"prompt": [ids]}]
    bodies += [{"prompt": "hello", "n": 3, "logprobs": 1, "ignore_eos": True, "top_k": 3, "user": "u", "stream": False}]
    lines = [{**openai(batch.COMPLETIONS, model="m", seed=3, **b), "custom_id": str(i)} for i, b in enumerate(bodies)]
    rows = run(tmp_path, lines)
    outputs = [row["response"]["body"]["choices"] for row in rows]
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    assert len({tuple(choice["token_ids"]) for choice in outputs[4]}) == 3  # one seed each
    first = outputs[4][0]
    assert first["token_ids"][: len(outputs[0][0]["token_ids"])] == outputs[0][0]["token_ids"]  # the given seed
    logprobs = first["logprobs"]
    assert len(logprobs["tokens"]) == len(first["token_ids"]) == 16
    assert set(logprobs["token_logprobs"]) == {-1.0} and all(len(top) == 1 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"][:3] == [0, 1, 2]
    assert rows[4]["response"]["body"]["usage"]["completion_tokens"] == 48
    assert rows[4]["response"]["body"]["model"] == "m"


def test_openai_chat(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "hi"}]
    lines = [
        openai(batch.CHAT, messages=[{"role": "user", "content": "hi"}], max_completion_tokens=4),
        openai(batch.CHAT, messages=[{"role": "user", "content": parts}], max_tokens=4, logprobs=True, top_logprobs=2),
        openai(batch.CHAT, messages=[{"role": "user", "content": "hi"}], chat_template_kwargs={"tag": "T"}),
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    llm = ToyLLM()
    rows = run(tmp_path, [{**line, "custom_id": str(i)} for i, line in enumerate(lines)], llm)
    assert llm.submitted == ["user: hi\n", "user: hi\n", "user: hi\n[T]", "user: hi\n"]
    body = rows[0]["response"]["body"]
    assert body["object"] == "chat.completion" and body["choices"][0]["message"]["role"] == "assistant"
    assert len(body["choices"][0]["token_ids"]) <= 4
    entry = rows[1]["response"]["body"]["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == -1.0 and [top["logprob"] for top in entry["top_logprobs"]] == [-1.0, -2.0]
    assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]


def test_stop_strings_and_defaults(tmp_path: Path) -> None:
    lines = [
        {"custom_id": "a", "prompt": "p", "stop": ["e", "a"], "seed": 1, "max_tokens": 500, "ignore_eos": True},
        {"custom_id": "b", "prompt": "p", "stop": "e", "seed": 1, "max_tokens": 500, "ignore_eos": True},
        {"custom_id": "c", "prompt": "p", "seed": 1, "temperature": None, "stop": None},
    ]
    rows = run(tmp_path, lines, defaults=SamplingParams(max_tokens=2, ignore_eos=True))
    texts = [row["response"]["body"]["choices"][0] for row in rows]
    assert texts[0]["finish_reason"] == texts[1]["finish_reason"] == "stop"
    assert "e" not in texts[1]["text"] and texts[1]["text"].startswith(texts[0]["text"])
    assert texts[2]["finish_reason"] == "length" and len(texts[2]["token_ids"]) == 2


BAD = [
    (b"{not json", "not a line of JSON"),
    (b"\xff\xfe", "not a line of JSON"),
    (b"[" * 100_000, "not a line of JSON"),
    (b'{"prompt": "x", "temperature": NaN}', "not a JSON number"),
    (b'"text"', "expected a JSON object"),
    (b"[]", "expected a JSON object"),
    (b"{}", "prompt must be"),
    ({"custom_id": 7, "prompt": "x"}, "custom_id must be a string"),
    ({"prompt": 3}, "prompt must be"),
    ({"prompt": ["a", "b"]}, "prompt must be"),
    ({"prompt": [1, True]}, "prompt must be"),
    ({"prompt": ""}, "prompt of 0 tokens"),
    ({"prompt": "x" * 500}, "prompt of 500 tokens"),
    ({"prompt": "x\ud800"}, "not valid Unicode"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "9"}, "max_tokens"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "top_p": 2}, "top_p"),
    ({"prompt": "x", "top_k": 1.5}, "top_k"),
    ({"prompt": "x", "seed": -1}, "seed"),
    ({"prompt": "x", "stop": {"a": 1}}, "stop must be"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "n": 0}, "n must be"),
    ({"prompt": "x", "n": 1000}, "n must be"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "max_token": 3}, "unknown field 'max_token'"),
    ({"prompt": "x", "presence_penalty": 0.5}, "presence_penalty: 0.5 is not supported"),
    (openai("/v1/embeddings", input="x"), "url must be"),
    ({"url": ["/v1/completions"], "body": {}}, "url must be"),
    ({**openai(batch.COMPLETIONS, prompt="x"), "method": "GET"}, "method must be POST"),
    ({"url": batch.COMPLETIONS, "body": "x"}, "body must be"),
    (openai(batch.COMPLETIONS, prompt="x", stream=True), "stream: True is not supported"),
    (openai(batch.CHAT, prompt="x"), "unknown field 'prompt'"),
    (openai(batch.CHAT, messages=[]), "messages must be"),
    (openai(batch.CHAT, messages=["hi"]), r"messages[0] must be"),
    (openai(batch.CHAT, messages=[{"role": "user", "content": 3}]), "content must be a string"),
    (openai(batch.CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "only text content"),
    (openai(batch.CHAT, messages=[{"role": "user", "content": "x"}], logprobs=5), "logprobs"),
    (openai(batch.CHAT, messages=[{"role": "user", "content": "x"}], chat_template_kwargs={"self": 1}), "must not"),
    (openai(batch.CHAT, messages=[{"role": "user", "content": "x"}], tools=[{}]), "tools"),
]


def test_a_bad_line_is_that_lines_error(tmp_path: Path) -> None:
    lines: list[Any] = []
    for i, (line, _) in enumerate(BAD):
        line = (
            {"custom_id": f"bad{i}", **line, **({"custom_id": f"b{i}"} if "url" in line else {})}
            if isinstance(line, dict)
            else line
        )
        lines += [line, {"custom_id": f"good{i}", "prompt": "x"}]
    rows = run(tmp_path, lines)
    assert len(rows) == len(lines)
    for (line, message), row, good in zip(BAD, rows[::2], rows[1::2], strict=True):
        assert good["error"] is None
        assert row["response"]["status_code"] == 400, line
        assert message in row["error"]["message"], (line, row["error"])
        assert row["response"]["body"]["error"]["message"] == row["error"]["message"]
        assert "\n" not in row["error"]["message"]
    assert rows[0]["custom_id"] == "line-1"


def test_custom_ids(tmp_path: Path) -> None:
    lines = [b"", {"prompt": "x"}, {"custom_id": "a", "prompt": "x"}, b"  ", {"custom_id": "a", "prompt": "y"}]
    lines += [{"custom_id": "é\u2028\ud800", "prompt": "x"}, {"custom_id": "", "prompt": "x"}]
    rows = run(tmp_path, lines)
    assert [row["custom_id"] for row in rows] == ["line-2", "a", "a", "é\u2028\ud800", ""]
    assert [row["error"] is None for row in rows] == [True, True, False, True, True]
    assert "earlier line" in rows[2]["error"]["message"]
    before = (tmp_path / "out.jsonl").read_bytes()
    run(tmp_path, llm=None)
    assert (tmp_path / "out.jsonl").read_bytes() == before


@given(
    st.one_of(
        st.binary(),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(),
            lambda c: (
                st.lists(c) | st.dictionaries(st.sampled_from(["custom_id", "url", "body", "prompt", "messages"]), c)
            ),
        ).map(lambda v: json.dumps(v).encode()),
    )
)
def test_parse_line_never_raises(raw: bytes) -> None:
    line = parse_line(raw, 3)
    assert isinstance(line.custom_id, str)


def test_derived_seed() -> None:
    assert derived_seed(5, "a") == derived_seed(5, "a") != derived_seed(5, "b")
    assert len({derived_seed(s, k) for s in range(50) for k in map(str, range(50))}) == 2500
    assert 0 <= derived_seed(0, "\ud800") < 2**63


def test_an_aborted_request_is_an_error(tmp_path: Path) -> None:
    class Aborting(ToyLLM):
        def poll(self, timeout: float | None) -> list[Update]:
            updates = super().poll(timeout)
            return [replace(u, finish_reason="abort") if u.request_id == "r1" else u for u in updates]

    rows = run(tmp_path, [{"custom_id": str(i), "prompt": "x", "n": 2} for i in range(3)], Aborting())
    assert [row["response"]["status_code"] for row in rows] == [500, 200, 200]
    llm = ToyLLM()
    rows = run(tmp_path, llm=llm, retry_errors=True)
    assert [row["response"]["status_code"] for row in rows] == [200, 200, 200]
    assert len(llm.submitted) == 2  # the two choices of one line
    assert not (tmp_path / "out.jsonl.retry").exists()


# -- the run --------------------------------------------------------------------------------------------------------


def test_order_and_bounds(tmp_path: Path) -> None:
    llm = ToyLLM()
    rows = run(tmp_path, simple(300), llm, in_flight=16, window=40)
    assert [row["custom_id"] for row in rows] == [f"id{i}" for i in range(300)]
    assert llm.peak <= 16 and not llm.running


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    class Small(ToyLLM):
        def submit(self, prompt: list[int], params: SamplingParams, request_id: str | None = None) -> str:
            if len(self.running) == 3:
                raise QueueFull("try again later")
            return super().submit(prompt, params, request_id)

    lines = [{**line, "n": 5} for line in simple(20)]
    llm = Small()
    rows = run(tmp_path, lines, llm)
    assert llm.peak == 3 and len(llm.submitted) == 100 and not llm.running
    (tmp_path / "out.jsonl").unlink()
    assert rows == run(tmp_path)


def test_the_input_is_streamed(tmp_path: Path) -> None:
    """Never reads further ahead of the output than the window."""
    written = 0

    def lines(source: Path) -> Iterator[batch.Line]:
        for i in range(500):
            done = len((tmp_path / "out.jsonl").read_bytes().splitlines())
            assert i - done <= 20
            nonlocal written
            written = max(written, done)
            yield parse_line(json.dumps({"custom_id": str(i), "prompt": "p"}).encode(), i + 1)

    (tmp_path / "in.jsonl").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "_lines", lines)
        assert len(run(tmp_path, in_flight=8, window=20)) == 500
    assert written > 400


def test_progress_and_counts(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*simple(20), {"prompt": 1}]))

    def progress(counts: Counts) -> None:
        seen.append((counts.requests, counts.completion_tokens))
        assert counts.total == 21

    counts = batch.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", ToyLLM, Options(seed=1), progress)
    assert seen == sorted(seen) and seen[-1][0] == counts.requests == 21
    assert (counts.errors, counts.skipped) == (1, 0)
    usages = [row["response"]["body"]["usage"] for row in read(tmp_path)[:20]]
    assert counts.completion_tokens == sum(usage["completion_tokens"] for usage in usages)
    assert counts.prompt_tokens == sum(usage["prompt_tokens"] for usage in usages)


def never() -> ToyLLM:
    raise AssertionError("the model must not be loaded")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 12_000))
def test_resumes_from_any_cut(tmp_path: Path, cut: int) -> None:
    """An output cut anywhere, in the middle of a line or a character, is completed to what it was."""
    whole = tmp_path / "whole"
    if not whole.exists():
        run(tmp_path, [*simple(12), b"bad", {"custom_id": "é🙂", "prompt": "é"}])
        whole.write_bytes((tmp_path / "out.jsonl").read_bytes())
    kept = whole.read_bytes()[:cut]
    (tmp_path / "out.jsonl").write_bytes(kept)
    llm = ToyLLM()
    run(tmp_path, llm=llm)
    assert (tmp_path / "out.jsonl").read_bytes() == whole.read_bytes()
    done = kept.count(b"\n")
    assert len(llm.submitted) == 13 - done + (done >= 13)  # repeats nothing; line 13 is the bad one


def test_nothing_left_loads_nothing(tmp_path: Path) -> None:
    rows = run(tmp_path, simple(3))
    counts = batch.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", never)
    assert (counts.requests, counts.skipped) == (3, 3) and read(tmp_path) == rows


def test_an_interrupted_run_leaves_whole_lines_and_an_idle_engine(tmp_path: Path) -> None:
    class Interrupted(ToyLLM):
        def poll(self, timeout: float | None) -> list[Update]:
            if len(self.submitted) > 60:
                raise KeyboardInterrupt
            return super().poll(timeout)

    llm = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, simple(100), llm, in_flight=8)
    assert 0 < len(read(tmp_path)) < 100 and not llm.running
    resumed = run(tmp_path)
    (tmp_path / "out.jsonl").unlink()
    assert resumed == run(tmp_path)


def test_retry_errors_survives_an_interruption(tmp_path: Path) -> None:
    lines = simple(30)
    expected = run(tmp_path, lines)
    (tmp_path / "out.jsonl").unlink()

    class Short(ToyLLM):
        max_model_len = 9  # "prompt 10" and later are too long

    assert sum(row["error"] is not None for row in run(tmp_path, lines, Short())) == 20
    assert run(tmp_path)[10]["error"] is not None  # errors are done, too

    class Interrupted(ToyLLM):
        def poll(self, timeout: float | None) -> list[Update]:
            if len(self.submitted) > 15:
                raise KeyboardInterrupt
            return super().poll(timeout)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, llm=Interrupted(), retry_errors=True, in_flight=4)
    assert len(read(tmp_path)) == 30
    llm = ToyLLM()
    assert run(tmp_path, llm=llm, retry_errors=True) == expected
    assert 0 < len(llm.submitted) < 20


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def message(source: Path = source, target: Path = target) -> str:
        with pytest.raises(BatchError) as error:
            batch.run(source, target, never)
        return str(error.value)

    assert "no such input file" in message()
    source.write_text("".join(json.dumps(line) + "\n" for line in simple(3)))
    assert "input is a directory" in message(source=tmp_path)
    assert "no such directory" in message(target=tmp_path / "no" / "out.jsonl")
    assert "output is a directory" in message(target=tmp_path)
    assert "same file" in message(target=source)
    run(tmp_path)
    done = target.read_bytes()
    source.write_text(json.dumps(simple(3)[1]) + "\n")
    assert "another input" in message()
    source.write_text(json.dumps(simple(3)[0]) + "\n")
    assert "result 2 is of 'id1'" in message()
    assert target.read_bytes() == done
    target.write_text('{"custom_id": "id0"}\n')
    assert "line 1 is not a result" in message()
    target.write_text("notes\n")
    assert "line 1 is not a result" in message() and target.read_text() == "notes\n"


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    def second() -> ToyLLM:
        with pytest.raises(BatchError, match="another run"):
            batch.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", never)
        return ToyLLM()

    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    batch.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", second)


DRIVER = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    sys.path[:0] = [{root!r}, {tests!r}]
    from test_batch import ToyLLM
    from serving.cli import main
    sys.exit(main(sys.argv[1:], llm_factory=lambda **options: ToyLLM(delay=0.005)))
"""


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again(tmp_path: Path, death: signal.Signals) -> None:
    """A real process, killed twice in the middle, ends with the bytes of an undisturbed run."""
    run(tmp_path, simple(200))
    expected = (tmp_path / "out.jsonl").read_bytes()
    target = tmp_path / "again.jsonl"
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(DRIVER).format(root=str(ROOT), tests=str(Path(__file__).parent)))
    command = [sys.executable, str(driver), "generate", "--seed", "5", "--in-flight", "16", "--model", "model"]
    command += ["--input", str(tmp_path / "in.jsonl"), "--output", str(target)]
    for attempt in range(1, 4):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        goal = attempt * len(expected) // 5
        while attempt < 3 and process.poll() is None and (not target.exists() or target.stat().st_size < goal):
            time.sleep(0.002)
        if attempt < 3:
            process.send_signal(death)
        _, stderr = process.communicate()
        expected_code = 0 if attempt == 3 else 130 if death == signal.SIGINT else -death
        assert process.returncode == expected_code, stderr
        assert b"Traceback" not in stderr
        if death == signal.SIGKILL and attempt == 1:  # the worst the kernel could have kept of a line
            with target.open("ab") as file:
                file.write(expected[target.stat().st_size :][:40])
    assert target.read_bytes() == expected
