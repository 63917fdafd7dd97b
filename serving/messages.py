"""Requests and token events as JSON values, for `Channel`.

A request is known to the engines by a number that is never used twice, so that what is still on its way for a
cancelled one cannot be taken for a later request of the same id.
"""

from __future__ import annotations

from typing import Any

from moe_jax.request import Request, SamplingParams, TokenEvent

PackedEvent = list[Any]  # [number, index, token, logprob, top, finish_reason]


def pack_request(number: int, request: Request) -> dict[str, Any]:
    return vars(request) | {"request_id": str(number), "params": vars(request.params)}


def unpack_request(packed: dict[str, Any]) -> Request:
    """Its request_id is the number. The fields are checked again as they are built."""
    fields: dict[str, Any] = packed | {"params": SamplingParams(**packed["params"])}
    return Request(**fields)


def pack_event(event: TokenEvent) -> PackedEvent:
    return [int(event.request_id), event.index, event.token, event.logprob, event.top, event.finish_reason]


def unpack_event(packed: PackedEvent, request_id: str) -> TokenEvent:
    _, index, token, logprob, top, reason = packed
    return TokenEvent(request_id, index, token, logprob, tuple((t, p) for t, p in top), reason)
