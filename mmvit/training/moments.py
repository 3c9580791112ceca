"""What an optimizer remembers, by the names of parameters: for every engine and number of processes."""

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from torch import Tensor, nn

from mmvit.errors import UserError, shorten
from mmvit.files import read_json, write_json
from mmvit.training.distributed import Processes
from mmvit.training.optim import Optimizer
from mmvit.weights import read_weights

MOMENTS, DESCRIPTION = "moments.safetensors", "optimizer.json"
STEP = "step"  # of the state: a number for each parameter, not a tensor like it


def moments_of(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a plain optimizer's state as `exp_avg/core.blocks.0.mlp.up.weight`, and so on."""
    names = {id(parameter): (name, parameter.shape) for name, parameter in model.named_parameters()}
    found = {}
    for part in optimizer.parts:
        of_matrix = {id(matrix): id(kernel) for kernel, matrix in getattr(part, "kernels", ())}
        for parameter, state in part.state.items():
            name, shape = names[of_matrix.get(id(parameter), id(parameter))]
            for key, value in state.items():
                found[f"{key}/{name}"] = value if key == STEP else value.view(shape)
    return found


def set_moments(optimizer: Optimizer, model: nn.Module, moments: Iterable[tuple[str, Tensor]]) -> None:
    """Sets a plain optimizer's state to what `moments_of` has found."""
    places = {}
    for part in optimizer.parts:
        of_kernel = {id(kernel): matrix for kernel, matrix in getattr(part, "kernels", ())}
        trained = {id(each) for group in part.param_groups for each in group["params"]}
        for name, parameter in model.named_parameters():
            own = of_kernel.get(id(parameter), parameter)
            if id(own) in trained:
                places[name] = part, own
    for name, tensor in moments:
        key, _, parameter = name.partition("/")
        part, own = places[parameter]
        value = tensor if key == STEP else tensor.reshape(own.shape)
        part.state[own][key] = value.to(own.device, copy=True)


def write_optimizer(optimizer: Optimizer, folder: Path) -> None:
    write_json({"name": optimizer.config.name}, folder / DESCRIPTION)


def check_optimizer(folder: Path, optimizer: Optimizer, processes: Processes) -> None:
    """Raises UserError if the checkpoint is of another optimizer."""

    def check() -> None:
        if not (folder / DESCRIPTION).is_file():
            raise UserError(
                f"{folder} was written under DeepSpeed by an earlier version of mmvit: go on with that "
                "version, or start a new run from the weights in last/ with --start.model"
            )
        description = read_json(folder / DESCRIPTION)
        name = description.get("name") if isinstance(description, dict) else None
        if name != optimizer.config.name:
            raise UserError(
                f"the checkpoint was trained with {name}, but optimizer.name is now "
                f"{optimizer.config.name}: set it back"
            )

    processes.on_main(check)


def sent_one_by_one(
    path: Path, processes: Processes, check: Callable[[dict[str, tuple[int, ...]]], None]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of weights, which the main process alone reads; all must go through them.

    Args:
        check: raises UserError for names and shapes that do not fit.
    """

    weights = {}

    def names() -> list[str]:
        nonlocal weights
        weights = read_weights(path)
        check(weights.shapes)
        return [*weights]

    for name in processes.from_main(names):
        yield name, processes.from_main(lambda: weights[name])  # noqa: B023


def check_trained(found: Collection[str], trained: Collection[str]) -> None:
    """Raises UserError if the moments with the names `found` are not those of the `trained` parameters."""
    of = {name.partition("/")[2] for name in found}
    if of and of != {*trained}:
        raise UserError(
            f"the checkpoint has other trainable parameters ({shorten(sorted(of ^ {*trained}), 3)}): set "
            "start.freeze back to what config.toml says, or start a new run with --start.model"
        )
