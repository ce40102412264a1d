"""Every operation as users call it: checks, autograd, ``torch.library`` registration, choice of room by device."""
