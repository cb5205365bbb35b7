"""A request of more choices than the service has places for can never be served, and is told so."""

from __future__ import annotations

import pytest

from duoserve.interface import ServiceSettings
from duoserve.moe_model import MoEModel
from duoserve.service.async_engine import AsyncEngine
from tests.helpers.checkpoints import save_mixtral
from tests.server.conftest import serving, wait_ready


@pytest.mark.parametrize(
    ("fields", "param", "choices"),
    [({"n": 6}, "n", 6), ({"prompt": ["a"] * 7}, "prompt", 7), ({"prompt": ["a"] * 3, "n": 2}, "n", 6)],
)
def test_too_many_choices_are_a_400_that_names_both_numbers(served, fields, param, choices):
    server = served()
    server.service.capacity = 5
    answer = server.complete(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert f"{choices} choices" in error["message"] and " 5 requests" in error["message"]
    assert server.service.streams == []


def test_so_many_as_there_are_places_for_are_served(served):
    server = served()
    server.service.capacity = 5
    assert server.complete(n=5).status_code == 200
    assert [server.chat(n=n).status_code for n in (5, 6)] == [200, 400]


def test_an_engine_has_places_for_those_that_run_and_those_that_wait(tmp_path):
    folder = save_mixtral(tmp_path)
    small = ServiceSettings(max_batch=2, max_waiting=1)
    with serving(lambda: AsyncEngine(MoEModel.from_pretrained(folder, max_context=64), settings=small)) as server:
        wait_ready(server)
        found = [server.complete(prompt=[5], n=n, max_tokens=2) for n in (3, 4)]
    assert [answer.status_code for answer in found] == [200, 400]
    assert "4 choices are more than the 3 requests" in found[1].json()["error"]["message"]
