"""Files of torch.save, read without running what stands in them.

DeepSpeed's are pickles, and name a few classes of its own. Each is read as an inert stand-in, which holds what it is given and
does nothing; torch refuses whatever else is named. Tensors are mapped: their numbers stay in the file until they are asked for.
`save` writes stand-ins under the names of the classes that they stand for.
"""

import pickle
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from rowwise.trainer.files import writing


class Inert:
    """Holds the attributes of an object of a class that is not imported."""

    def __init__(self, *given: Any) -> None:
        self.given = given


class Fragment(Inert):
    """Where the numbers of a parameter stand in a flat tensor: `start` and `numel`."""


class Scaler(Inert):
    """A loss scaler."""

    cur_scale: float
    dynamic: bool


class DynamicScaler(Scaler):
    """One that moves: at every `scale_window`th iteration after the first since that which overflowed last."""

    cur_iter: int
    last_overflow_iter: int
    scale_window: int


class Stage(int):
    """A stage of ZeRO."""


STAND_INS: dict[str, type] = {
    "deepspeed.utils.tensor_fragment.fragment_address": Fragment,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Stage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Scaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": DynamicScaler,
    "argparse.Namespace": Inert,  # of Megatron's scripts
}


def load(path: Path) -> Any:
    """Reads a file of torch.save, its tensors mapped on the CPU. Raises ValueError where it cannot be read, or names what no
    checkpoint of DeepSpeed has in it."""
    try:
        with safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            unknown = sorted(get_unsafe_globals_in_checkpoint(path))
            if not unknown:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # of the many that bytes which are no such file make
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no file of torch.save that can be read without running it ({said})") from None
    raise ValueError(
        f"{path} names {', '.join(unknown)}, which no checkpoint of DeepSpeed needs: it may have been made to run code; save it "
        "without (client_state of plain values), or take it from who saved it"
    )


_InPython: Any = pickle._Pickler  # whose steps can be changed
_NAMES = {stand_in: name for name, stand_in in STAND_INS.items()}


class _Pickler(_InPython):
    dispatch: ClassVar = dict(_InPython.dispatch)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj not in _NAMES:
            super().save_global(obj, name)
            return
        module, _, known = _NAMES[obj].rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{known}\n".encode())
        self.memoize(obj)


def save(tree: Any, path: Path) -> None:
    """Writes a file of torch.save, for DeepSpeed to read. Raises DiskFull."""
    module: Any = ModuleType("pickles")  # which is what torch asks for
    module.Pickler = _Pickler
    with writing(path):
        torch.save(tree, path, pickle_module=module)
