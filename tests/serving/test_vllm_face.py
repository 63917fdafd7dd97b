"""What the gateway smg meets, by its messages; scripts/openai_client.py has smg and the openai client themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.serving.clusters import fake_cluster
from tests.serving.fake_engine import tokens
from tests.serving.hex_tokenizer import EOS, VOCABULARY
from tests.serving.test_api import PATIENT, Running, refused

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not here: pip install 'moe-jax[openai]'")

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm  # noqa: E402
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as rpc  # noqa: E402

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    def prepare(server: Any) -> None:
        server.add_vllm_face(Path("/models/toy"), "toy")

    running = Running(fake_cluster(("a", "b"), fake={"step": 0.002}, **PATIENT), prepare=prepare)
    yield running
    running.close()


@pytest.fixture(scope="module")
def stub(served: Running) -> Any:
    return rpc.VllmEngineStub(served.channel)


def asked(stream: bool = False, name: str = "", **params: Any) -> vllm.GenerateRequest:
    given = {"max_tokens": 20, "seed": 1, "ignore_eos": True, "temperature": 0.5, "repetition_penalty": 1.0} | params
    prompt = vllm.TokenizedInput(input_ids=[1, 2, 3])
    sampling = vllm.SamplingParams(**given)
    return vllm.GenerateRequest(request_id=name, tokenized=prompt, sampling_params=sampling, stream=stream)


def test_whole_and_streamed(stub):
    (whole,) = stub.Generate(asked(max_tokens=200))
    *chunks, last = stub.Generate(asked(stream=True, max_tokens=200))
    (short,) = stub.Generate(asked())
    assert list(short.complete.output_ids) == tokens(1, 20) and short.complete.finish_reason == "length"
    assert [t for part in chunks for t in part.chunk.token_ids] == list(last.complete.output_ids) == tokens(1, 200)
    assert chunks[-1].chunk.completion_tokens == last.complete.completion_tokens == 200
    assert whole.complete.prompt_tokens == last.complete.prompt_tokens == 3


def test_several_outputs_and_logprobs(stub):
    responses = [r.complete for r in stub.Generate(asked(n=3, logprobs=0))]
    assert [(r.index, list(r.output_ids)) for r in responses] == [(i, tokens(1 + i, 20)) for i in range(3)]
    assert list(responses[0].output_logprobs.token_logprobs) == [-0.5] * 20


def test_abort(served, stub):
    call = stub.Generate(asked(stream=True, max_tokens=10000, name="long", n=2))
    next(call)
    stub.Abort(vllm.AbortRequest(request_ids=["long", "nobody's"]))
    finished = [r.complete.finish_reason for r in call if r.HasField("complete")]
    assert finished == ["abort", "abort"]
    served.no_requests()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_p": 0.5}, "min_p: found 0.5"),
        ({"presence_penalty": 1.0}, "presence_penalty: found 1.0"),
        ({"regex": "a*"}, "regex: found a constraint"),
        ({"logit_bias": {1: 2.0}}, "logit_bias: found a value"),
        ({"n": 17}, "n: found 17, expected at most 16"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": -1.0}, "temperature: found -1.0"),
        ({"logprobs": -1}, "logprobs: found -1"),
    ],
)
def test_refused(stub, given, message):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, message):
        list(stub.Generate(asked(**given)))


def test_what_the_gateway_asks_first(stub):
    assert stub.HealthCheck(vllm.HealthCheckRequest()).healthy
    model = stub.GetModelInfo(vllm.GetModelInfoRequest())
    assert (model.served_model_name, model.tokenizer_path) == ("toy", "/models/toy")
    assert model.vocab_size == VOCABULARY and list(model.eos_token_ids) == [EOS] and model.is_generation
    assert stub.GetServerInfo(vllm.GetServerInfoRequest()).server_type == "vllm-grpc"


def test_load_and_what_is_not_offered(served, stub):
    calls = [stub.Generate(asked(stream=True, max_tokens=10000, name=f"long-{i}")) for i in range(3)]
    for call in calls:
        next(call)
    (load,) = stub.GetLoads(vllm.GetLoadsRequest()).loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (3, 0, 3)
    for call in calls:
        call.cancel()
    with refused(grpc.StatusCode.UNIMPLEMENTED, "Embed: not offered here"):
        stub.Embed(vllm.EmbedRequest())
    served.no_requests()
