"""Rows that come to the host's memory to be changed there, from wherever they wait: the device, or files of this rank.

    device -> pinned memory -> device          file -> memory -> file          what is in host memory is where it is

A GPU's copies have streams of their own. Bytes a rank moves: of what is fetched, once here; of what is put, once back. Communicates
nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rowwise.parallel.device import device_of
from rowwise.parallel.row_file import RowFile


class HostRows:
    """Brings rows of `device`, and of `files`, to the host and back. `states`: which of the files new states are laid down in; None:
    they are in host memory."""

    def __init__(self, device: torch.device, files: Sequence[RowFile], states: RowFile | None):
        self.files, self._states = files, states
        self._copies = device_of(device).copies()

    def lay(self, t: Tensor) -> Tensor:
        """Returns a tensor of the same numbers that waits in the file of states, or in host memory. Raises OSError where the disk is
        full."""
        return t.cpu() if self._states is None else self._states.lay(t)

    def fetch(self, there: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begins to bring contiguous tensors here; what is returned waits for them, and gives them. What is in host memory is given as
        it is. It raises OSError where a file cannot be read."""
        coming = [self._bring(t) for t in there]
        return lambda: [bring() for bring in coming]

    def put(self, here: Sequence[Tensor], there: Sequence[Tensor]) -> Callable[[], None]:
        """Begins to bring what was fetched back to where it lies; what is returned waits for that, and raises OSError where a file
        cannot be written."""
        going = [self._take(mine, t) for mine, t in zip(here, there, strict=True) if mine is not t]

        def leave() -> None:
            for wait in going:
                wait()

        return leave

    def close(self) -> None:
        """Ends what works for it, and frees the files once nothing lies in them."""
        for file in self.files:
            file.close()

    def _bring(self, t: Tensor) -> Callable[[], Tensor]:
        if t.device.type != "cpu":
            here, mark = self._copies.away(t)

            def copied(t: Tensor = t) -> Tensor:  # which lives until it is copied
                mark.synchronize()
                return here

            return copied
        if (file := self._file_of(t)) is None:
            return lambda: t
        reading = file.fetch([t])
        return lambda: reading.result()[0]

    def _take(self, here: Tensor, t: Tensor) -> Callable[[], None]:
        if t.device.type != "cpu":
            return self._copies.over(here, t).synchronize
        file = self._file_of(t)
        assert file is not None, "it was fetched from there"
        return file.put([here], [t]).result

    def _file_of(self, t: Tensor) -> RowFile | None:
        return next((file for file in self.files if file.holds(t)), None)
