"""A second face of the service: `vllm.grpc.engine.VllmEngine`, which the gateway smg speaks to engines. With it in
front clients have OpenAI's HTTP interface; chat templates, tokens and text are the gateway's business there.

Needs the package smg-grpc-proto. What the engine cannot do (penalties, grammars, media) is INVALID_ARGUMENT.
"""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as rpc

from serving.api import Inference
from serving.completions import Completion
from serving.errors import Invalid
from serving.protos import inference_pb2 as pb

NAME = vllm.DESCRIPTOR.services_by_name["VllmEngine"].full_name
_MAX_N = 16  # outputs of one request
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values that ask for nothing
    "min_p": (0.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (0.0, 1.0),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
}


class VllmEngine(rpc.VllmEngineServicer):
    def __init__(self, inference: Inference, model: Path, name: str) -> None:
        """model: its directory, where the gateway finds the tokenizer. name: that clients ask for."""
        self._inference, self._path, self._name = inference, model, name
        self._begun = time.time()

    async def Generate(self, request: vllm.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """Of several outputs all are computed at once, and told one after the other."""
        async with self._inference.call(context):
            asked = _translate(request, self._inference.max_output_tokens)
            completions = [await self._inference.start(one) for one in asked]
            with contextlib.ExitStack() as stack:
                for completion in completions:
                    stack.enter_context(self._inference.following(completion, context))
                for index, completion in enumerate(completions):
                    await self._tell(index, completion, request.stream, context)

    async def _tell(self, index: int, completion: Completion, stream: bool, context: grpc.aio.ServicerContext) -> None:
        prompt = len(completion.entry.asked.token_ids)
        if stream:
            async for part in completion.follow(0):
                if part.token_ids:
                    chunk = vllm.GenerateStreamChunk(
                        token_ids=part.token_ids,
                        prompt_tokens=prompt,
                        completion_tokens=part.offset + len(part.token_ids),
                        output_logprobs=_logprobs(part),
                        index=index,
                    )
                    await context.write(vllm.GenerateResponse(chunk=chunk))
        else:
            await completion.done()
        self._inference.check_open(completion)
        whole = completion.response()
        complete = vllm.GenerateComplete(
            output_ids=whole.token_ids,
            finish_reason=whole.finish_reason,
            prompt_tokens=prompt,
            completion_tokens=len(whole.token_ids),
            output_logprobs=_logprobs(whole),
            index=index,
        )
        await context.write(vllm.GenerateResponse(complete=complete))

    async def Abort(self, request: vllm.AbortRequest, context: grpc.aio.ServicerContext) -> vllm.AbortResponse:
        for name in request.request_ids:
            for i in range(_MAX_N):
                cancel = pb.CancelRequest(request_id=name if i == 0 else f"{name}-{i}")
                if not (await self._inference.Cancel(cancel, context)).cancelled:
                    break
        return vllm.AbortResponse()

    async def HealthCheck(
        self, request: vllm.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> vllm.HealthCheckResponse:
        why = self._inference.unavailable
        return vllm.HealthCheckResponse(healthy=why is None, message=why or "")

    async def GetModelInfo(
        self, request: vllm.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> vllm.GetModelInfoResponse:
        model = await self._inference.GetModel(pb.GetModelRequest(), context)
        return vllm.GetModelInfoResponse(
            model_path=str(self._path),
            tokenizer_path=str(self._path),
            served_model_name=self._name,
            is_generation=True,
            max_context_length=model.max_model_len,
            max_req_input_len=model.max_model_len - 1,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            model_type="moe-jax",
        )

    async def GetServerInfo(
        self, request: vllm.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> vllm.GetServerInfoResponse:
        return vllm.GetServerInfoResponse(
            active_requests=self._inference.running,
            uptime_seconds=time.time() - self._begun,
            server_type="vllm-grpc",
            data_parallel_size=1,
        )

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: grpc.aio.ServicerContext) -> vllm.GetLoadsResponse:
        """All ranks as one: which of them takes a request is not the gateway's to say."""
        running, waiting = self._inference.running, self._inference.waiting
        load = vllm.SchedulerLoad(num_running_reqs=running - waiting, num_waiting_reqs=waiting, num_total_reqs=running)
        now = datetime.now(UTC).isoformat()
        return vllm.GetLoadsResponse(timestamp=now, dp_rank_count=1, loads=[load])


def _translate(request: vllm.GenerateRequest, max_tokens: int) -> list[pb.GenerateRequest]:
    """As our own service has it, one for each output. max_tokens: where none is given. Raises Invalid."""
    given = request.sampling_params
    for name, neutral in _NEUTRAL.items():
        if getattr(given, name) not in neutral:
            raise Invalid(f"{name}: found {getattr(given, name)!r}, expected none: it is not supported")
    for name in ("logit_bias", "prompt_logprobs", "truncate_prompt_tokens"):
        if len(given.logit_bias) if name == "logit_bias" else given.HasField(name):
            raise Invalid(f"{name}: found a value, expected none: it is not supported")
    if constraint := given.WhichOneof("constraint"):
        raise Invalid(f"{constraint}: found a constraint, expected none: grammars are not supported")
    for name in ("mm_inputs", "media_refs"):
        if request.HasField(name):
            raise Invalid(f"{name}: found media, expected text alone")
    if given.n > _MAX_N:
        raise Invalid(f"n: found {given.n}, expected at most {_MAX_N}")
    params = pb.SamplingParams(
        stop=given.stop, stop_token_ids=given.stop_token_ids, ignore_eos=given.ignore_eos, top_k=given.top_k
    )
    if given.top_p:
        params.top_p = given.top_p
    if given.logprobs < 0:
        raise Invalid(f"logprobs: found {given.logprobs}, expected none below 0")
    for name in ("temperature", "max_tokens", "logprobs"):
        if given.HasField(name):
            setattr(params, name, getattr(given, name))
    if not given.HasField("max_tokens"):
        params.max_tokens = max_tokens
    asked = []
    for i in range(max(1, given.n)):
        name = request.request_id if i == 0 else f"{request.request_id}-{i}"
        one = pb.GenerateRequest(request_id=name, params=params)
        if given.HasField("seed"):
            one.params.seed = (given.seed + i) % (1 << 64)
        if request.WhichOneof("input") == "text":
            one.prompt = request.text
        else:
            one.token_ids.ids.extend(request.tokenized.input_ids)
        asked.append(one)
    return asked


def _logprobs(part: pb.GenerateResponse) -> vllm.OutputLogProbs | None:
    if not part.logprobs:
        return None
    return vllm.OutputLogProbs(
        token_ids=part.token_ids,
        token_logprobs=[one.logprob for one in part.logprobs],
        top_logprobs=[
            vllm.TopLogProbs(values=[t.logprob for t in one.top], token_ids=[t.token_id for t in one.top])
            for one in part.logprobs
        ],
    )
