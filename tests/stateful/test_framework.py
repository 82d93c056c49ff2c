"""A random program of several processes against the model (``model.py``): reservation objects, fences, containers, sync_files, deaths.

Every step does one thing in one process and then asks every process what it sees. What the model says is pending must be pending now;
what it says is over must come to be over, in every process, with an ending that the model allows.

``SEEDS`` are run each time; a seed that once found something is added to them. ``DMABUF_TEST_SHRINK=1`` looks for the shortest program
that fails, which takes minutes.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import dmabuf
from tests.stateful.actors import Local, Remote
from tests.stateful.model import (
    BOOKKEEP,
    CLOSED,
    DEAD,
    DROPPED,
    READ,
    WRITE,
    Array,
    Chain,
    Fence,
    File,
    Resv,
    Timeline,
    merged,
)
from tests.support.budget import times

SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
STEPS = times(quick=1_200, full=20_000)
STEPS_LONG = 100_000
EXAMPLE = 50  # steps of one program
BUFFERS, REMOTES = 2, 2
MOST = 12  # fences and containers that one process has at a time

pytestmark = [pytest.mark.crash]
pick = st.integers(0, 251)
rare = st.sampled_from([False, False, True])


class Framework(RuleBasedStateMachine):
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.bufs = [dmabuf.allocate(4096) for _ in range(BUFFERS)]
        self.resvs = [Resv() for _ in range(BUFFERS)]
        self.places: list[Any] = [Local(self.bufs)]
        self.places += [Remote(self.bufs) for _ in range(REMOTES)]
        self.keys = 0
        self.timelines: dict[int, Timeline] = {}
        self.plain: dict[int, Fence] = {}
        self.groups: dict[int, Array | Chain] = {}
        self.files: dict[int, File] = {}
        self.known: list[set[int]] = [set() for _ in self.places]  # plain fences by place
        self.seen: set[tuple[int, int]] = set()  # (place, key) whose end was seen
        self.rung: set[tuple[int, int]] = set()
        self.waits: dict[tuple[int, int], Any] = {}
        self.calls: dict[tuple[int, int], Any] = {}
        self.numbers: dict[int, tuple[int, int]] = {}
        self.polled: dict[tuple[int, int], set[Fence]] = {}  # what a direction may have found pending

    # ---- choices ----

    def key(self) -> int:
        self.keys += 1
        return self.keys

    def of(self, place: int, want: Callable[[Any], bool] = lambda _: True) -> list[Any]:
        """What a place has, in the order of its making."""
        here = [self.plain[key] for key in self.known[place]] + [group for group in self.groups.values() if group.owner == place]
        return sorted((thing for thing in here if want(thing)), key=lambda thing: int(thing.key))

    def one(self, number: int, things: list[Any]) -> Any:
        return things[number % len(things)] if things else None

    def some(self, number: int, things: list[Any]) -> list[Any]:
        return [thing for at, thing in enumerate(things) if number >> at & 1][:6]

    def room(self, place: int) -> bool:
        return len(self.of(place)) < MOST

    def needed(self, place: int, fence: Fence) -> bool:
        """Has the place something else that holds the fence?"""
        held = any(fence in group.leaves for group in self.groups.values() if group.owner == place)
        return held or (place, fence.key) in self.waits or any(fence in f.leaves and place in f.places for f in self.files.values())

    # ---- fences ----

    def _make_timelines(self, place: int) -> None:
        """Every place has two at all times."""
        for _ in range(2 - sum(timeline.owner == place for timeline in self.timelines.values())):
            key = self.key()
            self.places[place]("timeline", key)
            self.timelines[key] = Timeline(key, place)

    @initialize(numbers=st.lists(pick, min_size=4, max_size=8))
    def begin(self, numbers: list[int]) -> None:
        for place in range(len(self.places)):
            self._make_timelines(place)
        for number in numbers:
            self.make_fence(number)

    @precondition(lambda self: any(self.room(t.owner) for t in self.timelines.values()))
    @rule(number=pick)
    def make_fence(self, number: int) -> None:
        timeline = self.one(number, [t for t in self.timelines.values() if self.room(t.owner)])
        key = self.key()
        seqno = self.places[timeline.owner]("fence", key, timeline.key)
        assert seqno == len(timeline.fences) + 1
        fence = self.plain[key] = Fence(key, timeline, seqno)
        timeline.fences.append(fence)
        self.numbers[key] = self.places[timeline.owner]("identity", key)
        self.known[timeline.owner].add(key)
        if timeline.owner:
            self._give_plain(fence, timeline.owner, 0)

    def _give_plain(self, fence: Fence, source: int, target: int) -> None:
        self._send("fence", fence.key, source, target, fence.key)
        self.known[target].add(fence.key)

    def _send(self, kind: str, key: int, source: int, target: int, new: int) -> None:
        there, here = self.places[target], self.places[source]
        if isinstance(here, Local):
            here.give(kind, key, there, new)
            return
        answer = here("give", kind, key)
        assert answer is None, answer
        relay = self.places[0].place
        if isinstance(there, Local):
            relay.recv(here.sock, kind, new)
            return
        (thing,) = dmabuf.recv(here.sock)
        dmabuf.send(there.sock, thing)
        if kind == "file":
            thing.close()
        assert there("take", kind, new) is None

    @precondition(lambda self: any(f for f in self.plain.values() if not f.done))
    @rule(number=pick, failed=rare)
    def signal(self, number: int, failed: bool) -> None:
        ready = [t.pending[0] for t in self.timelines.values() if t.pending and t.pending[0].key in self.known[t.owner]]
        fence = self.one(number, ready)
        if fence is not None:
            self.places[fence.owner]("signal", fence.key, -errno.EIO if failed else 0)
            fence.status = -errno.EIO if failed else 1

    @rule(number=pick)
    def signal_again_or_as_a_stranger(self, number: int) -> None:
        fence = self.one(number, list(self.plain.values()))
        if fence is None:
            return
        for place, known in enumerate(self.known):
            if fence.key in known and (fence.done or place != fence.owner):
                expected = errno.EPERM if place != fence.owner else errno.EINVAL
                assert self.places[place]("signal", fence.key, 0) == f"errno {expected}"

    @rule(number=pick)
    def drop(self, number: int) -> None:
        oldest = [t.pending[0] for t in self.timelines.values() if t.owner and t.pending]
        fence = self.one(number, [f for f in oldest if f.key in self.known[f.owner] and not self.needed(f.owner, f)])
        if fence is not None:
            self.places[fence.owner]("drop", fence.key)
            self.known[fence.owner].discard(fence.key)
            self.calls.pop((fence.owner, fence.key), None)
            fence.status = DROPPED

    @rule(number=pick, rarely=rare)
    def close_timeline(self, number: int, rarely: bool) -> None:
        timeline = self.one(number, list(self.timelines.values())) if rarely else None
        if timeline is not None:
            self.places[timeline.owner]("close", timeline.key)
            timeline.end(CLOSED)
            del self.timelines[timeline.key]
            self._make_timelines(timeline.owner)

    @rule(number=pick, to=pick)
    def give(self, number: int, to: int) -> None:
        target = to % len(self.places)
        wanted = [f for f in self.plain.values() if f.key not in self.known[target] and f.owner != target]
        ways = [(f, p) for f in wanted for p, known in enumerate(self.known) if f.key in known]
        way = self.one(number, ways)
        if way is not None and self.room(target):
            self._give_plain(way[0], way[1], target)

    # ---- containers ----

    @rule(place=pick, number=pick, any_=st.booleans(), enable=st.booleans())
    def make_array(self, place: int, number: int, any_: bool, enable: bool) -> None:
        place %= len(self.places)
        members = self.some(number, self.of(place, lambda t: isinstance(t, Fence)))
        if members and self.room(place):
            key = self.key()
            self.places[place]("array", key, [member.key for member in members], any_, enable)
            self.groups[key] = Array(key, place, members, any_, enable)

    @rule(place=pick, number=pick, prev=pick, seqno=st.integers(1, 40))
    def make_chain(self, place: int, number: int, prev: int, seqno: int) -> None:
        place %= len(self.places)
        inside = self.one(number, self.of(place, lambda t: isinstance(t, Fence) or (isinstance(t, Array) and t.enabled)))
        before = self.one(prev, [None, *self.of(place, lambda t: isinstance(t, Fence | Chain))])
        if inside is not None and self.room(place):
            key = self.key()
            self.places[place]("chain", key, None if before is None else before.key, inside.key, seqno)
            if isinstance(before, Chain):
                seqno = max(seqno, before.seqno)
            self.groups[key] = Chain(key, place, before, inside, seqno)
            assert self.places[place]("identity", key)[1] == seqno

    def _took(self, key: int, place: int, found: tuple[str, list[int]], pending: list[Fence]) -> None:
        """A merge or singleton: ``pending`` are the leaves that it may have kept, ``merged`` those that it must have."""
        kind, keys = found
        kept = [self.plain[k] for k in keys]
        must = merged(pending)
        assert set(must) <= set(kept) <= set(pending)
        # A fence that comes twice is dropped only from inputs in the order of contexts, as up to Linux 6.12.
        assert kind in (("done",), ("fence", "array"), ("array",))[min(len(kept), 2)]
        if kind == "array":
            self.groups[key] = Array(key, place, kept, False)
        else:
            self.places[place]("drop", key)

    @rule(place=pick, number=pick)
    def merge(self, place: int, number: int) -> None:
        place %= len(self.places)
        things = self.some(number, self.of(place))
        leaves = [leaf for thing in things for leaf in thing.leaves]
        if things and self.room(place) and {leaf.key for leaf in leaves} <= self.known[place]:
            key = self.key()
            found = self.places[place]("merge", key, [thing.key for thing in things])
            self._took(key, place, found, [leaf for leaf in dict.fromkeys(leaves) if not leaf.done])

    @rule(place=pick, buf=pick, usage=st.integers(0, 3))
    def singleton(self, place: int, buf: int, usage: int) -> None:
        place, buf = place % len(self.places), buf % BUFFERS
        pending = list(dict.fromkeys(fence for fence, _ in self.resvs[buf].pending(usage)))
        if self.room(place) and {fence.key for fence in pending} <= self.known[place]:
            key = self.key()
            found = self.places[place]("singleton", key, buf, usage)
            assert (found is None) == (not pending)
            if found is not None:
                self._took(key, place, found, pending)

    @precondition(lambda self: bool(self.groups))
    @rule(number=pick)
    def enable(self, number: int) -> None:
        group = self.one(number, list(self.groups.values()))
        if group is not None:
            self._enable(group)

    def _enable(self, thing: Any) -> None:
        if isinstance(thing, Array):
            self.places[thing.owner]("enable", thing.key)
            thing.enabled = True
            thing.look()

    @precondition(lambda self: bool(self.groups))
    @rule(number=pick, to=pick)
    def give_array(self, number: int, to: int) -> None:
        target = to % len(self.places)
        array = self.one(number, [g for g in self.groups.values() if isinstance(g, Array) and not g.done and g.owner != target])
        if array is not None and self.room(target):
            key = self.key()
            self._enable(array)
            if array.done:
                return
            self._send("fence", array.key, array.owner, target, key)
            self.groups[key] = Array(key, target, array.members, array.any, came=True)
            self._enable(self.groups[key])

    # ---- waits and callbacks ----

    @rule(place=pick, number=pick)
    def poll_wait(self, place: int, number: int) -> None:
        place %= len(self.places)
        thing = self.one(number, self.of(place))
        if thing is not None:
            self._enable(thing)
            if not thing.done:
                assert self.places[place]("poll_wait", thing.key) is False

    @rule(place=pick, number=pick)
    def begin_wait(self, place: int, number: int) -> None:
        place %= len(self.places)
        thing = self.one(number, self.of(place, lambda t: not t.done))
        if thing is not None and (place, thing.key) not in self.waits:
            self._enable(thing)
            self.places[place]("begin_wait", thing.key)
            self.waits[place, thing.key] = thing

    @rule(place=pick, number=pick)
    def callback(self, place: int, number: int) -> None:
        place %= len(self.places)
        thing = self.one(number, self.of(place))
        if thing is None or (place, thing.key) in self.calls:
            return
        self._enable(thing)
        if isinstance(thing, Fence) and thing.done:
            assert self.places[place]("callback", thing.key) == f"errno {errno.ENOENT}"
        elif not thing.done:
            assert self.places[place]("callback", thing.key) is None
            self.calls[place, thing.key] = thing

    # ---- reservation objects ----

    @rule(place=pick, buf=pick, number=pick, usage=st.integers(0, 3))
    def add(self, place: int, buf: int, number: int, usage: int) -> None:
        place, buf = place % len(self.places), buf % BUFFERS
        for at, fence in enumerate(self.some(number, self.of(place, lambda t: isinstance(t, Fence)))):
            assert self.places[place]("add", buf, fence.key, (usage + at) % 4) is None
            self.resvs[buf].add(fence, (usage + at) % 4)

    @rule(place=pick, buf=pick, number=pick, other=pick, usage=st.integers(0, 3))
    def replace(self, place: int, buf: int, number: int, other: int, usage: int) -> None:
        place, buf = place % len(self.places), buf % BUFFERS
        there = [fence for fence, _ in self.resvs[buf].pending(BOOKKEEP) if fence.key in self.known[place]]
        old, new = self.one(number, there), self.one(other, self.of(place, lambda t: isinstance(t, Fence)))
        if old is not None and new is not None:
            assert self.places[place]("replace", buf, old.key, new.key, usage) is None
            self.resvs[buf].replace(old.timeline, new, usage)

    @rule(place=pick, buf=pick)
    def copy(self, place: int, buf: int) -> None:
        place, buf = place % len(self.places), buf % BUFFERS
        source = self.resvs[(buf + 1) % BUFFERS]
        assert self.places[place]("copy", buf, (buf + 1) % BUFFERS) is None
        self.resvs[buf].slots = source.pending(BOOKKEEP)

    # ---- sync_files ----

    @rule(place=pick, number=pick)
    def make_file(self, place: int, number: int) -> None:
        place %= len(self.places)
        thing = self.one(number, self.of(place))
        if thing is not None and len(self.files) < 6:
            self._enable(thing)
            key = self.key()
            assert self.places[place]("sync_file", key, thing.key) is None
            self.files[key] = File(key, {place}, list(thing.leaves), isinstance(thing, Array) and thing.any)

    @rule(place=pick, buf=pick, write=st.booleans())
    def export(self, place: int, buf: int, write: bool) -> None:
        place, buf = place % len(self.places), buf % BUFFERS
        if len(self.files) < 6:
            key = self.key()
            assert self.places[place]("export", key, buf, write) is None
            pending = self.resvs[buf].pending(READ if write else WRITE)
            self.files[key] = File(key, {place}, list(dict.fromkeys(fence for fence, _ in pending)))

    @precondition(lambda self: bool(self.files))
    @rule(number=pick, buf=pick, write=st.booleans())
    def import_(self, number: int, buf: int, write: bool) -> None:
        buf %= BUFFERS
        file = self.one(number, [f for f in self.files.values() if not f.any])
        if file is not None:
            place = self.one(number, sorted(file.places))
            assert self.places[place]("import_", buf, file.key, write) is None
            for leaf in file.leaves:
                if not leaf.done:
                    self.resvs[buf].add(leaf, WRITE if write else READ)

    @precondition(lambda self: len(self.files) > 1)
    @rule(number=pick, other=pick)
    def merge_files(self, number: int, other: int) -> None:
        one, two = self.one(number, list(self.files.values())), self.one(other, list(self.files.values()))
        if one is None or two is None or len(self.files) >= 6 or not one.places & two.places:
            return
        key, place = self.key(), min(one.places & two.places)
        assert self.places[place]("file_merge", key, one.key, two.key) is None
        self.files[key] = File(key, {place}, [leaf for leaf in dict.fromkeys(one.leaves + two.leaves) if not leaf.done])

    @precondition(lambda self: bool(self.files))
    @rule(number=pick, to=pick)
    def give_file(self, number: int, to: int) -> None:
        target = to % len(self.places)
        file = self.one(number, [f for f in self.files.values() if target not in f.places])
        if file is not None:
            self._send("file", file.key, min(file.places), target, file.key)
            file.places.add(target)

    @precondition(lambda self: bool(self.files))
    @rule(number=pick)
    def close_file(self, number: int) -> None:
        file = self.one(number, list(self.files.values()))
        if file is not None:
            place = self.one(number, sorted(file.places))
            self.places[place]("close_file", file.key)
            file.places.discard(place)
            if not file.places:
                del self.files[file.key]

    # ---- death ----

    @rule(place=pick, locked=st.sampled_from([None, None, 0, 1]), rarely=rare)
    def die(self, place: int, locked: int | None, rarely: bool) -> None:
        if not rarely:
            return
        place = 1 + place % REMOTES
        if locked is not None:
            self.places[place]("lock", locked)
        self.places[place].kill()
        for key in [key for key, timeline in self.timelines.items() if timeline.owner == place]:
            self.timelines.pop(key).end(DEAD)
        self.known[place].clear()
        self.groups = {key: group for key, group in self.groups.items() if group.owner != place}
        for file in list(self.files.values()):
            file.places.discard(place)
            if not file.places:
                del self.files[file.key]
        for table in (self.waits, self.calls):
            for where in [where for where in table if where[0] == place]:
                del table[where]
        self.seen = {where for where in self.seen if where[0] != place}
        self.rung = {where for where in self.rung if where[0] != place}
        dmabuf.Domain.default().reap_dead()  # now, instead of at somebody's next tick
        self.places[place] = Remote(self.bufs)
        self._make_timelines(place)

    # ---- what everybody sees ----

    @invariant()
    def everybody_agrees(self) -> None:
        type(self).steps += 1
        for group in self.groups.values():
            if isinstance(group, Array):
                group.look()
        for place, ask in enumerate(self.places):
            things = self.of(place)
            pending = [thing for thing in things if not thing.done]
            if pending:
                assert ask("statuses", [thing.key for thing in pending]) == [0] * len(pending)
            over = [thing for thing in things if thing.done and (place, thing.key) not in self.seen]
            if over:
                for thing, status in zip(over, ask("ended", [thing.key for thing in over]), strict=True):
                    assert status in thing.endings, (thing, status)
                    self.seen.add((place, thing.key))
        for (place, key), thing in list(self.waits.items()):
            if thing.done:
                del self.waits[place, key]
                assert self.places[place]("end_wait", key) in thing.endings
        for (place, key), thing in list(self.calls.items()):
            if thing.done:
                del self.calls[place, key]
                assert self.places[place]("called", key)
        for file in self.files.values():
            for place in file.places:
                if not file.done:
                    assert self.places[place]("ready", file.key, False) is False
                elif (place, file.key) not in self.rung:
                    assert self.places[place]("ready", file.key, True)
                    self.rung.add((place, file.key))
        for buf, resv in enumerate(self.resvs):
            wanted = {(self.numbers[fence.key], usage) for fence, usage in resv.pending(BOOKKEEP)}
            for place in (0, 1 + self.steps % REMOTES):
                found, idle = self.places[place]("resv", buf)
                assert set(found) == wanted
                assert idle == [not resv.pending(usage) for usage in range(4)]
            found = self.places[0]("poll", buf)
            for event, usage in ((select.POLLIN, WRITE), (select.POLLOUT, READ)):
                pending = {fence for fence, _ in resv.pending(usage)}
                polled = self.polled.setdefault((buf, event), set())
                # Once polled, a direction waits for the fence that it found, though that may be gone by now (semantics 5.6).
                if pending or all(fence.done for fence in polled):
                    assert bool(found & event) == (not pending)
                polled |= pending
                polled -= {fence for fence in polled if fence.done}
        for fence in list(self.plain.values()):
            if fence.done and len(self.plain) > 40:
                self._forget(fence)

    def _forget(self, fence: Fence) -> None:
        if any(fence in group.leaves for group in self.groups.values()) or any(fence in f.leaves for f in self.files.values()):
            return
        if any(key == fence.key for _, key in (*self.waits, *self.calls)):
            return
        for place, known in enumerate(self.known):
            if fence.key in known:
                self.places[place]("drop", fence.key)
                known.discard(fence.key)
        del self.plain[fence.key]

    def teardown(self) -> None:
        for place in self.places[1:]:
            place.kill()
        self.places[0].close()
        dmabuf.Domain.default().reap_dead()
        for buf in self.bufs:
            buf.close()


def run(number: int, steps: int) -> None:
    """Programs from one seed until as many steps were done."""
    limits = settings(
        max_examples=-(-steps // EXAMPLE), stateful_step_count=EXAMPLE, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, *([Phase.shrink] if "DMABUF_TEST_SHRINK" in os.environ else [])],
    )  # fmt: skip
    done = 0
    while done < steps:  # a program may be shorter than asked for

        @seed(number + 1000 * done)
        class Seeded(Framework):
            steps = 0

        run_state_machine_as_test(Seeded, settings=limits)
        done += Seeded.steps


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", SEEDS)
def test_every_process_sees_what_the_model_says(number: int) -> None:
    run(number, STEPS // len(SEEDS))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", range(101, 111))
def test_every_process_sees_what_the_model_says_for_long(number: int) -> None:
    run(number, STEPS_LONG // 10)
