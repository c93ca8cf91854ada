"""Adapter files of an ONNX export, checked and ready for ONNX Runtime: one is chosen for each request.

Rules that ONNX Runtime does not enforce are enforced here: one adapter at a time (with two active it takes the first
and says nothing), an adapter's names, types and shapes are those of the graph's inputs, and it belongs to the same base
(its `model_version` is the base's hash).

Reading a file whole, for its hash and its tensors, takes milliseconds for each megabyte, so it is done while an export
is opened. The first request finds the file as it was checked (same size, time and inode) and has it mapped into memory,
which takes one millisecond; a file that has changed since is checked anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from rankwise.errors import RequestError, did_you_mean
from rankwise.export.onnx_folder import Manifest
from rankwise.files import sha256_file

FACTORS = (".lora_A", ".lora_B")


@final
class AdapterFiles:
    """The adapters of an export, by name."""

    def __init__(self, folder: Path, manifest: Manifest, inputs: Mapping[str, Any]) -> None:
        """`inputs`: the graph's inputs that have a default, which are the adapter's, by name."""
        self.folder = folder
        self.manifest = manifest
        self.inputs = dict(inputs)
        self._options: dict[str, tuple[Any, Any]] = {}
        self._checked: dict[Path, tuple[int, ...]] = {}

    def check(self, names: Sequence[str]) -> None:
        """Reads these adapters and checks them, so that their first use need not.

        Raises: RequestError for one that is not there, can't be read, has changed, belongs to another base, or does not
        fit.
        """
        for name in names:
            path, sha256 = self._place(name)
            self._check_file(path, sha256)

    def options(self, adapters: Sequence[str]) -> Any:
        """ONNX Runtime's run options with the adapter active; None for no adapter.

        Raises: RequestError for more than one, and as `check`.
        """
        if len(adapters) > 1:
            raise RequestError(
                f"one adapter at a time, not {len(adapters)} ({', '.join(adapters)}): ONNX Runtime would take the "
                "first and leave the others out; combine them into one adapter first"
            )
        if not adapters:
            return None
        [name] = adapters
        if name not in self._options:
            self.add(name, *self._place(name))
        return self._options[name][0]

    def add(self, name: str, file: str | Path, sha256: str | None = None) -> None:
        """Takes an adapter file, which may lie outside of the folder, and gives it a name.

        Raises: RequestError, as `check`.
        """
        import onnxruntime

        path = Path(file)
        if not path.is_file() or self._checked.get(path) != _state(path):
            self._check_file(path, sha256)
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(path))
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        self._options[name] = (options, adapter)

    def forget(self, name: str) -> None:
        """Lets go of an adapter; the next use takes its file again."""
        self._options.pop(name, None)

    def _place(self, name: str) -> tuple[Path, str]:
        """The file and the hash that the manifest states."""
        if name not in self.manifest.adapters:
            raise RequestError(f"there is no adapter '{name}'{did_you_mean(name, self.manifest.adapters)}")
        entry = self.manifest.adapters[name]
        return self.folder / entry.file, entry.sha256

    def _check_file(self, path: Path, sha256: str | None) -> None:
        import onnxruntime

        if not path.is_file():
            raise RequestError(f"there is no adapter file '{path}'")
        before = _state(path)
        if sha256 is not None and sha256_file(path) != sha256:
            raise RequestError(f"'{path}' is not the file that was written (its SHA-256 differs); copy it again")
        try:
            formats: Any = onnxruntime.AdapterFormat
            content = formats.read_adapter(str(path))
            version = content.get_model_version()
            parameters = content.get_parameters()
        except Exception as error:  # noqa: BLE001 (the package raises its own kinds, and RuntimeError)
            raise RequestError(f"'{path}' is not an ONNX Runtime adapter that can be read: {error}") from None
        if version != self.manifest.version:
            raise RequestError(
                f"adapter '{path}' belongs to another base (model version {version}, this export's is "
                f"{self.manifest.version}); export it with this base"
            )
        self._check_parameters(str(path), parameters)
        self._checked[path] = before

    def _check_parameters(self, path: str, parameters: dict[str, Any]) -> None:
        """Raises: RequestError for a name, type or shape that the graph has no input for."""
        for name, value in parameters.items():
            if name not in self.inputs:
                raise RequestError(f"adapter '{path}' holds '{name}', for which this graph has no input")
            node = self.inputs[name]
            if value.data_type() != node.type:
                raise RequestError(f"adapter '{path}': '{name}' is {value.data_type()}, the graph takes {node.type}")
            shape = value.shape()
            fits = len(shape) == len(node.shape) and all(
                not isinstance(wanted, int) or wanted == given for wanted, given in zip(node.shape, shape, strict=True)
            )
            if not fits:
                raise RequestError(f"adapter '{path}': '{name}' is {list(shape)}, the graph takes {list(node.shape)}")
        layers = {name.rpartition(".")[0] for name in parameters if name.endswith(FACTORS)}
        for layer in sorted(layers):
            down, up = (parameters.get(f"{layer}{suffix}") for suffix in FACTORS)
            if down is None or up is None or down.shape()[1] != up.shape()[0]:
                raise RequestError(f"adapter '{path}': lora_A and lora_B of '{layer}' are not of one rank")


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written again or replaced."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev
