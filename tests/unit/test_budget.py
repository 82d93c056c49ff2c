"""A budget finds every limit that binds, names it, and never refuses because of an old number."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path

import pytest

from dmabuf.errors import InvalidError, NoMemoryError, NotFoundError
from dmabuf.heap import budget
from dmabuf.heap.budget import AMPLE, BOOKKEEPING, GRANT_NS, GRANT_SHARE, LAYOUT_NS, SMALL, Budget

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000  # LONG_MAX rounded down to a page


def with_bookkeeping(size: int) -> int:
    return size + size // BOOKKEEPING


class Machine:
    """A made-up /proc and /sys, and a clock that is moved by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 0
        self.file_limit = resource.RLIM_INFINITY
        (root / "proc/self").mkdir(parents=True)
        self.available(64 * GIB)
        self.member("0::/\n")
        self.mounts("")

    def available(self, size: int) -> None:
        text = f"MemTotal:       99999999 kB\nMemFree:             1 kB\nMemAvailable:   {size // KIB} kB\nBuffers:  7 kB\n"
        # Another thread may be looking: it finds the old file or the new one.
        (self.root / "proc/meminfo.new").write_text(text)
        (self.root / "proc/meminfo.new").rename(self.root / "proc/meminfo")

    def member(self, text: str) -> None:
        (self.root / "proc/self/cgroup").write_text(text)

    def mounts(self, *lines: str) -> None:
        (self.root / "proc/self/mountinfo").write_text("".join(line + "\n" for line in lines))

    def group(self, path: str, **files: object) -> None:
        """Files of a cgroup directory; a double underscore in a name is a dot."""
        directory = self.root / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name.replace("__", ".")).write_text(f"{content}\n")

    def budget(self) -> Budget:
        return Budget(self.root / "proc", self.root, clock=lambda: self.now, file_limit=lambda: self.file_limit)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def v2_mount(point: str = "/sys/fs/cgroup", shown: str = "/") -> str:
    return f"31 23 0:28 {shown} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def v1_mount(point: str = "/sys/fs/cgroup/memory", shown: str = "/", controllers: str = "rw,memory") -> str:
    return f"35 31 0:32 {shown} {point} rw,relatime - cgroup cgroup {controllers}"


@pytest.fixture
def v2(machine: Machine) -> Machine:
    """A unified machine on which the process is in /a/b; nothing is limited yet."""
    machine.mounts(v2_mount())
    machine.member("0::/a/b\n")
    for path in ("a", "a/b"):
        machine.group(f"sys/fs/cgroup/{path}", memory__max="max", memory__current=0, memory__stat="inactive_file 0\nactive_file 0")
    return machine


@pytest.fixture
def v1(machine: Machine) -> Machine:
    """A machine with the memory controller of version 1, the process in /a/b."""
    machine.mounts(v1_mount())
    machine.member("5:cpu:/\n4:memory:/a/b\n0::/\n")
    for path in ("", "a", "a/b"):
        machine.group(f"sys/fs/cgroup/memory/{path}", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes=0, memory__stat="cache 0")
    return machine


def allows_exactly(tested: Budget, room: int) -> str:
    """The largest request that fits passes, one byte more doesn't; returns the refusal."""
    size = room * BOOKKEEPING // (BOOKKEEPING + 1)
    while with_bookkeeping(size + 1) <= room:
        size += 1
    assert with_bookkeeping(size) <= room < with_bookkeeping(size + 1)
    tested.check(size)
    with pytest.raises(NoMemoryError) as caught:
        tested.check(size + 1)
    assert caught.value.errno == errno.ENOMEM
    return str(caught.value)


# ------------------------------------------------------------------- limits


def test_available_memory_binds_where_nothing_else_does(machine: Machine) -> None:
    machine.available(100 * MIB)
    text = allows_exactly(machine.budget(), 100 * MIB)
    assert "MemAvailable" in text
    assert str(100 * MIB) in text


def test_a_v2_group_binds_and_is_named_with_its_numbers(v2: Machine) -> None:
    v2.group("sys/fs/cgroup/a/b", memory__max=100 * MIB, memory__current=30 * MIB)
    text = allows_exactly(v2.budget(), 70 * MIB)
    assert f"memory.max of cgroup {v2.root}/sys/fs/cgroup/a/b is {100 * MIB} bytes, of which {30 * MIB} are used" in text
    assert f"{70 * MIB} are left" in text


def test_a_v2_ancestor_binds(v2: Machine) -> None:
    v2.group("sys/fs/cgroup/a/b", memory__max=100 * MIB)
    v2.group("sys/fs/cgroup/a", memory__max=200 * MIB, memory__current=150 * MIB)
    assert f"cgroup {v2.root}/sys/fs/cgroup/a is" in allows_exactly(v2.budget(), 50 * MIB)


def test_the_root_of_a_v2_namespace_binds(v2: Machine) -> None:
    v2.member("0::/\n")
    v2.group("sys/fs/cgroup", memory__max=10 * MIB, memory__current=0)
    allows_exactly(v2.budget(), 10 * MIB)


def test_page_cache_of_a_v2_group_is_free(v2: Machine) -> None:
    stat = f"anon 5\ninactive_file {20 * MIB}\nactive_file {10 * MIB}\nshmem 7\ntotal_inactive_file 999999999"
    v2.group("sys/fs/cgroup/a/b", memory__max=100 * MIB, memory__current=90 * MIB, memory__stat=stat)
    allows_exactly(v2.budget(), 40 * MIB)


def test_page_cache_beyond_the_usage_frees_no_more_than_the_limit(v2: Machine) -> None:
    v2.group("sys/fs/cgroup/a/b", memory__max=100 * MIB, memory__current=10 * MIB, memory__stat=f"inactive_file {50 * MIB}")
    allows_exactly(v2.budget(), 100 * MIB)


def test_a_v1_group_binds_and_is_named(v1: Machine) -> None:
    v1.group("sys/fs/cgroup/memory/a/b", memory__limit_in_bytes=100 * MIB, memory__usage_in_bytes=40 * MIB)
    assert f"memory.limit_in_bytes of cgroup {v1.root}/sys/fs/cgroup/memory/a/b" in allows_exactly(v1.budget(), 60 * MIB)


@pytest.mark.parametrize("path", ["", "a"])
def test_a_v1_ancestor_binds(v1: Machine, path: str) -> None:
    v1.group(f"sys/fs/cgroup/memory/{path}", memory__limit_in_bytes=30 * MIB, memory__usage_in_bytes=10 * MIB)
    allows_exactly(v1.budget(), 20 * MIB)


def test_page_cache_of_a_v1_group_and_its_children_is_free(v1: Machine) -> None:
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {20 * MIB}\ntotal_active_file {10 * MIB}"
    v1.group("sys/fs/cgroup/memory/a/b", memory__limit_in_bytes=100 * MIB, memory__usage_in_bytes=90 * MIB, memory__stat=stat)
    allows_exactly(v1.budget(), 40 * MIB)


def test_on_a_hybrid_machine_the_version_with_the_controller_binds(v1: Machine) -> None:
    v1.mounts(v1_mount(), v2_mount("/sys/fs/cgroup/unified"))
    v1.member("4:memory:/a/b\n0::/user.slice\n")
    v1.group("sys/fs/cgroup/unified/user.slice", cgroup__procs="")
    v1.group("sys/fs/cgroup/memory/a/b", memory__limit_in_bytes=10 * MIB)
    allows_exactly(v1.budget(), 10 * MIB)


def test_a_v1_hierarchy_shared_with_other_controllers_is_found(v1: Machine) -> None:
    v1.mounts(v1_mount(controllers="rw,cpu,memory"))
    v1.member("4:cpu,memory:/a/b\n")
    v1.group("sys/fs/cgroup/memory/a/b", memory__limit_in_bytes=10 * MIB)
    allows_exactly(v1.budget(), 10 * MIB)


def test_v1_hierarchies_of_other_controllers_are_ignored(v1: Machine) -> None:
    v1.mounts(v1_mount("/sys/fs/cgroup/cpu", controllers="rw,cpu"), v1_mount())
    v1.group("sys/fs/cgroup/cpu/a/b", memory__limit_in_bytes=1, memory__usage_in_bytes=0)
    v1.budget().check(GIB)


def test_a_bind_mount_of_a_subtree_is_read_from_its_top(machine: Machine) -> None:
    machine.mounts(v2_mount(shown="/docker/abc"))
    machine.member("0::/docker/abc/job\n")
    machine.group("sys/fs/cgroup/job", memory__max=10 * MIB, memory__current=0)
    machine.group("sys/fs/cgroup", memory__max=5 * MIB, memory__current=0)
    allows_exactly(machine.budget(), 5 * MIB)


def test_a_group_whose_name_only_begins_like_the_mount_does_not_lie_below(machine: Machine) -> None:
    machine.mounts(v2_mount("/wrong", shown="/doc"), v2_mount(shown="/docker"))
    machine.member("0::/docker/abc\n")
    machine.group("wrong", memory__max=1, memory__current=0)
    machine.group("sys/fs/cgroup/abc", memory__max=10 * MIB, memory__current=0)
    allows_exactly(machine.budget(), 10 * MIB)


def test_of_several_mounts_the_one_with_the_most_ancestors_is_read(v2: Machine) -> None:
    v2.mounts(v2_mount("/elsewhere", shown="/a/b"), v2_mount(), v2_mount("/third", shown="/a"))
    v2.group("sys/fs/cgroup/a", memory__max=10 * MIB)
    allows_exactly(v2.budget(), 10 * MIB)


@pytest.mark.parametrize(("member", "shown"), [("/../other", "/"), ("/a/b", "/../.."), ("/", "/docker/abc")])
def test_paths_of_another_namespace_leave_the_top_of_the_mount(machine: Machine, member: str, shown: str) -> None:
    machine.mounts(v2_mount(shown=shown))
    machine.member(f"0::{member}\n")
    machine.group("sys/fs/cgroup", memory__max=10 * MIB, memory__current=0)
    allows_exactly(machine.budget(), 10 * MIB)


def test_a_mount_point_with_a_space_is_found(machine: Machine) -> None:
    machine.mounts(v2_mount("/sys/my\\040groups"))
    machine.member("0::/a\n")
    machine.group("sys/my groups/a", memory__max=10 * MIB, memory__current=0)
    allows_exactly(machine.budget(), 10 * MIB)


def test_a_group_with_a_colon_in_its_name_is_found(machine: Machine) -> None:
    machine.mounts(v2_mount())
    machine.member("0::/a:b\n")
    machine.group("sys/fs/cgroup/a:b", memory__max=10 * MIB, memory__current=0)
    allows_exactly(machine.budget(), 10 * MIB)


def test_a_group_that_was_removed_leaves_its_ancestors(v2: Machine) -> None:
    v2.member("0::/a/gone (deleted)\n")
    v2.group("sys/fs/cgroup/a", memory__max=10 * MIB)
    allows_exactly(v2.budget(), 10 * MIB)


def test_a_limit_lowered_under_its_use_leaves_nothing(v2: Machine) -> None:
    v2.group("sys/fs/cgroup/a", memory__max=10 * MIB, memory__current=20 * MIB)
    with pytest.raises(NoMemoryError, match="and 0 are left"):
        v2.budget().check(1)


@pytest.mark.parametrize("content", ["max", "", "junk", UNLIMITED_V1])
def test_a_limit_without_a_number_limits_nothing(v2: Machine, content: object) -> None:
    v2.group("sys/fs/cgroup/a/b", memory__max=content)
    v2.budget().check(GIB)


def test_a_group_without_a_usage_limits_nothing(v2: Machine) -> None:
    v2.group("sys/fs/cgroup/a/b", memory__max=1, memory__current="junk")
    v2.budget().check(GIB)


def test_a_group_without_a_stat_file_has_no_page_cache(machine: Machine) -> None:
    machine.mounts(v2_mount())
    machine.group("sys/fs/cgroup", memory__max=10 * MIB, memory__current=MIB)
    allows_exactly(machine.budget(), 9 * MIB)


@pytest.mark.parametrize("name", ["cgroup", "mountinfo"])
def test_a_kernel_without_cgroups_has_the_machines_memory(v2: Machine, name: str) -> None:
    v2.group("sys/fs/cgroup/a/b", memory__max=1)
    (v2.root / "proc/self" / name).unlink()
    v2.available(100 * MIB)
    allows_exactly(v2.budget(), 100 * MIB)


@pytest.mark.parametrize(
    "line", ["", "nonsense", "1 2 3 - cgroup2", "1 2 3 4 5 6", " - cgroup2 x y", "31 23 0:28 / /x\\4 rw - cgroup2 x y"]
)
def test_lines_of_the_mount_table_that_are_not_understood_are_passed_over(v2: Machine, line: str) -> None:
    v2.mounts(line, v2_mount())
    v2.group("sys/fs/cgroup/a/b", memory__max=10 * MIB)
    v2.budget().check(MIB)


@pytest.mark.parametrize("line", ["", "nonsense", "0", "x:y"])
def test_lines_of_the_membership_that_are_not_understood_are_passed_over(v2: Machine, line: str) -> None:
    v2.member(f"{line}\n0::/a/b\n")
    v2.group("sys/fs/cgroup/a/b", memory__max=10 * MIB)
    allows_exactly(v2.budget(), 10 * MIB)


def test_without_proc_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="which dmabuf needs"):
        Budget(tmp_path / "proc", tmp_path).check(1)


def test_a_meminfo_without_available_memory_is_an_error(machine: Machine) -> None:
    (machine.root / "proc/meminfo").write_text("MemTotal: 5 kB\n")
    with pytest.raises(OSError, match="MemAvailable") as caught:
        machine.budget().check(1)
    assert caught.value.errno == errno.ENODATA


def test_the_file_size_limit_binds_before_a_signal_would(machine: Machine) -> None:
    machine.file_limit = 8 * MIB
    tested = machine.budget()
    tested.check(8 * MIB)
    with pytest.raises(NoMemoryError, match=f"RLIMIT_FSIZE allows a file of {8 * MIB} bytes"):
        tested.check(8 * MIB + 1)


def test_the_file_size_limit_binds_small_requests_that_have_a_grant(machine: Machine) -> None:
    tested = machine.budget()
    tested.check(1)
    machine.file_limit = 4 * KIB
    with pytest.raises(NoMemoryError, match="RLIMIT_FSIZE"):
        tested.check(8 * KIB)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_is_not_positive_is_einval(machine: Machine, size: int) -> None:
    with pytest.raises(InvalidError):
        machine.budget().check(size)


def test_a_size_that_is_no_int_is_a_type_error(machine: Machine) -> None:
    with pytest.raises(TypeError):
        machine.budget().check("4096")  # type: ignore[arg-type]


def test_a_claim_of_nothing_is_einval(machine: Machine) -> None:
    with pytest.raises(InvalidError), machine.budget().claim(0):
        pytest.fail("entered")


# ------------------------------------------------------------------- grants


def blind(machine: Machine) -> None:
    """Take the files away: whoever looks now fails."""
    (machine.root / "proc/meminfo").unlink()


def test_small_requests_after_a_look_read_nothing(machine: Machine) -> None:
    tested = machine.budget()
    tested.check(4 * KIB)
    blind(machine)
    for _ in range(1000):
        tested.check(4 * KIB)


def test_a_large_request_always_looks(machine: Machine) -> None:
    tested = machine.budget()
    tested.check(1)
    blind(machine)
    with pytest.raises(NotFoundError):
        tested.check(SMALL + 1)


def test_a_grant_ends_with_its_time(machine: Machine) -> None:
    tested = machine.budget()
    tested.check(1)
    blind(machine)
    machine.now = GRANT_NS - 1
    tested.check(1)
    machine.now = GRANT_NS
    with pytest.raises(NotFoundError):
        tested.check(1)


def test_a_grant_is_an_eighth_of_the_room_and_no_more(machine: Machine) -> None:
    machine.available(AMPLE + with_bookkeeping(SMALL))
    tested = machine.budget()
    tested.check(SMALL)
    blind(machine)
    for _ in range(AMPLE // GRANT_SHARE // with_bookkeeping(SMALL)):
        tested.check(SMALL)
    with pytest.raises(NotFoundError):
        tested.check(SMALL)


def test_with_little_room_every_request_looks(machine: Machine) -> None:
    machine.available(AMPLE)
    tested = machine.budget()
    tested.check(4 * KIB)
    blind(machine)
    with pytest.raises(NotFoundError):
        tested.check(4 * KIB)


def test_no_refusal_rests_on_an_old_number(machine: Machine) -> None:
    machine.available(MIB)
    tested = machine.budget()
    with pytest.raises(NoMemoryError):
        tested.check(MIB)
    machine.available(2 * MIB)
    tested.check(MIB)


def test_a_refused_request_takes_the_grant_back(machine: Machine) -> None:
    tested = machine.budget()
    tested.check(1)
    machine.available(MIB)
    with pytest.raises(NoMemoryError):
        tested.check(2 * MIB)
    blind(machine)
    with pytest.raises(NotFoundError):
        tested.check(1)


def test_a_process_that_changes_its_group_is_bound_at_once(v2: Machine) -> None:
    tested = v2.budget()
    tested.check(GIB)
    v2.group("sys/fs/cgroup/small", memory__max=10 * MIB, memory__current=0)
    v2.member("0::/small\n")
    allows_exactly(tested, 10 * MIB)


def test_a_new_mount_is_found_within_a_second(v2: Machine) -> None:
    v2.mounts("")
    tested = v2.budget()
    tested.check(GIB)
    v2.group("sys/fs/cgroup/a/b", memory__max=10 * MIB)
    v2.mounts(v2_mount())
    v2.now = LAYOUT_NS
    allows_exactly(tested, 10 * MIB)


# ------------------------------------------------------------------- claims


@pytest.fixture
def tight(machine: Machine) -> tuple[Machine, Budget]:
    machine.available(100 * MIB)
    return machine, machine.budget()


def test_a_claim_refuses_like_a_check(tight: tuple[Machine, Budget]) -> None:
    with pytest.raises(NoMemoryError), tight[1].claim(100 * MIB):
        pytest.fail("entered")


def test_requests_that_fit_beside_a_claim_do_not_wait(tight: tuple[Machine, Budget]) -> None:
    with tight[1].claim(50 * MIB):
        tight[1].check(40 * MIB)


def test_a_request_that_fits_in_no_case_is_refused_beside_a_claim(tight: tuple[Machine, Budget]) -> None:
    with tight[1].claim(50 * MIB), pytest.raises(NoMemoryError):
        tight[1].check(100 * MIB)


@pytest.mark.parametrize("left", [50, 100])
def test_a_request_that_may_fit_waits_for_the_claim_and_looks_again(tight: tuple[Machine, Budget], left: int) -> None:
    machine, _ = tight
    answers: list[str] = []
    looking = threading.Event()

    def clock() -> int:
        if threading.current_thread() is thread:
            looking.set()
        return 0

    tested = Budget(machine.root / "proc", machine.root, clock=clock)

    def ask() -> None:
        try:
            tested.check(60 * MIB)
            answers.append("promised")
        except NoMemoryError:
            answers.append("refused")

    thread = threading.Thread(target=ask)
    with tested.claim(50 * MIB):
        thread.start()
        looking.wait()
        with tested._lock:  # free once the look is over and the thread waits
            assert answers == []
            machine.available(left * MIB)  # what the claim's allocation leaves, or leaves when it failed
    thread.join()
    assert answers == ["promised" if left == 100 else "refused"]


def test_a_claim_ends_when_its_block_raises(tight: tuple[Machine, Budget]) -> None:
    with pytest.raises(KeyError), tight[1].claim(90 * MIB):
        raise KeyError
    tight[1].check(90 * MIB)


def test_two_claims_are_never_promised_the_same_bytes(tight: tuple[Machine, Budget]) -> None:
    """Four threads take and give back 40 of 100 MiB; the sum that is taken never exceeds them."""
    tested = tight[1]
    guard = threading.Lock()
    taken = most = 0

    def work() -> None:
        nonlocal taken, most
        for _ in range(50):
            with tested.claim(40 * MIB):
                with guard:
                    taken += 40
                    most = max(most, taken)
                with guard:
                    taken -= 40

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most in (40, 80)


def test_small_claims_are_not_counted(tight: tuple[Machine, Budget]) -> None:
    with tight[1].claim(SMALL):
        allows_exactly(tight[1], 100 * MIB)


def test_reset_forgets_what_the_parent_claimed_and_was_granted(machine: Machine) -> None:
    machine.available(10 * GIB)
    tested = machine.budget()
    with tested.claim(6 * GIB):
        tested.reset()
        tested.check(6 * GIB)
    tested.check(9 * GIB)


# ----------------------------------------------------------------- this one


def test_this_machine_has_a_page_left() -> None:
    budget.check(4 * KIB)
    with budget.claim(4 * KIB):
        pass


def test_this_machine_has_no_exbibyte() -> None:
    with pytest.raises(NoMemoryError):
        budget.check(1 << 60)


def test_a_forked_child_has_no_claim_of_its_parent() -> None:
    with budget.claim(2 * MIB):
        pid = os.fork()
        if pid == 0:
            os._exit(len(budget._default._claims))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
