"""Taking containers apart and merging fences: the kernel's own tests (semantics 7.3, by their names) and the rules of semantics 3.17."""

import errno
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, DmaFence, DmaFenceArray, DmaFenceChain, Timeline, merge, unwrap
from tests.support.children import Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import key
from tests.support.lines import Here, There


def two(tl: Timeline, other_tl: Timeline) -> tuple[DmaFence, DmaFence]:
    return tl.fence(), other_tl.fence()


@pytest.fixture(params=["here", "there"])
def contexts(request: pytest.FixtureRequest, child: Spawn) -> Iterator[list[list[DmaFence]]]:
    """Fences 1 and 2 of two contexts, the lower one first: of this process, or of two others."""
    lines = [Here(), Here()] if request.param == "here" else [There(child), There(child)]
    yield sorted((line.make(2) for line in lines), key=lambda fences: fences[0].context)
    for line in lines:
        line.end()


@pytest.fixture
def pair(contexts: list[list[DmaFence]]) -> tuple[DmaFence, DmaFence]:
    """The first of each."""
    return contexts[0][0], contexts[1][0]


def done(*lines: Timeline) -> None:
    for line in lines:
        line.close()


# -- semantics 7.3, by name


def test_sanitycheck(pair: tuple[DmaFence, DmaFence]) -> None:
    array = DmaFenceArray(pair)
    chain = DmaFenceChain(None, array, 1)
    pair[0].enable_signaling()
    del array, chain
    assert pair[0].status == 0


def test_unwrap_array(pair: tuple[DmaFence, DmaFence]) -> None:
    assert list(unwrap(DmaFenceArray(pair))) == [*pair]


def test_unwrap_chain(pair: tuple[DmaFence, DmaFence]) -> None:
    f1, f2 = pair
    assert list(unwrap(DmaFenceChain(f1, f2, 1))) == [f2, f1]


def test_unwrap_chain_array(pair: tuple[DmaFence, DmaFence]) -> None:
    assert list(unwrap(DmaFenceChain(None, DmaFenceArray(pair), 1))) == [*pair]


def test_unwrap_merge(pair: tuple[DmaFence, DmaFence]) -> None:
    assert list(unwrap(merge(*pair))) == [*pair]


def test_unwrap_merge_complex(pair: tuple[DmaFence, DmaFence]) -> None:
    f1, f2 = pair
    assert list(unwrap(merge(merge(f1, f2), merge(f2, f1), dmabuf.stub_fence()))) == [f1, f2]


def test_unwrap_merge_duplicate(pair: tuple[DmaFence, DmaFence]) -> None:
    assert list(unwrap(merge(pair[0], pair[0]))) == [pair[0]]


def test_unwrap_merge_seqno(contexts: list[list[DmaFence]]) -> None:
    """The kernel's test has the contexts the other way round; the order of contexts is what counts."""
    (early, _), (late1, late2) = contexts
    assert list(unwrap(merge(late1, late2, early))) == [early, late2]


def test_unwrap_merge_order(pair: tuple[DmaFence, DmaFence]) -> None:
    """Linux 6.13 and later yield both once in any order; 6.8 drops duplicates only from inputs ordered by context (semantics 3.17)."""
    f1, f2 = pair
    array = DmaFenceArray([f1, f2])
    chain = DmaFenceChain(f1, f2, 1)  # unwrapped newest first: f2, f1
    assert list(unwrap(chain)) == [f2, f1]
    # Heads (f1, f2): f1 is the lowest context; (f2, f2): one of them; (-, f1): f1 again.
    assert list(unwrap(merge(array, chain))) == [f1, f2, f1]
    # Ordered by context the other way round, nothing is there twice.
    ordered = DmaFenceChain(f2, f1, 1)
    assert list(unwrap(merge(array, ordered))) == [f1, f2]


def test_unwrap_merge_complex_seqno(contexts: list[list[DmaFence]]) -> None:
    (c01, c02), (c11, c12) = contexts
    assert [fence.seqno for fence in (c01, c02, c11, c12)] == [1, 2, 1, 2]
    merged = merge(DmaFenceArray([c02, c11]), DmaFenceArray([c01, c12]))
    assert list(unwrap(merged)) == [c02, c12]


# -- unwrapping


def test_unwrap_of_a_plain_fence_yields_it_and_of_none_nothing(tl: Timeline) -> None:
    fence = tl.fence()
    assert list(unwrap(fence)) == [fence]
    assert list(unwrap(None)) == []
    fence.signal()
    assert list(unwrap(fence)) == [fence]


def test_unwrap_skips_signaled_points_but_not_members_of_arrays(tl: Timeline) -> None:
    first, second, third, fourth = (tl.fence() for _ in range(4))
    chain = DmaFenceChain(DmaFenceChain(DmaFenceChain(None, first, 1), second, 2), DmaFenceArray([third, fourth]), 3)
    second.signal()
    third.signal()
    assert list(unwrap(chain)) == [third, fourth, first]
    tl.close()


# -- merging


def test_merge_of_one_pending_fence_is_that_fence(tl: Timeline, other_tl: Timeline) -> None:
    f1, f2 = two(tl, other_tl)
    f2.signal()
    assert merge(f1, f2) is f1
    assert merge(f1) is f1
    f1.signal()


def test_merge_of_signalled_fences_is_a_stub_with_the_latest_timestamp(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(3)]
    for i in (0, 2, 1):
        fences[i].signal()
    merged = merge(*fences)
    assert (merged.status, merged.context, merged.seqno, merged.timestamp) == (1, 0, 0, fences[1].timestamp)
    assert merged not in fences


def test_merge_of_nothing_is_a_stub() -> None:
    assert merge().is_signaled()


def test_merge_makes_an_array_with_a_fresh_context_and_seqno_1(tl: Timeline, other_tl: Timeline) -> None:
    f1, f2 = two(tl, other_tl)
    merged = merge(f2, f1)
    assert isinstance(merged, DmaFenceArray)
    assert merged.fences == (f1, f2)
    assert merged.signal_on_any is False
    assert merged.seqno == 1
    assert merged.context not in (tl.context, other_tl.context)
    f1.signal()
    assert merged.wait(0) == 0.0
    f2.signal()
    assert merged.status == 1


def test_merge_drops_the_earlier_of_a_context(tl: Timeline) -> None:
    first, second = tl.fence(), tl.fence()
    assert merge(first, second) is second
    assert merge(second, first) is second
    tl.close()


def test_merge_compares_32_bit_numbers_as_they_wrap() -> None:
    line = Timeline("wraps", seqno64=False)
    before, after = line.fence(seqno=0xFFFFFFFF), line.fence()
    assert after.seqno == 0
    assert merge(before, after) is after
    line.close()


def test_merge_keeps_what_one_input_has_twice(tl: Timeline) -> None:
    """From Linux 6.13 on it would be there once."""
    first, second = tl.fence(), tl.fence()
    array = DmaFenceArray([first, second])
    merged = merge(array)
    assert list(unwrap(merged)) == [first, second]
    tl.close()


def test_merge_of_1_000_fences_keeps_the_order_of_contexts() -> None:
    lines = [Timeline(f"{i}") for i in range(1000)]
    fences = [line.fence() for line in lines]
    merged = merge(*reversed(fences))
    assert list(unwrap(merged)) == fences
    merged.enable_signaling()
    for fence in fences:
        assert not merged.is_signaled()
        fence.signal()
    assert merged.is_signaled()


@pytest.mark.parametrize("what", [None, "fence", 1])
def test_merge_takes_fences_only(tl: Timeline, what: Any) -> None:
    with pytest.raises(TypeError):
        merge(tl.fence(), what)
    tl.close()


def test_merge_of_fences_of_two_domains_is_exdev(tl: Timeline) -> None:
    elsewhere = Timeline("elsewhere", domain=dmabuf.Domain.private())
    with raises_errno(errno.EXDEV):
        merge(tl.fence(), elsewhere.fence())
    done(tl, elsewhere)


def test_inputs_of_merge_stay_as_they_were(tl: Timeline, other_tl: Timeline) -> None:
    f1, f2 = two(tl, other_tl)
    one, other = DmaFenceArray([f1]), DmaFenceArray([f2])
    merge(one, other)
    assert (one.fences, other.fences) == ((f1,), (f2,))
    assert not one.enabled
    done(tl, other_tl)


# -- arrays (3.15)


def test_an_array_ends_with_its_last_member(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(3)]
    array = DmaFenceArray(fences)
    array.enable_signaling()
    for fence in fences:
        assert array.status == 0
        fence.signal()
    assert array.status == 1


def test_an_array_with_signal_on_any_ends_with_its_first_member(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(3)]
    array = DmaFenceArray(fences, signal_on_any=True)
    array.enable_signaling()
    fences[1].signal()
    assert array.status == 1
    fences[0].signal(error=-errno.EIO)
    fences[2].signal()
    assert array.status == 1


@pytest.mark.parametrize("any_", [False, True])
def test_an_array_that_nobody_enabled_polls_as_unsignalled(tl: Timeline, any_: bool) -> None:
    fences = [tl.fence() for _ in range(2)]
    array = DmaFenceArray(fences, any_)
    for fence in fences:
        fence.signal()
    assert not array.is_signaled()
    assert array.status == 0
    assert array.wait(0) > 0  # a wait enables it
    assert array.status == 1


def test_enabling_an_array_whose_members_are_done_signals_it_at_once(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(2)]
    array = DmaFenceArray(fences)
    for fence in fences:
        fence.signal(error=-errno.EIO)
    with raises_errno(errno.ENOENT, FileNotFoundError):
        array.add_callback(lambda _: None)
    assert array.status == -errno.EIO


def test_the_first_failing_member_gives_an_array_its_error(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(4)]
    array = DmaFenceArray(fences)
    array.enable_signaling()
    fences[2].signal()
    fences[1].signal(error=-errno.ENODATA)
    fences[0].signal(error=-errno.EIO)
    assert (array.status, array.error) == (0, 0)
    fences[3].signal()
    assert array.status == -errno.ENODATA


def test_signal_on_any_array_ignores_errors_after_first_signal(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(2)]
    array = DmaFenceArray(fences, signal_on_any=True)
    array.enable_signaling()
    fences[1].signal(error=-errno.EIO)
    fences[0].signal(error=-errno.ENODATA)
    assert array.status == -errno.EIO


def test_an_array_ends_after_the_callbacks_of_its_members(tl: Timeline) -> None:
    fence, order = tl.fence(), []
    array = DmaFenceArray([fence])
    array.add_callback(lambda _: order.append("array"))
    fence.add_callback(lambda _: order.append("member"))
    fence.signal()
    assert order == ["member", "array"]


def test_an_enabled_array_lives_until_its_members_end(tl: Timeline) -> None:
    fence, seen = tl.fence(), []
    DmaFenceArray([fence]).add_callback(lambda array: seen.append(array.status))
    fence.signal()
    assert seen == [1]


def test_an_array_has_the_names_of_the_kernels(tl: Timeline) -> None:
    array = DmaFenceArray([tl.fence()])
    assert array.describe() == "dma_fence_array unbound seq 1 unsignalled\n"
    tl.close()


def test_an_array_without_members_is_einval_and_a_contract_warning() -> None:
    with pytest.raises(ContractWarning):
        DmaFenceArray([])
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        DmaFenceArray([])


@pytest.mark.parametrize("kind", ["array", "chain"])
def test_a_container_inside_of_an_array_is_a_contract_warning(tl: Timeline, kind: str) -> None:
    inner = DmaFenceArray([tl.fence()]) if kind == "array" else DmaFenceChain(None, tl.fence(), 1)
    with pytest.raises(ContractWarning):
        DmaFenceArray([inner])
    tl.close()


@pytest.mark.parametrize("member", [None, 1, "fence"])
def test_an_array_takes_fences_only(member: Any) -> None:
    with pytest.raises(TypeError):
        DmaFenceArray([member])


def test_a_deadline_reaches_every_member(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(3)]
    fences[1].signal()
    DmaFenceArray(fences).set_deadline(7000)
    assert [fence.deadline for fence in fences] == [7000, None, 7000]
    tl.close()


def test_match_context(tl: Timeline, other_tl: Timeline) -> None:
    f1, f2, f3 = tl.fence(), tl.fence(), other_tl.fence()
    assert f1.match_context(tl.context)
    assert not f1.match_context(other_tl.context)
    assert DmaFenceArray([f1, f2]).match_context(tl.context)
    assert not DmaFenceArray([f1, f3]).match_context(tl.context)
    done(tl, other_tl)


def test_first_and_next_of_an_array(tl: Timeline) -> None:
    from dmabuf.core.fence.array import array_first, array_next

    f1, f2 = tl.fence(), tl.fence()
    array = DmaFenceArray([f1, f2])
    assert [array_first(None), array_first(f1), array_first(array)] == [None, f1, f1]
    assert [array_next(array, i) for i in range(3)] == [f1, f2, None]
    assert array_next(f1, 0) is None
    assert array_next(None, 0) is None
    tl.close()


# -- stubs (3.13)


def test_stub() -> None:
    """By the kernel's name (semantics 7.1): 64 stubs, each signalled."""
    stubs = [dmabuf.stub_fence() for _ in range(64)]
    assert all(stub.is_signaled() and stub is stubs[0] for stub in stubs)
    assert (stubs[0].context, stubs[0].seqno, stubs[0].describe()) == (0, 0, "stub stub seq 0 signalled\n")
    assert stubs[0].timestamp > 0


def test_a_private_stub_has_the_timestamp_that_it_is_given() -> None:
    stub = dmabuf.private_stub(12345)
    assert (stub.status, stub.timestamp, stub.context) == (1, 12345, 0)
    assert stub is not dmabuf.stub_fence()
    assert stub != dmabuf.private_stub(12345)


def test_a_private_stub_with_a_negative_time_is_einval() -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.private_stub(-1)


def test_fences_are_named_by_context_and_seqno(tl: Timeline) -> None:
    fence = tl.fence(seqno=5)
    assert key(fence) == (tl.context, 5)
    assert tl.fence().seqno == 6
    tl.close()
