"""Read pickles of other makers without running them.

A pickle names classes and functions, and asks the reader to call them and to set attributes. Here each name that may
stand in a pickle leads to an object of this module that only keeps what it is given, and neither copies nor hashes it;
no name leads to anything of torch's, of Python's, or of the program's. The result is made of dictionaries, lists,
tuples, texts, bytes, numbers and `Record` objects, which the caller looks at with `type(x) is ...`.
"""

import io
import pickle
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar


class _Fixed(type):
    """The type of classes without attributes that can be set: a pickle can ask for that as well."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of a class")

    def __delattr__(cls, name: str) -> None:
        raise pickle.UnpicklingError(f"it deletes {name} of a class")


# The most arguments of a class, and of a function: a pickled path passes each of its parts as one. The limits bound
# memory, because a pickle can ask for many calls, and each call copies its arguments.
_MOST_ARGUMENTS = 8
_MOST_PARTS = 255


class Record(metaclass=_Fixed):
    """Keeps the arguments and the state of an object of another class."""

    __slots__ = ("arguments", "state")
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "Record":
        """Keep the arguments."""
        if len(arguments) > _MOST_ARGUMENTS:
            raise pickle.UnpicklingError(f"{len(arguments)} arguments of a class")
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state


def record(name: str) -> type[Record]:
    """Return a class that stands for the class `name` of another package."""
    made: type[Record] = _Fixed(name, (Record,), {"__slots__": ()})  # type: ignore[assignment]
    return made


class Function(metaclass=_Fixed):
    """Stands for a function of another package; calls `work` in its place. It has no attribute that can be set."""

    __slots__ = ("_work",)
    _work: Callable[..., Any]

    def __init__(self, work: Callable[..., Any]) -> None:
        object.__setattr__(self, "_work", work)

    def __call__(self, *arguments: Any) -> Any:
        """Do the work."""
        if len(arguments) > _MOST_PARTS:
            raise pickle.UnpicklingError(f"{len(arguments)} arguments of a function")
        return self._work(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse."""
        raise pickle.UnpicklingError(f"it sets {name} of a function")

    def __setstate__(self, state: Any) -> None:
        """Refuse."""
        raise pickle.UnpicklingError("it gives a state to a function")


class Ordered(dict[Any, Any], metaclass=_Fixed):
    """Stands for OrderedDict, which can have attributes (a state dict has); they are left out.

    It begins empty: Python 3 writes its items as instructions of their own.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Leave the attributes out."""


# The type that an instruction's operand must have, and the operand's position from the top of the stack (None: the item
# before the last mark). Arguments must be a tuple: to unpack a tensor would create a tensor for each element.
_MEANT_FOR: dict[bytes, tuple[type | tuple[type, ...], int | None]] = {
    pickle.REDUCE: (tuple, 1),
    pickle.NEWOBJ: (tuple, 1),
    pickle.BUILD: ((Record, Ordered), 2),
    pickle.SETITEM: (dict, 3),
    pickle.SETITEMS: (dict, None),
    pickle.APPEND: (list, 2),
    pickle.APPENDS: (list, None),
    pickle.ADDITEMS: (set, None),
}


# What an instruction hashes, of the stack since the last mark. The hash of a tuple visits all that lies in it: for one
# that holds another twice, and so on, it never ends; for a deep one it overflows the stack of the processor.
_HASHED: dict[bytes, Callable[[list[Any]], list[Any]]] = {
    pickle.SETITEM: lambda stack: stack[-2:-1],
    pickle.SETITEMS: lambda stack: stack[::2],
    pickle.DICT: lambda stack: stack[::2],
    pickle.ADDITEMS: lambda stack: stack,
    pickle.FROZENSET: lambda stack: stack,
}


class _Inert(pickle._Unpickler):
    """Python's own unpickler in Python. The one in C allocates memory for as many objects as a pickle claims."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes, known: Mapping[tuple[str, str], Any], load_storage: Any, encoding: str) -> None:
        super().__init__(io.BytesIO(content), encoding=encoding)
        # Python 3 writes bytes in these ways in the protocols of Python 2.
        empty = Function(lambda: b"")
        bytes_of_python_2 = {
            ("_codecs", "encode"): Function(self._encode),
            ("__builtin__", "bytes"): empty,
            ("builtins", "bytes"): empty,
        }
        self._known = {**bytes_of_python_2, **known}
        self._load_storage = load_storage
        self._left_to_encode = len(content)

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function; refuse what is not known."""
        try:
            return self._known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it") from None

    def get_extension(self, code: int) -> Any:
        """Refuse classes by number: what a number means depends on the modules that the program has loaded."""
        raise pickle.UnpicklingError(f"a class by its number ({code}) has no place in it")

    def persistent_load(self, pid: Any) -> Any:
        """Return a tensor's storage, which lies beside the pickle."""
        if self._load_storage is None:
            raise pickle.UnpicklingError("a reference to another file has no place in it")
        return self._load_storage(pid)

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"encoding {reprlib.repr(encoding)} has no place in it")
        # A pickle can ask for one text again and again.
        self._left_to_encode -= len(text)
        if self._left_to_encode < 0:
            raise pickle.UnpicklingError("it would grow without end")
        return str.encode(text, "latin1")

    def load_refused(self) -> None:
        """Refuse instructions that no file needs: they call in other ways, or set aside as many bytes as they say."""
        raise pickle.UnpicklingError("an instruction that has no place in it")

    dispatch |= dict.fromkeys(b"".join((pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.BYTEARRAY8)), load_refused)


def _guarded(instruction: bytes) -> Callable[[Any], None]:
    """Return a handler that runs an instruction if its operand has an allowed type and its keys are safe to hash."""
    work = pickle._Unpickler.dispatch[instruction[0]]
    kinds, depth = _MEANT_FOR.get(instruction, (object, 1))

    def guarded(unpickler: Any) -> None:
        if instruction in _MEANT_FOR:
            meant = unpickler.metastack[-1][-1] if depth is None else unpickler.stack[-depth]
            if not isinstance(meant, kinds):
                raise pickle.UnpicklingError(f"it has an instruction for a {type(meant).__name__}")
        for key in _HASHED.get(instruction, lambda stack: [])(unpickler.stack):
            # A number's hash is made anew each time, and that of a large one can be any other's.
            if not isinstance(key, str | bytes | int | float | Record | None) or (
                isinstance(key, int | float) and abs(key) >= 2**60
            ):
                raise pickle.UnpicklingError(f"a key that is a {type(key).__name__}")
        work(unpickler)

    return guarded


_Inert.dispatch |= {instruction[0]: _guarded(instruction) for instruction in _MEANT_FOR | _HASHED}


def unpickle(
    content: bytes,
    known: Mapping[tuple[str, str], Any],
    load_storage: Callable[[Any], Any] | None = None,
    encoding: str = "ASCII",
) -> Any:
    """Return what a pickle holds.

    Args:
        content: the pickle.
        known: what stands for each (module, name) that it may have: a `Function`, a class made by `record`, or a
            constant that has no attributes to set.
        load_storage: called with a persistent id, returns what it refers to; None where there are none.
        encoding: of strings that Python 2 wrote; "bytes" leaves them bytes.

    Raises:
        Exception: the pickle is damaged, or names something that is not known.
    """
    return _Inert(content, known, load_storage, encoding).load()
