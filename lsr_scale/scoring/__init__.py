"""Multiple-choice accuracy: a small scorer that agrees with lm-eval example by example."""

from lsr_scale.scoring.scorer import encode_pairs, score

__all__ = ["encode_pairs", "score"]
