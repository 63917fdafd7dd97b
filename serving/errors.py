"""What goes wrong as clients see it: exceptions, and the gRPC status of each with its details (google.rpc)."""

from __future__ import annotations

import re

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from moe_jax.scheduler import QueueFull
from serving.coordinator import Unavailable
from serving.ledger import AlreadyExists

DOMAIN = "moe-jax"
_MAX_DETAILS = 500  # characters: gRPC drops a call whose metadata are above 8 KiB
_FIELD = re.compile(r"([a-z_]+(?:\[\d+\])?): ")  # how our messages begin that are about one


class Invalid(RuntimeError):
    """What the client must change."""


class NotFound(RuntimeError):
    """No request of this id is running or still kept."""


class OutOfRange(RuntimeError):
    """Beyond the tokens that there are."""


class FailedPrecondition(RuntimeError):
    """Not in this state of the cluster."""


CODES: dict[type[Exception], grpc.StatusCode] = {
    Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}


async def abort(context: grpc.aio.ServicerContext, error: Exception, retry_after: float) -> None:
    """End the call with the status of one of CODES. retry_after: seconds, where trying again makes sense."""
    code, text = CODES[type(error)], str(error)[:_MAX_DETAILS]
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=code.name, domain=DOMAIN)]
    if isinstance(error, Invalid) and (field := _FIELD.match(text)):
        violation = error_details_pb2.BadRequest.FieldViolation(field=field[1], description=text)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, (QueueFull, Unavailable)):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(1000 * retry_after))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=text)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort(code, text, (("grpc-status-details-bin", status.SerializeToString()),))
