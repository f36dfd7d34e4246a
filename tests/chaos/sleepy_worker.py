"""A worker whose rank 1 never gets its sixth batch, as from storage that stopped to answer."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from harness.data import loader
from harness.worker import main

real = loader._ahead


def sleepy(*args: Any, **kwargs: Any) -> Iterator[Any]:
    for number, item in enumerate(real(*args, **kwargs)):
        if number == 5 and threading.current_thread() is threading.main_thread():
            time.sleep(3600)
        yield item


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        loader._ahead = sleepy
    sys.exit(main())
