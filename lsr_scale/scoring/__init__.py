"""Multiple-choice accuracy, by a small scorer that agrees with lm-eval example by example; a classifier's metrics."""
