"""Whether other people's weights are those that a model of ours needs."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mmvit.errors import UserError


def refuse_misfits(expected: Mapping[str, Sequence[int]], weights: Mapping[str, Tensor], whose: str) -> None:
    """Raises UserError that names the `weights` which are missing, unexpected, or not of the shape that
    `expected` says, `whose` they are first."""
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is unexpected" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{whose} do not fit: {'; '.join(problems[:5])}{more}")
