"""The generated code is what the protos say, and the public ones keep their promise: names and numbers stay."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from serving.protos import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate_protos.py"

FIELDS = {
    "GenerateRequest": {"request_id": 1, "prompt": 2, "token_ids": 3, "params": 4, "priority": 5},
    "SamplingParams": {
        "max_tokens": 1,
        "temperature": 2,
        "top_p": 3,
        "top_k": 4,
        "seed": 5,
        "stop": 6,
        "ignore_eos": 7,
        "stop_token_ids": 8,
        "logprobs": 9,
    },
    "GenerateResponse": {
        "request_id": 1,
        "token_ids": 2,
        "text": 3,
        "finish_reason": 4,
        "usage": 5,
        "logprobs": 6,
        "offset": 7,
    },
    "TokenIds": {"ids": 1},
    "Usage": {"prompt_tokens": 1, "completion_tokens": 2},
    "TokenLogprobs": {"logprob": 1, "top": 2},
    "Logprob": {"token_id": 1, "logprob": 2},
    "ResumeRequest": {"request_id": 1, "offset": 2},
    "CancelRequest": {"request_id": 1},
    "CancelResponse": {"cancelled": 1},
    "StatusRequest": {"slots": 1, "load": 2},
    "StatusResponse": {"json": 1},
    "DrainRequest": {"host": 1},
    "DrainResponse": {"ranks": 1, "epoch": 2},
    "TokenizeRequest": {"text": 1},
    "TokenizeResponse": {"token_ids": 1},
    "DetokenizeRequest": {"token_ids": 1},
    "DetokenizeResponse": {"text": 1},
    "GetModelRequest": {},
    "GetModelResponse": {
        "name": 1,
        "vocab_size": 2,
        "max_model_len": 3,
        "max_output_tokens": 4,
        "eos_token_ids": 5,
        "max_logprobs": 6,
        "version": 7,
    },
    "UndrainRequest": {"host": 1},
    "UndrainResponse": {"ranks": 1, "epoch": 2},
    "WatchRequest": {},
    "WatchResponse": {"epoch": 1, "state": 2, "reason": 3, "ranks": 4, "time": 5, "recovery": 6},
    "Recovery": {"epoch": 1, "cause": 2, "reasons": 3, "lost": 4, "joined": 5, "phases_ms": 6},
    "RebalanceRequest": {},
    "RebalanceResponse": {"slots": 1, "epoch": 2},
}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_protos", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_from_these_sources_and_not_edited():
    script = generator()
    assert script.SUMS.read_text() == script.sums(), "protos/ or serving/protos/ changed: run `make protos`"


def test_without_the_tools_it_says_what_to_do():
    try:
        if importlib.metadata.version("grpcio-tools") == generator().TOOLS:
            pytest.skip("grpcio-tools is here")
    except importlib.metadata.PackageNotFoundError:
        pass
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert run.returncode == 1 and "expected 1.76.0: run `make protos`" in run.stderr


def test_the_public_interface():
    messages = inference_pb2.DESCRIPTOR.message_types_by_name
    assert {name: {f.name: f.number for f in m.fields} for name, m in messages.items()} == FIELDS
    assert {f.name for f in messages["SamplingParams"].fields if f.has_presence} == {
        *("max_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos", "logprobs")
    }
    services = inference_pb2.DESCRIPTOR.services_by_name
    methods = {m.full_name: m.server_streaming for service in services.values() for m in service.methods}
    assert methods == {
        "moe_jax.v1.Inference.Generate": True,
        "moe_jax.v1.Inference.Complete": False,
        "moe_jax.v1.Inference.Resume": True,
        "moe_jax.v1.Inference.Cancel": False,
        "moe_jax.v1.Admin.Status": False,
        "moe_jax.v1.Inference.Tokenize": False,
        "moe_jax.v1.Inference.Detokenize": False,
        "moe_jax.v1.Inference.GetModel": False,
        "moe_jax.v1.Admin.Drain": False,
        "moe_jax.v1.Admin.Undrain": False,
        "moe_jax.v1.Admin.Watch": True,
        "moe_jax.v1.Admin.Rebalance": False,
    }


def test_modules_fit_together():
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1, 2]))
    request.params.seed = 2**64 - 1
    again = inference_pb2.GenerateRequest.FromString(request.SerializeToString())
    assert again.WhichOneof("input") == "token_ids" and again.params.seed == 2**64 - 1
    assert again.params.HasField("seed") and not again.params.HasField("max_tokens")
    message = cluster_pb2.WorkerMessage(ended=cluster_pb2.EngineEnded(reason="x"))
    assert message.WhichOneof("kind") == "ended"
    assert all(hasattr(inference_pb2_grpc, f"{name}Stub") for name in ("Inference", "Admin"))
    assert hasattr(cluster_pb2_grpc, "add_ClusterServicer_to_server")
