"""The service behind the endpoints, from before its model is loaded until it is gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from duoserve.interface import ServiceState
from duoserve.out_of_memory import explained_refusals
from duoserve.server.backend import Service
from duoserve.server.errors import unavailable

LOADING = "loading"


class ServiceLoader:
    """Loads a service in a thread of its own, so that the server can answer meanwhile that it is not ready."""

    def __init__(self, load: Callable[[], Service]) -> None:
        self._load = load
        self._service: Service | None = None
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    @property
    def state(self) -> str:
        """``LOADING``, or a :class:`ServiceState`; "dead" if the model could not be loaded."""
        if self.failure is not None:
            return ServiceState.DEAD.value
        return LOADING if self._service is None else self._service.state.value

    @property
    def known(self) -> Service | None:
        """The service in any state, None before there is one."""
        return self._service

    def service(self) -> Service:
        """The service if it is ready; else raises a 503 that says why it is not."""
        if self._service is None or self.state != ServiceState.READY:
            raise unavailable(f"the model is {self.state}" if self.state == LOADING else f"the service is {self.state}")
        return self._service

    @property
    def still_loads(self) -> bool:
        """Whether the thread that loads runs, which nothing can stop."""
        return self._thread is not None and self._thread.is_alive()

    async def start(self) -> None:
        """Loads; raises what loading raises, and MemoryBudgetError if an allocation fails."""
        try:
            with explained_refusals("the model was loaded"):
                self._service = await self._loaded()
        except Exception as error:
            self.failure = error
            raise

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and lets those that run finish within ``seconds``."""
        if self._service is not None:
            await self._service.drain(seconds)

    async def close(self) -> None:
        """Releases the model."""
        if self._service is not None:
            await self._service.close()

    async def _loaded(self) -> Service:
        """Loads in a new thread: those of asyncio would hold up an exit until a large model has been read."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Service] = loop.create_future()

        def tell(service: Service | None, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if service is None:
                done.set_exception(error or RuntimeError("the loader returned nothing"))
            else:
                done.set_result(service)

        def work() -> None:
            try:
                result, failure = self._load(), None
            except BaseException as error:
                result, failure = None, error
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell, result, failure)

        self._thread = threading.Thread(target=work, name="duoserve-load", daemon=True)
        self._thread.start()
        return await done
