"""llama.cpp's logits, from the CPU library in the wheel of llama-cpp-py-sync (pip install llama-cpp-py-sync)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest


class LlamaCpp:
    """A GGUF model, and at choice an adapter on it."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings")
        self.ffi, self.lib = bindings.get_ffi(), bindings.get_lib()
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(model).encode(), self.lib.llama_model_default_params())
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = 1
        assert self.model != self.ffi.NULL
        self.context = self.lib.llama_init_from_model(self.model, options)
        assert self.context != self.ffi.NULL
        if adapter is not None:
            loaded = self.lib.llama_adapter_lora_init(self.model, str(adapter).encode())
            assert loaded != self.ffi.NULL, "llama.cpp refuses the adapter"
            adapters, scales = self.ffi.new("struct llama_adapter_lora *[]", [loaded]), self.ffi.new("float[]", [1.0])
            assert self.lib.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits `[tokens, vocabulary]`."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = int(token), index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        assert self.lib.llama_decode(self.context, batch) == 0
        size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        rows = [
            np.frombuffer(self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, i), 4 * size), np.float32).copy()
            for i in range(len(tokens))
        ]
        self.lib.llama_batch_free(batch)
        return np.stack(rows)
