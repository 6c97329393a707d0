# SPDX-License-Identifier: Apache-2.0
"""Plain values and tensors in one npz file; reading it runs nothing, and what is damaged is noticed.

The file is NumPy's own: every tensor is a member (of a type NumPy has, the real one is noted), and the member "content"
is JSON that says how they are nested. The zip archive around them has a checksum for each.
"""

import json
import math
import os
import tempfile
import zipfile
from typing import Any, BinaryIO, Callable, Dict, List, Tuple

import numpy as np
import torch

FORMAT = "osaccel.tensors/1"
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# Types that NumPy does not have travel as whole numbers of the same size.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (type(None), bool, int, str)


class Damaged(Exception):
    """The file is not what was written; the message says what is wrong."""


def write(path: str, content: Any, seal: str = "") -> None:
    """Write nested dicts, lists and tuples of plain values, tensors and arrays, whole or not at all.

    Args:
        seal: what `read` must be given too: a name for what the content belongs to.

    Raises:
        TypeError: something in it has no plain form.
        OSError: the file cannot be written.
    """
    packer = _Packer()
    manifest = {"format": FORMAT, "seal": seal, "value": packer.packed(content), "dtypes": packer.dtypes}
    text = json.dumps(manifest, allow_nan=False)
    arrays: Dict[str, Any] = {"content": np.frombuffer(text.encode(), np.uint8), **packer.arrays}
    write_whole(path, lambda file: np.savez(file, **arrays))


def read(path: str, seal: str = "") -> Any:
    """What `write` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: it is not whole, not of this format, or has another seal.
    """
    with open(path, "rb") as file:
        try:
            return _read(file, seal)
        # A flipped bit may surface as any of zipfile's, NumPy's, json's and torch's exceptions. All mean the same here.
        except Exception as error:
            raise Damaged(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def _read(file: BinaryIO, seal: str) -> Any:
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise Damaged(f"the checksum of {broken} does not fit")
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        manifest = json.loads(arrays["content"].tobytes().decode())
        if manifest["format"] != FORMAT or manifest["seal"] != seal:
            raise Damaged(f"it is {manifest['format']} of another search")
        return _Unpacker(arrays, manifest["dtypes"]).unpacked(manifest["value"])


def write_whole(path: str, write_to: Callable[[BinaryIO], Any]) -> None:
    """Call `write_to(file)` so that `path` holds all of it or what it held before, after a loss of power too."""
    handle, temporary = tempfile.mkstemp(suffix=".part", dir=os.path.dirname(os.path.abspath(path)))
    try:
        with os.fdopen(handle, "wb") as file:
            write_to(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_directory(path)


def sync_directory(path: str) -> None:
    """Make the name of a file that was just renamed or made as lasting as its content, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError:
        # Some network file systems have no such thing; then this is as good as it gets.
        pass
    finally:
        os.close(handle)


class _Packer:
    """Turns nested values into JSON and arrays. A tensor that stands there twice is written once."""

    def __init__(self) -> None:
        self.arrays: Dict[str, np.ndarray] = {}
        self.dtypes: Dict[str, str] = {}
        self._known: Dict[int, Tuple[str, Any]] = {}

    def packed(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, list):
            return [self.packed(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self.packed(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": [[self.packed(key), self.packed(item)] for key, item in value.items()]}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._named(value, self._of_tensor)}
        if isinstance(value, np.generic):
            return self.packed(value.item())
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return {"array": self._named(value, lambda array, _: array)}
        return self._packed_of_torch(value)

    def _packed_of_torch(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value)}
        if isinstance(value, torch.Generator):
            return {"generator": [str(value.device), self.packed(value.get_state())]}
        raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} has no plain form to be stored in")

    def _named(self, value: Any, array_of: Callable[[Any, str], np.ndarray]) -> str:
        if id(value) not in self._known:
            name = f"t{len(self._known)}"
            # The value is kept, or another one could get its id.
            self._known[id(value)] = name, value
            self.arrays[name] = array_of(value, name)
        return self._known[id(value)][0]

    def _of_tensor(self, tensor: torch.Tensor, name: str) -> np.ndarray:
        self.dtypes[name] = str(tensor.dtype)
        plain = tensor.detach().cpu().contiguous()
        try:
            return plain.numpy()
        except TypeError:
            return plain.view(_BITS[plain.element_size()]).numpy()


class _Unpacker:
    """The way back."""

    def __init__(self, arrays: Any, dtypes: Dict[str, str]):
        self.arrays, self.dtypes = arrays, dtypes
        self._known: Dict[str, torch.Tensor] = {}

    def unpacked(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.unpacked(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        return getattr(self, f"_{kind}")(content)

    def _float(self, content: str) -> float:
        return float(content)

    def _tuple(self, content: List[Any]) -> Tuple[Any, ...]:
        return tuple(self.unpacked(item) for item in content)

    def _dict(self, content: List[Any]) -> Dict[Any, Any]:
        return {self.unpacked(key): self.unpacked(item) for key, item in content}

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._known:
            self._known[name] = torch.from_numpy(self.arrays[name]).view(_DTYPES[self.dtypes[name]])
        return self._known[name]

    def _array(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def _device(self, content: str) -> torch.device:
        return torch.device(content)

    def _dtype(self, content: str) -> torch.dtype:
        return _DTYPES[content]

    def _generator(self, content: List[Any]) -> torch.Generator:
        device, state = content
        generator = torch.Generator(device)
        generator.set_state(self.unpacked(state))
        return generator
