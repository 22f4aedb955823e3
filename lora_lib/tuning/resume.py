"""The checkpoint of a training run: one safetensors file from which the run goes on exactly."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_lib.files import atomic


@dataclass
class TrainingRun:
    """Everything that decides how training goes on: what `save` writes and `load` restores.

    `settings` (names to JSON values) must be the same in the file and now; `losses` and `factors`
    hold the loss and the learning rate's factor of each step that is done.
    """
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    settings: dict
    losses: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the checkpoint; whoever reads `path` sees the old file or the whole new one."""
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous()
                   for name, tensor in self._tensors().items()}
        state = json.dumps({"settings": self._description(), "scaler": self.scaler.state_dict()})
        metadata = {"fine_tune": state, "digest": fingerprint(tensors, state)}
        with atomic(path) as file:
            safetensors.torch.save_file(tensors, file, metadata)

    @torch.no_grad()
    def load(self, path: Path, steps: int, schedule) -> None:
        """Restore the run from `path`. Raises ValueError, and changes nothing, if the file is
        damaged, or belongs to another run than this one of `steps` steps under `schedule`."""
        state, saved = _read(path)
        _refuse_another_run(path, state["settings"], self._description())
        done = len(saved["losses"])
        if done > steps:
            raise ValueError(f"{path} holds {done} steps, more than steps = {steps}")
        factors = [float(schedule(step)) for step in range(done)]
        if not torch.allclose(torch.tensor(factors, dtype=torch.float64), saved["factors"],
                              rtol=1e-9, atol=1e-12):
            raise ValueError(f"{path} was trained under another schedule of the learning rate")

        self.losses, self.factors = saved["losses"].tolist(), factors
        self.scaler.load_state_dict(state["scaler"])
        for name, tensor in (self._parameters() | self._buffers()).items():
            tensor.copy_(saved[name])
        for name, parameter in self._parameters().items():
            self.optimizer.state[parameter] = {
                key: saved[key + name] if key == "step" else saved[key + name].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq") if key + name in saved}
        torch.set_rng_state(saved["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng.cuda"], self.device)

    def _parameters(self):
        return {f".parameter.{name}": parameter
                for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _buffers(self):
        """What training changes without a gradient, such as the averages of a BatchNorm."""
        kept = self.model.state_dict()
        return {f".buffer.{name}": b for name, b in self.model.named_buffers() if name in kept}

    def _tensors(self):
        tensors = self._parameters() | self._buffers() | {"rng.cpu": torch.get_rng_state()}
        for name, parameter in self._parameters().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[key + name] = value
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name in ("losses", "factors"):
            tensors[name] = torch.tensor(getattr(self, name), dtype=torch.float64)
        return tensors

    def _description(self):
        return self.settings | {
            name.removeprefix("."): f"{str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}"
            for name, tensor in (self._parameters() | self._buffers()).items()}


def fingerprint(tensors: dict[str, Tensor], text: str = "") -> str:
    """A hash of the tensors' names, dtypes, shapes, and bytes, and of `text`: 16 hex digits."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _read(path):
    """The state and the tensors of the checkpoint at `path`, or ValueError."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    if "fine_tune" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of fine_tune")
    if metadata.get("digest") != fingerprint(tensors, metadata["fine_tune"]):
        raise ValueError(f"{path} is damaged: its contents do not match their digest")
    return json.loads(metadata["fine_tune"]), tensors


def _refuse_another_run(path, saved, now):
    differences = [f"{name}: {saved.get(name, 'absent')} in the checkpoint, "
                   f"{now.get(name, 'absent')} now"
                   for name in sorted(saved | now) if saved.get(name) != now.get(name)]
    if len(differences) > 8:
        differences[8:] = [f"and {len(differences) - 8} more"]
    if differences:
        raise ValueError(f"{path} belongs to another run; delete it or restore its settings:\n  "
                         + "\n  ".join(differences))
