"""API keys: the file, the verb, what they open, sessions of the page, and guessing."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from chatwright.cli import main as cli
from chatwright.commands.serve import ServeConfig, check_exposure
from chatwright.config import UserError
from chatwright.serve.errors import ApiError
from chatwright.serve.operation import auth as auth_module
from chatwright.serve.operation.auth import Attempts, Authenticator
from chatwright.serve.operation.keys import Key, KeyRing, digest, line_for, new_key, open_keys, read_keys
from chatwright.serve.operation.login import safe_way
from support.serving import DIALOGUES, Running, TinyModel, run_server

KEY, OTHER = "cw-" + "k" * 43, "cw-" + "o" * 43
BODY = {"model": "tiny/taught", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
HTML = {"accept": "text/html,*/*"}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text(f"# who may come in\n\n{line_for('anna', KEY)}  # the first\n{line_for('ben', OTHER)}\n")
    return path


@pytest.fixture
def locked(tiny: TinyModel, key_file: Path) -> Iterator[Running]:
    with run_server(tiny, api_keys=str(key_file)) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def touch(path: Path, text: str) -> None:
    """Write a file anew, in such a way that its stamp changes."""
    before = path.stat().st_mtime_ns
    path.write_text(text)
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))


# ---- the file and the verb ---------------------------------------------------------------------------------


def test_the_file_holds_hashes_only() -> None:
    text = line_for("anna", KEY)
    assert text == "anna sha256:" + hashlib.sha256(KEY.encode()).hexdigest()
    assert read_keys(f"#x\n\n {text} # y\n", "f") == [Key("anna", digest(KEY))]
    assert read_keys("", "f") == []
    cut = text[:-1]
    for bad, says in (
        (f"anna {KEY}", rf"f, line 1: .*in clear; write instead: {text}$"),
        (KEY, rf"write instead: {line_for('key-1', KEY)}$"),
        (cut, "64 hexadecimal digits"),
        (text + "0", "64 hexadecimal digits"),
        (text + " more", "expected `NAME sha256:HEX`"),
        (text.partition(" ")[2], "expected `NAME sha256:HEX`"),
        ("a/b " + text.partition(" ")[2], "expected `NAME sha256:HEX`"),
        (f"\n{text}\nx sha512:ab", "line 3"),
    ):
        with pytest.raises(UserError, match=says):
            read_keys(bad, "f")


def test_new_keys_are_long_and_different() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("cw-") and len(key) == 46 for key in made)


def test_the_verb_makes_a_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["key", "anna"]) == 0
    out, err = capsys.readouterr()
    key = out.strip()
    assert out == f"{key}\n" and key.startswith("cw-")  # so that KEY=$(chatwright key anna) works
    assert line_for("anna", key) in err.splitlines()
    assert key not in err
    path = tmp_path / "keys.txt"
    path.write_text("# no line end")
    for name in ("anna", "ben"):
        assert cli(["key", name, "--file", str(path)]) == 0
    keys = capsys.readouterr().out.split()
    assert path.read_text() == f"# no line end\n{line_for('anna', keys[0])}\n{line_for('ben', keys[1])}\n"
    assert cli(["key", "anna", "--file", str(tmp_path / "new.txt")]) == 0
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o600
    for arguments, code, says in (
        (["key", "an na"], 2, "letters, digits"),
        (["key"], 2, "name"),
        (["key", "anna", "--file", str(tmp_path)], 1, "--file"),
        (["key", "anna", "--file", str(tmp_path / "no" / "keys")], 1, "No such file"),
    ):
        capsys.readouterr()
        assert cli(arguments) == code
        assert says in capsys.readouterr().err
    other = tmp_path / "notes.txt"
    other.write_text("buy milk\n")
    assert cli(["key", "anna", "--file", str(other)]) == 1
    assert other.read_text() == "buy milk\n"


def test_where_keys_come_from(key_file: Path, tmp_path: Path) -> None:
    assert open_keys(None, {}) is None
    both = open_keys(str(key_file), {"CHATWRIGHT_API_KEYS": "a" * 16 + " , " + "b" * 20})
    assert both is not None
    found = {key: both.find(key) for key in (KEY, "a" * 16, "b" * 20, "c" * 20, "", "a" * 15)}
    assert (
        [key.name if key else None for key in found.values()]
        == [
            "anna",
            f"environment-{hashlib.sha256(b'a' * 16).hexdigest()[:8]}",  # whatever its place in the list
            f"environment-{hashlib.sha256(b'b' * 20).hexdigest()[:8]}",
            None,
            None,
            None,
        ]
    )
    for environment in ({"CHATWRIGHT_API_KEYS": ""}, {"CHATWRIGHT_API_KEYS": " , "}):
        with pytest.raises(UserError, match="empty"):
            open_keys(None, environment)
    with pytest.raises(UserError, match="16 printable"):
        open_keys(None, {"CHATWRIGHT_API_KEYS": "short"})
    for path, says in ((tmp_path / "none.txt", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=says):
            open_keys(str(path), {})
    empty = tmp_path / "empty.txt"
    empty.write_text("# nobody yet\n")
    with pytest.raises(UserError, match="no keys in it"):
        open_keys(str(empty), {})
    if os.name == "posix":
        key_file.chmod(0o666)
        with pytest.raises(UserError, match="chmod o-w"):
            open_keys(str(key_file), {})


def test_the_file_is_read_again_and_a_damaged_one_is_not(
    key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(key_file)
    text = key_file.read_text()
    third = new_key()
    touch(key_file, text + line_for("carl", third))
    assert getattr(ring.find(third), "name", None) == "carl"
    caplog.clear()
    touch(key_file, "nonsense in here\n")
    for _ in range(3):
        assert ring.find(third) is not None  # nobody is locked out by a slip of the editor
    errors = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
    assert len(errors) == 1 and "stay as they were" in errors[0].message and "line 1" in errors[0].message
    key_file.unlink()
    assert ring.find(third) is not None
    key_file.write_text(text)
    ring.refresh(force=True)
    assert ring.find(third) is None  # a key that is taken out is out
    assert ring.find(KEY) is not None
    touch(key_file, "")
    assert ring.find(KEY) is None  # an empty file means nobody


# ---- what keys open ----------------------------------------------------------------------------------------


def test_without_a_key_only_the_state_is_told(locked: Running) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/v1/nothing", "/v1", "/metrics", "/openapi.json"):
        for headers in (
            HTML,
            {},
            bearer("wrong"),
            {"authorization": f"Basic {KEY}"},
            {"authorization": "Bearer"},
        ):
            response = httpx.get(f"{locked.url}{path}", headers=headers)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), (
                path,
                headers,
            )
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["x-content-type-options"] == "nosniff"
        authenticator_of(locked).attempts = Attempts()
    refused = httpx.post(f"{locked.url}/v1/chat/completions", json=BODY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "invalid_request_error")
    assert httpx.get(f"{locked.url}/health").json() == {"status": "ok"}  # not which models, not what load
    assert httpx.get(f"{locked.url}/ready").json() == {"status": "ready"}
    assert httpx.get(f"{locked.url}/static/login.css").status_code == 200
    for path in (
        "/static/../v1/models",
        "/static/%2e%2e/v1/models",
        "//v1/models",
        "/V1/models",
        "/health/../v1/models",
    ):
        response = httpx.get(f"{locked.url}{path}")
        assert response.status_code in (401, 404), path
        assert "tiny/taught" not in response.text


def authenticator_of(server: Running) -> Authenticator:
    found = server.app.state.authenticator
    assert isinstance(found, Authenticator)
    return found


def test_a_key_opens_the_interface(locked: Running) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0)
    answer = client.chat.completions.create(**BODY)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == DIALOGUES["hello"]
    with pytest.raises(openai.AuthenticationError, match="not known"):
        client.with_options(api_key=KEY[:-1]).models.list()
    for path in ("/metrics", "/openapi.json", "/v1/models", "/"):
        assert httpx.get(f"{locked.url}{path}", headers=bearer(OTHER)).status_code == 200
    assert (
        httpx.get(f"{locked.url}/v1/models", headers={"authorization": f"bearer  {OTHER}"}).status_code == 200
    )


def test_without_keys_everything_is_open(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/models", headers=bearer("anything")).status_code == 200
    assert httpx.get(f"{server.url}/login").status_code == 404


def test_keys_of_a_running_server_change(locked: Running, key_file: Path) -> None:
    third = new_key()
    assert httpx.get(f"{locked.url}/v1/models", headers=bearer(third)).status_code == 401
    with httpx.Client(base_url=locked.url) as browser:
        browser.post("/login", data={"key": KEY})
        assert browser.get("/", headers=HTML).status_code == 200
        touch(key_file, line_for("carl", third))
        assert httpx.get(f"{locked.url}/v1/models", headers=bearer(third)).status_code == 200
        assert httpx.get(f"{locked.url}/v1/models", headers=bearer(KEY)).status_code == 401
        assert browser.get("/", headers=HTML).status_code == 401, "a session outlives the key that began it"


# ---- the page ----------------------------------------------------------------------------------------------


def test_a_person_gives_a_key_once(locked: Running) -> None:
    with httpx.Client(base_url=locked.url) as browser:
        asked = browser.get("/", headers=HTML)
        assert (asked.status_code, asked.headers["cache-control"]) == (401, "no-store")
        assert 'name="key" type="password"' in asked.text
        assert "tiny/taught" not in asked.text
        assert "<script" not in asked.text and "<style" not in asked.text and " style=" not in asked.text
        assert (
            browser.get("/chat/jobs/x/events").json()["error"]["code"] == "invalid_api_key"
        )  # a script gets JSON
        wrong = browser.post("/login", data={"key": "nonsense", "next": "/"})
        assert (wrong.status_code, wrong.headers.get("set-cookie")) == (401, None)
        assert "not known" in wrong.text and "nonsense" not in wrong.text
        assert browser.post("/login", data={}).status_code == 401
        inside = browser.post("/login", data={"key": f" {KEY} ", "next": "/openapi.json?x=1"})
        assert (inside.status_code, inside.headers["location"]) == (303, "/openapi.json?x=1")
        cookie = inside.headers["set-cookie"]
        assert (
            "HttpOnly" in cookie
            and "SameSite=strict" in cookie
            and "Secure" not in cookie
            and "Path=/" in cookie
        )
        assert KEY not in cookie
        assert "tiny/taught" in browser.get("/", headers=HTML).text
        assert browser.post("/chat/owner").status_code == 200
        begun = browser.post("/chat/conversations", json={"content": "hello", "model": "tiny/taught"})
        assert begun.status_code == 201
        assert [one["id"] for one in browser.get("/chat/conversations").json()["conversations"]] == [
            begun.json()["id"]
        ]
        assert browser.get("/v1/models").status_code == 401, (
            "a cookie counts for the interface: other sites could use it"
        )
        assert browser.get("/metrics").status_code == 401
        assert "anna" in browser.get("/login").text
        out = browser.post("/logout")
        assert (out.status_code, out.headers["location"]) == (303, "/")
        assert browser.get("/", headers=HTML).status_code == 401
        browser.headers["cookie"] = cookie.partition(";")[0]  # who kept it has nothing
        assert browser.get("/", headers=HTML).status_code == 401


def test_each_key_has_its_own_conversations_in_a_browser(locked: Running) -> None:
    """Who logs in after somebody else does not see what was said before."""
    titles = []
    with httpx.Client(base_url=locked.url) as browser:
        for key in (KEY, OTHER, KEY):
            browser.post("/login", data={"key": key})
            browser.post("/chat/owner")
            titles.append(len(browser.get("/chat/conversations").json()["conversations"]))
            browser.post("/chat/conversations", json={"content": "hello", "model": "tiny/taught"})
            browser.post("/logout")
            assert browser.get("/chat/conversations").status_code == 401
    assert titles == [0, 0, 1]


def test_other_sites_cannot_log_anybody_in_or_out(locked: Running) -> None:
    for path in ("/login", "/logout"):
        for origin in ("https://evil.example", "null", "http://["):
            refused = httpx.post(f"{locked.url}{path}", data={"key": KEY}, headers={"origin": origin})
            assert (refused.status_code, "set-cookie" in refused.headers) == (403, False)
    own = httpx.post(f"{locked.url}/login", data={"key": KEY}, headers={"origin": locked.url})
    assert own.status_code == 303


@pytest.mark.parametrize(("proxies", "secure"), [(["127.0.0.1"], True), ([], False)])
def test_the_cookie_is_secure_behind_https(
    tiny: TinyModel, key_file: Path, proxies: list[str], secure: bool
) -> None:
    """Who says that it is a proxy is not believed without being one."""
    forwarded = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.9"}
    with run_server(tiny, api_keys=str(key_file), proxies=proxies) as server:
        cookie = httpx.post(f"{server.url}/login", data={"key": KEY}, headers=forwarded).headers["set-cookie"]
        assert ("Secure" in cookie) is secure
        authenticator = authenticator_of(server)
        assert [client for client, _ in authenticator.attempts._good] == [
            "203.0.113.9" if proxies else "127.0.0.1"
        ]


def test_the_way_back_stays_here() -> None:
    assert [safe_way(way) for way in ("/", "/c/abc?x=1#y", "/login")] == ["/", "/c/abc?x=1#y", "/login"]
    for evil in (
        "//evil.example",
        "/\\evil.example",
        "https://evil.example",
        "evil",
        "",
        "/\r\nx: y",
        "/\t/evil",
        "/é",
    ):
        assert safe_way(evil) == "/"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_sessions_end_when_nobody_uses_them(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    authenticator = Authenticator(KeyRing(key_file), clock)
    key = authenticator.check("c", KEY)
    first, second = authenticator.begin(key), authenticator.begin(key)
    assert first != second and first.encode() not in b"".join(authenticator._sessions)
    for _ in range(3):
        clock.now += 11 * 3600
        assert authenticator.session(first) is not None  # each use counts anew
    assert authenticator.session(second) is None
    assert authenticator.session("") is None and authenticator.session("x") is None
    clock.now += 12 * 3600 + 1
    assert authenticator.session(first) is None
    assert not authenticator._sessions
    monkeypatch.setattr(auth_module, "MOST_SESSIONS", 3)
    cookies = [authenticator.begin(key) for _ in range(5)]
    assert [authenticator.session(cookie) is not None for cookie in cookies] == [
        False,
        False,
        True,
        True,
        True,
    ]


# ---- guessing ----------------------------------------------------------------------------------------------


def attempt(authenticator: Authenticator, client: str, key: str) -> Any:
    try:
        return authenticator.check(client, key).name
    except ApiError as error:
        return error.status, error.headers.get("retry-after")


def test_guessing_gets_slower_and_slower(key_file: Path) -> None:
    clock = Clock()
    authenticator = Authenticator(KeyRing(key_file), clock)
    assert attempt(authenticator, "1.1.1.1", KEY) == "anna"
    assert [attempt(authenticator, "1.1.1.1", f"guess{at}") for at in range(7)] == [(401, None)] * 5 + [
        (429, "1")
    ] * 2
    assert attempt(authenticator, "1.1.1.1", OTHER) == (429, "1"), (
        "a right guess is told while the address has to wait"
    )
    assert attempt(authenticator, "1.1.1.1", KEY) == "anna"  # a key in use from there goes on
    assert attempt(authenticator, "1.1.1.2", "guess") == (401, None)  # others are not concerned
    waits = []
    for _ in range(9):
        clock.now += authenticator.attempts.wait("1.1.1.1")
        assert attempt(authenticator, "1.1.1.1", "guess") == (401, None)
        waits.append(int(attempt(authenticator, "1.1.1.1", "guess")[1]))
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60, 60]
    clock.now += 60
    assert attempt(authenticator, "1.1.1.1", OTHER) == "ben"
    clock.now += 901
    assert [attempt(authenticator, "1.1.1.1", "guess") for _ in range(5)] == [(401, None)] * 5  # forgotten


def test_a_house_counts_as_one_address(key_file: Path) -> None:
    authenticator = Authenticator(KeyRing(key_file), Clock())
    for at in range(5):
        attempt(authenticator, f"2001:db8:1:1::{at:x}", "guess")
    assert attempt(authenticator, "2001:db8:1:1:ffff::1", "guess")[0] == 429
    assert attempt(authenticator, "2001:db8:1:2::1", "guess")[0] == 401
    for _ in range(5):
        attempt(authenticator, "::ffff:1.2.3.4", "guess")
    assert attempt(authenticator, "1.2.3.4", "guess")[0] == 429
    assert attempt(authenticator, "::ffff:1.2.3.5", "guess")[0] == 401


def test_addresses_do_not_pile_up(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attempts, "MOST", 10)
    authenticator = Authenticator(KeyRing(key_file), Clock())
    for at in range(100):
        attempt(authenticator, f"10.0.0.{at}", "guess")
        attempt(authenticator, f"10.0.0.{at}", KEY)
    assert len(authenticator.attempts._failed) == len(authenticator.attempts._good) == 10


def test_guessing_over_http(locked: Running) -> None:
    """The form and the header count together; the proxy headers of somebody who is no proxy change
    nothing."""
    statuses = []
    authenticator_of(locked).attempts = Attempts(Clock())  # time stands still
    for at in range(4):
        headers = {**bearer("guess"), "x-forwarded-for": f"203.0.113.{at}"}
        statuses.append(httpx.get(f"{locked.url}/v1/models", headers=headers).status_code)
        statuses.append(httpx.post(f"{locked.url}/login", data={"key": "guess"}).status_code)
    assert statuses == [401] * 5 + [429] * 3
    last = httpx.get(f"{locked.url}/v1/models", headers=bearer("guess"))
    assert (last.json()["error"]["code"], last.headers["retry-after"]) == ("too_many_attempts", "1")
    page = httpx.post(f"{locked.url}/login", data={"key": "guess"})
    assert "again in 1 s" in page.text and page.headers["retry-after"] == "1"


# ---- who may listen where ----------------------------------------------------------------------------------


def test_others_are_not_let_in_by_accident(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATWRIGHT_API_KEYS", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(
            UserError, match=r"everybody who reaches this machine.*chatwright key.*--insecure"
        ):
            check_exposure(ServeConfig(host=host))
        check_exposure(ServeConfig(host=host, insecure=True))
        check_exposure(ServeConfig(host=host, api_keys=str(key_file)))
    check_exposure(ServeConfig())
    check_exposure(ServeConfig(host="localhost"))
    monkeypatch.setenv("CHATWRIGHT_API_KEYS", "a" * 20)
    check_exposure(ServeConfig(host="0.0.0.0"))
