"""The machine and its processes: console, files, threads, device, memory, machine, signals, torch.distributed."""
