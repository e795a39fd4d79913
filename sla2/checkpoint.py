"""Checkpoints of a training run: the newest state, to go on from, and the best weights so far; safetensors, replaced atomically.

Random draws depend on (seed, step, place) only (`sla2.flow`), and the data's order on (seed, step), so weights, averages,
optimiser state, step and log are all of it. Files hold whole tensors: a run may go on in another number of processes.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sla2.errors import UserError
from sla2.files import atomic_path, settings_hash
from sla2.team import Team, split_like

Optimizers = list[torch.optim.Optimizer]


class Checkpoint:
    """The newest state and the best weights of one run, in a folder that Snakemake does not know, so that a failed job keeps it.

    Args:
        folder: where the files lie.
        identity: everything that the run's result depends on; a checkpoint of another identity is refused.
        every: steps between two saves.
        team: its first process writes, all read.
    """

    def __init__(self, folder: str | Path, name: str, identity: dict, every: int, team: Team | None = None) -> None:
        self.path = Path(folder) / f"{name}.safetensors"
        self.best_path = Path(folder) / f"{name}-best.safetensors"
        self.identity, self.every = settings_hash(identity), every
        self.team = team or Team(torch.device("cpu"))

    def save(self, step: int, modules: dict[str, nn.Module], optimizers: Optimizers, extra: dict) -> None:
        """Save after `step` steps; `extra` is JSON-able, such as the log so far.

        Raises:
            UserError: when the disk has no room; the former checkpoint stays.
        """
        tensors = {
            f"{name}/{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
        }
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{index}/{key}": torch.as_tensor(v) for key, v in state.items()}
        self._write(self.path, tensors, {"step": str(step), "extra": json.dumps(extra)})

    def finish(self, step: int, modules: dict[str, nn.Module], extra: dict) -> None:
        """Put the weights that a run ends with in place of its state: `finished` is true, and `load` asks for no optimisers.

        Raises:
            UserError: as `save`.
        """
        tensors = {
            f"{name}/{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
        }
        self._write(self.path, tensors, {"step": str(step), "extra": json.dumps(extra), "finished": "yes"})

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end.

        Raises:
            UserError: as `load`.
        """
        return self.path.is_file() and "finished" in self._meta(self.path)

    def save_best(self, step: int, module: nn.Module, value: float) -> None:
        """Save weights as the best so far if `value`, such as a held-out loss, is the lowest.

        Raises:
            UserError: as `save`.
        """
        if self.best_path.is_file() and value >= float(self._meta(self.best_path)["value"]):
            return
        self._write(self.best_path, module.state_dict(), {"step": str(step), "value": repr(value)})

    def load_best(self, module: nn.Module) -> None:
        """Put the best weights into the module."""
        self._meta(self.best_path)
        with safe_open(self.best_path, framework="pt") as file:
            _fill(module, file, "")

    def load(self, modules: dict[str, nn.Module], optimizers: Optimizers) -> tuple[int, dict]:
        """Restore in place; returns steps done and `extra`, or 0 and an empty dict without a checkpoint.

        Raises:
            UserError: when the checkpoint was made with other settings.
        """
        if not self.path.is_file():
            return 0, {}
        meta = self._meta(self.path)
        with safe_open(self.path, framework="pt") as file:
            for name, module in modules.items():
                _fill(module, file, f"{name}/")
            for number, optimizer in enumerate(optimizers):
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                state: dict[int, dict] = {}
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name.startswith(f"optimizer/{number}/"):
                        index, key = name.split("/")[2:]
                        tensor, parameter = file.get_tensor(name), parameters[int(index)]
                        same = tensor.shape == parameter.shape
                        state.setdefault(int(index), {})[key] = split_like(tensor, parameter) if same else tensor
                optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(meta["step"]), json.loads(meta["extra"])

    def remove(self) -> None:
        """Delete the files and their folder once the result is written."""
        for path in (self.path, self.best_path):
            path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def _write(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
        whole = self.team.whole(tensors)
        if self.team.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            need, free = sum(t.nbytes for t in whole.values()), shutil.disk_usage(path.parent).free
            if need > free:  # the former one stays until the new one is whole
                raise UserError(
                    f"{path}: needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; "
                    "free some space and run the same command to resume"
                )
            with atomic_path(path) as temporary:
                save_file(whole, temporary, {"identity": self.identity, **meta})
        self.team.wait()

    def _meta(self, path: Path) -> dict[str, str]:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
        if meta["identity"] != self.identity:
            raise UserError(f"{path}: made with other settings; delete it to start anew")
        return meta


def _fill(module: nn.Module, file, prefix: str) -> None:
    """Load a module from the tensors of an open file whose names begin with `prefix`, split as the module's own are."""
    own = module.state_dict()
    names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
    state = {name[len(prefix) :]: name for name in names}
    module.load_state_dict({key: split_like(file.get_tensor(name), own[key]) for key, name in state.items()})
