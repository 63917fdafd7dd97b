"""A third face of the service: the Open Inference Protocol (KServe v2) over gRPC, for clients such as tritonclient.

protos/open_inference.proto says which tensors and parameters there are. Not to be loaded into a process that loads
tritonclient's own messages: both have the protocol's names.
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Sequence
from typing import Any

import grpc

from serving.api import Inference
from serving.errors import CODES, Invalid, NotFound
from serving.protos import inference_pb2 as pb
from serving.protos import open_inference_pb2 as kserve
from serving.protos import open_inference_pb2_grpc as rpc

NAME = kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_INPUTS = {"text_input": ("BYTES", [1]), "token_ids": ("INT32", [-1])}
_OUTPUTS = {"text_output": ("BYTES", [1]), "token_ids": ("INT32", [-1]), "finish_reason": ("BYTES", [1])}
_PARAMETERS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_tokens", "top_k", "seed"), (int,)),
    **dict.fromkeys(("temperature", "top_p"), (float, int)),
    "ignore_eos": (bool,),
    "stop": (str,),
}
_TRITON = ("triton_enable_empty_final_response", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout")


class KServe(rpc.GRPCInferenceServiceServicer):
    def __init__(self, inference: Inference, name: str) -> None:
        self._inference, self._name = inference, name

    async def ServerLive(self, request: Any, context: grpc.aio.ServicerContext) -> kserve.ServerLiveResponse:
        return kserve.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: grpc.aio.ServicerContext) -> kserve.ServerReadyResponse:
        return kserve.ServerReadyResponse(ready=self._inference.unavailable is None)

    async def ModelReady(
        self, request: kserve.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ModelReadyResponse:
        return kserve.ModelReadyResponse(ready=request.name == self._name and self._inference.unavailable is None)

    async def ServerMetadata(self, request: Any, context: grpc.aio.ServicerContext) -> kserve.ServerMetadataResponse:
        model = await self._inference.GetModel(pb.GetModelRequest(), context)
        return kserve.ServerMetadataResponse(name="moe-jax", version=model.version)

    async def ModelMetadata(
        self, request: kserve.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ModelMetadataResponse:
        response = kserve.ModelMetadataResponse(name=self._name, versions=["1"], platform="moe-jax")
        async with self._inference.call(context):
            self._check_name(request.name)
            for tensors, target in ((_INPUTS, response.inputs), (_OUTPUTS, response.outputs)):
                for name, (datatype, shape) in tensors.items():
                    target.add(name=name, datatype=datatype, shape=shape)
        return response

    async def ModelInfer(
        self, request: kserve.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> kserve.ModelInferResponse:
        response = kserve.ModelInferResponse()
        async with self._inference.call(context):
            completion = await self._inference.start(self._translate(request))
            with self._inference.following(completion, context):
                await completion.done()
            self._inference.check_open(completion)
            response = self._response(request, completion.response())
        return response

    async def ModelStreamInfer(self, request_iterator: Any, context: grpc.aio.ServicerContext) -> None:
        """One request after the other. What is wrong with one is its own affair, and the stream goes on."""
        async for request in request_iterator:
            try:
                completion = await self._inference.start(self._translate(request))
                with self._inference.following(completion, context):
                    async for part in completion.follow(0):
                        response = self._response(request, part)
                        await context.write(kserve.ModelStreamInferResponse(infer_response=response))
                self._inference.check_open(completion)
            except tuple(CODES) as e:
                failed = kserve.ModelInferResponse(id=request.id, model_name=request.model_name)
                await context.write(kserve.ModelStreamInferResponse(error_message=str(e), infer_response=failed))

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise NotFound(f"model: found {name[:100]!r}, expected {self._name!r}")

    def _translate(self, request: kserve.ModelInferRequest) -> pb.GenerateRequest:
        """As our own service has it. Raises Invalid and NotFound."""
        self._check_name(request.model_name)
        asked = pb.GenerateRequest(request_id=request.id)
        if len(request.inputs) != 1 or request.inputs[0].name not in _INPUTS:
            found = ", ".join(tensor.name for tensor in request.inputs) or "none"
            raise Invalid(f"inputs: found {found[:200]}, expected one of {', '.join(_INPUTS)}")
        tensor, raw = request.inputs[0], request.raw_input_contents
        if tensor.datatype != _INPUTS[tensor.name][0]:
            raise Invalid(f"inputs: found {tensor.name} of {tensor.datatype!r}, expected {_INPUTS[tensor.name][0]}")
        if tensor.name == "token_ids":
            ids = _int32(raw[0]) if raw else tensor.contents.int_contents
            if any(token < 0 for token in ids):
                raise Invalid(f"token_ids: found {min(ids)}, expected none below 0")
            asked.token_ids.ids.extend(ids)
        else:
            texts = _unpack(raw[0]) if raw else list(tensor.contents.bytes_contents)
            if len(texts) != 1:
                raise Invalid(f"text_input: found {len(texts)} texts, expected one")
            try:
                asked.prompt = texts[0].decode()
            except UnicodeDecodeError:
                raise Invalid("text_input: found bytes that are no UTF-8, expected text") from None
        for name, value in request.parameters.items():
            self._set(asked.params, name, value)
        return asked

    def _set(self, params: pb.SamplingParams, name: str, parameter: kserve.InferParameter) -> None:
        if name in _TRITON:
            return
        kind = parameter.WhichOneof("parameter_choice")
        value: Any = None if kind is None else getattr(parameter, kind)
        fits = isinstance(value, _PARAMETERS.get(name, ())) and isinstance(value, bool) == (name == "ignore_eos")
        if not fits:
            known = ", ".join(_PARAMETERS)
            raise Invalid(f"parameters: found {name[:100]} = {value!r}, expected of their types {known}")
        try:
            params.stop.append(value) if name == "stop" else setattr(params, name, value)
        except ValueError as e:
            raise Invalid(f"{name}: found {value!r}, which is out of range ({e})") from None

    def _response(self, request: kserve.ModelInferRequest, part: pb.GenerateResponse) -> kserve.ModelInferResponse:
        response = kserve.ModelInferResponse(model_name=self._name, model_version="1", id=request.id or part.request_id)
        wanted = [output.name for output in request.outputs] or list(_OUTPUTS)
        raw = {
            "text_output": (1, _pack(part.text)),
            "token_ids": (len(part.token_ids), _int32_bytes(part.token_ids)),
            "finish_reason": (1, _pack(part.finish_reason)),
        }
        for name in wanted:
            if name in raw:
                count, data = raw[name]
                response.outputs.add(name=name, datatype=_OUTPUTS[name][0], shape=[count])
                response.raw_output_contents.append(data)
        return response


# Tensors as bytes, little-endian; those of BYTES with a length of four bytes before each element


def _pack(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _unpack(raw: bytes) -> list[bytes]:
    """Raises Invalid for what is cut."""
    items, at = [], 0
    while at < len(raw):
        size = struct.unpack_from("<I", raw, at)[0] if len(raw) - at >= 4 else len(raw)
        at += 4
        if at + size > len(raw):
            raise Invalid(f"text_input: found {len(raw)} bytes that end within an element, expected whole ones")
        items.append(raw[at : at + size])
        at += size
    return items


def _int32(raw: bytes) -> Sequence[int]:
    if len(raw) % 4:
        raise Invalid(f"token_ids: found {len(raw)} bytes, expected four for each")
    numbers = array.array("i", raw)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _int32_bytes(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)
