"""Who is let in: every route behind the key, hosts, origins, and what is said about keys."""

import base64
import os
import socket

import pytest
from starlette.routing import Mount

from mla_jax.sampler import SamplingParams
from mla_jax.serve.http import access, server
from mla_jax.serve.http.access import OPEN_PATHS
from mla_jax.serve.http.application import routes
from mla_jax.serve.http.service import salt_of
from mla_jax.serve.stats import SlotInfo

KEY, OTHER = "correct horse battery", "staple"
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}


def bearer(key):
    return {"authorization": b"Bearer " + (key if isinstance(key, bytes) else key.encode())}


def basic(key):
    return {"authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}


def walk(service):
    """Yields (method, path) of every route."""
    for route in routes(service):
        if isinstance(route, Mount):
            yield "GET", f"{route.path}/app.js"
        else:
            for method in route.methods:
                yield method, route.path.replace("{slot}", "0")


WRONG = {
    "none": {},
    "wrong": bearer("wrong"),
    "empty": bearer(""),
    "other case": bearer(KEY.upper()),
    "prefix": bearer(KEY[:-1]),
    "longer": bearer(KEY + "x"),
    "no ASCII": bearer("schlüssel"),
    "no UTF-8": bearer(b"\xff\xfe"),
    "as token": {"authorization": f"Token {KEY}"},
    "bare": {"authorization": KEY},
    "basic wrong": basic("wrong"),
    "basic broken": {"authorization": "Basic !!!"},
    "other header": {"x-api-key": KEY[1:]},
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_every_route_is_shut_without_the_key(serve, headers, tmp_path):
    client, engine, service = serve(api_keys=(KEY, "another"), slot_folder=tmp_path)
    visited = list(walk(service))
    assert len(visited) >= 20
    for method, path in [*visited, ("GET", "/nowhere"), ("GET", "/static/../x"), ("GET", "/health/x")]:
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == (200 if path in OPEN_PATHS else 401), (method, path)
        if path not in OPEN_PATHS:
            if method != "HEAD":
                assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"].startswith(("Bearer", "Basic"))
            assert answer.headers["connection"] == "close"
    assert not engine.submitted


@pytest.mark.parametrize(
    "headers",
    [bearer(KEY), bearer("schlüssel"), {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}, basic(KEY)],
    ids=["bearer", "no ASCII", "lower case", "header", "basic"],
)
def test_a_key_opens(serve, headers):
    client, _engine, _ = serve(api_keys=("another", KEY, "schlüssel"))
    assert client.post(CHAT, json=BODY, headers=headers).status_code == 200
    assert client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "scheme"),
    [
        ("/", "Basic"),
        ("/index.html", "Basic"),
        ("/static/app.js", "Basic"),
        ("/static/style.css", "Basic"),
        ("/static", "Bearer"),
        ("/v1/models", "Bearer"),
        ("/nowhere", "Bearer"),
    ],
)
def test_a_browser_is_asked_for_the_key_of_the_page(serve, path, scheme):
    client, _, _ = serve(api_keys=(KEY,))
    assert client.get(path).headers["www-authenticate"].split()[0] == scheme
    if scheme == "Basic":
        assert client.get(path, headers=basic(KEY)).status_code == 200


def test_keys_share_no_cached_rows(serve):
    client, engine, _ = serve(api_keys=(KEY, "another"))
    for key in (KEY, "another", KEY):
        client.post(CHAT, json=BODY, headers=bearer(key))
    salts = [ticket.request.salt for ticket in engine.submitted]
    assert salts[0] == salts[2] == salt_of(KEY.encode()) != salts[1]
    assert KEY not in "".join(salts)


def test_without_keys_everyone_has_the_same_rows(serve):
    client, engine, _ = serve()
    client.post(CHAT, json=BODY, headers=bearer("whatever"))
    assert engine.submitted[0].request.salt == ""


HOSTS = ("localhost", "127.0.0.1", "[::1]")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("LOCALHOST", 200),
        ("[::1]:8080", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:x", 403),
        ("", 403),
    ],
)
def test_a_name_that_points_here_is_not_enough(serve, host, status):
    client, engine, _ = serve(hosts=HOSTS)
    for path in ("/health", "/v1/models", "/"):
        assert client.get(path, headers={"host": host}).status_code == status
    assert client.post(CHAT, json=BODY, headers={"host": host}).status_code == status
    assert len(engine.submitted) == (status == 200)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.0.2.7:8080", 200),
        ("10.0.0.1", 200),
        ("[2001:db8::1]:8080", 200),
        ("localhost:1", 200),
        ("box", 200),
        ("evil.example", 403),
        ("10.0.0.1.evil.example", 403),
        ("2130706433", 403),
        ("2001:db8::1", 403),
        ("[evil]", 403),
        ("any address", 403),
        ("[10.0.0.1]", 403),
        ("", 403),
    ],
)
def test_addresses_point_at_nothing_else(serve, host, status):
    client, _, _ = serve(hosts=(access.ADDRESSES, "localhost", "box"))
    assert client.get("/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost.evil.example",
        "http://127.0.0.1:9",
        "",
        "https://ok.example.x",
    ],
)
def test_pages_elsewhere_are_turned_away(serve, origin):
    client, engine, _ = serve(origins=("https://ok.example",))
    for ask in (
        client.post(CHAT, json=BODY, headers={"origin": origin}),
        client.get("/", headers={"origin": origin}),
    ):
        assert ask.status_code == 403 and "access-control-allow-origin" not in ask.headers
    asked = client.options(CHAT, headers={"origin": origin, "access-control-request-method": "POST"})
    assert asked.status_code == 403 and "access-control-allow-origin" not in asked.headers
    assert not engine.submitted


def test_the_own_page_and_those_that_are_named_may_connect(serve):
    client, _, _ = serve(origins=("https://ok.example",), api_keys=(KEY,))
    own = client.post(CHAT, json=BODY, headers=bearer(KEY) | {"origin": "http://127.0.0.1:8080"})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
    asked = client.options(
        CHAT, headers={"origin": "https://ok.example", "access-control-request-method": "POST"}
    )
    assert asked.status_code == 204 and "authorization" in asked.headers["access-control-allow-headers"]
    wanted = "authorization,content-type,x-stainless-lang,openai-organization"
    headers = {"origin": "https://ok.example", "access-control-request-headers": wanted}
    asked = client.options(CHAT, headers=headers | {"access-control-request-method": "POST"})
    assert asked.headers["access-control-allow-headers"] == wanted
    assert "access-control-request-headers" in asked.headers["vary"]
    named = client.post(CHAT, json=BODY, headers=bearer(KEY) | {"origin": "https://ok.example"})
    assert named.headers["access-control-allow-origin"] == "https://ok.example"
    assert named.headers["vary"] == "origin"
    assert named.headers["access-control-expose-headers"] == "retry-after"
    assert client.post(CHAT, json=BODY, headers={"origin": "https://ok.example"}).status_code == 401


def test_answers_carry_what_browsers_are_to_heed(serve):
    client, _, _ = serve()
    for path in ("/", "/health", "/nowhere", "/v1/models"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    "path", ["/static/../access.py", "/static/%2e%2e/access.py", "/static/", "/static/x"]
)
def test_nothing_but_the_page_is_served(serve, path):
    client, _, _ = serve()
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("setting", "path"), [("has_page", "/"), ("has_slots", "/slots"), ("has_metrics", "/metrics")]
)
def test_routes_can_be_left_out(serve, setting, path):
    client, _, _ = serve(**{setting: False})
    assert client.get(path).status_code == 404


SLOT = "/slots/1"


def test_slots_are_saved_by_name(serve, tmp_path):
    client, engine, _ = serve(slot_folder=tmp_path, api_keys=(KEY, OTHER))
    act = lambda action, name="a.bin", key=KEY: client.post(
        f"{SLOT}?action={action}", json={"filename": name}, headers=bearer(key)
    )
    saved = act("save").json()
    assert (saved["id_slot"], saved["filename"], saved["n_saved"], saved["n_written"]) == (1, "a.bin", 3, 5)
    salt = salt_of(KEY.encode())
    assert engine.saved == {f"{salt[:16]}-a.bin": salt} and saved["timings"]["save_ms"] >= 0
    restored = act("restore").json()
    assert (restored["n_restored"], restored["n_read"]) == (3, 5)
    assert act("erase").json() == {"id_slot": 1, "n_erased": 3}
    assert act("save").status_code == 200  # over what is there
    stranger = act("restore", key=OTHER)
    assert (stranger.status_code, stranger.json()["error"]["message"]) == (
        404,
        "there is no saved slot a.bin.",
    )
    act("erase", key=OTHER)
    assert engine.erased == [(1, salt), (1, salt_of(OTHER.encode()))]


def test_how_a_slot_draws_is_told_to_its_key_alone(serve):
    client, engine, _ = serve(api_keys=(KEY, OTHER))
    info = SlotInfo(id=0, salt=salt_of(KEY.encode()), is_busy=True, sampling=SamplingParams(seed=77))
    engine.slots = lambda: [info]
    told = {key: client.get("/slots", headers=bearer(key)).json()[0]["params"] for key in (KEY, OTHER)}
    assert told[KEY]["seed"] == 77 and told[OTHER] == {}


NAMES = [
    "..",
    ".",
    "...",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a" * 65,
    "",
    "é",
    "a b",
    5,
    None,
    ["a"],
    "a\n",
]


@pytest.mark.parametrize("action", ["save", "restore"])
@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_of_slots_are_names(serve, tmp_path, action, name):
    client, engine, _ = serve(slot_folder=tmp_path)
    answer = client.post(f"{SLOT}?action={action}", json={"filename": name})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "filename"
    assert not engine.saved and not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["save", "restore"])
@pytest.mark.parametrize("kind", ["link", "dead link", "folder", "linked folder", "FIFO"])
def test_slots_are_plain_files(serve, tmp_path, action, kind):
    folder, target = tmp_path / "slots", tmp_path / "target"
    folder.mkdir()
    target.write_bytes(b"saved")
    match kind:
        case "link":
            (folder / "x").symlink_to(target)
        case "dead link":
            (folder / "x").symlink_to(tmp_path / "nothing")
        case "folder":
            (folder / "x").mkdir()
        case "linked folder":
            (folder / "x").symlink_to(tmp_path)
        case "FIFO":
            os.mkfifo(folder / "x")
    client, engine, _ = serve(slot_folder=folder)
    answer = client.post(f"{SLOT}?action={action}", json={"filename": "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "filename")
    assert str(tmp_path) not in answer.text and not engine.saved and target.read_bytes() == b"saved"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/slots/1?action=save", 400),
        ("/slots/1?action=fly", 400),
        ("/slots/1", 400),
        ("/slots/4?action=erase", 404),
        ("/slots/99999999999999999999?action=erase", 404),
        ("/slots/-1?action=erase", 404),
        ("/slots/x?action=erase", 404),
        ("/slots/%D9%A0?action=erase", 404),
        (f"/slots/{'9' * 5000}?action=erase", 404),
    ],
    ids=lambda value: str(value)[:30],
)
def test_slots_that_there_are_not(serve, tmp_path, path, status):
    client, _, _ = serve(slot_folder=tmp_path)
    assert client.post(path, json={}).status_code == status


def test_slots_are_kept_nowhere_unless_told(serve):
    client, _, _ = serve()
    answer = client.post("/slots/0?action=save", json={"filename": "a"})
    assert answer.status_code == 501 and "--slot-save-path" in answer.json()["error"]["message"]


def test_a_saved_slot_that_is_none(serve, tmp_path):
    client, _, _ = serve(slot_folder=tmp_path)
    (tmp_path / "bad").write_bytes(b"something else")
    answer = client.post("/slots/0?action=restore", json={"filename": "bad"})
    assert answer.json()["error"]["message"] == "bad must be a saved cache." and answer.status_code == 400
    assert client.post("/slots/0?action=restore", json={"filename": "no"}).status_code == 404


def test_a_saved_slot_for_which_there_is_no_room_now(serve, tmp_path):
    client, engine, _ = serve(slot_folder=tmp_path)
    (tmp_path / "a").write_bytes(b"saved")
    engine.is_full = True
    answer = client.post("/slots/0?action=restore", json={"filename": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "pool_full")
    assert answer.headers["retry-after"] == "1"


def test_a_port_in_use_is_known_at_once():
    with server.bind("127.0.0.1", 0) as bound:
        assert server.url(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
        bound.listen()
        with pytest.raises(OSError):
            server.bind("127.0.0.1", bound.getsockname()[1])
    assert isinstance(bound, socket.socket)
