"""Generation whose decoding steps are replayed as a CUDA graph.

sampling.py      how tokens are chosen
active_pairs.py  a model's active adapters in memory that a graph can read
step.py          a decoding step with a key/value cache of fixed size, eager or as a graph
fallback.py      why a model's steps are transformers' own
decoder.py       `Decoder`: prompts in, tokens out, for a base, an adapter, or many adapters in one batch
"""

from lsr_scale.generation.decoder import Decoder
from lsr_scale.generation.fallback import decoder_fallback_reason
from lsr_scale.generation.sampling import Sampling

__all__ = ["Decoder", "Sampling", "decoder_fallback_reason"]
