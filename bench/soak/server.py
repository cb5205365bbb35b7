"""A server for the soak: duoserve's own, which on SIGTERM says whether anything has outlived its request.

    python -m soak.server JSON

JSON has ``model``, ``loading`` (arguments of ``MoEModel.from_pretrained``) and ``settings`` (of ``ServiceSettings``).
The last line on stdout is one of JSON: ``url`` first, once requests are taken, then ``integrity`` at the end.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from duoserve import AsyncEngine, DuoServeError, MoEModel, ServiceSettings
from duoserve.server.run import serve
from duoserve.server.settings import ServerSettings


class Checked(AsyncEngine):
    """Looks at its books before they are closed. All requests have ended then, so the engine's thread only waits."""

    async def close(self) -> None:
        """As ever, behind the check."""
        engine = self.model._runtime.engine
        try:
            engine.check_integrity()
            found = "nothing is left" if engine.idle and engine.kv_usage == 0 else "requests or pages are left"
        except DuoServeError as error:
            found = str(error)
        say(integrity=found)
        await super().close()


def say(**what: str) -> None:
    """A line for the parent."""
    print(json.dumps(what), flush=True)


def main() -> None:
    """Serves until SIGTERM."""
    wanted: dict[str, Any] = json.loads(sys.argv[1])

    def load() -> AsyncEngine:
        model = MoEModel.from_pretrained(wanted["model"], **wanted["loading"])
        return Checked(model, settings=ServiceSettings(**wanted["settings"]))

    serve(ServerSettings(name=wanted["model"], port=0), load, lambda url: say(url=url))


if __name__ == "__main__":
    main()
