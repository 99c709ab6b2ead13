"""The only layer that imports megatron.core and torch.distributed."""
