"""Who gets in: by the key, and by the host that was asked for."""

from __future__ import annotations

import pytest

from duoserve.cli import main


def test_the_key_opens_everything_and_health_needs_none(served):
    server = served(api_key="s3cret-ü")
    paths = ["/v1/models", "/metrics", "/version", "/status", "/", "/nowhere"]
    assert server.http.get("/health").status_code == 200
    for path in paths:
        assert server.http.get(path).status_code == 401
        assert server.http.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == 401
        assert server.http.get(path, headers={"Authorization": "s3cret-ü".encode()}).status_code == 401
        opened = server.http.get(path, headers={"Authorization": "Bearer s3cret-ü".encode()})
        assert opened.status_code == (404 if path == "/nowhere" else 200)
    refused = server.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert server.service.asked == []


@pytest.mark.parametrize("key", ["voil\u00e0", "\u00c5", "\u0120x\u00e0"])
def test_a_key_may_end_with_what_is_white_space_in_latin_1(served, key):
    server = served(api_key=key)
    assert server.http.get("/status", headers={"Authorization": f"Bearer  {key}".encode()}).status_code == 200
    assert server.http.get("/status", auth=("anyone", key)).status_code == 200
    assert server.http.get("/status", headers={"Authorization": f"Bearer {key}".encode()[:-1]}).status_code == 401


def test_only_allowed_hosts_are_served_and_health_is_for_all(served):
    """A web page may have its own name lead to this machine, and would read what this answers as its own."""
    server = served(allowed_hosts=("localhost", "[::1]", "Moe.example"), api_key="s3cret")
    key = {"Authorization": "Bearer s3cret"}
    for host in ("localhost", "LOCALHOST:8000", "[::1]:8000", "[::1]", "moe.example"):
        assert server.http.get("/v1/models", headers=key | {"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1", "localhost.evil.example:80", "[::1", "", "[", "x[::1]"):
        refused = server.http.get("/v1/models", headers=key | {"Host": host})
        assert (refused.status_code, refused.json()["error"]["code"]) == (421, "wrong_host")
        assert server.http.get("/health", headers={"Host": host}).status_code == 200


def test_a_browser_may_send_the_key_as_a_password(served):
    server = served(api_key="s3cret")
    assert server.http.get("/").headers["www-authenticate"].startswith("Basic")
    assert server.http.get("/", auth=("anyone", "s3cret")).status_code == 200
    assert server.http.get("/", auth=("s3cret", "wrong")).status_code == 401
    assert server.http.get("/", headers={"Authorization": "Basic ???"}).status_code == 401


def test_the_command_takes_hosts_between_commas(monkeypatch):
    told = []
    monkeypatch.setattr("duoserve.server.run.serve", lambda settings, *_: told.append(settings))
    assert main(["serve", "--allowed-hosts", "localhost, [::1],"]) == 0 == main(["serve"])
    assert [settings.allowed_hosts for settings in told] == [("localhost", "[::1]"), ()]
