"""The Open Inference Protocol, by its messages; scripts/triton_client.py has tritonclient itself."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from serving.protos import open_inference_pb2 as kserve
from serving.protos import open_inference_pb2_grpc as rpc
from tests.serving.clusters import fake_cluster
from tests.serving.fake_engine import tokens
from tests.serving.hex_tokenizer import TOKENIZER, VOCABULARY
from tests.serving.test_api import PATIENT, Running, expected, refused

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

PARAMETERS: dict[str, Any] = {"max_tokens": 20, "seed": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def stub() -> Iterator[Any]:
    def prepare(server: Any) -> None:
        server.add_kserve_face("toy")

    running = Running(fake_cluster(("a", "b"), fake={"step": 0.002}, **PATIENT), prepare=prepare)
    yield rpc.GRPCInferenceServiceStub(running.channel)
    running.close()


def asked(name: str = "text_input", raw: bytes | None = None, **parameters: Any) -> kserve.ModelInferRequest:
    text = b"1a 2b "
    datatype = "BYTES" if name == "text_input" else "INT32"
    request = kserve.ModelInferRequest(model_name="toy")
    request.inputs.add(name=name, datatype=datatype, shape=[1])
    request.raw_input_contents.append(struct.pack("<I", len(text)) + text if raw is None else raw)
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for key, value in {**PARAMETERS, **parameters}.items():
        setattr(request.parameters[key], kinds[type(value)], value)
    return request


def outputs(response: kserve.ModelInferResponse) -> dict[str, Any]:
    raw = dict(zip((o.name for o in response.outputs), response.raw_output_contents, strict=True))
    ids = raw["token_ids"]
    return {
        "text": raw["text_output"][4:].decode(),
        "ids": list(struct.unpack(f"<{len(ids) // 4}i", ids)),
        "reason": raw["finish_reason"][4:].decode(),
    }


def test_infer(stub):
    found = outputs(stub.ModelInfer(asked()))
    assert (found["ids"], found["text"], found["reason"]) == expected(1, 20)
    by_ids = stub.ModelInfer(asked("token_ids", struct.pack("<2i", *TOKENIZER.encode("1a 2b "))))
    assert outputs(by_ids) == found
    stop = found["text"][20:24]
    stopped = outputs(stub.ModelInfer(asked(stop=stop)))
    assert stopped["reason"] == "stop" and stopped["text"] == found["text"][: found["text"].index(stop)]
    contents = asked()
    del contents.raw_input_contents[:]
    contents.inputs[0].contents.bytes_contents.append(b"1a 2b ")
    contents.outputs.add(name="text_output")
    assert [o.name for o in stub.ModelInfer(contents).outputs] == ["text_output"]


def test_stream(stub):
    requests = [asked(max_tokens=200), asked(temperature=-1.0), asked(max_tokens=5)]
    seen: list[list[dict[str, Any]]] = [[]]
    errors = []
    for response in stub.ModelStreamInfer(iter(requests)):
        if response.error_message:
            errors.append(response.error_message)
            continue
        seen[-1].append(outputs(response.infer_response))
        if seen[-1][-1]["reason"]:
            seen.append([])
    assert [[t for part in parts for t in part["ids"]] for parts in seen[:2]] == [tokens(1, 200), tokens(1, 5)]
    assert "".join(part["text"] for part in seen[0]) == expected(1, 200)[1]
    assert len(errors) == 1 and "temperature: found -1.0" in errors[0]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"raw": b"\x05\0\0\0ab"}, "INVALID_ARGUMENT", "end within an element"),
        ({"raw": b"\x01\0\0\0\xff"}, "INVALID_ARGUMENT", "no UTF-8"),
        ({"raw": b""}, "INVALID_ARGUMENT", "found 0 texts"),
        ({"name": "image"}, "INVALID_ARGUMENT", "found image, expected one of text_input, token_ids"),
        ({"name": "token_ids", "raw": b"abc"}, "INVALID_ARGUMENT", "four for each"),
        ({"name": "token_ids", "raw": b"\xff\xff\xff\xff"}, "INVALID_ARGUMENT", "found -1, expected none below 0"),
        ({"name": "token_ids", "raw": struct.pack("<i", VOCABULARY)}, "INVALID_ARGUMENT", "expected 0 to 31999"),
        ({"max_tokens": 2.5}, "INVALID_ARGUMENT", "max_tokens = 2.5"),
        ({"max_tokens": -1}, "INVALID_ARGUMENT", "max_tokens: found -1"),
        ({"temperature": True}, "INVALID_ARGUMENT", "temperature = True"),
        ({"colour": "red"}, "INVALID_ARGUMENT", "colour = 'red'"),
    ],
)
def test_refused(stub, change, code, message):
    with refused(getattr(grpc.StatusCode, code), message):
        stub.ModelInfer(asked(**change))


def test_model(stub):
    assert stub.ServerLive(kserve.ServerLiveRequest()).live and stub.ServerReady(kserve.ServerReadyRequest()).ready
    assert stub.ModelReady(kserve.ModelReadyRequest(name="toy")).ready
    assert not stub.ModelReady(kserve.ModelReadyRequest(name="other")).ready
    found = stub.ModelMetadata(kserve.ModelMetadataRequest(name="toy"))
    assert {t.name: t.datatype for t in found.inputs} == {"text_input": "BYTES", "token_ids": "INT32"}
    wrong = asked()
    wrong.model_name = "other"
    with refused(grpc.StatusCode.NOT_FOUND, "model: found 'other', expected 'toy'"):
        stub.ModelInfer(wrong)
