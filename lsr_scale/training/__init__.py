"""From a run to its trainer: the loop is transformers' and TRL's, here is what they do otherwise for us."""
