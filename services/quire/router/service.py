"""The router behind gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import grpc

from quire.api.errors import ApiError
from quire.proto import router_pb2, router_pb2_grpc
from quire.router import convert

if TYPE_CHECKING:
    from quire.router.router import Router

_STATUS = {
    "invalid_value": grpc.StatusCode.INVALID_ARGUMENT,
    "not_ready": grpc.StatusCode.FAILED_PRECONDITION,
}


class RouterService(router_pb2_grpc.RouterServicer):
    """Answers from one `Router`, on the event loop that keeps its fleet up to date."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def Route(
        self,
        request: router_pb2.RouteRequest,
        context: grpc.aio.ServicerContext[router_pb2.RouteRequest, router_pb2.RouteReply],
    ) -> router_pb2.RouteReply:
        """Where a request goes."""
        try:
            return convert.reply_to(self._router.route(convert.query_from(request)))
        except ApiError as error:
            await context.abort(_STATUS[error.code], error.message)
            raise _unreachable() from error

    async def Observe(
        self,
        request: router_pb2.ObserveRequest,
        context: grpc.aio.ServicerContext[router_pb2.ObserveRequest, router_pb2.ObserveReply],
    ) -> router_pb2.ObserveReply:
        """What a pod really had cached; of no use, and no error, when the decision is forgotten."""
        self._router.observe(request.decision_id, request.cached_tokens)
        return router_pb2.ObserveReply()

    async def Check(
        self,
        request: router_pb2.CheckRequest,
        context: grpc.aio.ServicerContext[router_pb2.CheckRequest, router_pb2.CheckReply],
    ) -> router_pb2.CheckReply:
        """Whether asking is of use."""
        states = self._router.fleet.states(self._router.clock())
        return router_pb2.CheckReply(pods_serving=states["serving"])

    async def Explain(
        self,
        request: router_pb2.ExplainRequest,
        context: grpc.aio.ServicerContext[router_pb2.ExplainRequest, router_pb2.ExplainReply],
    ) -> router_pb2.ExplainReply:
        """Why a request went where it went."""
        if request.WhichOneof("of") == "request_id":
            found = self._router.decisions.of_request(request.request_id)
        else:
            one = self._router.explain(request.decision_id)
            found = [] if one is None else [one]
        if not found:
            await context.abort(grpc.StatusCode.NOT_FOUND, "the decision is not known here")
        return router_pb2.ExplainReply(explanations=[convert.explanation_to(e) for e in found])


def _unreachable() -> NoReturn:
    raise AssertionError("abort returns never")
