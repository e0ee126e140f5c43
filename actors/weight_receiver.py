"""The engine's end of the CPU weight transfer: a vLLM WeightTransferEngine, in the EngineCore process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from raygent.actors.weight_transfer import GLOO_TIMEOUT, Bucket


@dataclass
class Init(WeightTransferInitInfo):
    pass


@dataclass
class Update(Bucket, WeightTransferUpdateInfo):
    def __post_init__(self) -> None:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise ValueError("names, dtypes and shapes of a weight update must have one length")


class CpuWeightReceiver(WeightTransferEngine[Init, Update]):
    init_info_cls = Init
    update_info_cls = Update
    supports_draft_weight_update = False
    group: Any = None
    half_done = False

    def init_transfer_engine(self, init_info: Init) -> None:
        """Nothing to set up: each bucket says where its bytes are."""

    def start_weight_update(self) -> None:
        if self.half_done:  # an update that raised: what it left in layers not yet full would be counted to this one
            self.finish_weight_update()
        initialize_layerwise_reload(self.model)
        self.half_done = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # the base class ends in an accelerator's synchronise

    def receive_weights(self, update_info: Update) -> None:
        dtypes = [getattr(torch, name) for name in update_info.dtypes]
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in zip(update_info.shapes, dtypes, strict=True)]
        if update_info.gloo:
            flat = self._broadcast(update_info.gloo, sum(sizes))
        else:
            flat = torch.from_file(update_info.file, shared=False, size=sum(sizes), dtype=torch.uint8)
        pieces = flat.split(sizes)
        model: Any = self.model
        model.load_weights(
            (name, piece.clone().view(dtype).view(shape))  # a clone is aligned, whatever its dtype and those before it
            for name, piece, dtype, shape in zip(update_info.names, pieces, dtypes, update_info.shapes, strict=True)
        )

    def _broadcast(self, gloo: dict[str, Any], size: int) -> torch.Tensor:
        if gloo["port"]:  # the first bucket of a push opens the group
            store = torch.distributed.TCPStore(
                gloo["host"], gloo["port"], gloo["size"], is_master=False, timeout=GLOO_TIMEOUT
            )
            rank = store.add("receivers", 1)
            self.group = (torch.distributed.ProcessGroupGloo(store, rank, gloo["size"], GLOO_TIMEOUT), store)
        flat = torch.empty(size, dtype=torch.uint8)
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.group[0].broadcast([flat], options).wait()
        return flat

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        if self.model_config.hf_config.tie_word_embeddings and head is not None and hasattr(head, "quant_method"):
            # A tied head keeps packed weights of its own (oneDNN), which the reload passes over.
            head.quant_method.process_weights_after_loading(head)
        self.group = None
        self.half_done = False

    def shutdown(self) -> None:
        self.group = None
