"""LoRA adapters, the policies of a run that leaves the model's own weights as they are: peft's, one for each name in
`config.adapters`, around one frozen model. They go to the engines as the bytes of the files that peft and vLLM read.
"""

from __future__ import annotations

import difflib
import tempfile
import time
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from raygent.actors.weight_transfer import EngineUpdates, full_parameters
from raygent.config import Config
from raygent.records import last_line

FOLDER = "adapters"  # of a checkpoint: NAME/adapter_config.json, NAME/adapter_model.safetensors
Files = dict[str, bytes]  # of one adapter, by name


def add_adapters(model: Any, config: Config) -> Any:
    """`model`, frozen, with the run's adapters around its linear layers (peft's PeftModel). Each begins as no change."""
    from peft import LoraConfig, get_peft_model

    lora = config.learner.lora
    assert lora
    layers = [name for name, _ in model.named_modules()]
    for target in lora.targets or ():
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            near = difflib.get_close_matches(target, {layer.rpartition(".")[2] for layer in layers}, 1)
            mend = f"did you mean {near[0]}?" if near else "name linear layers of the model, as q_proj"
            raise ValueError(f"learner.lora.targets: the model has no layer {target!r}; {mend}")
    first, *others = map(_in_peft, config.adapters)
    one = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=lora.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        peft = get_peft_model(model, copy(one), adapter_name=first)
    except ValueError as error:
        raise ValueError(f"learner.lora.targets: {last_line(error)}; name linear layers of the model") from error
    for name in others:
        peft.add_adapter(name, copy(one))
    use(peft, config.adapters[0])
    found = sum(len(parameters_of(peft, name)) for name in config.adapters)
    if found != sum(".lora_" in name for name, _ in peft.named_parameters()):
        raise ValueError(
            f"learner.lora.targets: {lora.targets} names what is no linear layer; name linear layers alone"
        )
    return peft


def use(model: Any, name: str) -> None:
    """The next forward pass goes through the adapter `name`; all of them stay in the optimiser's hands."""
    model.set_adapter(_in_peft(name))
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.requires_grad_(True)


def _in_peft(name: str) -> str:
    """peft keeps adapters in torch's ModuleDict, which has no room for names such as "train"."""
    return f"policy_{name}"


def parameters_of(model: Any, name: str) -> list[torch.nn.Parameter]:
    return [parameter for _, parameter in named_parameters(model, name)]


def named_parameters(model: Any, name: str) -> list[tuple[str, torch.nn.Parameter]]:
    ends = (f".lora_A.{_in_peft(name)}.weight", f".lora_B.{_in_peft(name)}.weight")
    return [(key, parameter) for key, parameter in model.named_parameters() if key.endswith(ends)]


def files_of(model: Any, name: str, zero_stage: int, keep: bool) -> Files:
    """The adapter as peft saves it. Under ZeRO-3 a collective: every rank calls it, those that do not `keep` get nothing."""
    from peft import get_peft_model_state_dict

    state = {
        key: tensor.to("cpu", copy=True).contiguous() if keep else None
        for key, tensor in full_parameters(named_parameters(model, name), zero_stage)
    }
    if not keep:
        return {}
    tensors = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=_in_peft(name), save_embedding_layers=False
    )
    return {"adapter_model.safetensors": save(tensors), "adapter_config.json": _config_json(model, name)}


def _config_json(model: Any, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config[_in_peft(name)].save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_bytes()


def write_files(files: Files, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read_files(checkpoint: Path, adapters: list[str]) -> dict[str, Files]:
    """The adapters in the folder of a checkpoint. Raises FileNotFoundError where it lacks one."""
    folders = {name: checkpoint / FOLDER / name for name in adapters}
    return {name: {file.name: file.read_bytes() for file in folder.iterdir()} for name, folder in folders.items()}


def push_adapters(model: Any, config: Config, rank: int, engine: EngineUpdates, version: int) -> dict[str, float]:
    """Send every adapter to each engine replica that lacks `version`. All ranks call it; rank 0 sends.

    Returns {"push_bytes", "push_seconds"} (0 on other ranks).
    """
    started = time.monotonic()
    adapters = {name: files_of(model, name, config.learner.zero_stage, rank == 0) for name in config.adapters}
    if rank != 0:
        return {"push_bytes": 0.0, "push_seconds": 0.0}
    behind = [replica for replica in engine.begin_update(version) if not replica["current"]]
    if behind:
        engine.load_adapters(adapters)
        engine.finish_update(version)
    size = sum(len(content) for files in adapters.values() for content in files.values())
    return {"push_bytes": float(size * len(behind)), "push_seconds": time.monotonic() - started}
