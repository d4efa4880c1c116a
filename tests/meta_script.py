"""A short meta-training for tests that kill it or run it in several processes.

Run as `python meta_script.py CHECKPOINT RESULT STEPS`; the first process writes the result.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from discrete.learned import RNNprop
from discrete.learned.families import LogisticFamily
from discrete.learned.training import MetaLoss, meta_train

FAMILY = LogisticFamily(6, 8, ridge=0.05, targets=(0.3, 0.1))


def main() -> None:
    checkpoint, result, steps = sys.argv[1:4]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    learned = RNNprop(5)
    meta_train(
        learned,
        FAMILY,
        validation=FAMILY.draw(8, seed=10**6),
        validate_every=3,
        checkpoint=None if checkpoint == "-" else checkpoint,
        loss=MetaLoss(stopping=0.1),
        steps=int(steps),
        batch=16,
        horizon=(6, 12),
        segment=5,
        seed=1,
    )
    # Threads that the group left behind would abort the process at its exit, now and then.
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1
    if int(os.environ.get("RANK", "0")) == 0:
        # Written beside and renamed: the test may look at any time.
        beside = Path(result).with_suffix(".part")
        torch.save(learned.state_dict(), beside)
        os.replace(beside, result)


if __name__ == "__main__":
    main()
