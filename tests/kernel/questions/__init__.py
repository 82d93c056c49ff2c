"""About 1,000 questions to the running kernel, by raw system calls: what does this answer, with good and with bad arguments?

``ask(area)`` gives the facts of one area; ``AREAS`` names them. The answers of several kernels are in tests/kernel/facts.
"""

from typing import Any

from tests.kernel.questions import asking, debugfs, env, file, heap, limits, mmap, name, poll, raw, swsync, sync, syncfile, udmabuf, vgem
from tests.kernel.questions.through import CALLS

AREAS = {
    module.__name__.rsplit(".", 1)[1]: module.ask
    for module in (env, udmabuf, heap, sync, name, file, mmap, poll, syncfile, swsync, vgem, debugfs, limits)
}


def ask(area: str, *, through: bool = False) -> list[dict[str, Any]]:
    """Ask one area's questions; its facts. ``through``: by this library's uapi layer, where it offers the call."""

    def questions() -> None:
        if through:
            raw.THROUGH.update(CALLS)
        AREAS[area]()

    return asking.run(area, questions)
