"""Pickles of plain data, read without Python's unpickler: nothing is imported, called or set, whatever they ask for."""

import pickletools
from typing import Any

import numpy as np
from numpy.typing import NDArray


class PlainPickleError(ValueError):
    """The pickle is damaged, or holds anything but plain data."""


class _Mark:
    """The opcode MARK on the stack."""


class _Name:
    """A function or class that a pickle names: a word, which is compared and never looked up."""

    def __init__(self, module: str, name: str) -> None:
        self.words = f"{module}.{name}"


class _Array:
    """A numpy array, or its dtype, as far as it has been described."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments
        self.state: Any = None


_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.dtype")
_EMPTY_BYTES = ("__builtin__.bytes", "builtins.bytes")
_NAMES = (*_ARRAYS, *_EMPTY_BYTES, "numpy.ndarray", "_codecs.encode")
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_BYTES_OF_PYTHON_2 = ("STRING", "BINSTRING", "SHORT_BINSTRING")  # which pickletools gives as Latin-1 text
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(content: bytes) -> Any:
    """Return what a pickle holds of lists, tuples, dictionaries, text, bytes, numbers and numpy arrays of bytes.

    Text and bytes of Python 2 become bytes. The keys of dictionaries are text, bytes or numbers.

    Raises:
        PlainPickleError: it is damaged, or holds anything else.
    """
    try:
        return _finished(_Reader(content).read())
    except PlainPickleError:
        raise
    except Exception as error:  # pickletools lets through whatever damaged data make it do
        raise PlainPickleError(
            f"a damaged pickle ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


class _Reader:
    """The stack and the memory of a pickle's opcodes."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}
        self.left_to_encode = len(content)

    def read(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.content):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._do(opcode.name, argument)
        raise PlainPickleError("a damaged pickle: it does not end")

    def _do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _NUMBERS or name in _TEXTS or name in _BYTES:
            stack.append(bytes(argument) if name in _BYTES else argument)
        elif name in _BYTES_OF_PYTHON_2:
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_Mark)
        elif name in ("LIST", "TUPLE", "DICT"):
            items = self._since_mark()
            stack.append(items if name == "LIST" else tuple(items) if name == "TUPLE" else _set_items({}, items))
        elif name in _SHORT_TUPLES:
            count = _SHORT_TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [*reversed([stack.pop(), stack.pop()])] if name == "SETITEM" else self._since_mark()
            _set_items(_expect(stack[-1], dict), items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memory[len(self.memory) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memory[argument])
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(_expect(module, str), _expect(attribute, str)))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._made(_expect(function, _Name).words, _expect(arguments, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            _expect(stack[-1], _Array).state = state
        else:
            raise PlainPickleError(f"it asks for {name}, which is no data")

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _Mark:
            items.append(item)
        return items[::-1]

    def _made(self, function: str, arguments: tuple[Any, ...]) -> Any:
        """Return what stands for a call."""
        if function in _ARRAYS:
            return _Array(arguments)
        # The next two are how Python 3 writes bytes in an old protocol.
        if function in _EMPTY_BYTES and not arguments:
            return b""
        if function != "_codecs.encode":
            raise PlainPickleError(f"it calls {function}, which is no data")
        text, encoding = arguments
        if encoding != "latin1":
            raise PlainPickleError(f"encoding {encoding!r}")
        self.left_to_encode -= len(_expect(text, str))
        if self.left_to_encode < 0:
            raise PlainPickleError("it would grow without end")
        return text.encode("latin-1")


def _named(module: str, name: str) -> _Name:
    found = _Name(module, name)
    if found.words not in _NAMES:
        raise PlainPickleError(f"it asks for {found.words[:200]}, which is no data")
    return found


def _set_items(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # A tuple of tuples can take for ever to hash.
        if not isinstance(key, str | bytes | int):
            raise PlainPickleError(f"a key that is a {type(key).__name__}")
        target[key] = value
    return target


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise PlainPickleError(f"a damaged pickle: {type(value).__name__} in the place of {kind.__name__}")
    return value


def _finished(value: Any) -> Any:
    """Return the arrays of a dictionary, or a single one, as numpy's."""
    if isinstance(value, dict):
        return {key: _array(item) if isinstance(item, _Array) else item for key, item in value.items()}
    return _array(value) if isinstance(value, _Array) else value


def _array(described: _Array) -> NDArray[np.uint8]:
    match described.state:
        case (_, tuple(shape), _Array(arguments=(b"u1" | "u1", *_)), False | 0, bytes(content)):
            if all(type(size) is int and size >= 0 for size in shape):
                return np.frombuffer(content, dtype=np.uint8).reshape(shape)
    raise PlainPickleError("an array of anything but bytes in row order")
