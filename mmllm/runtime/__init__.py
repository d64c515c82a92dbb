"""The machine and its processes: console, device, memory, signals, torch.distributed."""
