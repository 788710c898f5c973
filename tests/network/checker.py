"""What became of a run, by its trajectory log and its weights: what it says is not believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is wrong with a run; all 0 where nothing is."""

    lost: int
    """Rollouts that were never trained on."""
    doubled: int
    """Rollouts that were trained on more than once."""
    unequal: int
    """Tensors of the policy that differ from those of the untroubled run, in a bit."""


def judge(run: Path, untroubled: Path, *, iterations: int, batch: int) -> Verdict:
    """Compare a finished run with one that nothing happened to.

    Args:
        run: its folder.
        untroubled: likewise.
        iterations: of both.
        batch: rollouts of each.
    """
    trained = Counter[str]()
    for number in range(iterations):
        path = run / "trajectories" / f"iteration-{number:06d}.parquet"
        if path.exists():
            trained.update(pq.read_table(path, columns=["rollout_id"])["rollout_id"].to_pylist())
    return Verdict(
        lost=iterations * batch - len(trained),
        doubled=sum(count - 1 for count in trained.values()),
        unequal=_differing(_policy(run), _policy(untroubled)),
    )


def _policy(run: Path) -> Mapping[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted((run / "policy").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _differing(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> int:
    names = ours.keys() | theirs.keys()
    assert names, "there are no weights to compare"
    return sum(
        name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
        for name in names
    )
