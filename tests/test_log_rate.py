"""Few lines about what happens often, and how often it did."""

import asyncio
import logging

from rootstockd.host import log_rate
from rootstockd.host.log_rate import MOST, LogRate


def test_the_first_are_logged_and_the_rest_counted(monkeypatch, caplog):
    monkeypatch.setattr(log_rate, "WINDOW", 0.1)
    log = logging.getLogger("rootstockd.test_log_rate")
    log.addFilter(LogRate(log))

    async def noise() -> None:
        for number in range(MOST + 15):
            log.warning("closed %d", number, extra={"about": "closed sessions of alice"})
        log.warning("closed for bob", extra={"about": "closed sessions of bob"})
        log.warning("something else")
        await asyncio.sleep(0.3)
        log.warning("closed again", extra={"about": "closed sessions of alice"})

    asyncio.run(noise())
    assert caplog.messages == [
        *(f"closed {number}" for number in range(MOST)),
        "closed for bob",
        "something else",
        "closed sessions of alice: 15 more in the last 0.1 s",
        "closed again",
    ]
