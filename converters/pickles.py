"""Reads files of torch.save and safetensors as data: tensors, containers and plain values; nothing in them is run.

torch's own reader with `weights_only` refuses every name of code in a pickle that it does not know. Checkpoints name
classes beside their weights, above all `argparse.Namespace` and numbers of numpy. Those that are listed here become
objects without content, so not even their constructors run; any other name is an error.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint, safe_globals

from converters.foreign_files import foreign_kind
from converters.zip_records import OverlapError, Records
from dsr_tool.errors import FormatError, join_words
from dsr_tool.files import require_file
from dsr_tool.formats.tensor_file import is_safetensors
from dsr_tool.sparse.in_file import CAN_MAP

__all__ = ["read_file", "without_tensors"]

_START_BYTES = 16
"""Bytes of a file that are read to recognise safetensors."""
_ZIP = b"PK\x03\x04"
"""First bytes of a zip file, which torch.save has written since 1.6."""

_MODULES = ("torch.nn.modules.", "torch.nn.parallel.", "torchvision.models.", "timm.")
"""Starts of names that only the pickle of a whole network has."""


_SPLIT = ("torch.distributed.",)
"""Starts of names of tensors that several processes share."""
_SHOWN, _SHOWN_KEY = 4, 40
"""Largest number of keys that a sentence lists, and largest number of characters of each."""


class _Ignored:
    """Stands for an object beside the weights, of which nothing is read."""

    def __new__(cls, *_: object) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Forgets what the pickle would give to the object."""


class _Array(_Ignored):
    """Stands for an array of numpy, so that a file of arrays is told from one without values."""


class _Items(OrderedDict[object, object]):
    """Stands for a mapping beside the weights, or around them: it becomes an `OrderedDict` of its items."""

    def __new__(cls, *_: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        # torch's reader puts items only into objects of exactly this type.
        return OrderedDict()


class _Elements(list[object]):
    """Stands for a sequence beside the weights: it becomes a list of its elements."""

    def __new__(cls, *_: object) -> list[object]:  # type: ignore[misc]
        return []


_IGNORED = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "range", "str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "timedelta", "timezone")),
    # Python 3.13 moved the classes of pathlib.
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("", "Posix", "Windows")),
    *(f"{module}.Pure{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("", "Posix", "Windows")),
    "numpy.dtype",
    "numpy.ndarray",
    # numpy 2 renamed its core.
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"numpy.dtypes.{name}DType" for name in ("Bool", "Float16", "Float32", "Float64", "Int32", "Int64", "UInt8")),
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "SCMode")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Float", "Integer", "String")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    "typing.Any",
    "torch.torch_version.TorchVersion",
)
"""Classes and functions that checkpoints name beside their weights: of Python, numpy, mmengine and omegaconf."""

_MAPPINGS = (
    "collections.defaultdict",
    "easydict.EasyDict",
    "fvcore.common.config.CfgNode",
    "yacs.config.CfgNode",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
)
"""Dictionaries of other packages that checkpoints name."""


def read_file(path: Path) -> object:
    """Returns the content of a file that `torch.save` or safetensors wrote.

    Returns:
        Tensors on the CPU in containers, as they were saved; objects beside them without their content.

    Raises:
        FileError: the file does not exist.
        FormatError: it is damaged, holds a whole network or a TorchScript archive, or names code that is not listed.
    """
    require_file(path, "--weights file")
    # Before it is read: some of these would be read as something else.
    if kind := foreign_kind(path):
        raise FormatError(f"--weights file {str(path)!r} {kind}.")
    try:
        return _read(path)
    except OverlapError as error:
        raise FormatError(f"--weights file {str(path)!r} {error}") from error
    except Exception as error:  # a damaged pickle or zip may raise anything in its reader
        raise FormatError(f"--weights file {str(path)!r} {_reason(path, error)}") from error


def without_tensors(content: object) -> str:
    """Returns what a file without tensors holds, and what to do, as in "holds a list; ..."."""
    arrays = _count_arrays(content)
    if arrays:
        return (
            f"holds {arrays} arrays of numpy and no tensors; save them as tensors: torch.save({{name: "
            f"torch.from_numpy(array) for name, array in state.items()}}, FILE)."
        )
    if isinstance(content, (list, tuple)) and any(isinstance(entry, dict) for entry in content):
        number = next(number for number, entry in enumerate(content) if isinstance(entry, dict))
        return (
            f"holds a {type(content).__name__}; save the weights in it: torch.save(torch.load(FILE, "
            f"weights_only=True)[{number}], OTHER)."
        )
    keys = [repr(str(key)[:_SHOWN_KEY]) for key in list(content)[:_SHOWN]] if isinstance(content, dict) else []
    what = f"the keys {join_words(keys, 'and')}" if keys else f"an object of type {type(content).__name__}"
    return f"holds no state_dict of tensors but {what}; save the weights: torch.save(model.state_dict(), FILE)."


def _count_arrays(content: object) -> int:
    """Returns the number of arrays of numpy in nested mappings and lists."""
    seen: set[int] = set()
    found, left = 0, [content]
    while left:
        one = left.pop()
        if isinstance(one, _Array):
            found += 1
        elif isinstance(one, (dict, list, tuple)) and id(one) not in seen:
            seen.add(id(one))  # a file may nest one object in itself
            left.extend(one.values() if isinstance(one, dict) else one)
    return found


def _read(path: Path) -> object:
    # By content: files of either kind are called `.bin`. torch.load gets the open file, since it goes by names as well.
    with path.open("rb") as file, warnings.catch_warnings(), _listed():
        start = file.read(_START_BYTES)
        if is_safetensors(start):
            return load_file(path)
        warnings.simplefilter("ignore")  # about unusual pickles, which are refused if they hold no state_dict
        records = Records.of(file) if start.startswith(_ZIP) else None
        if CAN_MAP and records is not None and records.plain:
            # As a map, so that a conversion can leave the weights in the file. This needs a path, in UTF-8.
            content = torch.load(f"/proc/self/fd/{file.fileno()}", map_location="cpu", weights_only=True, mmap=True)
            if records.require_own(content):
                return content
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def _listed() -> Iterator[None]:
    """Lets torch's reader take the listed names, and leaves names that the user has allowed as they are."""
    stand_ins: list[tuple[Callable[..., object], str]] = [
        *((_Ignored, name) for name in _IGNORED),
        *((_Items, name) for name in _MAPPINGS),
        (_Elements, "collections.deque"),
        *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    ]
    with safe_globals([entry for entry in stand_ins if entry not in get_safe_globals()]):
        yield


def _reason(path: Path, error: Exception) -> str:
    """Returns why a file cannot be read, and what to do."""
    names = _refused_names(path, error)
    if any(name.startswith(_SPLIT) for name in names):
        return (
            "holds tensors that are split between processes; gather them where it was made: "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True))."
        )
    if any(name.startswith(_MODULES) for name in names):
        return (
            "holds a whole network, whose code would have to be imported and run; load it where it was made, and save "
            "its weights alone: torch.save(model.state_dict(), FILE)."
        )
    if names:
        return (
            f"names code, {names[0][:80]!r}, which is never run; it is hostile, or keeps objects beside its weights. "
            f"If you trust it, save its weights alone: torch.save(model.state_dict(), FILE)."
        )
    return (
        "cannot be read as a state_dict: it is damaged, or was written neither by torch.save with its usual protocol "
        "nor by safetensors."
    )


def _refused_names(path: Path, error: Exception) -> list[str]:
    """Returns the names of code for which a pickle was refused."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        with _listed():
            names = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001 - it reads only zip files, and those without a scratch
        names = []
    told = re.search(r"GLOBAL (\S+)", str(error))
    return [*([told[1]] if told else []), *names]
