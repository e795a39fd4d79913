"""Loading published weights into an architecture: strictly, and with a message that names what does not fit."""

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sla2.errors import UserError


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        UserError: when it is none.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: is no safetensors file ({error}); convert it as eval/README.md says") from None


def fill(model: nn.Module, state: dict[str, Tensor], path: Path, unused: Iterable[str] = ()) -> nn.Module:
    """Put tensors into a model, all of them and nothing else, and freeze it in eval mode.

    Args:
        path: of the file, for messages.
        unused: names that the published file has and this architecture needs not.

    Raises:
        UserError: naming tensors that are missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    state = {name: tensor for name, tensor in state.items() if name not in set(unused)}
    # A counter of training steps, which no published file needs.
    missing = sorted(name for name in expected.keys() - state.keys() if not name.endswith("num_batches_tracked"))
    problems = [f"missing {name}" for name in missing]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the architecture has {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems[:3])} ({len(problems)} in all); is it the file of this metric?")
    model.load_state_dict(state, strict=False)
    return model.float().eval().requires_grad_(False)
