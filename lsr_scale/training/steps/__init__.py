"""What happens within a training step: the loss and its checks, CUDA graphs, gradients across processes."""
