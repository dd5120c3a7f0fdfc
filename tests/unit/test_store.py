"""What the agent remembers, when others open it at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from holdfast.store import Store


def test_several_may_open_a_store_that_is_not_there_yet(tmp_path: Path) -> None:
    for number in range(10):
        path, together = tmp_path / f"{number}.db", threading.Barrier(4)

        def opened(path: Path = path, together: threading.Barrier = together) -> None:
            together.wait()
            Store(path).close()

        with ThreadPoolExecutor(4) as pool:
            for each in [pool.submit(opened) for _ in range(4)]:
                each.result()
