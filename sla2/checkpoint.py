"""Checkpoints of a training run in one safetensors file, replaced atomically; no pickle.

Random draws depend on (seed, step) only (`sla2.flow.generator`), so weights, optimiser state and the log are all of it.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sla2.errors import UserError
from sla2.files import atomic_path, settings_hash

Optimizers = list[torch.optim.Optimizer]


class Checkpoint:
    """The newest state of one run, in a folder that Snakemake does not know, so that a failed job keeps it.

    Args:
        folder: where the file lies.
        identity: everything that the run's result depends on; a checkpoint of another identity is refused.
        every: steps between two saves.
    """

    def __init__(self, folder: str | Path, name: str, identity: dict, every: int) -> None:
        self.path = Path(folder) / f"{name}.safetensors"
        self.identity, self.every = settings_hash(identity), every

    def save(self, step: int, modules: dict[str, nn.Module], optimizers: Optimizers, extra: dict) -> None:
        """Save after `step` steps; `extra` is JSON-able, such as the log so far."""
        tensors = {
            f"{name}/{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
        }
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{index}/{key}": torch.as_tensor(v) for key, v in state.items()}
        meta = {"identity": self.identity, "step": str(step), "extra": json.dumps(extra)}
        with atomic_path(self.path) as temporary:
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary, meta)

    def load(self, modules: dict[str, nn.Module], optimizers: Optimizers) -> tuple[int, dict]:
        """Restore in place; returns steps done and `extra`, or 0 and an empty dict without a checkpoint.

        Raises:
            UserError: when the checkpoint was made with other settings.
        """
        if not self.path.is_file():
            return 0, {}
        with safe_open(self.path, framework="pt") as file:
            meta = file.metadata()
            if meta["identity"] != self.identity:
                raise UserError(f"{self.path}: made with other settings; delete it to start anew")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for name, module in modules.items():
            prefix = f"{name}/"
            module.load_state_dict({key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)})
        for number, optimizer in enumerate(optimizers):
            state: dict[int, dict] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer/{number}/"):
                    index, key = name.split("/")[2:]
                    state.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(meta["step"]), json.loads(meta["extra"])

    def remove(self) -> None:
        """Delete the file and its folder once the result is written."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()
