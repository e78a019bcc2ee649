"""Jobs of a merge: bytes to copy, or a block of rows to compute."""

from dataclasses import dataclass

from lora_export.checkpoint.hashing import TensorHash, hash_range
from lora_export.errors import CheckpointError
from lora_export.merging.planning.plan import PlannedTensor
from lora_export.merging.running.tensor import TensorWork
from lora_export.storage.disk import copy_range, start_writing_back
from lora_export.storage.workers import OpenFile

STRETCH = 2**20  # bytes that are copied, and then hashed


@dataclass(frozen=True)
class Copy:
    """`length` bytes of the tensor `name`, from `start` of one open file to `at` of another."""

    name: str
    source: OpenFile
    start: int
    length: int
    out: OpenFile
    at: int
    pieces: "Pieces"
    cost: int = 0

    def run(self) -> int:
        try:
            for done in range(0, self.length, STRETCH):
                length = min(STRETCH, self.length - done)
                copy_range(self.source.fd, self.start + done, length, self.out.fd, self.at + done)
                if self.pieces.hash is not None:  # the bytes are still in the processor's cache
                    at = self.start + done - self.pieces.start
                    hash_range(self.source.fd, self.start + done, length, self.pieces.hash, at)
        except EOFError:
            raise CheckpointError("the file ended early", where=self.source.path, tensor=self.name) from None
        except OSError as error:  # the kernel does not say which of the two it was
            error.filename, error.filename2 = str(self.source.path), str(self.out.path)
            raise
        start_writing_back(self.out.fd, self.at, self.length)
        return self.length


@dataclass
class Pieces:
    """A tensor that is copied: where its bytes begin in the base's file, how many pieces are left, their hash."""

    tensor: PlannedTensor
    start: int
    left: int
    hash: TensorHash | None


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a tensor to `at` of an open file."""

    work: TensorWork
    start: int
    stop: int
    out: OpenFile
    at: int
    cost: int

    def run(self) -> int:
        import torch

        data = self.work.compute(self.start, self.stop).reshape(-1).view(torch.uint8).numpy().data
        if self.work.hash_out is not None:
            row = len(data) // (self.stop - self.start)
            self.work.hash_out.add(self.start * row, data)
        self.out.write(data, self.at)
        return len(data)
