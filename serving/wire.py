"""Messages that are none, and methods that are not offered: who sends them is told so by INVALID_ARGUMENT and
UNIMPLEMENTED, where gRPC itself would say INTERNAL and UNKNOWN.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError


class WellFormed(grpc.aio.ServerInterceptor):
    """For calls with one request; streams of requests are read by whoever serves them."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        name = "unary_stream" if handler.response_streaming else "unary_unary"
        deserialize, behaviour = handler.request_deserializer, getattr(handler, name)

        def lenient(data: bytes) -> Any:
            try:
                return deserialize(data)
            except DecodeError as e:
                return e

        async def checked(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if isinstance(request, DecodeError):
                text = f"message: found {str(request) or 'bytes that are none'}, expected one of this call's type"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text[:500])
            try:
                return await behaviour(request, context)
            except NotImplementedError:  # by generated code, whose place nothing has taken
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{handler_call_details.method}: not offered here")

        return handler._replace(request_deserializer=lenient, **{name: checked})
