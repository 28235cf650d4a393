"""What a file or folder is that holds no state dict: told by its bytes and its parts."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Sequence
from contextlib import suppress

# What the bytes begin with, what they are, the way out.
_BEGINS = (
    (b"version https://git-lfs", "a git-lfs pointer", "Fetch the file: `git lfs pull`."),
    (b"GGUF", "a GGUF file of llama.cpp", "Pass the checkpoint it was converted from."),
    (b"\x89HDF", "an HDF5 file, as Keras writes", "Save a PyTorch state_dict."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it."),
    (b"<", "a web page", "Download the file itself."),
    (b"\x08", "a protocol buffer, such as ONNX", "Save the state_dict it was made from."),
    (b"\x93NUMPY", "a NumPy array", "Save tensors by name: `torch.save(dict, path)`."),
)
# What a name inside an archive ends with, below its first folder.
_EXPORTED = (
    "a torch.export program, which was not executed",
    "Save `torch.export.load(path).state_dict`.",
)
_HOLDS = (
    (
        "code/",
        "a TorchScript program, which was not executed",
        "Save `torch.jit.load(path).state_dict()`.",
    ),
    ("archive_format", *_EXPORTED),
    ("serialized_exported_program.json", *_EXPORTED),  # until PyTorch 2.7
    ("model.weights.h5", "a Keras model", "Save a PyTorch state_dict."),
    (".npy", "NumPy arrays", "Save tensors by name: `torch.save(dict, path)`."),
)
# What a name in a folder ends with.
_BESIDE = (
    (
        ".distcp",
        "shards of torch.distributed.checkpoint",
        "Join them: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`.",
    ),
    ("zero_to_fp32.py", "shards of DeepSpeed", "Join them with its zero_to_fp32.py."),
    (
        ("adapter_model.safetensors", "adapter_model.bin"),
        "an adapter without its network",
        "Save `model.merge_and_unload()`.",
    ),
    (
        ("tf_model.h5", ".msgpack", ".ckpt.index"),
        "weights of another framework",
        "Convert them with transformers.",
    ),
)


def kind_of(content: bytes) -> tuple[str, str] | None:
    """What these bytes are, if they are known, and the way out."""
    for begin, what, advice in _BEGINS:
        if content.startswith(begin):
            return what, advice
    with suppress(zipfile.BadZipFile):
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        parts = [name.partition("/")[2] or name for name in names]
        for end, what, advice in _HOLDS:
            if any(p.startswith(end) or p.endswith(end) for p in parts):
                return what, advice
    return None


def folder_of(names: Sequence[str]) -> tuple[str, str] | None:
    """What a folder with these names is, if it is known, and the way out."""
    for end, what, advice in _BESIDE:
        if any(name.endswith(end) for name in names):
            return what, advice
    return None


def first_global(content: bytes) -> str | None:
    """The first name a bare pickle would import; nothing is executed."""
    texts: list[str] = []
    with suppress(Exception):  # no pickle
        for code, argument, _ in pickletools.genops(content):
            if code.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if code.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if isinstance(argument, str):
                texts.append(argument)
    return None
