"""Loading: the base, and the adapter that goes into it."""

import logging
from contextlib import contextmanager
from pathlib import Path

from torch import device as torch_device
from torch import cuda, nn

from lora_lib.models import NAMES
from lora_lib.torch import load_adapter, load_pretrained
from lora_lib.torch.parts import all_adapters
from lora_lib.torch.peft_format import CONFIG, read_config


@contextmanager
def naming(what: str):
    """Put the option or file that is to blame in front of an error's message."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise ValueError(f"{what}: {error}") from error


def device_of(name: str) -> str:
    """The device that "auto" stands for, or this one."""
    if name == "auto":
        return "cuda" if cuda.is_available() else "cpu"
    with naming(f"--device {name}"):
        device = torch_device(name)
        if device.type == "cuda" and (device.index or 0) >= cuda.device_count():
            raise ValueError(f"torch finds {cuda.device_count()} GPUs here; leave the option out "
                             "for the best that there is")
    return name


def full_name(name: str) -> str:
    """A folder or file by its whole path, so that it is found from elsewhere; a name as it is."""
    return str(Path(name).resolve()) if name not in NAMES and Path(name).exists() else name


def load_base(name: str, device: str = "auto", option: str = "--model") -> nn.Module:
    """A causal model of transformers in float32, with its tokenizer.

    Raises ValueError, with the `option` that gave the name in front.
    """
    from transformers.utils import logging as theirs
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    device = device_of(device)
    with naming(f"{option} {name}"):
        model = load_pretrained(name, device=device)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None or not hasattr(model.tokenizer, "apply_chat_template"):
            raise ValueError("this is no language model of transformers; try smollm2")
    return model


def load_adapted(folder: Path, base: str | None, device: str, strength: float = 1.0) -> nn.Module:
    """The base that the adapter in `folder` names, or `base`, with the adapter in it."""
    return with_adapter(load_base(base or base_of(folder), device), folder, strength)


def with_adapter(model: nn.Module, folder: Path, strength: float = 1.0) -> nn.Module:
    """Put the adapter, times `strength`, into its base. Raises what `load_adapter` does."""
    load_adapter(model, folder)
    for part in all_adapters(model).values():
        part.alpha, part.scaling = part.alpha * strength, part.scaling * strength
    return model.eval()


def base_of(folder: Path) -> str:
    """The name of the base in the adapter's configuration."""
    if not (folder / CONFIG).is_file():
        from lora_lib.command.folder import RUNNING
        why = ("its run is not finished; give the tune command again" if (folder / RUNNING).exists()
               else "give the folder that tune, or PEFT, has written")
        raise FileNotFoundError(f"there is no adapter at {folder} ({CONFIG}): {why}")
    name = read_config(folder / CONFIG).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder / CONFIG} does not name the base; give --model")
    return name
