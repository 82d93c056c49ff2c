"""A thread that holds the lock of a reservation."""

import threading
from typing import Self

from dmabuf import DmaResv, WwAcquireContext
from tests.support.waiting import Background


class Holder(Background[None]):
    """Another thread that holds the lock until `let_go()`; under a context of its own, made before the test goes on, if asked to."""

    def __init__(self, resv: DmaResv, *, with_context: bool = False) -> None:
        ready, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            ctx = WwAcquireContext() if with_context else None
            resv.lock(ctx)
            ready.set()
            go_on.wait()
            resv.unlock()
            if ctx is not None:
                ctx.fini()

        self._ready, self.let_go = ready, go_on.set
        super().__init__(hold)

    def __enter__(self) -> Self:
        super().__enter__()
        self._ready.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.let_go()
        super().__exit__(kind, *rest)
