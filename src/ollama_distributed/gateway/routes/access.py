"""Keys, policies and who one is: `/api/v1/keys`, `/api/v1/policies`, `/api/v1/auth/whoami`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.access.desk import AccessDesk
from ollama_distributed.access.roles import Right, Verb
from ollama_distributed.base.access import (
    ExplainAsk,
    Explanation,
    KeyAsk,
    KeyRow,
    KeysAnswer,
    NewKey,
    PoliciesAnswer,
    PolicyAsk,
    RotateAsk,
    WhoAmI,
)
from ollama_distributed.base.errors import Invalid, MissingBody
from ollama_distributed.base.policies import Policy
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.rights import resource_of
from ollama_distributed.gateway.routes.table import ColdRoute, actor, json_response

TAG = "Access"

_KEY = msgspec.json.Decoder(KeyAsk)
_ROTATE = msgspec.json.Decoder(RotateAsk)
_POLICY = msgspec.json.Decoder(PolicyAsk)
_EXPLAIN = msgspec.json.Decoder(ExplainAsk)


def access_routes(desk: AccessDesk) -> list[ColdRoute]:
    handlers = _Handlers(desk)

    def route(
        method: str,
        path: str,
        verb: Verb,
        summary: str,
        *,
        body: type | None = None,
        body_optional: bool = False,
        answer: type | None = None,
        status: int = 200,
        name: str,
    ) -> ColdRoute:
        return ColdRoute(
            method=method,
            path=path,
            verb=verb,
            run=getattr(handlers, name),
            tag=TAG,
            summary=summary,
            body=body,
            body_optional=body_optional,
            answer=answer,
            status=status,
        )

    return [
        route("GET", "/api/v1/keys", "read", "All keys, without secrets", answer=KeysAnswer, name="keys"),
        route(
            "POST",
            "/api/v1/keys",
            "admin",
            "A new key; only this answer shows it",
            body=KeyAsk,
            answer=NewKey,
            status=201,
            name="create_key",
        ),
        route("GET", "/api/v1/keys/{id}", "read", "One key, without its secret", answer=KeyRow, name="key"),
        route(
            "POST",
            "/api/v1/keys/{id}/rotate",
            "admin",
            "A new secret of the key; the old one stays good for a while",
            body=RotateAsk,
            body_optional=True,
            answer=NewKey,
            name="rotate_key",
        ),
        route(
            "DELETE",
            "/api/v1/keys/{id}",
            "admin",
            "Revoke a key on every node",
            answer=KeyRow,
            name="revoke_key",
        ),
        route("GET", "/api/v1/policies", "read", "All policies", answer=PoliciesAnswer, name="policies"),
        route(
            "POST",
            "/api/v1/policies",
            "admin",
            "A new policy",
            body=PolicyAsk,
            answer=Policy,
            status=201,
            name="create_policy",
        ),
        route(
            "POST",
            "/api/v1/policies/explain",
            "read",
            "What a key, or a role and team, may do, and by which policy",
            body=ExplainAsk,
            answer=Explanation,
            name="explain",
        ),
        route("GET", "/api/v1/policies/{name}", "read", "One policy", answer=Policy, name="policy"),
        route(
            "PUT",
            "/api/v1/policies/{name}",
            "admin",
            "Change a policy: what is not given has no limit",
            body=PolicyAsk,
            answer=Policy,
            name="set_policy",
        ),
        route(
            "DELETE",
            "/api/v1/policies/{name}",
            "admin",
            "Delete a policy that no key names",
            status=204,
            name="delete_policy",
        ),
        route(
            "GET",
            "/api/v1/auth/whoami",
            "read",
            "Who asks, and what may that do",
            answer=WhoAmI,
            name="whoami",
        ),
    ]


class _Handlers:
    def __init__(self, desk: AccessDesk) -> None:
        self._desk = desk

    async def keys(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(KeysAnswer(tuple(self._desk.keys())))

    async def key(self, _cold: ColdRequest, request: Request) -> Response:
        return json_response(self._desk.key(request.path_params["id"]))

    async def create_key(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _KEY)
        return _secret(await self._desk.create_key(ask, actor=actor(cold)), 201)

    async def rotate_key(self, cold: ColdRequest, request: Request) -> Response:
        try:
            ask = await cold.body(request, _ROTATE)
        except MissingBody:
            ask = RotateAsk()
        return _secret(await self._desk.rotate_key(request.path_params["id"], ask, actor=actor(cold)), 200)

    async def revoke_key(self, cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._desk.revoke_key(request.path_params["id"], actor=actor(cold)))

    async def policies(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(PoliciesAnswer(tuple(self._desk.policies())))

    async def policy(self, _cold: ColdRequest, request: Request) -> Response:
        return json_response(self._desk.policy(request.path_params["name"]))

    async def create_policy(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _POLICY)
        return json_response(await self._desk.set_policy(ask, new=True, actor=actor(cold)), 201)

    async def set_policy(self, cold: ColdRequest, request: Request) -> Response:
        ask, name = await cold.body(request, _POLICY), request.path_params["name"]
        if ask.name not in ("", name):
            raise Invalid("a policy cannot be renamed", param="name")
        named = msgspec.structs.replace(ask, name=name)
        return json_response(await self._desk.set_policy(named, new=False, actor=actor(cold)))

    async def delete_policy(self, cold: ColdRequest, request: Request) -> Response:
        await self._desk.delete_policy(request.path_params["name"], actor=actor(cold))
        return Response(status_code=204)

    async def explain(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _EXPLAIN)
        right = None
        if ask.path:
            try:
                resource = resource_of(ask.method.upper(), ask.path)
            except LookupError as unknown:
                raise Invalid(f"there is no route {ask.method} {ask.path}", param="path") from unknown
            verb: Verb = "read" if ask.method.upper() in ("GET", "HEAD") else "admin"
            right = Right("inference" if resource == "inference" else verb, resource)
        return json_response(self._desk.explain(ask, right))

    async def whoami(self, cold: ColdRequest, _request: Request) -> Response:
        assert cold.identity is not None, "the route asks for a verb"
        return json_response(self._desk.whoami(cold.identity))


def _secret(made: NewKey, status: int) -> Response:
    response = json_response(made, status)
    response.headers["cache-control"] = "no-store"  # RFC 9111 5.2.2.5: it holds a secret
    return response
