"""A browser for tests: headless Chromium, spoken to by its DevTools protocol over pipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """Chromium with one page."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(prefix="rootstockd-browser-", ignore_cleanup_errors=True)
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
            *(
                "--no-first-run",
                "--disable-extensions",
                "--disable-background-networking",
                "--disable-component-update",
            ),
            f"--user-data-dir={self._profile.name}",
        ]
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", CHROMIUM, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._said = self._messages()
        self._number, self._session = 0, ""
        self.events: list[dict[str, Any]] = []
        """What the page complained of: violations of its policy, exceptions, failed requests."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _messages(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        data = b""
        while piece := self.process.stdout.read1():  # type: ignore[attr-defined]
            *whole, data = (data + piece).split(b"\0")
            yield from map(json.loads, whole)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have the browser do something; what it answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        for said in self._said:
            if said.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.events.append(said["params"])
            if said.get("id") == self._number:
                assert "error" not in said, said["error"]
                return dict(said["result"])
        raise AssertionError(f"the browser has ended, with {self.process.wait()}")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """What an expression in JavaScript is in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """What a person reads in the first such element that is not hidden; empty if there is none."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find((element) => element.checkVisibility())"
        return str(self.run(f"{found}?.innerText ?? ''"))

    def until(self, condition: Callable[[], Any], timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"it did not come about:\n{self.text('body')}\n{self.events}"
            time.sleep(0.05)

    def close(self) -> None:
        """End it, and what it has started."""
        try:
            self._session = ""
            self.call("Browser.close")
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()
            self._profile.cleanup()
