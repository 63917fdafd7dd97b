"""The openai client through the gateway smg in front of a cluster, which loses a host in the middle of a stream.

    pip install 'moe-jax[openai]' openai
    python scripts/openai_client.py [--hosts 2]

Starts `moe-jax serve --openai-port`, and ends it. Prints one line a check; exit code 1 when one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import openai  # type: ignore[import-not-found]
from _service import free_port, kill_a_host, served

PROMPT = "Once upon a time"


def until_ready(client: openai.OpenAI) -> str:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(openai.OpenAIError):
            if models := client.models.list().data:
                return models[0].id
        assert time.monotonic() < deadline, "the gateway has no model"
        time.sleep(0.2)


def checks(client: openai.OpenAI, model: str, kill: Callable[[], object]) -> Iterator[tuple[str, bool]]:
    def complete(**given: object) -> openai.types.Completion:
        return client.completions.create(**{"model": model, "prompt": PROMPT, "seed": 1, "temperature": 0.8, **given})

    whole = complete(max_tokens=200, extra_body={"ignore_eos": True})
    text = whole.choices[0].text
    yield "finish reason and usage", whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 200
    yield "the same seed, the same text", text.startswith(complete(max_tokens=20).choices[0].text)
    stop = text[20:24]
    stopped = complete(max_tokens=200, stop=[stop]).choices[0]
    yield "stop", stopped.finish_reason == "stop" and stopped.text == text[: text.index(stop)]
    several = complete(max_tokens=8, n=3).choices
    yield "n", len({choice.text for choice in several}) == 3
    parts, killed = [], False
    for part in complete(max_tokens=200, stream=True, extra_body={"ignore_eos": True}):
        parts += [choice.text for choice in part.choices]
        if len(parts) > 20 and not killed:
            kill()
            killed = True
    yield "a host is killed in the middle of a stream: the same text", killed and "".join(parts) == text
    messages = [{"role": "user", "content": "Hello"}]
    asked = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
    chat = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    yield "chat", bool(chat.choices[0].message.content) and chat.usage.prompt_tokens > 0
    yield "logprobs", len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
    streamed = client.chat.completions.create(**asked, stream=True)
    streamed_text = "".join(part.choices[0].delta.content or "" for part in streamed if part.choices)
    yield "chat, streamed", streamed_text == chat.choices[0].message.content
    for given in ({"temperature": -1.0}, {"frequency_penalty": 1.0}, {"max_tokens": 10**9, "n": 100}):
        try:
            complete(**given)
            yield f"refused: {given}", False
        except openai.BadRequestError:
            yield f"refused: {given}", True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    hosts = parser.parse_args().hosts
    port = free_port()
    with served("--hosts", str(hosts), "--openai-port", str(port)) as address:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        results = []
        for name, passed in checks(client, until_ready(client), lambda: kill_a_host(address)):
            results.append(passed)
            print(f"{'ok  ' if passed else 'FAIL'} {name}", flush=True)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
