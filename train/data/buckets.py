"""Which samples make which step, where a batch comes from one aspect-ratio bucket.

Nothing here has a state: a step's bucket and samples follow from the seed and the step's number, so that all processes
and all loader workers agree without a word, and a run that goes on in the middle of an epoch needs the number alone.

A bucket is a stream: its n samples in an order drawn anew for every pass, pass after pass, cut into batches of r. After
e epochs it has given floor(e·n / r) of them, whatever is left begins the next. So a bucket is drawn as often as its
share of the samples asks, each of its samples once a pass, and none is dropped; where a pass ends within a batch, the
next one fills it. The batches of an epoch come in an order drawn anew for every epoch.
"""

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np

from train.settings import UserError


class BucketBatches:
    """The batches of a run over buckets of samples.

    Args:
        sizes: how many samples each bucket has; the order of the keys has no influence, and empty ones are left out.
        rows: samples of a batch, over all processes: one number, or one for each bucket (`rows_by_tokens`).
        seed: the run's.

    Raises UserError where no bucket has samples.
    """

    def __init__(self, sizes: Mapping[str, int], rows: Mapping[str, int] | int, seed: int):
        self.keys = sorted(key for key, size in sizes.items() if size)
        if not self.keys:
            raise UserError("there are no samples to train on: look at what the extraction left out.")
        self.sizes = [sizes[key] for key in self.keys]
        self.rows = [rows if isinstance(rows, int) else rows[key] for key in self.keys]
        if min(self.rows) < 1:
            raise ValueError(f"a batch has at least one row, got {dict(zip(self.keys, self.rows, strict=True))}.")
        self.seed = seed
        # After so many epochs some bucket has given a batch, and as many more for each further one.
        self._patience = min(-(-rows // size) for size, rows in zip(self.sizes, self.rows, strict=True))
        self._epoch = -1
        self._order = np.empty(0, np.int64)  # of the epoch: which bucket gives its batches, one after the other
        self._passes: dict[int, dict[int, np.ndarray]] = {}  # of each bucket, those that its last batch was cut from

    def batch(self, step: int) -> tuple[str, np.ndarray]:
        """Optimizer step `step` (from 0): a bucket's key and its samples, int64 `[rows]`, as positions in the bucket.

        A sample comes twice in a batch only where the batch reaches into another pass of its bucket.
        """
        epoch = bisect_right(range((step + 1) * self._patience + 1), step, key=self._total) - 1
        if epoch != self._epoch:
            counts = np.subtract(self._given(epoch + 1), self._given(epoch))
            order = np.repeat(np.arange(len(self.keys)), counts)
            self._epoch, self._order = epoch, self._generator("epoch", epoch).permutation(order)
        place = step - self._total(epoch)
        bucket = int(self._order[place])
        number = self._given(epoch)[bucket] + int(np.count_nonzero(self._order[:place] == bucket))
        return self.keys[bucket], self._cut(bucket, number * self.rows[bucket])

    def _given(self, epochs: int) -> list[int]:
        """How many batches each bucket has given after some epochs."""
        return [epochs * size // rows for size, rows in zip(self.sizes, self.rows, strict=True)]

    def _total(self, epochs: int) -> int:
        return sum(self._given(epochs))

    def _cut(self, bucket: int, start: int) -> np.ndarray:
        """A batch of a bucket's stream, from its sample number `start` on."""
        size = self.sizes[bucket]
        passes, places = np.divmod(np.arange(start, start + self.rows[bucket]), size)
        known = self._passes.get(bucket, {})
        orders = {
            number: known[number] if number in known else self._pass(bucket, number)
            for number in range(int(passes[0]), int(passes[-1]) + 1)
        }
        self._passes[bucket] = orders
        return np.concatenate([order[places[passes == number]] for number, order in orders.items()]).astype(np.int64)

    def _pass(self, bucket: int, number: int) -> np.ndarray:
        """The order of a bucket's samples in one pass: for 14 million a second, and 56 MB while it lasts."""
        samples = np.arange(self.sizes[bucket], dtype=np.uint32)
        return self._generator(f"bucket {self.keys[bucket]}", number).permutation(samples)

    def _generator(self, name: str, number: int) -> np.random.Generator:
        """Draws for the `number`-th of something that has a name."""
        entropy = (self.seed, int.from_bytes(name.encode()), number)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def rows_by_tokens(tokens: Mapping[str, int], budget: int, multiple: int) -> dict[str, int]:
    """Samples of a batch of each bucket: as many as have `budget` image tokens together, over all processes.

    Args:
        tokens: image tokens of one sample of each bucket.
        multiple: what the samples must divide by, processes times accumulation.

    Raises UserError where the budget does not reach for one sample in each part.
    """
    longest = max(tokens, key=tokens.__getitem__)
    if budget < multiple * tokens[longest]:
        raise UserError(
            f"a budget of {budget} tokens is too small: {multiple} samples of bucket {longest}, one for each part of "
            f"each process, have {multiple * tokens[longest]}; give as many or more."
        )
    return {key: budget // (count * multiple) * multiple for key, count in tokens.items()}
