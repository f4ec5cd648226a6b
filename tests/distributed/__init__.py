"""Trainings of several processes on torch.distributed."""
