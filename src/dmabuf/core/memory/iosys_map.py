"""``IosysMap``: an address together with whether it is system or I/O memory.

``vmap`` returns one, and it says how its users may touch the bytes. The kernel's is a tagged pointer. Here a map references the buffer
whose memory it points into, so that the memory can't go while the map is set, and knows where that memory ends.

*Who may call what.* A map belongs to its holder, and has no lock. Two threads that change one map need a lock of their own.

*Identity.* Two maps are equal when both the kind and the address are the same. So a system and an I/O mapping never are, not even two NULL
ones. The address is where this process sees the memory, unless another one is given.

*Errors.* EINVAL: an argument has the wrong size, sign or kind. EFAULT: bytes outside of the mapping, or a NULL map; nothing is touched
where the kernel would fault. EACCES: a write to memory that is mapped read-only. TypeError: not a buffer, not an int.

Numbers are in the machine's byte order and need no alignment. ``ctypes`` structures describe fields.

Source: semantics 1.11, include/linux/iosys-map.h (called ``dma_buf_map`` before commit 7938f421).
"""

from __future__ import annotations

import ctypes
import errno
import operator
import struct
from typing import TYPE_CHECKING, Final, Literal, NoReturn, TypeAlias

from dmabuf._native import buffer_address
from dmabuf.errors import fail

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["IosysMap", "Width"]

Width: TypeAlias = Literal["u8", "u16", "u32", "u64"]

_WIDTHS: Final = {"u8": struct.Struct("@B"), "u16": struct.Struct("@H"), "u32": struct.Struct("@I"), "u64": struct.Struct("@Q")}
_INTEGERS: Final = {code: struct.Struct("@" + code) for code in "bBhHiIlLqQ"}


class IosysMap:
    """A mapping of memory: NULL at first, set by ``set_vaddr`` or ``set_vaddr_iomem``.

    ``vaddr``, ``vaddr_iomem``: the bytes from the address to the end of the mapping as a memoryview; None when the map is NULL or of the
    other kind.

    Kernel: iosys_map (vaddr, vaddr_iomem, is_iomem).
    """

    __slots__ = ("_address", "_is_iomem", "_memory", "_position")

    def __init__(self) -> None:
        self._memory: memoryview | None = None
        self._address = 0  # of the first byte of _memory
        self._position = 0
        self._is_iomem = False

    @classmethod
    def init_vaddr(cls, memory: ReadableBuffer | None, *, address: int | None = None) -> IosysMap:
        """Return a map of system memory. Arguments and errors are those of :meth:`set_vaddr`.

        Kernel: IOSYS_MAP_INIT_VADDR.
        """
        new = cls()
        new.set_vaddr(memory, address=address)
        return new

    @classmethod
    def init_vaddr_iomem(cls, memory: ReadableBuffer | None, *, address: int | None = None) -> IosysMap:
        """Return a map of I/O memory. Arguments and errors are those of :meth:`set_vaddr`.

        Kernel: IOSYS_MAP_INIT_VADDR_IOMEM.
        """
        new = cls()
        new.set_vaddr_iomem(memory, address=address)
        return new

    @classmethod
    def init_offset(cls, map_: IosysMap, offset: int) -> IosysMap:
        """Return a map ``offset`` bytes into another, which stays as it is. The errors are those of :meth:`incr`.

        Kernel: IOSYS_MAP_INIT_OFFSET.
        """
        new = map_.copy()
        new.incr(offset)
        return new

    def copy(self) -> IosysMap:
        """Return another map of the same address and kind (assignment of the structure in C)."""
        new = type(self)()
        new.assign(self)
        return new

    def assign(self, other: IosysMap) -> None:
        """Take the address and kind of another map."""
        self._memory, self._address, self._position, self._is_iomem = other._memory, other._address, other._position, other._is_iomem

    __copy__ = copy

    def set_vaddr(self, memory: ReadableBuffer | None, *, address: int | None = None) -> None:
        """Point to system memory.

        Args:
            memory: A contiguous buffer of at least one byte, which the map references until it is set again or cleared; None is NULL.
            address: Its identity, a positive int, if that isn't the address of the buffer in this process.

        Raises:
            InvalidError: The buffer is empty or not contiguous, or the address is not positive or given with None (EINVAL). The map is
                unchanged.

        Kernel: iosys_map_set_vaddr.
        """
        self._set(memory, address, False)

    def set_vaddr_iomem(self, memory: ReadableBuffer | None, *, address: int | None = None) -> None:
        """Point to I/O memory. Arguments and errors are those of :meth:`set_vaddr`.

        Kernel: iosys_map_set_vaddr_iomem.
        """
        self._set(memory, address, True)

    def clear(self) -> None:
        """Make the map NULL and of the system kind, and drop its buffer.

        Kernel: iosys_map_clear.
        """
        self._memory, self._address, self._position, self._is_iomem = None, 0, 0, False

    def is_null(self) -> bool:
        """Return True if the address of the active kind is NULL.

        Kernel: iosys_map_is_null.
        """
        return self._memory is None

    def is_set(self) -> bool:
        """Return True if the address of the active kind is not NULL.

        Kernel: iosys_map_is_set.
        """
        return self._memory is not None

    def is_equal(self, other: IosysMap) -> bool:
        """Return True if kind and address are the same. Raises TypeError for anything else than a map.

        Kernel: iosys_map_is_equal.
        """
        if not isinstance(other, IosysMap):
            raise TypeError(f"is_equal compares with an IosysMap, not {type(other).__name__}")
        return self._is_iomem == other._is_iomem and self.address == other.address

    def __eq__(self, other: object) -> bool:
        return self.is_equal(other) if isinstance(other, IosysMap) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it changes under its holder

    @property
    def address(self) -> int:
        """The address that the map points to, 0 for NULL."""
        return self._address + self._position

    @property
    def is_iomem(self) -> bool:
        """Whether it is I/O memory."""
        return self._is_iomem

    @property
    def vaddr(self) -> memoryview | None:
        """System memory from the address on; None when NULL or I/O memory."""
        return None if self._memory is None or self._is_iomem else self._memory[self._position :]

    @property
    def vaddr_iomem(self) -> memoryview | None:
        """I/O memory from the address on; None when NULL or system memory."""
        return None if self._memory is None or not self._is_iomem else self._memory[self._position :]

    def incr(self, n: int) -> None:
        """Advance the address by ``n`` bytes, at most to the end of the mapping.

        Raises:
            InvalidError: ``n`` is negative (EINVAL).
            DmaBufError: The map is NULL, or ``n`` goes beyond the end (EFAULT). The map is unchanged.

        Kernel: iosys_map_incr.
        """
        _, self._position = self._range("incr", n, 0)

    def memcpy_to(self, dst_offset: int, src: ReadableBuffer, length: int | None = None) -> None:
        """Copy the first ``length`` bytes of ``src`` (None: all of it) to ``dst_offset``.

        Raises:
            InvalidError: A number is negative, or ``src`` is shorter or not contiguous (EINVAL).
            DmaBufError: The bytes are outside of the mapping (EFAULT).
            NotPermittedError: The memory is read-only (EACCES).

        Kernel: iosys_map_memcpy_to.
        """
        source = _flat("memcpy_to", src)
        length = _count("memcpy_to", "length", len(source) if length is None else length)
        if length > len(source):
            _invalid("memcpy_to", f"the source has {len(source)} bytes, not {length}", "pass a smaller length")
        memory, start = self._range("memcpy_to", dst_offset, length, write=True)
        memory[start : start + length] = source[:length]

    def memcpy_from(self, dst: WriteableBuffer, src_offset: int, length: int | None = None) -> None:
        """Copy ``length`` bytes from ``src_offset`` to the start of ``dst`` (None: as many as ``dst`` takes).

        Raises:
            InvalidError: A number is negative, or ``dst`` is shorter, read-only or not contiguous (EINVAL).
            DmaBufError: The bytes are outside of the mapping (EFAULT).

        Kernel: iosys_map_memcpy_from.
        """
        target = _flat("memcpy_from", dst)
        length = _count("memcpy_from", "length", len(target) if length is None else length)
        if length > len(target):
            _invalid("memcpy_from", f"the destination has {len(target)} bytes, not {length}", "pass a smaller length")
        if target.readonly:
            _invalid("memcpy_from", "the destination is read-only", "pass a writable buffer")
        memory, start = self._range("memcpy_from", src_offset, length)
        target[:length] = memory[start : start + length]

    def memset(self, offset: int, value: int, length: int) -> None:
        """Set ``length`` bytes from ``offset`` to ``value``, 0 to 255.

        Raises:
            InvalidError: A number is negative, or ``value`` is not a byte (EINVAL).
            DmaBufError: The bytes are outside of the mapping (EFAULT).
            NotPermittedError: The memory is read-only (EACCES).

        Kernel: iosys_map_memset.
        """
        value = operator.index(value)
        if not 0 <= value <= 255:
            _invalid("memset", f"{value} is not a byte", "pass 0 to 255")
        length = _count("memset", "length", length)
        memory, start = self._range("memset", offset, length, write=True)
        memory[start : start + length] = bytes((value,)) * length

    def rd(self, offset: int, type_: Width) -> int:
        """Return the number of a kind ("u8", "u16", "u32" or "u64") at ``offset``.

        Raises:
            InvalidError: ``offset`` is negative, or the kind is unknown (EINVAL).
            DmaBufError: The bytes are outside of the mapping (EFAULT).

        Kernel: iosys_map_rd.
        """
        return self._read("rd", offset, _width("rd", type_))

    def wr(self, offset: int, type_: Width, value: int) -> None:
        """Store ``value`` as a number of a kind ("u8", "u16", "u32" or "u64") at ``offset``.

        Raises:
            InvalidError: ``offset`` is negative, the kind is unknown, or the value doesn't fit (EINVAL).
            DmaBufError: The bytes are outside of the mapping (EFAULT).
            NotPermittedError: The memory is read-only (EACCES).

        Kernel: iosys_map_wr.
        """
        self._write("wr", offset, _width("wr", type_), value)

    def rd_field(self, struct_offset: int, struct_type: type[ctypes.Structure], field: str) -> int:
        """Return an integer field of a structure.

        Args:
            struct_offset: Where the structure begins.
            struct_type: A ctypes.Structure in the machine's byte order.
            field: The name, "a" or "a.b".

        Raises:
            InvalidError: ``struct_offset`` is negative; the field doesn't exist, or is a bit field, not an integer, or of the other byte
                order (EINVAL).
            DmaBufError: The bytes are outside of the mapping (EFAULT).

        Kernel: iosys_map_rd_field.
        """
        offset, number = _field("rd_field", struct_type, field)
        return self._read("rd_field", _count("rd_field", "offset", struct_offset) + offset, number)

    def wr_field(self, struct_offset: int, struct_type: type[ctypes.Structure], field: str, value: int) -> None:
        """Store ``value`` in a field of a structure. Arguments and errors are those of :meth:`rd_field` and :meth:`wr`.

        Kernel: iosys_map_wr_field.
        """
        offset, number = _field("wr_field", struct_type, field)
        self._write("wr_field", _count("wr_field", "offset", struct_offset) + offset, number, value)

    def __repr__(self) -> str:
        kind = "iomem" if self._is_iomem else "system"
        if self._memory is None:
            return f"<IosysMap NULL, {kind}>"
        return f"<IosysMap {self.address:#x}, {kind}, {len(self._memory) - self._position} bytes>"

    def _set(self, memory: ReadableBuffer | None, address: int | None, is_iomem: bool) -> None:
        operation = "set_vaddr_iomem" if is_iomem else "set_vaddr"
        if memory is None:
            if address is not None:
                _invalid(operation, "an address without memory", "pass the memory too, or neither")
            self._memory, self._address, self._position, self._is_iomem = None, 0, 0, is_iomem
            return
        view = _flat(operation, memory)
        if len(view) == 0:
            _invalid(operation, "an empty buffer has no address", "pass None for NULL")
        if address is None:
            address = buffer_address(view)
        elif (address := operator.index(address)) <= 0:
            _invalid(operation, f"address {address} is not positive", "pass a positive address, or none")
        self._memory, self._address, self._position, self._is_iomem = view, address, 0, is_iomem

    def _range(self, operation: str, offset: int, length: int, *, write: bool = False) -> tuple[memoryview, int]:
        """Return the memory, and where ``offset`` is in it, with ``length`` bytes there."""
        offset = _count(operation, "offset", offset)
        memory = self._memory
        if memory is None:
            raise fail(errno.EFAULT, operation, self, "set the map first", what="the address is NULL")
        start = self._position + offset
        if length > len(memory) - start:
            raise fail(
                errno.EFAULT, operation, self, "stay inside the mapping", what=f"{length} bytes at {offset} are outside of the mapping"
            )
        if write and memory.readonly:
            raise fail(errno.EACCES, operation, self, "map the buffer writable", what="the memory is read-only")
        return memory, start

    def _read(self, operation: str, offset: int, number: struct.Struct) -> int:
        memory, start = self._range(operation, offset, number.size)
        value: int = number.unpack_from(memory, start)[0]
        return value

    def _write(self, operation: str, offset: int, number: struct.Struct, value: int) -> None:
        value = operator.index(value)
        try:
            packed = number.pack(value)
        except struct.error:
            _invalid(operation, f"{value} doesn't fit in {number.size} bytes", "use a wider kind")
        memory, start = self._range(operation, offset, number.size, write=True)
        memory[start : start + number.size] = packed


def _invalid(operation: str, what: str, remedy: str | None = None) -> NoReturn:
    raise fail(errno.EINVAL, operation, "IosysMap", remedy, what=what)


def _count(operation: str, name: str, value: int) -> int:
    value = operator.index(value)
    if value < 0:
        _invalid(operation, f"{name} {value} is negative", "pass 0 or more")
    return value


def _flat(operation: str, buffer: ReadableBuffer) -> memoryview:
    view = memoryview(buffer)
    if not view.c_contiguous:
        _invalid(operation, "the buffer is not contiguous", "pass a contiguous one")
    return view.cast("B")


def _width(operation: str, type_: str) -> struct.Struct:
    number = _WIDTHS.get(type_)
    if number is None:
        _invalid(operation, f"{type_!r} is not a kind of number", f"pass one of {', '.join(_WIDTHS)}")
    return number


def _field(operation: str, struct_type: type[ctypes.Structure], field: str) -> tuple[int, struct.Struct]:
    """Return the offset in the structure, and the number format, of an integer field."""
    checked: object = struct_type
    if not (isinstance(checked, type) and issubclass(checked, ctypes.Structure)):
        raise TypeError(f"{operation} needs a ctypes.Structure class, not {struct_type!r}")
    offset = 0
    current: object = struct_type
    for name in field.split("."):
        entry = _entry(current, name)
        if entry is None:
            _invalid(operation, f"{struct_type.__name__} has no field {field!r}", "name a field of the structure")
        if len(entry) > 2:
            _invalid(operation, f"{struct_type.__name__}.{field} is a bit field", "name a whole integer")
        if hasattr(current, "_swappedbytes_"):
            _invalid(operation, f"{struct_type.__name__}.{field} is not in the machine's byte order", "use ctypes.Structure")
        offset += getattr(current, name).offset
        current = entry[1]
    # Pointers and arrays have a _type_ too, which is a class.
    code = getattr(current, "_type_", None)
    number = _INTEGERS.get(code) if isinstance(code, str) else None
    if number is None:
        _invalid(operation, f"{struct_type.__name__}.{field} is not an integer", "name an integer field")
    return offset, number


def _entry(struct_type: object, name: str) -> tuple[object, ...] | None:
    """Return the entry of ``name`` in the ``_fields_`` of a structure, or of one that it extends."""
    for kind in getattr(struct_type, "__mro__", ()):
        for entry in vars(kind).get("_fields_", ()):
            if entry[0] == name:
                return tuple(entry)
    return None
