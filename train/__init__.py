"""Training PreResNets on CIFAR with the paper's recipe."""
