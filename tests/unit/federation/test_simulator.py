"""Clients of the simulator that start at the same moment get ports of their own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from nvflare.private.fed.app.simulator import simulator_runner

from fedgestalt.federation.operations import simulator


def test_a_port_that_is_free_again_is_given_away_once(monkeypatch: pytest.MonkeyPatch) -> None:
    free: Iterator[int] = iter([50001, 50001, 50001, 50002, 50002, 50001, 50003])
    monkeypatch.setattr(simulator, "_given", set())
    monkeypatch.setattr(simulator, "get_open_ports", lambda number: [next(free)] * number)
    with ThreadPoolExecutor(3) as clients:
        ports = list(clients.map(lambda _: simulator.ports_once(1), range(3)))
    assert sorted(ports) == [[50001], [50002], [50003]]


def test_several_ports_differ() -> None:
    ports = simulator.ports_once(20)
    assert len(set(ports)) == 20
    assert not set(ports) & set(simulator.ports_once(20))


def test_the_simulator_asks_there() -> None:
    """Fails if FLARE comes by its ports in another way."""
    assert simulator_runner.get_open_ports is simulator.ports_once
    assert "get_open_ports" in simulator_runner.SimulatorClientRunner.do_one_task.__code__.co_names
