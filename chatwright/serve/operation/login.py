"""The login page, which asks a person for a key once, when the server has keys.

GET  /login    the form; with a session, the key's name and a button to log out
POST /login    key=...&next=/... -> redirects to `next`, with a session cookie
POST /logout   ends the session
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

import jinja2
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

from chatwright.serve.errors import ApiError
from chatwright.serve.operation.auth import Authenticator, client_of, cookie_name, cookie_of

TEMPLATES = Path(__file__).parents[1] / "studio" / "templates"


def page_maker() -> Callable[..., HTMLResponse]:
    """A function that makes the page: (scope, path to return to, what went wrong, status, name of the key of
    the session, Retry-After)."""
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)

    def page(
        scope: Scope, back: str, problem: str = "", status: int = 401, name: str = "", wait: str = ""
    ) -> HTMLResponse:
        html = pages.get_template("login.html").render(back=back, problem=problem, name=name)
        headers = {"www-authenticate": "Bearer"} if status == 401 else {"retry-after": wait} if wait else {}
        return HTMLResponse(html, status_code=status, headers=headers)

    return page


def routes(authenticator: Authenticator) -> APIRouter:
    """The routes; they are open to everybody."""
    router = APIRouter(include_in_schema=False)
    page = page_maker()

    @router.get("/login")
    async def show(request: Request) -> Response:
        session = authenticator.session(cookie_of(request.scope))
        return page(request.scope, "/", status=200, name=session.key.name if session else "")

    @router.post("/login")
    async def come_in(request: Request) -> Response:
        form = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=8)
        back, presented = safe_way(form.get("next", ["/"])[0]), form.get("key", [""])[0].strip()
        if not presented:
            return page(request.scope, back, "Give a key.")
        try:
            key = authenticator.check(client_of(request.scope), presented)
        except ApiError as error:
            wait = error.headers.get("retry-after", "")
            problem = (
                f"Too many wrong keys. Try again in {wait} s." if wait else "This key is not known here."
            )
            return page(request.scope, back, problem, error.status, wait=wait)
        response = RedirectResponse(back, status_code=303)
        response.set_cookie(
            cookie_name(request.scope),
            authenticator.begin(key),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    @router.post("/logout")
    async def go(request: Request) -> Response:
        authenticator.end(cookie_of(request.scope))
        response = RedirectResponse("/", status_code=303)
        response.delete_cookie(cookie_name(request.scope), httponly=True, samesite="strict")
        return response

    return router


def safe_way(back: str) -> str:
    """The path to return to after the login: a path of this server, else "/". Other sites ("//evil.example",
    "/\\evil.example") are not accepted."""
    inside = back.startswith("/") and not back.startswith("//") and "\\" not in back and back.isprintable()
    return back if inside and back.isascii() else "/"
