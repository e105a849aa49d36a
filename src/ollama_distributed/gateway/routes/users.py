"""Users under `/api/v1/users`. Administrators only; one's own is under `/api/v1/auth`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.users import (
    NewUserAsk,
    PasswordAsk,
    SessionsAnswer,
    UserAsk,
    UserRow,
    UsersAnswer,
)
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.gate import sent_credential
from ollama_distributed.gateway.people_port import People
from ollama_distributed.gateway.routes.table import ColdRoute, json_response

TAG = "Users"

_NEW = msgspec.json.Decoder(NewUserAsk)
_CHANGE = msgspec.json.Decoder(UserAsk)
_PASSWORD = msgspec.json.Decoder(PasswordAsk)


def users_routes(people: People) -> list[ColdRoute]:
    handlers = _Handlers(people)
    return [
        ColdRoute(
            method="GET",
            path="/api/v1/users",
            verb="read",
            run=handlers.users,
            tag=TAG,
            summary="All users",
            answer=UsersAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/users",
            verb="admin",
            run=handlers.create,
            tag=TAG,
            summary="A new user with a password",
            body=NewUserAsk,
            answer=UserRow,
            status=201,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/users/{name}",
            verb="read",
            run=handlers.user,
            tag=TAG,
            summary="One user",
            answer=UserRow,
        ),
        ColdRoute(
            method="PATCH",
            path="/api/v1/users/{name}",
            verb="admin",
            run=handlers.change,
            tag=TAG,
            summary="Change role or team, lock or unlock; what is not given stays",
            body=UserAsk,
            answer=UserRow,
        ),
        ColdRoute(
            method="DELETE",
            path="/api/v1/users/{name}",
            verb="admin",
            run=handlers.delete,
            tag=TAG,
            summary="Delete a user; sessions and tokens end",
            status=204,
        ),
        ColdRoute(
            method="PUT",
            path="/api/v1/users/{name}/password",
            verb="admin",
            run=handlers.password,
            tag=TAG,
            summary="Set a user's password; sessions and tokens end",
            body=PasswordAsk,
            answer=UserRow,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/users/{name}/sessions",
            verb="read",
            run=handlers.sessions,
            tag=TAG,
            summary="Where a user is signed in",
            answer=SessionsAnswer,
        ),
        ColdRoute(
            method="DELETE",
            path="/api/v1/users/{name}/sessions",
            verb="admin",
            run=handlers.end_sessions,
            tag=TAG,
            summary="Sign a user out everywhere; tokens end too",
            status=204,
        ),
    ]


class _Handlers:
    def __init__(self, people: People) -> None:
        self._people = people

    async def users(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(UsersAnswer(tuple(self._people.users())))

    async def user(self, _cold: ColdRequest, request: Request) -> Response:
        return json_response(self._people.user(request.path_params["name"]))

    async def create(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _NEW)
        return json_response(await self._people.create(sent_credential(cold.head), ask), 201)

    async def change(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _CHANGE)
        name = request.path_params["name"]
        return json_response(await self._people.change(sent_credential(cold.head), name, ask))

    async def delete(self, cold: ColdRequest, request: Request) -> Response:
        await self._people.delete(sent_credential(cold.head), request.path_params["name"])
        return Response(status_code=204)

    async def password(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _PASSWORD)
        name = request.path_params["name"]
        return json_response(await self._people.set_password(sent_credential(cold.head), name, ask))

    async def sessions(self, _cold: ColdRequest, request: Request) -> Response:
        user = self._people.user(request.path_params["name"])
        return json_response(SessionsAnswer(tuple(self._people.sessions(user.name))))

    async def end_sessions(self, cold: ColdRequest, request: Request) -> Response:
        await self._people.end_sessions(sent_credential(cold.head), request.path_params["name"])
        return Response(status_code=204)
