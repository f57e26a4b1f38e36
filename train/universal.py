"""ZeRO's shards of a checkpoint, by parameter again, and dealt anew to any number of processes.

DeepSpeed lays a group of parameters out in one flat fp32 tensor per process, for the weights, each moment and the
average alike:

    ZeRO-1, 2   the parameters one after another, cut into equal parts of even length, the last one padded
    ZeRO-3      of each parameter a part, all parts of one length, padded at the end

Files are memory-mapped, so that what is not asked for is not read, and nothing in them is run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from pixart_fast.weights import write_file
from train.settings import UserError

MASTERS = "fp32"  # beside the optimizer's own names: exp_avg, exp_avg_sq, ema
PICKLED = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]  # DeepSpeed's classes in its files


class Fragment(NamedTuple):
    """Elements `start` to `stop` of a flattened parameter, which begin at `offset` of a process's flat tensor."""

    name: str
    start: int
    stop: int
    offset: int


class Part(NamedTuple):
    """One process's flat tensor: its length, and what is in it."""

    length: int
    fragments: list[Fragment]


def deal(stage: int, sizes: dict[str, int], processes: int) -> list[Part]:
    """How DeepSpeed deals parameters of so many elements to processes."""
    parts = []
    even = -(-sum(sizes.values()) // (2 * processes)) * 2  # it keeps half-precision parts at multiples of 4 bytes
    for rank in range(processes):
        fragments, begin = [], 0
        for name, size in sizes.items():
            if stage == 3:
                share = -(-size // processes)
                start, stop = min(rank * share, size), min((rank + 1) * share, size)
                fragments.append(Fragment(name, start, stop, begin))
                begin += share
            else:
                start, stop = max(rank * even - begin, 0), min((rank + 1) * even - begin, size)
                if start < stop:
                    fragments.append(Fragment(name, start, stop, begin + start - rank * even))
                begin += size
        parts.append(Part(begin if stage == 3 else even, fragments))
    return parts


def read_state(path: Path) -> dict[str, Any]:
    """What DeepSpeed wrote to a file, memory-mapped."""
    with torch.serialization.safe_globals(PICKLED):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


class Shards:
    """The weights and the optimizer's state in a checkpoint that ZeRO-1, 2 or 3 wrote.

    Args:
        state: the folder with DeepSpeed's files.
        stage, processes: of the run that wrote it.

    Attributes:
        groups: the parameters' shapes by name, by the groups in which they are laid out.
        kinds: what there is of each parameter: "fp32", and after the first update "exp_avg", "exp_avg_sq", "ema".

    Raises UserError where the shards are not laid out as `deal` says.
    """

    def __init__(self, state: Path, stage: int, processes: int):
        self.stage, self.processes = stage, processes
        self.model_file = next(iter(sorted(state.glob("*mp_rank_00_model_states.pt"))))
        self.files = [next(iter(state.glob(f"*zero_pp_rank_{i}_mp_rank_00_optim_states.pt"))) for i in range(processes)]
        self.base, self.masters = "base_optimizer_state", "single_partition_of_fp32_groups"
        if stage == 3:
            self.base, self.masters = "optimizer_state_dict", "fp32_flat_groups"
        self.groups: list[dict[str, torch.Size]] = read_state(self.model_file)["param_shapes"]
        self.shards = [read_state(file)["optimizer_state_dict"] for file in self.files]
        entry = self.shards[0][self.base]["state"].get(0, {})
        self.kinds = [MASTERS, *(kind for kind, value in entry.items() if isinstance(value, Tensor) and value.ndim)]
        self._pieces: list[dict[str, list[tuple[int, Fragment]]]] = []  # by group and parameter, with their processes
        for group in range(len(self.groups)):
            parts = deal(stage, self._sizes(group), processes)
            found, expected = [self._padded(group, rank) for rank in range(processes)], [part.length for part in parts]
            if found != expected:
                raise UserError(
                    f"{state} is laid out in another way than DeepSpeed 0.19 does, {found} elements by process and not "
                    f"{expected}: go on with {processes} process(es) and the DeepSpeed that wrote it."
                )
            pieces = {name: [] for name in self.groups[group]}
            for rank, part in enumerate(parts):
                for fragment in part.fragments:
                    pieces[fragment.name].append((rank, fragment))
            self._pieces.append(pieces)

    def _sizes(self, group: int) -> dict[str, int]:
        return {name: shape.numel() for name, shape in self.groups[group].items()}

    def _padded(self, group: int, rank: int) -> int:
        padding = 0 if self.stage == 3 else self.shards[rank]["group_paddings"][group]
        return self.shards[rank][self.masters][group].numel() + padding

    def _flat(self, group: int, rank: int, kind: str) -> Tensor:
        shard = self.shards[rank]
        return shard[self.masters][group] if kind == MASTERS else shard[self.base]["state"][group][kind]

    def _copy(self, into: Tensor, group: int, kind: str, name: str, start: int) -> None:
        """Fill `into` with a flattened parameter's elements from `start` on."""
        for rank, fragment in self._pieces[group][name]:
            first, last = max(start, fragment.start), min(start + into.numel(), fragment.stop)
            if first < last:
                offset = fragment.offset - fragment.start
                into[first - start : last - start] = self._flat(group, rank, kind)[offset + first : offset + last]

    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Names and whole fp32 tensors, one at a time."""
        for group, shapes in enumerate(self.groups):
            for name, shape in shapes.items():
                tensor = torch.empty(shape)
                self._copy(tensor.view(-1), group, kind, name, 0)
                yield name, tensor

    def write(self, folder: Path, rank: int, processes: int) -> None:
        """The files that process `rank` of `processes` would have saved and will read. OSError on a full disk."""
        optimizer = dict(self.shards[0])
        optimizer.pop("param_slice_mappings", None)  # true of the old shards alone, and not read
        masters, states, paddings = [], {}, []
        for group in range(len(self.groups)):
            sizes = self._sizes(group)
            part = deal(self.stage, sizes, processes)[rank]
            flat = {kind: torch.zeros(part.length) for kind in self.kinds}
            for kind, tensor in flat.items():
                for name, start, stop, offset in part.fragments:
                    self._copy(tensor[offset : offset + stop - start], group, kind, name, start)
            last = self.stage != 3 and rank == processes - 1
            paddings.append(part.length * processes - sum(sizes.values()) if last else 0)
            masters.append(flat.pop(MASTERS)[: part.length - paddings[-1]].clone())
            entry = self.shards[0][self.base]["state"].get(group)
            if entry is not None:  # before the first update there is none
                states[group] = {**entry, **flat}
        optimizer[self.masters] = masters
        optimizer[self.base] = {**optimizer[self.base], "state": states}
        if self.stage == 3:
            optimizer["partition_count"] = processes
        else:
            optimizer |= {"group_paddings": paddings, "partition_count": [processes] * len(self.groups)}
        files = {self.files[0]: {"optimizer_state_dict": optimizer}}
        if rank == 0 or self.stage == 3:
            files[self.model_file] = read_state(self.model_file) | {"dp_world_size": processes}
        for file, content in files.items():
            write_file(content, folder / file.name.replace("pp_rank_0_", f"pp_rank_{rank}_"))
