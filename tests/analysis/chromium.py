"""A headless Chromium driven over its DevTools pipe: what a page does at a size, in a theme.

The pipe (file descriptors 3 and 4, messages end in a zero byte) needs no port and no WebSocket.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

_TIMEOUT_S = 120.0

MEASURE = """
(() => {
  const root = document.documentElement, wide = root.clientWidth;
  // Whatever sticks out of the page, unless a container of its own scrolls it.
  const scrolls = e => {
    for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
      if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(p).overflowX)) return true;
    return false;
  };
  const out = [...document.body.querySelectorAll('*')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > wide + 0.5 || box.left < -0.5) && !scrolls(e)
      && !e.closest('svg svg, svg g');
  });
  return {
    over: root.scrollWidth - wide,
    width: wide,
    outside: out.slice(0, 5).map(e => e.tagName + '.' + e.getAttribute('class')),
    images: document.images.length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    empty: [...document.querySelectorAll('svg[role=img]')].filter(
      e => !e.getBoundingClientRect().height || !e.querySelector('path')).length,
    paper: getComputedStyle(document.body).backgroundColor,
    elements: document.getElementsByTagName('*').length,
  };
})()
"""


def find() -> str | None:
    """The program, if this machine has it."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass
class Visit:
    """What was seen while a page was open."""

    facts: dict[str, Any]
    """Of `MEASURE`."""
    requests: list[str]
    """Addresses asked for, the page's own and data: left out."""
    complaints: list[str]
    """Console errors and warnings, exceptions, refusals of the content security policy."""
    seconds: float


@dataclass
class Browser:
    """One running Chromium with one tab."""

    process: subprocess.Popen[bytes]
    write_fd: int
    read_fd: int
    session: str = ""
    _buffer: bytes = b""
    _last: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def start(cls, program: str) -> Iterator[Self]:
        """Starts it with an empty profile; ends it and removes the profile."""
        with tempfile.TemporaryDirectory() as profile:
            to_child, write_fd = os.pipe()
            read_fd, from_child = os.pipe()
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
            flags += ["--disable-background-networking", "--hide-scrollbars=false"]
            flags += ["--disable-dev-shm-usage", f"--user-data-dir={profile}"]
            # The shell puts the pipes on 3 and 4, where Chromium looks for them.
            script = f'exec "$@" 3<&{to_child} 4>&{from_child}'
            command = ["bash", "-c", script, "bash", program, *flags, "--remote-debugging-pipe"]
            process = subprocess.Popen(
                [*command, "about:blank"],
                pass_fds=(to_child, from_child),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            os.close(to_child)
            os.close(from_child)
            browser = cls(process=process, write_fd=write_fd, read_fd=read_fd)
            try:
                browser._open_tab()
                yield browser
            finally:
                with contextlib.suppress(OSError, AssertionError):
                    browser.session = ""
                    browser.call("Browser.close")
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                os.close(write_fd)
                os.close(read_fd)

    def _open_tab(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    # -- the protocol ---------------------------------------------------------------------

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events met on the way are kept."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> dict[str, Any]:
        """The next event of that name, one that has come already included."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                if event.get("method") == method:
                    return event["params"]
            seen = len(self.events)
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self.read_fd], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"chromium was silent for {_TIMEOUT_S:.0f} s"
            part = os.read(self.read_fd, 1 << 20)
            assert part, "chromium has gone"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    # -- what tests ask -------------------------------------------------------------------

    def visit(
        self, page: Path, width: int, scheme: str = "light", media: str = "", height: int = 900
    ) -> Visit:
        """Opens a file at a width (CSS pixels), in a colour scheme, for the screen or `print`."""
        # A fresh start: an address with a fragment would not load again.
        self.call("Page.navigate", url="about:blank")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.events.clear()
        began = time.monotonic()
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for("Page.loadEventFired")
        facts = self.evaluate(MEASURE)
        seconds = time.monotonic() - began
        asked = [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        requests = [u for u in asked if u != page.as_uri() and not u.startswith("data:")]
        return Visit(facts=facts, requests=requests, complaints=self._complaints(), seconds=seconds)

    def _complaints(self) -> list[str]:
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Log.entryAdded":
                found.append(f"{params['entry']['level']}: {params['entry']['text']}")
            elif event.get("method") == "Runtime.consoleAPICalled":
                found.append(str(params["args"]))
            elif event.get("method") == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif event.get("method") == "Network.loadingFailed":
                found.append(f"not loaded: {params}")
        return found

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; its own policy does not apply."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, to: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        to.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, to: Path) -> None:
        """The page as it would be printed on A4."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69}
        done = self.call("Page.printToPDF", printBackground=True, **size)
        to.write_bytes(base64.b64decode(done["data"]))
