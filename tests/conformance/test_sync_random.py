"""Software timelines, sync files, merges and imports against a model in plain Python, in three processes of which some die."""

import errno
import random
import select
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, SwSync, SyncFile
from tests.support.children import Child, Parent, Spawn
from tests.support.waiting import until

TIMELINES, BUFFERS, FILES = 4, 2, 24
DEAD = -errno.EOWNERDEAD


def acts(parent: Parent) -> None:
    """Does with the timelines what it is told."""
    timelines = dmabuf.recv(parent.sock)
    kept: list[SyncFile] = []
    parent.send("ready")
    while (what := parent.recv()) is not None:
        if what[0] == "inc":
            timelines[what[1]].inc(what[2])
        else:
            kept.append(timelines[what[1]].create_fence(what[2]))
            dmabuf.send(parent.sock, kept[-1])
        parent.send("done")


@dataclass(eq=False)
class Fence:
    """The model of one: ``owner``: 0 the test, else a child."""

    timeline: int
    value: int
    owner: int
    handle: int = 0
    status: int = 0


@dataclass
class File:
    real: SyncFile
    leaves: list[Fence]  # none: a stub
    asked: bool = False  # for its descriptor


@dataclass
class Buffer:
    real: DmaBuf
    entries: list[tuple[Fence, int]] = field(default_factory=list)
    slots: dict[int, Fence] = field(default_factory=dict)

    def add(self, fence: Fence, usage: int) -> None:
        """Semantics 4.4."""
        for at, (old, used) in enumerate(self.entries):
            later = old.timeline == fence.timeline and used >= usage and (old is fence or fence.value > old.value)
            if later or old.status:
                self.entries[at] = fence, usage
                return
        self.entries.append((fence, usage))

    def poll(self) -> int:
        """Semantics 5.6: a direction that was found busy waits for the fence that it was found with."""
        found = 0
        for event, usage in ((select.POLLIN, 1), (select.POLLOUT, 2)):
            if event in self.slots and not self.slots[event].status:
                continue
            for fence in self.pending(usage)[:1]:
                self.slots[event] = fence
                break
            else:
                found |= event
        return found

    def pending(self, usage: int) -> list[Fence]:
        return list(dict.fromkeys(fence for fence, used in self.entries if used <= usage and not fence.status))


class World:
    def __init__(self, child: Spawn, seed: int) -> None:
        self.child, self.chance = child, random.Random(seed)
        self.timelines = [SwSync(f"t{i}") for i in range(TIMELINES)]
        self.values = [0] * TIMELINES
        self.fences: list[Fence] = []
        self.files: list[File] = []
        self.buffers = [Buffer(dmabuf.allocate(4096)) for _ in range(BUFFERS)]
        self.actors: list[tuple[int, Child]] = []
        self.count = 0
        for _ in range(2):
            self.hire()

    def hire(self) -> None:
        self.count += 1
        other = self.child(acts)
        dmabuf.send(other.sock, *self.timelines)
        assert other.recv() == "ready"
        self.actors.append((self.count, other))

    def tell(self, actor: int, what: tuple[Any, ...]) -> Any:
        other = dict(self.actors)[actor]
        other.send(what)
        (made,) = dmabuf.recv(other.sock) if what[0] == "create" else (None,)
        assert other.recv() == "done"
        return made

    def who(self) -> int:
        return self.chance.choice([0, 0, *(number for number, _ in self.actors)])

    # ---- what may happen ----

    def create(self) -> None:
        at, actor = self.chance.randrange(TIMELINES), self.who()
        value = max(0, self.values[at] + self.chance.randrange(-2, 12))
        real = self.tell(actor, ("create", at, value)) if actor else self.timelines[at].create_fence(value)
        same = [f for f in self.fences if (f.timeline, f.value) == (at, value) and not f.status]
        held = [f for f in same if any(f in file.leaves for file in self.files) or any(f in buf.pending(3) for buf in self.buffers)]
        fence = next((f for f in same if f.handle == real.fence.handle), None)
        assert fence is not None or not held  # what somebody still has is shared; what nobody has may be gone
        if fence is None:
            fence = Fence(at, value, actor, real.fence.handle, int(value <= self.values[at]))
            self.fences.append(fence)
        self.files.append(File(real, [fence]))

    def inc(self) -> None:
        at, actor, n = self.chance.randrange(TIMELINES), self.who(), self.chance.randrange(1, 5)
        if actor:
            self.tell(actor, ("inc", at, n))
        else:
            self.timelines[at].inc(n)
        self.values[at] += n
        for fence in self.fences:
            if fence.timeline == at and not fence.status and fence.value <= self.values[at]:
                fence.status = 1

    def merge(self) -> None:
        # As in Linux 6.8, what is not ordered by context, one of each (an export may not be) is merged without dropping every duplicate.
        ordered = [file for file in self.files if self.contexts(file) == sorted(set(self.contexts(file)))]
        if not ordered:
            return
        one, two = self.chance.choice(ordered), self.chance.choice(ordered)
        real = one.real.merge(two.real, "merged")
        latest: dict[int, Fence] = {}
        for fence in one.leaves + two.leaves:
            if not fence.status and (fence.timeline not in latest or fence.value > latest[fence.timeline].value):
                latest[fence.timeline] = fence
        self.files.append(File(real, sorted(latest.values(), key=self.context)))

    def context(self, fence: Fence) -> int:
        return self.timelines[fence.timeline].context

    def contexts(self, file: File) -> list[int]:
        return [self.context(fence) for fence in file.leaves]

    def put(self) -> None:
        if self.files:
            buf, file, write = self.chance.choice(self.buffers), self.chance.choice(self.files), self.chance.random() < 0.5
            buf.real.import_sync_file(file.real, write)
            for fence in file.leaves:
                buf.add(fence, 1 if write else 2)

    def take(self) -> None:
        buf, write = self.chance.choice(self.buffers), self.chance.random() < 0.5
        self.files.append(File(buf.real.export_sync_file(write), buf.pending(2 if write else 1)))

    def ask(self) -> None:
        if self.files:
            file = self.chance.choice(self.files)
            file.real.fileno()
            file.asked = True

    def again(self) -> None:
        """From the bare descriptor, the first one closed."""
        if self.files:
            file = self.chance.choice(self.files)
            real = SyncFile.from_fd(file.real.fileno())
            file.real.close()
            file.real, file.asked = real, True

    def close(self) -> None:
        if self.files:
            self.files.pop(self.chance.randrange(len(self.files))).real.close()

    def death(self) -> None:
        if self.chance.random() < 0.15:
            number, other = self.actors.pop(self.chance.randrange(len(self.actors)))
            other.send_signal(signal.SIGKILL)
            other.wait()
            dmabuf.Domain.default().sweep()
            for fence in self.fences:
                if fence.owner == number and not fence.status:
                    fence.status = DEAD
            self.mourn()
            self.hire()

    def mourn(self) -> None:
        """Another process, or the dispatcher here, may have begun to reap the dead one before our sweep: until that is done and rung."""
        for file in self.files:
            until(
                lambda file=file: sum(one.status == DEAD for one in file.real.info().fences) == sum(f.status == DEAD for f in file.leaves)
            )  # type: ignore[misc]
            if file.asked and all(fence.status for fence in file.leaves):
                select.select([file.real], [], [])

    # ---- what must be ----

    def check(self) -> None:
        for file in self.files:
            found = sorted(one.status for one in file.real.info().fences)
            assert found == sorted(fence.status for fence in file.leaves or [Fence(0, 0, 0, 0, 1)])
            whole = all(fence.status for fence in file.leaves)
            assert file.real.is_signaled() is whole
            if file.asked:
                assert bool(select.select([file.real], [], [], 0)[0]) is whole
        for buf in self.buffers:
            assert buf.real.poll(select.POLLIN | select.POLLOUT) == buf.poll()
        for timeline, value in zip(self.timelines, self.values, strict=True):
            assert timeline.value == value

    def step(self) -> None:
        what = self.chance.choices(
            [self.create, self.inc, self.merge, self.put, self.take, self.ask, self.again, self.close, self.death],
            [6, 4, 3, 2, 2, 3, 2, 3, 1],
        )[0]
        what()
        while len(self.files) > FILES:
            self.close()
        self.check()

    def end(self) -> None:
        for file in self.files:
            file.real.close()
        for timeline in self.timelines:
            timeline.close()
        for buf in self.buffers:
            buf.real.close()
        for _, other in self.actors:
            other.send(None)
            other.result()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("seed", "steps"), [(1, 400), pytest.param(2, 20_000, marks=pytest.mark.long)])
def test_any_order_of_everything_answers_as_the_model(child: Spawn, seed: int, steps: int) -> None:
    world = World(child, seed)
    for _ in range(steps):
        world.step()
    world.end()
