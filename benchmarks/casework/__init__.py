"""What the benchmarks of detection and of repair share: the cases, how to train them, the recorded runs, the scores."""
