"""The pages for people and what they load: all public, the same for everybody.

Who is signed in is asked by the page's own script, so a link from elsewhere works too: the browser
sends no cookie of the session (SameSite=Strict) with that first request.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.pages import (
    ASSETS,
    HOME,
    SIGN_IN,
    accepts_html,
    asset,
    page_headers,
    sign_in_page,
)
from ollama_distributed.gateway.people_port import People
from ollama_distributed.gateway.routes.table import ColdRoute, Run

TAG = "Pages"


def page_routes(people: People | None) -> list[ColdRoute]:
    """`people`: None: nobody can sign in here."""
    template = asset("sign-in.html")

    async def root(cold: ColdRequest, _request: Request) -> Response:
        if accepts_html(cold.head):
            return RedirectResponse(HOME, 303, {"vary": "accept", "cache-control": "no-cache"})
        return PlainTextResponse("Ollama is running", headers={"vary": "accept"})

    async def sign_in(_cold: ColdRequest, _request: Request) -> Response:
        provider = await people.oidc_name() if people is not None else ""
        return Response(sign_in_page(template, provider), headers=page_headers(), media_type="text/html")

    def public(
        path: str,
        run: Run,
        summary: str,
        *,
        method: str = "GET",
        hidden: bool = False,
        media: str = "text/html",
        other: tuple[int, ...] = (),
    ) -> ColdRoute:
        return ColdRoute(
            method=method,
            path=path,
            verb=None,
            run=run,
            tag=TAG,
            summary=summary,
            hidden=hidden,
            media=media,
            other=other,
        )

    return [
        public(
            "/",
            root,
            "'Ollama is running'; a browser is led to the start page",
            media="text/plain",
            other=(303,),
        ),
        public("/", root, "", method="HEAD", hidden=True),
        public(HOME, _fixed("account.html", "text/html"), "Start page: who one is, and where the API is"),
        public(SIGN_IN, sign_in, "Sign-in page"),
        *(public(HOME + name, _fixed(name, kind), "", hidden=True) for name, kind in ASSETS.items()),
    ]


def _fixed(name: str, media_type: str) -> Run:
    text = asset(name)

    async def run(_cold: ColdRequest, _request: Request) -> Response:
        return Response(text, headers=page_headers(), media_type=media_type)

    return run
