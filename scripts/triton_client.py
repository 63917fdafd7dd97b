"""tritonclient against a running `moe-jax serve`, in an environment of its own: pip install 'tritonclient[grpc]'.

    python scripts/triton_client.py --address 127.0.0.1:50051 --model demo [--kill PID]

--kill: of an engine (`moe-jax status`), which is killed in the middle of the stream. Prints one line a check; exit code
1 when one fails.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-not-found]
from tritonclient.utils import InferenceServerException  # type: ignore[import-not-found]

PARAMETERS = {"max_tokens": 200, "seed": 1, "ignore_eos": True}


def text_input(prompt: str) -> triton.InferInput:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_))
    return tensor


def text_of(result: Any) -> str:
    return result.as_numpy("text_output")[0].decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kill", type=int)
    args = parser.parse_args()
    passed: list[bool] = []

    def check(name: str, good: bool) -> None:
        passed.append(good)
        print(f"{'ok  ' if good else 'FAIL'} {name}", flush=True)

    with triton.InferenceServerClient(args.address) as client:
        check("live and ready", client.is_server_live() and client.is_model_ready(args.model))
        names = {tensor.name for tensor in client.get_model_metadata(args.model).outputs}
        check("metadata", names == {"text_output", "token_ids", "finish_reason"})
        whole = client.infer(args.model, [text_input("Once upon a time")], parameters=PARAMETERS)
        check("generate", len(whole.as_numpy("token_ids")) == 200 and bool(text_of(whole)))
        results: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: results.put(error or result))
        client.async_stream_infer(args.model, [text_input("Once upon a time")], parameters=PARAMETERS)
        parts: list[str] = []
        count = 0
        while True:
            result = results.get(timeout=60)
            assert not isinstance(result, InferenceServerException), result
            parts.append(text_of(result))
            count += len(result.as_numpy("token_ids"))
            if args.kill and count > 50:
                os.kill(args.kill, signal.SIGKILL)
                args.kill = None
            if result.as_numpy("finish_reason")[0]:
                break
        client.stop_stream()
        check("stream", "".join(parts) == text_of(whole) and count == 200)
        try:
            client.infer(args.model, [text_input("x")], parameters={"temperature": -1.0})
            check("refused", False)
        except InferenceServerException as e:
            check("refused", "INVALID_ARGUMENT" in str(e.status()))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
