"""Errors keep the kernel's number, its builtin twin and their text, in every process."""

from __future__ import annotations

import ast
import errno
import gc
import multiprocessing
import os
import pickle
import re
import warnings
import weakref
from pathlib import Path

import pytest

from dmabuf import errors
from dmabuf.errors import DmaBufError, contract_warning, errno_name, fail, missing_extra

NUMBERS = sorted(errno.errorcode)


def test_every_error_is_an_oserror_of_its_number_and_of_the_builtin_twin() -> None:
    for number in NUMBERS:
        error = fail(number, "lock", "buffer 3")
        assert isinstance(error, DmaBufError)
        assert isinstance(error, type(OSError(number, ""))), errno_name(number)
        assert error.errno == number


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EDEADLK, errors.DeadlockError),
        (errno.EALREADY, errors.AlreadyHeldError),
        (errno.EOWNERDEAD, errors.OwnerDeadError),
        (errno.ECANCELED, errors.CanceledError),
        (errno.EXDEV, errors.CrossDomainError),
        (errno.EBADF, errors.ClosedError),
        (errno.ENOSPC, errors.NoSpaceError),
        (errno.ENOMEM, errors.NoMemoryError),
        (errno.ENOTUNIQ, errors.NotUniqueError),
        (errno.ENODEV, errors.NoDeviceError),
        (errno.EINVAL, errors.InvalidError),
        (errno.EINTR, errors.InterruptedWaitError),
        (errno.ETIMEDOUT, errors.DmaBufTimeout),
        (errno.ENOENT, errors.NotFoundError),
        (errno.EPERM, errors.NotPermittedError),
        (errno.EACCES, errors.NotPermittedError),
        (errno.EAGAIN, errors.WouldBlockError),
        (errno.EBUSY, errors.BusyError),
        (errno.EEXIST, errors.ExistsError),
        (errno.ESRCH, errors.NoProcessError),
        (errno.ENOTTY, DmaBufError),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_a_number_has_one_class(number: int, kind: type[DmaBufError]) -> None:
    assert type(fail(number, "lock", "buffer 3")) is kind


def test_einval_is_no_value_error() -> None:
    assert not isinstance(fail(errno.EINVAL, "poll", "buffer 3"), ValueError)


def test_enomem_is_no_memory_error() -> None:
    assert not isinstance(fail(errno.ENOMEM, "allocate", "buffer 3"), MemoryError)


def test_the_message_names_operation_object_error_and_remedy() -> None:
    error = fail(errno.EDEADLK, "read", "buffer 3", "use dmabuf.access()")
    assert str(error) == f"read: buffer 3: {os.strerror(errno.EDEADLK)} (EDEADLK); use dmabuf.access()"
    assert error.strerror == str(error)
    assert (error.operation, error.remedy) == ("read", "use dmabuf.access()")


def test_the_message_without_a_remedy_ends_with_the_number() -> None:
    assert str(fail(errno.EBADF, "close", "buffer 3")).endswith("(EBADF)")


def test_what_replaces_the_text_of_the_c_library() -> None:
    assert str(fail(errno.EINVAL, "open", "domain", what="it is torn")) == "open: domain: it is torn (EINVAL)"


def test_a_number_without_a_name_is_kept() -> None:
    error = fail(4095, "lock", "buffer 3")
    assert error.errno == 4095
    assert "errno 4095" in str(error)


@pytest.mark.parametrize("name", ["EAGAIN", "EDEADLK", "EOPNOTSUPP"])
def test_a_number_with_two_names_has_the_kernels(name: str) -> None:
    assert errno_name(getattr(errno, name)) == name


@pytest.mark.parametrize("number", [0, -errno.EDEADLK])
def test_a_number_that_is_not_positive_is_a_value_error(number: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        fail(number, "lock", "buffer 3")


def test_an_error_keeps_no_reference_to_its_object() -> None:
    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    error = fail(errno.EBUSY, "detach", thing)
    del thing
    gc.collect()
    assert gone() is None
    assert error.errno == errno.EBUSY


def test_an_error_made_without_a_number_still_has_a_text() -> None:
    assert str(DmaBufError("text")) == "text"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling(protocol: int) -> None:
    for number in NUMBERS:
        error = fail(number, "lock", "buffer 3", "try again")
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is type(error)
        assert (copy.errno, str(copy), copy.operation, copy.remedy) == (number, str(error), "lock", "try again")


def _raise(number: int) -> None:
    raise fail(number, "lock", "buffer 3", "try again")


def test_an_error_is_the_same_in_the_process_that_asked() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        with pytest.raises(errors.DeadlockError, match="try again") as caught:
            pool.apply(_raise, (errno.EDEADLK,))
        pool.close()
        pool.join()
    assert caught.value.errno == errno.EDEADLK


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = {}
    for name, rest in re.findall(r"[├└]── (\w+)(.*)", errors.__doc__):
        twin = re.search(r"also (\w+)", rest)
        drawn[name] = (set(re.findall(r"\bE[A-Z]+\b", rest)), twin.group(1) if twin else None)
    made: dict[str, tuple[set[str], str | None]] = {}
    for number, kind in errors._CLASSES.items():
        twins = [base.__name__ for base in kind.__bases__ if base is not DmaBufError]
        made.setdefault(kind.__name__, (set(), twins[0] if twins else None))[0].add(errno_name(number))
    assert {name: drawn[name] for name in made} == made
    others = drawn.keys() - made.keys()
    assert others == {"DmaBufError", "ContractError", "ContractWarning", "ExtraMissingError", "KeptWarning"}
    assert {*made, *others} <= set(errors.__all__)


def test_a_contract_error_is_a_runtime_error() -> None:
    assert issubclass(errors.ContractError, RuntimeError)


def test_a_contract_warning_points_at_the_line_that_asks() -> None:
    with pytest.warns(errors.ContractWarning, match="broken") as caught:
        contract_warning("broken rule")
    assert caught[0].filename == __file__


def test_a_contract_warning_points_at_the_caller_with_a_stacklevel_of_two() -> None:
    def operation() -> None:
        contract_warning("broken rule", stacklevel=2)

    with pytest.warns(errors.ContractWarning) as caught:
        operation()  # this line
    with open(__file__, encoding="utf-8") as source:
        assert source.readlines()[caught[0].lineno - 1].strip() == "operation()  # this line"


def test_a_contract_warning_can_be_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.ContractWarning)
        with pytest.raises(errors.ContractWarning):
            contract_warning("broken rule")


def test_a_missing_extra_names_what_to_install() -> None:
    error = missing_extra("torch", "torch.cuda")
    assert isinstance(error, ImportError)
    assert (error.extra, error.name) == ("torch", "torch.cuda")
    assert "pip install 'dmabuf[torch]'" in str(error)


def test_a_missing_extra_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(missing_extra("torch", "torch.cuda")))
    assert (error.extra, error.name, str(error)) == ("torch", "torch.cuda", str(missing_extra("torch", "torch.cuda")))


def test_every_einval_says_what_is_wrong() -> None:
    """The C library's text, "Invalid argument", doesn't tell which argument it is."""
    silent = []
    for path in sorted(Path(errors.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fail" and node.args:
                if ast.unparse(node.args[0]) == "errno.EINVAL" and "what" not in {keyword.arg for keyword in node.keywords}:
                    silent.append(f"{path.name}:{node.lineno}")
    assert silent == []


def test_einval_of_the_kernel_says_who_refuses() -> None:
    assert str(errors.fail(errno.EINVAL, "begin", "a buffer")) == "begin: a buffer: the kernel refuses an argument (EINVAL)"
